"""Servers in company, for tests and demos: a RabbitMQ cluster, a PostgreSQL primary with its standby, HAProxy.

Everything is private to its run, on 127.0.0.1, and ends with it, as in testbed/servers.py; each member can be
killed, paused, stopped and started again by itself.

    with RabbitMQCluster(3) as cluster:
        cluster.leader_of("sms.outbound").kill()
    with PostgresPair() as pair:
        pair.promote()
    with HaProxy([(gateway.port.number, gateway.ops_port.number)]) as balancer:
        print(balancer.url)
"""

import argparse
import csv
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from testbed import servers
from testbed.servers import POLL_S, Port, Postgres, RabbitMQ, Server, ServerError, Started

NET_TICK_S = 8  # a paused node is given up after 6 to 10 s; the default, 60, would make every such test a minute long
JOIN_TIMEOUT_S = 60
CATCH_UP_TIMEOUT_S = 60.0
HEALTH_CHECK_MS = 200


def _at_once(actions: Iterable[Callable[[], object]]) -> None:
    """Do them in parallel; wait for all, then raise what the first of them raised."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        running = [pool.submit(action) for action in actions]
    for done in running:
        done.result()


class RabbitMQCluster(Started):
    """Several RabbitMQ nodes that know each other, from the system's `rabbitmq-server`."""

    def __init__(self, count: int = 3) -> None:
        self._epmd = _Epmd()
        self.nodes: list[RabbitMQ] = []
        for _ in range(count):
            self.nodes.append(_Node(self._epmd.port, self.nodes))
        self._formed = False

    @property
    def url(self) -> str:
        """All nodes, as GATEWAY_AMQP_URL takes them."""
        return ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start the nodes that are down, for the first time or again; return when all are one cluster."""
        self._epmd.start()
        if not self._formed:
            # The first time one alone, for the others to join. All at once would be no faster on two cores (16 to 27 s
            # against 18 to 23), and for who founds the cluster they compete with locks and random delays.
            self.nodes[0].start()
        _at_once(node.start for node in self.nodes)
        self.wait_until_whole()
        self._formed = True

    def wait_until_whole(self) -> None:
        """Wait until all nodes run in one cluster."""
        _await_online(self._serving_node(), len(self.nodes), JOIN_TIMEOUT_S)

    def heal(self) -> None:
        """Restart the nodes that were left alone by a partition, as an operator does; return when all are one again.

        For after resume(). A node that was paused for longer than NET_TICK_S may wake up, find the others gone and back
        in the same moment, and stay apart with its view of queues and bindings (Mnesia's, in RabbitMQ 3; quorum queues
        themselves recover: https://github.com/rabbitmq/rabbitmq-server/issues/17319).
        """
        with ThreadPoolExecutor() as pool:
            alone = list(pool.map(self._is_alone, self.nodes))
        for node, is_alone in zip(self.nodes, alone, strict=True):
            if is_alone:
                node.kill()
        self.start()

    def _is_alone(self, node: RabbitMQ) -> bool:
        try:
            _await_online(node, len(self.nodes) // 2 + 1, timeout_s=1)
        except ServerError:
            return True
        return False

    def leader_of(self, queue: str) -> RabbitMQ:
        """The node where the queue's leader is, as a living one knows it; of a classic queue, where it is."""
        [node] = self._ask(_LEADER, queue)
        return node

    def members_of(self, queue: str) -> list[RabbitMQ]:
        """The nodes that have a copy of the quorum queue, whether they are up or not."""
        return self._ask(_MEMBERS, queue)

    def nodes_of(self, processes: Iterable[int]) -> list[RabbitMQ]:
        """The nodes that clients (pids) are connected to, once per connection."""
        by_port = {node.port.number: node for node in self.nodes}
        connections = [each for pid in processes for each in psutil.Process(pid).net_connections("tcp") if each.raddr]
        return [by_port[each.raddr.port] for each in connections if each.raddr.port in by_port]

    def _ask(self, expression: str, queue: str) -> list[RabbitMQ]:
        # Not `list_queues`: it asks every node, and waits long for one that is paused.
        find = f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
        names = self._serving_node().ctl("eval", f'{find} io:format("~s~n", [{expression}]).')
        by_name = {node.node: node for node in self.nodes}
        return [by_name[name] for name in names.split() if name in by_name]

    def _serving_node(self) -> RabbitMQ:
        for node in self.nodes:
            if node.is_serving:
                return node
        raise ServerError("no node of the cluster answers")

    def close(self) -> None:
        """Kill all nodes and remove their data."""
        _at_once(node.close for node in self.nodes)
        self._epmd.close()


def _await_online(node: RabbitMQ, count: int, timeout_s: int) -> None:
    """Wait until `node` sees so many running nodes, itself included."""
    node.ctl("await_online_nodes", str(count), "--timeout", str(timeout_s), timeout_s=timeout_s + 30)


# Where the leader was last seen by Ra; of other kinds of queues, the process that is the queue.
_LEADER = """case amqqueue:get_pid(Q) of
    {Name, Recorded} -> case ra_leaderboard:lookup_leader(Name) of {_, Leader} -> Leader; _ -> Recorded end;
    Process -> node(Process)
end"""
_MEMBERS = 'lists:join(" ", [atom_to_list(N) || N <- maps:get(nodes, amqqueue:get_type_state(Q))])'


class _Epmd(Server):
    """The register in which a cluster's nodes find each other's ports; a process of its own, to outlive each."""

    name = "epmd"

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        erl = shutil.which("erl")
        if erl is None:
            raise ServerError("Erlang is missing: install the package rabbitmq-server (scripts/setup does).")
        beside = Path(erl).resolve().with_name("epmd")
        return [str(beside if beside.exists() else "epmd"), "-address", "127.0.0.1", "-port", str(self.port)]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port.number), timeout=1.0).close()
        except OSError:
            return False
        return True


