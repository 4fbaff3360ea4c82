"""Ports, and the supervised process that is the base of every server of the testbed."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple, Self

from testbed import supervisor

START_TIMEOUT_S = 120.0  # RabbitMQ: 5 to 8 s on two idle cores, 30 s seen on a machine busy with other tests
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
LOG_TAIL_LINES = 30
NOBODY = 65534  # PostgreSQL and PgBouncer refuse to run as root; every Linux has this user


class ServerError(Exception):
    """A server is missing or did not start. The text says what to do or shows the end of its log."""


class Port:
    """A free TCP port on 127.0.0.1, reserved until this process ends or release() is called.

    The port lies below the kernel's range for outgoing connections. Inside that range, a client that retries while its
    server is down can be given the server's port. It then blocks the restart, or connects to itself. Parallel runs see
    the reservation as an abstract UNIX socket, which the kernel frees when the process ends.
    """

    def __init__(self, wanted: int | None = None) -> None:
        """`wanted`: the port of an earlier run; None: any."""
        lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        numbers = range(10_000, max(lowest_outgoing, 20_000)) if wanted is None else range(wanted, wanted + 1)
        for number in random.sample(numbers, len(numbers)):
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
        raise ServerError("no free TCP port on 127.0.0.1" if wanted is None else f"port {wanted} is taken")

    def __str__(self) -> str:
        return str(self.number)

    def release(self) -> None:
        """Let others have the port."""
        self._reservation.close()


class Certificates(NamedTuple):
    """PEM files of a server that speaks TLS only, and only with clients whose certificate `ca` has signed."""

    ca: Path
    cert: Path
    key: Path


class Footprint(NamedTuple):
    """The memory and the file descriptors that a process holds at one moment."""

    pid: int
    resident_bytes: int
    descriptors: int

    @property
    def resident_mb(self) -> float:
        """Return the resident memory in MB of 10⁶ bytes."""
        return self.resident_bytes / 1e6


class Startable(ABC):
    """One or several servers that a `with` block starts and closes, even if the start fails half-way."""

    @abstractmethod
    def start(self) -> None:
        """Return when it serves clients."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started, and remove its files."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Startable):
    """A server: a folder, a port and a supervised process that can be stopped, killed and paused."""

    name: str
    stop_signal = signal.SIGTERM
    # The signal that the supervisor sends when the process that started the server is gone.
    last_signal = signal.SIGKILL

    def __init__(self) -> None:
        self.port = Port()
        self._directory: Path | None = None
        self._kept: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._is_given_up = False

    @property
    @abstractmethod
    def url(self) -> str:
        """Return the URL for clients; it stays the same over restarts."""

    def keep(self, parent: Path) -> None:
        """Use a folder below `parent` that stays, with the data and the port of an earlier run. Call it before start().

        Raises ServerError when another program has the port, or the folder is not one of ours.
        """
        self._kept = parent.resolve() / self.name.lower()
        with suppress(FileNotFoundError):
            number = _port_in(self._kept / "port")
            self.port.release()
            try:
                self.port = Port(number)
            except ServerError as error:
                raise ServerError(f"{error}, which {self._kept} needs. Is that folder in use?") from None

    def _make_directory(self) -> Path:
        if self._kept is None:
            return Path(tempfile.mkdtemp(prefix=f"sms-gateway-{self.name.lower()}-"))
        self._kept.mkdir(parents=True, exist_ok=True)
        (self._kept / "port").write_text(str(self.port))
        return self._kept

    def _prepare(self) -> None:
        """Fill the folder, once, before the first start. A folder that is kept has the files of earlier runs."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the program to run and its arguments."""

    @abstractmethod
    def _answers(self) -> bool:
        """Return True if it serves clients at this moment."""

    @property
    def _user_id(self) -> int:
        return os.getuid()

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    @property
    def directory(self) -> Path:
        """Return its folder: data, configuration, `log`. The first start() makes it, close() removes it if not kept."""
        if self._directory is None:
            raise ServerError(f"{self.name} was never started")
        return self._directory

    @property
    def log(self) -> Path:
        """Return the file with its standard output and standard error."""
        return self.directory / "log"

    @property
    def is_running(self) -> bool:
        """True if its process exists; it may be paused."""
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def is_serving(self) -> bool:
        """True if it serves clients at this moment: it is neither down nor paused."""
        if self._supervisor is None or not self.is_running:
            return False
        is_paused = "T" in supervisor.descendants(self._supervisor.pid).values()
        return not is_paused and self._answers()

    @property
    def processes(self) -> list[int]:
        """Return the pids of all its processes, the server itself first. The supervisor is not among them."""
        return [] if self._supervisor is None else list(supervisor.descendants(self._supervisor.pid))

    @property
    def pid(self) -> int:
        """Return the pid of the server itself. Raises ServerError when it does not run."""
        processes = self.processes
        if not processes:
            raise ServerError(f"{self.name} does not run")
        return processes[0]

    def footprint(self) -> Footprint:
        """Return the footprint of the server itself, without its child processes."""
        pid = self.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Footprint(pid, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))

    def start(self) -> None:
        """Start it, or start it again on the same data and ports; return when it serves clients."""
        if self.is_running:
            return
        if self._directory is None:
            self._directory = self._make_directory()
            # PostgreSQL runs as another user, who must reach the data folder inside.
            self._directory.chmod(0o711)
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise
        supervise = [sys.executable, "-IS", supervisor.__file__]
        removed = "" if self._kept else str(self.directory)
        arguments = [removed, str(self._user_id), str(int(self.last_signal)), *self._command()]
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                supervise + arguments,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self._environment(),
                # A terminal's Ctrl-C must reach only the process that started the servers.
                start_new_session=True,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise

    def give_up(self) -> None:
        """Let a start that another thread has begun end soon, with a ServerError."""
        self._is_given_up = True

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._is_given_up:
                raise ServerError(f"{self.name} was given up while starting")
            if not self.is_running:
                raise ServerError(f"{self.name} ended while starting. Its log:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer. Its log:\n{self._log_tail()}")
            time.sleep(POLL_S)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def signal_and_wait(self, number: signal.Signals) -> None:
        """Send a signal to the server (SIGKILL: to all its processes) and wait for its end.

        Raises subprocess.TimeoutExpired if it is still running after STOP_TIMEOUT_S.
        """
        supervisor = self._supervisor  # another thread may end it, too
        if supervisor is None or supervisor.stdin is None:
            return
        with suppress(BrokenPipeError, ValueError):  # ValueError: it is closed
            supervisor.stdin.write(bytes([number]))
            supervisor.stdin.flush()
        supervisor.wait(STOP_TIMEOUT_S)
        with suppress(BrokenPipeError):
            supervisor.stdin.close()
        self._supervisor = None

    def stop(self) -> None:
        """Stop it in an orderly way; the data stays for the next start()."""
        self.resume()
        try:
            self.signal_and_wait(self.stop_signal)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill all its processes at once (SIGKILL); the data stays for the next start()."""
        self.signal_and_wait(signal.SIGKILL)

    def pause(self) -> None:
        """Pause all its processes (SIGSTOP): connections stay open, and nothing answers."""
        self._signal_all(signal.SIGSTOP, until="TZ")

    def resume(self) -> None:
        """Let all its processes go on (SIGCONT)."""
        self._signal_all(signal.SIGCONT, until="RSDIZ")

    def _signal_all(self, number: signal.Signals, until: str) -> None:
        """Send a signal until all its processes are in one of the states `until`, letters of proc(5).

        Once is not enough: a process may fork between the listing and the signal.
        """
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
        """Kill it, remove its folder, and release its port. With keep(): stop it in an orderly way, keep its folder."""
        if self._kept is not None:
            self.stop()
        else:
            self.kill()
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None
        self.port.release()


def in_parallel(actions: Iterable[Callable[[], object]], *, give_up: Callable[[], object] = lambda: None) -> None:
    """Run all actions at the same time, wait for all, then raise the first exception that one of them raised.

    After Ctrl-C, or the exception of another signal handler, `give_up` is called. The actions end before it is raised:
    the caller then closes what they have started.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        running = [pool.submit(action) for action in actions]
        try:
            wait(running)
        except BaseException:
            give_up()
            wait(running)
            raise
    for done in running:
        done.result()


def _port_in(file: Path) -> int:
    """Return the port that a file of an earlier run holds. Raises ServerError if there is none in it."""
    with suppress(ValueError):
        number = int(file.read_text())
        if 0 < number < 2**16:
            return number
    raise ServerError(f"{file} holds no port: choose another folder, or remove {file.parent}")


def http_get(port: Port, path: str) -> tuple[int, bytes] | None:
    """Return status and body of a GET on 127.0.0.1, or None when there is no answer within a second."""
    connection = HTTPConnection("127.0.0.1", port.number, timeout=1.0)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def find_program(name: str) -> Path | None:
    """Return the path of a program, or None. Debian keeps servers in folders outside an ordinary user's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    return Path(found) if found else None
