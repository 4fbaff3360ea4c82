"""A publisher with two connections, under confirms and losses in any order. Promises 2 to 4.

Each outcome is compared with what the broker knows of all copies of the message. Time plays no part: the waits that no
event ends are ended by give_up().
"""

import asyncio
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from gateway.amqp import connection as connection_module
from gateway.amqp import publisher as publisher_module
from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import PublishConnection
from gateway.amqp.frames import Blocked, ChannelClosed, Destination, PublishFramer, Returned, Settled
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.publisher import Publisher
from gateway.errors import QueueUnavailable
from tests.properties import MORE
from tests.support.publishing import settings_for

SIZES, LIMIT = (5, 100, 900), 200  # bytes of payloads
REFUSED_SIZE = f"406 PRECONDITION_FAILED - message size 900 is larger than configured max size {LIMIT}"
SETTINGS = settings_for("amqp://unused/", amqp_connections=2)
EVENTS = (*["publish"] * 3, *["settle"] * 5, "block", "close socket", "close channel", "refuse size", "lose", "replace")


class Socket:
    """Stands in for TappedTransport. It takes every write until it is closing."""

    close_reply = ""

    def __init__(self) -> None:
        self.ids: list[str] = []  # of the messages on the open channel, by delivery tag
        self.is_closing = False

    def write(self, buffer: bytes) -> None:
        if self.is_closing:
            raise ConnectionResetError
        self.ids += [found.decode() for found in re.findall(rb"[0-9]{8}", buffer)]

    def abort(self) -> None:
        self.is_closing = True

    def report_to(self, *_: object) -> None:
        pass

    def listen_to(self, _channel: int | None) -> None:
        pass


class Channel:
    """A publish connection, and the broker's side of its channel."""

    def __init__(self) -> None:
        self.connection = PublishConnection(SETTINGS, URL("amqp://unused/"), lambda _late: None)
        self.socket = self.connection._transport = Socket()  # type: ignore[assignment]
        self.connection._framers = [PublishFramer(Destination("", "queue", "sms.v1"), 1, 0)]
        self.acked: dict[str, bool] = {}  # by id; False: nacked
        self.returned: set[str] = set()

    def settle(self, number: int) -> None:
        """Settle one or several messages that are not settled, some after a return; two in three by an ack."""
        open_tags = [tag for tag, each in enumerate(self.socket.ids, 1) if each not in self.acked]
        if self.connection.is_lost or not open_tags:
            return
        tag, is_acked, multiple = open_tags[number % len(open_tags)], number % 3 > 0, number % 2 > 0
        if number % 7 == 0:
            self.returned.add(self.socket.ids[tag - 1])
            self.connection._on_event(Returned(self.socket.ids[tag - 1]))
        for each in [each for each in open_tags if each < tag] * multiple + [tag]:
            self.acked[self.socket.ids[each - 1]] = is_acked
        self.connection._on_event(Settled(is_acked, tag, multiple))

    def is_queued(self, message_id: str, size: int) -> bool | None:
        """Return what the broker knows of a message that was written here; None: it may be queued."""
        if message_id in self.returned:
            return False
        is_refused = self.connection.has_refused_size and size > LIMIT
        return self.acked.get(message_id, False if is_refused else None)


class Model:
    """The publisher, all channels so far, and the running publishes."""

    def __init__(self) -> None:
        self.publisher = Publisher(SETTINGS)
        self.channels: list[Channel] = []
        self.sizes: dict[str, int] = {}  # by id
        self.publishes: list[asyncio.Task[None]] = []
        for _ in range(2):
            self.open()

    def open(self) -> None:
        self.channels.append(Channel())
        self.publisher.connections.open.append(self.channels[-1].connection)
        self.publisher.connections._changed.set()

    def happen(self, event: str, number: int) -> None:
        channel = self.channels[-1 - number % min(3, len(self.channels))]
        in_use = channel.connection in self.publisher.connections.open
        if event == "publish":
            self.publishes.append(asyncio.create_task(self.publish(1 + number % 4)))
        elif event == "settle":
            channel.settle(number)
        elif event == "block":
            channel.connection._on_event(Blocked(number % 2 > 0))
        elif event == "close socket":
            channel.socket.abort()
        elif in_use:
            actions: dict[str, Callable[[], object]] = {
                "close channel": lambda: channel.connection._on_event(ChannelClosed("404 NOT_FOUND")),
                "refuse size": lambda: channel.connection._on_event(ChannelClosed(REFUSED_SIZE)),
                "lose": channel.connection.abort,
                "replace": lambda: self.publisher.connections._draining.add(channel.connection),
            }
            actions[event]()
            self.publisher.connections.open.remove(channel.connection)
            channel.connection.refuse_waiting()
            self.open()

    async def publish(self, count: int) -> None:
        """Publish a batch, and compare its outcomes with what the broker knows at that moment."""
        ids = [f"{len(self.sizes) + number:08}" for number in range(count)]
        self.sizes |= {each: SIZES[(len(self.sizes) + number) % 3] for number, each in enumerate(ids)}
        batch = Outgoing(ids, [b"x" * self.sizes[each] for each in ids])
        try:
            outcomes = await self.publisher.publish(batch)
        except QueueUnavailable:
            assert not any(self.copies(each) for each in ids), "what is refused was never written"
            return
        for message_id, outcome in zip(ids, outcomes, strict=True):
            self.check(self.copies(message_id), Outcome(outcome))

    def copies(self, message_id: str) -> list[bool | None]:
        """Return what the broker knows of each copy of a message."""
        size = self.sizes[message_id]
        return [each.is_queued(message_id, size) for each in self.channels if message_id in each.socket.ids]

    def check(self, copies: list[bool | None], outcome: Outcome) -> None:
        match outcome:
            case Outcome.ACKED:
                assert True in copies
            case Outcome.NACKED | Outcome.RETURNED:
                assert set(copies) == {False}, "each copy was refused for certain"
            case Outcome.UNKNOWN:
                assert None in copies, "at least one copy may be queued"
            case _:
                assert outcome == Outcome.TOO_LARGE
                assert set(copies) <= {False}, "each copy that was written was refused for certain"
        assert len(copies) <= 2 or any(each.connection.has_refused_size for each in self.channels)


async def _run(events: list[tuple[str, int]]) -> None:
    model = Model()
    for event, number in events:
        model.happen(event, number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    model.publisher.give_up()
    await asyncio.gather(*model.publishes)
    assert model.publisher._load_without_connection == 0
    for channel in model.channels:
        channel.connection.abort()
    assert (model.publisher.unconfirmed_messages, model.publisher.unconfirmed_bytes) == (0, 0)


@settings(derandomize=MORE == 1, max_examples=400 * MORE, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 10_000)), max_size=60))
def test_an_outcome_is_true_of_all_copies_of_its_message(events: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_module, "SOCKET_BYTES", 1_500)
        patch.setattr(publisher_module, "SHARED_CONNECTION_BYTES", 500)
        asyncio.run(_run(events))
