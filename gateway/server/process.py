"""The process: open the runtime, serve two listeners, drain on SIGTERM, close."""

import asyncio
import gc
import logging
import os
import signal
import ssl
import sys
from collections.abc import Coroutine
from pathlib import Path

import uvloop
from aiohttp import web

from gateway import __version__, config, tls
from gateway.config import ConfigurationError, Settings
from gateway.runtime import Runtime, open_runtime
from gateway.server.supervisor import supervise
from gateway.server.unix_sockets import is_served, locked
from gateway.telemetry import log, tracing
from gateway.web.app import make_app, make_ops_app
from gateway.web.connections import JsonRunner, Limits, Site

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 1024  # connections that wait to be accepted; beyond, callers try again only after a second
OPS_CONNECTIONS = 64  # probes and an operator or two
OPS_SHUTDOWN_TIMEOUT_S = 1.0  # for probes and scrapes; callers have theirs behind them by then


def run(settings: Settings, *, workers: int = 1) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return."""
    log.configure(settings.log_level, settings.log_format, process="supervisor" if workers > 1 else "")
    tracing.check(settings)
    for variable in config.unknown_variables():
        logger.warning("%s is no setting of the gateway; is it misspelt?", variable)
    tls.check(settings)
    for weakness in tls.weaknesses(settings):
        logger.warning(weakness)
    if workers > 1 and settings.api_socket:
        raise ConfigurationError("GATEWAY_API_SOCKET is served by one process. Unset it, or leave out --workers")
    if workers == 1:
        _run(serve(settings))
    else:
        uvloop.run(supervise(settings, workers))


def run_worker(settings: Settings, ops_socket: str) -> None:
    """One of several workers: shares the API port, and answers its supervisor's probes on a unix socket."""
    log.configure(settings.log_level, settings.log_format, process=Path(ops_socket).name)
    tls.check(settings)
    tracing.check(settings)
    _run(serve(settings, ops_socket=ops_socket))


def _run(serving: Coroutine[None, None, None]) -> None:
    # Requests leave few cycles, and what lives from the start is no garbage: collect seldom, and spare the rest
    # (scripts/bench compare, batches of 1).
    gc.set_threshold(50_000, 20, 20)
    gc.freeze()
    uvloop.run(serving)


async def serve(settings: Settings, *, ops_socket: str | None = None) -> None:
    """Serve until told to stop. With `ops_socket`, as one of several workers.

    The order of the drain: not ready → serve on for drain_delay_s with `Connection: close` → stop listening → finish
    the requests in flight, which wait for their confirms → close broker, then database.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def supervisor_is_gone() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    async with open_runtime(settings) as runtime:
        ops, callers = make_runners(runtime)
        try:
            if ops_socket is None:
                ops_address = str(await listen(ops, settings.ops_host, settings.ops_port))
            else:
                ops_address = await listen_on_socket(ops, ops_socket)
                loop.add_reader(sys.stdin, supervisor_is_gone)  # nothing is ever written to it: it ends with him
            if settings.api_socket:
                api_address = await listen_on_own_socket(callers, settings.api_socket)
            else:
                context = tls.api_context(settings)
                if context is not None:
                    loop.add_signal_handler(signal.SIGHUP, _renew_certificate, context, settings)
                port = await listen(
                    callers,
                    settings.api_host,
                    settings.api_port,
                    shared=ops_socket is not None,
                    context=context,
                    handshake_timeout_s=settings.header_timeout_s,
                )
                api_address = f"{port} (TLS)" if context else str(port)
            logger.info("version %s serves the API on %s, operations on %s", __version__, api_address, ops_address)
            logger.info("settings: %s", settings.masked())
            await stop.wait()
            await _drain(runtime, callers)
        finally:
            await callers.cleanup()
            await ops.cleanup()
    logger.info("stopped")


def make_runners(runtime: Runtime) -> tuple[web.AppRunner, web.AppRunner]:
    """The two listeners, operations and API, still to be bound."""
    settings = runtime.settings
    limits = Limits(settings.header_timeout_s, settings.answer_timeout_s, settings.max_connections)
    ops = JsonRunner(
        make_ops_app(runtime),
        limits._replace(max_connections=OPS_CONNECTIONS),
        shutdown_timeout=OPS_SHUTDOWN_TIMEOUT_S,
    )
    callers = JsonRunner(
        make_app(runtime),
        limits,
        on_refused=runtime.counters.refuse_unread,
        auto_decompress=False,  # a gzip bomb would be unpacked before the key is looked at
        keepalive_timeout=settings.keepalive_timeout_s,
        shutdown_timeout=settings.drain_timeout_s / 2,  # aiohttp waits so long twice: for handlers, for connections
    )
    return ops, callers


def _renew_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    try:
        tls.renew_api_certificate(context, settings)
    except OSError as error:
        logger.error("the certificate in use stays: %s cannot be used: %s", settings.api_tls_cert_file, error)
    else:
        logger.info("new connections get the certificate that %s holds now", settings.api_tls_cert_file)


async def listen_on_socket(runner: web.AppRunner, path: str) -> str:
    """Start to accept connections on a unix socket; a dead predecessor's is replaced."""
    await runner.setup()
    await web.UnixSite(runner, path).start()
    return path


async def listen_on_own_socket(runner: web.AppRunner, path: str) -> str:
    """Start to accept callers on a unix socket that this process's user and group may connect to.

    A dead predecessor's is replaced. Raises ConfigurationError when a living one serves it, or it cannot be had.
    """
    try:
        with locked(Path(path).parent):  # whoever starts at the same time must not find ours bound and not yet served
            if is_served(path):
                raise ConfigurationError(f"GATEWAY_API_SOCKET={path!r} is served by another process")
            before = os.umask(0o117)  # set afterwards, it would be open to all for a moment
            try:
                await listen_on_socket(runner, path)
            finally:
                os.umask(before)
    except OSError as error:
        raise ConfigurationError(f"GATEWAY_API_SOCKET={path!r} cannot be had: {error.strerror or error}") from None
    return path


async def listen(
    runner: web.AppRunner,
    host: str,
    port: int,
    *,
    shared: bool = False,
    context: ssl.SSLContext | None = None,
    handshake_timeout_s: float = 10.0,
) -> int:
    """Start to accept connections; returns the port, which the system chose if `port` is 0.

    Raises ConfigurationError when host and port cannot be had. `shared`: with other processes that listen on the same
    port; the kernel spreads connections over them. `context`: speak TLS, with who is through the handshake in time.
    """
    await runner.setup()
    try:
        await Site(
            runner,
            host,
            port,
            backlog=LISTEN_BACKLOG,
            reuse_port=shared or None,
            ssl_context=context,
            handshake_timeout_s=handshake_timeout_s,
        ).start()
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    bound_port: int = runner.addresses[0][1]
    return bound_port


async def _drain(runtime: Runtime, callers: web.AppRunner) -> None:
    logger.info("draining, %s requests in flight", runtime.admission.requests)
    runtime.draining = True
    await asyncio.sleep(runtime.settings.drain_delay_s)
    for site in list(callers.sites):
        await site.stop()
    runtime.admission.closed = True  # what a kept-alive connection still brings is refused as draining
    # The runner's cleanup now closes idle connections and waits drain_timeout_s for the handlers.
