"""The record of one request, and the request log.

The outcome of a request decides whether it gets a line:

- An outcome of SAMPLED: a random share of the requests, GATEWAY_REQUEST_LOG_SAMPLE.
- `unknown`, `failed`: all of them.
- Any other: up to MAX_LINES_A_SECOND of a kind, so that a flood of refusals does not flood the log. The kind is the
  code of the refusal; without one, the outcome. The next line of the kind says how many lines were left out.
"""

import logging
import random
from collections import Counter
from time import monotonic, perf_counter, time

import msgspec

from gateway.errors import OUTCOME_UNKNOWN, OutcomeUnknown
from gateway.telemetry.counters import CANCELLED, DRY_RUN, OK, QUEUED, REPLAYED, STAGES, Counters
from gateway.telemetry.log import FIELDS, JsonLines, WriterThread, redact, utc

LOGGER, MESSAGE = "gateway.requests", "request"
log = logging.getLogger(LOGGER)
_encode = msgspec.json.Encoder().encode
_LEVELS = {logging.INFO: b"info", logging.WARNING: b"warning", logging.ERROR: b"error"}
NO_ERRORS: Counter[str] = Counter()  # shared, never changed

SAMPLED = ("queued", "replayed", "dry_run", "read")
MAX_LINES_A_SECOND = 100


class RequestRecord:
    """The steps of one request, each with the time at which it ended, and its facts.

    The steps are marked and the facts set while the request runs. The request log and the spans read them at the end.
    `end` adds them to the counters, once. Times are seconds of `time.perf_counter`.
    """

    __slots__ = (
        "_counters",
        "account_id",
        "began",
        "body_bytes",
        "code",
        "ended",
        "errors",
        "is_dry_run",
        "is_replayed",
        "messages",
        "origin_ns",
        "payloads",
        "publish_span",
        "queued",
        "request_id",
        "span",
        "status",
        "steps",
    )

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.began = self.ended = perf_counter()
        # In order. A step lasts from the end of the one before it. A step that refuses the request is not marked.
        self.steps: list[tuple[int, float]] = []
        self.request_id = ""
        self.status = 0  # 0: not answered, because the process was ending
        self.code = ""  # of a request that was refused as a whole
        self.account_id: int | None = None
        self.body_bytes: int | None = None
        self.messages: int | None = None  # in the request, good and bad
        self.payloads = 0  # AMQP messages to publish
        self.queued: int | None = None
        self.errors: Counter[str] = NO_ERRORS  # error rows by code
        self.is_replayed = False  # the answer is that of an earlier request with the same Idempotency-Key
        self.is_dry_run = False
        self.origin_ns = 0  # `began` on the wall clock, if this request is traced
        self.span: object = None  # set by telemetry/tracing.py
        self.publish_span: object = None

    def mark(self, step: int) -> None:
        """Note that a step, an index into STAGES, has ended."""
        self.steps.append((step, perf_counter()))

    def count_in_flight(self, messages: int) -> None:
        """Count the request's messages as in flight until `end`."""
        self.messages = messages
        self._counters.messages_in_flight += messages

    def end(self, request_id: str, status: int, code: str) -> None:
        """Set what the caller was told (status 0: nothing), and add the request to the counters."""
        self.request_id, self.status, self.code = request_id, status, code
        self.ended = perf_counter()
        counters, before = self._counters, self.began
        for step, at in self.steps:
            counters.stages_s[step].observe(at - before)
            before = at
        told = code or (DRY_RUN if self.is_dry_run else OK)
        counters.requests[(status, told) if status else CANCELLED] += 1
        was_refused = bool(code) or not status
        if not self.is_dry_run:
            (counters.refused_s if was_refused else counters.answered_s).observe(self.ended - self.began)
        counters.body_bytes += self.body_bytes or 0
        if self.messages is not None:
            counters.messages_in_flight -= self.messages
            counters.request_messages.observe(self.messages)
            self._count_messages(self.messages, was_refused=was_refused)

    def _count_messages(self, size: int, *, was_refused: bool) -> None:
        """Count each message once, by what the caller was told of it."""
        messages = self._counters.messages
        if self.is_dry_run:
            messages[DRY_RUN] += size
        elif was_refused:
            messages[self.code or CANCELLED[1]] += size
        elif self.is_replayed:
            messages[REPLAYED] += size
        else:
            messages[QUEUED] += self.queued or 0
            if self.errors:
                messages.update(self.errors)

    @property
    def outcome(self) -> str:
        """The outcome of the request, in one word.

        read: a document, no messages · dry_run: validated only · queued: all messages · partial: some · refused: none ·
        unknown: some may be queued · replayed: the stored answer of an earlier request · failed: internal error ·
        cancelled: not answered.
        """
        if self.status == 200:
            if self.messages is None:
                return "read"
            if self.is_dry_run:
                return "dry_run"
            if self.is_replayed:
                return "replayed"
            if OUTCOME_UNKNOWN.code in self.errors:
                return "unknown"
            if self.errors:
                return "partial" if self.queued else "refused"
            return "queued"
        if not self.status:
            return "cancelled"
        if self.code == OutcomeUnknown.code:
            return "unknown"
        return "failed" if self.status == 500 else "refused"


