"""The API's port of `serve --workers`: one queue of connections, which the workers accept evenly.

The supervisor binds the port, and its workers inherit the sockets. A connection is in the kernel's queue until a worker
accepts it, so one that still waits there is not lost with a worker.

Shared memory has the number of open connections of each worker. A worker with more than another first lets that one
accept. It waits until its turn has come, or until nobody has accepted for WAIT_S or longer. The time for such waits is
bounded for each of the others. So one that is busy, stopped or hung does not hold up callers, and neither do callers
with a new connection for each request, whose numbers change all the time. Nothing is polled while no connection
arrives.
"""

import asyncio
import logging
import mmap
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress

import msgspec

from gateway.repeat_log import RepeatLog
from gateway.web.sockets import BACKLOG, ProtocolFactory, bind_shared, cannot_listen

log = logging.getLogger(__name__)

WAIT_S = 0.02  # for each worker with fewer connections; longer than most turns of a busy event loop
# The time for waits for one other worker: 2 % of all time, saved up to a second. A wait in vain takes 0.1 s of it.
WAITS_SHARE = 0.02
WAITS_S = 1.0
VAIN_S = 0.1
RETRY_S = 1.0  # after an accept that failed for want of descriptors or memory

ABSENT = 2**32 - 1  # the number of connections of a worker that accepts none: nobody waits for it
COUNT = struct.Struct("I")  # native, so that it is written in one piece


class Share(msgspec.Struct):
    """A worker's share of the port, which it inherits: its number, and descriptors."""

    number: int
    board: int
    wakers: list[int]  # an eventfd for each worker
    sockets: list[int]

    def descriptors(self) -> list[int]:
        """Return all descriptors."""
        return [self.board, *self.wakers, *self.sockets]


class Board:
    """The number of open connections of each worker, in memory that all share. A worker writes only its own."""

    def __init__(self, descriptor: int, workers: int) -> None:
        self._all = struct.Struct(f"{workers}I")
        self._memory = mmap.mmap(descriptor, self._all.size)

    def read(self) -> tuple[int, ...]:
        """Return the numbers of all workers."""
        return self._all.unpack_from(self._memory)

    def write(self, number: int, connections: int) -> None:
        """Set the number of a worker."""
        COUNT.pack_into(self._memory, COUNT.size * number, connections)


class SharedPort:
    """The supervisor's side: the sockets, which it binds and does not serve."""

    def __init__(self, sockets: list[socket.socket], workers: int, stack: ExitStack) -> None:
        """Close everything with the `stack`."""
        self._sockets = sockets
        self._board_descriptor = os.memfd_create("connections")
        stack.callback(os.close, self._board_descriptor)
        os.truncate(self._board_descriptor, COUNT.size * workers)
        self._board = Board(self._board_descriptor, workers)
        self._wakers = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(workers)]
        for number, waker in enumerate(self._wakers):
            stack.callback(os.close, waker)
            self.mark_absent(number)

    def share(self, number: int) -> Share:
        """Return what a worker inherits."""
        return Share(number, self._board_descriptor, self._wakers, [each.fileno() for each in self._sockets])

    def mark_absent(self, number: int) -> None:
        """Let no worker wait for this one: its process has ended."""
        self._board.write(number, ABSENT)

    def close_sockets(self) -> None:
        """Leave the sockets to the workers. With the last worker that closes them, callers are refused."""
        for each in self._sockets:
            each.close()


@asynccontextmanager
async def open_shared_port(host: str, port: int, workers: int) -> AsyncIterator[SharedPort]:
    """Bind the port, so that no other program takes it while a worker restarts. Raises ConfigurationError."""
    with ExitStack() as stack:
        sockets = await bind_shared(host, port)
        for each in sockets:
            stack.enter_context(each)
        yield SharedPort(sockets, workers, stack)


