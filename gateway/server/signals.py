"""The signals that a process handles."""

import asyncio
import logging
import signal
from collections.abc import Callable

logger = logging.getLogger(__name__)


def handle_signals(on_hangup: Callable[[], None] | None) -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets.

    `on_hangup` is called on SIGHUP; None ignores SIGHUP, which would end the process without a drain. A SIGHUP that
    has arrived since `gateway/__main__.py` blocked it is handled now.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, on_hangup or _ignore_hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    return stop


def _ignore_hangup() -> None:
    logger.info("SIGHUP is ignored: there is no certificate to read again. SIGTERM drains and ends the process")
