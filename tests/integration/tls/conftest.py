"""Both servers speak TLS with clients of one private authority; the gateway has the rights to serve and no others."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from testbed import PostgresWithTls, RabbitMQ
from tests.integration.tls.secured import PASSWORD, ROLE, Secured, make_role, make_user, run_well
from tests.support.authority import Authority


@pytest.fixture(scope="package")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Start the servers; create role and user command by command, as docs/security.md says."""
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
        yield Secured(authority, postgres, rabbitmq, service)
    finally:
        rabbitmq.close()
        postgres.close()
