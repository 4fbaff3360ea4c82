"""HTTP: handlers and routes, JSON answers, connection limits, the operations listener."""
