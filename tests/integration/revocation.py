"""Promise 7: what is taken away is refused from the commit on, by every process. A loop that tries to catch one.

A trial takes something away (a key, an account, a list) and commits, then sends at once to a process drawn at random:
that request must be refused. Then it is given back, and the next request, to any process, must be accepted. Meanwhile
the same caller's other requests are in flight to all processes, all the time, so that their questions to the database
are out when the commit comes; what becomes of those is not judged, for they may have begun before it.

    python -m tests.integration.revocation --times 5000 --processes 4 --seed 7
"""

import argparse
import asyncio
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
import asyncpg
import msgspec

from gateway.cli.admin import Admin
from testbed import Gateway, Servers
from tests.conftest import new_number, run_gateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import BODY

CALLERS = 4  # trials at a time, each with an account of its own
KEYED = 0.25  # of the requests have an Idempotency-Key: their lists are found by another query
PATIENCE_S = 30.0


class Caller(NamedTuple):
    """An account, with what can be taken from it; and another, that its list can go to."""

    account: int
    key_id: int
    key: str
    list_id: int
    number: str
    other_account: int


class Verdict(NamedTuple):
    """An answer, as far as it matters here."""

    status: int
    code: str  # of the request's refusal, or of its message's

    @property
    def is_accepted(self) -> bool:
        return self == (200, "")


@dataclass
class Tally:
    """What the loop saw."""

    trials: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # a sentence for each request that was not answered as it must be
    beside: Counter[Verdict] = field(default_factory=Counter)  # what became of the requests in flight beside the trials
    seconds: float = 0.0


Change = Callable[["Loop", Caller], Awaitable[object]]


class Taking(NamedTuple):
    """A way to take something away, what the next request is told, and how it is given back."""

    take: Change
    told: Verdict
    give_back: Change


TAKINGS = {
    "key revoked": Taking(
        lambda loop, caller: loop.admin.revoke_key(caller.key_id),
        Verdict(401, "invalid_api_key"),
        lambda loop, caller: loop.execute("UPDATE api_keys SET revoked_at = NULL WHERE id = $1", caller.key_id),
    ),
    "account suspended": Taking(
        lambda loop, caller: loop.admin.set_account_status(caller.account, "suspended"),
        Verdict(403, "account_suspended"),
        lambda loop, caller: loop.admin.set_account_status(caller.account, "active"),
    ),
    "list deactivated": Taking(
        lambda loop, caller: loop.admin.set_list_status(caller.list_id, "inactive"),
        Verdict(200, "list_not_found"),
        lambda loop, caller: loop.admin.set_list_status(caller.list_id, "active"),
    ),
    "list moved": Taking(
        lambda loop, caller: loop.move_list(caller.list_id, caller.other_account),
        Verdict(200, "list_not_found"),
        lambda loop, caller: loop.move_list(caller.list_id, caller.account),
    ),
}


