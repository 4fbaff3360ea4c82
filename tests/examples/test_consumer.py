"""The reference consumer on real servers: each SMS is handed on once, also when a server or the consumer dies."""

import asyncio
import os
import re
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import aio_pika
import asyncpg
import msgspec
import pytest
from aio_pika.abc import AbstractIncomingMessage
from pamqp.common import FieldTable
from yarl import URL

from examples.consumer import Consumer, Settings, open_consumer
from examples.consumer import consumer as consumer_module
from examples.consumer.consumer import BrokerLost, UnsupportedQueue, _Subscription
from examples.consumer.inbox import DATABASE_ERRORS, Inbox, insert_deliveries
from examples.consumer.payloads import Sms
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

T = TypeVar("T")

NOWHERE = "amqp://127.0.0.1:1/"  # nothing listens there


def sms(id_: str, *, age_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Return a payload as docs/asyncapi.yaml describes it."""
    accepted_at = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="milliseconds")
    return {
        "id": id_,
        "account_id": 42,
        "list_id": 7,
        "list_number": "+18005551000",
        "to": "+14155551234",
        "body": f"Hello. Ref: {id_}",
        "wrap_links": False,
        "accepted_at": accepted_at.replace("+00:00", "Z"),
        "request_id": "test",
        "index": 0,
    } | changes


def numbered(count: int) -> list[str]:
    return [f"{number:08}" for number in range(count)]


class World:
    """A queue with its dead letters, and a database schema, of one test's own."""

    def __init__(self, servers: Servers, database: asyncpg.Connection, channel: aio_pika.abc.AbstractChannel) -> None:
        name = f"test.{uuid.uuid4().hex[:12]}"
        self.queue, self.dead, self.schema = name, f"{name}.dead", name.replace(".", "_")
        self.database_url = str(URL(servers.database_url).update_query(search_path=self.schema))
        self.amqp_url = servers.amqp_url
        self.database = database
        self.channel = channel

    async def declare_queue(self, name: str, queue_type: str = "quorum") -> None:
        arguments: FieldTable = {
            "x-queue-type": queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.dead,
        }
        if queue_type == "stream":
            arguments = {"x-queue-type": "stream"}
        await self.channel.declare_queue(name, durable=True, arguments=arguments)

    def settings(self, **changes: Any) -> Settings:
        defaults = {"database_url": self.database_url, "amqp_url": self.amqp_url, "queue": self.queue}
        return Settings(**(defaults | changes))

    async def publish(self, *payloads: Any, queue: str = "", message_type: str | None = "sms.v1") -> None:
        """Publish each payload as one AMQP message, bytes as they are, others as JSON. Return when all are queued."""
        bodies = [payload if isinstance(payload, bytes) else msgspec.json.encode(payload) for payload in payloads]
        messages = [
            aio_pika.Message(body, type=message_type, delivery_mode=aio_pika.DeliveryMode.PERSISTENT) for body in bodies
        ]
        exchange = self.channel.default_exchange
        await asyncio.gather(*(exchange.publish(message, queue or self.queue) for message in messages))

    async def handed_on(self) -> Counter[str]:
        """Return how often each id was handed on."""
        if await self.database.fetchval("SELECT to_regclass('deliveries') IS NULL"):
            return Counter()
        return Counter([row["id"] for row in await self.database.fetch("SELECT id FROM deliveries")])

    async def wait_handed_on(self, count: int) -> Counter[str]:
        await until(self.handed_on, lambda handed_on: handed_on.total() >= count)
        return await self.handed_on()

    async def depth(self, name: str = "") -> int:
        """Return the number of messages that no consumer holds; without a consumer, of all that were not acked."""
        queue = await self.channel.declare_queue(name or self.queue, passive=True)
        return queue.declaration_result.message_count or 0

    async def dead_letter(self) -> list[str]:
        """Take a message from the dead letters and return its ids."""
        await until(partial(self.depth, self.dead), bool)
        message = await (await self.channel.get_queue(self.dead)).get(no_ack=True)
        contents = msgspec.json.decode(message.body)
        return [each["id"] for each in (contents if isinstance(contents, list) else [contents])]

    async def consumers(self) -> int:
        return (await self.channel.declare_queue(self.queue, passive=True)).declaration_result.consumer_count or 0


async def until(read: Callable[[], Awaitable[T]], is_so: Callable[[T], bool]) -> None:
    """Read again and again until it is so; raises TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while not is_so(await read()):  # noqa: ASYNC110 - servers are asked, and set no event
            await asyncio.sleep(0.02)


async def until_equal(read: Callable[[], Awaitable[int]], value: int) -> None:
    await until(read, lambda found: found == value)


@pytest.fixture
async def world(servers: Servers) -> AsyncIterator[World]:
    """Queues, dead letters and tables of this test's own; removed afterwards."""
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(await aio_pika.connect(servers.amqp_url))
        channel = await broker.channel(on_return_raises=True)
        database = await asyncpg.connect(servers.database_url)
        stack.push_async_callback(database.close)
        world = World(servers, database, channel)
        await database.execute(f'CREATE SCHEMA "{world.schema}"')
        stack.push_async_callback(database.execute, f'DROP SCHEMA "{world.schema}" CASCADE')
        await database.execute(f'SET search_path = "{world.schema}"')
        await channel.declare_queue(world.dead, durable=True)
        await world.declare_queue(world.queue)
        stack.push_async_callback(channel.queue_delete, world.dead)
        stack.push_async_callback(channel.queue_delete, world.queue)
        yield world


async def start_process(settings: Settings) -> asyncio.subprocess.Process:
    """`python -m examples.consumer` with these settings."""
    environment = {f"CONSUMER_{name.upper()}": str(value) for name, value in msgspec.structs.asdict(settings).items()}
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "examples.consumer"],
        env=os.environ | environment,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def end(process: asyncio.subprocess.Process, number: signal.Signals) -> int:
    if process.returncode is None:
        process.send_signal(number)
    async with asyncio.timeout(60):
        return await process.wait()


