"""`serve --workers N`: N worker processes on one port, and their supervisor.

A connection goes to the worker with the fewest (web/shared_port.py). The supervisor starts the workers, restarts a dead
one, drains all of them on SIGTERM, and answers the probes: `/livez` for itself, `/readyz` with 200 only if every worker
is ready. If a worker refuses to start, as it does with unusable settings, the supervisor ends all of them and itself. A
worker whose supervisor has died drains itself. In Kubernetes, one process per pod is simpler; workers are for a machine
with several cores.
"""

import asyncio
import logging
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from gateway.config import ConfigurationError, Settings
from gateway.server.signals import CLOSE_TIMEOUT_S, Stop, end_at_once, handle_signals
from gateway.telemetry.log import FLUSH_TIMEOUT_S
from gateway.web import metrics, openapi, ops
from gateway.web.answers import answer_every_request
from gateway.web.shared_port import SharedPort, open_shared_port

log = logging.getLogger(__name__)

RESTART_DELAY_S = (0.2, 2.0)  # jittered; restarts of a worker that always dies at once must not occupy a core
PROBE_TIMEOUT_S = 1.0
# Beyond the time for its drain, a worker closes its connections and writes its log. The last second is for the end of
# the interpreter. A worker that takes longer hangs, and is killed.
DRAIN_MARGIN_S = CLOSE_TIMEOUT_S + FLUSH_TIMEOUT_S + 1.0


class Worker:
    """One worker process, restarted whenever it dies until it is told to stop."""

    def __init__(self, number: int, settings: Settings, directory: Path, port: SharedPort) -> None:
        self.number = number
        self._port = port
        self.ops_socket = directory / f"worker-{number}"
        self._process: asyncio.subprocess.Process | None = None
        self.starts = 0
        self.cannot_start = False
        self._drain_budget_s = settings.drain_delay_s + settings.drain_timeout_s + DRAIN_MARGIN_S

    async def run(self, stop: Stop) -> None:
        """Keep a process running until a stop is requested, drain it, and return.

        Request the stop of all workers if the first process ends with an error before it has listened.
        """
        while not stop.requested.is_set():
            inherited = self._port.inherited_by(self.number)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "gateway", "work", str(self.ops_socket), msgspec.json.encode(inherited)),
                    pass_fds=inherited.descriptors(),
                    stdin=asyncio.subprocess.PIPE,  # its end of file tells the worker that the supervisor is gone
                )
            except OSError as error:  # no memory, process or descriptor is free: try again later
                log.error("worker %s cannot be started: %s", self.number, error)
            else:
                log.info("worker %s runs as process %s", self.number, process.pid)
                self._process = process
                self.starts += 1
                await self._watch(process, stop)
                self._port.mark_absent(self.number)
                if self.starts == 1 and (process.returncode or 0) > 0 and not self.ops_socket.exists():
                    self.cannot_start = True
                    stop.requested.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(*RESTART_DELAY_S)):  # noqa: S311 - jitter
                    await stop.requested.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):  # it may end at the same moment
                self._process.send_signal(number)

    async def _watch(self, process: asyncio.subprocess.Process, stop: Stop) -> None:
        """Return when the process has died, has drained, or was killed because its drain took too long."""
        ended, told = asyncio.create_task(process.wait()), asyncio.create_task(stop.requested.wait())
        await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if ended.done():
            log.error("worker %s ended with status %s", self.number, ended.result())
            return
        self.send_signal(signal.SIGTERM)
        await asyncio.wait({ended}, timeout=self._drain_budget_s)
        if not ended.done():
            log.error("worker %s did not drain in %.0f s: killing it", self.number, self._drain_budget_s)
            self.send_signal(signal.SIGKILL)
            await ended

    async def probe(self, path: str) -> tuple[int, dict[str, object]]:
        """Return status and body of the worker's own answer; 503 if it does not answer."""
        try:
            status, body = await self._ask(path)
            return status, msgspec.json.decode(body, type=dict[str, object])
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
            return 503, {"status": "does not answer"}

    async def metrics(self) -> str | None:
        """Return the worker's own metrics as text, or None if it does not answer."""
        try:
            status, body = await self._ask("/metrics")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
        return body.decode() if status == 200 else None

    async def _ask(self, path: str) -> tuple[int, bytes]:
        connector = aiohttp.UnixConnector(path=str(self.ops_socket))
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.get(f"http://worker{path}") as response,
        ):
            return response.status, await response.read()


