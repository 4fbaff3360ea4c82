"""The CPU time of each step of a batch, and of the plain form that an optimised step replaced.

CPU time of one thread, in several samples of some milliseconds. The lowest sample is shown, since other work on the
machine, such as on the other thread of the same core, can only add to it. A row "instead: …" is the plain form of the
row above it.
"""

import asyncio
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pamqp.frame
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from prometheus_client import CollectorRegistry, Counter, Histogram

from benchmarks.drivers import traffic
from benchmarks.report import machine, plots
from benchmarks.report.document import Cell, Chart, Report, Sentence, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import REPOSITORY, Machine
from gateway.amqp.confirms import ConfirmTracker
from gateway.amqp.frames import AckedRange, Destination, IncomingFrames, PublishFramer, Settled
from gateway.ingest import batch, decoding, wire
from gateway.ingest.contact_data import is_contact_data, is_contact_data_fast
from gateway.ingest.envelopes import Layout
from gateway.ingest.message_ids import ALPHABET, BASE, LeasedIds
from gateway.ingest.wire import Answer, Payload
from gateway.telemetry.counters import (
    AUTHENTICATE,
    BUILD,
    MESSAGES,
    OK,
    PUBLISH,
    READ,
    RESOLVE_LISTS,
    SECONDS,
    STAGES,
    VALIDATE,
    Counters,
)
from gateway.telemetry.requests import RequestRecord

SIZES = (1, 10, 100, 1_000)
SAMPLE_S = 0.01
SAMPLES = 9
LIST_NUMBER = "+18005551000"
LISTS = {LIST_NUMBER: 7}
ACCEPTED_AT = "2026-11-23T11:00:00.123Z"
REQUEST_ID = "0123456789abcdef" * 2
ORIGIN = batch.Origin(42, REQUEST_ID, ACCEPTED_AT)
FRAME_MAX = 131_072  # RabbitMQ's default
CHANNEL = 1
NAME = "sms.outbound"
MULTIPLIER = 134_956_987_654_321  # any number without a common factor with 62
FORMAT, TYPE = traffic.WRONG_FORMAT, traffic.WRONG_TYPE
WITH_OBJECTS: dict[str, Any] = {
    "contact_data": {
        "first_name": "Ada",
        "last_name": "Lovelace",
        "timezone": "Europe/London",
        "custom_fields": {"order": "A-1234", "city": "London", "points": 120},
    },
    "metadata": {"campaign": "spring", "batch": 17},
}
ACK_BYTES = 21
ENVELOPE = 100
ACKS_PER_MESSAGE = 0.012  # measured: quorum queues coalesce, about 12 acks per 1,000 messages


class Stage(msgspec.Struct):
    """One row, in microseconds per message, by batch size."""

    name: str
    plain: bool  # the plain form of the row above
    us_per_message: dict[int, Figure]


class Refusing(msgspec.Struct):
    """Row 6 of the bars (benchmarks/README.md): a batch refused as a whole ÷ a clean one, up to the publish."""

    flaw: str
    ratio: Figure


class Stages(msgspec.Struct):
    """The content of the file that `stages --json` writes."""

    machine: Machine
    stages: list[Stage]
    refusing: list[Refusing]


class Against(msgspec.Struct):
    """One row of this checkout ÷ the same row of the baseline, by batch size. Ratios of the lowest samples."""

    name: str
    ratio: dict[int, Figure]


class StagesAgainstBaseline(msgspec.Struct):
    """The content of the file that `stages --baseline … --json` writes."""

    machine: Machine
    baseline_commit: str
    rows: list[Against]
    only_here: list[str]  # rows that the baseline does not have
    rounds: list[tuple[Stages, Stages]]  # this checkout and the baseline, round by round


Work = Callable[[], object]


def measure(sizes: Sequence[int] = SIZES) -> Stages:
    """Measure all stages at all sizes."""
    described = machine.describe()
    table: dict[str, Stage] = {}
    for size in sizes:
        for name, plain, work in _stages(size):
            stage = table.setdefault(name, Stage(name, plain, {}))
            stage.us_per_message[size] = _scaled(_seconds(work), 1e6 / size)
    return Stages(described, list(table.values()), _refusing(max(sizes)))


