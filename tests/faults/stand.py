"""The stand: gateway processes on a real cluster and a real pair of databases, with a network between that can fail.

    gateways ─ TcpProxy ─ RabbitMQ × 3            clients reach the gateways directly, or through HAProxy;
             └ TcpProxy ─ PostgreSQL × 2          consumers and administration bypass the proxies

With GATEWAY_AMQP_URL set, the broker is the one it names: it is used, and left to its owner.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import cycle
from urllib.parse import urlsplit

import aio_pika
import psutil

from gateway.cli.admin import open_admin
from testbed import Gateway, HaProxy, PostgresPair, RabbitMQ, RabbitMQCluster, Server, ServerError
from tests.conftest import new_number, run_gateway
from tests.faults.client import Sender
from tests.support.tcp_proxy import TcpProxy

# Everything that waits, waits shorter, so that a scenario takes seconds. The deadlines stay in their order.
QUICK = {
    "GATEWAY_CONFIRM_TIMEOUT_S": "3",
    "GATEWAY_ABANDON_TIMEOUT_S": "6",
    "GATEWAY_DATABASE_TIMEOUT_S": "1",
    "GATEWAY_AMQP_HEARTBEAT_S": "1",
    "GATEWAY_AMQP_CONNECT_TIMEOUT_S": "2",
    "GATEWAY_DRAIN_DELAY_S": "1",
}
MEASURE_S = 0.3


class Footprint:
    """What a process holds."""

    def __init__(self, process: psutil.Process) -> None:
        self.pid = process.pid
        self.resident_mb = process.memory_info().rss / 1e6
        self.descriptors = process.num_fds()


class Stand:
    """What a scenario plays on. Opened by open_stand()."""

    def __init__(self, cluster: RabbitMQCluster | None, databases: PostgresPair) -> None:
        self._cluster = cluster
        self.databases = databases
        self.queue = ""
        self.gateways: list[Gateway] = []
        self.balancer: HaProxy | None = None
        self.sender = Sender("", "")
        self.broker_proxies: list[TcpProxy] = []
        self.database_proxies: list[TcpProxy] = []
        self._settings: Mapping[str, str] | None = None
        self.may_be_partitioned = False  # a node was paused for so long that the others may have given it up

    # The servers

    @property
    def has_own_broker(self) -> bool:
        return self._cluster is not None

    @property
    def cluster(self) -> RabbitMQCluster:
        """The broker, to be hurt. Raises when it is somebody else's."""
        if self._cluster is None:
            raise ServerError("the broker that GATEWAY_AMQP_URL names is not ours to break")
        return self._cluster

    @property
    def amqp_urls(self) -> list[str]:
        """The broker's nodes, not through the proxies."""
        url = os.environ["GATEWAY_AMQP_URL"] if self._cluster is None else self._cluster.url
        return [node.strip() for node in url.split(",")]

    async def leader(self) -> RabbitMQ:
        """The node that leads the queue."""
        return await asyncio.to_thread(self.cluster.leader_of, self.queue)

    async def publishers_node(self) -> RabbitMQ:
        """The node that the gateways send most to, right now."""
        before = [proxy.bytes_to_server for proxy in self.broker_proxies]
        await asyncio.sleep(MEASURE_S)
        sent = [proxy.bytes_to_server - earlier for proxy, earlier in zip(self.broker_proxies, before, strict=True)]
        return self.cluster.nodes[sent.index(max(sent))]

    @asynccontextmanager
    async def broker_channel(self) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
        """A channel of our own, through whichever node answers."""
        for url in cycle(self.amqp_urls):
            with suppress(OSError):
                connection = await aio_pika.connect(url, timeout=3)
                break
        async with connection, connection.channel() as channel:
            yield channel

    # The gateways

    async def serve(self, settings: Mapping[str, str], count: int, *, gateway: type[Gateway] = Gateway) -> None:
        """Have `count` gateways of these settings running and ready: those that are, or new ones on a new queue."""
        same = [type(running) for running in self.gateways] == [gateway] * count and self._settings == settings
        if same and all(running.is_serving for running in self.gateways):
            return
        await self.stop_gateways()
        self.queue = f"faults.{uuid.uuid4().hex[:12]}"
        own = {
            "GATEWAY_AMQP_URL": ",".join(
                through(url, proxy) for url, proxy in zip(self.amqp_urls, self.broker_proxies, strict=True)
            ),
            "GATEWAY_DATABASE_URL": self._database_url(),
            "GATEWAY_AMQP_EXCHANGE": self.queue,
            "GATEWAY_AMQP_QUEUE": self.queue,
        }
        self.gateways = [gateway(own | dict(settings)) for _ in range(count)]
        self._settings = settings
        await at_once(self.gateways, "start")

    async def stop_gateways(self) -> None:
        """End all gateways, and delete their queue."""
        gateways, self.gateways = self.gateways, []
        if gateways:
            await at_once(gateways, "close")
            async with asyncio.timeout(30), self.broker_channel() as channel:
                for queue in (self.queue, f"{self.queue}.dead"):
                    await channel.queue_delete(queue)
                for exchange in (self.queue, f"{self.queue}.dlx"):
                    await channel.exchange_delete(exchange)

    async def footprints(self) -> list[Footprint]:
        """What each gateway holds now, of those that run."""
        pids = [running.processes[0] for running in self.gateways if running.is_running]
        return [Footprint(psutil.Process(pid)) for pid in pids]

    def _database_url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.database_proxies)
        return f"postgres://postgres@{hosts}/{self.databases.primary.database}?sslmode=disable"

    # Between two scenarios

    async def heal(self) -> None:
        """Undo whatever a scenario, perhaps a failed one, has left broken."""
        for proxy in (*self.broker_proxies, *self.database_proxies):
            proxy.pass_through()
        own: list[Server] = [self.databases.primary, self.databases.standby, *self.gateways]
        if self._cluster is not None:
            own += self._cluster.nodes
        for server in own:
            server.resume()
        await asyncio.to_thread(self.databases.start)
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.heal if self.may_be_partitioned else self._cluster.start)
            self.may_be_partitioned = False


