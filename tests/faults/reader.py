"""A consumer that records every message, and goes on through every fault of the cluster it reads from."""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import cycle
from types import TracebackType
from typing import Self

import aio_pika
import aiormq.exceptions
import msgspec
from aio_pika.abc import AbstractIncomingMessage

from gateway.amqp.transport import Connection
from tests.faults.ledger import Consumed, Token

PREFETCH = 500
ACK_EVERY_S = 0.1
CONNECT_TIMEOUT_S = 3.0
QUIET_S = 1.0  # a queue that delivers nothing for this long is empty
GIVE_UP_S = 20.0  # after this time without a delivery, the missing messages are lost


class _Payload(msgspec.Struct):
    id: str
    request_id: str
    index: int
    body: str


_decoder = msgspec.json.Decoder(_Payload)


def consumed_of(body: bytes, load_name: str) -> Consumed | None:
    """Return the ledger's entry for a payload; None for a message of another load."""
    payload = _decoder.decode(body)
    name, batch, index, message_id = payload.body.split()
    assert message_id == payload.id, payload
    assert int(index) == payload.index, payload
    return Consumed(Token(int(batch), int(index)), payload.id, payload.request_id) if name == load_name else None


class Reader:
    """A reader of one queue, for the length of an `async with` block, on any node that answers."""

    def __init__(self, amqp_urls: Sequence[str], queue: str, load_name: str) -> None:
        self._urls = cycle(amqp_urls)
        self._queue = queue
        self._load_name = load_name
        self._last: AbstractIncomingMessage | None = None
        self._last_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        # A set: a redelivery after a lost connection is no second message.
        self.consumed: set[Consumed] = set()
        self.tokens: set[Token] = set()
        self.failure: Exception | None = None

    async def __aenter__(self) -> Self:
        self.resume()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.pause()

    def resume(self) -> None:
        """Read on."""
        self._last_at = time.monotonic()
        self._task = asyncio.create_task(self._read_for_ever())

    async def pause(self) -> None:
        """Stop reading, and leave the rest in the queue."""
        task, self._task = self._task, None
        # A dying connection may absorb the first cancellation.
        while task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1.0)

    async def drain(self, expected: Collection[Token]) -> None:
        """Return when all of `expected` has come and nothing more does, or after GIVE_UP_S without a delivery.

        Raises the exception of the first message that cannot be read.
        """
        while True:
            await asyncio.sleep(0.05)
            if self.failure is not None:
                raise self.failure
            quiet_s = time.monotonic() - self._last_at
            if quiet_s > (QUIET_S if self.tokens.issuperset(expected) else GIVE_UP_S):
                return

    async def _read_for_ever(self) -> None:
        for url in self._urls:
            with suppress(
                OSError, TimeoutError, aiormq.exceptions.AMQPError, aiormq.exceptions.ChannelInvalidStateError
            ):
                try:
                    await self._read(url)
                except asyncio.CancelledError:
                    # aiormq cancels everything that waits on a dying connection. A cancellation of this task is real.
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
            await asyncio.sleep(0.1)

    async def _read(self, url: str) -> None:
        """Read until the connection is lost."""
        lost = asyncio.Event()
        connection = await aio_pika.connect(url, timeout=CONNECT_TIMEOUT_S, connection_class=Connection)
        connection.close_callbacks.add(lambda *_: lost.set())
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                channel = await connection.channel()
                channel.close_callbacks.add(lambda *_: lost.set())
                await channel.set_qos(prefetch_count=PREFETCH)
                queue = await channel.get_queue(self._queue, ensure=False)
                await queue.consume(self._take)
            while not lost.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(lost.wait(), ACK_EVERY_S)
                last, self._last = self._last, None
                if last is not None:
                    await last.ack(multiple=True)
        finally:
            self._last = None
            with suppress(Exception):
                await asyncio.wait_for(connection.close(), CONNECT_TIMEOUT_S)

    async def _take(self, message: AbstractIncomingMessage) -> None:
        try:
            consumed = consumed_of(message.body, self._load_name)
        except (AssertionError, ValueError, msgspec.DecodeError) as error:
            self.failure = error
            return
        self._last, self._last_at = message, time.monotonic()
        if consumed is not None:
            self.consumed.add(consumed)
            self.tokens.add(consumed.token)
