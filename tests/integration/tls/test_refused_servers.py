"""A server or client without a valid certificate is refused, and the error says what to do."""

import asyncio
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from yarl import URL

from gateway import config
from gateway.amqp.connection import PublishConnection
from gateway.amqp.transport import reason as broker_reason
from gateway.amqp.transport import stray_cancellation_is_loss
from gateway.config import Settings
from gateway.postgres.pool import connect_to_primary, reason
from gateway.urls import with_tls
from testbed import Servers
from tests.integration.tls.secured import Secured
from tests.support.authority import Authority


async def database_says(settings: Settings) -> str:
    """Return why the database is not reached with these settings; "" when it is."""
    try:
        connection = await connect_to_primary(settings.database_url_with_tls(), timeout=10)
    except (OSError, asyncpg.PostgresError) as error:
        return reason(error)
    await connection.close()
    return ""


async def broker_says(settings: Settings) -> str:
    """Return why the broker is not reached with these settings; "" when it is."""
    connection = PublishConnection(settings, URL(settings.amqp_url), lambda _late: None)
    try:
        async with stray_cancellation_is_loss():
            await connection.open()
    except Exception as error:
        return broker_reason(error)
    finally:
        await connection.close()
    return ""


async def test_a_server_of_another_authority_is_refused_with_what_to_do(secured: Secured, tmp_path: Path) -> None:
    other = str(Authority(tmp_path).ca_file)
    assert "GATEWAY_DATABASE_CA_FILE must be the file of the CA" in await database_says(
        secured.settings(database_ca_file=other)
    )
    assert "GATEWAY_AMQP_CA_FILE must be the file of the CA" in await broker_says(secured.settings(amqp_ca_file=other))
    # Without a word about authorities it is the system's, which know nothing of ours.
    url = secured.environment["GATEWAY_DATABASE_URL"] + "?sslmode=verify-full"
    assert "must be the file of the CA" in await database_says(secured.settings(database_ca_file="", database_url=url))
    assert "must be the file of the CA" in await broker_says(secured.settings(amqp_ca_file=""))


async def test_a_server_with_another_name_is_refused_with_what_to_do(secured: Secured) -> None:
    """Both certificates are for 127.0.0.1."""
    settings = secured.settings(
        **{
            name: secured.environment[f"GATEWAY_{name.upper()}"].replace("127.0.0.1", "localhost")
            for name in ("database_url", "amqp_url")
        }
    )
    assert "The host name in GATEWAY_DATABASE_URL must be one of the certificate's names" in await database_says(
        settings
    )
    assert "The host name in GATEWAY_AMQP_URL must be one of the certificate's names" in await broker_says(settings)
    unnamed = settings.database_url + "?sslmode=verify-ca"
    assert await database_says(secured.settings(database_url=unnamed)) == ""


@pytest.mark.parametrize("mode", ["verify-ca", "require"])  # with a CA, libpq's require is verify-ca
async def test_without_the_name_the_authority_still_counts(secured: Secured, tmp_path: Path, mode: str) -> None:
    url = f"{secured.environment['GATEWAY_DATABASE_URL']}?sslmode={mode}"
    assert await database_says(secured.settings(database_url=url)) == ""
    other = str(Authority(tmp_path).ca_file)
    for files in ({"database_ca_file": other}, {"database_ca_file": "", "database_url": f"{url}&sslrootcert=system"}):
        says = await database_says(secured.settings(**({"database_url": url} | files)))
        assert "GATEWAY_DATABASE_CA_FILE must be the file of the CA" in says


async def test_servers_refuse_a_client_without_certificate_or_tls(secured: Secured) -> None:
    assert await database_says(secured.settings()) == ""
    assert await broker_says(secured.settings()) == ""
    assert await database_says(secured.settings(database_cert_file="", database_key_file="")) != ""
    assert await broker_says(secured.settings(amqp_cert_file="", amqp_key_file="")) != ""
    plain = secured.environment["GATEWAY_DATABASE_URL"] + "?sslmode=disable"
    assert "no pg_hba.conf entry" in await database_says(secured.settings(database_url=plain))
    plain = secured.environment["GATEWAY_AMQP_URL"].replace("amqps:", "amqp:")
    assert await broker_says(secured.settings(amqp_url=plain)) != ""


async def test_a_server_that_offers_no_tls_is_refused_with_what_to_do(secured: Secured, servers: Servers) -> None:
    if servers.postgres is None or servers.rabbitmq is None:
        pytest.skip("needs servers that are known to speak plain")
    url = with_tls(servers.database_url.partition("?")[0], sslrootcert=secured.environment["GATEWAY_DATABASE_CA_FILE"])
    assert "The server offers no TLS" in await database_says(secured.settings(database_url=url))
    url = servers.amqp_url.replace("amqp:", "amqps:")
    assert "The server speaks no TLS on this port" in await broker_says(secured.settings(amqp_url=url))


async def test_a_broker_that_knows_the_gateway_by_its_certificate_needs_no_password(secured: Secured) -> None:
    """As docs/settings.md says: `auth=EXTERNAL`, with RabbitMQ's plugin rabbitmq_auth_mechanism_ssl."""
    rabbitmq = secured.rabbitmq
    enable = [rabbitmq._program("rabbitmq-plugins"), "--node", rabbitmq.node, "enable", "rabbitmq_auth_mechanism_ssl"]
    run = partial(subprocess.run, enable, env=rabbitmq._environment(), check=True, capture_output=True)
    await asyncio.to_thread(run)
    user = "CN=gateway.internal"
    await asyncio.to_thread(rabbitmq.ctl, "add_user", user, "unused")
    await asyncio.to_thread(rabbitmq.ctl, "set_permissions", "--vhost", "/", user, "", r"^sms\.outbound$", "")
    mechanisms = "application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'EXTERNAL'])."
    await asyncio.to_thread(rabbitmq.ctl, "eval", mechanisms)
    url = f"amqps://127.0.0.1:{rabbitmq.port}/?auth=EXTERNAL"
    environment = secured.environment | {"GATEWAY_AMQP_URL": url}
    assert await broker_says(config.load(environment)) == ""


async def test_an_expired_certificate_is_refused_with_what_to_do(secured: Secured) -> None:
    _, cert, key = secured.authority.issue("127.0.0.1", expires=datetime.now(UTC) - timedelta(days=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0, ssl=context)
    try:
        port = server.sockets[0].getsockname()[1]
        says = await broker_says(secured.settings(amqp_url=f"amqps://guest:guest@127.0.0.1:{port}/"))
        assert "Renew the server's certificate" in says
    finally:
        server.close()
        await server.wait_closed()
