"""One RabbitMQ node, from the system's `rabbitmq-server`."""

import os
import re
import secrets
import socket
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Literal

from testbed.processes import Certificates, Port, Server, ServerError, find_program

DISK_FREE_LIMIT = "50MB"
MEMORY_WATERMARK = "1GB"  # several nodes share one small machine: far above what any of our tests holds at once
# Without it, the node and rabbitmqctl listen for other nodes on all addresses.
DISTRIBUTION_ON_LOOPBACK = "-kernel inet_dist_use_interface {127,0,0,1}"


class RabbitMQ(Server):
    """A RabbitMQ node, 3.10 or newer, without plugins."""

    name = "RabbitMQ"
    # The password of `guest`. One for the whole run: the nodes of a cluster must agree.
    password = secrets.token_hex(12)

    def __init__(self, certificates: Certificates | None = None) -> None:
        super().__init__()
        self._certificates = certificates
        self.distribution_port = Port()
        self.epmd_port = Port()
        self.cookie = secrets.token_hex(20)
        self._programs: Path | None = None

    @property
    def node(self) -> str:
        """Return the node's name, by which it also finds its data."""
        return f"sms-gateway-{self.port}@localhost"

    def keep(self, parent: Path) -> None:
        """Use a folder below `parent` that stays, with data, port and password of an earlier run."""
        super().keep(parent)
        with suppress(FileNotFoundError):
            configuration = (parent / self.name.lower() / "rabbitmq.conf").read_text()
            if found := re.search("^default_pass = (.+)$", configuration, re.MULTILINE):
                self.password = found[1]

    @property
    def url(self) -> str:
        """Return the node's URL."""
        return f"amqp{'s' if self._certificates else ''}://guest:{self.password}@127.0.0.1:{self.port}/"

    def _prepare(self) -> None:
        self._programs = _rabbitmq_programs()
        cookie = self.directory / ".erlang.cookie"
        cookie.unlink(missing_ok=True)  # it is read-only
        cookie.write_text(self.cookie)
        cookie.chmod(0o400)
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "environment").touch()
        # A bare system, such as a fresh debootstrap folder, has no /etc/hosts with "localhost".
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
            "HOME": str(folder),  # holds Erlang's cookie
            "ERL_INETRC": str(folder / "inetrc"),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": DISTRIBUTION_ON_LOOPBACK,
            "RABBITMQ_CTL_ERL_ARGS": DISTRIBUTION_ON_LOOPBACK,
            # Erlang tries 50,000 file names while it starts, each with a hand-over between two threads. With
            # RabbitMQ's default, "none", the threads sleep in between, and a start took 7.5 to 30 s instead of 6.
            "RABBITMQ_SCHEDULER_BUSY_WAIT_THRESHOLD": "very_short",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "config"),
            "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
            # RabbitMQ 4 of Debian does not find them from its tools.
            "RABBITMQ_PLUGINS_DIR": str(self._program("rabbitmq-plugins").resolve().parents[1] / "plugins"),
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
                # The type of a method frame: connection.start.
                return connection.recv(1) == b"\x01"
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
        """Run rabbitmqctl on this node and return its output. Raises ServerError when it fails.

        It takes a second or more, because Erlang starts anew each time.
        """
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
        """Raise or end a resource alarm, which blocks publishers on every node of the cluster.

        The broker raises the alarm itself, because this moves the limit that it watches. It takes a second or two.
        """
        match resource:
            case "memory":
                self.ctl("set_vm_memory_high_watermark", "absolute", "1MB" if on else MEMORY_WATERMARK)
            case "disk":
                self.ctl("set_disk_free_limit", "1000000GB" if on else DISK_FREE_LIMIT)

    def limit_messages(self, max_bytes: int) -> int:
        """Set `max_message_size` on every node of the cluster, and return the limit before.

        RabbitMQ 3.10 reads the setting when a channel is opened. RabbitMQ 4 reads it when a node starts, into a
        persistent term.
        """
        return int(
            self.ctl(
                "eval",
                "{ok, Before} = application:get_env(rabbit, max_message_size), "
                f"rpc:multicall(application, set_env, [rabbit, max_message_size, {max_bytes}]), "
                f"rpc:multicall(persistent_term, put, [max_message_size, {max_bytes}]), "
                "Before.",
            )
        )

    def close(self) -> None:
        """Kill it, remove its data, and release its ports. With keep(): stop it, keep its data."""
        super().close()
        self.distribution_port.release()
        self.epmd_port.release()


def _rabbitmq_programs() -> Path:
    """Return the folder of the distribution's own scripts.

    The `rabbitmq-server` that Debian puts on the PATH is a wrapper, which changes to the user rabbitmq and the
    system's own data.
    """
    if found := find_program("rabbitmq-server"):
        debian = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"), reverse=True)
        for folder in [found.resolve().parent, *debian]:
            if (folder / "rabbitmq-env").exists():
                return folder
    raise ServerError("RabbitMQ is missing: install the package rabbitmq-server (scripts/setup does).")
