"""A RabbitMQ cluster, and a PostgreSQL primary with its standby. Each member can be killed or paused alone."""

import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from testbed.postgres import Postgres
from testbed.processes import POLL_S, Port, Server, ServerError, Startable, find_program, in_parallel
from testbed.rabbitmq import RabbitMQ

# The others give up a paused node after 6 to 10 s. RabbitMQ's default of 60 would make such a test a minute long.
NET_TICK_S = 8
JOIN_TIMEOUT_S = 60
CATCH_UP_TIMEOUT_S = 60.0


class RabbitMQCluster(Startable):
    """Several RabbitMQ nodes that form one cluster."""

    def __init__(self, count: int) -> None:
        self._epmd = _Epmd()
        self.nodes: list[RabbitMQ] = []
        for _ in range(count):
            self.nodes.append(_Node(self._epmd.port, self.nodes))
        self._formed = False

    @property
    def url(self) -> str:
        """Return the URLs of all nodes, as GATEWAY_AMQP_URL takes them."""
        return ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start the nodes that are down; return when all are one cluster."""
        self._epmd.start()
        if not self._formed:
            # The first node forms the cluster, and the others join it. A start of all at once is no faster on two cores
            # (16 to 27 s against 18 to 23): the nodes then compete to form the cluster, with random delays.
            self.nodes[0].start()
        in_parallel(node.start for node in self.nodes)
        self.wait_until_whole()
        self._formed = True

    def wait_until_whole(self) -> None:
        """Wait until all nodes run in one cluster."""
        _await_online(self._serving_node(), len(self.nodes), JOIN_TIMEOUT_S)

    def heal(self) -> None:
        """Restart the nodes that a partition left alone, as an operator does; return when all are one cluster.

        Call it after resume() of a node that was paused for longer than NET_TICK_S. Such a node may see the others go
        and come back in the same moment, and keep its own view of queues and bindings (Mnesia's). RabbitMQ 4 with
        Mnesia counts such a node as online, and shows the partition only in its list of partitions.
        Quorum queues recover by themselves: https://github.com/rabbitmq/rabbitmq-server/issues/17319.
        """
        with ThreadPoolExecutor() as pool:
            alone = list(pool.map(self._is_alone, self.nodes))
        for node, is_alone in zip(self.nodes, alone, strict=True):
            if is_alone:
                node.kill()
        self.start()

    def _is_alone(self, node: RabbitMQ) -> bool:
        majority = len(self.nodes) // 2 + 1
        try:
            _await_online(node, majority, timeout_s=1)
            partitioned = int(node.ctl("eval", "length(rabbit_node_monitor:partitions())."))
        except ServerError:
            return True
        return len(self.nodes) - partitioned < majority

    def leader_of(self, queue: str) -> RabbitMQ:
        """Return the node that leads the queue, according to a node that serves. A classic queue has one node."""
        [node] = self._ask(_LEADER, queue)
        return node

    def members_of(self, queue: str) -> list[RabbitMQ]:
        """Return the nodes that have a copy of the quorum queue, whether up or down."""
        return self._ask(_MEMBERS, queue)

    def _ask(self, expression: str, queue: str) -> list[RabbitMQ]:
        # `list_queues` would ask every node, and wait long for one that is paused.
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
        in_parallel(node.close for node in self.nodes)
        self._epmd.close()


def _await_online(node: RabbitMQ, count: int, timeout_s: int) -> None:
    """Wait until `node` sees `count` running nodes, itself included."""
    node.ctl("await_online_nodes", str(count), "--timeout", str(timeout_s), timeout_s=timeout_s + 30)


# The node where Ra last saw the leader; for other kinds of queues, the node of the queue's process.
_LEADER = """case amqqueue:get_pid(Q) of
    {Name, Recorded} -> case ra_leaderboard:lookup_leader(Name) of {_, Leader} -> Leader; _ -> Recorded end;
    Process -> node(Process)
end"""
_MEMBERS = 'lists:join(" ", [atom_to_list(N) || N <- maps:get(nodes, amqqueue:get_type_state(Q))])'


class _Epmd(Server):
    """Erlang's port mapper, through which the nodes of a cluster find each other. It outlives each node."""

    name = "epmd"

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        erl = find_program("erl")
        if erl is None:
            raise ServerError("Erlang is missing: install the package rabbitmq-server (scripts/setup does).")
        beside = erl.resolve().with_name("epmd")
        return [str(beside if beside.exists() else "epmd"), "-address", "127.0.0.1", "-port", str(self.port)]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port.number), timeout=1.0).close()
        except OSError:
            return False
        return True


