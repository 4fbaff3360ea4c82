"""Exchange, outbound queues, and the dead-letter exchange and queue behind them: declared, or only checked."""

from typing import Any

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel

from gateway.config import Settings


async def ensure_topology(channel: AbstractChannel, settings: Settings) -> None:
    """Declare exchange and queues, or check that they exist (GATEWAY_AMQP_TOPOLOGY).

    Raises the errors of aiormq, which close the channel.
    """
    check_only = settings.amqp_topology == "check"
    exchange = await channel.declare_exchange(
        settings.amqp_exchange, aio_pika.ExchangeType.DIRECT, durable=True, passive=check_only
    )
    arguments: dict[str, Any] = {"x-queue-type": settings.amqp_queue_type}
    if settings.amqp_queue_type != "stream":  # streams keep all messages and dead-letter none
        arguments["x-dead-letter-exchange"] = f"{settings.amqp_exchange}.dlx"
        if not check_only:
            await _declare_dead_letters(channel, settings)
    if settings.queue_shards > 1 and settings.amqp_queue_type != "classic":
        arguments["x-queue-leader-locator"] = "balanced"  # spread the leaders, which do the work, over the nodes
    for name in settings.queues():
        queue = await channel.declare_queue(name, durable=True, passive=check_only, arguments=arguments)
        if not check_only:
            await queue.bind(exchange, routing_key=name)


async def check_may_publish(channel: AbstractChannel, settings: Settings) -> None:
    """Raise PermissionError if the user may not write to the exchange. Changes nothing, but may close the channel.

    AMQP cannot ask for a right. RabbitMQ checks the right to write to the destination of an unbind before it looks at
    the source. So what it says about the source of this unbind, which does not exist, is of no interest.
    """
    exchange = await channel.get_exchange(settings.amqp_exchange, ensure=False)
    try:
        await exchange.unbind("sms-gateway.no-exchange")
    except aiormq.exceptions.ChannelNotFoundEntity:
        return
    except aiormq.exceptions.ChannelAccessRefused as error:
        if f"'{settings.amqp_exchange}'" in str(error):
            raise PermissionError(f"{error}. Give the user the right to write to the exchange") from error


async def _declare_dead_letters(channel: AbstractChannel, settings: Settings) -> None:
    exchange = await channel.declare_exchange(
        f"{settings.amqp_exchange}.dlx", aio_pika.ExchangeType.FANOUT, durable=True
    )
    queue = await channel.declare_queue(
        f"{settings.amqp_queue}.dead", durable=True, arguments={"x-queue-type": settings.amqp_queue_type}
    )
    await queue.bind(exchange)
