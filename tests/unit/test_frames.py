"""pamqp unpacks what PublishFramer packs; IncomingFrames sees the same events wherever the bytes are cut."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from gateway.amqp.frames import (
    FRAME_OVERHEAD,
    HEARTBEAT_FRAME,
    Blocked,
    ChannelClosed,
    Destination,
    Event,
    IncomingFrames,
    PublishFramer,
    Returned,
    Settled,
)

EXAMPLES = settings(derandomize=True, max_examples=150, deadline=None)

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


@EXAMPLES
@given(payloads=st.lists(st.binary(min_size=1, max_size=MAX_BODY), max_size=8))
def test_a_batch_of_small_payloads_arrives_whole_and_in_order(payloads: list[bytes]) -> None:
    assert_round_trip(payloads)


@EXAMPLES
@given(payloads=st.lists(st.binary(min_size=1, max_size=4 * MAX_BODY + 1), max_size=8))
def test_a_batch_of_small_and_large_payloads_arrives_whole_and_in_order(payloads: list[bytes]) -> None:
    assert_round_trip(payloads)


@pytest.mark.parametrize("size", [n * MAX_BODY + k for n in (1, 2, 3) for k in (-1, 0, 1)])
def test_a_payload_around_the_frame_size_takes_as_few_frames_as_it_can(size: int) -> None:
    assert_round_trip([b"x" * size])
    assert_round_trip([b"before", b"x" * size, b"after"])


def test_a_payload_of_several_real_frames_arrives_whole() -> None:
    assert_round_trip([b"small", bytes(range(256)) * 2_000, b"small"], frame_max=131_072)


def test_payloads_that_look_like_frames_are_only_payloads() -> None:
    assert_round_trip([HEARTBEAT_FRAME, b"\xce" * 20, b"00000000", framer().pack(ids(1), [b"x"])])


@pytest.mark.parametrize("payloads", [[b""], [b"a", b"", b"b"], [b"", b"x" * (MAX_BODY + 1)]])
def test_an_empty_payload_has_no_body_frame(payloads: list[bytes]) -> None:
    """A content of size 0 is complete with its header: a body frame behind it closes the connection (505)."""
    assert_round_trip(payloads)


def test_an_empty_batch_is_no_bytes() -> None:
    assert framer().pack([], []) == b""


def test_both_ways_of_packing_give_the_same_bytes() -> None:
    """One payload too large for a frame takes the whole batch through the slow path; the bytes are the same."""
    small, large = [b"one", b"x" * MAX_BODY], b"x" * (MAX_BODY + 1)
    fast, slow = framer().pack(ids(2), small), framer().pack(ids(3), [*small, large])
    assert slow.startswith(fast)


# The other way: what the broker says.


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


delivery_tags = st.integers(0, 2**63 - 1)  # pamqp goes no further
other_channels = st.sampled_from([1, 2, 4, 259, 2047])
message_ids = st.text("0123456789abcXYZ", min_size=8, max_size=8)
bodies = st.binary(max_size=80)

acks = st.builds(
    lambda tag, multiple: said(
        PUBLISH_CHANNEL, commands.Basic.Ack(tag, multiple), event=Settled(True, tag, multiple), is_taken=True
    ),
    delivery_tags,
    st.booleans(),
)
nacks = st.builds(
    lambda tag, multiple, requeue: said(
        PUBLISH_CHANNEL,
        commands.Basic.Nack(tag, multiple, requeue),
        event=Settled(False, tag, multiple),
        is_taken=True,
    ),
    delivery_tags,
    st.booleans(),
    st.booleans(),
)
returns = st.builds(
    lambda message_id, body, chunk: said(
        PUBLISH_CHANNEL, *returned(PUBLISH_CHANNEL, message_id, body, chunk), event=Returned(message_id), is_taken=True
    ),
    message_ids,
    bodies,
    st.integers(1, 30),
)
closes = st.just(
    said(PUBLISH_CHANNEL, commands.Channel.Close(404, "NOT_FOUND - no exchange", 60, 40), event=ChannelClosed())
)
others_on_the_channel = st.sampled_from(
    [
        said(PUBLISH_CHANNEL, commands.Channel.CloseOk()),
        said(PUBLISH_CHANNEL, commands.Confirm.SelectOk()),
        said(PUBLISH_CHANNEL, commands.Channel.Flow(True)),
    ]
)
of_the_connection = st.sampled_from(
    [
        said(0, Heartbeat()),
        said(0, commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0)),
        said(0, commands.Connection.CloseOk()),
        said(0, commands.Connection.Blocked("low on memory"), event=Blocked(True)),
        said(0, commands.Connection.Unblocked(), event=Blocked(False)),
    ]
)
of_other_channels = st.one_of(
    st.builds(lambda channel, tag: said(channel, commands.Basic.Ack(tag)), other_channels, delivery_tags),
    st.builds(lambda channel, tag: said(channel, commands.Basic.Nack(tag)), other_channels, delivery_tags),
    st.builds(
        lambda channel, body: said(channel, *returned(channel, "stranger", body, 7)),
        other_channels,
        bodies,
    ),
    st.builds(lambda channel: said(channel, commands.Channel.Close(406, "no", 60, 40)), other_channels),
    st.builds(lambda channel: said(channel, commands.Queue.DeclareOk("q", 1, 2)), other_channels),
)
everything = st.one_of(acks, acks, nacks, returns, closes, others_on_the_channel, of_the_connection, of_other_channels)
cuts = st.lists(st.integers(0, 2_000), max_size=12)


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


@EXAMPLES
@given(conversation=st.lists(everything, max_size=15), cut_at=cuts)
def test_wherever_the_bytes_are_cut_the_events_and_the_rest_are_the_same(
    conversation: list[Said], cut_at: list[int]
) -> None:
    stream = b"".join(part.frames for part in conversation)
    passed_on, events = feed_in_pieces(listening(), stream, cut_at)
    assert events == [event for part in conversation for event in part.events]
    assert passed_on == b"".join(part.frames for part in conversation if not part.is_taken)


@EXAMPLES
@given(conversation=st.lists(everything, max_size=6))
def test_byte_by_byte_is_no_different_and_only_whole_frames_are_passed_on(conversation: list[Said]) -> None:
    stream = b"".join(part.frames for part in conversation)
    frames, events, passed_on = listening(), list[Event](), b""
    for at in range(len(stream)):
        more, new_events = frames.feed(stream[at : at + 1])
        events += new_events
        passed_on += more
        while more:  # whole frames: a synthetic heartbeat may be put between any two that are passed on
            more = more[unmarshal(more)[0] :]
    assert events == [event for part in conversation for event in part.events]
    assert passed_on == b"".join(part.frames for part in conversation if not part.is_taken)


@EXAMPLES
@given(message_id=message_ids, body=bodies, chunk=st.integers(1, 30), between=of_the_connection | of_other_channels)
def test_frames_of_others_may_stand_between_those_of_a_return(
    message_id: str, body: bytes, chunk: int, between: Said
) -> None:
    parts = [marshal(frame, PUBLISH_CHANNEL) for frame in returned(PUBLISH_CHANNEL, message_id, body, chunk)]
    stream = between.frames.join(parts)
    passed_on, events = listening().feed(stream)
    assert passed_on == between.frames * (len(parts) - 1)
    assert [event for event in events if isinstance(event, Returned)] == [Returned(message_id)]


def test_an_event_comes_with_the_last_byte_of_its_frames_and_not_before() -> None:
    frames = listening()
    parts = [marshal(frame, PUBLISH_CHANNEL) for frame in returned(PUBLISH_CHANNEL, "AbC12345", b"x" * 50, 20)]
    stream = b"".join(parts)
    assert frames.feed(stream[:-1]) == (b"", [])
    assert frames.feed(stream[-1:]) == (b"", [Returned("AbC12345")])


def test_a_return_without_a_message_id_is_an_event_all_the_same() -> None:
    parts: list[FrameTypes] = [commands.Basic.Return(312, "NO_ROUTE", "", ""), ContentHeader(body_size=0)]
    assert listening().feed(said(PUBLISH_CHANNEL, *parts).frames) == (b"", [Returned("")])


@EXAMPLES
@given(conversation=st.lists(everything, max_size=10), cut_at=cuts)
def test_nothing_is_taken_before_the_channel_is_known(conversation: list[Said], cut_at: list[int]) -> None:
    """The library opens the channels and needs their answers. Alarms are heard from the first moment on."""
    stream = b"".join(part.frames for part in conversation)
    passed_on, events = feed_in_pieces(IncomingFrames(), stream, cut_at)
    assert passed_on == stream
    assert events == [event for part in conversation for event in part.events if isinstance(event, Blocked)]


def test_another_channels_close_is_not_ours() -> None:
    stream = marshal(commands.Channel.Close(404, "no", 60, 40), 1)
    assert listening().feed(stream) == (stream, [])


@pytest.mark.parametrize(
    "stream",
    [ProtocolHeader().marshal(), b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 40, b"\xff" * 40],
    ids=["protocol header", "HTTP", "zeros", "ones"],
)
def test_what_is_no_amqp_is_passed_on_whole_for_the_library_to_complain(stream: bytes) -> None:
    assert listening().feed(stream) == (stream, [])
    ack = marshal(commands.Basic.Ack(1), PUBLISH_CHANNEL)
    assert listening().feed(ack + stream) == (stream, [Settled(True, 1, False)])


def test_the_heartbeat_frame_is_one() -> None:
    assert marshal(Heartbeat(), 0) == HEARTBEAT_FRAME


def test_a_thousand_acks_in_one_read_are_a_thousand_events() -> None:
    acks = [marshal(commands.Basic.Ack(tag), PUBLISH_CHANNEL) for tag in range(1, 1_001)]
    ends = list(accumulate(map(len, acks)))
    passed_on, events = feed_in_pieces(listening(), b"".join(acks), ends[::100])
    assert passed_on == b""
    assert events == [Settled(True, tag, False) for tag in range(1, 1_001)]


def test_a_broker_without_a_frame_limit_gets_bodies() -> None:
    """RabbitMQ sends frame_max 0 for unlimited."""
    unlimited = PublishFramer(Destination("x", "q", "sms.v1"), 1, 0)
    limited = PublishFramer(Destination("x", "q", "sms.v1"), 1, 131_072)
    payloads = [b"{}", b" " * 200_000]
    assert unlimited.pack(["AbC12345"] * 2, payloads) == limited.pack(["AbC12345"] * 2, payloads)


@pytest.mark.parametrize("payload", [b"{}", b"x" * 300_000])
def test_the_headers_of_a_trace_go_with_each_message_of_their_batch_and_no_other(payload: bytes) -> None:
    plain = PublishFramer(Destination("x", "q", "sms.v1"), 1, 131_072)
    before = plain.pack(["AbC12345"], [payload])
    headers = {"traceparent": "00-00000000000000000000000000000001-0000000000000002-01"}
    buffer, found = plain.carrying(headers).pack(["AbC12345", "AbC12346"], [payload, payload]), []
    while buffer:
        size, _, frame = unmarshal(buffer)
        buffer = buffer[size:]
        if isinstance(frame, ContentHeader):
            found.append((frame.properties.message_id, frame.properties.headers, frame.body_size))
    assert found == [("AbC12345", headers, len(payload)), ("AbC12346", headers, len(payload))]
    assert plain.pack(["AbC12345"], [payload]) == before
