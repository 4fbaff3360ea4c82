"""RabbitMQ: deliveries → groups → one transaction each → acks. An ack follows the commit, never precedes it."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity

from examples.consumer.inbox import DATABASE_ERRORS, Deliver, Inbox, insert_deliveries
from examples.consumer.payloads import Poison, Sms, decode
from examples.consumer.settings import Settings

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.1, 3.0)  # shortest and longest; jitter keeps replicas from returning at the same moment
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0


class UnsupportedQueue(Exception):
    """Raised for a stream: it has neither acks nor dead letters, and needs a stored offset."""


class BrokerLost(Exception):
    """Raised when the connection or the subscription is lost; messages without an ack will be delivered again."""


class Delivery(NamedTuple):
    """An AMQP message and its SMS; the list is empty if the message cannot be read."""

    message: AbstractIncomingMessage
    contents: list[Sms]


class _Connection(aio_pika.Connection):
    """A connection without aio-pika's finalizer, which would call close() in the thread that collects garbage."""

    def __del__(self) -> None:
        """Do nothing."""


class Consumer:
    """A consumer of one queue, until stop(). It reconnects to broker and database by itself."""

    def __init__(self, settings: Settings, deliver: Deliver = insert_deliveries) -> None:
        self._settings = settings
        self._deliver = deliver
        self._stopping = asyncio.Event()
        self._subscription: _Subscription | None = None
        self.delivered = 0  # SMS handed on in transactions whose commit was answered
        self.dropped_repeats = 0
        self.too_old = 0  # SMS that were not handed on, because they were too old
        self.dead_lettered = 0  # AMQP messages: unreadable, or with an SMS that is too old

    def stop(self) -> None:
        """Finish and ack the current group; run() then returns."""
        self._stopping.set()
        if self._subscription is not None:
            self._subscription.end()

    async def run(self) -> None:
        """Consume until stop(). Raises UnsupportedQueue, and any exception of `deliver` beyond DATABASE_ERRORS."""
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
                log.warning("cannot consume from the broker: %s", error)
            failures += 1
            await _wait(self._stopping, timeout=_retry_delay_s(failures))

    @asynccontextmanager
    async def _subscribe(self, node: str) -> AsyncIterator["_Subscription"]:
        """Subscribe to the queue for the length of the block. Raises BrokerLost."""
        subscription = _Subscription()
        connection: aio_pika.abc.AbstractConnection | None = None
        try:
            async with _broker_errors_are_loss(), asyncio.timeout(CONNECT_TIMEOUT_S):
                heartbeat = self._settings.amqp_heartbeat_s
                connection = await aio_pika.connect(
                    node, heartbeat=heartbeat, name="sms-consumer", connection_class=_Connection
                )
                channel = await connection.channel(publisher_confirms=False)
                await channel.set_qos(prefetch_count=self._settings.prefetch)
                channel.close_callbacks.add(subscription.end)
                underlay = await channel.get_underlay_channel()
                # The broker cancels a consumer when its queue is deleted or moved.
                underlay.on_consumer_cancel_callbacks.add(subscription.end)
                # The queue must exist: the gateway declares it.
                queue = await channel.get_queue(self._settings.queue)
                await queue.consume(subscription.receive)
            self._subscription = subscription
            if self._stopping.is_set():
                subscription.end()
            log.info("consuming %s", self._settings.queue)
            yield subscription
        finally:
            if connection is not None:
                await _close(connection)

    async def _next_group(self, subscription: "_Subscription") -> list[Delivery]:
        """Return deliveries with about group_size SMS, or those that come within group_wait_s of the first."""
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
        """Hand the group on. After the commit, reject unreadable and old messages, and ack the others in one frame."""
        messages = [sms for delivery in group for sms in delivery.contents]
        too_old = await self._hand_on(messages, inbox, subscription)
        if too_old is None:
            return
        self._warn_of_old(too_old)
        good: list[AbstractIncomingMessage] = []
        async with _broker_errors_are_loss():
            for message, contents in group:
                if contents and not any(sms.id in too_old for sms in contents):
                    good.append(message)
                else:
                    await message.reject(requeue=False)
                    self.dead_lettered += 1
            # It comes after the rejections, because it acks everything before it.
            if good:
                await good[-1].ack(multiple=True)

    def _warn_of_old(self, too_old: dict[str, Sms]) -> None:
        if too_old:
            self.too_old += len(too_old)
            oldest = min(sms.accepted_at for sms in too_old.values())
            log.warning(
                "%d SMS go to the dead letters: they were accepted more than %g s ago, the oldest %.0f s ago",
                *(len(too_old), self._settings.max_age_s, (datetime.now(UTC) - oldest).total_seconds()),
            )

    async def _hand_on(self, messages: list[Sms], inbox: Inbox, subscription: "_Subscription") -> dict[str, Sms] | None:
        """Try until the transaction is committed; return the SMS that are too old, by id.

        Return None if the subscription, and with it the right to ack, ended first.

        Meanwhile the group stays without an ack. Requeueing would bring it back at once, and quorum queues count
        redeliveries: with a delivery limit (20 by default from RabbitMQ 4.0) an outage would dead-letter the group.
        """
        failures = 0
        while True:
            oldest = datetime.now(UTC) - timedelta(seconds=self._settings.max_age_s)
            recent: dict[str, Sms] = {}
            for sms in messages:
                if sms.accepted_at >= oldest:
                    recent.setdefault(sms.id, sms)
            old = {sms.id: sms for sms in messages if sms.id not in recent}
            try:
                # An old repeat of an SMS that was handed on is a repeat, not a loss.
                handed_on_before = await inbox.find_known(list(old)) if old else set()
                delivered = await inbox.hand_on(recent) if recent else 0
            except DATABASE_ERRORS as error:
                failures += 1
                log.warning("%d SMS wait for the database: %s %s", len(messages), type(error).__name__, error)
            else:
                too_old = {id_: sms for id_, sms in old.items() if id_ not in handed_on_before}
                self.delivered += delivered
                self.dropped_repeats += len(messages) - delivered - len(too_old)
                return too_old
            await _wait(subscription.is_over, timeout=_retry_delay_s(failures))
            if subscription.is_over.is_set():
                return None

    async def _keep_sweeping(self, inbox: Inbox) -> None:
        while True:
            try:
                await inbox.sweep()
            except DATABASE_ERRORS as error:
                log.warning("no sweep this time: %s %s", type(error).__name__, error)
            await asyncio.sleep(self._settings.sweep_interval_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter


class _Subscription:
    """The deliveries of one channel, in order. It ends with the connection, by the broker's cancel, or by stop()."""

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
        """Return the next delivery; None at the end.

        Raises BrokerLost if a delivery is missing, UnsupportedQueue for a stream.
        """
        message = None if self.is_over.is_set() else await self._arrived.get()
        if message is None:
            return None
        if "x-stream-offset" in message.headers:
            raise UnsupportedQueue("the queue is a stream: this consumer takes quorum and classic queues")
        # An ack covers all tags before it. A gap in the tags would mean that it covers messages that never arrived.
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
    """Raise every error of the broker as BrokerLost, and so the CancelledError that aiormq raises in its waiters."""
    try:
        yield
    except ChannelNotFoundEntity as error:  # the queue: the gateway declares it
        raise BrokerLost(f"{error}: start `python -m gateway serve`, or run `python -m gateway declare`") from error
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as error:
        raise BrokerLost(f"{type(error).__name__} {error}") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BrokerLost("the connection died") from None


async def _close(connection: aio_pika.abc.AbstractConnection) -> None:
    """Close a connection, but wait only briefly for a broker that no longer answers: its heartbeat ends the rest."""
    closing = asyncio.create_task(connection.close())
    await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
    # Retrieve the exception, or asyncio would log it; it does not matter any more.
    closing.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _wait(event: asyncio.Event, *, timeout: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


def _retry_delay_s(failures: int) -> float:
    shortest, longest = RETRY_DELAYS_S
    return random.uniform(shortest, min(longest, shortest * 2 ** min(failures, 10)))  # noqa: S311 - jitter


@asynccontextmanager
async def open_consumer(settings: Settings, deliver: Deliver = insert_deliveries) -> AsyncIterator[Consumer]:
    """Run a consumer in the background; stop it in an orderly way at the end. Raises the exception that ended it."""
    consumer = Consumer(settings, deliver)
    running = asyncio.create_task(consumer.run(), name="consumer")
    try:
        yield consumer
    finally:
        consumer.stop()
        await running
