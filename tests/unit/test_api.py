"""The record of a request that fails outside its handler, and the route that its span names."""

import asyncio
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from gateway.runtime import RUNTIME
from gateway.telemetry.counters import Counters
from gateway.telemetry.requests import RequestLog
from gateway.telemetry.tracing import NoTracing
from gateway.web.api import SEND_BULK, record_every_request


@pytest.mark.parametrize(("path", "route"), [(SEND_BULK, SEND_BULK), ("/trk_secret", "")])
async def test_a_cancelled_request_is_counted_as_one_and_a_span_names_no_unknown_path(path: str, route: str) -> None:
    tracing, counters = Mock(spec=NoTracing, **{"end.return_value": ""}), Counters()
    app = web.Application()
    app[RUNTIME] = SimpleNamespace(counters=counters, tracing=tracing, request_log=RequestLog(0))  # type: ignore[misc]

    async def be_cancelled(_request: web.Request) -> web.StreamResponse:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await record_every_request(make_mocked_request("POST", path, app=app), be_cancelled)
    assert counters.requests == {(499, "cancelled"): 1}
    assert tracing.begin.call_args.args[1:3] == ("POST", route)
