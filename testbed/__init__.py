"""Private PostgreSQL, PgBouncer, RabbitMQ, HAProxy and gateway processes for tests, benchmarks, examples and the demo.

Every server is real. Each has its own folder, ports, node name, cookie and epmd. So any number of runs can go on side
by side, and the machine's own servers are not touched. All listen on 127.0.0.1 only. Each runs under
testbed/supervisor.py, so it ends with the process that started it, however that process ends. Linux only.

    with Servers() as servers:    # both at once; one that the environment names is used instead of a private one
        print(servers.environment())
    with RabbitMQ() as rabbitmq:  # one alone; its URL is known before the start and stays the same over restarts
        rabbitmq.kill()
        rabbitmq.start()
    with RabbitMQCluster(3) as cluster:
        cluster.leader_of("sms.outbound").kill()
    with PostgresPair() as pair:
        pair.promote()
    with HaProxy([(gateway.port.number, gateway.ops_port.number)]) as balancer:
        print(balancer.url)

processes   ports, and the base of every server            clusters   a RabbitMQ cluster, a PostgreSQL pair
postgres    PostgreSQL, with and without TLS               haproxy    a load balancer in front of gateways
rabbitmq    one RabbitMQ node                              servers    PostgreSQL and RabbitMQ, or the environment's
pgbouncer   PgBouncer in front of a PostgreSQL             supervisor the program that runs and ends one server
gateway     the gateway as a process
"""

from testbed.clusters import NET_TICK_S, PostgresPair, RabbitMQCluster
from testbed.gateway import Gateway
from testbed.haproxy import HaProxy
from testbed.pgbouncer import PgBouncer
from testbed.postgres import Postgres, PostgresWithTls
from testbed.processes import Certificates, Footprint, Port, Server, ServerError, in_parallel
from testbed.rabbitmq import RabbitMQ
from testbed.servers import Servers

__all__ = [
    "NET_TICK_S",
    "Certificates",
    "Footprint",
    "Gateway",
    "HaProxy",
    "PgBouncer",
    "Port",
    "Postgres",
    "PostgresPair",
    "PostgresWithTls",
    "RabbitMQ",
    "RabbitMQCluster",
    "Server",
    "ServerError",
    "Servers",
    "in_parallel",
]
