"""A gateway process with TLS everywhere, least rights and no writable disk serves."""

import asyncio
import os
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import psutil
import pytest
from aio_pika.abc import AbstractChannel

from gateway.cli.admin import open_admin
from tests.integration.tls.secured import QUEUE, Secured
from tests.support.callers import Client, make_caller
from tests.support.eventually import eventually
from tests.support.gateways import GatewayProcess, running

HANDSHAKE_S = 3.0  # and for a head

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
    """Return True if this system lets users have mounts of their own; some containers do not."""
    return subprocess.run([*CONFINE, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603


class StrictGateway(GatewayProcess):
    """A gateway that sees every file system read-only, where the system allows that."""

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
        """Return the mount points that are not read-only."""
        mounts = [mount.split() for mount in Path(f"/proc/{self.pid}/mounts").read_text().splitlines()]
        on_top = {point: options.split(",") for _, point, _, options, *_ in mounts}  # the last of those at one place
        assert "/" in on_top
        return [point for point, options in on_top.items() if "ro" not in options]


@pytest.fixture(scope="module")
def process(secured: Secured) -> Iterator[StrictGateway]:
    _, cert, key = secured.authority.issue("127.0.0.1")
    files = {"GATEWAY_API_TLS_CERT_FILE": str(cert), "GATEWAY_API_TLS_KEY_FILE": str(key)}
    own = {"GATEWAY_DRAIN_DELAY_S": "0", "GATEWAY_HEADER_TIMEOUT_S": str(HANDSHAKE_S)}
    gateway = StrictGateway(secured.environment | files | own)
    gateway.is_confined = may_confine()
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.close()


@pytest.fixture
async def client(secured: Secured, process: StrictGateway) -> AsyncIterator[Client]:
    """Yield a client of the strict process, with an account that the database's owner has created."""
    async with open_admin(secured.postgres.url) as admin:
        caller = await make_caller(admin)
    connector = aiohttp.TCPConnector(ssl=secured.authority.client_context())
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Client(process.url, session, caller)


async def send(client: Client, count: int, **headers: str) -> tuple[int, Any, str]:
    """POST a batch; return status, answer, and the value of Idempotent-Replayed."""
    status, answer, answered = await client.post(client.caller.body(count), **headers)
    return status, answer, answered.get("Idempotent-Replayed", "")


def shown(secured: Secured) -> ssl.SSLContext:
    """Return the TLS context of a client with the gateway's certificate."""
    context = secured.authority.client_context()
    context.load_cert_chain(secured.environment["GATEWAY_AMQP_CERT_FILE"], secured.environment["GATEWAY_AMQP_KEY_FILE"])
    return context


@pytest.fixture
async def broker(secured: Secured) -> AsyncIterator[AbstractChannel]:
    """Open the channel of a consumer with all rights."""
    async with await aio_pika.connect(secured.rabbitmq.url, ssl_context=shown(secured)) as connection:
        yield await connection.channel()


async def take_ids(broker: AbstractChannel) -> list[str | None]:
    queue = await broker.get_queue(QUEUE, ensure=False)
    ids = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        ids.append(message.message_id)
    return ids


async def test_with_the_least_rights_and_tls_everywhere_a_batch_goes_all_the_way(
    client: Client, broker: AbstractChannel
) -> None:
    all_queued = {"queued_count": 3, "error_count": 0, "errors": []}
    assert await send(client, 3, Idempotency_Key="one") == (200, all_queued, "")
    assert await send(client, 3, Idempotency_Key="one") == (200, all_queued, "true")
    assert await send(client, 3) == (200, all_queued, "")
    assert len(set(await take_ids(broker))) == 6


async def test_it_writes_to_no_file_system(process: StrictGateway, client: Client) -> None:
    """Every mount that the process sees is read-only, and it has served a batch."""
    if not process.is_confined:
        pytest.skip("this system lets nobody have mounts of their own (unshare --user --mount)")
    assert (await send(client, 1))[0] == 200
    assert process.ways_to_write() == []


async def test_callers_are_served_tls_1_2_or_newer_and_nothing_in_plain(
    secured: Secured, process: StrictGateway, client: Client
) -> None:
    context = secured.authority.client_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else it is this client that refuses
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.open_connection("127.0.0.1", process.port.number, ssl=context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    _, writer = await asyncio.open_connection("127.0.0.1", process.port.number, ssl=context)
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
    writer.transport.abort()
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP/1" not in await reader.read()
    writer.close()
    assert (await send(client, 1))[0] == 200


async def test_a_client_that_does_not_finish_the_handshake_in_time_is_disconnected(
    process: StrictGateway, client: Client
) -> None:
    said_nothing, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
    said_half, other = await asyncio.open_connection("127.0.0.1", process.port.number)
    other.write(b"\x16\x03\x01")  # the beginning of a ClientHello
    async with asyncio.timeout(10 * HANDSHAKE_S):  # the event loop's own patience would be 60 s
        for reader in (said_nothing, said_half):
            with suppress(ConnectionResetError):
                assert b"HTTP/1" not in await reader.read()
    for each in (writer, other):
        each.close()
    assert (await send(client, 1))[0] == 200


async def test_the_operations_port_has_probes_and_nothing_else(process: StrictGateway, client: Client) -> None:
    async with client.session.post(f"{process.ops_url}/api/v2/send/bulk", data=b"{}") as response:
        assert response.status == 404
    listening = psutil.Process(process.pid).net_connections("tcp")
    hosts = {each.laddr.ip for each in listening if each.laddr.port == process.ops_port.number}
    assert hosts == {"127.0.0.1"}


async def test_a_renewed_certificate_is_served_after_sighup_and_a_broken_one_never(
    secured: Secured, process: StrictGateway, client: Client
) -> None:
    cert, key = (Path(process.settings[f"GATEWAY_API_TLS_{kind}_FILE"]) for kind in ("CERT", "KEY"))

    async def served() -> str:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", process.port.number, ssl=secured.authority.client_context()
        )
        serial: str = writer.get_extra_info("peercert")["serialNumber"]
        writer.transport.abort()
        return serial

    async def hang_up(says: str) -> None:
        os.kill(process.pid, signal.SIGHUP)
        await eventually(lambda: says in process.log.read_text())

    before = await served()
    renewed = secured.authority.issue("127.0.0.1")
    cert.write_bytes(renewed.cert.read_bytes())  # and not yet its key
    await hang_up("the certificate in use stays")
    assert await served() == before
    key.write_bytes(renewed.key.read_bytes())
    await hang_up("new connections get the certificate")
    assert await served() != before
    assert (await send(client, 1))[0] == 200


async def test_a_sighup_to_the_supervisor_reaches_every_worker(secured: Secured, tmp_path: Path) -> None:
    issued = secured.authority.issue("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(issued.cert.read_bytes())
    key.write_bytes(issued.key.read_bytes())
    files = {"GATEWAY_API_TLS_CERT_FILE": str(cert), "GATEWAY_API_TLS_KEY_FILE": str(key)}
    settings = secured.environment | files | {"GATEWAY_DRAIN_DELAY_S": "0"}
    async with running(GatewayProcess(settings, workers=2)) as gateway:
        before = gateway.workers
        os.kill(gateway.pid, signal.SIGHUP)
        await eventually(lambda: gateway.log.read_text().count("new connections get the certificate") == 2)
        assert gateway.workers == before
