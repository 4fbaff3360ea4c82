"""A log of failures that repeat while a server is down: each text at once, then a count per interval."""

import logging
import time

INTERVAL_S = 60.0
MAX_TEXTS = 100  # far above the number of different failures of a server


class FailureLog:
    """The failures of one server, from the first until end()."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        # Text → time.monotonic() of its last line, and the number of its failures since.
        self._logged: dict[str, tuple[float, int]] = {}
        self._failures = 0

    def note(self, text: str) -> None:
        """Log a failure, or count it if the same text was logged within the interval."""
        self._failures += 1
        now = time.monotonic()
        logged_at, more = self._logged.get(text, (now - INTERVAL_S, 0))
        if now - logged_at < INTERVAL_S:
            self._logged[text] = logged_at, more + 1
            return
        if len(self._logged) >= MAX_TEXTS:
            self._logged.clear()
        self._logged[text] = now, 0
        self._log.warning("%s%s", text, f" ({more:,} more in the last {now - logged_at:.0f} s)" if more else "")

    def end(self) -> str:
        """Forget the failures, because the server answers. Return ", after N failures" for the log; "" without any."""
        failures, self._failures = self._failures, 0
        self._logged.clear()
        return f", after {failures:,} failures" if failures else ""
