"""The process: open the runtime, serve two listeners, drain on SIGTERM, close."""

import asyncio
import ctypes
import gc
import logging
import ssl
import sys
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvloop

from gateway import __version__, config, tls
from gateway.config import ConfigurationError, Settings
from gateway.runtime import Runtime, open_runtime
from gateway.server.signals import CLOSE_TIMEOUT_S, end_at_once, end_unclosed, handle_signals
from gateway.server.supervisor import supervise
from gateway.server.unix_sockets import listen_on_own_socket
from gateway.telemetry import log, tracing
from gateway.web.answers import refuse_unhandled
from gateway.web.api import make_app
from gateway.web.connections import BoundedRunner
from gateway.web.ops import make_ops_app, make_ops_runner
from gateway.web.shared_port import InheritedPort
from gateway.web.sockets import Limits

logger = logging.getLogger(__name__)

# Parameters of mallopt(3), in bytes. By default, glibc returns the memory of a large body to the kernel, and the next
# one fetches it again with page faults: up to 15 ms of CPU for 5 MB (scripts/bench bodies). Free memory at the end of
# the heap is returned above KEPT_FREE. With that set, glibc does not adjust the other limit: it would stay at 128 KiB,
# and larger blocks would not come from the heap.
M_TRIM_THRESHOLD, KEPT_FREE = -1, 24 * 1024 * 1024
M_MMAP_THRESHOLD, LARGEST_IN_HEAP = -3, 8 * 1024 * 1024
# A connection with TLS counts as so many of max_connections: idle, it takes 54 kB, and one without TLS about 7.
TLS_CONNECTIONS = 2


def run(settings: Settings, *, workers: int = 1) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return."""
    log.configure(settings.log_level, settings.log_format, process="supervisor" if workers > 1 else "")
    tracing.check(settings)
    for variable in config.unknown_variables():
        logger.warning("%s is no setting of the gateway; is it misspelt?", variable)
    for variable in config.ignored_variables():
        logger.warning("%s has no effect; set GATEWAY_DATABASE_URL", variable)
    tls.check(settings)
    for weakness in tls.weaknesses(settings):
        logger.warning(weakness)
    if workers > 1 and settings.api_socket:
        raise ConfigurationError("GATEWAY_API_SOCKET is served by one process. Unset it, or leave out --workers")
    if workers == 1:
        _run(serve(settings))
    else:
        uvloop.run(supervise(settings, workers))


class WorkerSockets(NamedTuple):
    """The sockets of one of several workers: a unix socket for operations, and the API's port."""

    operations: str
    port: InheritedPort

    @classmethod
    def parse(cls, ops_socket: str, port: str) -> "WorkerSockets":
        """Return the sockets that the supervisor names on the command line; `port` is an InheritedPort in JSON."""
        return cls(ops_socket, msgspec.json.decode(port, type=InheritedPort))


def run_worker(settings: Settings, worker: WorkerSockets) -> None:
    """Serve as one of several workers."""
    log.configure(settings.log_level, settings.log_format, process=Path(worker.operations).name)
    tls.check(settings)
    tracing.check(settings)
    _run(serve(settings, worker))


def _run(serving: Coroutine[None, None, None]) -> None:
    # Requests leave few reference cycles, so collect garbage seldom. Objects made at the start stay, so skip them
    # (scripts/bench compare, batches of 1).
    gc.set_threshold(50_000, 20, 20)
    gc.freeze()
    _keep_freed_memory()
    uvloop.run(serving)


