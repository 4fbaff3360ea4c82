"""Nothing on the way can be read or forged: TLS to both servers and to callers, each side showing its certificate.

The gateway runs as an operator with strict rules would run it: TLS everywhere by a private authority, a database role
and a broker user with the rights to serve and no others, and no place on any disk to write to.
"""

import asyncio
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import aio_pika
import aiohttp
import asyncpg
import msgspec
import psutil
import pytest
from aio_pika.abc import AbstractChannel
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from yarl import URL

from gateway import tls
from gateway.amqp.connection import PublishConnection
from gateway.amqp.transport import reason as broker_reason
from gateway.amqp.transport import stray_cancellation_is_loss
from gateway.cli.admin import open_admin
from gateway.config import ConfigurationError, Settings
from gateway.postgres.pool import connect_to_primary, reason
from gateway.server import process as server
from gateway.server.unix_sockets import listen_on_own_socket
from gateway.urls import with_tls
from testbed import Certificates, Gateway, PostgresWithTls, RabbitMQ, Servers
from tests.conftest import GatewayUnderTest, new_number
from tests.support.eventually import eventually
from tests.support.outbound_queue import OutboundQueue

ROLE, PASSWORD = "gateway_service", "s3cret"
QUEUE = "sms.outbound"
HANDSHAKE_S = 3.0  # and for a head
ROOT = Path(__file__).parents[2]
KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Authority:
    """A certificate authority of a test's own, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority {uuid.uuid4().hex[:8]}")])
        self.ca_file = folder / "ca.pem"
        usage = {name: name in ("key_cert_sign", "crl_sign", "digital_signature") for name in KEY_USAGES}
        certificate = (
            self._builder(self._name, self._key.public_key(), datetime.now(UTC) + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str, *, expires: datetime | None = None) -> Certificates:
        """A certificate for this host name or IP address, for servers and clients, and its key, in files."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        known = x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(subject, key.public_key(), expires or datetime.now(UTC) + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([known]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        stem = uuid.uuid4().hex[:8]
        files = Certificates(self.ca_file, self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        files.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, expires: datetime
    ) -> x509.CertificateBuilder:
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=7))
            .not_valid_after(expires)
            .add_extension(own, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    def client_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca_file)


class Stand(NamedTuple):
    """Both servers, which speak TLS with clients of `authority` and with nobody else; and the gateway's settings."""

    authority: Authority
    postgres: PostgresWithTls
    rabbitmq: RabbitMQ
    environment: dict[str, str]

    def settings(self, **changes: Any) -> Settings:
        read = {name.removeprefix("GATEWAY_").lower(): value for name, value in self.environment.items()}
        return msgspec.convert(read | changes, Settings, strict=False)


