"""Any log message is one line of JSON; any number is masked."""

import json
import logging
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.telemetry.log import (
    JsonLines,
    mask_number,
)
from tests.properties import MORE


def record(message: str, *arguments: object, **changes: object) -> logging.LogRecord:
    made = logging.LogRecord("gateway.web.api", logging.WARNING, "api.py", 7, message, arguments, None)
    vars(made).update(changes)
    return made


EXAMPLES = settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)


@EXAMPLES
@given(number=st.from_regex(r"\+[1-9][0-9]{1,14}", fullmatch=True))
def test_a_mask_keeps_the_length_and_at_most_seven_characters(number: str) -> None:
    masked = mask_number(number)
    assert len(masked) == len(number)
    assert masked != number
    assert len(masked.replace("*", "")) <= 7


@EXAMPLES
@given(message=st.text())
def test_any_message_is_one_line_and_comes_out_as_it_went_in(message: str) -> None:
    line = JsonLines().format(record("%s", message))
    assert json.loads(line)["message"] == message
    assert not re.search(r"[\x00-\x1f]", line), "a line break or a control character could forge a line"
