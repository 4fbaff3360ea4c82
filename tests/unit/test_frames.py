"""pamqp unpacks what PublishFramer packs; IncomingFrames sees the same events wherever the bytes are cut."""

import struct
from functools import reduce
from itertools import accumulate

import pytest
from pamqp import commands
from pamqp.frame import FrameTypes, marshal, unmarshal
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from gateway.amqp.frames import (
    HEARTBEAT_FRAME,
    AckedRange,
    ChannelClosed,
    Destination,
    IncomingFrames,
    PublishFramer,
    Returned,
    Settled,
)
from tests.support.frames import (
    MAX_BODY,
    PUBLISH_CHANNEL,
    assert_round_trip,
    feed_in_pieces,
    framer,
    ids,
    listening,
    one_by_one,
    returned,
    said,
)


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

RETURN = marshal(commands.Basic.Return(312, "NO_ROUTE", "", ""), PUBLISH_CHANNEL)
PROPERTIES = commands.Basic.Properties(message_id="AbC12345")
HEADER = marshal(ContentHeader(body_size=2, properties=PROPERTIES), PUBLISH_CHANNEL)
ACK = marshal(commands.Basic.Ack(1), PUBLISH_CHANNEL)


def frame_of(payload: bytes, kind: int = 1) -> bytes:
    """Return a frame of the publish channel; kind 1 is a method."""
    return struct.pack(">BHI", kind, PUBLISH_CHANNEL, len(payload)) + payload + b"\xce"


ARRAYS = reduce(lambda inner, _: b"A" + struct.pack(">i", len(inner)) + inner, range(2_000), b"")
DEEP = frame_of(struct.pack(">HHQHiBc", 60, 0, 2, 0x2000, 2 + len(ARRAYS), 1, b"n") + ARRAYS, kind=2)


def test_an_event_comes_with_the_last_byte_of_its_frames_and_not_before() -> None:
    frames = listening()
    parts = [marshal(frame, PUBLISH_CHANNEL) for frame in returned(PUBLISH_CHANNEL, "AbC12345", b"x" * 50, 20)]
    stream = b"".join(parts)
    assert frames.feed(stream[:-1]) == (b"", [])
    assert frames.feed(stream[-1:]) == (b"", [Returned("AbC12345")])


def test_a_return_without_a_message_id_is_an_event_all_the_same() -> None:
    parts: list[FrameTypes] = [commands.Basic.Return(312, "NO_ROUTE", "", ""), ContentHeader(body_size=0)]
    assert listening().feed(said(PUBLISH_CHANNEL, *parts).frames) == (b"", [Returned("")])


@pytest.mark.parametrize(
    "content",
    [HEADER + frame_of(b"123", kind=3), frame_of(b"", kind=3), frame_of(HEADER[7:15], kind=2), DEEP],
    ids=["a body that is too long", "a body without a header", "half a header", "arrays in arrays"],
)
def test_a_return_whose_content_cannot_be_is_garbage(content: bytes) -> None:
    frames = listening()
    assert frames.feed(RETURN + content)[1] == []
    assert frames.feed(ACK) == (ACK, [])


def test_content_that_belongs_to_no_return_is_passed_on() -> None:
    strange, body = marshal(ContentHeader(body_size=0), 0), frame_of(b"12", kind=3)
    stream = RETURN + strange + HEADER + body + HEADER + body
    assert listening().feed(stream) == (strange + HEADER + body, [Returned("AbC12345")])


def test_the_reply_of_a_connections_close_is_kept() -> None:
    frames = listening()
    frames.feed(marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0))
    assert frames.close_reply == "320 CONNECTION_FORCED"


@pytest.mark.parametrize(("reply", "shown"), [(b"", "0 no reply"), (b"\x01\x94\x01\xff", "404 \ufffd")])
def test_a_close_without_a_readable_reply_is_one(reply: bytes, shown: str) -> None:
    close = frame_of(struct.pack(">HH", 20, 40) + reply)
    assert listening().feed(close) == (close, [ChannelClosed(shown)])


def test_another_channels_close_is_not_ours() -> None:
    stream = marshal(commands.Channel.Close(404, "no", 60, 40), 1)
    assert listening().feed(stream) == (stream, [])


GARBAGE = {
    "protocol header": ProtocolHeader().marshal(),
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": b"\x00" * 40,
    "ones": b"\xff" * 40,
    "another end byte": ACK[:-1] + b"\xcf",
    "an ack that is too long": frame_of(ACK[7:-1] + b"\x00"),
    "half a method": frame_of(b"\x00\x3c"),
}


@pytest.mark.parametrize("stream", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_amqp_is_passed_on_whole_for_the_library_to_complain(stream: bytes) -> None:
    assert listening().feed(stream) == (stream, [])
    frames = listening()
    passed_on, events = frames.feed(ACK + stream)
    assert (passed_on, one_by_one(events)) == (stream, [Settled(True, 1, False)])
    assert frames.feed(ACK) == (ACK, []), "behind garbage nothing is read as an ack"


def test_the_heartbeat_frame_is_one() -> None:
    assert marshal(Heartbeat(), 0) == HEARTBEAT_FRAME


def test_a_thousand_acks_in_ten_reads_are_ten_events() -> None:
    acks = [marshal(commands.Basic.Ack(tag), PUBLISH_CHANNEL) for tag in range(1, 1_001)]
    ends = list(accumulate(map(len, acks)))
    passed_on, events = feed_in_pieces(listening(), b"".join(acks), ends[::100])
    assert passed_on == b""
    assert one_by_one(events) == [Settled(True, tag, False) for tag in range(1, 1_001)]
    assert len(events) <= 11


@pytest.mark.parametrize("channel", [1, 40, 0x2E2A], ids=["1", "a bracket", "a dot and an asterisk"])
def test_the_number_of_the_channel_is_no_regular_expression(channel: int) -> None:
    frames = IncomingFrames()
    frames.channel = channel
    assert frames.feed(marshal(commands.Basic.Ack(1), channel) * 2)[1] == [AckedRange(1, 1)] * 2


def test_acks_of_one_read_become_ranges_of_consecutive_tags() -> None:
    sent = [(4, False), (5, False), (7, False), (6, False), (0, False), (1, False), (8, False)]
    sent += [(9, True), (10, False), (11, False)]
    acks = b"".join(marshal(commands.Basic.Ack(*ack), PUBLISH_CHANNEL) for ack in sent)
    other = marshal(commands.Basic.Ack(12), PUBLISH_CHANNEL + 1)
    nack = marshal(commands.Basic.Nack(12), PUBLISH_CHANNEL)
    assert listening().feed(other + acks + nack + other) == (
        other + other,
        [
            *(AckedRange(4, 5), AckedRange(7, 7), AckedRange(6, 6), AckedRange(0, 1), AckedRange(8, 8)),
            *(Settled(True, 9, True), AckedRange(10, 11), Settled(False, 12, False)),
        ],
    )


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
    buffer, found = plain.with_headers(headers).pack(["AbC12345", "AbC12346"], [payload, payload]), []
    while buffer:
        size, _, frame = unmarshal(buffer)
        buffer = buffer[size:]
        if isinstance(frame, ContentHeader):
            found.append((frame.properties.message_id, frame.properties.headers, frame.body_size))
    assert found == [("AbC12345", headers, len(payload)), ("AbC12346", headers, len(payload))]
    assert plain.pack(["AbC12345"], [payload]) == before
