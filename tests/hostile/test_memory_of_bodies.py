"""The memory of a gateway process, with the settings it ships with, under bodies of 5 MB. Promise 10.

A body is held only until it is decoded, its texts only until the payloads are built, and neither by an exception.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from statistics import median

import asyncpg
import msgspec
import pytest

from gateway.ingest.wire import MAX_BODY_BYTES
from gateway.web.bodies import SMALL_REQUEST_BYTES
from testbed import Servers
from tests.hostile.attacked_gateway import AttackedGateway, open_gateway
from tests.support.callers import Caller, make_caller
from tests.support.raw_http import exchange

CONNECTIONS, BODIES_EACH = 20, 5
REFUSED, AT_ONCE = 150, 6
MAX_AFTER_REFUSALS_MB = 150
SLOTS = 512  # GATEWAY_MAX_REQUESTS_IN_FLIGHT, as it ships
MAX_SMALL_MB = 250
MAX_PAGE_FAULTS = 100  # with glibc's own settings: about 650 for a body of 1 MB, 3,100 to 6,700 for 5 MB
MAX_MB = 400  # of the 512 MB that docs/operations.md allows a process


def body_of(caller: Caller, text: str, messages: int = 990) -> bytes:
    """Return a body just below 5 MB: every message has the macro, `text`, and ASCII up to its share of the bytes."""
    empty = len(caller.body(messages, body="")) // messages + 1
    padding = MAX_BODY_BYTES // messages - empty - len(f"{{{{messageId}}}}{text}".encode())
    body = caller.body(messages, body=f"{{{{messageId}}}}{text}{'a' * padding}")
    assert 0.97 * MAX_BODY_BYTES < len(body) <= MAX_BODY_BYTES
    return body


async def post(gateway: AttackedGateway, caller: Caller, body: bytes, *more: bytes) -> int:
    """Send a body; return the status of the answer."""
    headers = [b"X-Api-Key: " + caller.key.encode(), b"Content-Length: %d" % len(body), *more]
    return (await exchange(gateway.url, headers=headers, body=body)).status


def peak_mb(gateway: AttackedGateway) -> float:
    """Return the highest resident memory that the process has had, in MiB."""
    status = Path(f"/proc/{gateway.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def page_faults(gateway: AttackedGateway) -> int:
    """Return the minor page faults of the process: proc(5), minflt."""
    after_name = Path(f"/proc/{gateway.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2]
    return int(after_name.split()[7])


@asynccontextmanager
async def locked_lists(servers: Servers) -> AsyncIterator[None]:
    """Hold a lock that every query of lists waits for."""
    connection = await asyncpg.connect(servers.database_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE sending_lists IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "with an Idempotency-Key"])
async def test_bodies_of_requests_refused_by_a_locked_database_are_released(servers: Servers, keyed: bool) -> None:
    async with open_gateway(servers, database_timeout_s="0.3") as gateway:
        caller = await make_caller(gateway.admin)
        body = body_of(caller, "")
        async with locked_lists(servers):
            for _ in range(0, REFUSED, AT_ONCE):
                keys = [[f"Idempotency-Key: {index}".encode()] if keyed else [] for index in range(AT_ONCE)]
                statuses = await asyncio.gather(*(post(gateway, caller, body, *key) for key in keys))
                assert set(statuses) == {503}
        print(f"after {REFUSED} refusals: {gateway.memory_mb():.0f} MB")
        assert gateway.memory_mb() <= MAX_AFTER_REFUSALS_MB


async def test_twenty_connections_with_bodies_of_wide_characters_fit_into_the_memory_limit(servers: Servers) -> None:
    async with open_gateway(servers) as gateway:
        caller = await make_caller(gateway.admin)
        body = body_of(caller, "\N{PILE OF POO}")

        async def keep_sending() -> list[int]:
            return [await post(gateway, caller, body) for _ in range(BODIES_EACH)]

        statuses = list(chain.from_iterable(await asyncio.gather(*(keep_sending() for _ in range(CONNECTIONS)))))
        print(f"{CONNECTIONS} connections: {peak_mb(gateway):.0f} MB, {statuses.count(200)} bodies queued")
        assert set(statuses) <= {200, 503}
        assert statuses.count(200) >= BODIES_EACH
        assert peak_mb(gateway) <= MAX_MB


async def test_bodies_that_wait_for_the_database_fit_into_the_memory_limit(servers: Servers) -> None:
    """All texts are decoded, and none is in a payload yet."""
    async with open_gateway(servers) as gateway:
        caller = await make_caller(gateway.admin)
        body = body_of(caller, "\N{PILE OF POO}")
        async with locked_lists(servers):
            await asyncio.gather(*(post(gateway, caller, body) for _ in range(CONNECTIONS)))
        print(f"{CONNECTIONS} bodies that wait: {peak_mb(gateway):.0f} MB")
        assert peak_mb(gateway) <= MAX_MB


@pytest.mark.parametrize("text", [1_000, 2_500, 4_900])
async def test_bodies_sent_one_after_the_other_use_the_same_memory(servers: Servers, text: int) -> None:
    """The allocator keeps what is freed: docs/decisions/0051."""
    async with open_gateway(servers) as gateway:
        caller = await make_caller(gateway.admin)
        body = caller.body(1_000, body="a" * text)
        faults = []
        for _ in range(12):
            before = page_faults(gateway)
            assert await post(gateway, caller, body) == 200
            faults.append(page_faults(gateway) - before)
        print(f"page faults: {faults}")
        assert median(faults) < MAX_PAGE_FAULTS


@pytest.mark.parametrize("text", ["aaaaaaa", "\N{PILE OF POO}"])
async def test_small_bodies_of_unknown_callers_fit_into_the_memory_limit(servers: Servers, text: str) -> None:
    """They are decoded before it is known who sends them, and no bytes are reserved: slots bound their number."""
    async with open_gateway(servers) as gateway:
        caller = await make_caller(gateway.admin)
        good = caller.message()
        bad = {"to": text, "body": text}
        number = (SMALL_REQUEST_BYTES - 1024) // len(msgspec.json.encode(bad) + b",")
        body = msgspec.json.encode({"messages": [good, *[bad] * min(number, 999)]})
        assert 0.8 * SMALL_REQUEST_BYTES < len(body) <= SMALL_REQUEST_BYTES
        unknown = [b"X-Api-Key: trk_" + b"x" * 32, b"Content-Length: %d" % len(body)]
        async with locked_lists(servers):
            answers = await asyncio.gather(
                *(exchange(gateway.url, headers=unknown, body=body) for _ in range(SLOTS + 10))
            )
        print(f"{SLOTS} small bodies of unknown callers: {peak_mb(gateway):.0f} MB")
        assert [answer.status for answer in answers].count(503) >= SLOTS, "refused, as the database did not answer"
        assert peak_mb(gateway) <= MAX_SMALL_MB
