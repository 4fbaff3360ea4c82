"""Answers to requests that no handler sees."""

import pytest

from gateway.errors import InternalError, MalformedHttp
from gateway.web.answers import REQUEST_ID_HEADER, refuse_unhandled


@pytest.mark.parametrize("cause", [ValueError("a bug"), None], ids=["with its exception", "without one"])
def test_every_internal_error_is_in_the_log_under_its_request_id(
    cause: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A TimeoutError outside the handler comes from aiohttp without its exception."""
    answer = refuse_unhandled(InternalError(), cause)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert answer.headers[REQUEST_ID_HEADER] in record.message
    assert (record.exc_info[1] if record.exc_info else None) is cause


def test_what_a_caller_did_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    refuse_unhandled(MalformedHttp(), None)
    assert caplog.records == []