class Loop:
    """Trials against gateway processes on one database."""

    def __init__(self, urls: Sequence[str], database: asyncpg.Connection, session: aiohttp.ClientSession) -> None:
        self._urls = urls
        self._database = database
        self._session = session
        self._turn = asyncio.Lock()  # one connection, one change at a time
        self.admin: Admin = Admin(database)
        self.tally = Tally()

    async def execute(self, statement: str, *arguments: object) -> None:
        await self._database.execute(statement, *arguments)

    async def move_list(self, list_id: int, account: int) -> None:
        await self.execute("UPDATE sending_lists SET account_id = $2 WHERE id = $1", list_id, account)

    async def run(self, times: int, seed: int) -> Tally:
        """So many trials. Raises TimeoutError when the gateways do not answer at all."""
        began = time.monotonic()
        callers = [await self._make_caller() for _ in range(CALLERS)]
        chance = random.Random(seed)  # noqa: S311 - a draw that can be repeated
        trials = iter([chance.choice(list(TAKINGS)) for _ in range(times)])
        async with asyncio.timeout(PATIENCE_S + times), asyncio.TaskGroup() as group:
            beside = [group.create_task(self._send_beside(caller, url)) for caller in callers for url in self._urls]
            trying = [group.create_task(self._try(caller, trials, chance)) for caller in callers]
            await asyncio.wait(trying)
            for task in beside:
                task.cancel()
        self.tally.seconds = time.monotonic() - began
        return self.tally

    async def _make_caller(self) -> Caller:
        account, other = [(await self.admin.create_account(name))["id"] for name in ("caller", "other")]
        key = await self.admin.create_key(account)
        number = new_number()
        made = await self.admin.add_list(account, number)
        return Caller(account, key["id"], key["key"], made["id"], number, other)

    async def _try(self, caller: Caller, trials: Iterator[str], chance: random.Random) -> None:
        for name in trials:
            taking = TAKINGS[name]
            await self._change(taking.take, caller)
            url = chance.choice(self._urls)
            refused = await self._send(caller, url, keyed=chance.random() < KEYED)
            await self._change(taking.give_back, caller)
            accepted = await self._send(caller, chance.choice(self._urls), keyed=chance.random() < KEYED)
            self.tally.trials[name] += 1
            if refused != taking.told:
                self.tally.broken.append(f"{name}, then the next request to {url}: {refused}")
            if not accepted.is_accepted:
                self.tally.broken.append(f"{name}, and given back, then the next request: {accepted}")

    async def _change(self, change: Change, caller: Caller) -> None:
        async with self._turn:
            await change(self, caller)  # each is a statement of its own: committed when it returns

    async def _send_beside(self, caller: Caller, url: str) -> None:
        while True:
            self.tally.beside[await self._send(caller, url)] += 1

    async def _send(self, caller: Caller, url: str, *, keyed: bool = False) -> Verdict:
        message = {"to": "+14155551234", "list_number": caller.number, "body": BODY}
        headers = {"X-Api-Key": caller.key, "Content-Type": "application/json"}
        if keyed:
            headers["Idempotency-Key"] = uuid.uuid4().hex
        body = msgspec.json.encode({"messages": [message]})
        async with self._session.post(f"{url}/api/v2/send/bulk", data=body, headers=headers) as response:
            answer = msgspec.json.decode(await response.read())
        rows = answer.get("errors", [])
        return Verdict(response.status, rows[0]["code"] if rows else answer.get("code", ""))


async def play(urls: Sequence[str], database_url: str, *, times: int, seed: int) -> Tally:
    """Run the loop against gateways that are up."""
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        database = await asyncpg.connect(database_url)
        stack.push_async_callback(database.close)
        return await Loop(urls, database, session).run(times, seed)


@asynccontextmanager
async def gateways(servers: Servers, count: int) -> AsyncIterator[list[str]]:
    """The URLs of so many gateway processes on the same servers; stopped at the end, their queue deleted."""
    name = f"revocation.{uuid.uuid4().hex[:12]}"
    settings = {**servers.environment(), "GATEWAY_AMQP_EXCHANGE": name, "GATEWAY_AMQP_QUEUE": name}
    processes = [Gateway(settings) for _ in range(count)]
    try:
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in processes))
        yield [process.url for process in processes]
        async with OutboundQueue(servers.amqp_url, name) as queue:
            await queue.delete()
    finally:
        await asyncio.gather(*(asyncio.to_thread(process.close) for process in processes))


async def main(arguments: Sequence[str] | None = None) -> int:
    """The long form; 1 when anything was accepted that had been taken away."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=5_000, help="trials")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    with Servers() as servers:
        run_gateway("migrate", database_url=servers.database_url).check_returncode()
        async with gateways(servers, options.processes) as urls:
            tally = await play(urls, servers.database_url, times=options.times, seed=options.seed)
    for name, trials in sorted(tally.trials.items()):
        print(f"{name:<20}{trials:>8} trials")
    for verdict, requests in sorted(tally.beside.items()):
        print(f"{'beside them':<20}{requests:>8} requests answered {verdict.status} {verdict.code}")
    print(f"{sum(tally.trials.values())} trials in {tally.seconds:.0f} s: {len(tally.broken)} not as promised")
    print(*tally.broken, sep="\n")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
