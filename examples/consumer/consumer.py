"""RabbitMQ: deliveries → groups → one transaction each → acks. Nothing is acked before its transaction is committed."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from examples.consumer.inbox import DATABASE_ERRORS, Deliver, Inbox, insert_deliveries
from examples.consumer.payloads import Poison, Sms, decode
from examples.consumer.settings import Settings

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.1, 3.0)  # full jitter between them: replicas do not come back in step
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0


class UnsupportedQueue(Exception):
    """The queue is a stream: no acks, no dead letters, and an offset to keep, which this consumer does not."""


class BrokerLost(Exception):
    """The connection or the consumer's place on the queue is gone; what is not acked will be delivered again."""


class Delivery(NamedTuple):
    """One AMQP message and the SMS in it; none if it is poison."""

    message: AbstractIncomingMessage
    contents: list[Sms]


class Consumer:
    """Consumes one queue until stop(). Connections to broker and database heal by themselves."""

    def __init__(self, settings: Settings, deliver: Deliver = insert_deliveries) -> None:
        self._settings = settings
        self._deliver = deliver
        self._stopping = asyncio.Event()
        self._subscription: _Subscription | None = None
        self.delivered = 0  # SMS handed on, as far as the commits were answered
        self.dropped_repeats = 0
        self.discarded_old = 0
        self.dead_lettered = 0  # AMQP messages

    def stop(self) -> None:
        """Finish the group in hand, ack it, and leave; run() then returns."""
        self._stopping.set()
        if self._subscription is not None:
            self._subscription.end()

    async def run(self) -> None:
        """Consume until stop(). Raises UnsupportedQueue, and whatever `deliver` raises beyond DATABASE_ERRORS."""
        async with Inbox(self._settings, self._deliver) as inbox:
            sweeping = asyncio.create_task(self._keep_sweeping(inbox))
            try:
                await self._keep_consuming(inbox)
            finally:
                sweeping.cancel()
                await asyncio.wait([sweeping])

    async def _keep_consuming(self, inbox: Inbox) -> None:
        failures = 0
        nodes = self._settings.amqp_nodes()
        while not self._stopping.is_set():
            try:
                async with self._subscribe(nodes[failures % len(nodes)]) as subscription:
                    failures = 0
                    while not subscription.is_over.is_set():
                        if group := await self._next_group(subscription):
                            await self._settle(group, inbox, subscription)
            except BrokerLost as error:
                log.warning("the broker is away: %s", error)
            if not self._stopping.is_set():
                failures += 1
                await _wait(self._stopping, timeout=_retry_delay_s(failures))

    @asynccontextmanager
    async def _subscribe(self, node: str) -> AsyncIterator["_Subscription"]:
        """A place on the queue, for the length of the block. Raises BrokerLost."""
        subscription = _Subscription()
        connection: aio_pika.abc.AbstractConnection | None = None
        try:
            async with _broker_errors_are_loss(), asyncio.timeout(CONNECT_TIMEOUT_S):
                heartbeat = self._settings.amqp_heartbeat_s
                connection = await aio_pika.connect(node, heartbeat=heartbeat, name="sms-consumer")
                channel = await connection.channel(publisher_confirms=False)
                await channel.set_qos(prefetch_count=self._settings.prefetch)
                channel.close_callbacks.add(subscription.end)
                underlay = await channel.get_underlay_channel()
                underlay.on_consumer_cancel_callbacks.add(subscription.end)  # the queue was deleted, or moved
                queue = await channel.get_queue(self._settings.queue)  # must exist: the gateway declares it
                await queue.consume(subscription.receive)
            self._subscription = subscription
            if self._stopping.is_set():
                subscription.end()
            log.info("consuming %s", self._settings.queue)
            yield subscription
        finally:
            self._subscription = None
            if connection is not None:
                await _close(connection)

    async def _next_group(self, subscription: "_Subscription") -> list[Delivery]:
        """Deliveries with about group_size SMS, or what comes within group_wait_s of the first."""
        group: list[Delivery] = []
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as waiting:
                while size < self._settings.group_size:
                    message = await subscription.next_message()
                    if message is None:
                        break
                    if not group:
                        waiting.reschedule(asyncio.get_running_loop().time() + self._settings.group_wait_s)
                    group.append(_read(message))
                    size += max(1, len(group[-1].contents))
        return group

    async def _settle(self, group: list[Delivery], inbox: Inbox, subscription: "_Subscription") -> None:
        """Hand the group on; and when that is certain, reject its poison and ack the rest in one frame."""
        messages = [sms for delivery in group for sms in delivery.contents]
        if not await self._hand_on(messages, inbox, subscription):
            return
        async with _broker_errors_are_loss():
            for message in [message for message, contents in group if not contents]:
                await message.reject(requeue=False)
                self.dead_lettered += 1
            # After the rejections: it takes in whatever came before it.
            if good := [message for message, contents in group if contents]:
                await good[-1].ack(multiple=True)

    async def _hand_on(self, messages: list[Sms], inbox: Inbox, subscription: "_Subscription") -> bool:
        """Try until it is committed; False when the subscription ended first, and with it the right to ack.

        Meanwhile the group stays unacked with us. Requeueing would only bring it back at once, and quorum queues count
        redeliveries: with a delivery limit (20 by default from RabbitMQ 4.0) an outage would make dead letters of it.
        """
        failures = 0
        while True:
            oldest = datetime.now(UTC) - timedelta(seconds=self._settings.max_age_s)
            recent = [sms for sms in messages if sms.accepted_at >= oldest]
            by_id: dict[str, Sms] = {}
            for sms in recent:
                by_id.setdefault(sms.id, sms)
            try:
                delivered = await inbox.hand_on(by_id) if by_id else 0
            except DATABASE_ERRORS as error:
                failures += 1
                log.warning("%d SMS wait for the database: %s %s", len(by_id), type(error).__name__, error)
            else:
                self.delivered += delivered
                self.dropped_repeats += len(recent) - delivered
                self.discarded_old += len(messages) - len(recent)
                return True
            await _wait(subscription.is_over, timeout=_retry_delay_s(failures))
            if subscription.is_over.is_set():
                return False

    async def _keep_sweeping(self, inbox: Inbox) -> None:
        while True:
            try:
                await inbox.sweep()
            except DATABASE_ERRORS as error:
                log.warning("no sweep this time: %s %s", type(error).__name__, error)
            await asyncio.sleep(self._settings.sweep_interval_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter


class _Subscription:
    """The deliveries of one channel, in order, until it ends: lost, cancelled by the broker, or by stop()."""

    def __init__(self) -> None:
        self.is_over = asyncio.Event()
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()  # bounded by the prefetch
        self._last_tag = 0

    def end(self, *_: object) -> None:
        self.is_over.set()
        self._arrived.put_nowait(None)

    async def receive(self, message: AbstractIncomingMessage) -> None:
        self._arrived.put_nowait(message)

    async def next_message(self) -> AbstractIncomingMessage | None:
        """The next delivery; None at the end. Raises BrokerLost if one is missing, UnsupportedQueue for a stream."""
        message = None if self.is_over.is_set() else await self._arrived.get()
        if message is None:
            return None
        if "x-stream-offset" in message.headers:
            raise UnsupportedQueue("the queue is a stream: this consumer takes quorum and classic queues")
        # An ack takes in all tags before it. They come in order; if that were ever to change, messages would be acked
        # that nobody has seen.
        if message.delivery_tag != self._last_tag + 1:
            raise BrokerLost(f"delivery {message.delivery_tag} came after {self._last_tag}")
        self._last_tag += 1
        return message


def _read(message: AbstractIncomingMessage) -> Delivery:
    try:
        return Delivery(message, decode(message.type, message.body))
    except Poison as error:
        log.error("AMQP message %s goes to the dead letters: %s", message.message_id, error)
        return Delivery(message, [])


@asynccontextmanager
async def _broker_errors_are_loss() -> AsyncIterator[None]:
    """Whatever goes wrong with the broker → BrokerLost; also the CancelledError that aiormq leaves to its waiters."""
    try:
        yield
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
        raise BrokerLost(f"{type(error).__name__} {error}") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BrokerLost("the connection died") from None


async def _close(connection: aio_pika.abc.AbstractConnection) -> None:
    """Say goodbye, but do not wait long for a broker that no longer answers: the heartbeat will end that."""
    closing = asyncio.create_task(connection.close())
    await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
    closing.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, and of no consequence


async def _wait(event: asyncio.Event, *, timeout: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


def _retry_delay_s(failures: int) -> float:
    shortest, longest = RETRY_DELAYS_S
    return random.uniform(shortest, min(longest, shortest * 2 ** min(failures, 10)))  # noqa: S311 - jitter


@asynccontextmanager
async def open_consumer(settings: Settings, deliver: Deliver = insert_deliveries) -> AsyncIterator[Consumer]:
    """A consumer at work in the background; stopped in good order at the end. Raises what ended it before."""
    consumer = Consumer(settings, deliver)
    running = asyncio.create_task(consumer.run(), name="consumer")
    try:
        yield consumer
    finally:
        consumer.stop()
        await running
