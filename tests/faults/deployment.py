"""A deployment to break: gateway processes on a real cluster and a real pair of databases, with proxies between.

    gateways ─ TcpProxy ─ RabbitMQ × 3            clients reach the gateways directly, or through HAProxy;
             └ TcpProxy ─ PostgreSQL × 2          consumers and administration bypass the proxies

With GATEWAY_AMQP_URL set, the broker that it names is used, and never broken.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import cycle
from urllib.parse import urlsplit

import aio_pika

from gateway.amqp.transport import Connection
from gateway.cli.admin import open_admin
from testbed import (
    Footprint,
    Gateway,
    HaProxy,
    PostgresPair,
    RabbitMQ,
    RabbitMQCluster,
    Server,
    ServerError,
    in_parallel,
)
from tests.support.callers import NOBODY, make_caller
from tests.support.gateways import run_gateway
from tests.support.tcp_proxy import TcpProxy

# Short waits, so that a scenario takes seconds. The deadlines keep their order.
QUICK = {
    "GATEWAY_CONFIRM_TIMEOUT_S": "3",
    "GATEWAY_ABANDON_TIMEOUT_S": "6",
    "GATEWAY_DATABASE_TIMEOUT_S": "1",
    "GATEWAY_AMQP_HEARTBEAT_S": "1",
    "GATEWAY_AMQP_CONNECT_TIMEOUT_S": "2",
    "GATEWAY_DRAIN_DELAY_S": "1",
}
MEASURE_S = 0.3


class Deployment:
    """The servers, gateways and proxies that a scenario runs on. open_deployment() makes one."""

    def __init__(self, cluster: RabbitMQCluster | None, databases: PostgresPair) -> None:
        self._cluster = cluster
        self.databases = databases
        self.queue = ""
        self.gateways: list[Gateway] = []
        self.balancer: HaProxy | None = None
        self.caller = NOBODY
        self.broker_proxies: list[TcpProxy] = []
        self.database_proxies: list[TcpProxy] = []
        self._settings: Mapping[str, str] | None = None
        # Set when a node was paused for so long that the others may have given it up.
        self.may_be_partitioned = False

    # The servers

    @property
    def has_own_broker(self) -> bool:
        """Return whether the broker was started here and may be broken."""
        return self._cluster is not None

    @property
    def cluster(self) -> RabbitMQCluster:
        """Return the broker, to be broken. Raises ServerError when the environment named it."""
        if self._cluster is None:
            raise ServerError("the broker that GATEWAY_AMQP_URL names must not be broken")
        return self._cluster

    @property
    def amqp_urls(self) -> list[str]:
        """Return the URLs of the broker's nodes, past the proxies."""
        url = os.environ["GATEWAY_AMQP_URL"] if self._cluster is None else self._cluster.url
        return [node.strip() for node in url.split(",")]

    async def leader(self) -> RabbitMQ:
        """Return the node that leads the queue."""
        return await asyncio.to_thread(self.cluster.leader_of, self.queue)

    async def publishers_node(self) -> RabbitMQ:
        """Return the node to which the gateways send most at this moment."""
        before = [proxy.bytes_to_server for proxy in self.broker_proxies]
        await asyncio.sleep(MEASURE_S)
        sent = [proxy.bytes_to_server - earlier for proxy, earlier in zip(self.broker_proxies, before, strict=True)]
        return self.cluster.nodes[sent.index(max(sent))]

    @asynccontextmanager
    async def broker_channel(self) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
        """Open a channel past the proxies, on the first node that answers."""
        for url in cycle(self.amqp_urls):
            with suppress(OSError):
                connection = await aio_pika.connect(url, timeout=3, connection_class=Connection)
                break
        async with connection, connection.channel() as channel:
            yield channel

    # The gateways

    async def serve(self, settings: Mapping[str, str], count: int, *, gateway: type[Gateway] = Gateway) -> None:
        """Have `count` gateways with these settings running and ready: the present ones, or new ones on a new queue."""
        same = [type(running) for running in self.gateways] == [gateway] * count and self._settings == settings
        if same and all(running.is_serving for running in self.gateways):
            return
        await self.stop_gateways()
        self.queue = f"faults.{uuid.uuid4().hex[:12]}"
        servers = {
            "GATEWAY_AMQP_URL": ",".join(
                through(url, proxy) for url, proxy in zip(self.amqp_urls, self.broker_proxies, strict=True)
            ),
            "GATEWAY_DATABASE_URL": self._database_url(),
            "GATEWAY_AMQP_EXCHANGE": self.queue,
            "GATEWAY_AMQP_QUEUE": self.queue,
        }
        self.gateways = [gateway(servers | dict(settings)) for _ in range(count)]
        self._settings = settings
        await start_all(self.gateways)

    async def stop_gateways(self) -> None:
        """End all gateways, and delete their queue."""
        gateways, self.gateways = self.gateways, []
        if gateways:
            await asyncio.to_thread(in_parallel, [gateway.close for gateway in gateways])
            async with asyncio.timeout(30), self.broker_channel() as channel:
                for queue in (self.queue, f"{self.queue}.dead"):
                    await channel.queue_delete(queue)
                for exchange in (self.queue, f"{self.queue}.dlx"):
                    await channel.exchange_delete(exchange)

    def footprints(self) -> dict[int, Footprint]:
        """Return the footprint of each running gateway by its pid."""
        footprints = [gateway.footprint() for gateway in self.gateways if gateway.is_running]
        return {footprint.pid: footprint for footprint in footprints}

    def _database_url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.database_proxies)
        return f"postgres://postgres@{hosts}/{self.databases.primary.database}?sslmode=disable"

    # Between two scenarios

    async def heal(self) -> None:
        """Undo whatever a scenario, perhaps one that failed, has left broken."""
        for proxy in (*self.broker_proxies, *self.database_proxies):
            proxy.pass_through()
        servers: list[Server] = [self.databases.primary, self.databases.standby, *self.gateways]
        if self._cluster is not None:
            servers += self._cluster.nodes
        for server in servers:
            server.resume()
        await asyncio.to_thread(self.databases.start)
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.heal if self.may_be_partitioned else self._cluster.start)
            self.may_be_partitioned = False


