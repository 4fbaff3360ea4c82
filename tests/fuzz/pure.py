"""The targets `requests` and `frames`: pure modules under a coverage-guided fuzzer, compared with slow models.

    python -m tests.fuzz.pure requests CORPUS -max_total_time=60 -seed=1 -artifact_prefix=findings/

The arguments after the target are libFuzzer's. An input that fails is written to a file, and ends the run. Half of the
inputs are new and nearly valid; the other half are damaged copies of earlier ones. Random bytes would be refused by
msgspec and pamqp, whose C code shows the fuzzer no coverage.
"""

import json
import random
import sys
from typing import Any
from unittest.mock import patch

import atheris
import pamqp.frame
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

with atheris.instrument_imports(include=["gateway"], enable_loader_override=False):
    from gateway.amqp import frames
    from gateway.errors import InvalidDryRun, InvalidJson, MissingMessages, TooManyMessages
    from gateway.ingest import batch, decoding, wire

from tests.fuzz.requests import Requests
from tests.support.batch_model import OWNED, assert_as_the_model_says, build, model_code, model_payload
from tests.support.frames import one_by_one

CHANNEL = 5


# With the second, each body takes the path of very many values; with the third, that of one that is slow to parse; with
# the fourth, that of a huge one.
LIMITS: tuple[dict[str, Any], ...] = (
    {"LARGE_BODY_BYTES": decoding.LARGE_BODY_BYTES},
    {"LARGE_BODY_BYTES": 0, "MANY_COMMAS": -1},
    {"LARGE_BODY_BYTES": 0, "MANY_BRACKETS": 0},
    {"HUGE_BODY_BYTES": 0, "MAX_FIELDS": 2},
)


def try_request(body: bytes) -> None:
    """Try a body as that of a batch and as that of a single send, under all limits."""
    for limits in LIMITS:
        with patch.multiple(decoding, **limits):
            try_single(body)
            try_bulk(body)


def try_bulk(body: bytes) -> None:
    """Check that a body gives messages or one of four refusals, and that Python's own json reads it alike."""
    try:
        bulk = decoding.decode_bulk(body)
    except InvalidJson:
        assert read_strictly(body) is None, "refused, but it is JSON"
        return
    except InvalidDryRun:
        assert is_wrong_dry_run(read_strictly(body))
        return
    except (MissingMessages, TooManyMessages) as refusal:
        request = read_strictly(body)
        assert request is not None, "accepted as JSON, but it is none"
        messages = request.get("messages")
        if isinstance(refusal, TooManyMessages):
            assert isinstance(messages, list)
            assert len(messages) > wire.MAX_MESSAGES
        else:
            assert not isinstance(messages, list) or not messages
        return
    request = read_strictly(body)
    assert request is not None, "accepted, but it is no JSON"
    assert bulk.dry_run == (request.get("dry_run") is True)
    assert not is_wrong_dry_run(request)
    assert len(batch.validate(bulk).list_numbers) <= wire.MAX_MESSAGES
    assert_as_the_model_says(body)


def try_single(body: bytes) -> None:
    """Check that a body gives one message or a refusal, as the model of a batch of one says."""
    request = read_strictly(body)
    try:
        bulk = decoding.decode_single(body)
    except InvalidJson:
        assert request is None, "refused, but it is JSON"
        return
    except InvalidDryRun:
        assert is_wrong_dry_run(request)
        return
    assert request is not None, "accepted, but it is no JSON"
    assert bulk.dry_run == (request.get("dry_run") is True)
    assert not is_wrong_dry_run(request)
    found = build(batch.validate(bulk))
    code = model_code(request, None)
    assert [row.code for row in found.rows] == ([code] if code else [])
    for payload in found.outgoing.payloads:
        assert json.loads(payload) == model_payload(request, None, 0, found.ids[0])


def is_wrong_dry_run(request: dict[str, Any] | None) -> bool:
    """Return True if the request's `dry_run` is neither a boolean nor null."""
    return request is not None and not isinstance(request.get("dry_run"), bool | None)


def read_strictly(body: bytes) -> dict[str, Any] | None:
    """Return the object in a body as RFC 8259 defines JSON, or None."""
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_read_object)
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Half a surrogate pair is no text, not even where a later key overwrites it.
    json.dumps(pairs, ensure_ascii=False).encode()
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def try_frames(data: bytes) -> None:
    """Check that the broker's bytes give the same result however they are cut, and that a slow reader agrees."""
    cut, stream = (data[0], data[1:]) if data else (0, b"")
    whole = frames.IncomingFrames()
    whole.channel = CHANNEL
    passed_on, events = whole.feed(stream)
    pieces = frames.IncomingFrames()
    pieces.channel = CHANNEL
    passed_on_in_pieces, events_in_pieces = b"", []
    step = cut % 13 + 1
    for at in range(0, len(stream), step):
        more, found = pieces.feed(stream[at : at + step])
        passed_on_in_pieces += more
        events_in_pieces += found
    expected_events, expected_passed_on = read_slowly(stream)
    assert one_by_one(events) == expected_events
    assert one_by_one(events_in_pieces) == expected_events
    assert passed_on == expected_passed_on
    assert passed_on_in_pieces == expected_passed_on


