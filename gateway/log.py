"""Logs: one JSON object a line, on standard error. Ids and counts, never message text, keys or whole numbers.

A line is made where it is logged and written by a thread: a reader that is slow, or stuck, costs lines, which are
counted, and never holds up the event loop.
"""

import logging
import os
import select
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from time import monotonic

import msgspec

STANDARD_ERROR = 2
GATHER_S = 0.02  # lines of one moment leave in one write, and the writer is woken once for all of them
MAX_PENDING_OCTETS = 4 * 1024 * 1024  # some 10,000 lines
LAST_WORDS_S = 2.0  # for what is pending when the process ends
FIELDS = "fields"  # of a record: what a line says beside its message


def mask_number(number: str) -> str:
    """+447911123412 → +4479******12: enough to recognise one's own number, not enough to call it."""
    return number[:5] + "*" * max(0, len(number) - 7) + number[-2:] if len(number) > 7 else "*" * len(number)


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
            # Octets over 127 in headers reach us as lone surrogates, which no encoder takes.
            "message": record.getMessage().encode("utf-8", "backslashreplace").decode(),
            **self._process,
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
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
        message = " ".join([record.getMessage(), *_pairs(fields_of(record))])
        line = f"{time} {record.levelname:<8} {self._process}{record.name}: {_printable(message)}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n    {_printable(part)}" for part in trace)
        return line


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What was logged with `extra={FIELDS: …}`."""
    found: dict[str, object] = getattr(record, FIELDS, {})
    return found


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
        self._octets = 0  # of lines not yet written, those in the thread's hands included
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
            if self._octets + len(line) > MAX_PENDING_OCTETS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._octets += len(line)
        if not self._waiting.is_set():
            self._waiting.set()

    def flush(self) -> None:
        """Wait until all is written, but for LAST_WORDS_S at the most."""
        if self._is_stuck:
            return
        give_up_at = monotonic() + LAST_WORDS_S
        self._flushing = True
        while self._octets and self._thread.is_alive() and monotonic() < give_up_at:
            self._written.clear()
            self._waiting.set()
            self._written.wait(0.05)
        self._flushing, self._is_stuck = False, self._octets > 0

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
            octets = sum(map(len, lines))
            if dropped:
                lines.append(self._line_about(dropped))
            for piece in whole_lines(lines):
                self._write(piece)
            with self._hands:
                self._octets -= octets
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
    start = octets = 0
    for end, line in enumerate(lines):
        if octets and octets + len(line) > select.PIPE_BUF:
            yield b"".join(lines[start:end])
            start, octets = end, 0
        octets += len(line)
    if octets:
        yield b"".join(lines[start:])


def configure(level: str, form: str = "json", *, process: str = "") -> None:
    """Send all logs of the process, libraries' too, to standard error in one form: `json` or `console`."""
    handler = WriterThread()
    handler.setFormatter(ConsoleLines(process) if form == "console" else JsonLines(process))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # The publisher says what happens to its connections; the libraries below it add tracebacks to each retry.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
