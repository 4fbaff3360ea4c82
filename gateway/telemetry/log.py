"""Logs: one JSON object a line, on standard error. Ids and counts; no message text, key, password or whole number.

Nobody logs those on purpose. What a bug or a library might say by accident meets two nets: a traceback shows where it
broke and with which kind of error, not the error's own words, which may quote what a caller sent (`KeyError:
'+14155551234'`); and whatever has the form of a key, a whole number, or a password in a URL is masked.

A line is made where it is logged and written by a thread: a reader that is slow, or stuck, costs lines, which are
counted, and never holds up the event loop.
"""

import logging
import os
import re
import select
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from time import monotonic
from types import TracebackType

import msgspec

STANDARD_ERROR = 2
GATHER_S = 0.02  # lines of one moment leave in one write, and the writer is woken once for all of them
MAX_PENDING_BYTES = 4 * 1024 * 1024  # some 10,000 lines
LAST_WORDS_S = 2.0  # for what is pending when the process ends
FIELDS = "fields"  # of a record: what a line says beside its message

# aiormq's debug lines show, byte for byte, what is published through it; we publish past it, but need not rely on
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
    if "trk_" in text:  # each look is cheaper than the search it spares: every line comes by here
        text = _key.sub(r"\1***", text)
    if "://" in text or "=" in text:
        text = _password.sub(lambda found: f"{found[1] or found[2]}***", text)
    if "+" in text:
        text = _number.sub(lambda found: mask_number(found[0]), text)
    return text


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
    """time, level, logger, message, the record's fields, and the traceback where there is one."""

    def __init__(self, process: str = "") -> None:
        """`process`: which of several workers is speaking."""
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # Bytes over 127 in headers reach us as lone surrogates, which no encoder takes.
            "message": redact(record.getMessage()).encode("utf-8", "backslashreplace").decode(),
            **self._process,
            **fields_of(record),
        }
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = redact(trace(record.exc_info[1])).encode("utf-8", "backslashreplace").decode()
        return msgspec.json.encode(line).decode()


class ConsoleLines(logging.Formatter):
    """The same for a person: time, level, logger, message, name=value for each field; a traceback on lines of its own.

    What could forge a line or paint the screen is escaped.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = f"{process} " if process else ""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:12]
        message = " ".join([redact(record.getMessage()), *_pairs(fields_of(record))])
        line = f"{time} {record.levelname:<8} {self._process}{record.name}: {_printable(message)}"
        if record.exc_info and record.exc_info[1]:
            parts = redact(trace(record.exc_info[1])).splitlines()
            line += "".join(f"\n    {_printable(part)}" for part in parts)
        return line


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What was logged with `extra={FIELDS: …}`."""
    found: dict[str, object] = getattr(record, FIELDS, {})
    return {name: redact(value) if isinstance(value, str) else value for name, value in found.items()}


def _pairs(fields: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class WriterThread(logging.Handler):
    """Hands lines to a thread that writes them; what it cannot get rid of is dropped and counted, and that is said."""

    def __init__(self, descriptor: int = STANDARD_ERROR) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: list[bytes] = []
        self._bytes = 0  # of lines not yet written, those in the thread's hands included
        self._dropped = 0
        self._hands = threading.Lock()  # not the handler's own: logging holds that while it waits for flush()
        self._waiting, self._written = threading.Event(), threading.Event()
        self._flushing = self._closing = False
        self._is_stuck = False  # a flush has waited in vain: the next need not
        self._thread = threading.Thread(target=self._write_for_ever, name="log writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take the line into the thread's hands, or drop it."""
        line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        with self._hands:
            if self._bytes + len(line) > MAX_PENDING_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
        if not self._waiting.is_set():
            self._waiting.set()

    def flush(self) -> None:
        """Wait until all is written, but for LAST_WORDS_S at the most."""
        if self._is_stuck:
            return
        give_up_at = monotonic() + LAST_WORDS_S
        self._flushing = True
        while self._bytes and self._thread.is_alive() and monotonic() < give_up_at:
            self._written.clear()
            self._waiting.set()
            self._written.wait(0.05)
        self._flushing, self._is_stuck = False, self._bytes > 0

    def close(self) -> None:
        """Write what is pending, and end the thread if nothing holds it."""
        self.flush()
        self._closing = True
        self._waiting.set()
        super().close()

    def _write_for_ever(self) -> None:
        while True:
            self._waiting.wait()
            if not (self._flushing or self._closing):
                threading.Event().wait(GATHER_S)
            self._waiting.clear()
            with self._hands:
                lines, self._lines = self._lines, []
                dropped, self._dropped = self._dropped, 0
            size = sum(map(len, lines))
            if dropped:
                lines.append(self._line_about(dropped))
            for piece in whole_lines(lines):
                self._write(piece)
            with self._hands:
                self._bytes -= size
            self._is_stuck = False
            self._written.set()
            if self._closing and not self._lines:
                return

    def _line_about(self, dropped: int) -> bytes:
        text = f"{dropped} log lines were dropped: standard error is read too slowly"
        return (
            self.format(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": text})).encode() + b"\n"
        )

    def _write(self, piece: bytes) -> None:
        while piece:
            try:
                piece = piece[os.write(self._descriptor, piece) :]
            except BlockingIOError:  # somebody shares the descriptor, and has made it so
                select.select([], [self._descriptor], [], 1.0)
            except OSError:  # nobody reads any more
                return


def whole_lines(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Lines in pieces that the system writes whole, so that workers with one standard error do not mix theirs."""
    start = size = 0
    for end, line in enumerate(lines):
        if size and size + len(line) > select.PIPE_BUF:
            yield b"".join(lines[start:end])
            start, size = end, 0
        size += len(line)
    if size:
        yield b"".join(lines[start:])


def configure(level: str, form: str = "json", *, process: str = "") -> None:
    """Send all logs of the process, libraries' too, to standard error in one form: `json` or `console`."""
    handler = WriterThread()
    handler.setFormatter(ConsoleLines(process) if form == "console" else JsonLines(process))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for library in SILENCED:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.excepthook = _log_the_end


def _log_the_end(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("ended by an unexpected error", exc_info=error)
