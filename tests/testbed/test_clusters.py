"""RabbitMQ clusters and PostgreSQL pairs form, survive the loss of a member, and become whole again."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractChannel

from testbed import PostgresPair, RabbitMQ, RabbitMQCluster
from tests.support.eventually import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    with RabbitMQCluster(3) as running:
        yield running


@asynccontextmanager
async def channel_to(node: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(node.url, timeout=30) as connection, connection.channel() as channel:
        yield channel


async def declare_and_publish(node: RabbitMQ, queue: str) -> None:
    """Make a quorum queue with one confirmed message."""
    async with channel_to(node) as channel:
        await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        await publish(channel, queue)


async def publish(channel: AbstractChannel, queue: str, timeout: float = 30.0) -> None:
    message = aio_pika.Message(b"kept", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    await channel.default_exchange.publish(message, queue, timeout=timeout)


async def take(node: RabbitMQ, queue: str) -> bytes:
    """Return the body of a queue's first message, taken through one node."""
    async with channel_to(node) as channel:
        declared = await channel.declare_queue(queue, passive=True)
        message = await declared.get(no_ack=True, timeout=30)
        return message.body


async def await_other_leader(cluster: RabbitMQCluster, queue: str, former: RabbitMQ) -> RabbitMQ:
    async with asyncio.timeout(60):
        while (leader := await asyncio.to_thread(cluster.leader_of, queue)) is former:
            pass
    return leader


async def test_a_quorum_queue_has_a_copy_on_every_node(cluster: RabbitMQCluster) -> None:
    await declare_and_publish(cluster.nodes[1], "copies")
    assert set(await asyncio.to_thread(cluster.members_of, "copies")) == set(cluster.nodes)
    assert await asyncio.to_thread(cluster.leader_of, "copies") in cluster.nodes
    assert cluster.url == ",".join(node.url for node in cluster.nodes)


async def test_a_killed_leader_is_followed_by_another_and_comes_back(cluster: RabbitMQCluster) -> None:
    await declare_and_publish(cluster.nodes[0], "killed")
    leader = await asyncio.to_thread(cluster.leader_of, "killed")
    await asyncio.to_thread(leader.kill)
    assert not leader.is_serving
    follower = await await_other_leader(cluster, "killed", leader)
    assert await take(follower, "killed") == b"kept"
    await asyncio.to_thread(leader.start)
    await asyncio.to_thread(cluster.wait_until_whole)


async def test_a_paused_leader_is_followed_by_another_and_the_cluster_heals(cluster: RabbitMQCluster) -> None:
    await declare_and_publish(cluster.nodes[0], "paused")
    leader = await asyncio.to_thread(cluster.leader_of, "paused")
    leader.pause()
    assert not leader.is_serving
    follower = await await_other_leader(cluster, "paused", leader)
    leader.resume()
    await asyncio.to_thread(cluster.heal)
    assert all(node.is_serving for node in cluster.nodes)
    assert await take(follower, "paused") == b"kept"
    await declare_and_publish(leader, "healed")
    assert await take(follower, "healed") == b"kept"


@pytest.mark.parametrize("resource", ["memory", "disk"])
async def test_an_alarm_on_one_node_blocks_publishers_on_another(cluster: RabbitMQCluster, resource: Any) -> None:
    await declare_and_publish(cluster.nodes[0], resource)
    await asyncio.to_thread(cluster.nodes[0].alarm, True, resource)
    async with channel_to(cluster.nodes[1]) as channel:
        with pytest.raises(TimeoutError):
            await publish(channel, resource, timeout=1.0)
        await asyncio.to_thread(cluster.nodes[0].alarm, False, resource)
        await publish(channel, resource)


async def fetch(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url, target_session_attrs="primary", timeout=30)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("synchronous", [False, True])
async def test_a_promoted_standby_is_found_by_the_same_url(synchronous: bool) -> None:
    with PostgresPair(fsync=False, synchronous=synchronous) as pair:
        primary, standby = pair.primary, pair.standby
        assert await fetch(pair.url, "SELECT inet_server_port()") == primary.port.number
        expected = "sync" if synchronous else "async"
        await eventually(lambda: primary.execute("SELECT sync_state FROM pg_stat_replication") == expected)
        await fetch(pair.url, "CREATE TABLE kept (x int)")
        await fetch(pair.url, "INSERT INTO kept VALUES (1)")
        pair.wait_for_replay()
        standing = await asyncpg.connect(standby.url)
        assert await standing.fetchval("SELECT x FROM kept") == 1
        await standing.close()

        pair.promote()
        assert (pair.primary, pair.standby) == (standby, primary)
        assert await fetch(pair.url, "SELECT inet_server_port()") == standby.port.number
        await fetch(pair.url, "INSERT INTO kept VALUES (2)")

        pair.rebuild_standby()
        pair.promote()
        assert await fetch(pair.url, "SELECT inet_server_port()") == primary.port.number
        assert await fetch(pair.url, "SELECT sum(x) FROM kept") == 3
