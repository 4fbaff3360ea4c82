"""Ports are free and distinct. A server keeps its data over faults, and ends with the process that started it."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import aio_pika
import asyncpg
import psutil
import pytest

from testbed import Port, Postgres, RabbitMQ, Server, ServerError, Servers, rabbitmq
from testbed import __main__ as command_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def running() -> Iterator[Servers]:
    """Return private servers of this module, whatever the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GATEWAY_DATABASE_URL", raising=False)
        patch.delenv("GATEWAY_AMQP_URL", raising=False)
        servers = Servers(fsync=False)
    with servers:
        yield servers


@pytest.fixture(params=["postgres", "rabbitmq"])
def server(running: Servers, request: pytest.FixtureRequest) -> Server:
    found = getattr(running, request.param)
    assert isinstance(found, Server)
    found.start()
    return found


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the empty folder in which servers make theirs; PostgreSQL's user can enter it."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o711)
        monkeypatch.setattr(tempfile, "tempdir", made)
        yield Path(made)


def store(server: Server, word: str) -> None:
    """Keep a word in a server: in a table, or as a user of the broker."""
    if isinstance(server, Postgres):
        server.execute(f"CREATE TABLE {word} ()")
    elif isinstance(server, RabbitMQ):
        server.ctl("add_user", word, "password")


def stored(server: Server, word: str) -> bool:
    """Return whether the server still knows the word."""
    if isinstance(server, Postgres):
        return server.execute(f"SELECT to_regclass('{word}') IS NOT NULL") == "t"
    assert isinstance(server, RabbitMQ)
    return word in server.ctl("list_users")


def state(server: Server) -> str:
    """Return `serving`, `silent` (it runs and does not answer) or `down`."""
    return "serving" if server.is_serving else "silent" if server.is_running else "down"


@pytest.fixture
def take_port() -> Iterator[Callable[[], Port]]:
    """Return a function that takes a port; all are released at the end."""
    with ExitStack() as stack:

        def take() -> Port:
            port = Port()
            stack.callback(port.release)
            return port

        yield take


def test_ports_are_free_distinct_and_below_those_of_outgoing_connections(take_port: Callable[[], Port]) -> None:
    ports = [take_port() for _ in range(50)]
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len({port.number for port in ports}) == len(ports)
    for port in ports:
        assert port.number < max(lowest_outgoing, 20_000)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port.number))