class _Node(RabbitMQ):
    """One node of a cluster; `peers` are all its nodes, itself included."""

    def __init__(self, epmd_port: Port, peers: list[RabbitMQ]) -> None:
        super().__init__()
        self.epmd_port.release()
        self.epmd_port = epmd_port
        self._peers = peers
        if peers:
            self.cookie = peers[0].cookie

    def _configuration(self) -> list[str]:
        # What an operator of three nodes should choose (RabbitMQ 4 with Khepri behaves like it in any case): a node
        # that is cut off closes its connections, and rejoins when it can. With "ignore" it would go on serving a view
        # of queues and bindings of its own; with "autoheal" the side with the most clients wins, even a single node
        # that has just been resumed, and the healthy majority restarts.
        lines = [*super()._configuration(), "cluster_partition_handling = pause_minority"]
        if self is not self._peers[0]:  # which founds the cluster
            lines.append("cluster_formation.peer_discovery_backend = classic_config")
            for number, peer in enumerate(self._peers, 1):
                lines.append(f"cluster_formation.classic_config.nodes.{number} = {peer.node}")
        return lines

    def _environment(self) -> dict[str, str]:
        tick = f"-kernel net_ticktime {NET_TICK_S}"
        return super()._environment() | {
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{tick} +S 2:2",  # many nodes on one machine need no more threads
            "RABBITMQ_CTL_ERL_ARGS": tick,  # who ticks more slowly is taken for dead
        }


