"""The signals that a process handles, and the ways to end it at once."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

# For the connections to broker, database and collector, beyond the time for the drain. They are closed one after the
# other, and their own timeouts could add up to more. Then come the last log lines (FLUSH_TIMEOUT_S): the process ends
# within the 10 s that docs/operations.md asks orchestrators for.
CLOSE_TIMEOUT_S = 7.0


class Stop:
    """The request to stop, by SIGTERM or SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        # By SIGINT, from a person at a terminal: the delay of a drain, which is for load balancers, is left out.
        self.interrupted = asyncio.Event()

    async def wait_delay(self, delay_s: float) -> None:
        """Return after the delay of the drain. SIGINT cuts it short."""
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self.interrupted.wait()


def end_at_once() -> None:
    """End the process by SIGINT, without a drain. Its log is written."""
    logger.warning("ended by a second SIGINT: requests in flight get no answer")
    logging.shutdown()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def end_unclosed() -> None:
    """End the process with status 0 before everything is closed. All requests are answered, and the log is written."""
    logger.warning("ended before everything was closed: the time for it is over")
    logging.shutdown()
    os._exit(0)


def handle_signals(
    on_hangup: Callable[[], None] | None, on_second_interrupt: Callable[[], None] | None = end_at_once
) -> Stop:
    """Return the Stop that SIGTERM and SIGINT set. None for `on_second_interrupt` ignores a second SIGINT.

    `on_hangup` is called on SIGHUP; None ignores SIGHUP, which would end the process without a drain. A SIGHUP that
    has arrived since `gateway/__main__.py` blocked it is handled now.
    """
    loop = asyncio.get_running_loop()
    stop = Stop()

    def interrupt() -> None:
        if on_second_interrupt is not None:
            if stop.interrupted.is_set():
                on_second_interrupt()  # ends the process
            progress = "goes on without its delay" if stop.requested.is_set() else "begins"
            logger.info("SIGINT: the drain %s. A second SIGINT ends the process at once", progress)
        stop.interrupted.set()
        stop.requested.set()

    loop.add_signal_handler(signal.SIGTERM, stop.requested.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGHUP, on_hangup or _ignore_hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    return stop


def _ignore_hangup() -> None:
    logger.info("SIGHUP is ignored: there is no certificate to read again. SIGTERM drains and ends the process")
