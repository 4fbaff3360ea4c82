"""The publisher's connections: choice for a batch, nodes, broken handshakes, heartbeats, reconnecting."""

import asyncio

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import reconnection
from gateway.amqp.reconnection import reconnect_delay_s
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    Script,
    close_connection,
    connected,
    drop,
    hang_up,
    is_idle,
    publish,
    send_garbage,
    started,
    two_brokers,
)
from tests.support.scripted_broker import ScriptedBroker, Session
from tests.support.tcp_proxy import TcpProxy


async def test_small_batches_in_flight_together_share_a_connection(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_connections=2) as publisher:
        assert [list(outcomes) for outcomes in await asyncio.gather(*(publish(publisher, 1) for _ in range(6)))] == [
            [ACKED]
        ] * 6
    assert len({message.connection for message in broker.published}) == 1


async def test_large_batches_go_to_the_connection_with_less_unconfirmed(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        large = [b" " * 70_000]
        batches = [publish(publisher, large, f"{n}") for n in range(6)]
        await broker.wait_published(6)
        by_connection = [message.connection for message in broker.published]
        assert by_connection.count(0) == by_connection.count(1) == 3
        for session in broker.sessions:
            session.ack(3, multiple=True)
        assert [list(outcomes) for outcomes in await asyncio.gather(*batches)] == [[ACKED]] * 6


# Nodes


async def test_connections_are_spread_over_the_nodes() -> None:
    async with two_brokers() as (one, other), connected(one.url, other.url, amqp_connections=2):
        assert (len(one.sessions), len(other.sessions)) == (1, 1)


@pytest.mark.parametrize("is_reset", [False, True], ids=["refuses", "resets"])
async def test_when_one_node_refuses_the_next_is_tried(is_reset: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with two_brokers() as (one, other):
        if is_reset:
            one.refuse_connections = True
        else:
            await one.stop_listening()
        async with connected(one.url, other.url) as publisher:
            assert list(await publish(publisher, 1)) == [ACKED]
        assert (len(one.sessions), len(other.sessions)) == (0, 1)
        assert f"cannot connect to the broker at 127.0.0.1:{one.port}" in caplog.text
        assert "guest" not in caplog.text


async def test_after_a_loss_the_next_node_comes_first() -> None:
    async with two_brokers() as (one, other), connected(one.url, other.url) as publisher:
        one.sessions[0].drop()
        await other.wait_opened(1)
        await eventually(publisher.connections.is_usable)
        assert len(one.sessions) == 1


async def test_a_node_that_does_not_answer_costs_one_connect_timeout() -> None:
    async with two_brokers() as (one, other), TcpProxy("127.0.0.1", one.port) as proxy:
        proxy.black_hole()
        hole = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        async with connected(hole, other.url, amqp_connect_timeout_s=0.3) as publisher:
            assert list(await publish(publisher, 1)) == [ACKED]
            assert proxy.accepted == 1


# The handshake


HANDSHAKE: list[type[Frame]] = [
    commands.Connection.StartOk,
    commands.Connection.TuneOk,
    commands.Connection.Open,
    commands.Channel.Open,
    commands.Exchange.Declare,
    commands.Queue.Declare,
    commands.Queue.Bind,
    commands.Channel.Close,  # of the channel on which the topology was declared
    commands.Confirm.Select,
]


def say_nothing(session: Session) -> None:
    """Answer nothing: the connect timeout has to end it."""


@pytest.mark.parametrize("broken", HANDSHAKE, ids=lambda method: method.__name__)
@pytest.mark.parametrize("trouble", [drop, hang_up, close_connection, send_garbage, say_nothing])
async def test_a_handshake_broken_at_any_step_is_tried_again(
    broker: ScriptedBroker, broken: type[Frame], trouble: Script
) -> None:
    is_broken = False

    def break_the_first(session: Session, channel: int, method: Frame) -> bool:
        nonlocal is_broken
        if session.index > 0:
            return False
        if not is_broken and isinstance(method, broken):
            is_broken = True
            trouble(session)
            return True
        return is_broken and not isinstance(method, commands.Connection.Close | commands.Connection.CloseOk)

    broker.on_method = break_the_first
    async with connected(broker.url, amqp_connect_timeout_s=0.5) as publisher:
        assert len(broker.sessions) == 2
        assert list(await publish(publisher, 1)) == [ACKED]


async def test_a_handshake_that_comes_byte_by_byte_succeeds(broker: ScriptedBroker) -> None:
    """TCP guarantees no more: the first frame has some 500 bytes, and may arrive in two reads."""
    broker.write_size = 1
    async with started(broker.url) as publisher:
        await eventually(publisher.connections.is_usable, timeout=5.0)
        assert list(await publish(publisher, 2)) == [ACKED] * 2
    assert len(broker.sessions) == 1


# Heartbeats


async def test_a_broker_that_sends_acks_but_no_heartbeats_is_alive(broker: ScriptedBroker) -> None:
    """A broker busy with confirms sends no heartbeats. aiormq sees no confirms, and is told that the peer lives."""
    broker.send_heartbeats = False
    async with connected(broker.url, amqp_heartbeat_s=1) as publisher:
        loop = asyncio.get_running_loop()
        until = loop.time() + 3 * (1 + 1) + 1.4  # the grace, and the next time that aiormq looks
        while loop.time() < until:
            assert list(await publish(publisher, 1)) == [ACKED]
            await asyncio.sleep(0.2)
        assert publisher.connections.is_usable()
        assert len(broker.sessions) == 1


async def test_a_silent_peer_is_dead_soon_enough_to_publish_again_elsewhere(broker: ScriptedBroker) -> None:
    """After the crash of a machine nothing is closed. The missing heartbeat shows the loss before the deadline."""
    async with TcpProxy("127.0.0.1", broker.port) as proxy:
        url = broker.url.replace(f":{broker.port}", f":{proxy.port}")
        async with connected(url, amqp_heartbeat_s=1) as publisher:
            assert list(await publish(publisher, 1, "A")) == [ACKED]
            proxy.black_hole()
            batch = publish(publisher, 2, "B")
            await asyncio.sleep(0.1)
            proxy.pass_through()  # for new connections
            assert list(await batch) == [ACKED] * 2
            assert publisher.republished == 2
            assert len(broker.sessions) == 2
            assert is_idle(publisher)


async def test_a_quiet_peer_that_sends_heartbeats_is_not_dead(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_heartbeat_s=1) as publisher:
        await asyncio.sleep(1 + reconnection.HEARTBEAT_MARGIN_S + 1.0)
        assert publisher.connections.is_usable()
        assert len(broker.sessions) == 1


# Reconnecting


def test_the_reconnect_delay_is_bounded_after_any_number_of_failures() -> None:
    shortest, longest = reconnection.RECONNECT_DELAYS_S
    assert all(shortest <= reconnect_delay_s(failures) <= longest for failures in (0, 1, 10, 1_100, 10**6))
