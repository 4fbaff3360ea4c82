"""The publisher writes a batch whole, in order, persistent and mandatory, in one write."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gateway.amqp.frames import PublishFramer
from gateway.amqp.outgoing import Outgoing
from tests.support.publishing import (
    ACKED,
    connected,
    ids,
    ids_of,
    is_idle,
    payloads,
    publish,
    publish_batch,
    scripted_broker,
    transport_of,
)
from tests.support.scripted_broker import ScriptedBroker


async def test_messages_arrive_whole_in_order_persistent_and_mandatory(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_exchange="my.exchange", amqp_queue="my.queue") as publisher:
        await publish(publisher, 3)
    assert ids_of(broker.published) == ids(3)
    assert [message.body for message in broker.published] == payloads(3)
    for message in broker.published:
        assert (message.exchange, message.routing_key, message.mandatory) == ("my.exchange", "my.queue", True)
        properties = message.properties
        assert (properties.delivery_mode, properties.content_type) == (2, "application/json")
        assert properties.message_type == "sms.v1"


async def test_a_payload_over_the_brokers_frame_size_takes_several_frames() -> None:
    """The broker closes a connection that sends it a larger frame than was agreed."""
    async with scripted_broker(frame_max=4_096) as broker, connected(broker.url) as publisher:
        large = [b"x" * 4_088, b"y" * 4_089, b"z" * 100_000, b"small"]
        assert list(await publish_batch(publisher, large)) == [ACKED] * 4
        assert [message.body for message in broker.published] == large
        assert [message.body_frames for message in broker.published] == [1, 2, 25, 1]


async def test_a_batch_of_a_thousand_is_one_write_and_one_future(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.mode = "silent"
    broker.on_publish = lambda session, message: session.ack(message.delivery_tag)
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        transport, loop = transport_of(connection), asyncio.get_running_loop()
        write, create_future = transport.write, loop.create_future
        writes: list[int] = []
        futures: list[object] = []

        def counting_write(data: bytes) -> None:
            writes.append(len(data))
            write(data)

        def counting_create_future() -> "asyncio.Future[Any]":
            if asyncio.current_task() is batch:
                futures.append(1)
            return create_future()

        monkeypatch.setattr(transport, "write", counting_write)
        monkeypatch.setattr(loop, "create_future", counting_create_future)
        batch = publish(publisher, 1_000)
        tasks = asyncio.all_tasks()
        assert list(await batch) == [ACKED] * 1_000
        assert len(writes) == 1
        assert len(futures) == 1
        assert asyncio.all_tasks() <= tasks, "no task was made for it"
    assert ids_of(broker.published) == ids(1_000)


async def test_a_batch_lays_out_the_headers_of_a_trace_for_its_own_shards_only(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 256 shards, a layout for each of them would hold up the event loop for 4 ms a request."""
    laid_out: list[PublishFramer] = []
    with_headers = PublishFramer.with_headers

    def counting_with_headers(framer: PublishFramer, headers: Mapping[str, str]) -> PublishFramer:
        laid_out.append(framer)
        return with_headers(framer, headers)

    monkeypatch.setattr(PublishFramer, "with_headers", counting_with_headers)
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    async with connected(broker.url, amqp_queue="q", queue_shards=8) as publisher:
        outgoing = Outgoing(ids(3), payloads(3), [2, 2, 5], headers)
        assert list(await publisher.publish(outgoing)) == [ACKED] * 3
    assert len(laid_out) == 2
    assert [message.routing_key for message in broker.published] == ["q.2", "q.2", "q.5"]
    assert [message.properties.headers for message in broker.published] == [headers] * 3


async def test_buffers_lost_on_their_way_to_the_socket_shift_no_confirm(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the ack of the next message would count for one that was never sent."""
    async with connected(broker.url, amqp_connections=1) as publisher:
        (connection,) = publisher.connections.open
        transport = transport_of(connection)
        write = transport.write

        def fail_once(data: bytes) -> None:
            monkeypatch.setattr(transport, "write", write)
            raise MemoryError

        monkeypatch.setattr(transport, "write", fail_once)
        lost = [publish(publisher, 1), publish(publisher, 1)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(8):
            outcomes = [await batch for batch in [*lost, publish(publisher, 1)]]
        assert b"".join(outcomes).count(ACKED) == len(broker.published) == 3


async def test_a_large_batch_whose_write_fails_half_way_is_unknown_and_published_again(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first messages may be queued, although the write has raised an error."""
    large = [b"x" * 1_000] * 100
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        transport = transport_of(connection)
        write = transport.write

        def fail_half_way(data: bytes) -> None:
            write(data[: len(data) // 2])
            raise MemoryError

        monkeypatch.setattr(transport, "write", fail_half_way)
        async with asyncio.timeout(8):
            assert list(await publish(publisher, large)) == [ACKED] * 100
        assert connection.is_lost
        assert publisher.republished == 100
        assert is_idle(publisher)
