"""The signals that a process of the gateway handles."""

import asyncio
import signal
from collections.abc import Callable


def handle_signals(on_hangup: Callable[[], None] | None) -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets. `on_hangup` is called on SIGHUP; None leaves SIGHUP alone."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if on_hangup is not None:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    return stop
