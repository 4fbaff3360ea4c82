"""URLs and environments against real servers: what is accepted at start connects, and no failed connect is a 500."""

import asyncio
import logging
import random
import re
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from gateway import config
from gateway.amqp.connection import PublishConnection
from gateway.amqp.transport import stray_cancellation_is_loss
from gateway.config import ConfigurationError
from gateway.postgres.pool import connect_to_primary
from gateway.urls import Database
from testbed import Servers
from tests.properties import MORE
from tests.properties.test_urls import POISON
from tests.support.authority import Authority
from tests.support.callers import Caller, Client
from tests.support.eventually import eventually
from tests.support.gateways import (
    GatewayProcess,
    MakeSettings,
    StartGateway,
    new_name,
    process_environment,
    run_gateway,
    running,
)
from tests.support.outbound_queue import OutboundQueue
from tests.support.tcp_proxy import TcpProxy

SUPPORTED = [
    "",
    "?",
    "?application_name=me",
    "?connect_timeout=10",
    "?connect_timeout=0",
    "?channel_binding=prefer",
    "?target_session_attrs=read-write",
    "?options=-c%20search_path%3Dpublic",
    "?search_path=public",
    "?sslnegotiation=postgres",
    "?sslmode=disable&",
]


def database_url(servers: Servers, query: str = "", **parts: str) -> str:
    """Return the URL of the session's database, with another query or other parts."""
    own = urlsplit(servers.database_url)
    return own._replace(query=query.removeprefix("?"), **parts).geturl() + ("?" if query == "?" else "")


@pytest.mark.parametrize("query", SUPPORTED)
async def test_a_supported_parameter_is_accepted_and_connects(servers: Servers, query: str) -> None:
    url = config.load_database_url({"GATEWAY_DATABASE_URL": database_url(servers, query)})
    connection = await connect_to_primary(url, timeout=10)
    try:
        name = await connection.fetchval("SELECT current_setting('application_name')")
        assert name == ("me" if "application_name" in query else "sms-gateway")
        if "search_path" in query:
            assert await connection.fetchval("SHOW search_path") == "public"
    finally:
        await connection.close()
    migrated = await asyncio.to_thread(run_gateway, "migrate", database_url=database_url(servers, query))
    assert migrated.returncode == 0, migrated.stderr


PARTS = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(["postgres", "postgresql"]),
        "user": st.sampled_from(["postgres", "postgre%73"]),
        "password": st.sampled_from(["", ":x", ":%40%3A%2F%F0%9F%94%91", ":"]),
        "host": st.sampled_from(["127.0.0.1", "localhost", "127.0.0.1:{port}", "localhost:{port}", ""]),
        "path": st.sampled_from(["/{name}", "/%67{rest}", "/", ""]),
        "query": st.lists(
            st.sampled_from(
                [
                    *(query.strip("?&") for query in SUPPORTED),
                    *["port={port}", "host=127.0.0.1", "host=localhost", "host=127.0.0.1,localhost", "dbname={name}"],
                    *["sslmode=", "user=postgres", "password=x", "foo=1", "keepalives_idle=1", "sslnegotiation=direct"],
                    *["channel_binding=require", "gssencmode=prefer", "port=abc", "connect_timeout=0x10", "service=x"],
                ]
            ),
            max_size=4,
        ).map("&".join),
        "end": st.sampled_from(["", "", "", "#", "?", "&"]),
    }
)


