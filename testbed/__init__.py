"""Private PostgreSQL, RabbitMQ, HAProxy and gateway processes for tests, benchmarks, examples and the demo."""
