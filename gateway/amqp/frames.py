"""AMQP 0-9-1 frames: a batch of payloads packed into one buffer, and the broker's bytes parsed to events. No IO.

A frame has type (1 byte), channel (2), payload size (4), payload, and the end byte 0xCE. A publish is a method frame, a
header frame, and body frames of at most frame_max. (AMQP 0-9-1 specification, sections 2.3.5 and 4.2.)
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, repeat
from typing import NamedTuple

import pamqp.frame
from pamqp import commands
from pamqp.common import FieldTable
from pamqp.header import ContentHeader

END = b"\xce"
FRAME_OVERHEAD = 8  # bytes: 7 before the payload, 1 after it
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00" + END
PERSISTENT = 2
DEFAULT_FRAME_MAX = 131_072  # bytes, RabbitMQ's default

_METHOD, _HEADER, _BODY = 1, 2, 3
_KINDS = (_METHOD, _HEADER, _BODY, HEARTBEAT_FRAME[0])
_frame_start = struct.Struct(">BHI")
_method = struct.Struct(">HH")
_settlement = struct.Struct(">QB")
_body_size = struct.Struct(">Q")
_reply = struct.Struct(">HB")  # a reply code, and the length of the text that follows
_ack = struct.Struct(">11x QB x")  # a whole frame: delivery tag and `multiple`, between head and end byte
_NO_TAG = -2  # neither a delivery tag nor the number before one

_ACK, _NACK, _RETURN = (60, 80), (60, 120), (60, 50)
_CHANNEL_CLOSE, _CONNECTION_CLOSE = (20, 40), (10, 50)
_BLOCKED, _UNBLOCKED = (10, 60), (10, 61)


class Destination(NamedTuple):
    """An exchange, a routing key, and the AMQP `type` of the messages sent there."""

    exchange: str
    routing_key: str
    message_type: str


class PublishFramer:
    """The frames of publishes to one destination on one channel: persistent, mandatory, JSON."""

    def __init__(self, destination: Destination, channel: int, frame_max: int) -> None:
        """`frame_max` is the negotiated maximum of a whole frame in bytes; 0 means that the broker sets none."""
        self._channel = channel
        self._message_type = destination.message_type
        self._headers: FieldTable = {}
        publish = commands.Basic.Publish(
            exchange=destination.exchange, routing_key=destination.routing_key, mandatory=True
        )
        self._publish = pamqp.frame.marshal(publish, channel)
        self._max_body = (frame_max or DEFAULT_FRAME_MAX) - FRAME_OVERHEAD
        self._lay_out()

    def with_headers(self, headers: Mapping[str, str]) -> "PublishFramer":
        """Return a framer that adds these AMQP headers to each message, for the trace of a single batch."""
        framer = copy(self)
        framer._headers = dict(headers)
        framer._lay_out()
        return framer

    def _lay_out(self) -> None:
        """Compute the bytes that all publishes share: before the body size, before the id, and after the id."""
        channel = self._channel
        # All ids have 8 characters, so all bytes of a publish before its payload have a fixed layout.
        header = pamqp.frame.marshal(self._header("00000000", 0), channel)
        size_at = _frame_start.size + _method.size  # after class id and weight
        # The last match is the id: a trace id before it may contain the same characters.
        before_id, after_id = header[size_at + _body_size.size :].rsplit(b"00000000", 1)
        self._before_size = END + self._publish + header[:size_at]
        self._before_id = before_id
        self._after_id = after_id + struct.pack(">BH", _BODY, channel)
        self._pack_head = struct.Struct(
            f">{len(self._before_size)}s Q {len(before_id)}s 8s {len(self._after_id)}s I"
        ).pack

    def pack(self, ids: Sequence[str], payloads: Sequence[bytes]) -> bytes:
        """Return the frames of a batch in one buffer, in order. Each id has 8 ASCII characters.

        One struct call packs all bytes between two payloads: the end byte of the first message, then all of the second
        up to its payload. One join then alternates these parts with the payloads. For a large batch this takes half the
        time of bytes formatting, and a fiftieth of the objects of a marshaller (scripts/bench stages, row "frames").
        """
        lengths = list(map(len, payloads))
        if not lengths or not min(lengths) or max(lengths) > self._max_body:
            return b"".join(chain.from_iterable(map(self._parts_of, ids, payloads)))
        parts = [b""] * (2 * len(lengths))
        parts[::2] = map(
            self._pack_head,
            repeat(self._before_size),
            lengths,
            repeat(self._before_id),
            map(str.encode, ids),
            repeat(self._after_id),
            lengths,
        )
        parts[1::2] = payloads
        parts[0] = parts[0][1:]
        parts.append(END)
        return b"".join(parts)

    def _parts_of(self, message_id: str, payload: bytes) -> Iterator[bytes | memoryview]:
        """Yield the frames of one message of any size in parts, with its body split by the broker's frame_max."""
        yield self._publish
        yield pamqp.frame.marshal(self._header(message_id, len(payload)), self._channel)
        whole = memoryview(payload)  # a slice of it is no copy
        for start in range(0, len(payload), self._max_body):
            body = whole[start : start + self._max_body]
            yield _frame_start.pack(_BODY, self._channel, len(body))
            yield body
            yield END

    def _header(self, message_id: str, body_size: int) -> ContentHeader:
        properties = commands.Basic.Properties(
            content_type="application/json",
            delivery_mode=PERSISTENT,
            headers=self._headers or None,
            message_id=message_id,
            message_type=self._message_type,
        )
        return ContentHeader(body_size=body_size, properties=properties)


