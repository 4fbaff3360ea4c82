"""What does it cost to be watched? The record, the log line and the spans of one request, in CPU time.

    python -m benchmarks.observing

CPU time of the event loop's thread in microseconds a request, the lowest of several samples, as in stages.py; the
threads that write lines and encode spans come on top, in the column "process". Lines go to /dev/null, spans nowhere.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, sampling
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway import log
from gateway.access import AccessLog, Record
from gateway.amqp.frames import PublishFramer
from gateway.config import Settings
from gateway.measurements import Measurements
from gateway.tracing import Tracing
from gateway.wire import Answer

REQUESTS, SAMPLES = 2_000, 9
ANSWER = Answer(1_000, 0, [])
SETTINGS = Settings(database_url="postgres://localhost/", amqp_url="amqp://localhost/")
FRAMER = PublishFramer(channel=1, exchange="sms", routing_key="sms", message_type="sms.v1", frame_max=131_072)


class Nowhere(SpanExporter):
    """Takes spans without sending them: the wire's encoding is left out."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def request(access_log: AccessLog | None, tracing: Tracing | None) -> None:
    """All calls that a request makes to record, log and tracing."""
    record = Record(Measurements())
    if tracing:
        tracing.begin(record, "POST", "/api/v2/send/bulk", {})
    record.authenticated(42)
    record.read(100_000)
    record.validated(1_000)
    record.owned()
    record.built(1_000)
    if tracing:
        FRAMER.carrying(tracing.begin_publish(record))
    record.published()
    record.counted(ANSWER)
    record.end("0123456789abcdef-1f", 200, "")
    trace_id = tracing.end(record) if tracing else ""
    if access_log:
        access_log.write(record, trace_id)


def cost_us(work: Callable[[], None]) -> tuple[float, float]:
    """Of one call: of this thread, and of the process."""
    costs = []
    for _ in range(SAMPLES):
        thread, process = time.thread_time(), time.process_time()
        for _ in range(REQUESTS):
            work()
        costs.append((time.thread_time() - thread, time.process_time() - process))
        time.sleep(0.1)  # for the other threads to catch up
    return min(costs)[0] / REQUESTS * 1e6, min(whole for _, whole in costs) / REQUESTS * 1e6


def main() -> None:
    """Print the table."""
    handler = log.WriterThread(os.open(os.devnull, os.O_WRONLY))
    handler.setFormatter(log.JsonLines())
    logging.basicConfig(handlers=[handler], level="INFO", force=True)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a full queue is no surprise at this pace
    rows: list[tuple[str, AccessLog | None, Tracing | None]] = [
        ("record only", None, None),
        ("log, sample 0", AccessLog(0), None),
        ("log, sample 0.01", AccessLog(0.01), None),
        ("log, sample 1", AccessLog(1), None),
    ]
    for rate in (0.0, 0.01, 1.0):
        sampler = sampling.ParentBased(sampling.TraceIdRatioBased(rate))
        rows.append((f"traces, {rate:.0%} sampled", None, Tracing(SETTINGS, Nowhere(), sampler)))
    print("us a request             loop  process")
    for name, access_log, tracing in rows:
        thread, process = cost_us(lambda access_log=access_log, tracing=tracing: request(access_log, tracing))  # type: ignore[misc]
        print(f"{name:<22} {thread:6.1f} {process:8.1f}")


if __name__ == "__main__":
    main()
