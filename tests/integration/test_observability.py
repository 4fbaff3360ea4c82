"""One request, followed through answer, log, trace and queue: a gateway process and an OTLP collector."""

import asyncio
import gzip
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aio_pika.abc import AbstractIncomingMessage
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from testbed import Servers
from tests.support.callers import RECIPIENT, SEND_PATH, Caller
from tests.support.eventually import eventually
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import BODY

CALLERS_TRACE, CALLERS_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STEPS = ["validate", "authenticate", "build"]  # of a small request, in order: its lists are looked up with the key


class Collector:
    """A collector that receives spans over OTLP/HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {one.value.string_value for one in sent.resource.attributes if one.key == "service.name"}
            self.spans += [span for scope in sent.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")

    def of_trace(self, trace_id: str) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def span_as_documented(message: AbstractIncomingMessage) -> ReadableSpan:
    """Return a consumer's span, made by the code in docs/observability.md."""
    text = (Path(__file__).parents[2] / "docs/observability.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    names: dict[str, Any] = {"message": message, "tracer": TracerProvider().get_tracer("consumer")}
    exec(code, names)  # noqa: S102
    span: ReadableSpan = names["span"]
    return span


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield collector, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_one_id_leads_through_answer_log_trace_and_payload(
    servers: Servers, caller: Caller, collector: tuple[Collector, str]
) -> None:
    spans, collector_url = collector
    settings = process_environment(
        servers,
        GATEWAY_TRACES="on",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector_url,
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    name = settings["GATEWAY_AMQP_QUEUE"]
    async with running(GatewayProcess(settings)) as process:
        body = msgspec.json.encode({"messages": [caller.message(), caller.message(to="1")]})
        headers = caller.headers | {"X-Request-Id": "follow-me"}
        traced = headers | {"traceparent": f"00-{CALLERS_TRACE}-{CALLERS_SPAN}-01", "tracestate": "vendor=1"}
        url = process.url + SEND_PATH
        async with (
            OutboundQueue(servers.amqp_url, name) as queue,
            aiohttp.ClientSession() as session,
            session.post(url, data=body, headers=traced) as response,
        ):
            assert (response.status, (await response.json())["queued_count"]) == (200, 1)
            assert response.headers["X-Request-Id"] == "follow-me"
            async with session.post(
                url, data=body, headers={"X-Api-Key": "trk_no", "traceparent": "nonsense"}
            ) as refused:
                assert refused.status == 401
            nothing = msgspec.json.encode({"messages": [{"to": "1"}]})
            async with session.post(url, data=nothing, headers=headers | {"X-Request-Id": "nothing"}) as response:
                assert response.status == 200  # nothing to publish, and so no span of it
            async with session.get(f"{process.url}/\udcff/{caller.key}") as missing:
                assert missing.status == 404
            (queued,) = await queue.take_all()
            await queue.delete()
        await eventually(lambda: b"follow-me" in process.log.read_bytes())
        written = process.log.read_bytes().splitlines()
        await eventually(
            lambda: "POST /api/v2/send/bulk" in spans.of_trace(CALLERS_TRACE) and len(spans.spans) == 5 + 1 + 4 + 1
        )

    trace = spans.of_trace(CALLERS_TRACE)
    request, publish = trace.pop("POST /api/v2/send/bulk"), trace.pop(f"publish {name}")
    assert spans.services == {"sms-gateway"}
    assert request.parent_span_id.hex() == CALLERS_SPAN
    assert request.kind == Span.SPAN_KIND_SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/api/v2/send/bulk",
        "url.path": "/api/v2/send/bulk",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "http.request.body.size": len(body),
        "sms.request_id": "follow-me",
        "sms.account_id": caller.account_id,
        "sms.messages": 2,
        "sms.queued": 1,
        "sms.outcome": "partial",
    }
    assert set(trace) == set(STEPS)
    assert {span.parent_span_id for span in [publish, *trace.values()]} == {request.span_id}
    in_order = [request.start_time_unix_nano]
    in_order += [
        moment for step in STEPS for moment in (trace[step].start_time_unix_nano, trace[step].end_time_unix_nano)
    ]
    assert in_order == sorted(in_order)
    assert publish.kind == Span.SPAN_KIND_PRODUCER
    assert attributes(publish)["messaging.batch.message_count"] == 1

    assert queued.headers["traceparent"] == f"00-{CALLERS_TRACE}-{publish.span_id.hex()}-01"
    assert queued.headers["tracestate"] == "vendor=1"
    assert msgspec.json.decode(queued.body)["request_id"] == "follow-me"
    consumers = span_as_documented(queued)
    assert consumers.parent is not None
    assert (consumers.context.trace_id, consumers.parent.span_id) == (
        int(CALLERS_TRACE, 16),
        int.from_bytes(publish.span_id, "big"),
    )

    others = {span.name: span for span in spans.spans if span.trace_id.hex() != CALLERS_TRACE}
    assert set(others) == {"POST /api/v2/send/bulk", "GET", *STEPS}
    assert caller.key not in str(spans.spans)
    (other,) = [span for span in spans.spans if attributes(span).get("http.response.status_code") == 401]
    assert attributes(other)["http.response.status_code"] == 401
    assert not other.parent_span_id
    assert other.status.code == Status.STATUS_CODE_UNSET  # the caller's mistake is no error of the server's

    lines = [msgspec.json.decode(line) for line in written if line.startswith(b"{")]
    by_id = {line["request_id"]: line for line in lines if line["message"] == "request"}
    line = by_id["follow-me"]
    assert line["trace_id"] == CALLERS_TRACE
    assert line["errors"] == {"invalid_phone": 1}
    assert set(line["stages_ms"]) == {*STEPS, "publish"}
    assert not re.search(rf"{RECIPIENT[1:]}|{BODY}|trk_", str(lines))


async def test_traces_without_their_packages_are_refused_at_start(servers: Servers, tmp_path: Any) -> None:
    (tmp_path / "opentelemetry.py").write_text("")  # stands before the real one, and has nothing in it
    environ = servers.environment() | {"GATEWAY_TRACES": "on", "PYTHONPATH": f"{tmp_path}:."}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve"), env=environ, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert b"GATEWAY_TRACES=on needs the packages of requirements-traces.txt" in said