class PostgresPair(Started):
    """A primary and its streaming standby."""

    def __init__(self, *, fsync: bool = True, synchronous: bool = False) -> None:
        """With `synchronous`, a commit waits until the standby has it on disk: promotion then loses nothing."""
        self._synchronous = synchronous
        self.primary = _Member(fsync=fsync)
        self.standby = _Member(fsync=fsync)
        self._url = (
            f"postgres://postgres@127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}/gateway?sslmode=disable"
        )

    @property
    def url(self) -> str:
        """Both hosts, for clients that look for the primary; the same for the pair's whole life.

        Migrations go to `primary.url`: dbmate does not take a port for each host.
        """
        return self._url

    def start(self) -> None:
        """Start what is down; the first time, make the standby from the primary."""
        self.primary.start()
        if self.standby.upstream is None:
            self.rebuild_standby()
        self.standby.start()

    def rebuild_standby(self) -> None:
        """Make the standby anew as a copy of the primary: so a former primary comes back after a promotion."""
        self.standby.copy(self.primary)
        self.primary.set(synchronous_standby_names="*" if self._synchronous else "")

    def promote(self) -> None:
        """Kill the primary, and make the standby the primary; `primary` and `standby` change places.

        Killed first, as an operator fences it: were it only hung, it would wake up and take writes for itself.
        """
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def wait_for_replay(self) -> None:
        """Wait until the standby shows all that the primary has written by now."""
        written = self.primary.execute("SELECT pg_current_wal_lsn()")
        deadline = time.monotonic() + CATCH_UP_TIMEOUT_S
        while self.standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{written}'") != "t":
            if time.monotonic() > deadline:
                raise ServerError(f"the standby does not follow. Its log:\n{self.standby.log.read_text()}")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Kill both and remove their data."""
        self.standby.close()
        self.primary.close()


class _Member(Postgres):
    """One of a pair: a primary, or the standby of `upstream`."""

    upstream: Postgres | None = None

    def copy(self, upstream: Postgres) -> None:
        """Throw its data away, and start as the standby of `upstream`, with a copy of its data."""
        self.kill()
        self.upstream = upstream
        if self._directory is not None:
            self._remove_traces()
            shutil.rmtree(self._data)
            self._prepare()
        self.start()

    def _fill_data(self) -> None:
        if self.upstream is None:
            super()._fill_data()
            return
        options = "--write-recovery-conf --wal-method=stream --checkpoint=fast --no-sync --username=postgres"
        source = ("--host=127.0.0.1", f"--port={self.upstream.port}", f"--pgdata={self._data}")
        self._run(self._program("pg_basebackup"), *options.split(), *source)

    def _make_database(self) -> None:
        if self.upstream is None:
            super()._make_database()
            self.set(
                wal_keep_size="512MB",  # of a standby's absence; beyond it, it is to be made anew
                wal_retrieve_retry_interval="200ms",  # how soon a standby finds its primary again
            )

    def promote(self) -> None:
        """Make it the primary; returns when it takes writes."""
        if self.execute("SELECT pg_promote()") != "t":
            raise ServerError(f"the standby was not promoted. Its log:\n{self.log.read_text()}")
        self.upstream = None

    def set(self, **settings: str) -> None:
        """Change settings that need no restart; a standby made from here inherits them."""
        for name, value in settings.items():
            self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute("SELECT pg_reload_conf()")


class HaProxy(Server):
    """HAProxy in front of gateways, from the system's `haproxy` (2.2 or newer)."""

    name = "HAProxy"

    def __init__(self, backends: list[tuple[int, int]]) -> None:
        """`backends`: of each gateway the ports of its API and of its operations listener."""
        super().__init__()
        self.stats_port = Port()
        self.backends = backends

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stats_url(self) -> str:
        """A page with the state of each gateway, for people."""
        return f"http://127.0.0.1:{self.stats_port}/"

    def up(self) -> list[int]:
        """The API ports of the gateways that get requests now."""
        return [api for api, _ in self.backends if self._states().get(str(api), "").startswith("UP")]

    def _prepare(self) -> None:
        for status, (sentence, code) in _HAPROXY_ERRORS.items():
            answer = json.dumps({"error": sentence, "code": code})
            (self.directory / f"{status}.json").write_text(answer)
        gateways = "\n".join(f"    server {api} 127.0.0.1:{api} check port {ops}" for api, ops in self.backends)
        (self.directory / "haproxy.cfg").write_text(
            _HAPROXY.format(port=self.port, stats_port=self.stats_port, interval=HEALTH_CHECK_MS, gateways=gateways)
        )

    def _command(self) -> list[str]:
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
        program = shutil.which("haproxy", path=path)
        if program is None:
            raise ServerError("HAProxy is missing: install the package haproxy (scripts/setup does).")
        return [program, "-db", "-f", str(self.directory / "haproxy.cfg")]

    def _answers(self) -> bool:
        # Before its first check a gateway counts as up: wait until each has had one.
        states = self._states()
        return len(states) == len(self.backends) and "" not in states.values()

    def _states(self) -> dict[str, str]:
        """Of each gateway, by API port, its state; "" before its first health check has ended."""
        connection = HTTPConnection("127.0.0.1", self.stats_port.number, timeout=1.0)
        try:
            connection.request("GET", "/;csv")
            lines = connection.getresponse().read().decode().removeprefix("# ").splitlines()
        except (OSError, HTTPException):
            return {}
        finally:
            connection.close()
        rows = [row for row in csv.DictReader(lines) if row["pxname"] == "gateways" and row["svname"].isdecimal()]
        return {row["svname"]: "" if row["check_status"] in ("", "INI") else row["status"] for row in rows}

    def close(self) -> None:
        super().close()
        self.stats_port.release()


