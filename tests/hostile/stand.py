"""A gateway process before real servers, accounts to call it as, and a neighbour who only does right."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import quantiles
from types import TracebackType
from typing import NamedTuple, Self

import aiohttp
import msgspec
import psutil

from gateway.cli.admin import Admin, open_admin
from testbed import Gateway, Servers
from tests.conftest import new_number
from tests.support.outbound_queue import OutboundQueue

PATH = "/api/v2/send/bulk"


class Caller(NamedTuple):
    """An account's key, and a list of its own."""

    account_id: int
    key: str
    list_number: str

    def body(self, count: int = 1) -> bytes:
        """A good request."""
        message = {"to": "+14155551234", "list_number": self.list_number, "body": "Hello {{messageId}}"}
        return msgspec.json.encode({"messages": [message] * count})


async def new_caller(admin: Admin) -> Caller:
    """A new account."""
    account_id = (await admin.create_account("hostile"))["id"]
    number = new_number()
    await admin.add_list(account_id, number)
    return Caller(account_id, (await admin.create_key(account_id))["key"], number)


class Stand:
    """The process under attack."""

    def __init__(self, process: Gateway, queue: OutboundQueue, admin: Admin) -> None:
        self.process = process
        self.queue = queue
        self.admin = admin
        self.url = process.url + PATH
        (pid,) = process.processes
        self._gateway = psutil.Process(pid)

    def descriptors(self) -> int:
        """How many the gateway has open."""
        return self._gateway.num_fds()

    def memory_mb(self) -> float:
        """What the gateway holds."""
        return float(self._gateway.memory_info().rss) / 2**20

    def log_lines(self) -> list[dict[str, str]]:
        """What the gateway has written to its log."""
        return [msgspec.json.decode(line) for line in self.process.log.read_text().splitlines()]

    def alarms(self) -> list[dict[str, str]]:
        """The lines of its log that nothing from outside may cause."""
        return [line for line in self.log_lines() if line["level"] in ("error", "critical") or "traceback" in line]


@asynccontextmanager
async def open_stand(servers: Servers, **settings: str) -> AsyncIterator[Stand]:
    """Start a gateway process with these settings (without their prefix, in any case)."""
    name = f"test.{uuid.uuid4().hex[:12]}"
    own = {"AMQP_EXCHANGE": name, "AMQP_QUEUE": name, "DRAIN_DELAY_S": "0"} | settings
    process = Gateway(servers.environment() | {f"GATEWAY_{key.upper()}": value for key, value in own.items()})
    try:
        await asyncio.to_thread(process.start)
        async with open_admin(servers.database_url) as admin, OutboundQueue(servers.amqp_url, name) as queue:
            yield Stand(process, queue, admin)
            await queue.delete()
    finally:
        await asyncio.to_thread(process.close)


class Neighbour:
    """Sends one good message after the other, over a connection that stays, while others misbehave."""

    def __init__(self, stand: Stand, caller: Caller) -> None:
        self._url = stand.url
        self._caller = caller
        self._is_stopping = False
        self.counted = 0
        self.wrong: list[str] = []
        self.took_s: list[float] = []

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        self._task = asyncio.create_task(self._send_for_ever())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        await self._session.close()

    async def stop(self) -> None:
        """Send no more, and wait for the last answer."""
        self._is_stopping = True
        await self._task

    async def _send_for_ever(self) -> None:
        body, headers = self._caller.body(), {"X-Api-Key": self._caller.key, "Content-Type": "application/json"}
        while not self._is_stopping:
            began = time.monotonic()
            try:
                async with self._session.post(self._url, data=body, headers=headers) as response:
                    answer = await response.json()
                if (response.status, answer.get("queued_count")) != (200, 1):
                    self.wrong.append(f"{response.status} {answer}")
                else:
                    self.counted += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.wrong.append(repr(error))
            self.took_s.append(time.monotonic() - began)
            await asyncio.sleep(0.005)

    async def measure(self, seconds: float) -> float:
        """The 99th percentile of the next seconds, in milliseconds."""
        first = len(self.took_s)
        await asyncio.sleep(seconds)
        return self.p99_ms(first)

    def p99_ms(self, first: int = 0) -> float:
        """The 99th percentile of all requests from the `first`, in milliseconds."""
        return p99_ms(self.took_s[first:])


def p99_ms(took_s: list[float]) -> float:
    """The 99th percentile, in milliseconds."""
    return quantiles(took_s, n=100)[-1] * 1000 if len(took_s) > 1 else max(took_s, default=0.0) * 1000