class _Node(RabbitMQ):
    """A node of a cluster. `peers` are all nodes of the cluster, itself included."""

    def __init__(self, epmd_port: Port, peers: list[RabbitMQ]) -> None:
        super().__init__()
        self.epmd_port.release()
        self.epmd_port = epmd_port
        self._peers = peers
        if peers:
            self.cookie = peers[0].cookie

    def _configuration(self) -> list[str]:
        # The right choice for three nodes; RabbitMQ 4 with Khepri behaves like it in any case. A node that is cut off
        # closes its connections, and rejoins when it can. With "ignore" it would go on serving its own view of queues
        # and bindings. With "autoheal" the side with the most clients wins, even a single node that has just been
        # resumed, and the healthy majority restarts.
        lines = [*super()._configuration(), "cluster_partition_handling = pause_minority"]
        # The first node forms the cluster.
        if self is not self._peers[0]:
            lines.append("cluster_formation.peer_discovery_backend = classic_config")
            for number, peer in enumerate(self._peers, 1):
                lines.append(f"cluster_formation.classic_config.nodes.{number} = {peer.node}")
        return lines

    def _environment(self) -> dict[str, str]:
        tick = f"-kernel net_ticktime {NET_TICK_S}"
        return super()._environment() | {
            # Two scheduler threads are enough for each of many nodes on one machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{tick} +S 2:2",
            # rabbitmqctl must tick as fast as the nodes, or they consider it dead.
            "RABBITMQ_CTL_ERL_ARGS": tick,
        }


class PostgresPair(Startable):
    """A primary and its streaming standby."""

    def __init__(self, *, fsync: bool = True, synchronous: bool = False) -> None:
        """With `synchronous`, a commit waits until the standby has it on disk: a promotion then loses nothing."""
        self._synchronous = synchronous
        self.primary = _Member(fsync=fsync)
        self.standby = _Member(fsync=fsync)
        self._url = (
            f"postgres://postgres@127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}/gateway?sslmode=disable"
        )

    @property
    def url(self) -> str:
        """Return a URL with both hosts, for clients that look for the primary. It stays the same over promotions.

        Migrations go to `primary.url`: dbmate does not take a port for each host.
        """
        return self._url

    def start(self) -> None:
        """Start the members that are down; the first time, make the standby from the primary."""
        self.primary.start()
        if self.standby.upstream is None:
            self.rebuild_standby()
        self.standby.start()

    def rebuild_standby(self) -> None:
        """Make the standby anew as a copy of the primary. This turns a former primary into a standby."""
        self.standby.copy(self.primary)
        self.primary.set(synchronous_standby_names="*" if self._synchronous else "")

    def promote(self) -> None:
        """Kill the primary, and promote the standby; `primary` and `standby` change places.

        The kill comes first, as an operator fences a primary: a primary that only hangs could accept writes later.
        """
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def wait_for_replay(self) -> None:
        """Wait until the standby has replayed everything that the primary has written by now."""
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
    """A member of a pair: a primary, or the standby of `upstream`."""

    upstream: Postgres | None = None

    def copy(self, upstream: Postgres) -> None:
        """Discard its data, and start as the standby of `upstream`, with a copy of the data of `upstream`."""
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
                # A standby that missed more than this must be made anew.
                wal_keep_size="512MB",
                # The pause before a standby tries again to reach its primary.
                wal_retrieve_retry_interval="200ms",
            )

    def promote(self) -> None:
        """Make it the primary; return when it accepts writes."""
        if self.execute("SELECT pg_promote()") != "t":
            raise ServerError(f"the standby was not promoted. Its log:\n{self.log.read_text()}")
        self.upstream = None

    def set(self, **settings: str) -> None:
        """Change settings that need no restart. A standby made from this server inherits them."""
        for name, value in settings.items():
            self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute("SELECT pg_reload_conf()")
