"""Who serves a unix socket, and who may replace it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_served(path: str) -> bool:
    """Whether somebody accepts connections on the unix socket; False for one whose process is dead, and for none."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(0)  # it is accepted at once, or the queue of one who lives is full
        try:
            caller.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for ourselves, among those who ask so too. Raises BlockingIOError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
