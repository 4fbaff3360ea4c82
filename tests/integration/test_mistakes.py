"""An operator's plain mistake is answered with one sentence that names the argument or the variable, and status 2."""

import asyncio
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from yarl import URL

from gateway.amqp.transport import address
from gateway.config import ConfigurationError
from gateway.server.supervisor import supervise
from testbed import Port, Servers
from tests.support.gateways import MakeSettings, process_environment, run_gateway
from tests.support.outbound_queue import OutboundQueue

ROOT = Path(__file__).parents[2]
COMMANDS_WITH_IDS = [
    ("account", "suspend"),
    ("account", "activate"),
    ("key", "create"),
    ("key", "revoke"),
    ("key", "list"),
    ("list", "add"),
    ("list", "deactivate"),
    ("list", "activate"),
    ("list", "list"),
]


@pytest.fixture(scope="module")
def roles(servers: Servers) -> Iterator[dict[str, str]]:
    """Return the URLs of two database roles: `service`, with the rights to serve, and `reader`, which cannot write."""
    if servers.postgres is None:
        pytest.skip("makes and drops database roles: needs a PostgreSQL of its own")
    names = {role: f"{role}_{uuid.uuid4().hex[:8]}" for role in ("service", "reader")}
    servers.postgres.execute(f"CREATE ROLE {names['service']} LOGIN")
    servers.postgres.execute(f"CREATE ROLE {names['reader']} LOGIN SUPERUSER")
    servers.postgres.execute(f"ALTER ROLE {names['reader']} SET default_transaction_read_only = on")
    granted = run_gateway("migrate", "--grant-to", names["service"], database_url=servers.database_url)
    assert granted.returncode == 0, granted.stderr
    yield {role: str(URL(servers.database_url).with_user(name)) for role, name in names.items()}
    own = URL(servers.database_url).path[1:]
    for name in names.values():
        for statement in (f"DROP OWNED BY {name}", f"DROP ROLE {name}"):
            servers.postgres._run(
                servers.postgres._program("psql"), servers.postgres._url(own), f"--command={statement}"
            )


def assert_refused(done: "tuple[int | None, str]", *says: str) -> None:
    """Check for exit status 2 and one line on standard error, with these words."""
    status, errors = done
    assert status == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for words in says:
        assert words in errors


@pytest.mark.parametrize(
    ("role", "arguments", "says"),
    [
        ("service", ("account", "list"), "Use the owner of the tables"),
        ("service", ("key", "create", "1"), "Use the owner of the tables"),
        ("service", ("list", "list", "1"), "Use the owner of the tables"),
        ("reader", ("account", "create", "Acme"), "is read-only"),
        ("reader", ("list", "activate", "1"), "is read-only"),
    ],
)
def test_a_database_user_without_the_right(
    roles: dict[str, str], role: str, arguments: tuple[str, ...], says: str
) -> None:
    done = run_gateway(*arguments, database_url=roles[role])
    assert_refused((done.returncode, done.stderr), "GATEWAY_DATABASE_URL", says)


@pytest.mark.parametrize("command", COMMANDS_WITH_IDS)
def test_an_id_that_none_can_have(servers: Servers, command: tuple[str, ...]) -> None:
    more = ["+18005551000"] if command == ("list", "add") else []
    done = run_gateway(*command, str(2**63), *more, database_url=servers.database_url)
    assert done.returncode == 2, done.stderr
    assert re.search("Invalid value for '(account|key|list)_id'", done.stderr)


@pytest.mark.parametrize(
    "arguments", [("account", "create"), ("list", "add", "1"), ("migrate", "--grant-to"), ("status", "--gateway")]
)
def test_an_argument_that_is_not_utf_8(servers: Servers, arguments: tuple[str, ...]) -> None:
    done = run_gateway(*arguments, "caf\udce9", database_url=servers.database_url)
    assert_refused((done.returncode, done.stderr), r"'caf\udce9' is not UTF-8")


def test_a_role_without_a_name(servers: Servers) -> None:
    done = run_gateway("migrate", "--grant-to", "", database_url=servers.database_url)
    assert_refused((done.returncode, done.stderr), "--grant-to needs the name of a database role")


def test_a_statement_cache_that_is_no_number(servers: Servers) -> None:
    environment = {"GATEWAY_DATABASE_URL": servers.database_url, "GATEWAY_DATABASE_STATEMENT_CACHE": "none"}
    for arguments in (("account", "list"), ("migrate",)):
        done = run_gateway(*arguments, environment=environment)
        assert_refused((done.returncode, done.stderr), "GATEWAY_DATABASE_STATEMENT_CACHE='none' cannot be used")