def measure_against(baseline: Path, rounds: int) -> StagesAgainstBaseline:
    """Measure this checkout and another one in turn, each in fresh processes.

    The other checkout measures itself with its own `python -m benchmarks stages`. Raises StagesError when that fails.
    """
    measured = [(_measure_checkout(REPOSITORY), _measure_checkout(baseline)) for _ in range(rounds)]
    return compare_rounds(machine.describe(), machine.commit_of(baseline), measured)


class StagesError(Exception):
    """A checkout could not measure its stages. The text is the end of its output."""


def _measure_checkout(folder: Path) -> Stages:
    with tempfile.TemporaryDirectory() as temporary:
        figures = Path(temporary, "stages.json")
        done = subprocess.run(  # noqa: S603 - a checkout of this repository that the caller named
            [sys.executable, "-m", "benchmarks", "stages", "--json", str(figures)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StagesError(f"`python -m benchmarks stages` failed in {folder}: {done.stderr.strip()[-500:]}")
        return msgspec.json.decode(figures.read_bytes(), type=Stages)


def compare_rounds(
    described: Machine, baseline_commit: str, rounds: list[tuple[Stages, Stages]]
) -> StagesAgainstBaseline:
    """Return the ratios of the rows that both checkouts have. A ratio is taken within its round."""
    by_name = [tuple({stage.name: stage for stage in one.stages} for one in pair) for pair in rounds]
    rows, only_here = [], []
    for name, stage in by_name[0][0].items():
        if name not in by_name[0][1]:
            only_here.append(name)
            continue
        ratio = {
            size: Figure.of(
                ours[name].us_per_message[size].lowest / older[name].us_per_message[size].lowest
                for ours, older in by_name
            )
            for size in stage.us_per_message
        }
        rows.append(Against(name, ratio))
    return StagesAgainstBaseline(described, baseline_commit, rows, only_here, rounds)


def _stages(size: int) -> Iterator[tuple[str, bool, Work]]:
    """Yield the stages of a batch of `size`: the name, True for a plain form, and the work."""
    clean, one_bad, bad, wrong_type = _body(size), _body(size, 1), _body(size, size), _body(size, size, TYPE)
    yield "decode", False, partial(decoding.decode_bulk, clean)
    yield "decode, one wrong type", False, partial(decoding.decode_bulk, _body(size, 1, TYPE))
    yield "decode, all wrong types", False, partial(decoding.decode_bulk, wrong_type)

    with_objects = _body(size, size, WITH_OBJECTS)
    yield "decode, with objects", False, partial(decoding.decode_bulk, with_objects)
    values: list[Any] = [message.contact_data for message in decoding.decode_bulk(with_objects).messages]
    yield "contact_data", False, lambda: [is_contact_data_fast(value) for value in values]
    yield "contact_data, beside a bad message", False, lambda: [is_contact_data(value) for value in values]

    bodies = {"clean": clean, "one bad": one_bad, "all bad": bad, "all wrong types": wrong_type}
    bodies["with objects"] = with_objects
    for name, body in bodies.items():
        yield f"validate, {name}", False, partial(batch.validate, decoding.decode_bulk(body))

    yield "ids", False, _ids(size)
    numbers = range(10**12, 10**12 + size)
    yield "arithmetic per id", True, lambda: [_arithmetic_id(number) for number in numbers]

    draft, ids = batch.validate(decoding.decode_bulk(clean)), LeasedIds(0).take(size).ids
    yield "build", False, partial(_build, draft, ids)
    objects = _payload_objects(draft, ids)
    yield "build: its encoding alone", False, lambda: [wire.encode(one) for one in objects]
    enveloped = Layout(messages_per_envelope=ENVELOPE)
    yield f"build, envelopes of {ENVELOPE}", False, partial(_build, draft, ids, enveloped)

    payloads = _build(draft, ids).outgoing.payloads
    framer = PublishFramer(Destination(NAME, NAME, "sms.v1"), CHANNEL, FRAME_MAX)
    yield "frames", False, partial(framer.pack, ids, payloads)
    yield "bytes formatting", True, _frames_by_formatting(ids, payloads)
    yield "pamqp objects", True, partial(_frames_by_pamqp, ids, payloads)

    loop = asyncio.new_event_loop()  # only to own the futures
    for name, acks in (("coalesced", max(1, round(size * ACKS_PER_MESSAGE))), ("1 ack each", size)):
        chunks = _ack_chunks(size, acks)
        yield f"confirms, {name}", False, partial(_confirm, ids, chunks)
        yield f"pamqp and futures, {name}", True, partial(_confirm_plainly, size, chunks, loop)

    loop.close()

    rows = batch.validate(decoding.decode_bulk(bad)).rows
    yield "answer, clean", False, partial(wire.encode, Answer(size, 0, []))
    yield "answer, all bad", False, partial(wire.encode, Answer(0, size, rows))

    counters = Counters()
    yield "metrics", False, partial(_measure, counters, size, Answer(size, 0, []))
    yield "metrics, all bad", False, partial(_measure, counters, size, Answer(0, size, rows))
    yield "prometheus-client", True, _measure_by_prometheus_client(size)


def _body(size: int, changed: int = 0, fields: dict[str, Any] = FORMAT) -> bytes:
    """Return a batch in which `changed` messages have these fields instead of their own, or beside them."""
    return msgspec.json.encode({"messages": traffic.messages(size, [LIST_NUMBER], bad=changed, flaws=[fields])})


def _build(draft: batch.Draft, ids: list[str], layout: Layout = batch.PLAIN) -> batch.Batch:
    return batch.build(draft, LISTS, batch.BatchIds(ids, ids), ORIGIN, layout=layout)


def _payload_objects(draft: batch.Draft, ids: list[str]) -> list[Payload]:
    """Return the objects that build() makes before it encodes them."""
    return [
        Payload(
            message_id,
            42,
            LISTS[LIST_NUMBER],
            LIST_NUMBER,
            message.to or "",
            (message.body or "").replace(batch.MACRO, message_id),
            False,
            msgspec.UNSET,
            msgspec.UNSET,
            ACCEPTED_AT,
            REQUEST_ID,
            index,
        )
        for message, message_id, index in zip(draft.messages, ids, draft.indexes, strict=True)
    ]


def _ids(size: int) -> Work:
    """Take ids from one lease after the other, as IdSupply does."""
    leases = count()
    leased = LeasedIds(next(leases))

    def take() -> list[str]:
        nonlocal leased
        if len(leased) < size:
            leased = LeasedIds(next(leases))
        return leased.take(size).ids

    return take


def _arithmetic_id(number: int) -> str:
    """Return an id of the same kind from a number: scattered by a multiplication, then eight digits to base 62."""
    scattered = number * MULTIPLIER % BASE**8
    characters = bytearray(8)
    for place in range(8):
        scattered, digit = divmod(scattered, BASE)
        characters[place] = ALPHABET[digit]
    return characters.decode("ascii")


def _frames_by_formatting(ids: Sequence[str], payloads: Sequence[bytes]) -> Work:
    """Format each message with one `%`, over a template of the constant parts."""
    publish, header = (pamqp.frame.marshal(frame, CHANNEL) for frame in _publish_frames("00000000", b""))
    before_size = publish + header[:11]
    before_id, after_id = header[19:].split(b"00000000")
    body_start = struct.pack(">BH", 3, CHANNEL)
    size, long_size = struct.Struct(">I").pack, struct.Struct(">Q").pack

    def format_all() -> bytes:
        return b"".join(
            [
                b"%b%b%b%b%b%b%b%b\xce"
                % (
                    before_size,
                    long_size(len(payload)),
                    before_id,
                    message_id.encode(),
                    after_id,
                    body_start,
                    size(len(payload)),
                    payload,
                )
                for message_id, payload in zip(ids, payloads, strict=True)
            ]
        )

    return format_all


def _frames_by_pamqp(ids: Sequence[str], payloads: Sequence[bytes]) -> bytes:
    """Marshal frame objects, as aiormq does."""
    return b"".join(
        [
            pamqp.frame.marshal(frame, CHANNEL)
            for message_id, payload in zip(ids, payloads, strict=True)
            for frame in (*_publish_frames(message_id, payload), ContentBody(payload))
        ]
    )


def _publish_frames(message_id: str, payload: bytes) -> tuple[commands.Basic.Publish, ContentHeader]:
    properties = commands.Basic.Properties(
        content_type="application/json", delivery_mode=2, message_id=message_id, message_type="sms.v1"
    )
    publish = commands.Basic.Publish(exchange=NAME, routing_key=NAME, mandatory=True)
    return publish, ContentHeader(body_size=len(payload), properties=properties)


def _ack_chunks(size: int, acks: int) -> list[bytes]:
    """Return the broker's acks for a batch: a few, each in a read of its own, or one a message, all in one read."""
    tags = [size * (number + 1) // acks for number in range(acks)]
    frames = [pamqp.frame.marshal(commands.Basic.Ack(delivery_tag=tag, multiple=acks < size), CHANNEL) for tag in tags]
    return frames if acks < size else [b"".join(frames)]


def _confirm(ids: Sequence[str], chunks: Sequence[bytes]) -> None:
    tracker, frames = ConfirmTracker(), IncomingFrames()
    frames.channel = CHANNEL
    published = tracker.add(ids)
    for chunk in chunks:
        for event in frames.feed(chunk)[1]:
            if isinstance(event, Settled):
                tracker.settle(acked=event.acked, delivery_tag=event.delivery_tag, multiple=event.multiple)
            elif isinstance(event, AckedRange):
                tracker.ack_range(event.first_tag, event.last_tag)
    if published.unsettled:
        raise AssertionError("the acks do not cover the batch")


def _confirm_plainly(size: int, chunks: Sequence[bytes], loop: asyncio.AbstractEventLoop) -> None:
    """Settle a future for each message, with frames unmarshalled as objects."""
    futures = {tag: loop.create_future() for tag in range(1, size + 1)}
    settled_to = 0
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            size, _, frame = pamqp.frame.unmarshal(chunk[at : at + ACK_BYTES])
            if not isinstance(frame, commands.Basic.Ack):
                raise AssertionError(f"{frame!r} is no ack")
            at += size
            tags = range(settled_to + 1, frame.delivery_tag + 1) if frame.multiple else (frame.delivery_tag,)
            for tag in tags:
                futures.pop(tag).set_result(None)
            settled_to = frame.delivery_tag
    if futures:
        raise AssertionError("the acks do not cover the batch")


def _measure(counters: Counters, size: int, answer: Answer) -> None:
    """Record one request in the counters, as the API does."""
    record = RequestRecord(counters)
    record.account_id = 42
    record.mark(AUTHENTICATE)
    record.body_bytes = 100 * size
    record.mark(READ)
    record.count_in_flight(size)
    record.mark(VALIDATE)
    record.mark(RESOLVE_LISTS)
    record.payloads = answer.queued_count
    record.mark(BUILD)
    record.mark(PUBLISH)
    record.queued = answer.queued_count
    record.end(REQUEST_ID, 200, "")


def _measure_by_prometheus_client(size: int) -> Work:
    """Record the same metrics of a clean batch with prometheus-client, with fixed label values looked up once."""
    registry = CollectorRegistry()
    durations = Histogram("stage_seconds", "Of stages.", ["stage"], buckets=SECONDS, registry=registry)
    stages = [durations.labels(stage) for stage in STAGES]
    whole = Histogram("request_seconds", "Of requests.", buckets=SECONDS, registry=registry)
    messages = Histogram("request_messages", "In a request.", buckets=MESSAGES, registry=registry)
    body_bytes = Counter("body_bytes", "Read.", registry=registry)
    requests = Counter("requests", "By status and code.", ["status", "code"], registry=registry)
    queued = Counter("messages", "By outcome.", ["outcome"], registry=registry).labels("queued")

    def measure_request() -> None:
        begin = at = time.perf_counter()
        for stage in stages:
            now = time.perf_counter()
            stage.observe(now - at)
            at = now
        body_bytes.inc(100 * size)
        messages.observe(size)
        queued.inc(size)
        whole.observe(time.perf_counter() - begin)
        requests.labels("200", OK).inc()

    return measure_request


def _refusing(size: int) -> list[Refusing]:
    """Measure whole batches in turn: refused ones from decode to answer, clean ones from decode to frames."""
    clean = _body(size)
    framer = PublishFramer(Destination(NAME, NAME, "sms.v1"), CHANNEL, FRAME_MAX)
    take_ids = _ids(size)

    def accept() -> None:
        built = _build(batch.validate(decoding.decode_bulk(clean)), take_ids())  # type: ignore[arg-type]
        framer.pack(built.outgoing.ids, built.outgoing.payloads)

    def refuse(body: bytes) -> None:
        draft = batch.validate(decoding.decode_bulk(body))
        wire.encode(Answer(0, len(draft.rows), draft.rows))

    found = []
    for name, flaw in (("wrong format", FORMAT), ("wrong type", TYPE)):
        body = _body(size, size, flaw)
        pairs = [(_sample(partial(refuse, body)), _sample(accept)) for _ in range(SAMPLES)]
        found.append(Refusing(name, Figure.of(refused / accepted for refused, accepted in pairs)))
    return found


def _seconds(work: Work) -> Figure:
    return Figure.of(_sample(work) for _ in range(SAMPLES))


def _sample(work: Work) -> float:
    """Return the CPU seconds of one call, over as many calls as fill SAMPLE_S."""
    calls = 0
    begin = time.thread_time_ns()
    until = begin + SAMPLE_S * 1e9
    while (now := time.thread_time_ns()) < until:
        for _ in range(calls // 4 + 1):
            work()
        calls += calls // 4 + 1
    return (now - begin) / 1e9 / calls


def _scaled(figure: Figure, factor: float) -> Figure:
    return Figure(figure.median * factor, figure.lowest * factor, figure.highest * factor)


def report(stages: Stages) -> Report:
    """Return the lowest samples as a table, the largest batch as a chart, and row 6."""
    sizes = list(stages.stages[0].us_per_message)
    largest = max(sizes)
    rows: list[list[Cell]] = [
        [
            f"– instead: {stage.name}" if stage.plain else stage.name,
            *(short(stage.us_per_message[size].lowest) for size in sizes),
        ]
        for stage in stages.stages
    ]
    ours = {stage.name: stage.us_per_message[largest] for stage in stages.stages if not stage.plain}
    refusing = [
        Sentence(
            f"Row 6: a batch refused as a whole ({one.flaw}) ÷ a clean one, up to the publish: "
            f"{one.ratio.shown(short)} (bar ≤ 3)"
        )
        for one in stages.refusing
    ]
    return Report(
        "Stages of a batch",
        stages.machine,
        [
            Table(
                "CPU µs per message, by batch size: lowest of several samples",
                ["stage", *(f"{size:,}" for size in sizes)],
                rows,
            ),
            Chart(f"CPU µs per message at {largest:,} messages", plots.bars({"": ours}, "µs")),
            *refusing,
        ],
    )


def report_against(against: StagesAgainstBaseline) -> Report:
    """Return the ratios as a table."""
    sizes = list(against.rows[0].ratio)
    rows: list[list[Cell]] = [[one.name, *(one.ratio[size] for size in sizes)] for one in against.rows]
    title = f"CPU of this checkout ÷ baseline ({against.baseline_commit}), by batch size: median, lowest-highest"
    only_here = [Sentence(f"Not in the baseline: {', '.join(against.only_here)}.")] if against.only_here else []
    return Report(
        "Stages of a batch against a baseline",
        against.machine,
        [Table(title, ["stage", *(f"{size:,}" for size in sizes)], rows), *only_here],
    )
