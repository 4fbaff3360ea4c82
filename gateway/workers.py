"""`serve --workers N`: one process per core, each with its own listening socket on the same port, and a supervisor.

The kernel spreads connections over the workers (SO_REUSEPORT). The supervisor starts them, starts a dead one again,
drains all on SIGTERM, and answers the probes for them: alive or ready is what every worker is. A worker whose
supervisor is gone drains itself. One process per pod is the plainer choice in Kubernetes; this is for a machine with
several cores.
"""

import asyncio
import logging
import os
import random
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from gateway.config import Settings

log = logging.getLogger(__name__)

RESTART_DELAY_S = (0.2, 2.0)  # jittered: a worker that dies at once, again and again, must not eat a core
PROBE_TIMEOUT_S = 1.0
DRAIN_MARGIN_S = 5.0  # beyond a worker's own drain budget, before it is killed


class Worker:
    """One worker process, started again whenever it dies, until told to stop."""

    def __init__(self, number: int, settings: Settings, directory: Path) -> None:
        self.number = number
        self.ops_socket = directory / f"worker-{number}"
        self._drain_budget_s = settings.drain_delay_s + settings.drain_timeout_s + DRAIN_MARGIN_S
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def run(self, environment: dict[str, str]) -> None:
        """Keep the process running; returns once stop() has ended it."""
        while True:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "work", str(self.ops_socket)),
                env=environment,
                stdin=asyncio.subprocess.PIPE,  # its end tells the worker that we are gone
            )
            if self._stopping:  # told to stop while it was being started
                self._process.send_signal(signal.SIGTERM)
            log.info("worker %s runs as process %s", self.number, self._process.pid)
            status = await self._process.wait()
            if self._stopping:
                return
            log.error("worker %s ended with status %s; starting it again", self.number, status)
            await asyncio.sleep(random.uniform(*RESTART_DELAY_S))  # noqa: S311 - jitter

    async def stop(self) -> None:
        """Drain the worker; kill it if it takes longer than it may."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_budget_s):
                await self._process.wait()
        except TimeoutError:
            log.error("worker %s did not drain in %.0f s: killing it", self.number, self._drain_budget_s)
            with suppress(ProcessLookupError):
                self._process.kill()

    async def probe(self, path: str) -> tuple[int, dict[str, object]]:
        """What the worker's own operations listener answers; 503 when it does not."""
        connector = aiohttp.UnixConnector(path=str(self.ops_socket))
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get(f"http://worker{path}") as response,
            ):
                return response.status, msgspec.json.decode(await response.read(), type=dict[str, object])
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
            return 503, {"status": "does not answer"}


async def supervise(settings: Settings, count: int) -> None:
    """Run `count` workers until SIGTERM or SIGINT, then drain them all."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sms-gateway-")))
        # Held, and never listened on: nobody else can take the port between the death of a worker and its return.
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((settings.api_host, settings.api_port))
        environment = os.environ | {"GATEWAY_API_PORT": str(holder.getsockname()[1])}
        workers = [Worker(number, settings, directory) for number in range(count)]
        runner = web.AppRunner(make_ops_app(workers), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, settings.ops_host, settings.ops_port).start()
            async with asyncio.TaskGroup() as running:
                for worker in workers:
                    running.create_task(worker.run(environment))
                await stop.wait()
                log.info("draining %s workers", count)
                await asyncio.gather(*(worker.stop() for worker in workers))
        finally:
            await runner.cleanup()
    log.info("stopped")


def make_ops_app(workers: list[Worker]) -> web.Application:
    """Liveness and readiness of the whole: 200 when every worker says so, else 503 and what each says."""
    app = web.Application()

    async def ask_all(request: web.Request) -> web.Response:
        answers = await asyncio.gather(*(worker.probe(request.path) for worker in workers))
        status = max(status for status, _ in answers)
        return web.json_response({"workers": [answer for _, answer in answers]}, status=status)

    app.router.add_get("/livez", ask_all)
    app.router.add_get("/readyz", ask_all)
    return app
