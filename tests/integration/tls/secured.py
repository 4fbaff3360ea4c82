"""PostgreSQL and RabbitMQ that speak TLS with clients of one authority, and a gateway's settings for them."""

from typing import Any, NamedTuple

import msgspec

from gateway.config import Settings
from gateway.postgres.pool import connect_to_primary
from testbed import PostgresWithTls, RabbitMQ
from tests.support.authority import Authority
from tests.support.gateways import run_gateway

ROLE, PASSWORD = "gateway_service", "s3cret"
QUEUE = "sms.outbound"


class Secured(NamedTuple):
    """Both servers, which accept only TLS with clients of `authority`, and the gateway's settings for them."""

    authority: Authority
    postgres: PostgresWithTls
    rabbitmq: RabbitMQ
    environment: dict[str, str]

    def settings(self, **changes: Any) -> Settings:
        read = {name.removeprefix("GATEWAY_").lower(): value for name, value in self.environment.items()}
        return msgspec.convert(read | changes, Settings, strict=False)


def run_well(environment: dict[str, str], *arguments: str) -> None:
    """Run a command of the gateway that succeeds."""
    completed = run_gateway(*arguments, environment=environment)
    assert completed.returncode == 0, completed.stderr


def make_user(rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("add_user", ROLE, PASSWORD)
    rabbitmq.ctl("set_permissions", "--vhost", "/", ROLE, "", r"^sms\.outbound$", "")


async def make_role(url: str) -> None:
    connection = await connect_to_primary(url)
    await connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
    await connection.close()
