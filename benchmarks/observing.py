"""What does it cost to be watched? The record, the log line and the spans of one request, in CPU time.

CPU time of the event loop's thread in microseconds a request, the lowest of several samples, as in stages.py; the
threads that write lines and encode spans come on top, in the process. Lines go to /dev/null, spans nowhere.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from opentelemetry.sdk.trace import ReadableSpan, sampling
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from benchmarks import machine
from benchmarks.figures import Figure
from benchmarks.machine import Machine
from gateway.amqp.frames import Destination, PublishFramer
from gateway.config import Settings
from gateway.telemetry import log
from gateway.telemetry.counters import AUTHENTICATE, BUILD, PUBLISH, READ, RESOLVE_LISTS, VALIDATE, Counters
from gateway.telemetry.requests import RequestLog, RequestRecord
from gateway.telemetry.tracing import Tracing

REQUESTS, SAMPLES = 2_000, 9
SHARES = (0.0, 0.01, 1.0)
SETTINGS = Settings(database_url="postgres://localhost/", amqp_url="amqp://localhost/")
COUNTERS = Counters()
FRAMER = PublishFramer(Destination("sms", "sms", "sms.v1"), 1, 131_072)


class Nowhere(SpanExporter):
    """Takes spans without sending them: the wire's encoding is left out."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def _request(access_log: RequestLog | None, tracing: Tracing | None) -> None:
    """All calls that a request makes to record, log and tracing."""
    record = RequestRecord(COUNTERS)
    if tracing:
        tracing.begin(record, "POST", "/api/v2/send/bulk", {})
    record.account_id = 42
    record.mark(AUTHENTICATE)
    record.body_bytes = 100_000
    record.mark(READ)
    record.hold(1_000)
    record.mark(VALIDATE)
    record.mark(RESOLVE_LISTS)
    record.payloads = 1_000
    record.mark(BUILD)
    if tracing:
        FRAMER.carrying(tracing.begin_publish(record) or {})
    record.mark(PUBLISH)
    record.queued = 1_000
    record.end("0123456789abcdef-1f", 200, "")
    trace_id = tracing.end(record) if tracing else ""
    if access_log:
        access_log.write(record, trace_id)


class Watcher(msgspec.Struct):
    """One way to be watched: CPU microseconds a request, whatever its size."""

    name: str
    loop_us: Figure  # of the event loop's thread, which everything else waits for
    process_us: Figure  # the threads beside it included


class Observing(msgspec.Struct):
    """Everything `--json` writes."""

    watchers: list[Watcher]
    machine: Machine


def measure() -> Observing:
    """The record alone, the access log and traces, each at several samples."""
    watchers = [_watched("record alone", None, None)]
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a full queue is no surprise at this pace
    with _lines_to_nowhere():
        watchers.extend(_watched(f"log, sample {share:g}", RequestLog(share), None) for share in SHARES)
    for share in SHARES:
        tracing = Tracing(SETTINGS, Nowhere(), sampling.ParentBased(sampling.TraceIdRatioBased(share)))
        watchers.append(_watched(f"traces, {share:.0%} recorded", None, tracing))
        asyncio.run(tracing.close())
    return Observing(watchers, machine.describe())


@contextmanager
def _lines_to_nowhere() -> Iterator[None]:
    """The access log as the gateway writes it, form and thread included."""
    logger, nowhere = logging.getLogger("gateway.requests"), os.open(os.devnull, os.O_WRONLY)
    handler = log.WriterThread(nowhere)
    handler.setFormatter(log.JsonLines())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        handler.close()
        os.close(nowhere)


def _watched(name: str, access_log: RequestLog | None, tracing: Tracing | None) -> Watcher:
    loop_us, process_us = [], []
    for _ in range(SAMPLES):
        thread, process = time.thread_time(), time.process_time()
        for _ in range(REQUESTS):
            _request(access_log, tracing)
        loop_us.append((time.thread_time() - thread) / REQUESTS * 1e6)
        time.sleep(0.1)  # for the other threads to catch up
        process_us.append((time.process_time() - process) / REQUESTS * 1e6)
    return Watcher(name, Figure.of(loop_us), Figure.of(process_us))
