"""The API's port of `serve --workers`: one queue of connections, which the workers accept evenly.

The supervisor binds the port, and its workers inherit the sockets. A connection is in the kernel's queue until a worker
accepts it, so one that still waits there is not lost with a worker.

Shared memory has the number of open connections of each worker. A worker with more than another leaves a connection to
that one, and looks at the queue again after STEP_S. If it still finds one there after STEPS_A_WAIT, it accepts it, and
passes over the worker that did not, until that one's number changes. So a worker that is stopped or hung holds up one
caller for a moment. Callers with a new connection for each request change the numbers all the time: for them, steps are
bounded.
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

STEP_S = 0.002
STEPS_A_WAIT = 10  # 20 ms: longer than most turns of a busy event loop
STEPS_A_SECOND = 10.0  # 2 % of all time
MOST_STEPS = 100.0  # saved up
RETRY_S = 1.0  # after an accept that failed for want of descriptors or memory

ABSENT = 2**32 - 1  # the number of connections of a worker that accepts none: nobody waits for it
COUNT = struct.Struct("I")  # native, so that it is written in one piece


class Share(msgspec.Struct):
    """A worker's share of the port, which it inherits: its number, and descriptors."""

    number: int
    board: int
    sockets: list[int]

    def descriptors(self) -> list[int]:
        """Return all descriptors."""
        return [self.board, *self.sockets]


class Board:
    """The number of open connections of each worker, in memory that all share. A worker writes only its own."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._all = struct.Struct(f"{len(self._memory) // COUNT.size}I")

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
        self._board = Board(self._board_descriptor)
        for number in range(workers):
            self.mark_absent(number)

    def share(self, number: int) -> Share:
        """Return what a worker inherits."""
        return Share(number, self._board_descriptor, [each.fileno() for each in self._sockets])

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
        self._board = Board(share.board)
        os.close(share.board)
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in share.sockets]
        self._factory = factory
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s if context else None
        self._open = 0  # connections, including those in a TLS handshake
        self._is_accepting = False
        self._turns = _Turns()
        self._timer: asyncio.TimerHandle | None = None  # of a step, or of a pause after an error
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

    def _begin(self) -> None:
        self._is_accepting = True
        self._publish()
        self._read_queue()

    def _pause(self) -> None:
        self._leave_queue()
        if self._timer is not None:
            self._timer.cancel()
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
        if self._turns.is_of_another(self._loop.time(), self._open, self._board.read()):
            self._leave_queue()
            self._timer = self._loop.call_later(STEP_S, self._read_queue)
        else:
            self._accept(queue)

    def _accept(self, queue: socket.socket) -> None:
        try:
            accepted, _ = queue.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another worker was first
            return
        except OSError as error:
            self._errors.note(f"no connection can be accepted: {error.strerror}")
            self._pause()
            self._timer = self._loop.call_later(RETRY_S, self._begin)
            return
        self._open += 1
        self._publish()
        handover = self._loop.create_task(self._hand_over(_Accepted(accepted, self._on_closed)))
        self._handovers.add(handover)
        handover.add_done_callback(self._handovers.discard)

    async def _hand_over(self, accepted: socket.socket) -> None:
        with suppress(OSError):  # a failed handshake: the event loop closes the connection
            await self._loop.connect_accepted_socket(
                self._factory, accepted, ssl=self._context, ssl_handshake_timeout=self._handshake_timeout_s
            )

    def _on_closed(self) -> None:
        self._open -= 1
        self._publish()


class _Turns:
    """Decides whether a worker leaves a connection to another one for a step. Times are those of the event loop."""

    def __init__(self) -> None:
        self._awaited: dict[int, int] = {}  # worker → its number of connections
        self._steps = 0  # since that has changed
        self._passed_over: dict[int, int] = {}  # those that did not accept in time, with their number
        self._steps_left = MOST_STEPS
        self._at = 0.0

    def is_of_another(self, now: float, own: int, connections: tuple[int, ...]) -> bool:
        """Return True if another worker has fewer connections, and a step is left to wait for it."""
        self._steps_left = min(MOST_STEPS, self._steps_left + STEPS_A_SECOND * (now - self._at))
        self._at = now
        fewer = {worker: each for worker, each in enumerate(connections) if each < own}
        if fewer.items() <= self._passed_over.items() or self._steps_left < 1:
            return False
        if fewer != self._awaited:
            self._awaited, self._steps = fewer, 0
        if self._steps == STEPS_A_WAIT:
            self._passed_over = fewer
            return False
        self._steps += 1
        self._steps_left -= 1
        return True


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
