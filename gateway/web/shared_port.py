"""The API's port of `serve --workers`: one queue of connections, which go to the worker with the fewest.

The supervisor binds the port, and its workers inherit the sockets. A connection stays in the kernel's queue until a
worker accepts it, so a dying worker loses none that still waits.

Shared memory has each worker's count of open connections. A worker defers to those with fewer: it stops watching the
queue for STEP_S. After MAX_STEPS_PER_WAIT steps it accepts, and ignores those workers until their counts change. So a
hung worker delays few connections. A bound on all steps limits the delay where the counts change all the time, as with
a new connection for each request.

With TLS, a single process accepts in the same way, as if it were the only worker: so it bounds the handshakes.
"""

import asyncio
import errno
import logging
import mmap
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import NamedTuple

import msgspec

from gateway.repeat_log import RepeatLog
from gateway.web.sockets import BACKLOG, ProtocolFactory, bind_tcp, cannot_listen

log = logging.getLogger(__name__)

STEP_S = 0.002  # how long a worker does not watch the queue, to let another one accept
MAX_STEPS_PER_WAIT = 10  # 20 ms: longer than most turns of a busy event loop
STEPS_PER_SECOND = 10.0  # refill of the token bucket that steps come from: 2 % of all time
MAX_SAVED_STEPS = 100.0  # size of the bucket

ABSENT = 2**32 - 1  # the count of a worker that does not accept: no worker defers to it
COUNT_BYTES = 4
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # descriptors or memory
RETRY_S = 1.0  # after such an error, nothing is accepted for this time
TLS_CLOSE_S = 5.0  # for a caller's answer to the end of TLS; uvloop waits 30 s


class InheritedPort(msgspec.Struct):
    """The port as a worker inherits it: the number of the worker, from 0 on, and descriptors."""

    worker: int
    counts: int
    sockets: list[int]

    def descriptors(self) -> list[int]:
        """Return all descriptors."""
        return [self.counts, *self.sockets]


class ConnectionCounts:
    """Each worker's count of open connections, in shared memory.

    Each worker writes its own count. The supervisor writes ABSENT once a worker has ended.
    """

    def __init__(self, descriptor: int) -> None:
        # One item is written by one store: others never read a part of it.
        self._counts = memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size)).cast("I")

    def read(self) -> tuple[int, ...]:
        """Return the counts of all workers."""
        return tuple(self._counts)

    def write(self, worker: int, count: int) -> None:
        """Set the count of a worker."""
        self._counts[worker] = count


class SharedPort:
    """The supervisor's side: the sockets, which it binds and does not serve."""

    def __init__(self, sockets: list[socket.socket], counts_descriptor: int, workers: int) -> None:
        self._sockets = sockets
        self._counts_descriptor = counts_descriptor
        os.truncate(counts_descriptor, COUNT_BYTES * workers)
        self._counts = ConnectionCounts(counts_descriptor)
        for worker in range(workers):
            self.mark_absent(worker)

    def inherited_by(self, worker: int) -> InheritedPort:
        """Return what a worker inherits."""
        return InheritedPort(worker, self._counts_descriptor, [each.fileno() for each in self._sockets])

    def mark_absent(self, worker: int) -> None:
        """Let no worker defer to this one, whose process has ended or has not started yet."""
        self._counts.write(worker, ABSENT)

    def close(self) -> None:
        """End the queue for all processes, also for a worker that hangs. New connections are refused from then on."""
        for each in self._sockets:
            with suppress(OSError):  # no worker listens yet
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@asynccontextmanager
async def open_shared_port(host: str, port: int, workers: int) -> AsyncIterator[SharedPort]:
    """Yield the port, bound: no other user's program can take it while a worker restarts. Raises ConfigurationError.

    Another supervisor of the same user can bind it too, to replace a dead one (docs/decisions, 0047).
    """
    with ExitStack() as stack:
        sockets = await bind_tcp(host, port, shared=True)
        for each in sockets:
            stack.enter_context(each)
        counts = os.memfd_create("connections")
        stack.callback(os.close, counts)
        yield SharedPort(sockets, counts, workers)


async def bind_alone(host: str, port: int) -> InheritedPort:
    """Return a port that no other process shares, as for the only worker. Raises ConfigurationError."""
    sockets = await bind_tcp(host, port, shared=False)
    counts = os.memfd_create("connections")
    os.truncate(counts, COUNT_BYTES)
    return InheritedPort(0, counts, [each.detach() for each in sockets])


class Tls(NamedTuple):
    """TLS of a listener. A handshake holds a descriptor: beyond `most_handshakes()`, the oldest is ended."""

    context: ssl.SSLContext
    handshake_timeout_s: float
    most_handshakes: Callable[[], int]


