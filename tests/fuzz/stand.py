"""What is fuzzed: a gateway process on real servers, a clean caller beside the fuzzer, and a consumer who counts."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aio_pika
import aiohttp
import msgspec
import psutil
from aio_pika.abc import AbstractIncomingMessage

from gateway.cli.admin import Admin, open_admin
from testbed import Gateway
from tests.conftest import new_number
from tests.support.eventually import eventually

NEIGHBOUR_PAUSE_S = 0.05
NEIGHBOUR_MESSAGES = 5
PAYLOAD_FIELDS = {
    *("id", "account_id", "list_id", "list_number", "to", "body", "wrap_links", "accepted_at", "request_id", "index")
}
OPTIONAL_FIELDS = {"contact_data", "metadata"}


class Caller:
    """An account, a key, a list; and how many of its messages were counted, and how many came out of the queue."""

    def __init__(self, account_id: int, key: str, list_number: str) -> None:
        self.account_id = account_id
        self.key = key
        self.list_number = list_number
        self.counted = 0
        self.published = 0


async def new_caller(admin: Admin) -> Caller:
    """Someone new."""
    account_id = (await admin.create_account("fuzz"))["id"]
    caller = Caller(account_id, (await admin.create_key(account_id))["key"], new_number())
    await admin.add_list(account_id, caller.list_number)
    return caller


class Neighbour:
    """Sends good batches, one after the other, and notes whatever is not a full success."""

    def __init__(self, url: str, caller: Caller) -> None:
        self._url = url
        self.caller = caller
        self.latencies_s: list[float] = []
        self.errors: list[str] = []
        self.has_enough = False

    async def call(self) -> None:
        message = {"to": "+14155551234", "list_number": self.caller.list_number, "body": "clean {{messageId}}"}
        body = msgspec.json.encode({"messages": [message] * NEIGHBOUR_MESSAGES})
        headers = {"X-Api-Key": self.caller.key, "Content-Type": "application/json"}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            while not self.has_enough:
                began = time.perf_counter()
                try:
                    async with session.post(self._url, data=body, headers=headers) as response:
                        answer = await response.json()
                        self.caller.counted += answer.get("queued_count", 0)
                        if answer.get("queued_count") != NEIGHBOUR_MESSAGES:
                            self.errors.append(f"{response.status} {answer}")
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.errors.append(repr(error))
                self.latencies_s.append(time.perf_counter() - began)
                await asyncio.sleep(NEIGHBOUR_PAUSE_S)

    def p99_ms(self) -> float:
        """Of all its requests so far."""
        return sorted(self.latencies_s)[int(len(self.latencies_s) * 0.99)] * 1e3


class Stand:
    """Opened by open_stand()."""

    def __init__(self, process: Gateway, whole: Caller, damaged: Caller, neighbour: Neighbour) -> None:
        self.process = process
        self.whole = whole  # sends HTTP that a parser must take, and reads every answer: counts are exact
        self.damaged = damaged  # sends anything, and hangs up: more may be queued than it was told
        self.neighbour = neighbour
        self.bad_payloads: list[str] = []
        self.calling: asyncio.Task[None] | None = None  # the neighbour
        (pid,) = (
            child.pid for child in psutil.Process(process._supervisor.pid if process._supervisor else 0).children()
        )
        self._psutil = psutil.Process(pid)

    @property
    def callers(self) -> tuple[Caller, ...]:
        return (self.whole, self.damaged, self.neighbour.caller)

    def resident_mb(self) -> float:
        """What the gateway process holds."""
        return float(self._psutil.memory_info().rss / 1e6)

    def descriptors(self) -> int:
        """How many it has open."""
        return int(self._psutil.num_fds())

    async def take(self, message: AbstractIncomingMessage) -> None:
        """One SMS out of the queue: it must be the documented JSON also for somebody else's parser."""
        try:
            payload: dict[str, Any] = json.loads(message.body, parse_constant=_refuse)
            assert set(payload) - OPTIONAL_FIELDS == PAYLOAD_FIELDS
            assert all(isinstance(payload[name], dict) for name in OPTIONAL_FIELDS & set(payload))
            payload["body"].encode()
        except (ValueError, AssertionError, RecursionError) as error:
            self.bad_payloads.append(f"{type(error).__name__} {error}: {message.body[:2000]!r}")
            return
        for caller in self.callers:
            caller.published += caller.account_id == payload["account_id"]

    async def settle(self) -> None:
        """Wait until everything that was counted has come out of the queue, and a moment longer for what was not."""
        self.neighbour.has_enough = True
        if self.calling:
            await self.calling
        with suppress(TimeoutError):  # faults() says what is missing
            await eventually(lambda: all(caller.published >= caller.counted for caller in self.callers), timeout=30)
        before = -1
        while (now := sum(caller.published for caller in self.callers)) != before:
            before = now
            await asyncio.sleep(0.5)

    def faults(self) -> list[str]:
        """What is wrong with the gateway after all that; empty when every promise was kept."""
        found = [f"payload: {bad}" for bad in self.bad_payloads[:10]]
        found += [f"neighbour: {error}" for error in self.neighbour.errors[:10]]
        if not self.neighbour.latencies_s:
            found.append("neighbour: never answered")
        if not self._psutil.is_running() or self._psutil.status() == psutil.STATUS_ZOMBIE:
            found.append("the process is gone")
        for caller, name in ((self.whole, "whole requests"), (self.neighbour.caller, "neighbour")):
            if caller.counted != caller.published:
                found.append(f"{name}: {caller.counted} counted, {caller.published} in the queue")
        if self.damaged.counted > self.damaged.published:
            found.append(f"damaged requests: {self.damaged.counted} counted, {self.damaged.published} in the queue")
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
async def open_stand(environment: Mapping[str, str]) -> AsyncIterator[Stand]:
    """A gateway process on the servers that `environment` names, migrated; with short patience for what never comes."""
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
            whole, damaged, clean = [await new_caller(admin) for _ in range(3)]
        stand = Stand(process, whole, damaged, Neighbour(f"{process.url}/api/v2/send/bulk", clean))
        connection = await aio_pika.connect(environment["GATEWAY_AMQP_URL"].split(",")[0])
        async with connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=1000)
            queue = await channel.get_queue(queue_name, ensure=False)
            await queue.consume(stand.take, no_ack=True)
            stand.calling = asyncio.create_task(stand.neighbour.call())
            try:
                yield stand
            finally:
                stand.calling.cancel()
                await asyncio.gather(stand.calling, return_exceptions=True)
                await channel.queue_delete(queue_name)
    finally:
        await asyncio.to_thread(process.close)
