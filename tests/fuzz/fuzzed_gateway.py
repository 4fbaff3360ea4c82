"""A gateway process on real servers to be fuzzed, a well-behaved neighbour beside the fuzzer, and a consumer."""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from gateway.cli.admin import open_admin
from testbed import Gateway
from tests.support.callers import SEND_PATH, Caller, make_caller
from tests.support.eventually import eventually
from tests.support.neighbour import Neighbour

NEIGHBOUR_PAUSE_S = 0.05
NEIGHBOUR_MESSAGES = 5
PAYLOAD_FIELDS = {
    *("id", "account_id", "list_id", "list_number", "to", "body", "wrap_links", "accepted_at", "request_id", "index")
}
OPTIONAL_FIELDS = {"contact_data", "metadata"}


class FuzzedGateway:
    """The process, its callers, and the counts of their messages. open_fuzzed_gateway() starts one."""

    def __init__(self, process: Gateway, whole: Caller, damaged: Caller, neighbour: Neighbour) -> None:
        self.process = process
        # Sends HTTP that a parser must accept, and reads every answer: its counts are exact.
        self.whole = whole
        # Sends anything, and hangs up: more of its messages may be queued than answers have counted.
        self.damaged = damaged
        self.neighbour = neighbour
        self.bad_payloads: list[str] = []
        self.consumed: Counter[int] = Counter()  # messages out of the queue, by account id
        self._counted: Counter[int] = Counter()
        self._pid = process.pid

    @property
    def callers(self) -> tuple[Caller, ...]:
        """Return all callers."""
        return (self.whole, self.damaged, self.neighbour.caller)

    def count(self, caller: Caller, queued: int) -> None:
        """Add the `queued_count` of an answer to a caller's total."""
        self._counted[caller.account_id] += queued

    def counted(self, caller: Caller) -> int:
        """Return the number of a caller's messages that answers have counted as queued."""
        if caller is self.neighbour.caller:
            return self.neighbour.counted
        return self._counted[caller.account_id]

    async def take(self, message: AbstractIncomingMessage) -> None:
        """Consume one message. Its payload must be the documented JSON for an independent parser, too."""
        try:
            payload: dict[str, Any] = json.loads(message.body, parse_constant=_refuse)
            assert set(payload) - OPTIONAL_FIELDS == PAYLOAD_FIELDS
            assert all(isinstance(payload[name], dict) for name in OPTIONAL_FIELDS & set(payload))
            payload["body"].encode()
        except (ValueError, AssertionError, RecursionError) as error:
            self.bad_payloads.append(f"{type(error).__name__} {error}: {message.body[:2000]!r}")
            return
        self.consumed[payload["account_id"]] += 1

    async def settle(self) -> None:
        """Stop the neighbour, and wait until the queue is empty; messages that nobody counted may come late."""
        await self.neighbour.stop()
        with suppress(TimeoutError):  # faults() reports missing messages
            await eventually(self._has_consumed_all, timeout=30)
        before = -1
        while (now := self.consumed.total()) != before:
            before = now
            await asyncio.sleep(0.5)

    def _has_consumed_all(self) -> bool:
        return all(self.consumed[caller.account_id] >= self.counted(caller) for caller in self.callers)

    def faults(self) -> list[str]:
        """Return a line for each defect of the gateway after the campaign, at most 30."""
        found = [f"payload: {bad}" for bad in self.bad_payloads[:10]]
        found += [f"neighbour: {failure}" for failure in self.neighbour.failures[:10]]
        if not self.neighbour.took_s:
            found.append("neighbour: never answered")
        if self.process.processes[:1] != [self._pid]:
            found.append("the process is gone")
        for caller, name in ((self.whole, "whole requests"), (self.neighbour.caller, "neighbour")):
            counted, consumed = self.counted(caller), self.consumed[caller.account_id]
            if counted != consumed:
                found.append(f"{name}: {counted} counted, {consumed} in the queue")
        counted, consumed = self.counted(self.damaged), self.consumed[self.damaged.account_id]
        if counted > consumed:
            found.append(f"damaged requests: {counted} counted, {consumed} in the queue")
        for line in self.process.log.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                found.append(f"log: {line}")
                continue
            if record["level"] not in ("debug", "info") or "traceback" in record or "failed" in record["message"]:
                found.append(f"log: {line[:2000]}")
        return found[:30]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@asynccontextmanager
async def open_fuzzed_gateway(environment: Mapping[str, str]) -> AsyncIterator[FuzzedGateway]:
    """Start a gateway process on the servers that `environment` names, with a neighbour and a consumer.

    The database must be migrated. A body must arrive within a second, so that incomplete requests end soon.
    """
    queue_name = f"fuzz.{uuid.uuid4().hex[:12]}"
    settings = {
        **environment,
        "GATEWAY_AMQP_EXCHANGE": queue_name,
        "GATEWAY_AMQP_QUEUE": queue_name,
        "GATEWAY_BODY_TIMEOUT_S": "1",
        "GATEWAY_DRAIN_DELAY_S": "0",
    }
    process = Gateway(settings)
    try:
        await asyncio.to_thread(process.start)
        async with open_admin(environment["GATEWAY_DATABASE_URL"]) as admin:
            whole, damaged, clean = [await make_caller(admin, "fuzz") for _ in range(3)]
        neighbour = Neighbour(process.url + SEND_PATH, clean, messages=NEIGHBOUR_MESSAGES, pause_s=NEIGHBOUR_PAUSE_S)
        gateway = FuzzedGateway(process, whole, damaged, neighbour)
        connection = await aio_pika.connect(environment["GATEWAY_AMQP_URL"].split(",")[0])
        async with connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=1000)
            queue = await channel.get_queue(queue_name, ensure=False)
            consumer = await queue.consume(gateway.take, no_ack=True)
            try:
                async with neighbour:
                    yield gateway
            finally:
                await queue.cancel(consumer)
                await channel.queue_delete(queue_name)
    finally:
        await asyncio.to_thread(process.close)