def read_slowly(stream: bytes) -> tuple[list[frames.Event], bytes]:
    """Read frame by frame, as AMQP 0-9-1, section 2.3.5 defines them.

    Return the events, and the bytes that are passed on: everything from the first malformed frame on.
    """
    events: list[frames.Event] = []
    passed_on = b""
    in_return, returned_id, missing = False, "", -1
    while len(stream) >= 8:
        kind, channel, size = stream[0], int.from_bytes(stream[1:3]), int.from_bytes(stream[3:7])
        if kind not in (1, 2, 3, 8):
            return events, passed_on + stream
        if len(stream) < size + 8:
            break
        frame, payload, end_byte = stream[: size + 8], stream[7 : size + 7], stream[size + 7]
        if end_byte != 0xCE or (kind == 1 and channel in (0, CHANNEL) and size < 4):
            return events, passed_on + stream
        method = (int.from_bytes(payload[:2]), int.from_bytes(payload[2:4])) if kind == 1 else None
        if channel == CHANNEL and method in ((60, 80), (60, 120)):
            if size != 13:
                return events, passed_on + stream
            events.append(frames.Settled(method == (60, 80), int.from_bytes(payload[4:12]), bool(payload[12] & 1)))
        elif channel == CHANNEL and kind == 1:
            in_return, missing = method == (60, 50), -1
            if method == (20, 40):
                text = payload[7 : 7 + payload[6]].decode(errors="replace") if size >= 7 else "no reply"
                events.append(frames.ChannelClosed(f"{int.from_bytes(payload[4:6]) if size >= 7 else 0} {text}"))
            if not in_return:
                passed_on += frame
        elif channel == CHANNEL and in_return and kind in (2, 3):
            if kind == 2:
                try:
                    header = pamqp.frame.unmarshal(frame)[2]
                except Exception:  # pamqp raises many kinds
                    return events, passed_on + stream
                assert isinstance(header, ContentHeader)
                returned_id, missing = header.properties.message_id or "", header.body_size
            else:
                missing -= size
            if missing < 0:
                return events, passed_on + stream
            if missing == 0:
                events.append(frames.Returned(returned_id))
                in_return = False
        else:
            if channel == 0 and method in ((10, 60), (10, 61)):
                events.append(frames.Blocked(method == (10, 60)))
            passed_on += frame
        stream = stream[size + 8 :]
    return events, passed_on


_requests = Requests(0, key="", list_number=next(iter(OWNED)))
_frames = [
    pamqp.frame.marshal(frame, channel)
    for channel, sent in (
        (
            CHANNEL,
            (
                commands.Basic.Ack(1),
                commands.Basic.Ack(2**62, multiple=True),
                commands.Basic.Nack(7, multiple=True),
                commands.Channel.Close(404, "NOT_FOUND", 60, 40),
                commands.Confirm.SelectOk(),
                commands.Basic.Return(312, "NO_ROUTE", "x", "q"),
                ContentHeader(body_size=3, properties=commands.Basic.Properties(message_id="AbC12345")),
                ContentHeader(body_size=0, properties=commands.Basic.Properties(headers={"a": [1, "b", None]})),
                ContentBody(b"abc"),
                ContentBody(b"x"),
            ),
        ),
        (0, (Heartbeat(), commands.Connection.Blocked("low on memory"), commands.Connection.Unblocked())),
        (1, (commands.Queue.DeclareOk("q", 1, 2), commands.Basic.Ack(1), ContentBody(b"abc"))),
    )
    for frame in sent
]


def make_request(seed: int) -> bytes:
    """Return a body of the grammar."""
    return _requests.body(seed) if seed % 4 else _requests.single_body(seed)


def make_frames(seed: int) -> bytes:
    """Return frames that a broker may send, in any order; half of the time damaged."""
    chance = random.Random(seed)  # noqa: S311 - libFuzzer's own seed
    stream = bytes([chance.randrange(256)]) + b"".join(chance.choices(_frames, k=chance.randrange(1, 12)))
    if chance.random() < 0.5:
        at = chance.randrange(len(stream))
        stream = (
            stream[:at]
            + bytes([chance.choice((0, 1, 255, chance.randrange(256)))])
            + stream[at + chance.randrange(2) :]
        )
    return stream


TARGETS = {"requests": (try_request, make_request), "frames": (try_frames, make_frames)}


def main() -> None:
    """Fuzz one target for as long as libFuzzer's arguments say."""
    target, make = TARGETS[sys.argv[1]]

    def make_or_damage(data: bytes, max_size: int, seed: int) -> bytes:
        mutated: bytes = make(seed)[:max_size] if seed % 2 else atheris.Mutate(data, max_size)
        return mutated

    atheris.Setup([sys.argv[0], *sys.argv[2:]], target, custom_mutator=make_or_damage)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
