"""What is known of one request, counted as it becomes known, and the access log's line about it.

Answers in which everything was queued are sampled. What is unknown or failed is always logged, for somebody will ask.
Everything else (refusals, error rows) is, up to MOST_LINES_A_SECOND of a kind: a flood of them must not cost more than
the requests did. How many were left out stands in the next line of the kind.
"""

import logging
import random
from collections import Counter
from time import monotonic, perf_counter

from gateway.errors import OUTCOME_UNKNOWN, OutcomeUnknown
from gateway.log import FIELDS
from gateway.measurements import (
    AUTHENTICATE,
    BUILD,
    CANCELLED,
    OK,
    OWN,
    PUBLISH,
    QUEUED,
    READ,
    REPLAYED,
    STAGES,
    VALIDATE,
    Measurements,
)
from gateway.wire import Answer

log = logging.getLogger(__name__)

MOST_LINES_A_SECOND = 100


class Record:
    """One request's way through the steps, each with the moment at which it was done; counted as it becomes known."""

    __slots__ = (
        "_all",
        "account_id",
        "began",
        "code",
        "ended",
        "errors",
        "is_replayed",
        "messages",
        "octets",
        "origin_ns",
        "payloads",
        "publish_span",
        "queued",
        "request_id",
        "span",
        "status",
        "steps",
    )

    def __init__(self, measurements: Measurements) -> None:
        self._all = measurements
        self.began = self.ended = perf_counter()
        # In order; a step lasts from the end of the one before it, and one that refuses leaves no time.
        self.steps: list[tuple[str, float]] = []
        self.request_id = ""
        self.status = 0  # 0: never answered, because the process was ending
        self.code = ""  # of a request that was refused as a whole
        self.account_id: int | None = None
        self.octets: int | None = None  # of the body
        self.messages: int | None = None  # good and bad; they are in flight until the request is answered
        self.payloads: int | None = None
        self.queued: int | None = None
        self.errors: dict[str, int] = {}  # error rows by code
        self.is_replayed = False
        self.origin_ns = 0  # `began` on the wall clock, if this request is traced
        self.span: object = None  # gateway/tracing.py's
        self.publish_span: object = None

    def authenticated(self, account_id: int) -> None:
        self.account_id = account_id
        self._did(AUTHENTICATE)

    def read(self, octets: int) -> None:
        self.octets = octets
        self._all.body_octets += octets
        self._did(READ)

    def validated(self, messages: int) -> None:
        self.messages = messages
        self._all.messages_in_flight += messages
        self._all.request_messages.observe(messages)
        self._did(VALIDATE)

    def owned(self) -> None:
        self._did(OWN)

    def built(self, payloads: int) -> None:
        self.payloads = payloads
        self._did(BUILD)

    def published(self) -> None:
        self._did(PUBLISH)

    def replayed(self) -> None:
        """The answer is that of another request: its messages were counted then."""
        self.is_replayed = True
        self._all.messages[REPLAYED] += self.messages or 0

    def counted(self, answer: Answer) -> None:
        """What the caller is told of each message."""
        self.queued = answer.queued_count
        self._all.messages[QUEUED] += answer.queued_count
        if answer.errors:
            self.errors = dict(Counter([row.code for row in answer.errors]))
            self._all.messages.update(self.errors)

    def end(self, request_id: str, status: int, code: str) -> None:
        """What the caller was told; 0 for nothing."""
        self.request_id, self.status, self.code = request_id, status, code
        self.ended = perf_counter()
        self._all.requests[(status, code or OK) if status else CANCELLED] += 1
        was_refused = bool(code) or not status
        (self._all.refused_s if was_refused else self._all.answered_s).observe(self.ended - self.began)
        if self.messages:
            self._all.messages_in_flight -= self.messages
            if was_refused:
                self._all.messages[code or CANCELLED[1]] += self.messages  # together

    @property
    def outcome(self) -> str:
        """read: a document, no messages · queued: all of it · partial · refused: nothing was queued · unknown ·
        replayed · failed · cancelled."""
        if self.status == 200:
            if self.messages is None:
                return "read"
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

    def stages_ms(self) -> dict[str, float]:
        """How long each step took."""
        before, taken = self.began, {}
        for name, at in self.steps:
            taken[name] = round((at - before) * 1e3, 3)
            before = at
        return taken

    def _did(self, stage: int) -> None:
        now = perf_counter()
        self._all.stages_s[stage].observe(now - (self.steps[-1][1] if self.steps else self.began))
        self.steps.append((STAGES[stage], now))


class AccessLog:
    """Decides which requests get a line, and writes it."""

    def __init__(self, sample: float) -> None:
        """`sample`: the share of the requests with everything queued that is logged, 0 to 1."""
        self._sample = sample
        self._seconds: dict[str, tuple[float, int]] = {}  # by kind: when its second began, and lines since
        self._unlogged: Counter[str] = Counter()

    def write(self, record: Record, trace_id: str = "") -> None:
        """Log the request, unless it is left out."""
        outcome = record.outcome
        level = {"unknown": logging.WARNING, "failed": logging.ERROR}.get(outcome, logging.INFO)
        if not log.isEnabledFor(level):
            return
        unlogged = 0
        if outcome in ("queued", "replayed", "read"):
            if self._sample < 1 and random.random() >= self._sample:  # noqa: S311 - a sample, no secret
                return
        elif level == logging.INFO:
            kind = record.code or outcome
            if not self._has_room(kind):
                self._unlogged[kind] += 1
                return
            unlogged = self._unlogged.pop(kind, 0)
        log.log(level, "request", extra={FIELDS: _fields(record, outcome, trace_id, unlogged)})

    def _has_room(self, kind: str) -> bool:
        now = monotonic()
        began, lines = self._seconds.get(kind, (now, 0))
        if now - began >= 1:
            began, lines = now, 0
        self._seconds[kind] = (began, lines + 1)
        return lines < MOST_LINES_A_SECOND


def _fields(record: Record, outcome: str, trace_id: str, unlogged: int) -> dict[str, object]:
    fields: dict[str, object] = {"request_id": record.request_id, "outcome": outcome, "status": record.status}
    known = (
        ("code", record.code or None),
        ("account_id", record.account_id),
        ("messages", record.messages),
        ("queued", record.queued),
        ("errors", record.errors or None),
        ("body_bytes", record.octets),
        ("trace_id", trace_id or None),
        ("unlogged", unlogged or None),
    )
    fields.update([(name, value) for name, value in known if value is not None])
    fields["duration_ms"] = round((record.ended - record.began) * 1e3, 3)
    if record.steps:
        fields["stages_ms"] = record.stages_ms()
    return fields
