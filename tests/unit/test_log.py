"""A log line is one line of JSON, whatever is logged, and shows no whole phone number."""

import json
import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from gateway.telemetry import log
from gateway.telemetry.log import (
    MAX_PENDING_BYTES,
    MAX_WRITE_BYTES,
    ConsoleLines,
    JsonLines,
    WriterThread,
    configure,
    direct_writer,
    mask_number,
    utc,
    whole_lines,
)


def test_a_masked_number_keeps_its_first_five_and_last_two_characters() -> None:
    assert mask_number("+447911123412") == "+4479******12"
    assert mask_number("+14155551234") == "+1415*****34"


@pytest.mark.parametrize(("number", "masked"), [("", ""), ("+1", "**"), ("+123456", "*" * 7), ("+1234567", "+1234*67")])
def test_a_short_number_is_masked_almost_whole(number: str, masked: str) -> None:
    assert mask_number(number) == masked


def record(message: str, *arguments: object, **changes: object) -> logging.LogRecord:
    made = logging.LogRecord("gateway.web.api", logging.WARNING, "api.py", 7, message, arguments, None)
    vars(made).update(changes)
    return made


def test_a_line_has_time_level_logger_and_message() -> None:
    line = JsonLines().format(record("took %s of %d", "x", 3, created=1795431600.1239))
    assert json.loads(line) == {
        "time": "2026-11-23T11:00:00.123+00:00",
        "level": "warning",
        "logger": "gateway.web.api",
        "message": "took x of 3",
    }


def test_a_traceback_stays_within_its_line() -> None:
    try:
        raise TypeError("broken")
    except TypeError:
        line = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in line
    traceback = json.loads(line)["traceback"]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("TypeError: broken")


def test_a_lone_surrogate_in_a_message_costs_no_log_line() -> None:
    """Aiohttp gives bytes over 127 of a header or path as lone surrogates, which UTF-8 does not encode."""
    line = JsonLines().format(record("%s", "GET /\udcff"))
    line.encode()
    assert json.loads(line)["message"].startswith("GET /")


@pytest.mark.parametrize("moment", [0.0, 0.5, 1795431600.1239, 1795431600.9375, 1795431601.0, 4102444799.75])
def test_a_time_is_as_datetime_writes_it(moment: float) -> None:
    expected = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
    assert f"{utc(moment)}+00:00" == expected


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in ("aio_pika", "aiormq")]
    before = root.handlers[:], root.level, [library.level for library in libraries]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for library, level in zip(libraries, before[2], strict=True):
        library.setLevel(level)


