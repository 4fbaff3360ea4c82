"""Ctrl-C in a terminal, which sends SIGINT to the supervisor and to its workers: no drain delay; twice: at once."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from testbed import Port, Servers
from tests.support.callers import Caller, Client
from tests.support.eventually import eventually
from tests.support.gateways import process_environment
from tests.support.scripted_broker import ScriptedBroker

ROOT = Path(__file__).parents[2]
LONG_S = "60"  # a delay that no test waits for


@asynccontextmanager
async def serving(
    settings: dict[str, str], log: Path, workers: int
) -> "AsyncIterator[tuple[asyncio.subprocess.Process, str]]":
    """Run `serve` as the leader of a process group, as a shell does, and yield it with its URL once it is ready."""
    api_port, ops_port = Port(), Port()
    ports = {"GATEWAY_API_PORT": str(api_port), "GATEWAY_OPS_PORT": str(ops_port), "GATEWAY_API_HOST": "127.0.0.1"}
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "serve", "--workers", str(workers)),
            cwd=ROOT,
            env=os.environ | settings | ports,
            stderr=errors,
            start_new_session=True,
        )
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while not await _is_ready(session, f"http://127.0.0.1:{ops_port}/readyz"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield process, f"http://127.0.0.1:{api_port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        api_port.release()
        ops_port.release()


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


Interrupt = Callable[[int], None]


def in_terminal(pid: int) -> None:
    """Interrupt as a terminal does: the whole process group."""
    os.killpg(pid, signal.SIGINT)


def alone(pid: int) -> None:
    """Interrupt one process, as an editor's stop button does."""
    os.kill(pid, signal.SIGINT)


def log_says(folder: Path, *sentences: str) -> bool:
    log = (folder / "log").read_text()
    return all(log.count(sentence) == 1 for sentence in sentences)


@pytest.mark.parametrize(("workers", "interrupt"), [(1, in_terminal), (2, in_terminal), (2, alone)])
async def test_ctrl_c_does_not_wait_for_load_balancers(
    servers: Servers, tmp_path: Path, workers: int, interrupt: Interrupt
) -> None:
    settings = process_environment(servers, GATEWAY_DRAIN_DELAY_S=LONG_S)
    async with serving(settings, tmp_path / "log", workers) as (process, _), asyncio.timeout(20):
        interrupt(process.pid)
        assert await process.wait() == 0
    assert (tmp_path / "log").read_text().count('"message":"stopped"') == workers + (workers > 1)


@pytest.mark.parametrize(("workers", "interrupt"), [(1, in_terminal), (2, in_terminal), (2, alone)])
async def test_ctrl_c_cuts_the_delay_after_sigterm_short(
    servers: Servers, tmp_path: Path, workers: int, interrupt: Interrupt
) -> None:
    settings = process_environment(servers, GATEWAY_DRAIN_DELAY_S=LONG_S)
    async with serving(settings, tmp_path / "log", workers) as (process, _), asyncio.timeout(20):
        process.terminate()
        await eventually(lambda: (tmp_path / "log").read_text().count('"message":"draining') == workers)
        interrupt(process.pid)
        assert await process.wait() == 0
    assert log_says(tmp_path, "SIGINT: the drain goes on without its delay. A second SIGINT ends the process at once")
    assert "the drain begins" not in (tmp_path / "log").read_text()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Yield a folder whose path leaves room for the names of unix sockets. That of `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize(("workers", "interrupt"), [(1, in_terminal), (2, in_terminal), (2, alone)])
async def test_a_second_ctrl_c_ends_all_processes_at_once(
    servers: Servers, caller: Caller, tmp_path: Path, short_folder: Path, workers: int, interrupt: Interrupt
) -> None:
    """A request waits for its confirm, so the first Ctrl-C drains for long."""
    async with ScriptedBroker() as broker, aiohttp.ClientSession() as session:
        settings = process_environment(
            servers,
            GATEWAY_AMQP_URL=broker.url,
            GATEWAY_DRAIN_TIMEOUT_S=LONG_S,
            GATEWAY_CONFIRM_TIMEOUT_S="50",
            GATEWAY_ABANDON_TIMEOUT_S=LONG_S,
            TMPDIR=str(short_folder),
        )
        async with serving(settings, tmp_path / "log", workers) as (process, url):
            broker.mode = "silent"
            request = asyncio.create_task(Client(url, session, caller).post(caller.body()))
            await broker.wait_published(1)
            children = psutil.Process(process.pid).children()
            assert len(children) == (workers if workers > 1 else 0)
            interrupt(process.pid)
            await eventually(lambda: '"message":"draining' in (tmp_path / "log").read_text())
            assert process.returncode is None
            async with asyncio.timeout(10):
                interrupt(process.pid)
                assert await process.wait() == -signal.SIGINT
            await eventually(lambda: not any(child.is_running() for child in children), timeout=10)
            with pytest.raises(aiohttp.ClientError):
                await request
    assert os.listdir(short_folder) == []
    assert log_says(tmp_path, "A second SIGINT ends the process at once", "ended by a second SIGINT")
