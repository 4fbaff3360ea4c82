"""Framing and unframing random payloads and events, cut anywhere."""

from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.frame import marshal, unmarshal
from pamqp.heartbeat import Heartbeat

from gateway.amqp.frames import (
    Blocked,
    ChannelClosed,
    Event,
    IncomingFrames,
    Returned,
    Settled,
)
from tests.properties import MORE
from tests.support.frames import (
    MAX_BODY,
    PUBLISH_CHANNEL,
    Said,
    assert_round_trip,
    feed_in_pieces,
    listening,
    one_by_one,
    returned,
    said,
)

EXAMPLES = settings(derandomize=MORE == 1, max_examples=150 * MORE, deadline=None)


@EXAMPLES
@given(payloads=st.lists(st.binary(min_size=1, max_size=MAX_BODY), max_size=8))
def test_a_batch_of_small_payloads_arrives_whole_and_in_order(payloads: list[bytes]) -> None:
    assert_round_trip(payloads)


@EXAMPLES
@given(payloads=st.lists(st.binary(min_size=1, max_size=4 * MAX_BODY + 1), max_size=8))
def test_a_batch_of_small_and_large_payloads_arrives_whole_and_in_order(payloads: list[bytes]) -> None:
    assert_round_trip(payloads)


delivery_tags = st.integers(0, 2**63 - 1)  # pamqp goes no further
bodies = st.binary(max_size=80)
acks = st.builds(
    lambda tag, multiple: said(
        PUBLISH_CHANNEL, commands.Basic.Ack(tag, multiple), event=Settled(True, tag, multiple), is_taken=True
    ),
    delivery_tags,
    st.booleans(),
)
other_channels = st.sampled_from([1, 2, 4, 259, 2047])
message_ids = st.text("0123456789abcXYZ", min_size=8, max_size=8)

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

NOT_FOUND = "NOT_FOUND - no exchange"
closes = st.just(
    said(
        PUBLISH_CHANNEL,
        commands.Channel.Close(404, NOT_FOUND, 60, 40),
        event=ChannelClosed(f"404 {NOT_FOUND}"),
    )
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

runs = st.builds(
    lambda first, count: Said(
        b"".join(marshal(commands.Basic.Ack(tag), PUBLISH_CHANNEL) for tag in range(first, first + count)),
        [Settled(True, tag, False) for tag in range(first, first + count)],
        is_taken=True,
    ),
    st.integers(0, 2**63 - 50),
    st.integers(2, 40),
)

everything = st.one_of(
    acks, acks, runs, nacks, returns, closes, others_on_the_channel, of_the_connection, of_other_channels
)

cuts = st.lists(st.integers(0, 2_000), max_size=12)


@EXAMPLES
@given(conversation=st.lists(everything, max_size=15), cut_at=cuts)
def test_wherever_the_bytes_are_cut_the_events_and_the_rest_are_the_same(
    conversation: list[Said], cut_at: list[int]
) -> None:
    stream = b"".join(part.frames for part in conversation)
    passed_on, events = feed_in_pieces(listening(), stream, cut_at)
    assert one_by_one(events) == [event for part in conversation for event in part.events]
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
    assert one_by_one(events) == [event for part in conversation for event in part.events]
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


@EXAMPLES
@given(conversation=st.lists(everything, max_size=10), cut_at=cuts)
def test_nothing_is_taken_before_the_channel_is_known(conversation: list[Said], cut_at: list[int]) -> None:
    """The library opens the channels and needs their answers. Alarms are heard from the first moment on."""
    stream = b"".join(part.frames for part in conversation)
    passed_on, events = feed_in_pieces(IncomingFrames(), stream, cut_at)
    assert passed_on == stream
    assert events == [event for part in conversation for event in part.events if isinstance(event, Blocked)]
