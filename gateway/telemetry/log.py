"""Logs: one JSON object per line on standard error, with ids and counts, without texts, keys, passwords or numbers.

Our own code logs none of these. Two safeguards cover what a bug or a library may log. A line shows the frames and the
kind of an error, but not its text, which may quote a request (`KeyError: '+14155551234'`). `redact` masks all text in
the form of a key, a whole number, or a password in a URL.

The caller formats a line, and a thread writes it. A slow or stuck reader costs lines, which are counted, and never
blocks the event loop. The request log encodes its lines itself, and hands them to the same thread (`direct_writer`).
"""

import logging
import os
import re
import select
import string
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from time import monotonic, sleep
from types import TracebackType

import msgspec

STANDARD_ERROR = 2
GATHER_S = 0.02  # lines that arrive within this time share one wake-up and one write
MAX_PENDING_BYTES = 4 * 1024 * 1024  # about 10,000 lines
# The largest write, if no other process of the gateway writes to the same pipe. After each write the thread takes the
# interpreter's lock from the event loop (scripts/bench observing).
MAX_WRITE_BYTES = 64 * 1024
FLUSH_TIMEOUT_S = 2.0  # when the process ends
FIELDS = "fields"  # attribute of a record: the line's fields beside its message

# aiormq's debug lines quote published payloads, and both libraries log a traceback per retry. The publisher logs the
# state of its connections itself.
SILENCED = ("aio_pika", "aiormq")

# The texts of these errors are about code and addresses. The text of any other error may quote data.
_WITHOUT_DATA = (AttributeError, ImportError, NameError, OSError, RecursionError, TypeError)

# The form of an API key: a prefix, then random characters. `key list` and the log show its beginning: 24 bits of 190.
KEY_PREFIX = "trk_"
KEY_ALPHABET = string.digits + string.ascii_letters
KEY_CHARACTERS = 32  # after the prefix
KEY_SHOWN = len(KEY_PREFIX) + 4
KEY_PATTERN = re.compile(rf"{KEY_PREFIX}[{KEY_ALPHABET}]{{{KEY_CHARACTERS}}}")

_password = re.compile(r"(://[^\s/:@]*:)[^\s@]+(?=@)|((?:ssl)?password=)[^&\s'\"]+", re.IGNORECASE)
_number = re.compile(r"\+[1-9][0-9]{6,}")  # no E.164 pattern: shorter numbers reach nobody, longer ones are masked too


def mask_number(number: str) -> str:
    """Mask the middle of a number, as in +4479******12: its owner recognises it, and nobody can call it."""
    return number[:5] + "*" * max(0, len(number) - 7) + number[-2:] if len(number) > 7 else "*" * len(number)


def redact(text: str) -> str:
    """Return text with keys, passwords in URLs and whole numbers masked."""
    if KEY_PREFIX in text:  # cheaper than the search: every line passes here
        text = KEY_PATTERN.sub(lambda found: f"{found[0][:KEY_SHOWN]}***", text)
    if "://" in text or "=" in text:
        text = _password.sub(lambda found: f"{found[1] or found[2]}***", text)
    if "+" in text:
        text = _number.sub(lambda found: mask_number(found[0]), text)
    return text