def test_the_whole_process_logs_json_to_standard_error(
    untouched_logging: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configure("INFO")
    logging.getLogger("some.library").info("hello")
    logging.getLogger("some.library").debug("not at this level")
    logging.getLogger("aio_pika.connection").error("the publisher says this better")
    logging.getLogger("aiormq.connection").error("and this")
    error = ValueError("could be anything")
    sys.excepthook(ValueError, error, None)
    logging.getLogger().handlers[0].flush()
    out, err = capfd.readouterr()
    assert out == ""
    assert [json.loads(line)["message"] for line in err.splitlines()] == ["hello", "ended by an unexpected error"]
    assert "anything" not in err


def handler_on(descriptor: int) -> WriterThread:
    handler = WriterThread(descriptor)
    handler.setFormatter(JsonLines("worker-1"))
    return handler


def test_a_record_that_cannot_be_formatted_costs_only_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work that logs goes on, as with the handlers of `logging`."""
    handler = handler_on(-1)
    written: list[bytes] = []
    monkeypatch.setattr(handler, "_write", written.append)
    handler.handle(record("%d messages", "a text for one reader"))
    handler.handle(record("request", fields={"unknown": object()}))
    handler.handle(record("again"))
    handler.close()
    lines = [json.loads(line) for line in b"".join(written).splitlines()]
    assert [line["message"] for line in lines] == [
        "a record of gateway.web.api cannot be formatted (TypeError): api.py, line 7",
        "a record of gateway.web.api cannot be formatted (TypeError): api.py, line 7",
        "again",
    ]


def test_a_stuck_reader_blocks_nothing_and_learns_how_many_lines_were_dropped() -> None:
    reading, writing = os.pipe()
    handler = handler_on(writing)
    text, sent = "x" * 1000, 2 * MAX_PENDING_BYTES // 1000
    for number in range(sent):  # would wait for ever if a line waited for the reader
        handler.handle(record("%s %s", number, text))
    messages: list[str] = []

    def read_all() -> None:
        with os.fdopen(reading) as lines:
            messages.extend(json.loads(line)["message"] for line in lines)

    reader = threading.Thread(target=read_all)
    reader.start()
    handler.flush()
    handler.handle(record("again"))
    handler.close()
    os.close(writing)
    reader.join(10)
    dropped = [int(message.split()[0]) for message in messages if message.endswith("read too slowly")]
    kept = [int(message.split()[0]) for message in messages if message.endswith(text)]
    assert kept == sorted(kept)
    assert sum(dropped) > 0
    assert len(kept) + sum(dropped) == sent
    assert "again" in messages


def test_after_a_flush_in_vain_the_next_one_waits_only_when_the_reader_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    handler = handler_on(writing)
    handler.handle(record("x" * 100_000))  # more than a pipe holds
    with monkeypatch.context() as patch:
        patch.setattr(log, "FLUSH_TIMEOUT_S", 0.0)
        handler.flush()
        patch.setattr(log, "monotonic", lambda: pytest.fail("it waits"))
        handler.flush()
    with os.fdopen(reading) as lines:
        assert lines.readline()
        assert handler._written.wait(10)
        assert not handler._is_stuck
        handler.close()
        os.close(writing)


def test_a_line_that_is_written_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_PENDING_BYTES", 5)
    handler = handler_on(-1)
    written: list[bytes] = []
    monkeypatch.setattr(handler, "_write", written.append)
    for _ in range(2):
        handler.write_line(b"line\n")
        handler.flush()
    handler.close()
    assert written == [b"line\n"] * 2


def test_a_line_that_comes_during_the_last_write_is_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = handler_on(-1)
    written: list[bytes] = []

    def write(piece: bytes) -> None:
        written.append(piece)
        if len(written) == 1:
            handler._closing = True
            handler.write_line(b"two\n")

    monkeypatch.setattr(handler, "_write", write)
    handler.write_line(b"one\n")
    handler._thread.join(10)
    assert written == [b"one\n", b"two\n"]


def test_lines_are_written_in_pieces_that_do_not_mix_with_another_workers() -> None:
    lines = [b"x" * size + b"\n" for size in (10, select.PIPE_BUF - 12, 1, 1, 5000, 3)]
    pieces = list(whole_lines(lines))
    assert b"".join(pieces) == b"".join(lines)
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert list(map(len, pieces)) == [select.PIPE_BUF, 4, 5001, 4]
    assert list(whole_lines(lines[4:5])) == lines[4:5]


def test_a_line_is_written_whole_to_a_descriptor_that_does_not_block() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handler = handler_on(writing)
    line, received = b"x" * 200_000 + b"\n", list[bytes]()  # more than a pipe holds

    def read_all() -> None:
        with os.fdopen(reading, "rb") as lines:
            received.append(lines.read())

    reader = threading.Thread(target=read_all)
    reader.start()
    handler.write_line(line)
    handler.close()
    handler._thread.join(10)
    os.close(writing)
    reader.join(10)
    assert received == [line]


def test_lines_after_the_end_of_the_reader_go_nowhere_and_the_thread_goes_on() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    handler = handler_on(writing)
    handler.write_line(b"one\n")
    handler.flush()
    assert handler._thread.is_alive()
    handler.close()
    os.close(writing)


@pytest.mark.parametrize(("process", "piece_bytes"), [("", MAX_WRITE_BYTES), ("worker-1", select.PIPE_BUF)])
def test_only_json_lines_of_the_one_handler_are_written_directly(
    untouched_logging: None, monkeypatch: pytest.MonkeyPatch, process: str, piece_bytes: int
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    configure("INFO", process=process)
    writer = direct_writer()
    assert writer is not None
    assert writer._piece_bytes == piece_bytes, "workers share a pipe"
    root.addHandler(logging.NullHandler())
    assert direct_writer() is None
    configure("INFO", "console", process=process)
    assert direct_writer() is None
    root.handlers[0].close()


def test_a_line_has_its_process_and_its_fields() -> None:
    line = json.loads(JsonLines("worker-1").format(record("request", fields={"status": 200})))
    assert (line["process"], line["status"], line["message"]) == ("worker-1", 200, "request")


def test_fields_are_redacted_at_any_depth() -> None:
    fields = {"settings": {"url": "amqp://u:secret@h/", "servers": {"other": "postgres://u:secret@h/", "port": 1}}}
    line = json.loads(JsonLines().format(record("settings", fields=fields)))
    assert line["settings"] == {"url": "amqp://u:***@h/", "servers": {"other": "postgres://u:***@h/", "port": 1}}


def test_a_line_and_a_traceback_for_a_console_cannot_be_forged() -> None:
    made = record("hello\n%s", "\x1b[31m\u2028", created=1795431600.1239, fields={"status": 200, "errors": {"a": 1}})
    made.exc_info = (TypeError, TypeError("\x1b[31m\nforged"), None)
    line, *traceback = ConsoleLines("worker-1").format(made).split("\n")
    assert traceback == ["    Traceback (most recent call last):", r"    TypeError: \x1b[31m", "    forged"]
    expected = r"11:00:00.123 WARNING  worker-1 gateway.web.api: hello\n\x1b[31m\u2028 status=200 errors.a=1"
    assert line == expected
