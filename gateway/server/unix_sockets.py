"""The API's unix socket: taken over from a dead process, never from a live one."""

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.config import ConfigurationError
from gateway.web.connections import BoundedRunner

LOCK_TIMEOUT_S = 1.0  # another gateway opens its socket within milliseconds
LOCK_RETRY_S = 0.02


async def listen_on_own_socket(runner: BoundedRunner, path: str) -> None:
    """Accept callers on a unix socket to which this process's user and group may connect.

    The socket of a dead process is replaced. Raises ConfigurationError when a live process serves the socket, or when
    it cannot be made.
    """
    try:
        # Without the lock, a process that starts now could replace our socket between its bind and its listen.
        async with locked(Path(path).parent):
            if is_no_socket(path):
                raise ConfigurationError(f"GATEWAY_API_SOCKET={path!r} exists and is no socket")
            if is_served(path):
                raise ConfigurationError(f"GATEWAY_API_SOCKET={path!r} is served by another process")
            before = os.umask(0o117)  # with a chmod instead, the socket would be open to all for a moment
            try:
                await runner.listen_on_unix_socket(path)
            finally:
                os.umask(before)
    except OSError as error:
        raise ConfigurationError(f"GATEWAY_API_SOCKET={path!r} cannot be used: {error.strerror or error}") from None


def is_no_socket(path: str) -> bool:
    """Return True if something is at the path, such as a file or a folder, that is no socket."""
    return os.path.lexists(path) and not Path(path).is_socket()


def is_served(path: str) -> bool:
    """Return True if a process accepts connections on the unix socket; False if its process is dead or none exists."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(0)  # a live process's socket accepts at once, or its queue is full
        try:
            caller.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True
    return True


@asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[None]:
    """Lock a folder against other callers of this function. Raises OSError, also if it stays locked by another."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_S):
                while not _try_lock(descriptor):  # noqa: ASYNC110 - the system reports no end of a lock
                    await asyncio.sleep(LOCK_RETRY_S)
        except TimeoutError:
            raise BlockingIOError(errno.EAGAIN, "another process keeps its folder locked") from None
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
