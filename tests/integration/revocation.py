"""Promise 7: every process refuses a revoked key, account or list from the commit on. A loop of trials.

A trial revokes a key, an account or a list, commits, and sends at once to a random process: that request must be
refused. Then the trial restores it, and the next request, to any process, must be accepted. Meanwhile other requests
of the same caller are in flight to all processes, so that their queries are under way during the commit. The answers
to those are not judged, because they may have begun before the commit.

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

from gateway.cli.admin import Admin
from testbed import Servers
from tests.support.callers import Caller, Client, make_caller
from tests.support.gateways import GatewayProcess, process_environment, run_gateway
from tests.support.outbound_queue import OutboundQueue

CALLERS = 4  # trials at a time, each with an account of its own
KEYED = 0.25  # of the requests have an Idempotency-Key
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Target(Caller):
    """A caller from whom a key, an account and a list can be taken; the list can go to another account."""

    other_account_id: int = 0


class Verdict(NamedTuple):
    """The status and code of an answer."""

    status: int
    code: str  # of the request's refusal, or of its message's

    @property
    def is_accepted(self) -> bool:
        return self == (200, "")


@dataclass
class Tally:
    """The results of the trials."""

    trials: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # a sentence for each request that was not answered as it must be
    beside: Counter[Verdict] = field(default_factory=Counter)  # what became of the requests in flight beside the trials
    seconds: float = 0.0


Change = Callable[["Loop", Target], Awaitable[object]]


class Taking(NamedTuple):
    """A way to take something away, the verdict on the next request, and the way to give it back."""

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
        lambda loop, caller: loop.admin.set_account_status(caller.account_id, "suspended"),
        Verdict(403, "account_suspended"),
        lambda loop, caller: loop.admin.set_account_status(caller.account_id, "active"),
    ),
    "list deactivated": Taking(
        lambda loop, caller: loop.admin.set_list_status(caller.list_id, "inactive"),
        Verdict(200, "list_not_found"),
        lambda loop, caller: loop.admin.set_list_status(caller.list_id, "active"),
    ),
    "list moved": Taking(
        lambda loop, caller: loop.move_list(caller.list_id, caller.other_account_id),
        Verdict(200, "list_not_found"),
        lambda loop, caller: loop.move_list(caller.list_id, caller.account_id),
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
        """Run `times` trials. Raises TimeoutError if the gateways do not answer at all."""
        began = time.monotonic()
        callers = [await self._make_target() for _ in range(CALLERS)]
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

    async def _make_target(self) -> Target:
        caller, other = await make_caller(self.admin), await make_caller(self.admin, "other")
        return Target(**vars(caller), other_account_id=other.account_id)

    async def _try(self, caller: Target, trials: Iterator[str], chance: random.Random) -> None:
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

    async def _change(self, change: Change, caller: Target) -> None:
        async with self._turn:
            await change(self, caller)  # each is a statement of its own: committed when it returns

    async def _send_beside(self, caller: Target, url: str) -> None:
        while True:
            self.tally.beside[await self._send(caller, url)] += 1

    async def _send(self, caller: Target, url: str, *, keyed: bool = False) -> Verdict:
        headers = {"Idempotency_Key": uuid.uuid4().hex} if keyed else {}
        status, answer, _ = await Client(url, self._session, caller).post(caller.body(), **headers)
        rows = answer.get("errors", [])
        return Verdict(status, rows[0]["code"] if rows else answer.get("code", ""))


async def run_trials(urls: Sequence[str], database_url: str, *, times: int, seed: int) -> Tally:
    """Run the loop against gateways that are up."""
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        database = await asyncpg.connect(database_url)
        stack.push_async_callback(database.close)
        return await Loop(urls, database, session).run(times, seed)


@asynccontextmanager
async def gateways(servers: Servers, count: int) -> AsyncIterator[list[str]]:
    """Start `count` gateway processes on the same servers; yield their URLs; stop them and delete their queue."""
    settings = process_environment(servers)
    processes = [GatewayProcess(settings) for _ in range(count)]
    try:
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in processes))
        yield [process.url for process in processes]
        async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
            await queue.delete()
    finally:
        await asyncio.gather(*(asyncio.to_thread(process.close) for process in processes))


async def main(arguments: Sequence[str] | None = None) -> int:
    """Run the long form; return 1 if anything was accepted that had been revoked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=5_000, help="trials")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    with Servers() as servers:
        run_gateway("migrate", database_url=servers.database_url).check_returncode()
        async with gateways(servers, options.processes) as urls:
            tally = await run_trials(urls, servers.database_url, times=options.times, seed=options.seed)
    for name, trials in sorted(tally.trials.items()):
        print(f"{name:<20}{trials:>8} trials")
    for verdict, requests in sorted(tally.beside.items()):
        print(f"{'beside them':<20}{requests:>8} requests answered {verdict.status} {verdict.code}")
    print(f"{sum(tally.trials.values())} trials in {tally.seconds:.0f} s: {len(tally.broken)} not as promised")
    print(*tally.broken, sep="\n")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
