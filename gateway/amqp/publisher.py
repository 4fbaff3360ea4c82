"""Publishes batches over several connections: a batch in, an outcome for each of its messages back.

Here it is decided which connection takes a batch, what is tried again, and what is refused; a connection's own life is
in connection.py. What may be counted, and what is unknown, is decided in confirms.py.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from yarl import URL

from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import CLOSE_TIMEOUT_S, PublishConnection, reason, stray_cancellation_is_loss
from gateway.amqp.window import ConfirmWindow
from gateway.config import Settings
from gateway.errors import Overloaded, QueueUnavailable

log = logging.getLogger(__name__)

RECONNECT_DELAYS_S = (0.1, 3.0)  # full jitter between them: replicas do not come back in step
RETRY_MARGIN_S = 0.5  # less than this before the deadline is not worth a second try
TOO_LATE_S = 0.1  # nor, this short before it, a first one: it would only end as unknown
WATCH_INTERVAL_S = 0.25
# Brokers send a heartbeat every half of the interval: two in a row did not come. aiormq by itself gives up after three
# intervals, which is past the deadline of what could be published again elsewhere.
HEARTBEAT_MARGIN_S = 1.0
SHARED_CONNECTION_BYTES = 64 * 1024  # some 200 messages


class Publisher:
    """Several publish connections, spread over the broker's nodes; each heals itself."""

    def __init__(self, settings: Settings, *, first_node: int | None = None) -> None:
        """`first_node` is where the first connection goes; None draws one, so that replicas spread over the nodes."""
        self._settings = settings
        self._connections: list[PublishConnection] = []  # those that may be given batches
        self._draining: set[PublishConnection] = set()  # those that only wait for their last confirms
        self._window = ConfirmWindow(
            most_messages=settings.max_unconfirmed_messages,
            most_bytes=settings.max_unconfirmed_bytes,
            # Beyond this a longer queue at the broker adds waiting, not goodput (scripts/faults --scenario overload:
            # with twice as much, the median at ten times the load was 71 % of the peak, with this 85 %).
            target_s=settings.confirm_timeout_s / 16,
        )
        self._first_node = (
            random.randrange(len(settings.amqp_nodes())) if first_node is None else first_node  # noqa: S311
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._unusable_since: float | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self.was_connected = False
        self.late_confirms = 0  # messages settled after their deadline: they had been answered as unknown
        self.outcomes: Counter[Outcome] = Counter()  # of messages, as their publishers were told
        self.shed = 0  # batches, and requests to come, that found no room in the window
        self.connected = 0  # how often a connection was opened
        self.connect_failures = 0
        self._blocked_s = 0.0  # of connections that are gone
        self.republished = 0  # messages written again elsewhere after their connection was lost

    def start(self) -> None:
        """Begin connecting, and go on for ever; returns at once."""
        for number in range(self._settings.amqp_connections):
            task = asyncio.create_task(self._keep_connected(number), name=f"amqp-{number}")
            task.add_done_callback(_log_if_ended)
            self._tasks.add(task)

    async def close(self) -> None:
        """Close every connection. What is unconfirmed by then becomes unknown."""
        self._closed = True
        self._changed.set()  # whoever waits for a connection to come back waits in vain
        while running := {task for task in self._tasks if not task.done()}:
            # Once may not be enough: in the middle of a handshake, aiormq absorbs a cancellation.
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=CLOSE_TIMEOUT_S)

    def is_usable(self) -> bool:
        """Whether a batch would be written if it came now."""
        return any(connection.is_usable() for connection in self._connections)

    @property
    def unconfirmed_messages(self) -> int:
        return sum(connection.unconfirmed_messages for connection in [*self._connections, *self._draining])

    @property
    def unconfirmed_bytes(self) -> int:
        return sum(connection.unconfirmed_bytes for connection in [*self._connections, *self._draining])

    @property
    def oldest_age_s(self) -> float:
        """How long the oldest unconfirmed batch has been waiting; 0.0 when there is none."""
        return max((connection.oldest_age_s() for connection in [*self._connections, *self._draining]), default=0.0)

    @property
    def blocked_s(self) -> float:
        """How long broker alarms have blocked connections, added up over all that there have been."""
        return self._blocked_s + sum(connection.blocked_s for connection in [*self._connections, *self._draining])

    @property
    def window(self) -> ConfirmWindow:
        """How much may be unconfirmed."""
        return self._window

    def connection_states(self) -> Counter[str]:
        """How many connections are in which state: those of STATES, `leaving`, and `connecting` for the missing."""
        states = Counter(connection.state for connection in self._connections)
        states["draining"] = len(self._draining)
        states["connecting"] = self._settings.amqp_connections - len(self._connections)
        return states

    def refuse_if_full(self, account_id: int) -> None:
        """Raise Overloaded when the account's last batch found no room, and would find none: the next is not read."""
        if self._window.is_full(unconfirmed=self._load(), account_id=account_id):
            self.shed += 1
            raise Overloaded(retry_after_s=self._window.confirm_s)

    def _load(self) -> int:
        """What is on the wire; what only waits for late confirms, on connections that were replaced, left out."""
        return self._window.weigh(
            sum(connection.unconfirmed_messages for connection in self._connections),
            sum(connection.unconfirmed_bytes for connection in self._connections),
        )

    async def publish(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None = None,
        *,
        deadline: float | None = None,
        account_id: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Publish one batch, in order, on one channel; wait until all is confirmed or the deadline has come.

        `shards` names the queue of each payload, ascending; None means the first for all. `deadline` is on the event
        loop's clock; None means a whole confirm_timeout_s from now. `account_id` is whose share of the room it takes.
        `headers` go with each message.
        Returns one Outcome per payload. Raises QueueUnavailable or Overloaded when nothing at all was written.
        """
        if not payloads:
            return b""
        clock = asyncio.get_running_loop().time
        written_at = clock()
        if deadline is None:
            deadline = written_at + self._settings.confirm_timeout_s
        elif deadline < written_at + TOO_LATE_S:
            raise QueueUnavailable
        load = self._window.weigh(len(payloads), sum(map(len, payloads)))
        connection = self._choose(load, account_id)
        unconfirmed = self._load() + load
        self._window.take(load, account_id)
        try:
            outcomes = await connection.publish(ids, payloads, shards, deadline, headers)
            if not connection.is_lost:
                self._window.note(load, unconfirmed=unconfirmed, written_at=written_at, now=clock())
            elif not self._closed and Outcome.UNKNOWN in outcomes:
                outcomes = await self._republish_unknown(ids, payloads, shards, outcomes, deadline, headers)
        finally:
            self._window.give_back(load, account_id)
        self._count(outcomes)
        return outcomes

    async def _republish_unknown(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None,
        outcomes: bytes,
        deadline: float,
        headers: Mapping[str, str] | None,
    ) -> bytes:
        """Write the unknown messages once more, elsewhere, with the same ids: a second copy beats a lost one.

        Only after a lost connection. After a mere timeout, or under an alarm, the first copy is likely still coming,
        and a second one would double the load. What a second try refuses stays unknown: the first may have landed.
        """
        unknown = [position for position, outcome in enumerate(outcomes) if outcome == Outcome.UNKNOWN]
        try:
            connection = await self._choose_before(deadline - RETRY_MARGIN_S)
            second = await connection.publish(
                [ids[position] for position in unknown],
                [payloads[position] for position in unknown],
                [shards[position] for position in unknown] if shards else None,
                deadline,
                headers,
            )
        except QueueUnavailable:
            return outcomes
        self.republished += len(unknown)
        merged = bytearray(outcomes)
        for position, outcome in zip(unknown, second, strict=True):
            if outcome == Outcome.ACKED:
                merged[position] = outcome
        return bytes(merged)

    def _choose(self, load: int, account_id: int) -> PublishConnection:
        """The connection for a new batch. Raises when none may take it, or there is no room."""
        connection = self._choose_connection()
        if not self._window.has_room(load, unconfirmed=self._load(), account_id=account_id):
            self.shed += 1
            raise Overloaded(retry_after_s=self._window.confirm_s)
        return connection

    def _choose_connection(self) -> PublishConnection:
        """The best usable connection. Raises QueueUnavailable when there is none.

        While little is on the wire all batches take the same one: what is written to it in one turn of the event loop
        leaves in one system call, and is confirmed by one ack (scripts/bench compare, batches of 1). Beyond that the
        one with the least unconfirmed.
        """
        now = asyncio.get_running_loop().time()
        usable = [connection for connection in self._connections if connection.is_usable()]
        if not usable:
            self._unusable_since = self._unusable_since or now
            raise QueueUnavailable(retry_after_s=(now - self._unusable_since) / 2)  # a long outage may well go on
        self._unusable_since = None
        if len(usable) > 1:
            latest = max(connection.confirmed_written_at for connection in usable)
            usable = [one for one in usable if not one.is_stalled(latest)] or usable
        if usable[0].unconfirmed_bytes < SHARED_CONNECTION_BYTES:
            return usable[0]
        return min(usable, key=lambda connection: connection.unconfirmed_bytes)

    async def _choose_before(self, deadline: float) -> PublishConnection:
        """The same, but wait for a connection to come back. Raises QueueUnavailable when `deadline` has passed."""
        if asyncio.get_running_loop().time() > deadline:
            raise QueueUnavailable
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while not (self.is_usable() or self._closed):
                    self._changed.clear()
                    await self._changed.wait()
        return self._choose_connection()

    async def _keep_connected(self, number: int) -> None:
        """One connection's life: connect, serve until it is lost, wait a moment, connect to the next node."""
        nodes = self._settings.amqp_nodes()
        number += self._first_node
        attempt = 0
        half_open = False
        while not self._closed:
            node = URL(nodes[(number + attempt) % len(nodes)])
            connection = PublishConnection(self._settings, node, self._count_late, half_open=half_open)
            try:
                async with asyncio.timeout(self._settings.amqp_connect_timeout_s), stray_cancellation_is_loss():
                    await connection.open()
            except Exception as error:  # whatever the library raises, this loop must go on
                log.warning("cannot connect to the broker at %s:%s: %s", node.host, node.port, reason(error))
                attempt += 1
                self.connect_failures += 1
            else:
                log.info("connected to the broker at %s:%s", node.host, node.port)
                attempt = 0
                self.connected += 1
                self.was_connected = True
                self._unusable_since = None
                self._connections.append(connection)
                self._changed.set()
                if not self._closed:  # a cancellation may have been absorbed on the way
                    await self._serve(connection)
                number += 1  # the next node first: this one has just failed us
            finally:
                self._connections = [other for other in self._connections if other is not connection]
                half_open = connection.is_overdue()  # the next one has to show that there are confirms again
                if half_open and not connection.is_blocked and not self._closed:
                    self._see_out(connection)
                else:
                    self._blocked_s += connection.blocked_s
                    await connection.close()
            await asyncio.sleep(reconnect_delay_s(attempt))

    async def _serve(self, connection: PublishConnection) -> None:
        """Return when the connection is lost, or a batch on it is past its deadline and no alarm explains that."""
        receptions, silent_s = 0, 0.0
        while not await connection.wait_lost(timeout=WATCH_INTERVAL_S):
            self._changed.set()  # an alarm may have gone
            # In turns of this loop, not by the clock: after a pause of our own, what the broker sent is yet to be read.
            silent_s = 0.0 if connection.receptions != receptions else silent_s + WATCH_INTERVAL_S
            receptions = connection.receptions
            if silent_s > self._settings.amqp_heartbeat_s + HEARTBEAT_MARGIN_S:
                log.warning("heard nothing from %s:%s for %.0f s", connection.node.host, connection.node.port, silent_s)
                connection.abort()
            if connection.is_overdue() and not connection.is_blocked:
                log.warning("no confirms from the broker at %s:%s in time", connection.node.host, connection.node.port)
                return
            if self._is_abandoned(connection):
                return
        log.warning("lost the connection to the broker at %s:%s", connection.node.host, connection.node.port)

    def _is_abandoned(self, connection: PublishConnection) -> bool:
        if (age_s := connection.oldest_age_s()) > self._settings.abandon_timeout_s:
            log.warning("a batch is unconfirmed for %.0f s: closing its connection", age_s)
            return True
        return False

    def _see_out(self, connection: PublishConnection) -> None:
        """Let a connection that is too slow wait for its last confirms beside the one that takes its place."""
        self._draining.add(connection)
        task = asyncio.create_task(self._wait_for_the_last(connection), name="amqp-draining")
        task.add_done_callback(_log_if_ended)
        task.add_done_callback(self._tasks.discard)
        self._tasks.add(task)

    async def _wait_for_the_last(self, connection: PublishConnection) -> None:
        try:
            while connection.unconfirmed_messages and not self._is_abandoned(connection):
                if await connection.wait_lost(timeout=WATCH_INTERVAL_S):
                    break
        finally:
            self._draining.discard(connection)
            self._blocked_s += connection.blocked_s
            await connection.close()

    def _count(self, outcomes: bytes) -> None:
        acked = outcomes.count(Outcome.ACKED)
        self.outcomes[Outcome.ACKED] += acked
        if acked < len(outcomes):
            for outcome in (Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN):
                self.outcomes[outcome] += outcomes.count(outcome)

    def _count_late(self, count: int) -> None:
        self.late_confirms += count


def _log_if_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("%s ended: its connection will not come back", task.get_name(), exc_info=task.exception())


def reconnect_delay_s(failures: int) -> float:
    """How long to wait after so many failures in a row: full jitter, up to RECONNECT_DELAYS_S."""
    shortest, longest = RECONNECT_DELAYS_S
    doublings = min(failures + 1, 10)  # an outage may last for days: without the bound the power would overflow
    return random.uniform(shortest, min(longest, shortest * 2**doublings))  # noqa: S311 - jitter
