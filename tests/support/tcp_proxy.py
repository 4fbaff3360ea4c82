"""A TCP proxy for tests, which lets the network between a client and a real server fail on demand.

It does not interpret the bytes. Calls act at once, on open and on new connections:

    async with TcpProxy("127.0.0.1", 5672) as proxy:
        ...                    # the client connects to 127.0.0.1, proxy.port
        proxy.black_hole()     # like a pulled cable: no bytes pass, no connection is closed
        proxy.pass_through()   # healed, for new connections

A connection that has lost bytes stays a black hole until it is closed. TCP never delivers a stream with a gap, and
neither does the proxy.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST instead of FIN
CHUNK_BYTES = 65_536


class TcpProxy:
    """A proxy on a free port of 127.0.0.1, for the length of an `async with` block."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target_host = target_host
        self.target_port = target_port
        self.port = 0
        self.accepted = 0  # connections ever accepted
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self._silent = False
        self._delay_s = 0.0
        self._budget: int | None = None
        self._links: dict[_Link, asyncio.Task[None]] = {}
        self._socket: socket.socket
        self._listening = False

    # Faults of the network

    def pass_through(self) -> None:
        """Undo black_hole, refuse, delay and limit."""
        self._silent = False
        self._delay_s = 0.0
        self._budget = None
        self._listen()

    def black_hole(self) -> None:
        """Accept connections, and swallow all bytes from either side, and the end of a connection too."""
        self._silent = True

    def reset(self) -> None:
        """Send RST on both sides of every open connection; new ones are served."""
        for link, task in self._links.items():
            link.reset()
            task.cancel()

    def refuse(self) -> None:
        """Stop listening: new connections are refused by the kernel, open ones go on."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._listening = False
            # Bound but not listening, so that no other program gets the port meanwhile.
            self._socket = self._bound_socket()

    def delay(self, seconds: float) -> None:
        """Hold each chunk (64 KiB at most) this long, in each direction."""
        self._delay_s = seconds

    def limit(self, bytes_: int) -> None:
        """Pass exactly this many more bytes from clients to the server, then become a black hole."""
        self._budget = bytes_
        if bytes_ == 0:
            self.black_hole()

    # Start and end

    async def __aenter__(self) -> Self:
        self._socket = self._bound_socket()
        self.port = self._socket.getsockname()[1]
        self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self._socket.close()
        tasks = list(self._links.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _bound_socket(self) -> socket.socket:
        # TCP by name: asyncio leaves Nagle's delay on for sockets whose protocol number is the default 0.
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", self.port))
        return bound

    def _listen(self) -> None:
        # asyncio.start_server needs an await, but the methods above must act at once.
        if not self._listening:
            self._socket.listen(1024)
            asyncio.get_running_loop().add_reader(self._socket, self._accept)
            self._listening = True

    def _accept(self) -> None:
        with suppress(OSError):  # the client may be gone already
            sock, _ = self._socket.accept()
            self.accepted += 1
            link = _Link(self, sock)
            self._links[link] = task = asyncio.create_task(link.serve())
            task.add_done_callback(lambda _: self._forget(link))

    def _forget(self, link: _Link) -> None:
        # A task that was cancelled before its first step has not closed it.
        link.sock.close()
        del self._links[link]

    def _spend(self, chunk: bytes) -> bytes:
        """Return the part of a chunk to the server that the limit lets pass."""
        if self._budget is None:
            return chunk
        chunk = chunk[: self._budget]
        self._budget -= len(chunk)
        return chunk


class _Link:
    """A client's connection, and the connection to the server that belongs to it."""

    def __init__(self, proxy: TcpProxy, sock: socket.socket) -> None:
        self.sock = sock  # the client's
        self._proxy = proxy
        self._gap = proxy._silent  # bytes were lost, or there is no connection to the server
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self) -> None:
        try:
            self.sock.setblocking(False)
            client, to_client = await asyncio.open_connection(sock=self.sock)
            self._writers.append(to_client)
            if self._gap:
                await self._swallow(client)
                await asyncio.Event().wait()  # do not even close the connection
            server, to_server = await asyncio.open_connection(self._proxy.target_host, self._proxy.target_port)
            self._writers.append(to_server)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(client, to_server, "to_server"))
                both.create_task(self._carry(server, to_client, "to_client"))
        except* OSError:
            self.reset()  # a reset on one side becomes a reset on the other
        finally:
            for writer in self._writers:
                writer.transport.abort()  # close() would wait for a peer that does not read
            # Only now: a second cancellation may end this wait, and no connection may stay open then.
            for writer in self._writers:
                with suppress(OSError):
                    await writer.wait_closed()

    def reset(self) -> None:
        sockets = [self.sock, *(writer.get_extra_info("socket") for writer in self._writers)]
        for sock in sockets:
            with suppress(OSError):  # closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: Literal["to_server", "to_client"]
    ) -> None:
        proxy = self._proxy
        while chunk := await self._read(source):
            await asyncio.sleep(proxy._delay_s)
            passing = b"" if proxy._silent or self._gap else chunk
            if way == "to_server":
                passing = proxy._spend(passing)
                proxy.bytes_to_server += len(passing)
                if proxy._budget == 0:
                    proxy.black_hole()
            else:
                proxy.bytes_to_client += len(passing)
            self._gap |= len(passing) < len(chunk)
            if passing:
                sink.write(passing)
                await sink.drain()
        if proxy._silent or self._gap:
            # The other side does not see the end before the proxy closes.
            await asyncio.Event().wait()
        sink.write_eof()

    async def _read(self, source: asyncio.StreamReader) -> bytes:
        try:
            return await source.read(CHUNK_BYTES)
        except OSError:
            if self._proxy._silent or self._gap:
                return b""  # a reset is swallowed like bytes
            raise

    async def _swallow(self, source: asyncio.StreamReader) -> None:
        while await self._read(source):
            pass
