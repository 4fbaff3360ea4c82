"""Real servers once a session; for each test an exchange, a queue and an account of its own, so that none meet."""

import signal
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack
from functools import partial

import pytest

from gateway.cli.admin import Admin, open_admin
from gateway.config import Settings
from testbed import Servers
from tests.support.callers import Caller, make_caller
from tests.support.gateways import (
    GatewayUnderTest,
    MakeSettings,
    StartGateway,
    default_settings,
    open_gateway,
    run_gateway,
)
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import PASSWORD, watch


def pytest_configure(config: pytest.Config) -> None:
    """Read all logs of the run, and fail it if one shows a secret. Let child processes handle SIGINT.

    A script's shell starts a background job, such as `scripts/test &`, with SIGINT ignored, and children inherit that.
    """
    config.pluginmanager.register(watch)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape halves of surrogate pairs in the captured logs of a test: pytest-xdist cannot send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start PostgreSQL, migrated, and RabbitMQ; or use those that the environment names."""
    with Servers(fsync=False) as running:
        # Our own PostgreSQL trusts every password; one that is sent can leak.
        running.database_url = running.database_url.replace("//postgres@", f"//postgres:{PASSWORD}@")
        completed = run_gateway("migrate", database_url=running.database_url)
        assert completed.returncode == 0, completed.stderr
        yield running


@pytest.fixture
def make_settings(servers: Servers) -> MakeSettings:
    """Return a function that makes settings for the session's servers, with names of their own on the broker."""
    return partial(default_settings, servers)


@pytest.fixture
async def start_gateway(servers: Servers) -> AsyncIterator[StartGateway]:
    """Return a function that starts gateways in this process, ready and with a caller unless told not to wait."""
    async with AsyncExitStack() as stack:

        async def start(
            settings: Settings, *, wait_until_ready: bool = True, database_url: str | None = None
        ) -> GatewayUnderTest:
            gateway = await stack.enter_async_context(open_gateway(settings))
            if wait_until_ready:
                await gateway.wait_until_ready()
                async with open_admin(database_url or servers.database_url) as admin:
                    gateway.caller = await make_caller(admin)
            return gateway

        yield start


@pytest.fixture
async def gateway(start_gateway: StartGateway, make_settings: MakeSettings) -> GatewayUnderTest:
    """Start a gateway in this process, on the session's servers."""
    return await start_gateway(make_settings())


@pytest.fixture
async def queue(gateway: GatewayUnderTest) -> AsyncIterator[OutboundQueue]:
    """Yield the queue behind `gateway`; delete it afterwards."""
    settings = gateway.runtime.settings
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as outbound:
        yield outbound
        await outbound.delete()


@pytest.fixture
async def admin(servers: Servers) -> AsyncIterator[Admin]:
    """Open the administration of the session's database, as the command line does."""
    async with open_admin(servers.database_url) as opened:
        yield opened


@pytest.fixture
async def caller(admin: Admin) -> Caller:
    """Create a caller in the session's database."""
    return await make_caller(admin)
