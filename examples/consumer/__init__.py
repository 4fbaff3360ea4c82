"""A reference consumer: it takes SMS from the queue and hands each on once, however often the broker delivers it.

    settings   from the environment
    payloads   pure: the bytes of one AMQP message → SMS
    inbox      PostgreSQL: the ids that were handed on, and the deliveries
    consumer   RabbitMQ: deliveries → groups → one transaction each → acks

The README explains how it works, and what changes when an SMS is handed on over HTTP.
"""

from examples.consumer.consumer import Consumer, open_consumer
from examples.consumer.settings import Settings

__all__ = ["Consumer", "Settings", "open_consumer"]
