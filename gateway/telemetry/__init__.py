"""Logs, counters, the record of each request, and traces."""