_HAPROXY_ERRORS = {
    502: ("the gateway ended before it answered", "outcome_unknown"),
    503: ("no gateway can take the request now", "overloaded"),
    504: ("the gateway did not answer in time", "outcome_unknown"),
}
_HAPROXY = """\
global
    log stdout format raw local0
    maxconn 2000                   # two descriptors each: within the hard limit of any system

defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s             # above every deadline of the gateway: it answers 504 itself, with what it knows
    timeout http-request 15s
    timeout http-keep-alive 75s
    timeout check 1s
    # 503: haproxy found no gateway to take the request, so none of it was queued. 502, 504: one took it, and then
    # vanished or fell silent.
    http-error status 503 content-type application/json file 503.json hdr Retry-After 1
    http-error status 502 content-type application/json file 502.json
    http-error status 504 content-type application/json file 504.json

frontend api
    bind 127.0.0.1:{port}
    log global
    option httplog
    default_backend gateways

backend gateways
    log global                     # who went up and down
    balance leastconn              # requests carry 1 to 1,000 messages: turns would be unfair
    option httpchk GET /readyz
    http-check expect status 200
    default-server inter {interval}ms fall 2 rise 1
    # A POST is sent again, to another gateway, only if no connection came about: then certainly nobody has seen it.
    # Not after an empty or missing answer, though haproxy could: the batch may be queued already, and a repeat
    # is the caller's to decide, with an Idempotency-Key.
    retries 2
    retry-on conn-failure
    option redispatch 1
{gateways}

listen stats
    bind 127.0.0.1:{stats_port}
    stats enable
    stats uri /
"""


def main() -> None:
    """`scripts/services`: a private PostgreSQL and RabbitMQ, or a cluster of it, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="scripts/services", description=main.__doc__)
    parser.add_argument("--cluster", type=int, metavar="NODES", help="RabbitMQ as a cluster of this many nodes")
    count = parser.parse_args().cluster
    if count is None:
        servers.main()
        return
    if count < 1:
        parser.error("a cluster has at least one node")
    with ExitStack() as stack:
        cluster = stack.enter_context(closing(RabbitMQCluster(count)))
        starts: list[Callable[[], None]] = [cluster.start]
        database_url = os.environ.get("GATEWAY_DATABASE_URL")
        if database_url is None:
            postgres = stack.enter_context(closing(Postgres()))
            starts.append(postgres.start)
            database_url = postgres.url
        _at_once(starts)
        servers.show_until_interrupted({"GATEWAY_DATABASE_URL": database_url, "GATEWAY_AMQP_URL": cluster.url})


if __name__ == "__main__":
    main()
