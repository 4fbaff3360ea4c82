"""A log of events that repeat, such as failures of a server that is down: each text at once, then counts."""

import logging
import time

INTERVAL_S = 60.0
MAX_TEXTS = 100  # far above the number of different failures of a server


class RepeatLog:
    """A log of the events of one source. They repeat until end(), if that is ever called."""

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        # Text → time.monotonic() of its last line, and the number of its events since.
        self._logged: dict[str, tuple[float, int]] = {}
        self._events = 0

    def note(self, text: str) -> None:
        """Log an event. If its text was logged before, count the event, and log the count once per interval."""
        self._events += 1
        now = time.monotonic()
        if text in self._logged:
            logged_at, more = self._logged[text]
            self._logged[text] = logged_at, more + 1
            if now - logged_at >= INTERVAL_S:
                self._log_count(text, now)
            return
        if len(self._logged) >= MAX_TEXTS:
            self._logged.clear()
        self._logged[text] = now, 0
        self._log.log(self._level, "%s", text)

    def log_counts(self) -> None:
        """Log the counts of the texts whose interval is over, and forget the texts without events in it.

        Call it at intervals if end() is not called. Otherwise the last count of a text waits for its next event.
        """
        now = time.monotonic()
        for text, (logged_at, more) in list(self._logged.items()):
            if now - logged_at < INTERVAL_S:
                continue
            if more:
                self._log_count(text, now)
            else:
                del self._logged[text]

    def _log_count(self, text: str, now: float) -> None:
        logged_at, more = self._logged[text]
        self._logged[text] = now, 0
        self._log.log(self._level, "%s (%s more in the last %.0f s)", text, f"{more:,}", now - logged_at)

    def end(self) -> str:
        """Forget all events, which were failures of a server that answers now. Return ", after N failures", or ""."""
        events, self._events = self._events, 0
        self._logged.clear()
        return f", after {events:,} failures" if events else ""
