"""The bare publisher, a minimal AMQP client on plain asyncio with publisher confirms. A worker (see workers.py).

Each connection has one channel. Batches are encoded before the clock starts. Each batch is one write, and is done when
the broker has confirmed all its messages. The bare publisher shares no code with the gateway's publisher, so that
neither hides a fault of the other. Only the payloads are the same (traffic.py).
"""

import asyncio
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import pamqp.base
import pamqp.common
import pamqp.frame
import uvloop
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader

from benchmarks.drivers import latency, traffic, workers
from benchmarks.drivers.workers import Counter, Ready, Result, Start

CHANNEL = 1
RUN_OUT_S = 15.0  # time for the confirms that are missing when the measurement ends
_frame_start = struct.Struct(">BHI")
_confirm = struct.Struct(">HHQB")
_ACK = (60, 80)

Method = TypeVar("Method", bound=pamqp.base.Frame)


class Plan(msgspec.Struct):
    """The batches to publish, and their number in flight."""

    amqp_url: str
    exchange: str
    routing_keys: list[str]  # of queues that batches take turns with
    batch: int = 1_000  # SMS in one write
    sms_per_message: int = 1
    body_length: int = traffic.BODY_LENGTH
    in_flight: int = 8  # batches, over all connections
    connections: int = 1


class BrokerRefused(Exception):
    """The broker closed the channel or rejected a message, so the run has no result."""


class Handshake:
    """The opening of a connection and of a channel in confirm mode, with pamqp. It is not timed."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)

    async def open(self) -> asyncio.WriteTransport:
        """Open both and return the connection's transport."""
        url = self._url
        self._reader, self._writer = await asyncio.open_connection(url.hostname, url.port or 5672)
        self._writer.write(pamqp.frame.marshal(ProtocolHeader(), 0))
        await self._expect(commands.Connection.Start)
        user, password = unquote(url.username or "guest"), unquote(url.password or "guest")
        capabilities: pamqp.common.FieldTable = {"publisher_confirms": True, "basic.nack": True}
        self._send(
            commands.Connection.StartOk(
                client_properties={"product": "bare publisher", "capabilities": capabilities},
                mechanism="PLAIN",
                response=f"\0{user}\0{password}",
                locale="en_US",
            )
        )
        tune = await self._expect(commands.Connection.Tune)
        self._send(commands.Connection.TuneOk(channel_max=tune.channel_max, frame_max=tune.frame_max, heartbeat=0))
        self._send(commands.Connection.Open(virtual_host=unquote(url.path[1:]) or "/"))
        await self._expect(commands.Connection.OpenOk)
        self._send(commands.Channel.Open(), CHANNEL)
        await self._expect(commands.Channel.OpenOk)
        self._send(commands.Confirm.Select(), CHANNEL)
        await self._expect(commands.Confirm.SelectOk)
        self.frame_max = tune.frame_max
        return self._writer.transport

    def _send(self, method: pamqp.base.Frame, channel: int = 0) -> None:
        self._writer.write(pamqp.frame.marshal(method, channel))

    async def _expect(self, kind: type[Method]) -> Method:
        start = await self._reader.readexactly(_frame_start.size)
        rest = await self._reader.readexactly(_frame_start.unpack(start)[2] + 1)
        _, _, frame = pamqp.frame.unmarshal(start + rest)
        if not isinstance(frame, kind):
            raise BrokerRefused(f"expected {kind.__name__}, the broker sent {frame!r}")
        return frame


def encode_batch(plan: Plan, routing_key: str, frame_max: int) -> tuple[bytes, int]:
    """Return the bytes of one batch, and its number of AMQP messages."""
    contents = traffic.envelopes(traffic.payloads(plan.batch, body_length=plan.body_length), plan.sms_per_message)
    publish = commands.Basic.Publish(exchange=plan.exchange, routing_key=routing_key, mandatory=True)
    frames: list[pamqp.base.Frame | ContentHeader | ContentBody] = []
    for number, content in enumerate(contents):
        properties = commands.Basic.Properties(
            content_type="application/json", delivery_mode=2, message_id=f"{number:08}", message_type="sms.v1"
        )
        frames += [publish, ContentHeader(body_size=len(content), properties=properties)]
        step = frame_max - 8
        frames += [ContentBody(content[at : at + step]) for at in range(0, len(content), step)]
    return b"".join([pamqp.frame.marshal(frame, CHANNEL) for frame in frames]), len(contents)


