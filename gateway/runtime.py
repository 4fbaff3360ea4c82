"""Everything a request needs, in one typed object: opened in order, closed in reverse."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from gateway.amqp.publisher import Publisher
from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.ingest.admission import Admission
from gateway.ingest.envelopes import Layout
from gateway.ingest.id_supply import IdSupply
from gateway.ingest.idempotency import Idempotency
from gateway.postgres.pool import Database
from gateway.postgres.queries import Store
from gateway.telemetry.counters import Counters, Histogram
from gateway.telemetry.requests import RequestLog
from gateway.telemetry.tracing import Tracing

LAG_INTERVAL_S = 0.25


@dataclass(slots=True)
class Runtime:
    """The state of one gateway process."""

    settings: Settings
    database: Database
    store: Store
    ids: IdSupply
    idempotency: Idempotency
    publisher: Publisher
    admission: Admission
    layout: Layout
    request_log: RequestLog
    counters: Counters
    tracing: Tracing | None = None
    database_was_reached: bool = False
    draining: bool = False


RUNTIME = web.AppKey("runtime", Runtime)


@asynccontextmanager
async def open_runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Open store, ids and publisher. Neither server needs to be up: the gateway becomes ready when they are."""
    async with AsyncExitStack() as stack:
        tracing = None
        if settings.traces == "on":
            tracing = Tracing(settings)
            stack.push_async_callback(tracing.close)
        database = Database(settings)
        await database.open()
        stack.push_async_callback(database.close)
        store = Store(database)
        ids = IdSupply(store)
        stack.push_async_callback(ids.close)
        publisher = Publisher(settings)
        publisher.start()
        stack.push_async_callback(publisher.close)
        idempotency = Idempotency(store, longest_run_s=settings.confirm_timeout_s)
        stack.push_async_callback(idempotency.close)
        admission = Admission(max_requests=settings.max_requests_in_flight, max_bytes=settings.max_bytes_in_flight)
        layout = Layout(settings.messages_per_envelope, settings.queue_shards)
        request_log = RequestLog(settings.request_log_sample)
        runtime = Runtime(
            *(settings, database, store, ids, idempotency, publisher, admission, layout, request_log, Counters()),
            tracing=tracing,
        )
        reaching = asyncio.create_task(_reach_database(runtime), name="reach the database")
        stack.push_async_callback(_stop, reaching)
        sweeping = asyncio.create_task(idempotency.sweep_for_ever(), name="sweep idempotency keys")
        stack.push_async_callback(_stop, sweeping)
        lagging = asyncio.create_task(_watch_event_loop(runtime.counters.loop_lag_s), name="watch the event loop")
        stack.push_async_callback(_stop, lagging)
        yield runtime


async def _reach_database(runtime: Runtime) -> None:
    """Lease the first ids; until that works the gateway is not ready."""
    while not runtime.database_was_reached:
        try:
            await runtime.ids.take(0)
            runtime.database_was_reached = True
        except DatabaseUnavailable:
            await asyncio.sleep(random.uniform(0.1, 1.0))  # noqa: S311 - full jitter


async def _watch_event_loop(lag_s: Histogram) -> None:
    """How much later than asked for a task runs: the longest of what it waits for behind others."""
    loop = asyncio.get_running_loop()
    while True:
        due_at = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lag_s.observe(max(0.0, loop.time() - due_at))


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
