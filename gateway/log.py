"""Logs: one JSON object a line, on standard error. Ids and counts, never message text, keys or whole numbers."""

import logging
import sys
from datetime import UTC, datetime

import msgspec


def mask_number(number: str) -> str:
    """+447911123412 → +4479******12: enough to recognise one's own number, not enough to call it."""
    return number[:5] + "*" * max(0, len(number) - 7) + number[-2:] if len(number) > 7 else "*" * len(number)


class JsonLines(logging.Formatter):
    """time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # Octets over 127 in headers reach us as lone surrogates, which no encoder takes.
            "message": record.getMessage().encode("utf-8", "backslashreplace").decode(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str) -> None:
    """Send all logs of the process through JsonLines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # The publisher says what happens to its connections; the libraries below it add tracebacks to each retry.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
