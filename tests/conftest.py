"""Real servers once a session; for each test an exchange, a queue and an account of its own, so that none meet."""

import io
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from multidict import CIMultiDictProxy

from gateway.cli.admin import Admin, open_admin
from gateway.config import Settings
from gateway.runtime import Runtime, open_runtime
from gateway.server import process as server
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import BODY, PASSWORD, LogWatch

watch = LogWatch()


def pytest_configure(config: pytest.Config) -> None:
    """Read all logs of the run, and fail it if one shows a secret."""
    config.pluginmanager.register(watch)


MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL, migrated, and RabbitMQ: private ones, or those that the environment names."""
    with Servers(fsync=False) as running:
        # Our own PostgreSQL trusts every password; one that is sent can leak.
        running.database_url = running.database_url.replace("//postgres@", f"//postgres:{PASSWORD}@")
        completed = run_gateway("migrate", database_url=running.database_url)
        assert completed.returncode == 0, completed.stderr
        yield running


def run_gateway(*arguments: str, database_url: str) -> "subprocess.CompletedProcess[str]":
    """One command of `python -m gateway`, as an operator types it."""
    completed = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "gateway", *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"GATEWAY_DATABASE_URL": database_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    watch.look_at(completed.stderr, f"the standard error of `{' '.join(arguments)}`")
    return completed


@pytest.fixture
def make_settings(servers: Servers) -> MakeSettings:
    """Settings for a gateway on the session's servers, with names of its own on the broker."""

    def make(**changes: Any) -> Settings:
        name = f"test.{uuid.uuid4().hex[:12]}"
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

    return make


class GatewayUnderTest:
    """A running gateway, with an account, a key and a list to call it as."""

    def __init__(self, runtime: Runtime, api_url: str, ops_url: str, session: aiohttp.ClientSession) -> None:
        self.runtime = runtime
        self.api_url = api_url
        self.ops_url = ops_url
        self.session = session
        self.account_id = 0
        self.key_id = 0
        self.key = ""
        self.list_id = 0
        self.list_number = ""

    @property
    def url(self) -> str:
        return f"{self.api_url}/api/v2/send/bulk"

    async def become_someone(self, admin: Admin) -> None:
        """Create the account, key and list."""
        self.account_id = (await admin.create_account("under test"))["id"]
        created = await admin.create_key(self.account_id)
        self.key_id, self.key = created["id"], created["key"]
        self.list_number = new_number()
        self.list_id = (await admin.add_list(self.account_id, self.list_number))["id"]

    def message(self, **changes: Any) -> dict[str, Any]:
        """A good message of this account, with some fields changed; a field set to ... is left out."""
        good = {"to": "+14155551234", "list_number": self.list_number, "body": f"Hello {{{{messageId}}}}, {BODY}"}
        return {name: value for name, value in (good | changes).items() if value is not ...}

    async def post(
        self, body: bytes | AsyncIterator[bytes], **headers: str
    ) -> tuple[int, Any, "CIMultiDictProxy[str]"]:
        """POST raw bytes; returns status, decoded answer, headers. `headers` are spelt with _ for -."""
        sent = {"X-Api-Key": self.key, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = io.BytesIO(body) if isinstance(body, bytes) else body
        async with self.session.post(self.url, data=data, headers=sent) as response:
            raw = await response.read()
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["X-Request-Id"]
            return response.status, msgspec.json.decode(raw), response.headers

    async def send(self, messages: Any, **top_level: Any) -> tuple[int, Any]:
        """POST messages; returns status and decoded answer."""
        status, answer, _ = await self.post(msgspec.json.encode({"messages": messages, **top_level}))
        if status == 200:
            assert answer["queued_count"] + answer["error_count"] == len(messages)
            assert answer["error_count"] == len(answer["errors"])
            assert [row["index"] for row in answer["errors"]] == sorted(row["index"] for row in answer["errors"])
            assert "error" not in answer
        return status, answer


def new_number() -> str:
    """An E.164 number that no other test has."""
    return f"+1{uuid.uuid4().int % 10**13:013}"


StartGateway = Callable[..., Any]


@pytest.fixture
async def start_gateway(servers: Servers) -> AsyncIterator[StartGateway]:
    """Starts gateways in this process, listening on free ports, connected and ready unless told not to wait."""
    async with AsyncExitStack() as stack:

        async def start(settings: Settings, *, wait_until_ready: bool = True) -> GatewayUnderTest:
            runtime = await stack.enter_async_context(open_runtime(settings))
            ops, callers = server.make_runners(runtime)
            stack.push_async_callback(ops.cleanup)
            stack.push_async_callback(callers.cleanup)
            ops_port = await ops.listen(settings.ops_host, 0)
            api_port = await callers.listen(settings.api_host, 0)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            gateway = GatewayUnderTest(runtime, f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{ops_port}", session)
            if wait_until_ready:
                await eventually(lambda: runtime.database_was_reached and runtime.publisher.is_usable())
                async with open_admin(servers.database_url) as admin:
                    await gateway.become_someone(admin)
            return gateway

        yield start


@pytest.fixture
async def gateway(start_gateway: StartGateway, make_settings: MakeSettings) -> GatewayUnderTest:
    """A gateway on the real servers."""
    under_test: GatewayUnderTest = await start_gateway(make_settings())
    return under_test


@pytest.fixture
async def queue(gateway: GatewayUnderTest) -> AsyncIterator[OutboundQueue]:
    """The queue behind `gateway`; deleted afterwards."""
    settings = gateway.runtime.settings
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as outbound:
        yield outbound
        await outbound.delete()


@pytest.fixture
async def admin(servers: Servers) -> AsyncIterator[Admin]:
    """What the command line uses."""
    async with open_admin(servers.database_url) as opened:
        yield opened