def seen(consumer: Consumer) -> int:
    return consumer.delivered + consumer.dropped_repeats + consumer.too_old


def proxy_for(url: str) -> tuple[TcpProxy, str]:
    """Return a proxy in front of a server, not yet started, and the URL through it with a placeholder {port}."""
    parts = URL(url)
    return TcpProxy(parts.host or "", parts.port or 0), url.replace(f":{parts.port}/", ":{port}/")


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_repeats_are_dropped_within_a_group_and_across_groups(world: World, queue_type: str) -> None:
    await world.channel.queue_delete(world.queue)
    await world.declare_queue(world.queue, queue_type)
    ids = numbered(60)
    await world.publish(*[sms(id_) for id_ in ids], sms(ids[0]), sms(ids[59]))
    async with open_consumer(world.settings(group_size=20)) as consumer:
        await eventually(lambda: seen(consumer) == 62)
        await world.publish(*[sms(id_) for id_ in ids])
        await eventually(lambda: seen(consumer) == 122)
        assert (consumer.delivered, consumer.dropped_repeats) == (60, 62)
    assert await world.handed_on() == Counter(ids)
    assert await world.depth() == 0  # the consumer is gone, so none is held


async def test_the_body_arrives_byte_for_byte(world: World) -> None:
    body = "NUL \x00, emoji \U0001f389, right to left \u200f, \r\n"
    await world.publish(sms("AbC12345", body=body))
    async with open_consumer(world.settings()):
        await world.wait_handed_on(1)
    row = await world.database.fetchrow("SELECT * FROM deliveries")
    assert (row["id"], row["list_number"], row["recipient"]) == ("AbC12345", "+18005551000", "+14155551234")
    assert row["body"].decode() == body