class Settled(NamedTuple):
    """basic.ack or basic.nack, for one delivery tag, or with `multiple` for all tags up to it."""

    acked: bool
    delivery_tag: int
    multiple: bool


class AckedRange(NamedTuple):
    """One or more basic.acks, each for one of these consecutive delivery tags; the last one included."""

    first_tag: int
    last_tag: int


class Returned(NamedTuple):
    """basic.return with its content: the broker could not route this message. Its ack follows later."""

    message_id: str


class ChannelClosed(NamedTuple):
    """channel.close from the broker. It sends no more confirms on this channel."""

    reply: str  # code and text, such as "404 NOT_FOUND - no exchange 'x' in vhost '/'"


class Blocked(NamedTuple):
    """connection.blocked or connection.unblocked: a memory or disk alarm begins or ends."""

    blocked: bool


Event = Settled | AckedRange | Returned | ChannelClosed | Blocked


class _NotAFrame(Exception):
    """The broker's bytes are no AMQP frame."""


class IncomingFrames:
    """A parser of the broker's bytes. Confirms and returns of one channel become events, all other bytes pass through.

    A confirm costs a few struct calls. In the library it costs a stream reader, a marshaller, two queues and a task
    (scripts/bench stages, row "confirms", without those queues and tasks). RabbitMQ acks the messages of small batches
    one by one, mostly in order: such acks that arrive together are one event (row "confirms, 1 ack each"). After
    bytes that are no frame (the broker's protocol header, or garbage) all bytes pass through to the library: garbage
    must never be read as an ack.
    """

    def __init__(self) -> None:
        self._channel: int | None = None
        self._ack_start = b""
        self._match_acks = re.compile(b"").match
        self.close_reply = ""  # code and text of the broker's connection.close
        self._rest = b""  # the beginning of a frame
        self._buffer = b""  # of the feed() in progress, like _events
        self._events: list[Event] = []
        self._is_out_of_step = False  # True after bytes that are no frame: all bytes pass through
        self._return_begun = False  # True: header and body of a returned message are still to come, or a part of them
        self._returned_id: str | None = None
        self._returned_bytes = 0  # of its body still to come; below 0 before its header

    @property
    def channel(self) -> int | None:
        """The publish channel; None while none is open."""
        return self._channel

    @channel.setter
    def channel(self, number: int | None) -> None:
        self._channel = number
        if number is None:
            return
        self._ack_start = _frame_start.pack(_METHOD, number, _method.size + _settlement.size) + _method.pack(*_ACK)
        self._match_acks = re.compile(b"(?:%b.{8}[\0\1]%b)+" % (re.escape(self._ack_start), END), re.DOTALL).match

    def feed(self, data: bytes) -> tuple[bytes, list[Event]]:
        """Parse bytes as they arrive. Return the other frames, whole, and the events, both in order."""
        if self._is_out_of_step:
            return data, []
        buffer = self._buffer = self._rest + data if self._rest else data
        events = self._events = []
        passed_on: list[bytes] = []
        start = end = 0
        try:
            while len(buffer) - end >= FRAME_OVERHEAD:
                if acks_end := self._end_of_acks(end):
                    self._take_acks(end, acks_end)
                    passed_on.append(buffer[start:end])
                    start = end = acks_end
                    continue
                kind, channel, size = _frame_start.unpack_from(buffer, end)
                if kind not in _KINDS:
                    raise _NotAFrame
                next_end = end + size + FRAME_OVERHEAD
                if next_end > len(buffer):
                    break
                if buffer[next_end - 1] != END[0]:
                    raise _NotAFrame
                if channel in (self._channel, 0) and self._take(kind, channel, end, next_end):
                    passed_on.append(buffer[start:end])
                    start = next_end
                end = next_end
        except _NotAFrame:
            self._is_out_of_step = True
            end = len(buffer)
        passed_on.append(buffer[start:end])
        self._rest, self._buffer = buffer[end:], b""
        return b"".join(passed_on), events

    def _end_of_acks(self, start: int) -> int:
        """Return the end of the whole acks at `start`, or 0 if there is none, or if no second one begins behind it."""
        if not self._channel or not self._buffer.startswith(self._ack_start, start + _ack.size):
            return 0
        acks = self._match_acks(self._buffer, start)
        return acks.end() if acks is not None else 0

    def _take_acks(self, start: int, end: int) -> None:
        """Add the events of the acks from `start` to `end`, in order: one for each run of consecutive tags."""
        events = self._events
        first = last = _NO_TAG
        for tag, multiple in _ack.iter_unpack(memoryview(self._buffer)[start:end]):
            if tag == last + 1 and not multiple:
                last = tag
                continue
            if first != _NO_TAG:
                events.append(AckedRange(first, last))
            if multiple:
                events.append(Settled(True, tag, True))
                first = last = _NO_TAG
            else:
                first = last = tag
        if first != _NO_TAG:
            events.append(AckedRange(first, last))

    def _take(self, kind: int, channel: int, start: int, end: int) -> bool:
        """Add the event of the frame from `start` to `end`. Return True if the library must not see the frame.

        Raises _NotAFrame.
        """
        buffer, events = self._buffer, self._events
        at = start + _frame_start.size
        size = end - start - FRAME_OVERHEAD
        if kind == _METHOD:
            if size < _method.size:
                raise _NotAFrame
            method = _method.unpack_from(buffer, at)
            if channel == 0:
                if method in (_BLOCKED, _UNBLOCKED):
                    events.append(Blocked(method == _BLOCKED))
                elif method == _CONNECTION_CLOSE:
                    self.close_reply = _read_reply(buffer[at + _method.size : end - len(END)])
                return False
            if method in (_ACK, _NACK):
                if size != _method.size + _settlement.size:
                    raise _NotAFrame
                delivery_tag, bits = _settlement.unpack_from(buffer, at + _method.size)
                events.append(Settled(method == _ACK, delivery_tag, bool(bits & 1)))
                return True
            if method == _CHANNEL_CLOSE:
                events.append(ChannelClosed(_read_reply(buffer[at + _method.size : end - len(END)])))
            self._return_begun = method == _RETURN
            self._returned_bytes = -1
            return self._return_begun
        if not self._return_begun or channel == 0 or kind not in (_HEADER, _BODY):
            return False
        self._take_returned(kind, at, size)
        return True

    def _take_returned(self, kind: int, at: int, size: int) -> None:
        """Take a header or body frame of a returned message; add the event with its last byte. Raises _NotAFrame.

        The frame's payload has `size` bytes, from `at`.
        """
        if kind == _HEADER:
            self._returned_id, self._returned_bytes = _read_header(self._buffer[at : at + size])
        else:
            self._returned_bytes -= size
            if self._returned_bytes < 0:
                raise _NotAFrame
        if self._returned_bytes == 0:
            self._events.append(Returned(self._returned_id or ""))
            self._return_begun = False


def _read_reply(data: bytes) -> str:
    """Return code and text of a channel.close or connection.close."""
    if len(data) < _reply.size:
        return "0 no reply"
    code, length = _reply.unpack_from(data)
    return f"{code} {data[_reply.size : _reply.size + length].decode(errors='replace')}"


def _read_header(data: bytes) -> tuple[str | None, int]:
    """Return the message id and the size of the body in bytes. Raises _NotAFrame."""
    header = ContentHeader()
    try:
        header.unmarshal(data)
    except (struct.error, ValueError, OverflowError, RecursionError) as error:  # pamqp's errors for garbage
        raise _NotAFrame from error
    return header.properties.message_id, header.body_size
