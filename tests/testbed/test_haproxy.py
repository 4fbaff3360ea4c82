"""HAProxy sends requests to ready gateways only, answers as the contract says, and repeats no request."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from testbed import HaProxy


class Backend:
    """A small imitation of a gateway: an API and an operations listener, whose state a test sets."""

    def __init__(self) -> None:
        self.is_ready = True
        self.drops = False
        self.served = 0
        self.ports = (0, 0)

    async def api(self, request: web.Request) -> web.Response:
        self.served += 1
        if self.drops:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(text=str(self.ports[0]))

    async def ready(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_ready else 503)


async def listen(path: str, handler: Callable[..., Any], runners: list[web.AppRunner]) -> int:
    app = web.Application()
    app.router.add_route("*", path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    runners.append(runner)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port: int = runner.addresses[0][1]
    return port


@pytest.fixture
async def backends() -> AsyncIterator[list[Backend]]:
    runners: list[web.AppRunner] = []
    made = [Backend(), Backend()]
    for backend in made:
        backend.ports = (await listen("/", backend.api, runners), await listen("/readyz", backend.ready, runners))
    yield made
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def balancer(backends: list[Backend]) -> AsyncIterator[HaProxy]:
    proxy = HaProxy([backend.ports for backend in backends])
    try:
        await asyncio.to_thread(proxy.start)
        yield proxy
    finally:
        proxy.close()


async def answers(balancer: HaProxy, count: int) -> Counter[str]:
    async with aiohttp.ClientSession() as session:
        found: Counter[str] = Counter()
        for _ in range(count):
            async with session.post(balancer.url, data=b"x") as response:
                found[await response.text()] += response.status == 200
        return found


async def await_up(balancer: HaProxy, expected: list[Backend]) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(balancer.up) != [backend.ports[0] for backend in expected]:
            pass


async def test_the_balancer_leaves_out_a_gateway_that_is_not_ready(balancer: HaProxy, backends: list[Backend]) -> None:
    one, other = backends
    await await_up(balancer, backends)
    shares = await answers(balancer, 20)
    assert set(shares) == {str(one.ports[0]), str(other.ports[0])}
    assert shares.total() == 20
    one.is_ready = False
    await await_up(balancer, [other])
    assert await answers(balancer, 20) == {str(other.ports[0]): 20}
    one.is_ready = True
    await await_up(balancer, backends)
    assert len(await answers(balancer, 20)) == 2


async def test_without_any_gateway_the_balancer_answers_as_the_contract_says(
    balancer: HaProxy, backends: list[Backend]
) -> None:
    for backend in backends:
        backend.is_ready = False
    await await_up(balancer, [])
    async with aiohttp.ClientSession() as session, session.post(balancer.url, data=b"x") as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["code"] == "overloaded"


async def test_the_balancer_repeats_no_request_that_a_gateway_has_received(
    balancer: HaProxy, backends: list[Backend]
) -> None:
    await await_up(balancer, backends)
    for backend in backends:
        backend.drops = True
    async with aiohttp.ClientSession() as session, session.post(balancer.url, data=b"x") as response:
        assert response.status == 502
        assert (await response.json())["code"] == "outcome_unknown"
    assert sum(backend.served for backend in backends) == 1