STAGE_FIELDS: list[tuple[str, object, object]] = [(stage, float | None, None) for stage in STAGES]
StagesMs = msgspec.defstruct("StagesMs", STAGE_FIELDS, omit_defaults=True, gc=False)


class RequestLine(msgspec.Struct, omit_defaults=True, gc=False):
    """The fields of a line of the request log. A field that is equal to its default is left out."""

    request_id: str
    outcome: str
    status: int
    code: str = ""
    account_id: int | None = None
    messages: int | None = None
    queued: int | None = None
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    body_bytes: int | None = None
    trace_id: str = ""
    unlogged: int = 0  # lines of the same kind left out before this one
    duration_ms: float | None = None
    stages_ms: msgspec.Struct | None = None

    @classmethod
    def of(cls, record: RequestRecord, outcome: str, trace_id: str, unlogged: int) -> "RequestLine":
        """Return the line of an ended request."""
        before = record.began
        stages: list[float | None] = [None] * len(STAGES)
        for step, at in record.steps:
            stages[step] = round((at - before) * 1e3, 3)
            before = at
        return cls(
            redact(record.request_id),  # a caller may choose one that looks like a number
            outcome,
            record.status,
            record.code,
            record.account_id,
            record.messages,
            record.queued,
            dict(record.errors),
            record.body_bytes,
            trace_id,
            unlogged,
            round((record.ended - record.began) * 1e3, 3),
            StagesMs(*stages) if record.steps else None,
        )


class RequestLog:
    """The request log: chooses the requests that get a line, and writes it."""

    def __init__(self, sample: float, writer: WriterThread | None = None) -> None:
        """`sample` is the share, from 0 to 1, of the requests with an outcome of SAMPLED that get a line.

        With a `writer` of JSON lines, the lines are encoded here; without one, they are records of `logging`.
        """
        self._sample = sample
        self._seconds: dict[str, tuple[float, int]] = {}  # by kind: start of its second, and lines since
        self._unlogged: Counter[str] = Counter()
        self._writer = writer
        process = writer.formatter.process if writer and isinstance(writer.formatter, JsonLines) else {}
        # What all lines share, between level and fields.
        self._middle = b"," + _encode({"logger": LOGGER, "message": MESSAGE, **process})[1:-1] + b","

    def write(self, record: RequestRecord, trace_id: str = "") -> None:
        """Log the request, unless the sample or the limit of its kind leaves it out."""
        outcome = record.outcome
        level = {"unknown": logging.WARNING, "failed": logging.ERROR}.get(outcome, logging.INFO)
        if not log.isEnabledFor(level):
            return
        unlogged = 0
        if outcome in SAMPLED:
            if self._sample < 1 and random.random() >= self._sample:  # noqa: S311 - a sample, no secret
                return
        elif level == logging.INFO:
            kind = record.code or outcome
            if not self._has_room(kind):
                self._unlogged[kind] += 1
                return
            unlogged = self._unlogged.pop(kind, 0)
        line = RequestLine.of(record, outcome, trace_id, unlogged)
        if self._writer is None:
            log.log(level, MESSAGE, extra={FIELDS: msgspec.to_builtins(line)})
            return
        # A record of `logging`, formatted, would take twice as long (scripts/bench observing).
        start = b'{"time":"%b+00:00","level":"%b"' % (utc(time()).encode(), _LEVELS[level])
        self._writer.write_line(b"".join((start, self._middle, _encode(line)[1:], b"\n")))

    def _has_room(self, kind: str) -> bool:
        """Count a line of this kind. Return True up to MAX_LINES_A_SECOND."""
        now = monotonic()
        began, lines = self._seconds.get(kind, (now, 0))
        if now - began >= 1:
            began, lines = now, 0
        self._seconds[kind] = (began, lines + 1)
        return lines < MAX_LINES_A_SECOND