def test_a_database_url_is_refused_at_start_by_name_or_connects(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in POISON.items():
        monkeypatch.setenv(name, value)
    own = urlsplit(servers.database_url)
    name = own.path.removeprefix("/")
    outcomes: set[str] = set()

    @settings(derandomize=MORE == 1, max_examples=150 * MORE, deadline=None, database=None)
    @given(parts=PARTS)
    def check(parts: dict[str, str]) -> None:
        form = "{scheme}://{user}{password}@{host}{path}?{query}{end}".format(**parts)
        url = form.format(port=own.port, name=name, rest=name[1:])
        try:
            accepted = config.load_database_url({"GATEWAY_DATABASE_URL": url})
        except ConfigurationError as refusal:
            outcomes.add("refused")
            said = str(refusal)
            assert said.startswith("GATEWAY_DATABASE_URL ")
            return
        outcomes.add(asyncio.run(reached(accepted)))

    async def reached(url: str) -> str:
        """Return how the URL was answered. A URL that names another port or database is answered truthfully."""
        try:
            connection = await connect_to_primary(url, timeout=10)
        except (OSError, asyncpg.InvalidCatalogNameError):
            named = Database.of(url)
            is_other = {address.port for address in named.hosts} != {own.port} or named.name != name
            assert is_other or "verify-full" in url
            return "another server"
        await connection.close()
        return "connected"

    check()
    assert outcomes >= {"refused", "connected"}


BROKER_QUERY = st.lists(
    st.sampled_from(
        ["auth=plain", "auth=PLAIN", "auth=", "auth=gssapi", "auth=EXTERNAL", "heartbeat=0", "name=x", "foo"]
    ),
    max_size=2,
).map("&".join)
BROKER_FORM = st.builds(
    "{}://{}@{}{}{}".format,
    st.sampled_from(["amqp", "AMQP"]),
    st.sampled_from(["{user}:{password}", "%67uest:{password}"]),
    st.sampled_from(["127.0.0.1:{port}", "localhost:{port}"]),
    st.sampled_from(["", "/", "/%2F", "/%2f"]),
    BROKER_QUERY.map("?{}".format),
)


def test_a_broker_url_is_refused_at_start_by_name_or_connects(servers: Servers) -> None:
    own = URL(servers.amqp_url)
    outcomes: set[str] = set()

    @settings(derandomize=MORE == 1, max_examples=60 * MORE, deadline=None, database=None)
    @given(form=BROKER_FORM)
    def check(form: str) -> None:
        url = form.format(user=own.user, password=own.password, port=own.port)
        environ = {"GATEWAY_DATABASE_URL": "postgres://u@localhost/x", "GATEWAY_AMQP_URL": url}
        try:
            loaded = config.load(environ)
        except ConfigurationError as refusal:
            outcomes.add("refused")
            said = str(refusal)
        else:
            outcomes.add("connected")
            asyncio.run(publish_connection(loaded))
            return
        assert said.startswith("GATEWAY_AMQP_URL ")
        assert (own.password or "") not in said

    check()
    assert outcomes == {"refused", "connected"}


async def publish_connection(loaded: config.Settings) -> None:
    """Open a publish connection with these settings, and close it."""
    connection = PublishConnection(loaded, URL(loaded.amqp_nodes()[0]), lambda _late: None)
    try:
        async with stray_cancellation_is_loss():
            await connection.open()
    finally:
        await connection.close()


async def test_direct_tls_and_a_required_channel_binding_reach_a_database_by_tls(
    servers: Servers, tmp_path: Path
) -> None:
    """The real database, behind a terminator of TLS as providers have."""
    authority = Authority(tmp_path)
    files = authority.issue("127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["postgresql"])
    own = urlsplit(servers.database_url)
    seen: list[str | None] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        inner_reader, inner_writer = await asyncio.open_connection(own.hostname, own.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()

    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context) as terminator:
        port = terminator.sockets[0].getsockname()[1]
        netloc = f"{own.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
        query = f"sslnegotiation=direct&sslmode=require&channel_binding=require&sslrootcert={files.ca}"
        url = database_url(servers, query, netloc=netloc)
        connection = await connect_to_primary(config.load_database_url({"GATEWAY_DATABASE_URL": url}), timeout=10)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        assert seen == ["postgresql"]
        other = url.replace(str(files.ca), str(Authority(tmp_path).ca_file))
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_to_primary(config.load_database_url({"GATEWAY_DATABASE_URL": other}), timeout=10)


async def test_variables_of_libpq_have_no_effect_but_a_line_in_the_log(servers: Servers, caller: Caller) -> None:
    environment = process_environment(servers) | POISON
    async with running(GatewayProcess(environment)) as process, aiohttp.ClientSession() as session:
        assert (await Client(process.url, session, caller).post(caller.body()))[0] == 200
        text = process.log.read_text()
    for variable in POISON:
        assert f"{variable} has no effect; set GATEWAY_DATABASE_URL" in text
    migrated = await asyncio.to_thread(run_gateway, "migrate", environment=environment)
    assert migrated.returncode == 0, migrated.stderr


@pytest.mark.parametrize("command", ["serve", "serve --workers 2", "status", "migrate", "account list"])
def test_a_refused_url_ends_every_command_with_one_sentence(servers: Servers, command: str) -> None:
    environment = process_environment(servers, GATEWAY_DATABASE_URL=database_url(servers, "keepalives_idle=30"))
    refused = run_gateway(*command.split(), environment=environment)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: GATEWAY_DATABASE_URL has keepalives_idle, not supported. Remove it.")
    assert len(refused.stderr.splitlines()) == 1


async def test_administration_names_each_host_that_it_tried(servers: Servers) -> None:
    async with TcpProxy("127.0.0.1", 1) as down:
        down.refuse()
        netloc = (
            f"{urlsplit(servers.database_url).netloc.rpartition('@')[0]}@localhost:{down.port},127.0.0.1:{down.port}"
        )
        url = database_url(servers, netloc=netloc)
        failed = await asyncio.to_thread(run_gateway, "account", "list", database_url=url)
    assert failed.returncode == 2
    for host in ("localhost", "127.0.0.1"):
        assert f"{host}:{down.port}: " in failed.stderr
    # Where `localhost` also has an IPv6 address, asyncio joins the errors of both.
    assert failed.stderr.count("ConnectionRefusedError") + failed.stderr.count("Multiple exceptions") == 2


ANSWERS = [
    b"",
    b"\x00",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2p1\r\n",
    b"R\x00\x00\x00\x08\x00\x00\x00\x63",
    b"R\x00\x00\x00\x00",
    b"R\x00\x00\x00\x0c\x00\x00\x00\x0aXX\x00\x00",
    b"E\x00\x00\x00\x06\xff\x00",
    b"E\x00\x00\x00\x04",
    b"Z\x00\x00\x00\x05I",
    b"R\x00\x00\x00\x08\x00\x00\x00\x00S\x00\x00\x00\x07a\xff\x00Z\x00\x00\x00\x05I",
    *(random.Random(seed).randbytes(64) for seed in range(10)),  # noqa: S311 - no secret
]


async def test_whatever_a_server_answers_to_a_connect_a_request_gets_503(
    start_gateway: StartGateway, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    answer = b""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgres://u:hunter2@127.0.0.1:{port}/x"
        for sent in ANSWERS:
            answer = sent
            settings = make_settings(database_url=url, database_timeout_s=0.5)
            gateway = await start_gateway(settings, wait_until_ready=False)
            gateway.caller = Caller(key="trk_" + "a" * 32)
            caplog.clear()
            status, body, _ = await gateway.post(gateway.caller.body())
            assert (status, body["code"]) == (503, "database_unavailable"), answer
            said = [record.getMessage() for record in caplog.records if record.name == "gateway.postgres.pool"]
            assert not [record for record in caplog.records if record.levelno >= logging.ERROR], answer
            await eventually(lambda: "the database is unavailable" in caplog.text)
            assert f"127.0.0.1:{port}: " in caplog.text, said
            assert "hunter2" not in caplog.text


async def test_an_unmigrated_database_is_named_as_such_once(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log and in /readyz; the database may be missing, or have no tables."""
    caplog.set_level(logging.INFO)
    name = new_name()
    owner = await connect_to_primary(servers.database_url)
    url = database_url(servers, "sslmode=disable", path=f"/{name}")
    gateway = await start_gateway(make_settings(database_url=url), wait_until_ready=False)
    pool = gateway.runtime.pool
    try:
        for state in ("missing", "empty"):
            failures = pool.failures
            await eventually(lambda: pool.failures >= failures + 3)  # noqa: B023
            async with gateway.session.get(gateway.ops_url + "/readyz") as response:
                reason = (await response.json())["reasons"][-1]
            assert reason.startswith("the database is not migrated: ")
            assert reason.endswith("Run `python -m gateway migrate`")
            advice = [line for line in caplog.messages if "python -m gateway migrate" in line]
            assert len(advice) == ["missing", "empty"].index(state) + 1, advice
            assert f"the database is not migrated: 127.0.0.1:{urlsplit(url).port}" in advice[-1]
            if state == "missing":
                await owner.execute(f'CREATE DATABASE "{name}"')
        migrated = await asyncio.to_thread(run_gateway, "migrate", database_url=url)
        assert migrated.returncode == 0, migrated.stderr
        await gateway.wait_until_ready()
        reached = rf"reached the database at 127.0.0.1:{urlsplit(url).port}, after \d+ failures"
        assert [line for line in caplog.messages if re.fullmatch(reached, line)]
    finally:
        await pool.close()
        await owner.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await owner.close()


async def test_missing_queues_are_named_once_with_the_command_that_makes_them(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(amqp_topology="check")
    gateway = await start_gateway(settings, wait_until_ready=False)
    connections = gateway.runtime.publisher.connections
    await eventually(lambda: connections.connect_failures >= 4, timeout=20)
    (said,) = [line for line in caplog.messages if "cannot connect to the broker" in line]
    assert f"no exchange '{settings.amqp_exchange}'" in said
    assert "Run `python -m gateway declare`" in said
    names = {"GATEWAY_AMQP_EXCHANGE": settings.amqp_exchange, "GATEWAY_AMQP_QUEUE": settings.amqp_queue}
    declared = await asyncio.to_thread(run_gateway, "declare", environment=process_environment(servers, **names))
    assert declared.returncode == 0, declared.stderr
    exchange, name = settings.amqp_exchange, settings.amqp_queue
    broker = urlsplit(servers.amqp_url)
    assert declared.stdout.splitlines() == [
        f"These exist now at the broker at {broker.hostname}:{broker.port}:",
        f"  exchange {exchange} (direct)",
        f"  queue {name} (quorum), bound to {exchange}, with dead letters to {exchange}.dlx",
        f"  exchange {exchange}.dlx (fanout)",
        f"  queue {name}.dead (quorum), bound to {exchange}.dlx",
    ]
    await gateway.wait_until_ready()
    async with OutboundQueue(servers.amqp_url, settings.amqp_queue) as queue:
        await queue.delete()


async def test_an_outage_is_logged_once_and_then_counted(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with TcpProxy("127.0.0.1", urlsplit(servers.database_url).port or 0) as down:
        down.refuse()
        own = urlsplit(servers.database_url)
        netloc = f"{own.netloc.rpartition('@')[0]}@127.0.0.1:{down.port}"
        settings = make_settings(
            database_url=database_url(servers, "sslmode=disable", netloc=netloc),
            amqp_url=f"amqp://guest:guest@127.0.0.1:{down.port}/",
        )
        gateway = await start_gateway(settings, wait_until_ready=False)
        connections, pool = gateway.runtime.publisher.connections, gateway.runtime.pool
        await eventually(lambda: connections.connect_failures >= 5, timeout=20)
        await eventually(lambda: pool._failure_log._events >= 5, timeout=20)
        for start in ("cannot connect to the broker at 127.0.0.1:", "the database is unavailable: 127.0.0.1:"):
            assert len([line for line in caplog.messages if line.startswith(start)]) == 1, caplog.messages
        down.pass_through()
        await eventually(lambda: gateway.runtime.database_was_reached, timeout=20)
        assert [
            line for line in caplog.messages if re.fullmatch(r"the database answers again, after \d+ failures", line)
        ]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("host", ["*", "[::]", "::"])
async def test_all_addresses_of_both_families_are_served(servers: Servers, host: str, workers: int) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no IPv6")
    environment = process_environment(servers, GATEWAY_API_HOST=host, GATEWAY_OPS_HOST=host)
    async with running(GatewayProcess(environment, workers=workers)) as process, aiohttp.ClientSession() as session:
        for address in ("127.0.0.1", "[::1]"):
            async with session.post(f"http://{address}:{process.port}/api/v2/send/bulk") as response:
                assert response.status == 401
            async with session.get(f"http://{address}:{process.ops_port}/readyz") as response:
                assert response.status == 200
