"""Reads the outbound queue of one test as a consumer does: whole messages, through a connection of its own."""

import asyncio
from types import TracebackType
from typing import Any, Self

import aio_pika
import msgspec
from aio_pika.abc import AbstractIncomingMessage, AbstractRobustConnection


class OutboundQueue:
    """The queue behind a test's gateway."""

    def __init__(self, amqp_url: str, name: str) -> None:
        self.url = amqp_url
        self.name = name

    async def __aenter__(self) -> Self:
        self._connection: AbstractRobustConnection = await aio_pika.connect_robust(self.url)
        self._channel = await self._connection.channel()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._connection.close()

    async def take_all(self) -> list[AbstractIncomingMessage]:
        """Consume and return everything that is in the queue now, in order."""
        queue = await self._channel.get_queue(self.name, ensure=False)
        messages = []
        while (message := await queue.get(no_ack=True, fail=False)) is not None:
            messages.append(message)
        return messages

    async def read_stream(self, count: int) -> list[AbstractIncomingMessage]:
        """Read the first `count` messages of a stream from its beginning; the stream keeps them."""
        channel = await self._connection.channel()
        await channel.set_qos(prefetch_count=1000)
        stream = await channel.get_queue(self.name, ensure=False)
        messages: list[AbstractIncomingMessage] = []
        async with asyncio.timeout(30), stream.iterator(arguments={"x-stream-offset": "first"}) as iterator:
            while len(messages) < count:
                messages.append(await anext(iterator))
                await messages[-1].ack()
        return messages

    async def take_payloads(self) -> list[dict[str, Any]]:
        """Consume everything in the queue; return the decoded bodies in order."""
        return [msgspec.json.decode(message.body) for message in await self.take_all()]

    async def put(self, messages: int) -> None:
        """Publish empty messages into the empty queue, and wait until its depth shows them."""
        for _ in range(messages):
            await self._channel.default_exchange.publish(aio_pika.Message(b""), self.name)
        while await self.depth() < messages:  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.01)

    async def depth(self) -> int:
        """Return the number of messages in the queue now."""
        channel = await self._connection.channel()
        declared = await channel.declare_queue(self.name, passive=True)
        await channel.close()
        return declared.declaration_result.message_count or 0

    async def delete(self) -> None:
        """Delete the queue, with all bindings."""
        await self._channel.queue_delete(self.name)