class SharedListener:
    """A worker's side: it accepts connections, and defers to workers with fewer."""

    def __init__(self, factory: ProtocolFactory, port: InheritedPort, tls: Tls | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = port.worker
        self._counts = ConnectionCounts(port.counts)
        os.close(port.counts)
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in port.sockets]
        self._factory = factory
        self._tls = tls
        self._open_connections = 0  # those in a TLS handshake included
        self._is_accepting = False
        self._deferral = _Deferral()
        self._timer: asyncio.TimerHandle | None = None  # of a step, or of a pause after an error
        self._handovers: dict[asyncio.Task[None], None] = {}  # TLS handshakes, the oldest first
        self._failures = RepeatLog(log, logging.ERROR)

    @property
    def port(self) -> int:
        """The port, which the system may have chosen."""
        port: int = self._sockets[0].getsockname()[1]
        return port

    def listen(self) -> None:
        """Accept connections from now on. Raises OSError when another program listens on the port."""
        for each in self._sockets:
            each.setblocking(False)
            each.listen(BACKLOG)
        self._begin()

    def close(self) -> None:
        """Accept no more. Connections in the queue are left to the other workers."""
        self._pause()
        for each in self._sockets:
            each.close()

    def _begin(self) -> None:
        self._is_accepting = True
        self._publish_count()
        self._watch()

    def _pause(self) -> None:
        self._stop_watching()
        if self._timer is not None:
            self._timer.cancel()
        self._is_accepting = False
        self._publish_count()

    def _publish_count(self) -> None:
        self._counts.write(self._worker, self._open_connections if self._is_accepting else ABSENT)

    def _watch(self) -> None:
        for each in self._sockets:
            self._loop.add_reader(each, self._on_connection, each)

    def _stop_watching(self) -> None:
        for each in self._sockets:
            self._loop.remove_reader(each)

    def _on_connection(self, queue: socket.socket) -> None:
        if self._deferral.take_step(self._loop.time(), self._open_connections, self._counts.read()):
            self._stop_watching()
            self._timer = self._loop.call_later(STEP_S, self._watch)
        else:
            self._accept(queue)

    def _accept(self, queue: socket.socket) -> None:
        try:
            accepted, _ = queue.accept()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                self._failures.note(f"no connection can be accepted: {error.strerror}")
                self._pause()
                self._timer = self._loop.call_later(RETRY_S, self._begin)
            elif error.errno == errno.EINVAL:  # the supervisor has ended the queue
                self._pause()
            # Otherwise another worker was first, or this one connection has failed.
            return
        self._failures.end()
        self._open_connections += 1
        self._publish_count()
        handover = self._loop.create_task(self._hand_over(_Accepted(accepted, self._on_closed)))
        self._handovers[handover] = None
        handover.add_done_callback(lambda done: self._handovers.pop(done, None))
        if self._tls and len(self._handovers) > self._tls.most_handshakes():
            oldest = next(iter(self._handovers))
            del self._handovers[oldest]
            oldest.cancel()

    async def _hand_over(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory,
                accepted,
                ssl=self._tls and self._tls.context,
                ssl_handshake_timeout=self._tls and self._tls.handshake_timeout_s,
                ssl_shutdown_timeout=self._tls and TLS_CLOSE_S,
            )
        except BaseException as error:
            accepted.close()
            if not isinstance(error, OSError):  # otherwise a failed handshake
                raise

    def _on_closed(self) -> None:
        self._open_connections -= 1
        self._publish_count()


class _Deferral:
    """Decides whether a worker defers to others for a step. Times are those of the event loop."""

    def __init__(self) -> None:
        self._awaited: dict[int, int] = {}  # worker → count, of the workers that this one defers to
        self._steps = 0  # since `_awaited` has changed
        self._ignored: dict[int, int] = {}  # worker → count, of those that did not accept within MAX_STEPS_PER_WAIT
        self._saved_steps = MAX_SAVED_STEPS
        self._saved_at = 0.0

    def take_step(self, now: float, own: int, counts: tuple[int, ...]) -> bool:
        """Take a step, and return True, if another worker has fewer connections and a step is left."""
        self._saved_steps = min(MAX_SAVED_STEPS, self._saved_steps + STEPS_PER_SECOND * (now - self._saved_at))
        self._saved_at = now
        fewer = {worker: count for worker, count in enumerate(counts) if count < own}
        # The first condition holds also if `fewer` is empty.
        if fewer.items() <= self._ignored.items() or self._saved_steps < 1:
            return False
        if fewer != self._awaited:
            self._awaited, self._steps = fewer, 0
        if self._steps == MAX_STEPS_PER_WAIT:
            self._ignored = fewer
            return False
        self._steps += 1
        self._saved_steps -= 1
        return True


def listen_on_inherited(factory: ProtocolFactory, host: str, port: InheritedPort, tls: Tls | None) -> SharedListener:
    """Return a worker's listener. Raises ConfigurationError when another program listens on the port."""
    listener = SharedListener(factory, port, tls)
    try:
        listener.listen()
    except OSError as error:
        raise cannot_listen(host, listener.port, "API", error) from None
    return listener


class _Accepted(socket.socket):
    """An accepted connection, which reports its end once.

    uvloop's transport detaches its socket, asyncio's closes it, and a failed handshake may do both.
    """

    def __init__(self, accepted: socket.socket, on_closed: Callable[[], None]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._on_closed: Callable[[], None] | None = on_closed

    def detach(self) -> int:
        self._report()
        return super().detach()

    def close(self) -> None:
        self._report()
        super().close()

    def _report(self) -> None:
        on_closed, self._on_closed = self._on_closed, None
        if on_closed is not None:
            on_closed()
