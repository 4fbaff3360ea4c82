"""A log line is one line of JSON, whatever is logged, and shows no whole phone number."""

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.log import JsonLines, configure, mask_number

EXAMPLES = settings(derandomize=True, max_examples=200, deadline=None)


def test_a_masked_number_is_recognised_by_its_owner_and_called_by_nobody() -> None:
    assert mask_number("+447911123412") == "+4479******12"
    assert mask_number("+14155551234") == "+1415*****34"


@pytest.mark.parametrize(("number", "masked"), [("", ""), ("+1", "**"), ("+123456", "*" * 7), ("+1234567", "+1234*67")])
def test_a_short_number_shows_nothing_or_next_to_nothing(number: str, masked: str) -> None:
    assert mask_number(number) == masked


@EXAMPLES
@given(number=st.from_regex(r"\+[1-9][0-9]{1,14}", fullmatch=True))
def test_a_mask_keeps_the_length_and_at_most_seven_characters(number: str) -> None:
    masked = mask_number(number)
    assert len(masked) == len(number)
    assert masked != number
    assert len(masked.replace("*", "")) <= 7


def record(message: str, *arguments: object, **changes: object) -> logging.LogRecord:
    made = logging.LogRecord("gateway.api", logging.WARNING, "api.py", 7, message, arguments, None)
    vars(made).update(changes)
    return made


def test_a_line_says_when_how_bad_where_and_what() -> None:
    line = JsonLines().format(record("took %s of %d", "x", 3, created=1795431600.1239))
    assert json.loads(line) == {
        "time": "2026-11-23T11:00:00.123+00:00",
        "level": "warning",
        "logger": "gateway.api",
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


@EXAMPLES
@given(message=st.text())
def test_any_message_is_one_line_and_comes_out_as_it_went_in(message: str) -> None:
    line = JsonLines().format(record("%s", message))
    assert json.loads(line)["message"] == message
    assert not re.search(r"[\x00-\x1f]", line), "a line break or a control character could forge a line"


def test_a_lone_surrogate_in_a_message_costs_no_log_line() -> None:
    """aiohttp gives bytes over 127 of a header or path as lone surrogates, which UTF-8 does not encode."""
    line = JsonLines().format(record("%s", "GET /\udcff"))
    line.encode()
    assert json.loads(line)["message"].startswith("GET /")


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in ("aio_pika", "aiormq")]
    before = root.handlers[:], root.level, [library.level for library in libraries]
    excepthook = sys.excepthook
    yield
    sys.excepthook = excepthook
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for library, level in zip(libraries, before[2], strict=True):
        library.setLevel(level)


def test_the_whole_process_logs_json_to_standard_error(
    untouched_logging: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configure("INFO")
    logging.getLogger("some.library").info("hello")
    logging.getLogger("some.library").debug("not at this level")
    logging.getLogger("aio_pika.connection").error("the publisher says this better")
    logging.getLogger("aiormq.connection").error("and this")
    error = ValueError("could be anything")
    sys.excepthook(ValueError, error, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert [json.loads(line)["message"] for line in err.splitlines()] == ["hello", "ended by an unexpected error"]
    assert "anything" not in err
