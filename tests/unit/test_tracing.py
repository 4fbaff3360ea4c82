"""A caller's trace context is validated, and continued in the headers of AMQP messages."""

from collections.abc import Mapping, Sequence

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, sampling
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway.config import Settings
from gateway.telemetry.counters import BUILD, Counters
from gateway.telemetry.log import redact
from gateway.telemetry.requests import RequestRecord
from gateway.telemetry.tracing import Tracing

SETTINGS = Settings(database_url="postgres://localhost/", amqp_url="amqp://localhost/")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE}-00f067aa0ba902b7-"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


async def headers_of(sent: Mapping[str, str], sampler: sampling.Sampler | None = None) -> tuple[Mapping[str, str], int]:
    """Return the AMQP headers for a request with these HTTP headers, and the number of spans recorded."""
    kept = Kept()
    tracing, record = Tracing(SETTINGS, kept, sampler), RequestRecord(Counters())
    tracing.begin(record, "POST", "/api/v2/send/bulk", sent)
    record.payloads = 1
    record.mark(BUILD)
    headers = tracing.begin_publish(record)
    assert headers is not None
    record.end("id-1", 503, "queue_unavailable")
    tracing.end(record)
    await tracing.close()
    assert all(span.status.status_code.name == "ERROR" for span in kept.spans if span.name != "build")
    return headers, len(kept.spans)


@pytest.mark.parametrize(("certificate", "scheme"), [("", "http"), ("/tls.crt", "https")])
async def test_a_span_says_whether_the_request_came_by_tls(certificate: str, scheme: str) -> None:
    kept, record = Kept(), RequestRecord(Counters())
    tracing = Tracing(msgspec.structs.replace(SETTINGS, api_tls_cert_file=certificate), kept)
    tracing.begin(record, "POST", "/api/v2/send/bulk", {})
    record.end("id-1", 200, "")
    tracing.end(record)
    await tracing.close()
    assert [(span.attributes or {})["url.scheme"] for span in kept.spans] == [scheme]


@pytest.mark.parametrize("request_id", ["+14155551234", "trk_" + "a" * 32])
async def test_a_callers_request_id_is_redacted(request_id: str) -> None:
    kept, record = Kept(), RequestRecord(Counters())
    tracing = Tracing(SETTINGS, kept)
    tracing.begin(record, "POST", "/api/v2/send/bulk", {})
    record.end(request_id, 200, "")
    tracing.end(record)
    await tracing.close()
    assert [(span.attributes or {})["sms.request_id"] for span in kept.spans] == [redact(request_id)] != [request_id]


@pytest.mark.parametrize(("flag", "spans"), [("01", 3), ("00", 0)])
async def test_a_callers_trace_is_continued_whether_recorded_or_not(flag: str, spans: int) -> None:
    headers, recorded = await headers_of({"traceparent": CALLER + flag})
    assert (headers["traceparent"][3:35], headers["traceparent"][-2:], recorded) == (TRACE, flag, spans)


async def test_a_sampler_without_a_parent_rule_decides_by_itself() -> None:
    headers, recorded = await headers_of({"traceparent": CALLER + "01"}, sampling.TraceIdRatioBased(0))
    assert (headers["traceparent"][-2:], recorded) == ("00", 0)


@pytest.mark.parametrize(
    "sent", ["", "x", CALLER, "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "\udcff" * 55, "ff" + CALLER]
)
async def test_an_invalid_traceparent_starts_a_new_trace(sent: str) -> None:
    headers, recorded = await headers_of({"traceparent": sent, "tracestate": "vendor=1"})
    assert recorded == 3
    assert TRACE not in headers["traceparent"]
    assert "tracestate" not in headers


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        ("a=1,b=2", "a=1,b=2"),
        ("\udcff=1", None),
        ("a=\udcff", None),
        (",".join(f"v{n}={'x' * 240}" for n in range(30)), None),  # would go with each message
    ],
)
async def test_a_tracestate_is_passed_on_if_it_is_valid_and_small(sent: str, passed_on: str | None) -> None:
    headers, _ = await headers_of({"traceparent": CALLER + "01", "tracestate": sent})
    assert headers.get("tracestate") == passed_on
    str(headers).encode("ascii")
