"""Messages and consumers of the outbound queues and of the dead letters, asked from the broker every ASK_EVERY_S.

A passive declaration answers with both numbers, and changes nothing. If the broker refuses one, it closes the channel.
So the questions have a channel of their own, on an open publish connection. They are asked one at a time.

The numbers do not include messages that were delivered and not acked. A quorum queue whose leader does not answer
shows 0 and 0 (rabbit_quorum_queue.erl, stat). A stream keeps what was read: its length is no backlog.
"""

import asyncio
import logging

import aiormq.exceptions

from gateway.amqp.connection import PublishConnection
from gateway.amqp.reconnection import PublishConnections
from gateway.amqp.topology import dead_letter_queue
from gateway.amqp.transport import reason
from gateway.config import Settings

log = logging.getLogger(__name__)

ASK_EVERY_S = 15.0
KNOWN_FOR_S = 60.0  # after it, an answer is too old to be shown
REFUSED_FOR_S = 60.0  # for so long a refused question is not asked again: the broker logs each refusal as an error
WATCH_S = 1.0
OUTBOUND, DEAD_LETTERS = KINDS = ("outbound", "dead_letters")


class QueueDepth:
    """The latest answer for one queue. Times are on the event loop's clock."""

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is one of KINDS."""
        self.kind = kind
        self.name = name
        self.messages = 0
        self.consumers = 0
        self.answered_at = float("-inf")
        self.refused_at = float("-inf")
        self.refusal = ""  # the broker's words; "" if it has answered since

    def answer(self, messages: int, consumers: int) -> None:
        """Keep an answer."""
        if self.refusal:
            log.warning("the broker shows the queue %s again", self.name)
        self.messages, self.consumers, self.refusal = messages, consumers, ""
        self.answered_at = asyncio.get_running_loop().time()

    def refuse(self, words: str) -> None:
        """Keep a refusal. It is logged once, until an answer comes or the words change."""
        if words != self.refusal:
            log.warning("the depth of the queue %s is unknown: %s", self.name, words)
        self.refusal, self.answered_at = words, float("-inf")
        self.refused_at = asyncio.get_running_loop().time()

    def is_known(self) -> bool:
        """Return True if the broker has answered within KNOWN_FOR_S."""
        return asyncio.get_running_loop().time() - self.answered_at < KNOWN_FOR_S

    def is_due(self) -> bool:
        """Return True if the broker may be asked about this queue: it has not refused within REFUSED_FOR_S."""
        return asyncio.get_running_loop().time() - self.refused_at >= REFUSED_FOR_S


class QueueDepths:
    """The depths of all queues of one process."""

    def __init__(self, settings: Settings, connections: PublishConnections) -> None:
        self._connections = connections
        self.all: list[QueueDepth] = []
        if dead := dead_letter_queue(settings):  # None for streams
            self.all = [*(QueueDepth(OUTBOUND, name) for name in settings.queues()), QueueDepth(DEAD_LETTERS, dead)]

    async def watch_for_ever(self) -> None:
        """Ask for all depths every ASK_EVERY_S, while a publish connection is usable; return at the end of a drain."""
        while self.all and await self._connections.wait_usable():
            await self._ask_until_lost(self._connections.usable()[0])
            await asyncio.sleep(ASK_EVERY_S)

    async def _ask_until_lost(self, connection: PublishConnection) -> None:
        """Ask, without a time limit, until all is answered or the connection is lost.

        A question that is given up would leave a channel behind. A task of its own asks, and is not awaited after its
        cancellation, because aiormq may absorb a cancellation.
        """
        asking = asyncio.create_task(self._ask_all(connection), name="amqp-depths")
        try:
            while not (asking.done() or connection.is_lost):
                await asyncio.wait({asking}, timeout=WATCH_S)
        finally:
            asking.cancel()

    async def _ask_all(self, connection: PublishConnection) -> None:
        due = [depth for depth in self.all if depth.is_due()]
        try:
            while due and not connection.is_lost:
                await self._ask_until_refused(connection, due)
        except Exception as error:  # the libraries raise many kinds: the connection is lost, or about to be
            log.debug("asking for the depths of queues: %s", reason(error))

    async def _ask_until_refused(self, connection: PublishConnection, due: list[QueueDepth]) -> None:
        """Ask for the depths in `due`, and remove them from it, until the broker closes the channel."""
        async with connection.side_channel() as channel:
            while due:
                depth = due.pop(0)
                try:
                    declared = (await channel.declare_queue(depth.name, passive=True)).declaration_result
                except aiormq.exceptions.AMQPChannelError as error:
                    depth.refuse(str(error))
                    return
                depth.answer(declared.message_count or 0, declared.consumer_count or 0)