@asynccontextmanager
async def open_stand() -> AsyncIterator[Stand]:
    """Start the servers, with an account in the database; stop everything at the end."""
    async with AsyncExitStack() as stack:
        cluster = None if "GATEWAY_AMQP_URL" in os.environ else RabbitMQCluster(3)
        # What is promised of a promotion is promised of a synchronous standby: one that lags has lost commits.
        databases = PostgresPair(fsync=False, synchronous=True)
        servers: list[PostgresPair | RabbitMQCluster] = [databases] if cluster is None else [databases, cluster]
        for server in servers:
            stack.push_async_callback(asyncio.to_thread, server.close)
        await at_once(servers, "start")
        migrated = await asyncio.to_thread(run_gateway, "migrate", database_url=databases.primary.url)
        if migrated.returncode != 0:
            raise ServerError(f"the database could not be migrated:\n{migrated.stderr}")
        stand = Stand(cluster, databases)
        async with open_admin(databases.primary.url) as admin:
            account = (await admin.create_account("faults"))["id"]
            key = (await admin.create_key(account))["key"]
            stand.sender = Sender(key, new_number())
            await admin.add_list(account, stand.sender.list_number)
        for url in stand.amqp_urls:
            parts = urlsplit(url)
            proxy = TcpProxy(parts.hostname or "", parts.port or 5672)
            stand.broker_proxies.append(await stack.enter_async_context(proxy))
        for database in (databases.primary, databases.standby):
            proxy = TcpProxy("127.0.0.1", database.port.number)
            stand.database_proxies.append(await stack.enter_async_context(proxy))
        stack.push_async_callback(stand.stop_gateways)
        yield stand


def through(url: str, proxy: TcpProxy) -> str:
    """The same URL, by way of the proxy."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}").geturl()


async def at_once(servers: Sequence[Server | RabbitMQCluster | PostgresPair], action: str) -> None:
    """Do the same to all, in parallel; raise what the first of them raised."""
    done = await asyncio.gather(
        *(asyncio.to_thread(getattr(server, action)) for server in servers), return_exceptions=True
    )
    for result in done:
        if isinstance(result, BaseException):
            raise result