@asynccontextmanager
async def open_deployment() -> AsyncIterator[Deployment]:
    """Start the servers and create an account; stop everything at the end."""
    async with AsyncExitStack() as stack:
        cluster = None if "GATEWAY_AMQP_URL" in os.environ else RabbitMQCluster(3)
        # Promotion is promised to lose nothing only with a synchronous standby: one that lags has lost commits.
        databases = PostgresPair(fsync=False, synchronous=True)
        servers: list[PostgresPair | RabbitMQCluster] = [databases] if cluster is None else [databases, cluster]
        for server in servers:
            stack.push_async_callback(asyncio.to_thread, server.close)
        await start_all(servers)
        migrated = await asyncio.to_thread(run_gateway, "migrate", database_url=databases.primary.url)
        if migrated.returncode != 0:
            raise ServerError(f"the database could not be migrated:\n{migrated.stderr}")
        deployment = Deployment(cluster, databases)
        async with open_admin(databases.primary.url) as admin:
            deployment.caller = await make_caller(admin, "faults")
        for url in deployment.amqp_urls:
            parts = urlsplit(url)
            proxy = TcpProxy(parts.hostname or "", parts.port or 5672)
            deployment.broker_proxies.append(await stack.enter_async_context(proxy))
        for database in (databases.primary, databases.standby):
            proxy = TcpProxy("127.0.0.1", database.port.number)
            deployment.database_proxies.append(await stack.enter_async_context(proxy))
        stack.push_async_callback(deployment.stop_gateways)
        yield deployment


def through(url: str, proxy: TcpProxy) -> str:
    """Return the same URL with the proxy's address."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}").geturl()


async def start_all(servers: Iterable[Server | RabbitMQCluster | PostgresPair]) -> None:
    """Start the servers in parallel; raise the first exception that one of them raised."""
    await asyncio.to_thread(in_parallel, [server.start for server in servers])
