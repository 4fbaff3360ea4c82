"""The publish connections of a process, each replaced when it is lost, slow or silent."""

import asyncio
import logging
import random
from collections import Counter, defaultdict

from yarl import URL

from gateway.amqp.connection import CLOSE_TIMEOUT_S, PublishConnection
from gateway.amqp.transport import address, reason, stray_cancellation_is_loss
from gateway.config import Settings
from gateway.errors import QueueUnavailable
from gateway.repeat_log import RepeatLog

log = logging.getLogger(__name__)

RECONNECT_DELAYS_S = (0.1, 3.0)  # full jitter between them: replicas do not reconnect at the same moment
WATCH_INTERVAL_S = 0.25
UNVERIFIED = (
    "type, durability and arguments of the queues are not verified at %s: %s. What the broker nacks is reported as "
    "unknown. The right to configure them would let the gateway verify them"
)
RESTORE_EVERY_S = 5.0  # least time between two declarations because of unroutable messages
# Brokers send a heartbeat every half interval. After one interval and this margin, two in a row are missing. aiormq
# would give up after three intervals, too late to publish elsewhere before the deadlines.
HEARTBEAT_MARGIN_S = 1.0


class PublishConnections:
    """Keeps `amqp_connections` publish connections open, spread over the broker's nodes."""

    def __init__(self, settings: Settings, *, first_node: int | None) -> None:
        """`first_node` is the node of the first connection; None draws one, so that replicas spread over the nodes."""
        self._settings = settings
        nodes = len(settings.amqp_nodes())
        self._first_node = random.randrange(nodes) if first_node is None else first_node  # noqa: S311 - no secret
        self.open: list[PublishConnection] = []  # opened and not replaced; is_usable() tells which take batches now
        self._draining: set[PublishConnection] = set()  # replaced because overdue; they only wait for late confirms
        self._tasks: set[asyncio.Task[None]] = set()
        self._unusable_since: float | None = None
        self._changed = asyncio.Event()
        self.is_closed = False
        self.has_ended_waits = False  # True: no batch waits for a connection any more
        self.has_connected = False
        self.connects = 0  # connections opened
        self.connect_failures = 0
        self.last_failure = ""  # of a connect, as logged; "" without any
        self._failure_logs: defaultdict[str, RepeatLog] = defaultdict(lambda: RepeatLog(log))  # by node
        self.late_confirms = 0  # messages confirmed after they had been answered as unknown
        self._blocked_s = 0.0  # of connections that are gone
        self._warned_of_returns_at = float("-inf")
        self._has_warned_of_rights = False

    def start(self) -> None:
        """Start to connect, and to replace lost connections until close(). Returns at once."""
        for number in range(self._settings.amqp_connections):
            self._keep_task(asyncio.create_task(self._keep_connected(number), name=f"amqp-{number}"))

    def _keep_task(self, task: asyncio.Task[None]) -> None:
        task.add_done_callback(_log_if_failed)
        task.add_done_callback(self._tasks.discard)
        self._tasks.add(task)

    async def close(self) -> None:
        """Close every connection. Written messages that are not settled become unknown; what waits is refused."""
        self.is_closed = True
        self.end_waits()
        while running := {task for task in self._tasks if not task.done()}:
            # Once may not be enough: in the middle of a handshake, aiormq absorbs a cancellation.
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=CLOSE_TIMEOUT_S)

    def usable(self) -> list[PublishConnection]:
        """Return the connections that may be given a batch. Raises QueueUnavailable if there is none.

        A stalled connection is left out, unless all are: its batches stay unconfirmed, while batches that were written
        later are confirmed on another one.
        """
        usable = [connection for connection in self.open if connection.is_usable()]
        if not usable:
            now = asyncio.get_running_loop().time()
            self._unusable_since = self._unusable_since or now
            raise QueueUnavailable(retry_after_s=(now - self._unusable_since) / 2)  # a long outage tends to go on
        self._unusable_since = None
        if len(usable) > 1:
            latest = max(connection.confirmed_written_at for connection in usable)
            usable = [one for one in usable if not one.is_stalled(latest)] or usable
        return usable

    def may_use(self, connection: PublishConnection) -> bool:
        """Return True if this connection may be given another batch: it is usable, and was not replaced."""
        return connection in self.open and connection.is_usable()

    def is_usable(self) -> bool:
        """Return True if a connection may be given a batch now."""
        return any(connection.is_usable() for connection in self.open)

    def is_reopening(self) -> bool:
        """Return True if a connection is about to have a new channel, on the same socket."""
        return any(connection.is_reopening for connection in self.open)

    @property
    def max_payload_bytes(self) -> int | None:
        """The broker's limit on a payload; None until a payload was refused. It is forgotten with its connection."""
        known = [one.max_payload_bytes for one in self.open if one.max_payload_bytes is not None]
        return min(known) if known else None

    def end_waits(self) -> None:
        """End all calls of wait_usable(), also later ones."""
        self.has_ended_waits = True
        self._changed.set()

    async def wait_usable(self) -> bool:
        """Wait until a connection is usable. Return False once the waits are ended, even if one is usable by then."""
        while not (self.has_ended_waits or self.is_usable()):
            self._changed.clear()
            await self._changed.wait()
        return not self.has_ended_waits

    @property
    def all(self) -> list[PublishConnection]:
        """The open and the draining connections."""
        return [*self.open, *self._draining]

    @property
    def blocked_s(self) -> float:
        """Seconds that broker alarms have blocked connections, added up over all connections so far."""
        return self._blocked_s + sum(connection.blocked_s for connection in self.all)

    def states(self) -> Counter[str]:
        """Count connections by state: connection.STATES, `draining`, and `connecting` for the missing ones."""
        states = Counter(connection.state for connection in self.open)
        states["draining"] = len(self._draining)
        states["connecting"] = self._settings.amqp_connections - len(self.open)
        return states

    async def _keep_connected(self, number: int) -> None:
        """Connect, serve until the connection is lost, wait a moment, connect to the next node; for ever."""
        nodes = self._settings.amqp_nodes()
        number += self._first_node
        attempt = 0
        half_open = is_right_in_doubt = False
        while not self.is_closed:
            node = URL(nodes[(number + attempt) % len(nodes)])
            connection = PublishConnection(self._settings, node, self._count_late, half_open=half_open)
            connection.is_right_in_doubt = is_right_in_doubt
            try:
                if await self._open(connection):
                    attempt = 0
                    self.connects += 1
                    self.open.append(connection)
                    self._changed.set()
                    while not self.is_closed:  # aiormq may have absorbed a cancellation
                        await self._serve(connection)
                        if (successor := await self._reopen(connection)) is None:
                            is_right_in_doubt = connection.close_reply.startswith("403")
                            break
                        connection = successor
                    number += 1  # the next node first: this one has just failed
                else:
                    attempt += 1
            finally:
                half_open = await self._remove(connection)
            await asyncio.sleep(reconnect_delay_s(attempt))

    async def _open(self, connection: PublishConnection, done: str = "connected") -> bool:
        """Open the connection, or only its channel. Return False if that fails. Log `done`, or the failure."""
        node = address(connection.node)
        try:
            async with asyncio.timeout(self._settings.amqp_connect_timeout_s), stray_cancellation_is_loss():
                await connection.open()
        except Exception as error:  # the libraries raise many kinds, and the reconnection must go on
            failure = reason(error, connection.close_reply)
            self.last_failure = f"cannot connect to the broker at {node}: {failure}"
            self._failure_logs[node].note(self.last_failure)
            self.connect_failures += 1
            return False
        log.info("%s to the broker at %s%s", done, node, self._failure_logs[node].end())
        if connection.unverified and not self._has_warned_of_rights:
            log.warning(UNVERIFIED, node, connection.unverified)
            self._has_warned_of_rights = True
        self.has_connected = True
        self._unusable_since = None
        return True

    async def _reopen(self, lost: PublishConnection) -> PublishConnection | None:
        """Return a connection with a new channel on the same socket. Return None if that cannot be opened.

        Until then the lost one stays in `open`: batches wait for the new channel.
        """
        if self.is_closed or not (lost.is_lost and lost.is_reopening):
            return None
        successor = lost.successor()
        if not await self._open(successor, "reopened the channel"):
            return None
        self.open = [successor if other is lost else other for other in self.open]
        self._changed.set()
        return successor

    async def _remove(self, connection: PublishConnection) -> bool:
        """Take a connection out of use: drain it if it is overdue, otherwise close it.

        Return True if the next one starts half-open: if this one was overdue, or was half-open still.
        """
        self.open = [other for other in self.open if other is not connection]
        is_overdue = connection.is_overdue()
        connection.refuse_waiting()  # Publisher gives these batches to another connection
        if is_overdue and not connection.is_blocked and not self.is_closed:
            self._draining.add(connection)
            self._keep_task(asyncio.create_task(self._drain(connection), name="amqp-draining"))
        else:
            await self._discard(connection)
        return is_overdue or connection.is_half_open

    async def _serve(self, connection: PublishConnection) -> None:
        """Return when the connection is lost or is to be replaced.

        It is to be replaced if it is overdue and no broker alarm explains that, or if it has a batch that was written
        more than abandon_timeout_s ago and is not settled.
        """
        receptions, silent_s = 0, 0.0
        node = address(connection.node)
        while not await connection.wait_lost(timeout=WATCH_INTERVAL_S):
            self._changed.set()  # a broker alarm may have ended
            # Counted in turns of this loop, not by the clock: after a pause of this process, what the broker has sent
            # meanwhile is still unread.
            silent_s = 0.0 if connection.receptions != receptions else silent_s + WATCH_INTERVAL_S
            receptions = connection.receptions
            if connection.is_nacked():
                connection.retire()
            if connection.has_returned:
                self._restore_topology(connection)
            if silent_s > self._settings.amqp_heartbeat_s + HEARTBEAT_MARGIN_S:
                log.warning("heard nothing from %s for %.0f s", node, silent_s)
                connection.abort()
            if connection.is_overdue() and not connection.is_blocked:
                log.warning("no confirms from the broker at %s in time", node)
                return
            if self._is_abandoned(connection):
                return
        what = "channel" if connection.is_reopening else "connection"
        log.warning("lost the %s to the broker at %s: %s", what, node, connection.close_reply or "no reply")

    def _restore_topology(self, connection: PublishConnection) -> None:
        """Warn of an unroutable message, and declare the topology again; at most once in RESTORE_EVERY_S."""
        now = asyncio.get_running_loop().time()
        if now < self._warned_of_returns_at + RESTORE_EVERY_S:
            return
        self._warned_of_returns_at, connection.has_returned = now, False
        is_checked = self._settings.amqp_topology == "check"
        advice = ". Run `python -m gateway declare`" if is_checked else ""
        log.warning("the broker at %s could not route a message: no queue is bound%s", address(connection.node), advice)
        if not is_checked:
            self._keep_task(asyncio.create_task(self._declare(connection), name="amqp-declaring"))

    async def _declare(self, connection: PublishConnection) -> None:
        node = address(connection.node)
        try:
            async with asyncio.timeout(self._settings.amqp_connect_timeout_s), stray_cancellation_is_loss():
                await connection.declare()
        except Exception as error:  # the libraries raise many kinds
            log.warning("cannot declare at the broker at %s: %s", node, reason(error, connection.close_reply))
        else:
            log.warning("declared exchange and queues again at the broker at %s", node)

    def _is_abandoned(self, connection: PublishConnection) -> bool:
        """Return True, and log it, if a batch has been unconfirmed for more than abandon_timeout_s."""
        if (age_s := connection.oldest_age_s()) > self._settings.abandon_timeout_s:
            log.warning("a batch is unconfirmed for %.0f s: closing its connection", age_s)
            return True
        return False

    async def _drain(self, connection: PublishConnection) -> None:
        """Wait for the late confirms of a replaced connection, then close it."""
        try:
            while connection.unconfirmed_messages and not self._is_abandoned(connection):
                if await connection.wait_lost(timeout=WATCH_INTERVAL_S):
                    break
        finally:
            self._draining.discard(connection)
            await self._discard(connection)

    async def _discard(self, connection: PublishConnection) -> None:
        self._blocked_s += connection.blocked_s
        await connection.close()

    def _count_late(self, count: int) -> None:
        self.late_confirms += count


def _log_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the task %s has failed", task.get_name(), exc_info=task.exception())


def reconnect_delay_s(failures: int) -> float:
    """Return the delay after so many failures in a row, in seconds: full jitter within RECONNECT_DELAYS_S."""
    shortest, longest = RECONNECT_DELAYS_S
    doublings = min(failures + 1, 10)  # an outage may last for days: without the bound the power would overflow
    return random.uniform(shortest, min(longest, shortest * 2**doublings))  # noqa: S311 - jitter