def test_declare_at_a_broker_that_is_not_there() -> None:
    port = Port()
    nodes = f"amqp://u:p@127.0.0.1:{port}/,amqp://u:p@localhost:{port}/"
    done = run_gateway("declare", environment={"GATEWAY_DATABASE_URL": "postgres://u@h/x", "GATEWAY_AMQP_URL": nodes})
    refusals = "cannot declare at the broker", f" 127.0.0.1:{port}: ConnectionRefusedError ", f"; localhost:{port}: "
    assert_refused((done.returncode, done.stderr), *refusals)
    port.release()


async def test_declare_while_the_first_node_is_down(servers: Servers) -> None:
    port = Port()
    environment = process_environment(servers, GATEWAY_AMQP_URL=f"amqp://u:p@127.0.0.1:{port}/,{servers.amqp_url}")
    done = await asyncio.to_thread(run_gateway, "declare", environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"These exist now at the broker at {address(URL(servers.amqp_url))}:")
    async with OutboundQueue(servers.amqp_url, environment["GATEWAY_AMQP_QUEUE"]) as queue:
        assert await queue.depth() == 0
        await queue.delete()
    port.release()


async def serve(environment: dict[str, str], *arguments: str) -> tuple[int | None, str]:
    """Run `serve` until it ends by itself; return its exit status and what it says, without lines of the log."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve", *arguments),
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")} | environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    lines = errors.decode().splitlines(keepends=True)
    return process.returncode, "".join(line for line in lines if not line.startswith("{"))


@pytest.fixture
def environment(servers: Servers) -> Iterator[dict[str, str]]:
    """Return settings with which `serve` would serve."""
    ports = {f"GATEWAY_{name}_PORT": Port() for name in ("API", "OPS")}
    yield process_environment(servers, GATEWAY_API_HOST="127.0.0.1") | {name: str(port) for name, port in ports.items()}
    for port in ports.values():
        port.release()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("party", ["API", "OPS"])
async def test_a_port_that_is_taken(environment: dict[str, str], party: str, workers: str) -> None:
    taken = await asyncio.start_server(
        lambda _reader, writer: writer.close(), "127.0.0.1", int(environment[f"GATEWAY_{party}_PORT"])
    )
    async with taken:
        said = await serve(environment, "--workers", workers)
    assert_refused(said, "Address already in use", f"Set GATEWAY_{party}_HOST and GATEWAY_{party}_PORT")


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("party", ["API", "OPS"])
async def test_a_host_that_is_no_host_name(environment: dict[str, str], party: str, workers: str) -> None:
    said = await serve(environment | {f"GATEWAY_{party}_HOST": "gateway..example"}, "--workers", workers)
    assert_refused(said, "cannot listen on gateway..example", f"GATEWAY_{party}_HOST")


async def test_workers_that_cannot_start_end_the_supervisor(environment: dict[str, str]) -> None:
    """With one port for both, and a name for one of the addresses, only the workers find that they cannot listen."""
    both = environment | {"GATEWAY_OPS_PORT": environment["GATEWAY_API_PORT"], "GATEWAY_OPS_HOST": "localhost"}
    status, errors = await serve(both, "--workers", "2")
    assert status == 2, errors
    assert "Set GATEWAY_API_HOST and GATEWAY_API_PORT" in errors
    assert re.search(r"^error: worker [01] cannot start; its message is above$", errors, re.MULTILINE)


async def test_workers_without_a_place_for_their_sockets(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system without a folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"--workers needs a directory for sockets: .* Set TMPDIR"):
        await supervise(make_settings(), 2)


async def test_workers_whose_sockets_would_have_too_long_paths(environment: dict[str, str], tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    said = await serve(environment | {"TMPDIR": str(deep)}, "--workers", "2")
    assert_refused(said, "--workers needs a directory for sockets: AF_UNIX path too long. Set TMPDIR")
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "variable",
    ["OTEL_BSP_MAX_QUEUE_SIZE=256", "OTEL_BSP_SCHEDULE_DELAY=-1", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=many"],
)
async def test_a_value_that_opentelemetry_refuses(environment: dict[str, str], variable: str, workers: str) -> None:
    name, _, value = variable.partition("=")
    traces = {"GATEWAY_TRACES": "on", "OTEL_SERVICE_NAME": "fine", name: value}
    said = await serve(environment | traces, "--workers", workers)
    assert_refused(said, f"OpenTelemetry refuses {name}: ")
