"""The database and the broker behind all systems under test, with an account, its key and its lists.

Each run has an exchange and queues of its own, and can count the messages in them.
"""

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import aio_pika
import msgspec

from benchmarks.drivers.workers import REPOSITORY
from gateway.cli.admin import open_admin
from testbed import ServerError, Servers

QUEUE_TYPES = ("quorum", "classic", "stream")
DEPTH_TIMEOUT_S = 15.0  # a busy quorum queue counts messages seconds after it has confirmed them
STREAM_QUIET_S = 1.0  # a stream that delivers nothing for this long has delivered everything
# Far above what a run of some seconds leaves in a queue without consumers, so that no memory alarm slows a run.
BROKER_MEMORY = "6GiB"


class Names(msgspec.Struct, frozen=True):
    """The exchange and the queues of one run."""

    exchange: str
    queue: str
    shards: int = 1

    def settings(self) -> dict[str, str]:
        """Return the gateway's settings for these names."""
        return {"GATEWAY_AMQP_EXCHANGE": self.exchange, "GATEWAY_AMQP_QUEUE": self.queue}

    def queues(self) -> list[str]:
        """Return the names of the queues, as the gateway names its shards."""
        if self.shards == 1:
            return [self.queue]
        return [f"{self.queue}.{shard}" for shard in range(self.shards)]


class Backends:
    """A database and a broker, with an account, its key and its lists."""

    def __init__(self, servers: Servers, key: str, list_numbers: list[str]) -> None:
        self.servers = servers
        self.key = key
        self.list_numbers = list_numbers

    @contextmanager
    def names(self, queue_type: str, *, declare: bool, shards: int = 1) -> Iterator[Names]:
        """Yield names for one run, and declare exchange and queues if `declare`. Delete all of them at the end."""
        name = f"bench.{uuid.uuid4().hex[:8]}"
        names = Names(name, name, shards)
        try:
            if declare:
                asyncio.run(self._declare(names, queue_type))
            yield names
        finally:
            asyncio.run(self._delete(names))

    async def _declare(self, names: Names, queue_type: str) -> None:
        """Declare the same topology as the gateway."""
        async with await aio_pika.connect(self.servers.amqp_url) as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(names.exchange, aio_pika.ExchangeType.DIRECT, durable=True)
            arguments = {"x-queue-type": queue_type}
            if queue_type != "stream":
                arguments["x-dead-letter-exchange"] = f"{names.exchange}.dlx"
            for name in names.queues():
                queue = await channel.declare_queue(name, durable=True, arguments=dict(arguments))
                await queue.bind(exchange, routing_key=name)

    async def _delete(self, names: Names) -> None:
        async with await aio_pika.connect(self.servers.amqp_url) as connection:
            channel = await connection.channel()
            for queue in (*names.queues(), f"{names.queue}.dead"):
                await channel.queue_delete(queue)
            for exchange in (names.exchange, f"{names.exchange}.dlx"):
                await channel.exchange_delete(exchange)

    def purge(self, names: Names) -> int:
        """Empty the queues and return the number of messages in them, for runs that would fill them too far."""
        return sum(asyncio.run(_purge(self.servers.amqp_url, queue)) for queue in names.queues())

    def wait_for_depth(self, names: Names, queue_type: str, expected: int) -> int:
        """Return the number of AMQP messages in the queues, once it is `expected` or the time is up."""
        count = _stream_depth if queue_type == "stream" else _depth
        deadline = time.monotonic() + DEPTH_TIMEOUT_S
        while True:
            depth = sum(asyncio.run(count(self.servers.amqp_url, queue)) for queue in names.queues())
            if depth == expected or time.monotonic() > deadline:
                return depth
            time.sleep(0.1)


async def _depth(amqp_url: str, queue: str) -> int:
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


async def _purge(amqp_url: str, queue: str) -> int:
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        purged = await (await channel.get_queue(queue)).purge()
        return purged.message_count or 0


async def _stream_depth(amqp_url: str, queue: str) -> int:
    """Return the offset after the last message of a stream. A passive declare of a stream always answers 0."""
    depth = 0
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=1_000)
        stream = await channel.get_queue(queue)
        async with stream.iterator(arguments={"x-stream-offset": "last"}, timeout=STREAM_QUIET_S) as last_chunk:
            with suppress(TimeoutError):
                async for message in last_chunk:
                    offset = message.headers["x-stream-offset"]
                    depth = int(str(offset)) + 1
                    await message.ack()
    return depth


@contextmanager
def open_backends(lists: int = 1) -> Iterator[Backends]:
    """Start the servers, migrate, create an account with a key and lists. Stop the servers at the end."""
    with Servers() as servers:
        migrated = subprocess.run(
            [sys.executable, "-m", "gateway", "migrate"],
            cwd=REPOSITORY,
            env=os.environ | servers.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if migrated.returncode != 0:
            raise ServerError(f"the database could not be migrated:\n{migrated.stderr}")
        if servers.rabbitmq is not None:
            servers.rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", BROKER_MEMORY)
        yield asyncio.run(with_account(servers, lists))


async def with_account(servers: Servers, lists: int) -> Backends:
    """Create an account, a key and lists on servers that run and are migrated."""
    async with open_admin(servers.database_url) as admin:
        account = (await admin.create_account("benchmark"))["id"]
        key = (await admin.create_key(account))["key"]
        numbers = [f"+1{uuid.uuid4().int % 10**13:013}" for _ in range(lists)]
        for number in numbers:
            await admin.add_list(account, number)
    return Backends(servers, key, numbers)
