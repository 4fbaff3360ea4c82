"""A publisher of a test's own, its batches, and a scripted broker that fails the test when it has reason to complain.

Every call of Publisher.publish in the tests of the publisher goes through publish_batch().
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import PublishConnection
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.publisher import Publisher
from gateway.config import Settings
from tests.support.eventually import eventually
from tests.support.scripted_broker import Published, ScriptedBroker, Session

ACKED, NACKED, RETURNED, UNKNOWN = Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN

Script = Callable[[Session], None]


@asynccontextmanager
async def scripted_broker(**options: Any) -> AsyncIterator[ScriptedBroker]:
    """Run a scripted broker, and fail at the end if a client has violated the protocol."""
    async with ScriptedBroker(**options) as scripted:
        yield scripted
        # aiormq sends Channel.Close once more if it is cancelled while it closes a channel: when a publisher is closed
        # in the middle of a reconnection.
        assert [found for found in scripted.violations if "got Channel.Close" not in str(found)] == []


@asynccontextmanager
async def two_brokers() -> AsyncIterator[tuple[ScriptedBroker, ScriptedBroker]]:
    """Run two scripted brokers, as two nodes."""
    async with scripted_broker() as one, scripted_broker() as other:
        yield one, other


def settings_for(*urls: str, **changes: Any) -> Settings:
    """Return settings for a publisher with one connection and no heartbeats in the way, some of them changed."""
    defaults: dict[str, Any] = {"amqp_connections": 1, "amqp_heartbeat_s": 600}
    return Settings(database_url="postgres://unused@localhost/x", amqp_url=",".join(urls), **(defaults | changes))


@asynccontextmanager
async def started(*urls: str, **changes: Any) -> AsyncIterator[Publisher]:
    """Start a publisher, which begins to connect; close it at the end."""
    publisher = Publisher(settings_for(*urls, **changes), first_node=0)
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def connected(*urls: str, **changes: Any) -> AsyncIterator[Publisher]:
    """Start a publisher and wait until all of its connections are up."""
    async with started(*urls, **changes) as publisher:
        await eventually(lambda: usable_connections(publisher) == changes.get("amqp_connections", 1))
        yield publisher


def usable_connections(publisher: Publisher) -> int:
    """Return how many connections would take a batch."""
    return sum(connection.is_usable() for connection in publisher.connections.open)


def transport_of(connection: PublishConnection) -> asyncio.Transport:
    """Return the transport that a connection writes to, for tests that count its writes."""
    transport = connection._transport._transport
    assert transport is not None
    return transport


def ids(count: int, batch: str = "A") -> list[str]:
    """Return the ids of a batch's messages: A0000001, A0000002 and so on."""
    return [f"{batch}{n:07}" for n in range(1, count + 1)]


def payloads(count: int) -> list[bytes]:
    """Return small payloads, each different."""
    return [b'{"n":%d}' % n for n in range(1, count + 1)]


async def publish_batch(
    publisher: Publisher,
    messages: int | Sequence[bytes],
    batch: str = "A",
    *,
    deadline: float | None = None,
) -> bytes:
    """Publish one batch, of `messages` small payloads or of the payloads given; return its outcomes."""
    bodies = payloads(messages) if isinstance(messages, int) else messages
    return await publisher.publish(Outgoing(ids(len(bodies), batch), bodies), deadline=deadline)


def publish(publisher: Publisher, messages: int | Sequence[bytes], batch: str = "A") -> "asyncio.Task[bytes]":
    """Start publish_batch() in a task of its own."""
    return asyncio.create_task(publish_batch(publisher, messages, batch))


async def publish_on(connection: PublishConnection, count: int, *, within_s: float) -> bytes:
    """Publish one batch on this connection, passing by the publisher's choice."""
    deadline = asyncio.get_running_loop().time() + within_s
    return await connection.publish(Outgoing(ids(count), payloads(count)), deadline)


def ids_of(published: list[Published]) -> list[str]:
    """Return the message ids that the broker received, in order."""
    return [message.properties.message_id or "" for message in published]


def is_idle(publisher: Publisher) -> bool:
    """Return True when nothing is unconfirmed."""
    return (publisher.unconfirmed_messages, publisher.unconfirmed_bytes) == (0, 0)


# Ways to lose a connection


def drop(session: Session) -> None:
    """Reset the TCP connection."""
    session.drop()


def hang_up(session: Session) -> None:
    """Close the TCP connection in order."""
    session.hang_up()


def close_channel(session: Session) -> None:
    """Close the channel with an error."""
    session.close_channel(404, "NOT_FOUND - no exchange 'sms.outbound' in vhost '/'")


def close_connection(session: Session) -> None:
    """Close the AMQP connection with an error."""
    session.close_connection(320, "CONNECTION_FORCED - broker forced connection closure")


def send_garbage(session: Session) -> None:
    """Send bytes that are no frame."""
    # Zeros: frames of length 0. Had it a large number where the length stands, aiormq would wait for its end.
    session.raw(b"\x00" * 40)