class Confirms:
    """A table of delivery tags that finds finished batches. All batches have one size: a batch is a range of tags."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next_tag = 1
        self._contiguous = 0  # every tag up to here is settled
        self._early: set[int] = set()  # settled one by one, above it
        self._written: deque[tuple[int, float]] = deque()  # last tag, when written

    def __len__(self) -> int:
        return len(self._written)

    def add(self, now: float) -> None:
        """Add a batch written at `now`."""
        self._next_tag += self._size
        self._written.append((self._next_tag - 1, now))

    def settle(self, tag: int, *, multiple: bool) -> list[float]:
        """Settle one tag, or all up to it. Return the times at which the batches that are now settled were written."""
        if multiple:
            self._contiguous = max(self._contiguous, tag)
        else:
            self._early.add(tag)
        while self._contiguous + 1 in self._early:
            self._contiguous += 1
            self._early.discard(self._contiguous)
        finished = []
        while self._written and self._written[0][0] <= self._contiguous:
            finished.append(self._written.popleft()[1])
        return finished


class Publishing(asyncio.Protocol):
    """One connection, which keeps a number of batches in flight until the time is up."""

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        buffers: Iterator[bytes],
        confirms: Confirms,
        on_batch: Callable[[float, float], bool],
    ) -> None:
        """Take `on_batch(now, written_at)`, which counts a batch and returns True when another one follows."""
        self._transport = transport
        self._buffers = buffers
        self.confirms = confirms
        self._on_batch = on_batch
        self._rest = b""
        self.lost = ""

    def write(self) -> None:
        """Write the next batch."""
        self.confirms.add(time.perf_counter())
        self._transport.write(next(self._buffers))

    def data_received(self, data: bytes) -> None:
        buffer = self._rest + data
        at = 0
        while len(buffer) - at >= 8:
            kind, channel, size = _frame_start.unpack_from(buffer, at)
            if at + size + 8 > len(buffer):
                break
            if kind == 1 and channel == CHANNEL:
                self._method(buffer, at)
            at += size + 8
        self._rest = buffer[at:]

    def _method(self, buffer: bytes, at: int) -> None:
        class_id, method_id, tag, bits = _confirm.unpack_from(buffer, at + _frame_start.size)
        if (class_id, method_id) != _ACK:
            _, _, frame = pamqp.frame.unmarshal(buffer[at:])
            self.lost = f"the broker sent {frame!r} {dict(frame) if isinstance(frame, pamqp.base.Frame) else ''}"
            return
        now = time.perf_counter()
        for written_at in self.confirms.settle(tag, multiple=bool(bits & 1)):
            if self._on_batch(now, written_at) and not self.lost:
                self.write()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self.lost or f"the connection was lost: {exc}"


async def run(plan: Plan) -> Result:
    """Connect, wait for the start, publish until the time is up, and wait for the last confirms."""
    opened = [Handshake(plan.amqp_url) for _ in range(plan.connections)]
    transports = [await handshake.open() for handshake in opened]
    encoded = [encode_batch(plan, key, opened[0].frame_max) for key in plan.routing_keys]
    buffers, size = cycle(buffer for buffer, _ in encoded), encoded[0][1]
    recorder = latency.Recorder()
    workers.write_line(Ready())
    start = workers.read_line(Start)
    workers.exit_with_parent()
    # perf_counter and monotonic are the same clock on Linux, so all workers agree on the time.
    counter = Counter(start)

    def on_batch(now: float, written_at: float) -> bool:
        if counter.completed(now, now - written_at, plan.batch, failed=False):
            recorder.record(now - written_at)
        return now < start.measure_until

    connections = []
    for transport in transports:
        connection = Publishing(transport, buffers, Confirms(size), on_batch)
        transport.set_protocol(connection)
        connections.append(connection)
    await asyncio.sleep(start.begin - time.perf_counter())
    for number in range(plan.in_flight):
        connections[number % len(connections)].write()
    cpu_before = cpu_after = None
    while (now := time.perf_counter()) < start.measure_until + RUN_OUT_S:
        if cpu_before is None and now >= start.measure_from:
            cpu_before = time.process_time()
        if cpu_after is None and now >= start.measure_until:
            cpu_after = time.process_time()
        if now - start.begin > workers.TICK_S / 2:
            workers.write_line(counter.take_tick(now, sum(len(connection.confirms) for connection in connections)))
        if lost := next((connection.lost for connection in connections if connection.lost), ""):
            raise BrokerRefused(lost)
        if now >= start.measure_until and not any(len(connection.confirms) for connection in connections):
            break
        await asyncio.sleep(workers.next_tick_in(start, now))
    else:
        raise BrokerRefused("confirms are missing")
    result = counter.result
    result.latencies = recorder.encoded()
    result.cpu_s = (cpu_after or 0.0) - (cpu_before or 0.0)
    return result


if __name__ == "__main__":
    workers.write_line(uvloop.run(run(workers.read_line(Plan))))
