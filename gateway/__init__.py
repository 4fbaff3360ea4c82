"""Bulk-SMS ingestion: one HTTP call of up to 1,000 messages becomes one confirmed RabbitMQ batch.

One request's path, each step a module of the same name:

    admit → authenticate → decode → validate → own → build → publish → answer
    api     auth           wire     batch      store  batch   amqp      api

What counts as queued has been confirmed by the broker; what could not be confirmed is said to be unknown.
"""

__version__ = "0.1.0"
