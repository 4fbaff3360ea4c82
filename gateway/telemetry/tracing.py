"""Traces: a span for each request and each of its steps, on to the consumer, by OpenTelemetry.

    POST /api/v2/send/bulk            or /api/v2/send; its parent is the caller's, if it sent `traceparent`
    ├── authenticate, wait, read, validate, resolve_lists, build: the steps that the request had
    └── publish sms.outbound          its `traceparent` travels in the headers of every AMQP message of the batch

The SDK reads the OTEL_* variables: collector, sampling, service name. The packages are an extra, imported only where
GATEWAY_TRACES=on.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from gateway import __version__
from gateway.config import ConfigurationError, Settings
from gateway.telemetry.counters import PUBLISH, STAGES
from gateway.telemetry.log import redact
from gateway.telemetry.requests import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

SERVICE = "sms-gateway"
# W3C Trace Context asks to pass on at least 512. A caller may send 8 kB, and 1,000 messages would carry them.
MAX_TRACESTATE_BYTES = 512
CLOSE_TIMEOUT_S = 3.0  # for the spans still to be sent when the process ends
_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")


def check(settings: Settings) -> None:
    """Raise ConfigurationError if traces are wanted, and the packages are missing or refuse an OTEL_* variable."""
    if settings.traces == "off":
        return
    try:
        refusal = _refusal(settings)
    except ImportError as error:
        raise ConfigurationError(
            f"GATEWAY_TRACES=on needs the packages of requirements-traces.txt ({error}). Install them, or unset it"
        ) from None
    if refusal:
        given = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
        # The SDK rarely names the variable: it is the one without which the SDK is content.
        alone = [name for name in given if not _refusal(settings, without=name)]
        # The names without the values: headers may hold a token.
        raise ConfigurationError(f"OpenTelemetry refuses {' and '.join(alone or given)}: {refusal}")


def _refusal(settings: Settings, without: str = "") -> str:
    """Return the SDK's objection to the OTEL_* variables, one of which is left out; "" if it has none.

    Raises ImportError when its packages are missing.
    """
    value = os.environ.pop(without, None)
    logging.disable()  # the SDK repeats its warnings when the runtime is opened
    try:
        Tracing(settings).discard()
    except ImportError:
        raise
    except Exception as error:  # the SDK documents none; most are ValueError, some raised by its imports
        return str(error) or type(error).__name__
    finally:
        logging.disable(logging.NOTSET)
        if value is not None:
            os.environ[without] = value
    return ""


class NoTracing:
    """A tracing that does nothing, used where traces are off."""

    def begin(self, record: RequestRecord, method: str, route: str, headers: Mapping[str, str]) -> None:
        """Do nothing."""

    def begin_publish(self, record: RequestRecord) -> None:
        """Return no AMQP headers."""

    def end(self, record: RequestRecord) -> str:
        """Return no trace id."""
        return ""

    async def close(self) -> None:
        """Do nothing."""


class Tracing:
    """Starts and ends spans, with the facts of a request's RequestRecord."""

    def __init__(
        self, settings: Settings, exporter: "SpanExporter | None" = None, sampler: "Sampler | None" = None
    ) -> None:
        """Read the OTEL_* variables. `exporter` and `sampler` replace the ones that these variables describe."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._exporter = exporter or OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(SERVICE, __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._destination = settings.amqp_exchange
        self._scheme = "https" if settings.api_tls_cert_file else "http"

    def begin(self, record: RequestRecord, method: str, route: str, headers: Mapping[str, str]) -> None:
        """Start the request's span, as a child of the caller's span if the headers name one.

        `route` is empty for all paths but those that send: any other path could hold anything, even a key.
        """
        known = method if method in _METHODS else "_OTHER"
        attributes = {"http.request.method": known, "url.scheme": self._scheme}
        if route:
            attributes |= {"http.route": route, "url.path": route}
        # The wall clock is read once per request: a change of the clock then does not distort its spans.
        record.origin_ns = time.time_ns() - int((time.perf_counter() - record.began) * 1e9)
        record.span = self._tracer.start_span(
            f"{'HTTP' if known == '_OTHER' else known} {route}".strip(),
            self._propagator.extract(headers),
            self._api.SpanKind.SERVER,
            attributes,
            start_time=record.origin_ns,
        )

    def begin_publish(self, record: RequestRecord) -> Mapping[str, str] | None:
        """Start the span of the publish. Return AMQP headers with its context; None if nothing is published."""
        if not record.payloads:
            return None
        record.publish_span = span = self._tracer.start_span(
            f"publish {self._destination}",
            self._api.set_span_in_context(_span(record.span)),
            self._api.SpanKind.PRODUCER,
            {
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": self._destination,
                "messaging.batch.message_count": record.payloads,
            },
            start_time=_at_ns(record, record.steps[-1][1]),
        )
        headers: dict[str, str] = {}
        self._propagator.inject(headers, self._api.set_span_in_context(span))
        if len(headers.get("tracestate", "")) > MAX_TRACESTATE_BYTES:
            del headers["tracestate"]
        return headers

    def end(self, record: RequestRecord) -> str:
        """End the request's spans, and make those of its steps. Return the trace's id, or "" if it is not recorded."""
        span = _span(record.span)
        if not span.is_recording():
            return ""
        failed = record.status >= 500 or not record.status
        context = self._api.set_span_in_context(span)
        before, published = record.began, record.ended
        for step, at in record.steps:
            if step == PUBLISH:
                published = at
            else:
                self._tracer.start_span(STAGES[step], context, start_time=_at_ns(record, before)).end(
                    _at_ns(record, at)
                )
            before = at
        if record.publish_span is not None:  # None: nothing was published
            if failed:
                self._fail(_span(record.publish_span), record)
            _span(record.publish_span).end(_at_ns(record, published))
        span.set_attributes({name: value for name, value in _facts(record).items() if value is not None})
        if failed:
            self._fail(span, record)
        span.end(_at_ns(record, record.ended))
        return format(span.get_span_context().trace_id, "032x")

    def _fail(self, span: "Span", record: RequestRecord) -> None:
        span.set_status(self._api.StatusCode.ERROR)
        span.set_attribute("error.type", record.code or "cancelled")

    def discard(self) -> None:
        """End the SDK's thread. Call it only while there is no span: it would wait for the collector."""
        self._provider.shutdown()

    async def close(self) -> None:
        """Send the remaining spans, within CLOSE_TIMEOUT_S."""
        # Not a thread of the event loop's pool: asyncio would wait for it at the end, and the SDK may take 30 s.
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is closed: the wait below has timed out
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=shut_down, name="close traces", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await closed.wait()
        except TimeoutError:
            log.warning("some spans were not sent: the collector does not answer")


def _at_ns(record: RequestRecord, moment: float) -> int:
    return record.origin_ns + int((moment - record.began) * 1e9)


def _span(span: object) -> "Span":
    return cast("Span", span)


def _facts(record: RequestRecord) -> dict[str, Any]:
    return {
        "http.response.status_code": record.status or None,
        "http.request.body.size": record.body_bytes,
        "sms.request_id": redact(record.request_id),  # as in the request log
        "sms.account_id": record.account_id,
        "sms.messages": record.messages,
        "sms.queued": record.queued,
        "sms.outcome": record.outcome,
    }