def run_gateway(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """One command as an operator types it, with no setting inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PG"))}
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "gateway", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_well(environment: dict[str, str], *arguments: str) -> None:
    completed = run_gateway(environment, *arguments)
    assert completed.returncode == 0, completed.stderr


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Set up as README and docs/security.md tell it, command by command."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    postgres, rabbitmq = PostgresWithTls(authority.issue("127.0.0.1")), RabbitMQ(authority.issue("127.0.0.1"))
    ca, cert, key = map(str, authority.issue("gateway.internal"))
    files = {
        f"GATEWAY_{party}_{kind}_FILE": file
        for party in ("DATABASE", "AMQP")
        for kind, file in (("CA", ca), ("CERT", cert), ("KEY", key))
    }
    owner = files | {
        "GATEWAY_DATABASE_URL": f"postgres://postgres@127.0.0.1:{postgres.port}/gateway",
        "GATEWAY_AMQP_URL": rabbitmq.url,
    }
    try:
        with ThreadPoolExecutor(max_workers=2) as pool:
            for start in [pool.submit(postgres.start), pool.submit(rabbitmq.start)]:
                start.result()
            users = pool.submit(make_user, rabbitmq)
            run_well(owner, "migrate")
            asyncio.run(make_role(postgres.url))
            run_well(owner, "migrate", "--grant-to", ROLE)
            run_well(owner, "declare")
            users.result()
        login = f"{ROLE}:{PASSWORD}@127.0.0.1"
        service = files | {
            "GATEWAY_DATABASE_URL": f"postgres://{login}:{postgres.port}/gateway",
            "GATEWAY_AMQP_URL": f"amqps://{login}:{rabbitmq.port}/",
            "GATEWAY_AMQP_TOPOLOGY": "check",
        }
        yield Stand(authority, postgres, rabbitmq, service)
    finally:
        rabbitmq.close()
        postgres.close()


def make_user(rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("add_user", ROLE, PASSWORD)
    rabbitmq.ctl("set_permissions", "--vhost", "/", ROLE, "", r"^sms\.outbound$", "")


async def make_role(url: str) -> None:
    connection = await connect_to_primary(url)
    await connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
    await connection.close()


# --- the whole, as one process ---------------------------------------------------------------------------------------


# Not all of what a mount forbids may be lifted by who did not mount it: "nosuid" and the like have to be said again.
READ_ONLY = r"""
sort -r /proc/self/mounts | while read -r _ point _ options _; do
    kept=$(echo "$options" | tr , '\n' | grep -xE 'nosuid|nodev|noexec|noatime|nodiratime|relatime' | paste -sd,)
    mount -o "remount,bind,ro,$kept" "$(printf '%b' "$point")" || exit 1
done || exit 1
exec "$@"
"""
CONFINE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh"]


def may_confine() -> bool:
    """Whether this system lets users have a view of their own of the file systems; some containers do not."""
    return subprocess.run([*CONFINE, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603


class StrictGateway(Gateway):
    """The gateway, seeing every file system read-only where the system allows that."""

    is_confined = False

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        return [*(CONFINE if self.is_confined else []), *super()._command()]

    @property
    def pid(self) -> int:
        return next(pid for pid in self.processes if psutil.Process(pid).cmdline()[-1:] == ["serve"])

    def ways_to_write(self) -> list[str]:
        """Where it has something mounted that is not read-only."""
        mounts = [mount.split() for mount in Path(f"/proc/{self.pid}/mounts").read_text().splitlines()]
        on_top = {point: options.split(",") for _, point, _, options, *_ in mounts}  # the last of those at one place
        assert "/" in on_top
        return [point for point, options in on_top.items() if "ro" not in options]


@pytest.fixture(scope="module")
def process(stand: Stand) -> Iterator[StrictGateway]:
    _, cert, key = stand.authority.issue("127.0.0.1")
    files = {"GATEWAY_API_TLS_CERT_FILE": str(cert), "GATEWAY_API_TLS_KEY_FILE": str(key)}
    own = {"GATEWAY_DRAIN_DELAY_S": "0", "GATEWAY_HEADER_TIMEOUT_S": str(HANDSHAKE_S)}
    gateway = StrictGateway(stand.environment | files | own)
    gateway.is_confined = may_confine()
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.close()


class Caller(NamedTuple):
    session: aiohttp.ClientSession
    url: str
    key: str
    number: str

    async def send(self, count: int, **headers: str) -> tuple[int, Any, str]:
        """POST a batch; status, answer, and whether it was replayed."""
        message = {"to": "+447911123412", "list_number": self.number, "body": "Hello {{messageId}}"}
        sent = {"X-Api-Key": self.key} | {name.replace("_", "-"): value for name, value in headers.items()}
        batch = {"messages": [message] * count}
        async with self.session.post(f"{self.url}/api/v2/send/bulk", json=batch, headers=sent) as response:
            return response.status, await response.json(), response.headers.get("Idempotent-Replayed", "")


@pytest.fixture
async def caller(stand: Stand, process: StrictGateway) -> AsyncIterator[Caller]:
    """Somebody with an account, which the owner has made."""
    async with open_admin(stand.postgres.url) as admin:
        account_id = (await admin.create_account("caller"))["id"]
        key, number = (await admin.create_key(account_id))["key"], new_number()
        await admin.add_list(account_id, number)
    connector = aiohttp.TCPConnector(ssl=stand.authority.client_context())
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Caller(session, process.url, key, number)


def shown(stand: Stand) -> ssl.SSLContext:
    """The context of a client that shows the gateway's certificate."""
    context = stand.authority.client_context()
    context.load_cert_chain(stand.environment["GATEWAY_AMQP_CERT_FILE"], stand.environment["GATEWAY_AMQP_KEY_FILE"])
    return context


@pytest.fixture
async def broker(stand: Stand) -> AsyncIterator[AbstractChannel]:
    """A consumer's channel, with all rights."""
    async with await aio_pika.connect(stand.rabbitmq.url, ssl_context=shown(stand)) as connection:
        yield await connection.channel()


async def take_ids(broker: AbstractChannel) -> list[str | None]:
    queue = await broker.get_queue(QUEUE, ensure=False)
    ids = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        ids.append(message.message_id)
    return ids


async def test_with_the_least_rights_and_tls_everywhere_a_batch_goes_all_the_way(
    caller: Caller, broker: AbstractChannel
) -> None:
    all_queued = {"queued_count": 3, "error_count": 0, "errors": []}
    assert await caller.send(3, Idempotency_Key="one") == (200, all_queued, "")
    assert await caller.send(3, Idempotency_Key="one") == (200, all_queued, "true")
    assert await caller.send(3) == (200, all_queued, "")
    assert len(set(await take_ids(broker))) == 6


async def test_it_writes_to_no_file_system(process: StrictGateway, caller: Caller) -> None:
    """Its kernel says so: every mount that it sees is read-only, and it has served a batch like that."""
    if not process.is_confined:
        pytest.skip("this system lets nobody have mounts of their own (unshare --user --mount)")
    assert (await caller.send(1))[0] == 200
    assert process.ways_to_write() == []


async def test_callers_are_served_tls_1_2_or_newer_and_nothing_in_plain(
    stand: Stand, process: StrictGateway, caller: Caller
) -> None:
    client = stand.authority.client_context()
    client.set_ciphers("DEFAULT:@SECLEVEL=0")  # else it is this client that refuses
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.open_connection("127.0.0.1", process.port.number, ssl=client)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    _, writer = await asyncio.open_connection("127.0.0.1", process.port.number, ssl=client)
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
    writer.transport.abort()
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP/1" not in await reader.read()
    writer.close()
    assert (await caller.send(1))[0] == 200


async def test_who_is_not_through_the_handshake_in_time_is_cut_off(process: StrictGateway, caller: Caller) -> None:
    """A connection before its handshake is in no bound but the descriptors'."""
    said_nothing, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
    said_half, other = await asyncio.open_connection("127.0.0.1", process.port.number)
    other.write(b"\x16\x03\x01")  # the beginning of a ClientHello
    async with asyncio.timeout(10 * HANDSHAKE_S):  # the event loop's own patience would be 60 s
        for reader in (said_nothing, said_half):
            with suppress(ConnectionResetError):
                assert b"HTTP/1" not in await reader.read()
    for each in (writer, other):
        each.close()
    assert (await caller.send(1))[0] == 200


async def test_the_operations_port_has_probes_and_nothing_else(process: StrictGateway, caller: Caller) -> None:
    async with caller.session.post(f"{process.ops_url}/api/v2/send/bulk", data=b"{}") as response:
        assert response.status == 404
    listening = psutil.Process(process.pid).net_connections("tcp")
    hosts = {each.laddr.ip for each in listening if each.laddr.port == process.ops_port.number}
    assert hosts == {"127.0.0.1"}


async def test_a_renewed_certificate_is_served_after_sighup_and_a_broken_one_never(
    stand: Stand, process: StrictGateway, caller: Caller
) -> None:
    cert, key = (Path(process.settings[f"GATEWAY_API_TLS_{kind}_FILE"]) for kind in ("CERT", "KEY"))

    async def served() -> str:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", process.port.number, ssl=stand.authority.client_context()
        )
        serial: str = writer.get_extra_info("peercert")["serialNumber"]
        writer.transport.abort()
        return serial

    async def hang_up(says: str) -> None:
        os.kill(process.pid, signal.SIGHUP)
        await eventually(lambda: says in process.log.read_text())

    before = await served()
    renewed = stand.authority.issue("127.0.0.1")
    cert.write_bytes(renewed.cert.read_bytes())  # and not yet its key
    await hang_up("the certificate in use stays")
    assert await served() == before
    key.write_bytes(renewed.key.read_bytes())
    await hang_up("new connections get the certificate")
    assert await served() != before
    assert (await caller.send(1))[0] == 200


