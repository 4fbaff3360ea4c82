"""Reads what PublishFramer writes, with pamqp; and frames of a broker, with the events that they must produce."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader

from gateway.amqp.frames import (
    FRAME_OVERHEAD,
    AckedRange,
    Destination,
    Event,
    IncomingFrames,
    PublishFramer,
    Settled,
)

FRAME_MAX = 64  # small, so that bodies of several frames are cheap; heads are never split, and take what they take
MAX_BODY = FRAME_MAX - FRAME_OVERHEAD
PUBLISH_CHANNEL = 3


@dataclass
class Unpacked:
    """One published message as pamqp reads it."""

    channel: int
    method: commands.Basic.Publish
    header: ContentHeader
    bodies: list[bytes]


def unpack(buffer: bytes) -> list[Unpacked]:
    """Read publishes strictly: a body frame is legal only while some of the announced body is missing."""
    publishes: list[Unpacked] = []
    missing = 0
    while buffer:
        size, channel, frame = unmarshal(buffer)
        buffer = buffer[size:]
        match frame:
            case commands.Basic.Publish():
                assert not missing
                method = frame
            case ContentHeader():
                assert not missing
                publishes.append(Unpacked(channel, method, frame, []))
                missing = frame.body_size
            case ContentBody():
                assert missing, "a body frame, though nothing of the body is missing: RabbitMQ closes with 505"
                assert 0 < len(frame.value) <= missing
                publishes[-1].bodies.append(frame.value)
                missing -= len(frame.value)
            case _:
                pytest.fail(f"{frame} among publishes")
        assert channel == publishes[-1].channel if publishes else True
    assert not missing
    return publishes


def one_by_one(events: Iterable[Event]) -> list[Event]:
    """Return the events with an ack for each tag of an AckedRange."""
    singles: list[Event] = []
    for event in events:
        if isinstance(event, AckedRange):
            singles.extend(Settled(True, tag, False) for tag in range(event.first_tag, event.last_tag + 1))
        else:
            singles.append(event)
    return singles


def framer(frame_max: int = FRAME_MAX) -> PublishFramer:
    return PublishFramer(Destination("sms.outbound", "sms.queue", "sms.v1"), PUBLISH_CHANNEL, frame_max)


def ids(count: int) -> list[str]:
    return [f"Ab{n:06}" for n in range(count)]


def assert_round_trip(payloads: list[bytes], frame_max: int = FRAME_MAX) -> None:
    publishes = unpack(framer(frame_max).pack(ids(len(payloads)), payloads))
    assert [b"".join(publish.bodies) for publish in publishes] == payloads
    assert [publish.header.properties.message_id for publish in publishes] == ids(len(payloads))
    for publish in publishes:
        assert publish.channel == PUBLISH_CHANNEL
        assert (publish.method.exchange, publish.method.routing_key) == ("sms.outbound", "sms.queue")
        assert (publish.method.mandatory, publish.method.immediate) == (True, False)
        sent = {name: value for name, value in publish.header.properties if value}  # unset: None or ''
        assert sent == {
            "content_type": "application/json",
            "delivery_mode": 2,  # persistent
            "message_id": sent["message_id"],
            "message_type": "sms.v1",
        }
        # As few frames as can be, all but the last of them full.
        full = frame_max - FRAME_OVERHEAD
        assert [len(body) for body in publish.bodies[:-1]] == [full] * (len(publish.bodies) - 1)
        assert all(len(body) <= full for body in publish.bodies)


@dataclass
class Said:
    """Frames of the broker, and the events that they must produce."""

    frames: bytes
    events: list[Event]
    is_taken: bool  # for the publisher alone, and not passed on


def said(channel: int, *frames: FrameTypes, event: Event | None = None, is_taken: bool = False) -> Said:
    return Said(b"".join(marshal(frame, channel) for frame in frames), [event] if event is not None else [], is_taken)


def returned(channel: int, message_id: str, body: bytes, chunk: int) -> list[FrameTypes]:
    return [
        commands.Basic.Return(312, "NO_ROUTE", "sms.outbound", "sms.queue"),
        ContentHeader(body_size=len(body), properties=commands.Basic.Properties(message_id=message_id)),
        *(ContentBody(body[at : at + chunk]) for at in range(0, len(body), chunk)),
    ]


def listening() -> IncomingFrames:
    frames = IncomingFrames()
    frames.channel = PUBLISH_CHANNEL
    return frames


def feed_in_pieces(frames: IncomingFrames, stream: bytes, cut_at: list[int]) -> tuple[bytes, list[Event]]:
    passed_on, events = b"", list[Event]()
    for start, end in pairwise([0, *sorted(min(cut, len(stream)) for cut in cut_at), len(stream)]):
        more_passed_on, more_events = frames.feed(stream[start:end])
        passed_on += more_passed_on
        events += more_events
    return passed_on, events