async def supervise(settings: Settings, count: int) -> None:
    """Run `count` workers until SIGTERM or SIGINT, then drain all of them.

    Raises ConfigurationError if a worker cannot start, or there is no place for its socket.
    """
    workers: list[Worker] = []
    with _temporary_directory() as directory:
        stop = handle_signals(
            on_hangup=partial(_signal_all, workers, signal.SIGHUP) if settings.api_tls_cert_file else None,
            on_second_interrupt=partial(_end_all_at_once, workers, directory),
        )
        async with open_shared_port(settings.api_host, settings.api_port, count) as port:
            workers += [Worker(number, settings, directory, port) for number in range(count)]
            runner = ops.make_ops_runner(make_probes_app(workers), settings)
            delay = asyncio.create_task(_end_delay(port, workers, stop, settings.drain_delay_s))
            try:
                await runner.listen(settings.ops_host, settings.ops_port, listener="OPS")
                await asyncio.gather(*(worker.run(stop) for worker in workers))
            finally:
                delay.cancel()
                port.close()  # no worker is left to accept the callers in its queue: they are refused
                await runner.cleanup()
    log.info("stopped")
    if failed := next((worker for worker in workers if worker.cannot_start), None):
        raise ConfigurationError(f"worker {failed.number} cannot start; its message is above")


async def _end_delay(port: SharedPort, workers: list[Worker], stop: Stop, delay_s: float) -> None:
    """Close the port after the delay of the drain: a worker that hangs would keep it open, and callers waiting.

    A SIGINT that cuts the delay short is passed on to the workers. It may have reached the supervisor alone.
    """
    await stop.requested.wait()
    await stop.wait_delay(delay_s)
    if stop.interrupted.is_set():
        _signal_all(workers, signal.SIGINT)
    port.close()


def _signal_all(workers: list[Worker], number: signal.Signals) -> None:
    for worker in workers:
        worker.send_signal(number)


def _end_all_at_once(workers: list[Worker], directory: Path) -> None:
    _signal_all(workers, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)
    end_at_once()


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    """Yield a directory for the workers' sockets, and remove it at the end. Raises ConfigurationError."""
    with ExitStack() as stack:
        try:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sms-gateway-")))
            # The path of a unix socket has 107 bytes at most, and not every file system takes sockets.
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(directory / "worker-0000"))
        except OSError as error:
            raise ConfigurationError(
                f"--workers needs a directory for sockets: {error.strerror or error}. "
                "Set TMPDIR to a directory with a short path that can be written"
            ) from None
        yield directory


def make_probes_app(workers: list[Worker]) -> web.Application:
    """Return the application that answers probes and scrapes for all workers."""
    app = web.Application(middlewares=[answer_every_request])

    async def ready(_request: web.Request) -> web.Response:
        answers = await asyncio.gather(*(worker.probe("/readyz") for worker in workers))
        status = max(status for status, _ in answers)
        return web.json_response({"workers": [answer for _, answer in answers]}, status=status)

    async def show_metrics(request: web.Request) -> web.Response:
        texts = await asyncio.gather(*(worker.metrics() for worker in workers))
        restarts = sum(max(0, worker.starts - 1) for worker in workers)
        return metrics.show_workers(request, dict(enumerate(texts)), restarts)

    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/livez", ops.live)
    app.router.add_get("/readyz", ready)
    openapi.add_page(app)
    return app