def trace(error: BaseException) -> str:
    """Return the traceback of an error and its causes. Only texts of errors that quote no data are included."""
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = f": {link}" if isinstance(link, _WITHOUT_DATA) else ""
        frames = "".join(traceback.format_tb(link.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(link).__qualname__}{text}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


def utc(seconds: float) -> str:
    """Return a Unix time as ISO 8601 in UTC, cut to milliseconds, without a zone.

    The text of the second is cached: `datetime.isoformat` for each time would take three times as long.
    """
    second = int(seconds)
    return f"{_utc_second(second)}.{int((seconds - second) * 1000):03}"


@lru_cache(maxsize=2)
def _utc_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()


class JsonLines(logging.Formatter):
    """A JSON object per record: time, level, logger, message, fields, and traceback if there is one."""

    def __init__(self, process: str = "") -> None:
        """`process` names one of several workers; "" adds no field."""
        super().__init__()
        self.process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        line = {
            "time": f"{utc(record.created)}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            # Bytes over 127 in headers arrive as lone surrogates, which UTF-8 cannot encode.
            "message": message_of(record).encode("utf-8", "backslashreplace").decode(),
            **self.process,
            **fields_of(record),
        }
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = redact(trace(record.exc_info[1])).encode("utf-8", "backslashreplace").decode()
        return msgspec.json.encode(line).decode()


class ConsoleLines(logging.Formatter):
    """A line per record for a terminal: time, level, logger, message, name=value per field; then the traceback.

    Unprintable characters are escaped: they could forge a line, or change the terminal.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = f"{process} " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:12]
        message = " ".join([message_of(record), *_pairs(fields_of(record))])
        line = f"{time} {record.levelname:<8} {self._process}{record.name}: {printable(message)}"
        if record.exc_info and record.exc_info[1]:
            parts = redact(trace(record.exc_info[1])).splitlines()
            line += "".join(f"\n    {printable(part)}" for part in parts)
        return line


def message_of(record: logging.LogRecord) -> str:
    """Return the record's message, redacted. Where asyncio quotes an error, only the kind of the error is left."""
    message = record.getMessage()
    if record.exc_info and (error := record.exc_info[1]):
        message = message.replace(repr(error), type(error).__qualname__)
    return redact(message)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of `extra={FIELDS: …}`, redacted."""
    return _redacted(getattr(record, FIELDS, {}))


def _redacted(fields: dict[str, object]) -> dict[str, object]:
    return {
        name: redact(value) if isinstance(value, str) else _redacted(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def _pairs(fields: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def printable(text: str) -> str:
    """Return text with unprintable characters escaped as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class WriterThread(logging.Handler):
    """A handler whose thread writes the lines. Lines beyond MAX_PENDING_BYTES are dropped and counted."""

    def __init__(self, descriptor: int = STANDARD_ERROR, *, shares_pipe: bool = False) -> None:
        """`shares_pipe`: other processes of the gateway write lines to the same pipe."""
        super().__init__()
        self._descriptor = descriptor
        self._piece_bytes = select.PIPE_BUF if shares_pipe else MAX_WRITE_BYTES
        self._lines: list[bytes] = []
        self._bytes = 0  # not yet written, including those the thread is writing
        self._dropped = 0
        self._pending_lock = threading.Lock()  # logging holds the handler's own lock during flush()
        self._waiting, self._written = threading.Event(), threading.Event()
        self._flushing = self._closing = False
        self._is_stuck = False  # a flush timed out: the next one does not wait
        self._thread = threading.Thread(target=self._write_for_ever, name="log writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line for the thread, or drop it."""
        try:
            line = self.format(record)
        except Exception as error:  # arguments that do not fit the message: the work that logs must not fail
            line = self._own_line(
                f"a record of {record.name} cannot be formatted ({type(error).__name__}): {record.filename}, "
                f"line {record.lineno}"
            )
        self.write_line(line.encode("utf-8", "backslashreplace") + b"\n")

    def write_line(self, line: bytes) -> None:
        """Queue a line, with its newline, for the thread, or drop it."""
        with self._pending_lock:
            if self._bytes + len(line) > MAX_PENDING_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
        if not self._waiting.is_set():
            self._waiting.set()

    def flush(self) -> None:
        """Wait until all lines are written, at most FLUSH_TIMEOUT_S."""
        if self._is_stuck:
            return
        deadline = monotonic() + FLUSH_TIMEOUT_S
        self._flushing = True
        while self._bytes and self._thread.is_alive() and monotonic() < deadline:
            self._written.clear()
            self._waiting.set()
            self._written.wait(0.05)
        self._flushing, self._is_stuck = False, self._bytes > 0

    def close(self) -> None:
        """Write pending lines, and end the thread unless its write blocks."""
        self.flush()
        self._closing = True
        self._waiting.set()
        super().close()

    def _write_for_ever(self) -> None:
        while True:
            self._waiting.wait()
            if not (self._flushing or self._closing):
                sleep(GATHER_S)
            self._waiting.clear()
            with self._pending_lock:
                lines, self._lines = self._lines, []
                dropped, self._dropped = self._dropped, 0
            size = sum(map(len, lines))
            if dropped:
                text = f"{dropped} log lines were dropped: standard error is read too slowly"
                lines.append(self._own_line(text).encode() + b"\n")
            for piece in whole_lines(lines, self._piece_bytes):
                self._write(piece)
            with self._pending_lock:
                self._bytes -= size
            self._is_stuck = False
            self._written.set()
            if self._closing and not self._lines:
                return

    def _own_line(self, text: str) -> str:
        return self.format(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": text}))

    def _write(self, piece: bytes) -> None:
        while piece:
            try:
                piece = piece[os.write(self._descriptor, piece) :]
            except BlockingIOError:  # another process made the shared descriptor non-blocking
                select.select([], [self._descriptor], [], 1.0)
            except OSError:  # the reader is gone
                return


def whole_lines(lines: Sequence[bytes], most_bytes: int = select.PIPE_BUF) -> Iterator[bytes]:
    """Yield lines joined to pieces of at most `most_bytes`. A longer line is a piece of its own.

    A pipe takes PIPE_BUF bytes whole, so the lines of several workers do not mix.
    """
    start = size = 0
    for end, line in enumerate(lines):
        if size and size + len(line) > most_bytes:
            yield b"".join(lines[start:end])
            start, size = end, 0
        size += len(line)
    if size:
        yield b"".join(lines[start:])


def configure(level: str, form: str = "json", *, process: str = "") -> None:
    """Send all logs of the process, including those of libraries, to standard error as `json` or `console` lines.

    Warnings, and errors that nobody catches, are logged too. Python would print them with the text of the error.
    """
    handler = WriterThread(shares_pipe=bool(process))
    handler.setFormatter(ConsoleLines(process) if form == "console" else JsonLines(process))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for library in SILENCED:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    sys.excepthook, sys.unraisablehook, threading.excepthook = _log_crash, _log_ignored, _log_end_of_thread


def direct_writer() -> WriterThread | None:
    """Return the handler that `configure` has installed for JSON lines; None for any other configuration."""
    handlers = logging.getLogger().handlers
    found = handlers[0] if len(handlers) == 1 else None
    return found if isinstance(found, WriterThread) and isinstance(found.formatter, JsonLines) else None


def _log_crash(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("ended by an unexpected error", exc_info=error)


def _log_ignored(ignored: "sys.UnraisableHookArgs") -> None:
    where = getattr(ignored.object, "__qualname__", type(ignored.object).__qualname__)
    logging.getLogger(__name__).error("an error in %s was ignored", where, exc_info=ignored.exc_value)


def _log_end_of_thread(failed: threading.ExceptHookArgs) -> None:
    name = failed.thread.name if failed.thread else "?"
    logging.getLogger(__name__).error("the thread %s has ended by an unexpected error", name, exc_info=failed.exc_value)