class TwoWorkers(Gateway):
    """Behind a supervisor."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--workers", "2"]


async def test_a_sighup_to_the_supervisor_reaches_every_worker(stand: Stand, tmp_path: Path) -> None:
    issued = stand.authority.issue("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(issued.cert.read_bytes())
    key.write_bytes(issued.key.read_bytes())
    files = {"GATEWAY_API_TLS_CERT_FILE": str(cert), "GATEWAY_API_TLS_KEY_FILE": str(key)}
    gateway = TwoWorkers(stand.environment | files | {"GATEWAY_DRAIN_DELAY_S": "0"})
    try:
        await asyncio.to_thread(gateway.start)
        supervisor = next(pid for pid in gateway.processes if psutil.Process(pid).cmdline()[-2:] == ["--workers", "2"])
        before = {child.pid for child in psutil.Process(supervisor).children()}
        os.kill(supervisor, signal.SIGHUP)
        await eventually(lambda: gateway.log.read_text().count("new connections get the certificate") == 2)
        assert {child.pid for child in psutil.Process(supervisor).children()} == before
    finally:
        await asyncio.to_thread(gateway.close)


# --- what is refused -------------------------------------------------------------------------------------------------


async def database_says(settings: Settings) -> str:
    """Why the database is not reached with these settings; "" when it is."""
    try:
        connection = await connect_to_primary(settings.database_url_with_tls(), timeout=10)
    except (OSError, asyncpg.PostgresError) as error:
        return reason(error)
    await connection.close()
    return ""


async def broker_says(settings: Settings) -> str:
    """Why the broker is not reached with these settings; "" when it is."""
    connection = PublishConnection(settings, URL(settings.amqp_url), lambda _late: None)
    try:
        async with stray_cancellation_is_loss():
            await connection.open()
    except Exception as error:
        return broker_reason(error)
    finally:
        await connection.close()
    return ""


async def test_a_server_of_another_authority_is_refused_with_what_to_do(stand: Stand, tmp_path: Path) -> None:
    other = str(Authority(tmp_path).ca_file)
    assert "GATEWAY_DATABASE_CA_FILE must be the file of the CA" in await database_says(
        stand.settings(database_ca_file=other)
    )
    assert "GATEWAY_AMQP_CA_FILE must be the file of the CA" in await broker_says(stand.settings(amqp_ca_file=other))
    # Without a word about authorities it is the system's, which know nothing of ours.
    url = stand.environment["GATEWAY_DATABASE_URL"] + "?sslmode=verify-full"
    assert "must be the file of the CA" in await database_says(stand.settings(database_ca_file="", database_url=url))
    assert "must be the file of the CA" in await broker_says(stand.settings(amqp_ca_file=""))


async def test_a_server_with_another_name_is_refused_with_what_to_do(stand: Stand) -> None:
    """Both certificates are for 127.0.0.1."""
    settings = stand.settings(
        **{
            name: stand.environment[f"GATEWAY_{name.upper()}"].replace("127.0.0.1", "localhost")
            for name in ("database_url", "amqp_url")
        }
    )
    assert "The host name in GATEWAY_DATABASE_URL must be one of the certificate's names" in await database_says(
        settings
    )
    assert "The host name in GATEWAY_AMQP_URL must be one of the certificate's names" in await broker_says(settings)
    unnamed = settings.database_url + "?sslmode=verify-ca"
    assert await database_says(stand.settings(database_url=unnamed)) == ""


async def test_who_shows_no_certificate_or_speaks_no_tls_is_refused_by_the_servers(stand: Stand) -> None:
    assert await database_says(stand.settings()) == ""
    assert await broker_says(stand.settings()) == ""
    assert await database_says(stand.settings(database_cert_file="", database_key_file="")) != ""
    assert await broker_says(stand.settings(amqp_cert_file="", amqp_key_file="")) != ""
    plain = stand.environment["GATEWAY_DATABASE_URL"] + "?sslmode=disable"
    assert "no pg_hba.conf entry" in await database_says(stand.settings(database_url=plain))
    plain = stand.environment["GATEWAY_AMQP_URL"].replace("amqps:", "amqp:")
    assert await broker_says(stand.settings(amqp_url=plain)) != ""


async def test_a_server_that_offers_no_tls_is_refused_with_what_to_do(stand: Stand, servers: Servers) -> None:
    if servers.postgres is None or servers.rabbitmq is None:
        pytest.skip("needs servers that are known to speak plain")
    url = with_tls(servers.database_url.partition("?")[0], sslrootcert=stand.environment["GATEWAY_DATABASE_CA_FILE"])
    assert "The server offers no TLS" in await database_says(stand.settings(database_url=url))
    url = servers.amqp_url.replace("amqp:", "amqps:")
    assert "The server speaks no TLS on this port" in await broker_says(stand.settings(amqp_url=url))


async def test_an_expired_certificate_is_refused_with_what_to_do(stand: Stand) -> None:
    _, cert, key = stand.authority.issue("127.0.0.1", expires=datetime.now(UTC) - timedelta(days=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0, ssl=context)
    try:
        port = server.sockets[0].getsockname()[1]
        says = await broker_says(stand.settings(amqp_url=f"amqps://guest:guest@127.0.0.1:{port}/"))
        assert "Renew the server's certificate" in says
    finally:
        server.close()
        await server.wait_closed()


# --- files and sockets -----------------------------------------------------------------------------------------------


def refusal(stand: Stand, **changes: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        tls.check(stand.settings(**changes))
    return str(refused.value)


def test_files_that_could_not_work_are_refused_at_start_by_the_variables_name(stand: Stand, tmp_path: Path) -> None:
    one, other = stand.authority.issue("a.internal"), stand.authority.issue("b.internal")
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("hello")
    for name in ("api_tls", "database", "amqp"):
        variable = f"GATEWAY_{name.upper()}"
        missing = refusal(stand, **{f"{name}_cert_file": "/nowhere.pem"})
        assert missing.startswith(f"{variable}_CERT_FILE='/nowhere.pem' cannot be read: No such file")
        unmatched = refusal(stand, **{f"{name}_cert_file": str(one.cert), f"{name}_key_file": str(other.key)})
        assert f"{variable}_CERT_FILE and {variable}_KEY_FILE cannot be used" in unmatched
        alone = refusal(stand, **{f"{name}_cert_file": "", f"{name}_key_file": str(one.key)})
        assert alone == f"{variable}_KEY_FILE is set without its certificate. Set {variable}_CERT_FILE"
        if name != "api_tls":
            assert f"{variable}_CA_FILE" in refusal(stand, **{f"{name}_ca_file": str(no_pem)})
    url = stand.environment["GATEWAY_DATABASE_URL"] + "?sslrootcert=/nowhere.pem"
    assert "GATEWAY_DATABASE_" in refusal(stand, database_url=url)


def test_the_process_refuses_them_too_and_workers_on_one_socket(stand: Stand, tmp_path: Path) -> None:
    for changes, says in (
        ({"GATEWAY_AMQP_CA_FILE": "/nowhere.pem"}, "error: GATEWAY_AMQP_CA_FILE='/nowhere.pem' cannot be read"),
        ({"GATEWAY_API_SOCKET": str(tmp_path / "api")}, "error: GATEWAY_API_SOCKET is served by one process"),
    ):
        completed = run_gateway(stand.environment | changes, "serve", "--workers", "2")
        assert completed.returncode == 2
        assert completed.stderr.splitlines()[-1].startswith(says)


async def test_a_unix_socket_is_for_its_user_and_group_replaces_a_dead_one_and_steals_no_living_one(
    tmp_path: Path, gateway: GatewayUnderTest
) -> None:
    path = tmp_path / "api"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    _, first = server.make_runners(gateway.runtime)
    _, second = server.make_runners(gateway.runtime)
    try:
        await listen_on_own_socket(first, str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET=.* is served by another process"):
            await listen_on_own_socket(second, str(path))
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            batch, key = {"messages": [gateway.message()]}, {"X-Api-Key": gateway.key}
            async with session.post("http://gateway/api/v2/send/bulk", json=batch, headers=key) as response:
                assert (await response.json())["queued_count"] == 1
        await first.cleanup()
        await listen_on_own_socket(second, str(path))
    finally:
        await first.cleanup()
        await second.cleanup()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, gateway: GatewayUnderTest) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    _, runner = server.make_runners(gateway.runtime)
    try:
        with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET=.*cannot be had: .*already in use"):
            await listen_on_own_socket(runner, str(path))
        with pytest.raises(ConfigurationError, match="cannot be had: No such file or directory"):
            await listen_on_own_socket(runner, str(tmp_path / "nowhere" / "api"))
    finally:
        await runner.cleanup()
    assert path.read_text() == "mine"


async def test_what_proxies_say_of_a_request_changes_nothing(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    """Anybody can send these: who believes them lets callers choose who they are."""
    body = msgspec.json.encode({"messages": [gateway.message()]})
    said = {
        "Forwarded": "for=10.0.0.1;host=evil.example;proto=https",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Prefix": "/evil",
        "X-Real-IP": "10.0.0.1",
        "X-Original-URL": "/livez",
        "X-HTTP-Method-Override": "DELETE",
    }
    plain = await gateway.post(body, X_Request_Id="same")
    forwarded = await gateway.post(body, X_Request_Id="same", **said)
    assert plain[:2] == forwarded[:2] == (200, {"queued_count": 1, "error_count": 0, "errors": []})
    assert plain[2].keys() == forwarded[2].keys()
    one, other = await queue.take_payloads()
    differ = {name for name in one if one[name] != other[name]}
    assert differ <= {"id", "body", "accepted_at"}
    assert not any("evil" in str(value) or "10.0.0.1" in str(value) for value in other.values())
    unauthorised, _, _ = await gateway.post(body, X_Api_Key="trk_" + "0" * 32, **said)
    assert unauthorised == 401