def test_a_port_is_given_again_only_after_its_release(
    take_port: Callable[[], Port], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = take_port(), take_port()
    second.release()
    monkeypatch.setattr(random, "sample", lambda *_: [first.number, second.number])
    assert take_port().number == second.number
    first.release()
    assert take_port().number == first.number


def test_a_port_that_another_program_listens_on_is_passed_over(
    take_port: Callable[[], Port], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, free = take_port(), take_port()
    for port in (taken, free):
        port.release()
    monkeypatch.setattr(random, "sample", lambda *_: [taken.number, free.number])
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", taken.number))
        stranger.listen()
        assert take_port().number == free.number


def test_without_any_free_port_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "sample", lambda *_: [])
    with pytest.raises(ServerError, match="no free TCP port"):
        Port()


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, without ports, on which processes listen or receive. One that has ended has none."""
    found = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            sockets = psutil.Process(pid).net_connections("inet")
            found |= {one.laddr.ip for one in sockets if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}
    return found


LOOPBACK = {"127.0.0.1", "::1"}


def test_a_server_listens_on_the_loopback_address_only(server: Server) -> None:
    """RabbitMQ: also its port for other nodes, and epmd."""
    addresses = listening(server.processes)
    assert "127.0.0.1" in addresses
    assert addresses <= LOOPBACK


def servers_of(running: Servers) -> set[int]:
    """Return the pids of all processes of the servers."""
    return {pid for one in (running.postgres, running.rabbitmq) if one for pid in one.processes}


def test_rabbitmqctl_listens_on_the_loopback_address_only(running: Servers) -> None:
    node = running.rabbitmq
    assert node is not None
    node.start()
    seen: set[str] = set()
    with ThreadPoolExecutor() as pool:
        done = pool.submit(node.ctl, "eval", "timer:sleep(1000).")
        while not done.done():
            below = {child.pid for child in psutil.Process().children(recursive=True)}
            seen |= listening(list(below - servers_of(running)))
            time.sleep(0.02)
    assert done.result().strip() == "ok"
    assert "127.0.0.1" in seen
    assert seen <= LOOPBACK


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_stopped_or_killed_server_comes_back_with_its_data_and_url(server: Server, how: str) -> None:
    url, word = server.url, f"kept_{how}"
    store(server, word)
    before = server.processes
    getattr(server, how)()
    assert state(server) == "down"
    assert [pid for pid in before if psutil.pid_exists(pid)] == []
    server.start()
    assert state(server) == "serving"
    assert server.url == url
    assert stored(server, word)


def test_a_paused_server_is_running_but_not_serving_and_goes_on_after_resume(server: Server) -> None:
    before = server.pid
    server.pause()
    assert state(server) == "silent"
    states = {psutil.Process(pid).status() for pid in server.processes}
    assert states - {psutil.STATUS_ZOMBIE} == {psutil.STATUS_STOPPED}
    server.resume()
    assert state(server) == "serving"
    assert server.pid == before


def test_a_paused_server_can_be_stopped_in_an_orderly_way(server: Server) -> None:
    server.pause()
    server.stop()
    assert state(server) == "down"
    if isinstance(server, Postgres):
        assert server.log.read_text().endswith("database system is shut down\n")


def test_a_footprint_shows_memory_and_descriptors_of_the_server(server: Server) -> None:
    footprint = server.footprint()
    process = psutil.Process(server.pid)
    assert footprint.pid == process.pid
    assert footprint.resident_bytes == pytest.approx(process.memory_info().rss, rel=0.2)
    assert footprint.descriptors == pytest.approx(process.num_fds(), abs=5)


def test_a_server_that_does_not_run_has_neither_pid_nor_folder() -> None:
    postgres = Postgres()
    with pytest.raises(ServerError, match="does not run"):
        _ = postgres.pid
    with pytest.raises(ServerError, match="never started"):
        _ = postgres.directory
    postgres.close()


def test_close_ends_all_processes_and_removes_the_folder(folder: Path) -> None:
    postgres = Postgres(fsync=False)
    postgres.start()
    pids = postgres.processes
    assert len(pids) > 1
    assert [postgres.directory] == list(folder.iterdir())
    postgres.close()
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert list(folder.iterdir()) == []


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(folder: Path) -> None:
    postgres = Postgres(fsync=False)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", postgres.port.number))
        stranger.listen()
        with pytest.raises(ServerError, match=r"PostgreSQL ended while starting(.|\n)*could not bind"), postgres:
            pytest.fail("it started")
    assert not postgres.is_running
    assert list(folder.iterdir()) == []


def test_a_missing_program_is_named_and_nothing_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "find_program", lambda _: None)
    with pytest.raises(ServerError, match="install the package rabbitmq-server"), RabbitMQ():
        pytest.fail("it started")
    assert list(folder.iterdir()) == []


def test_servers_that_the_environment_names_are_used_and_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"GATEWAY_DATABASE_URL": "postgres://somewhere/else", "GATEWAY_AMQP_URL": "amqp://elsewhere/"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    with Servers() as servers:
        assert servers.environment() == named
        assert (servers.postgres, servers.rabbitmq) == (None, None)


START = """
import json, os, sys
from contextlib import ExitStack
import testbed

how, *names = sys.argv[1:]
with ExitStack() as stack:
    servers = [stack.enter_context(getattr(testbed, name)()) for name in names]
    if how == "paused":
        for server in servers:
            server.pause()
    pids = [pid for server in servers for pid in server.processes]
    print(json.dumps([[str(server.directory) for server in servers], pids]), flush=True)
    sys.stdin.read()
    if how == "raise":
        raise RuntimeError("the program has a defect")
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "names"),
    [
        *[(how, ["Postgres", "RabbitMQ"]) for how in ("SIGKILL", "paused")],
        *[(how, ["Postgres"]) for how in ("SIGTERM", "SIGINT", "_exit", "raise")],
    ],
)
def test_servers_end_with_the_process_that_started_them(how: str, names: list[str]) -> None:
    """`paused`: the servers are paused when the process is killed."""
    starter = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", START, how, *names],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with starter:
        try:
            assert starter.stdout is not None
            assert starter.stdin is not None
            directories, pids = json.loads(starter.stdout.readline())
            assert all(Path(directory).exists() for directory in directories)
            assert len(pids) > len(names)
            if how.startswith("SIG"):
                starter.send_signal(signal.Signals[how])
            elif how == "paused":
                starter.kill()
            else:
                starter.stdin.close()
            starter.wait(30)
            deadline = time.monotonic() + 30
            left: list[Path | int] = [*map(Path, directories), *pids]
            while left and time.monotonic() < deadline:
                left = [each for each in left if (psutil.pid_exists(each) if isinstance(each, int) else each.exists())]
                time.sleep(0.05)
            assert left == []
        finally:
            starter.kill()


