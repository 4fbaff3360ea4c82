"""The other half of the at-least-once promise: takes SMS from the queue and hands each on once, however often it came.

    settings   from the environment
    payloads   pure: the bytes of one AMQP message → SMS
    inbox      PostgreSQL: which ids were handed on, and the deliveries themselves
    consumer   RabbitMQ: deliveries → groups → one transaction each → acks

Its README says how it works, and what changes when an SMS is handed on over HTTP.
"""

from examples.consumer.consumer import Consumer, open_consumer
from examples.consumer.settings import Settings

__all__ = ["Consumer", "Settings", "open_consumer"]
