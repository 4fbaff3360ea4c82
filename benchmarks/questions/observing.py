"""The CPU time that the record, the log line and the spans of one request take.

Two columns: the event loop's thread, and the whole process, which includes the threads that write log lines and encode
spans. Microseconds a request, the lowest of several samples, as in stages.py. Log lines go to /dev/null, and spans are
dropped.
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

from benchmarks.report import machine, plots
from benchmarks.report.document import Cell, Chart, Report, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine
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


class DroppingExporter(SpanExporter):
    """An exporter that drops spans. The cost of their encoding for the wire is left out."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def _request(request_log: RequestLog | None, tracing: Tracing | None) -> None:
    """Make all calls that one request makes to its record, the request log and tracing."""
    record = RequestRecord(COUNTERS)
    if tracing:
        tracing.begin(record, "POST", "/api/v2/send/bulk", {})
    record.account_id = 42
    record.mark(AUTHENTICATE)
    record.body_bytes = 100_000
    record.mark(READ)
    record.count_in_flight(1_000)
    record.mark(VALIDATE)
    record.mark(RESOLVE_LISTS)
    record.payloads = 1_000
    record.mark(BUILD)
    if tracing:
        FRAMER.with_headers(tracing.begin_publish(record) or {})
    record.mark(PUBLISH)
    record.queued = 1_000
    record.end("0123456789abcdef-1f", 200, "")
    trace_id = tracing.end(record) if tracing else ""
    if request_log:
        request_log.write(record, trace_id)


class Row(msgspec.Struct):
    """One form of observation, in CPU microseconds a request, whatever the size of the request."""

    name: str
    loop_us: Figure  # of the event loop's thread
    process_us: Figure  # of all threads


class Observing(msgspec.Struct):
    """The content of the file that `observing --json` writes."""

    rows: list[Row]
    machine: Machine


def measure() -> Observing:
    """Measure the record alone, then the request log and traces at several sample rates."""
    rows = [_measured("record alone", None, None)]
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # the span queue overflows here, and says so
    with _discarded_lines() as writer:
        rows.extend(_measured(f"log, sample {share:g}", RequestLog(share, writer), None) for share in SHARES)
    for share in SHARES:
        tracing = Tracing(SETTINGS, DroppingExporter(), sampling.ParentBased(sampling.TraceIdRatioBased(share)))
        rows.append(_measured(f"traces, {share:.0%} recorded", None, tracing))
        asyncio.run(tracing.close())
    return Observing(rows, machine.describe())


@contextmanager
def _discarded_lines() -> Iterator[log.WriterThread]:
    """Write the request log as the gateway does, with its format and its thread, but to /dev/null."""
    logger, null = logging.getLogger("gateway.requests"), os.open(os.devnull, os.O_WRONLY)
    handler = log.WriterThread(null)
    handler.setFormatter(log.JsonLines())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        handler.close()
        os.close(null)


def _measured(name: str, request_log: RequestLog | None, tracing: Tracing | None) -> Row:
    loop_us, process_us = [], []
    for _ in range(SAMPLES):
        thread, process = time.thread_time(), time.process_time()
        for _ in range(REQUESTS):
            _request(request_log, tracing)
        loop_us.append((time.thread_time() - thread) / REQUESTS * 1e6)
        time.sleep(0.1)  # lets the other threads catch up
        process_us.append((time.process_time() - process) / REQUESTS * 1e6)
    return Row(name, Figure.of(loop_us), Figure.of(process_us))


def report(observing: Observing) -> Report:
    """Return the lowest samples as a table, and the event loop's figures as a chart."""
    rows: list[list[Cell]] = [
        [one.name, short(one.loop_us.lowest), short(one.process_us.lowest)] for one in observing.rows
    ]
    loop = {one.name: one.loop_us for one in observing.rows}
    return Report(
        "The cost of observation",
        observing.machine,
        [
            Table(
                "CPU µs a request, of any size: lowest of several samples",
                ["observed by", "event loop", "process"],
                rows,
            ),
            Chart("CPU µs of the event loop", plots.bars({"": loop}, "µs")),
        ],
    )