class SharedListener:
    """A worker's side: it accepts connections in turn with the others."""

    def __init__(
        self, factory: ProtocolFactory, share: Share, context: ssl.SSLContext | None, handshake_timeout_s: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._number = share.number
        self._board = Board(share.board, len(share.wakers))
        os.close(share.board)
        self._wakers = share.wakers
        self._waker = share.wakers[share.number]
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in share.sockets]
        self._factory = factory
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s if context else None
        self._open = 0  # connections, including those in a TLS handshake
        self._is_accepting = False
        self._timer: asyncio.TimerHandle | None = None  # of a wait, or of a pause after an error
        self._waits = _Waits(len(share.wakers))
        self._handovers: set[asyncio.Task[None]] = set()
        self._errors = RepeatLog(log, logging.ERROR)

    @property
    def port(self) -> int:
        """Return the port."""
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
        for waker in self._wakers:
            os.close(waker)

    def _begin(self) -> None:
        self._is_accepting = True
        self._publish()
        self._read_queue()

    def _pause(self) -> None:
        self._stop_waiting()
        self._leave_queue()
        self._is_accepting = False
        self._publish()

    def _publish(self) -> None:
        self._board.write(self._number, self._open if self._is_accepting else ABSENT)

    def _read_queue(self) -> None:
        for each in self._sockets:
            self._loop.add_reader(each, self._on_connection, each)

    def _leave_queue(self) -> None:
        for each in self._sockets:
            self._loop.remove_reader(each)

    def _on_connection(self, queue: socket.socket) -> None:
        if awaited := self._go_on_waiting():
            self._leave_queue()
            self._loop.add_reader(self._waker, self._on_change)
            self._timer = self._loop.call_later(WAIT_S * awaited, self._end_wait)
        else:
            self._accept(queue)

    def _go_on_waiting(self) -> int:
        return self._waits.go_on(self._loop.time(), self._open, self._board.read())

    def _on_change(self) -> None:
        os.eventfd_read(self._waker)
        awaited = self._go_on_waiting()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(WAIT_S * awaited, self._end_wait)

    def _end_wait(self) -> None:
        """Accept one connection, if one is left: nobody else has accepted any, or no time for waits is left."""
        self._waits.charge(self._board.read())
        self._stop_waiting()
        self._read_queue()
        any(self._accept(each) for each in self._sockets)

    def _stop_waiting(self) -> None:
        self._waits.end(self._loop.time())
        self._loop.remove_reader(self._waker)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _accept(self, queue: socket.socket) -> bool:
        """Accept one connection. Return False if there is none any more, or none can be accepted."""
        try:
            accepted, _ = queue.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another worker was first
            return False
        except OSError as error:
            self._errors.note(f"no connection can be accepted: {error.strerror}")
            self._pause()
            self._timer = self._loop.call_later(RETRY_S, self._begin)
            return False
        self._open += 1
        self._publish()
        for waker in self._wakers:
            if waker != self._waker:
                os.eventfd_write(waker, 1)
        handover = self._loop.create_task(self._hand_over(_Accepted(accepted, self._on_closed)))
        self._handovers.add(handover)
        handover.add_done_callback(self._handovers.discard)
        return True

    async def _hand_over(self, accepted: socket.socket) -> None:
        with suppress(OSError):  # a failed handshake: the event loop closes the connection
            await self._loop.connect_accepted_socket(
                self._factory, accepted, ssl=self._context, ssl_handshake_timeout=self._handshake_timeout_s
            )

    def _on_closed(self) -> None:
        self._open -= 1
        self._publish()
        if self._is_accepting:
            os.eventfd_write(self._waker, 1)  # its own turn may have come


class _Waits:
    """The time that a worker may wait for each of the others. Times are those of the event loop."""

    def __init__(self, workers: int) -> None:
        self._left_s = [WAITS_S] * workers
        self._at = 0.0
        self._awaited: set[int] = set()

    def go_on(self, now: float, own: int, connections: tuple[int, ...]) -> int:
        """Begin a wait for the workers with fewer connections, or go on with it. Return for how many time is left."""
        self._pass(now)
        # A new process has the whole time again.
        self._left_s = [
            WAITS_S if each == ABSENT else left for each, left in zip(connections, self._left_s, strict=True)
        ]
        self._awaited = {
            number
            for number, (each, left) in enumerate(zip(connections, self._left_s, strict=True))
            # A wait that begins can take its whole time.
            if each < own and left >= (0 if number in self._awaited else WAIT_S)
        }
        return len(self._awaited)

    def charge(self, connections: tuple[int, ...]) -> None:
        """Take the price of a wait in vain from the time of the awaited worker with the fewest connections."""
        if self._awaited:
            self._left_s[min(self._awaited, key=connections.__getitem__)] -= VAIN_S

    def end(self, now: float) -> None:
        """End the wait, if there is one."""
        self._pass(now)
        self._awaited = set()

    def _pass(self, now: float) -> None:
        passed, self._at = now - self._at, now
        for number, left in enumerate(self._left_s):
            self._left_s[number] = min(WAITS_S, left + (WAITS_SHARE - (number in self._awaited)) * passed)


def open_shared(
    factory: ProtocolFactory, host: str, share: Share, context: ssl.SSLContext | None, handshake_timeout_s: float
) -> SharedListener:
    """Return a worker's listener. Raises ConfigurationError when another program listens on the port."""
    listener = SharedListener(factory, share, context, handshake_timeout_s)
    try:
        listener.listen()
    except OSError as error:
        raise cannot_listen(host, listener.port, "API", error) from None
    return listener


class _Accepted(socket.socket):
    """An accepted connection, which reports its end. uvloop's transport detaches its socket, asyncio's closes it."""

    def __init__(self, accepted: socket.socket, on_closed: Callable[[], None]) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._on_closed = on_closed

    def detach(self) -> int:
        self._on_closed()
        return super().detach()

    def close(self) -> None:
        self._on_closed()
        super().close()