async def test_two_consumers_with_the_same_ids_hand_each_on_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The ids come in opposite orders, so that locks taken in the order of arrival would deadlock."""
    other = f"{world.queue}.other"
    await world.declare_queue(other)
    ids = numbered(2000)
    envelopes = [ids[start : start + 500] for start in range(0, 2000, 500)]
    for envelope in envelopes:
        payload = [sms(id_) for id_ in envelope]
        await world.publish(payload, message_type="sms.batch.v1")
        await world.publish(payload[::-1], queue=other, message_type="sms.batch.v1")
    # Slow inserts hold the locks for a while.
    async with (
        open_consumer(world.settings(), insert_slowly) as one,
        open_consumer(world.settings(queue=other), insert_slowly) as two,
    ):
        await eventually(lambda: seen(one) + seen(two) == 4000)
        assert one.delivered + two.delivered == one.dropped_repeats + two.dropped_repeats == 2000
    assert await world.handed_on() == Counter(ids)
    await world.channel.queue_delete(other)
    assert not [record for record in caplog.records if "deadlock" in record.getMessage()]


async def insert_slowly(connection: asyncpg.Connection, messages: list[Sms]) -> None:
    await insert_deliveries(connection, messages)
    await connection.execute("SELECT pg_sleep(0.1)")


async def test_a_process_killed_between_commit_and_ack_leaves_repeats_that_are_dropped(world: World) -> None:
    ids = numbered(50)
    proxy, url = proxy_for(world.amqp_url)
    async with proxy:
        process = await start_process(world.settings(amqp_url=url.format(port=proxy.port), amqp_heartbeat_s=60))
        try:
            await until_equal(world.consumers, 1)
            proxy.limit(20)  # an ack has 21 bytes: not one will arrive
            await world.publish([sms(id_) for id_ in ids], message_type="sms.batch.v1")  # one delivery, one group
            await world.wait_handed_on(50)
        finally:
            assert await end(process, signal.SIGKILL) == -signal.SIGKILL
    await until_equal(world.depth, 1)
    async with open_consumer(world.settings()) as consumer:
        await eventually(lambda: seen(consumer) == 50)
        assert (consumer.delivered, consumer.dropped_repeats) == (0, 50)
    assert await world.handed_on() == Counter(ids)
    assert await world.depth() == 0


async def test_a_broker_lost_between_commit_and_ack_is_found_again(world: World) -> None:
    ids = numbered(50)
    proxy, url = proxy_for(world.amqp_url)
    losses = iter([True, True, True])

    async def lose_the_broker(connection: asyncpg.Connection, messages: list[Sms]) -> None:
        await insert_deliveries(connection, messages)
        if next(losses, False):
            proxy.reset()

    async with proxy:
        settings = world.settings(amqp_url=url.format(port=proxy.port), group_size=10)
        async with open_consumer(settings, lose_the_broker) as consumer:
            await world.publish(*[sms(id_) for id_ in ids])
            await eventually(lambda: consumer.delivered == 50)
            assert consumer.dropped_repeats >= 10
    assert await world.handed_on() == Counter(ids)
    assert await world.depth() == 0


async def test_of_an_envelope_that_repeats_in_part_the_rest_is_handed_on(world: World) -> None:
    ids = numbered(12)
    await world.publish(*[sms(id_) for id_ in ids[:4]])
    await world.publish([sms(id_) for id_ in ids[2:10]], message_type="sms.batch.v1")
    await world.publish([sms(id_) for id_ in [*ids[8:], ids[11]]], message_type="sms.batch.v1")
    async with open_consumer(world.settings(group_size=1)) as consumer:  # each envelope in a group of its own
        await eventually(lambda: seen(consumer) == 17)
        assert (consumer.delivered, consumer.dropped_repeats) == (12, 5)
    assert await world.handed_on() == Counter(ids)


async def test_what_is_too_old_goes_to_the_dead_letters_with_one_warning_a_group(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    envelopes = [
        [sms("old00001", age_s=7200), sms("old00002", age_s=7200)],
        [sms("old00003", age_s=1900), sms("young001", age_s=60)],
        [sms("young002"), sms("young003")],
    ]
    await world.publish(sms("old00000", age_s=1801), sms("young000", age_s=1700), sms("new00000"))
    await world.publish(*envelopes, message_type="sms.batch.v1")
    async with open_consumer(world.settings(group_wait_s=1.0)) as consumer:
        await eventually(lambda: seen(consumer) == 9)
        assert (consumer.delivered, consumer.dropped_repeats, consumer.too_old) == (5, 0, 4)
        await eventually(lambda: consumer.dead_lettered == 3)
    assert await world.handed_on() == Counter(["young000", "new00000", "young001", "young002", "young003"])
    assert await world.depth() == 0
    dead = [await world.dead_letter() for _ in range(3)]
    # One AMQP message has one settlement, so the whole envelope goes with its old SMS.
    assert sorted(dead) == [["old00000"], ["old00001", "old00002"], ["old00003", "young001"]]
    [warning] = [record for record in caplog.records if "dead letters" in record.getMessage()]
    assert warning.levelname == "WARNING"
    assert re.search(r"^4 SMS .* more than 1800 s ago, the oldest 72\d\d s ago$", warning.getMessage())


async def test_an_old_repeat_of_what_was_handed_on_is_dropped(world: World) -> None:
    async with open_consumer(world.settings()) as consumer:
        await world.publish(sms("AbC12345", age_s=1700), sms("AbC12346", age_s=1900), sms("AbC12346"))
        await eventually(lambda: consumer.delivered == 2)
        await world.publish(sms("AbC12345", age_s=1900))
        await world.publish([sms("AbC12346", age_s=1900), sms("AbC12347")], message_type="sms.batch.v1")
        await eventually(lambda: seen(consumer) == 6)
        assert (consumer.delivered, consumer.dropped_repeats, consumer.dead_lettered) == (3, 3, 0)
    assert await world.handed_on() == Counter(["AbC12345", "AbC12346", "AbC12347"])
    assert await world.depth() == await world.depth(world.dead) == 0


async def test_what_becomes_too_old_in_an_outage_goes_to_the_dead_letters(world: World) -> None:
    proxy, url = proxy_for(world.database_url)
    async with proxy:
        proxy.refuse()
        settings = world.settings(database_url=url.format(port=proxy.port), max_age_s=1.0, database_timeout_s=1.0)
        async with open_consumer(settings) as consumer:
            await world.publish(sms("AbC12345"))
            await asyncio.sleep(1.1)
            assert consumer.dead_lettered == 0
            proxy.pass_through()
            await eventually(lambda: consumer.dead_lettered == 1)
    assert await world.dead_letter() == ["AbC12345"]
    assert not await world.handed_on()


POISON: list[tuple[str | None, Any]] = [
    ("sms.v1", b"no JSON"),
    ("sms.v1", b"\xff\xfe"),
    ("sms.v1", b"[" * 100_000),
    ("sms.v1", b""),
    ("sms.v1", [sms("AbC12345")]),
    ("sms.v1", {"id": "AbC12345"}),
    ("sms.v1", sms("AbC12345", body=None)),
    ("sms.v1", sms("AbC\x0012345")),
    ("sms.v1", sms("AbC12345", to="4155551234")),
    ("sms.v1", sms("AbC12345", accepted_at="2026-11-23T11:00:00")),
    ("sms.v1", b'{"body": "\\ud800"}'),
    ("sms.batch.v1", sms("AbC12345")),
    ("sms.batch.v1", []),
    ("sms.batch.v1", [sms("AbC12345"), {}]),
    ("sms.v2", sms("AbC12345")),
    (None, sms("AbC12345")),
]


async def test_poison_goes_to_the_dead_letters_and_costs_no_neighbour(world: World) -> None:
    ids = numbered(len(POISON))
    for id_, (message_type, payload) in zip(ids, POISON, strict=True):
        await world.publish(sms(id_))
        await world.publish(payload, message_type=message_type)
    async with open_consumer(world.settings()) as consumer:
        await eventually(lambda: consumer.delivered == len(ids) and consumer.dead_lettered == len(POISON))
    await until_equal(lambda: world.depth(world.dead), len(POISON))
    assert await world.handed_on() == Counter(ids)
    assert await world.depth() == 0


async def test_a_group_of_nothing_but_poison_is_settled(world: World) -> None:
    await world.publish(b"", b"")
    async with open_consumer(world.settings()) as consumer:
        await eventually(lambda: consumer.dead_lettered == 2)
        await world.publish(sms("AbC12345"))
        await eventually(lambda: consumer.delivered == 1)
    assert await world.depth() == 0


@pytest.mark.parametrize("outage", ["refused", "reset", "black hole"])
async def test_an_outage_of_the_database_loses_and_doubles_nothing(world: World, outage: str) -> None:
    ids = numbered(200)
    proxy, url = proxy_for(world.database_url)
    is_cut = asyncio.Event()

    async def lose_the_database(connection: asyncpg.Connection, messages: list[Sms]) -> None:
        if consumer.delivered >= 50 and not is_cut.is_set():
            is_cut.set()
            if outage == "black hole":
                proxy.black_hole()  # in the middle of a transaction that holds ids
            else:
                proxy.refuse()
                proxy.reset()
        await insert_deliveries(connection, messages)

    async with proxy:
        settings = world.settings(
            database_url=url.format(port=proxy.port), group_size=25, prefetch=50, database_timeout_s=1.0
        )
        async with open_consumer(settings, lose_the_database) as consumer:
            await world.publish(*[sms(id_) for id_ in ids])
            await eventually(is_cut.is_set)
            await asyncio.sleep(1.5)  # long enough for an ack that must not come
            in_table = (await world.handed_on()).total()
            assert in_table < 200
            # 50 at most are with the consumer; all others were either committed, or still wait in the queue.
            assert await world.depth() >= 200 - in_table - 50
            if outage == "reset":
                proxy.reset()
            proxy.pass_through()
            await world.wait_handed_on(200)
    assert await world.handed_on() == Counter(ids)
    assert await world.depth() == 0


async def test_stopped_during_an_outage_it_acks_nothing(world: World) -> None:
    proxy, url = proxy_for(world.database_url)
    async with proxy:
        proxy.refuse()
        await world.publish(*[sms(id_) for id_ in numbered(10)])
        async with open_consumer(world.settings(database_url=url.format(port=proxy.port))):
            await until_equal(world.depth, 0)  # all are with the consumer
    await until_equal(world.depth, 10)


async def test_sigterm_finishes_the_group_and_leaves_the_rest(world: World) -> None:
    ids = numbered(400)
    await world.publish(*[sms(id_) for id_ in ids])
    process = await start_process(world.settings(group_size=5, prefetch=10))
    try:
        await world.wait_handed_on(20)
    finally:
        assert await end(process, signal.SIGTERM) == 0
    done = await world.handed_on()
    assert done.total() < 400
    await until_equal(world.depth, 400 - done.total())  # what was handed on was acked too
    async with open_consumer(world.settings()) as consumer:
        await eventually(lambda: seen(consumer) == 400 - done.total())
        assert consumer.dropped_repeats == 0
    assert await world.handed_on() == Counter(ids)


async def test_a_queue_that_is_not_there_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.channel.queue_delete(world.queue)
    async with open_consumer(world.settings()) as consumer:
        await asyncio.sleep(0.3)
        await world.declare_queue(world.queue)
        await world.publish(sms("AbC12345"))
        await eventually(lambda: consumer.delivered == 1)
        caplog.clear()
        await world.channel.queue_delete(world.queue)  # the broker cancels the consumer
        await eventually(lambda: "NOT_FOUND" in caplog.text)
        assert "start `python -m gateway serve`, or run `python -m gateway declare`" in caplog.text
        await world.declare_queue(world.queue)
        await world.publish(sms("AbC12346"))
        await eventually(lambda: consumer.delivered == 2)


async def test_a_broker_lost_while_nothing_comes_is_found_again(world: World) -> None:
    proxy, url = proxy_for(world.amqp_url)
    async with proxy, open_consumer(world.settings(amqp_url=url.format(port=proxy.port))) as consumer:
        await until_equal(world.consumers, 1)
        proxy.reset()
        await world.publish(sms("AbC12345"))
        await eventually(lambda: consumer.delivered == 1)


async def test_it_goes_on_to_the_next_node(world: World) -> None:
    async with open_consumer(world.settings(amqp_url=f"{NOWHERE},{world.amqp_url}")) as consumer:
        await world.publish(sms("AbC12345"))
        await eventually(lambda: consumer.delivered == 1)


async def test_it_waits_between_attempts_but_not_when_it_is_stopped(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "RETRY_DELAYS_S", (60.0, 60.0))
    async with asyncio.timeout(30), open_consumer(world.settings(amqp_url=NOWHERE)):
        await eventually(lambda: "cannot consume" in caplog.text)
        await asyncio.sleep(0.2)
        assert caplog.text.count("cannot consume") == 1


@pytest.mark.parametrize("missing", ["amqp_url", "database_url"])
async def test_each_failure_in_a_row_makes_the_delay_longer(
    world: World, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    failures: list[int] = []

    def delay_s(count: int) -> float:
        failures.append(count)
        return 0.01

    monkeypatch.setattr(consumer_module, "_retry_delay_s", delay_s)
    nowhere = {"amqp_url": NOWHERE, "database_url": "postgres://127.0.0.1:1/"}
    await world.publish(sms("AbC12345"))
    async with open_consumer(world.settings(**{missing: nowhere[missing]})):
        await eventually(lambda: len(failures) > 2)
    assert failures[:3] == [1, 2, 3]


def test_delays_double_up_to_the_longest() -> None:
    for failures, longest_s in [(1, 0.2), (2, 0.4), (3, 0.8), (5, 3.0), (2_000, 3.0)]:
        delays_s = [consumer_module._retry_delay_s(failures) for _ in range(300)]
        assert 0.1 <= min(delays_s) <= 0.5
        assert 0.8 * longest_s <= max(delays_s) <= longest_s


async def test_stopped_while_it_subscribes_it_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Consumer(world.settings())

    async def connect(*arguments: Any, **options: Any) -> Any:
        assert options["heartbeat"] == 10
        consumer.stop()
        return await aio_pika_connect(*arguments, **options)

    aio_pika_connect = aio_pika.connect
    monkeypatch.setattr(aio_pika, "connect", connect)
    async with asyncio.timeout(30):
        await consumer.run()


async def test_cancelled_while_it_waits_for_the_broker_it_is_cancelled(world: World) -> None:
    proxy, url = proxy_for(world.amqp_url)
    async with proxy:
        proxy.black_hole()
        running = asyncio.create_task(Consumer(world.settings(amqp_url=url.format(port=proxy.port))).run())
        await asyncio.sleep(0.3)
        running.cancel()
        async with asyncio.timeout(30):
            await asyncio.wait([running])
        assert running.cancelled()


async def test_a_cancelled_waiter_of_the_library_is_a_lost_broker() -> None:
    with pytest.raises(BrokerLost):
        async with consumer_module._broker_errors_are_loss():
            raise asyncio.CancelledError


async def test_an_unknown_error_ends_the_consumer_and_acks_nothing(world: World) -> None:
    has_failed = asyncio.Event()

    async def fail(_connection: asyncpg.Connection, _messages: list[Sms]) -> None:
        has_failed.set()
        raise LookupError

    await world.publish(sms("AbC12345"))
    running = asyncio.create_task(Consumer(world.settings(), fail).run())
    async with asyncio.timeout(30):
        await asyncio.wait([running])
    assert isinstance(running.exception(), LookupError)
    has_failed.clear()
    with pytest.raises(LookupError):
        async with open_consumer(world.settings(), fail):
            await has_failed.wait()
    await until_equal(world.depth, 1)
    assert not await world.handed_on()


async def test_a_stream_is_refused(world: World) -> None:
    await world.channel.queue_delete(world.queue)
    await world.declare_queue(world.queue, "stream")
    running = asyncio.create_task(Consumer(world.settings()).run())
    # Again and again: by default a stream's consumer gets only what comes after it.
    await until(lambda: world.publish(sms("AbC12345")), lambda _: running.done())
    with pytest.raises(UnsupportedQueue, match="stream"):
        await running
    assert not await world.handed_on()


async def test_unusable_settings_end_it_with_one_line_and_status_2() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.consumer"),
        env=os.environ | {"CONSUMER_DATABASE_URL": "postgres://u@h/d", "CONSUMER_AMQP_URL": "", "CONSUMER_QUEU": "x"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    warning, error = errors.decode().splitlines()
    assert process.returncode == 2
    assert warning.endswith("WARNING CONSUMER_QUEU is no setting of the consumer; is it misspelt?")
    assert error == "error: Set CONSUMER_AMQP_URL to a URL: amqp://user:password@host/name"


def psql_of_the_readme() -> tuple[str, Path]:
    """Return the command that shows the deliveries, and the folder of the psql that scripts/setup installs."""
    readme = (Path(__file__).parents[2] / "examples/consumer/README.md").read_text()
    (command,) = re.findall(r"^psql .+$", readme, re.MULTILINE)
    (psql,) = re.findall(r"`\.venv/(\S+/psql)`", readme)
    (folder,) = {path.parent for path in Path(sys.prefix).glob(psql)}
    return command, folder


async def test_the_command_of_the_readme_shows_what_was_handed_on(world: World) -> None:
    command, folder = psql_of_the_readme()
    await world.publish(sms("AbC12345", body="Grüße"))
    async with open_consumer(world.settings()):
        await world.wait_handed_on(1)
    url = URL(world.database_url).with_query(sslmode="disable", options=f"-csearch_path={world.schema}")
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", command),
        env=os.environ | {"CONSUMER_DATABASE_URL": str(url), "PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
    )
    shown = (await process.communicate())[0].decode()
    assert all(value in shown for value in ("AbC12345", "+18005551000", "+14155551234", "Grüße")), shown


async def test_a_sweep_removes_what_expired_and_nothing_else(world: World) -> None:
    async with Inbox(world.settings()) as inbox:
        assert await inbox.sweep() == 0
        await remember(world, "expired", 15_000, "-1 second")  # more than one transaction of it
        await remember(world, "valid", 10, "1 hour")
        assert await inbox.sweep() == 15_000
    assert await world.database.fetchval("SELECT count(*) FROM inbox") == 10


async def test_a_sweep_passes_over_what_another_is_removing(world: World) -> None:
    async with Inbox(world.settings(database_timeout_s=5.0)) as inbox:
        await inbox.sweep()
        await remember(world, "expired", 10, "-1 second")
        async with world.database.transaction():
            await world.database.execute("SELECT FROM inbox WHERE id < 'expired5' FOR UPDATE")
            assert await inbox.sweep() == 5  # or TimeoutError, had it waited
        assert await inbox.sweep() == 5


async def test_the_consumer_sweeps_by_itself(world: World) -> None:
    async with open_consumer(world.settings(sweep_interval_s=0.05)) as consumer:
        await world.publish(sms("AbC12345"))
        await eventually(lambda: consumer.delivered == 1)
        await remember(world, "expired", 10, "-1 second")
        await until_equal(lambda: world.database.fetchval("SELECT count(*) FROM inbox"), 1)


async def remember(world: World, prefix: str, count: int, expiry: str) -> None:
    await world.database.execute(
        "INSERT INTO inbox SELECT $1 || number, now() + $3::text::interval FROM generate_series(0, $2 - 1) AS number",
        *[prefix, count, expiry],
    )


async def test_a_commit_without_an_answer_is_tried_again_and_finds_its_own_ids(world: World) -> None:
    proxy, url = proxy_for(world.database_url)
    async with proxy, Inbox(world.settings(database_url=url.format(port=proxy.port), database_timeout_s=1.0)) as inbox:
        await inbox.sweep()

        async def lose_the_answer(connection: asyncpg.Connection, messages: list[Sms]) -> None:
            await insert_deliveries(connection, messages)
            proxy.limit(len("COMMIT") + 6)  # a Query message: type, length, text, NUL; then silence

        message = msgspec.convert(sms("AbC12345"), Sms)
        inbox._deliver = lose_the_answer
        with pytest.raises(DATABASE_ERRORS):
            await inbox.hand_on({message.id: message})
        await world.wait_handed_on(1)
        proxy.pass_through()
        assert await inbox.hand_on({message.id: message}) == 0
    assert await world.handed_on() == Counter(["AbC12345"])


async def test_a_gap_in_the_deliveries_ends_the_subscription() -> None:
    """An ack covers all before it, and so would cover messages that never arrived."""
    subscription = _Subscription()
    for tag in (1, 3):
        message = Mock(spec=AbstractIncomingMessage, headers={}, delivery_tag=tag)
        await subscription.receive(message)
    assert (await subscription.next_message()) is not None
    with pytest.raises(BrokerLost, match="delivery 3 came after 1"):
        await subscription.next_message()


async def test_sweeps_go_on_after_an_outage_of_the_database() -> None:
    sweeps = iter([OSError("away"), 0])
    is_swept = asyncio.Event()

    async def sweep() -> int:
        match next(sweeps, None):
            case None:
                is_swept.set()
            case OSError() as error:
                raise error
        return 0

    consumer = Consumer(Settings(database_url="unused", amqp_url=NOWHERE, sweep_interval_s=0.001))
    sweeping = asyncio.create_task(consumer._keep_sweeping(Mock(sweep=sweep)))
    async with asyncio.timeout(5.0):
        await is_swept.wait()
    sweeping.cancel()


async def test_two_consumers_with_the_same_ids_in_another_order_do_not_deadlock(world: World) -> None:
    settings = world.settings()
    async with Inbox(settings) as one, Inbox(settings) as other:
        await one.hand_on({})
        for attempt in range(5):
            ids = [f"{attempt}{number:07}" for number in range(2_000)]
            group = {id_: msgspec.convert(sms(id_), Sms) for id_ in ids}
            backwards = {id_: group[id_] for id_ in reversed(ids)}
            assert sum(await asyncio.gather(one.hand_on(group), other.hand_on(backwards))) == len(ids)


async def test_the_server_ends_a_transaction_whose_consumer_is_lost(world: World) -> None:
    async with Inbox(world.settings(database_timeout_s=3.0)) as inbox, inbox._transaction() as connection:
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            assert await connection.fetchval("SELECT current_setting($1)", name) == "3s"


async def test_replicas_that_start_at_once_make_the_tables_once(world: World) -> None:
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(Inbox(world.settings())) for _ in range(4)]
        assert await asyncio.gather(*(replica.hand_on({}) for replica in replicas)) == [0] * 4
