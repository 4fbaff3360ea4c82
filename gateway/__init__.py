"""Bulk-SMS ingestion: one HTTP call of up to 1,000 messages becomes one confirmed RabbitMQ batch.

ARCHITECTURE.md has the map of the packages and the way of a request through them.
"""

__version__ = "0.2.0.dev0"
