"""Exchange, outbound queues, and the dead-letter exchange and queue behind them: declared, or only checked."""

from typing import Any

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractQueue

from gateway.config import Settings


async def ensure_topology(connection: AbstractConnection, settings: Settings) -> str:
    """Declare exchange and queues, or check them (GATEWAY_AMQP_TOPOLOGY).

    Returns the broker's words if it does not let the user verify the queues' type; "" if that is verified. Raises the
    errors of aiormq.
    """
    if settings.amqp_topology == "check":
        return await verify_topology(connection, settings)
    async with connection.channel() as channel:
        exchange = await _exchange(channel, settings)
        if dead_letter_queue(settings):
            dead_exchange, dead_queue = await _dead_letters(channel, settings)
            await dead_queue.bind(dead_exchange)
        for queue in await _queues(channel, settings):
            await queue.bind(exchange, routing_key=queue.name)
    return ""


def describe_topology(settings: Settings) -> list[str]:
    """Return a line about each exchange and queue that ensure_topology declares."""
    exchange, kind = settings.amqp_exchange, settings.amqp_queue_type
    dead_queue, dead_exchange = dead_letter_queue(settings), _dead_letter_exchange(settings)
    suffix = f", with dead letters to {dead_exchange}" if dead_queue else ""
    lines = [f"exchange {exchange} ({aio_pika.ExchangeType.DIRECT.value})"]
    lines += [f"queue {name} ({kind}), bound to {exchange}{suffix}" for name in settings.queues()]
    if dead_queue:
        lines += [
            f"exchange {dead_exchange} ({aio_pika.ExchangeType.FANOUT.value})",
            f"queue {dead_queue} ({kind}), bound to {dead_exchange}",
        ]
    return lines


def dead_letter_queue(settings: Settings) -> str | None:
    """Return the name of the queue of dead letters. None: streams keep all messages and dead-letter none."""
    return None if settings.amqp_queue_type == "stream" else f"{settings.amqp_queue}.dead"


def _dead_letter_exchange(settings: Settings) -> str:
    return f"{settings.amqp_exchange}.dlx"


async def verify_topology(
    connection: AbstractConnection, settings: Settings, *, with_dead_letters: bool = False
) -> str:
    """Verify that exchange and queues exist, and their type, durability and arguments.

    Returns the broker's words if it refuses the right to configure; "" if all is verified. The dead letters are left
    out as a rule: a gateway with GATEWAY_AMQP_TOPOLOGY=check does not use them, and needs no right to them.

    A passive declaration looks only at the existence. An active one of what exists, with the same arguments, changes
    nothing; with others it is refused, and ChannelPreconditionFailed raised. It needs the right to configure.
    """
    async with connection.channel() as channel:
        await _exchange(channel, settings, passive=True)
        await _queues(channel, settings, passive=True)
        if with_dead_letters:
            await _dead_letters(channel, settings, passive=True)
    try:
        async with connection.channel() as channel:
            await _queues(channel, settings)
            await _exchange(channel, settings)
            if with_dead_letters:
                await _dead_letters(channel, settings)
    except aiormq.exceptions.ChannelAccessRefused as error:
        return str(error)
    return ""


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


async def _exchange(channel: AbstractChannel, settings: Settings, *, passive: bool = False) -> AbstractExchange:
    kind = aio_pika.ExchangeType.DIRECT
    return await channel.declare_exchange(settings.amqp_exchange, kind, durable=True, passive=passive)


async def _queues(channel: AbstractChannel, settings: Settings, *, passive: bool = False) -> list[AbstractQueue]:
    arguments: dict[str, Any] = {"x-queue-type": settings.amqp_queue_type}
    if settings.amqp_queue_type != "stream":
        arguments["x-dead-letter-exchange"] = _dead_letter_exchange(settings)
    if settings.queue_shards > 1 and settings.amqp_queue_type != "classic":
        arguments["x-queue-leader-locator"] = "balanced"  # spread the leaders, which do the work, over the nodes
    return [
        await channel.declare_queue(name, durable=True, passive=passive, arguments=arguments)
        for name in settings.queues()
    ]


async def _dead_letters(
    channel: AbstractChannel, settings: Settings, *, passive: bool = False
) -> tuple[AbstractExchange, AbstractQueue]:
    kind = aio_pika.ExchangeType.FANOUT
    arguments: dict[str, Any] = {"x-queue-type": settings.amqp_queue_type}
    return (
        await channel.declare_exchange(_dead_letter_exchange(settings), kind, durable=True, passive=passive),
        await channel.declare_queue(dead_letter_queue(settings), durable=True, passive=passive, arguments=arguments),
    )
