"""Logs: one JSON object a line, on standard error. Ids and counts; no message text, key, password or whole number.

Nobody logs those on purpose. What a bug or a library might say by accident meets two nets: a traceback shows where it
broke and with which kind of error, not the error's own words, which may quote what a caller sent (`KeyError:
'+14155551234'`); and whatever has the form of a key, a whole number, or a password in a URL is masked.
"""

import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType

import msgspec

# aiormq's debug lines show, octet for octet, what is published through it; we publish past it, but need not rely on
# that. Above that the publisher says what happens to its connections; the libraries add tracebacks to each retry.
SILENCED = ("aio_pika", "aiormq")

# Their words are about code and addresses; those of any other error may be about data.
_SPEAK_OF_NO_DATA = (AttributeError, ImportError, NameError, OSError, RecursionError, TypeError)

_key = re.compile(r"(trk_[0-9A-Za-z]{4})[0-9A-Za-z]{28}")  # leaves what `key list` shows
_password = re.compile(r"(://[^\s/:@]*:)[^\s@]+(?=@)|((?:ssl)?password=)[^&\s'\"]+", re.IGNORECASE)
_number = re.compile(r"\+[1-9][0-9]{6,}")  # shorter ones nobody can be called at


def mask_number(number: str) -> str:
    """+447911123412 → +4479******12: enough to recognise one's own number, not enough to call it."""
    return number[:5] + "*" * max(0, len(number) - 7) + number[-2:] if len(number) > 7 else "*" * len(number)


def redact(text: str) -> str:
    """The text, with what has the form of a key, a password in a URL, or a whole number masked."""
    text = _key.sub(r"\1***", text)
    text = _password.sub(lambda found: f"{found[1] or found[2]}***", text)
    return _number.sub(lambda found: mask_number(found[0]), text)


def trace(error: BaseException) -> str:
    """Where an error, and those that led to it, were raised, and of what kind; only harmless words of theirs."""
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        words = f": {link}" if isinstance(link, _SPEAK_OF_NO_DATA) else ""
        frames = "".join(traceback.format_tb(link.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(link).__qualname__}{words}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


class JsonLines(logging.Formatter):
    """time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # Octets over 127 in headers reach us as lone surrogates, which no encoder takes.
            "message": redact(record.getMessage()).encode("utf-8", "backslashreplace").decode(),
        }
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = redact(trace(record.exc_info[1])).encode("utf-8", "backslashreplace").decode()
        return msgspec.json.encode(line).decode()


def configure(level: str) -> None:
    """Send all logs of the process through JsonLines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for library in SILENCED:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.excepthook = _log_the_end


def _log_the_end(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("ended by an unexpected error", exc_info=error)