@contextmanager
def services(*arguments: str) -> "Iterator[tuple[subprocess.Popen[str], list[str]]]":
    """Run the command, with URLs of an earlier run in its environment; yield it with the lines that it prints."""
    stale = {"GATEWAY_DATABASE_URL": "postgres://gone/", "GATEWAY_AMQP_URL": "amqp://gone/"}
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "testbed", *arguments],
        cwd=ROOT,
        env=os.environ | stale,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        try:
            assert command.stdout is not None
            yield command, [command.stdout.readline() for _ in range(3)]
        finally:
            command.kill()


def test_the_command_prints_the_settings_and_ends_at_ctrl_c() -> None:
    with services() as (command, lines):
        assert lines[0].startswith("export GATEWAY_DATABASE_URL='postgres://postgres@127.0.0.1:")
        assert lines[1].startswith("export GATEWAY_AMQP_URL='amqp://guest:")
        assert lines[2] == "# Running until Ctrl-C or SIGTERM\n"
        children = psutil.Process(command.pid).children(recursive=True)
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 0
        assert [child for child in children if child.is_running()] == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0])
def test_a_start_that_is_interrupted_leaves_nothing(folder: Path, end: signal.Signals, after_s: float) -> None:
    """Soon after the folders are made: PostgreSQL fills its data folder, RabbitMQ does not answer yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    with subprocess.Popen(
        [sys.executable, "-m", "testbed"],
        cwd=ROOT,
        env=environment | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(after_s)
        command.send_signal(end)
        printed = command.communicate(timeout=30)
    assert (command.returncode, *printed) == (0, "", "")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "precious", "0", "65536", "99999999999999999999", "\xe9"])
def test_a_folder_without_a_port_is_refused_and_stays(folder: Path, content: str) -> None:
    port = folder / "kept" / "postgresql" / "port"
    port.parent.mkdir(parents=True)
    port.write_text(content, encoding="latin-1")
    with services("--keep", str(folder / "kept")) as (command, _):
        _, errors = command.communicate(timeout=30)
    assert command.returncode == 2
    assert errors == f"error: {port} holds no port: choose another folder, or remove {port.parent}\n"
    assert [path for path in (folder / "kept").rglob("*") if path.is_file()] == [port]


async def visit(lines: list[str]) -> tuple[int, int]:
    """Put a row into the database and a message into a queue; return how many there were before."""
    database_url, amqp_url = (line.split("'")[1] for line in lines[:2])
    connection = await asyncpg.connect(database_url)
    await connection.execute("CREATE TABLE IF NOT EXISTS kept (visit int)")
    rows = await connection.fetchval("SELECT count(*) FROM kept")
    await connection.execute("INSERT INTO kept VALUES (1)")
    await connection.close()
    async with await aio_pika.connect(amqp_url) as broker:
        channel = await broker.channel()
        queue = await channel.declare_queue("kept", durable=True)
        messages = queue.declaration_result.message_count
        message = aio_pika.Message(b"x", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, "kept")
    return int(rows), int(messages or 0)


def test_the_command_keeps_data_and_urls_in_a_folder(folder: Path) -> None:
    """Over an orderly end, a SIGTERM and a SIGKILL. Only one run at a time may have the folder."""
    urls = set()
    for number, end in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGINT)):
        with services("--keep", str(folder / "kept")) as (command, lines):
            assert lines[2].startswith("# Running"), command.communicate()
            urls.add((lines[0], lines[1]))
            assert asyncio.run(visit(lines)) == (number, number)
            if number == 0:
                with services("--keep", str(folder / "kept")) as (second, _):
                    _, errors = second.communicate(timeout=30)
                    assert (second.returncode, errors.count("\n")) == (2, 1)
                    assert re.match(r"error: port \d+ is taken, which .* needs. Is that folder in use\?", errors)
            children = psutil.Process(command.pid).children(recursive=True)
            command.send_signal(end)
            assert command.wait(60) == (-end if end == signal.SIGKILL else 0)
            psutil.wait_procs(children, timeout=30)
            assert [child for child in children if child.is_running()] == []
    assert len(urls) == 1
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_folder_that_postgresql_cannot_enter_is_refused_at_once(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root's PostgreSQL runs as another user")
    folder.chmod(0o700)
    with services("--keep", str(folder / "kept")) as (command, _):
        _, errors = command.communicate(timeout=30)
    assert command.returncode == 2
    assert f"who cannot enter {folder}: choose another folder for --keep" in errors
    assert list(folder.iterdir()) == []


def test_a_missing_broker_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rabbitmq, "find_program", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers
    monkeypatch.setattr(sys, "argv", ["services"])
    for variable in ("GATEWAY_DATABASE_URL", "GATEWAY_AMQP_URL"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert re.match("error: RabbitMQ is missing: .*\n$", capsys.readouterr().err)
