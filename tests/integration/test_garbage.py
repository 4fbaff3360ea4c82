"""No refusal leaves its request in a cycle, where the body would stay until the garbage collector's next run.

A process collects seldom (gateway/server/process.py). A traceback holds all frames of a request, and so its body: what
keeps an exception must not be reachable from the exception's own frames.
"""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest

from gateway.errors import GatewayError
from gateway.ingest.batch import Draft
from gateway.ingest.pipeline import SendRequest
from gateway.telemetry.requests import RequestRecord
from testbed import Servers
from tests.support.gateways import MakeSettings, StartGateway

OF_A_REQUEST = (GatewayError, SendRequest, Draft, RequestRecord)
AT_ONCE = 8


@contextmanager
def garbage_of_requests() -> Iterator[list[str]]:
    """Collect nothing during the block; then fill the list with what of the requests only the collector could free."""
    found: list[str] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += [type(left).__name__ for left in gc.garbage if isinstance(left, OF_A_REQUEST)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()


REFUSED: dict[str, tuple[bytes, int]] = {
    "not JSON": (b'{"messages":[', 400),
    "no messages": (b"{}", 400),
    "too many": (b'{"messages":[' + b"0," * 1_000 + b"0]}", 413),
    "too many, of 200,000": (b'{"messages":[' + b"0," * 200_000 + b"0]}", 413),
    "too deep": (b'{"messages":' + b"[" * 10_000, 400),
}


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
async def test_a_refusal_is_freed_with_its_request(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers, keyed: bool
) -> None:
    gateway = await start_gateway(make_settings(database_timeout_s=0.3, confirm_timeout_s=1.0))

    async def post_all(body: bytes, status: int) -> None:
        keys: list[Any] = [{"Idempotency_Key": str(index)} if keyed else {} for index in range(AT_ONCE)]
        answers = await asyncio.gather(*(gateway.post(body, **key) for key in keys))
        assert {answer[0] for answer in answers} == {status}

    locker = await asyncpg.connect(servers.database_url)
    try:
        with garbage_of_requests() as garbage:
            for body, status in REFUSED.values():
                await post_all(body, status)
            async with locker.transaction():
                await locker.execute("LOCK TABLE sending_lists IN ACCESS EXCLUSIVE MODE")
                await post_all(gateway.caller.body(), 503)
            await gateway.runtime.publisher.close()
            await post_all(gateway.caller.body(), 503)
            await gateway.runtime.pool.close()
            await post_all(gateway.caller.body(), 503)
    finally:
        await locker.close()
    assert garbage == []
