"""Gateways under test: in this process (open_gateway) or as a process of its own (GatewayProcess, running)."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import psutil

from gateway.config import Settings
from gateway.runtime import Runtime, open_runtime
from gateway.server import process as server
from testbed import Gateway, Servers
from tests.support.callers import Client
from tests.support.eventually import eventually
from tests.support.secrecy import watch

ROOT = Path(__file__).parents[2]

MakeSettings = Callable[..., Settings]
SomeGateway = TypeVar("SomeGateway", bound=Gateway)


def new_name() -> str:
    """Return a name for an exchange and a queue that no other test has."""
    return f"test.{uuid.uuid4().hex[:12]}"


class GatewayUnderTest(Client):
    """A gateway in this process, and the client that calls it."""

    def __init__(self, runtime: Runtime, api_url: str, ops_url: str, session: aiohttp.ClientSession) -> None:
        super().__init__(api_url, session)
        self.runtime = runtime
        self.ops_url = ops_url

    async def wait_until_ready(self) -> None:
        """Return when the database was reached and the broker takes batches."""
        runtime = self.runtime
        await eventually(lambda: runtime.database_was_reached and runtime.publisher.connections.is_usable())


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[GatewayUnderTest]:
    """Run a gateway in this process, listening on free ports; it may not be ready yet."""
    async with AsyncExitStack() as stack:
        runtime = await stack.enter_async_context(open_runtime(settings))
        ops, callers = server.make_runners(runtime)
        stack.push_async_callback(ops.cleanup)
        stack.push_async_callback(callers.cleanup)
        ops_port = await ops.listen(settings.ops_host, 0)
        api_port = await callers.listen(settings.api_host, 0)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield GatewayUnderTest(runtime, f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{ops_port}", session)


class StartGateway(Protocol):
    """The fixture `start_gateway`."""

    async def __call__(
        self, settings: Settings, *, wait_until_ready: bool = True, database_url: str | None = None
    ) -> GatewayUnderTest:
        """Start a gateway in this process that ends with the test.

        When it is ready its caller is created, in the database at `database_url`; None means the session's.
        """


def process_environment(servers: Servers, **settings: str) -> dict[str, str]:
    """Return the environment of a gateway process on `servers`, with broker names of its own.

    `settings` are environment variables with their prefix; they go before the defaults.
    """
    name = new_name()
    defaults = {"GATEWAY_AMQP_EXCHANGE": name, "GATEWAY_AMQP_QUEUE": name, "GATEWAY_DRAIN_DELAY_S": "0"}
    return servers.environment() | defaults | settings


class GatewayProcess(Gateway):
    """A gateway as a process of its own; with more than one worker, a supervisor and its workers."""

    def __init__(self, settings: Mapping[str, str], *, workers: int = 1) -> None:
        super().__init__(settings)
        self._workers = workers

    def _command(self) -> list[str]:
        return [*super()._command(), *(["--workers", str(self._workers)] if self._workers > 1 else [])]

    @property
    def workers(self) -> set[int]:
        """Return the pids of the supervisor's workers."""
        return {child.pid for child in psutil.Process(self.pid).children()}


@asynccontextmanager
async def running(process: SomeGateway) -> AsyncIterator[SomeGateway]:
    """Start a gateway process and wait until it is ready; kill it at the end."""
    try:
        await asyncio.to_thread(process.start)
        yield process
    finally:
        await asyncio.to_thread(process.close)


def run_gateway(
    *arguments: str, database_url: str = "", environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run one command of `python -m gateway` as an operator types it, with no setting inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PG"))}
    completed = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "gateway", *arguments],
        cwd=ROOT,
        env=inherited | dict({"GATEWAY_DATABASE_URL": database_url} if environment is None else environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    watch.look_at(completed.stderr, f"the standard error of `{' '.join(arguments)}`")
    return completed


def default_settings(servers: Servers, **changes: Any) -> Settings:
    """Return settings for a gateway in this process on `servers`, with names of its own on the broker."""
    name = new_name()
    defaults: dict[str, Any] = {
        "database_url": servers.database_url,
        "amqp_url": servers.amqp_url,
        "amqp_exchange": name,
        "amqp_queue": name,
        "api_host": "127.0.0.1",
        "api_port": 0,
        "ops_port": 0,
        "drain_delay_s": 0.0,
    }
    return Settings(**(defaults | changes))