def _keep_freed_memory() -> None:
    """Let the allocator keep up to KEPT_FREE at the end of the heap. musl and macOS have no mallopt."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
        mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


async def serve(settings: Settings, worker: WorkerSockets | None = None) -> None:
    """Start, serve until SIGTERM or SIGINT, and shut down.

    Order of the shutdown:

    1. `/readyz` answers 503. Requests are served for `drain_delay_s` more, with `Connection: close`. SIGINT cuts this
       short: Ctrl-C comes from a person, who waits. A second SIGINT ends the process at once.
    2. The API stops listening, and closes idle connections.
    3. Requests that have begun are read, confirmed and answered, within `drain_timeout_s`. Shortly before its end,
       those that still wait or arrive are refused, and those that are written to the broker and not confirmed are
       answered as unknown.
    4. The operations listener closes, then the broker's connections, then the database's. The process ends in any case
       CLOSE_TIMEOUT_S after the time for step 3.
    """
    context = tls.api_context(settings)
    stop = handle_signals(
        on_hangup=partial(_renew_certificate, context, settings) if context else None,
        # Ctrl-C in a terminal also reaches the workers. They ignore the second one, and their supervisor kills them.
        on_second_interrupt=end_at_once if worker is None else None,
    )
    if worker is not None:
        _stop_with_supervisor(stop.requested)
    async with open_runtime(settings) as runtime:
        ops, callers = make_runners(runtime)
        try:
            await _start(settings, ops, callers, context, worker)
            await stop.requested.wait()
            logger.info("draining, %s requests in flight", runtime.admission.requests)
            runtime.draining = True
            await stop.wait_delay(settings.drain_delay_s)
            asyncio.get_running_loop().call_later(settings.drain_timeout_s + CLOSE_TIMEOUT_S, end_unclosed)
        finally:
            await callers.cleanup()  # steps 2 and 3
            await ops.cleanup()
    logger.info("stopped")


def make_runners(runtime: Runtime) -> tuple[BoundedRunner, BoundedRunner]:
    """Return the runners of operations and of the API; they listen nowhere yet."""
    settings = runtime.settings
    most = settings.max_connections // (TLS_CONNECTIONS if settings.api_tls_cert_file else 1)
    limits = Limits(settings.header_timeout_s, settings.answer_timeout_s, max(1, most))
    callers = BoundedRunner(
        make_app(runtime),
        limits,
        refuse_unhandled,
        drain_timeout_s=settings.drain_timeout_s,
        on_refused=runtime.counters.count_unhandled,
        on_drain_ends=partial(_end_requests, runtime),
        auto_decompress=False,  # a gzip bomb would be unpacked before the key is checked
        keepalive_timeout=settings.keepalive_timeout_s,
    )
    return make_ops_runner(make_ops_app(runtime), settings), callers


def _end_requests(runtime: Runtime) -> None:
    """Refuse the requests that wait, also those for room on the broker's socket or for a connection to it.

    What is written to the broker and not confirmed is answered as unknown.
    """
    runtime.admission.close()
    runtime.publisher.give_up()


async def _start(
    settings: Settings,
    ops: BoundedRunner,
    callers: BoundedRunner,
    context: ssl.SSLContext | None,
    worker: WorkerSockets | None,
) -> None:
    """Listen for operations and for callers. Raises ConfigurationError when an address cannot be used."""
    if worker:
        ops_address = worker.operations
    else:
        ops_address = str(await ops.listen(settings.ops_host, settings.ops_port, listener="OPS"))
    if settings.api_socket:
        api_address = settings.api_socket
        await listen_on_own_socket(callers, settings.api_socket)
    else:
        port = await callers.listen(
            settings.api_host,
            settings.api_port,
            inherited=worker.port if worker else None,
            context=context,
            handshake_timeout_s=settings.header_timeout_s,
        )
        api_address = f"{port} (TLS)" if context else str(port)
    if worker:
        # Last: its presence tells the supervisor that the worker has started.
        await ops.listen_on_unix_socket(worker.operations)
    logger.info("version %s serves the API on %s, operations on %s", __version__, api_address, ops_address)
    logger.info("settings in force", extra={log.FIELDS: {"settings": settings.masked()}})


def _stop_with_supervisor(stop: asyncio.Event) -> None:
    """Stop when standard input ends: the supervisor holds its other end, and never writes to it."""
    loop = asyncio.get_running_loop()

    def stop_reading() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    loop.add_reader(sys.stdin, stop_reading)


def _renew_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    try:
        tls.renew_api_certificate(context, settings)
    except OSError as error:
        logger.error("the certificate in use stays: %s cannot be used: %s", settings.api_tls_cert_file, error)
    else:
        logger.info("new connections get the certificate that %s holds now", settings.api_tls_cert_file)
