"""All state of one gateway process, in one typed object: opened in order, closed in reverse."""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gateway.amqp.depths import QueueDepths
from gateway.amqp.publisher import Publisher
from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.ingest.admission import Admission
from gateway.ingest.envelopes import Layout
from gateway.ingest.id_supply import IdSupply
from gateway.ingest.idempotency import Idempotency
from gateway.ingest.key_watch import KeyWatch
from gateway.ingest.pipeline import Pipeline
from gateway.postgres.pool import Pool
from gateway.postgres.queries import Queries
from gateway.telemetry.counters import Counters, Histogram
from gateway.telemetry.log import direct_writer
from gateway.telemetry.requests import RequestLog
from gateway.telemetry.tracing import NoTracing, Tracing

LAG_INTERVAL_S = 0.25


@dataclass(slots=True)
class Runtime:
    """The state of one gateway process."""

    settings: Settings
    pool: Pool
    queries: Queries
    ids: IdSupply
    idempotency: Idempotency
    key_watch: KeyWatch
    publisher: Publisher
    depths: QueueDepths
    pipeline: Pipeline
    admission: Admission
    counters: Counters
    request_log: RequestLog
    tracing: Tracing | NoTracing
    database_was_reached: bool = False
    draining: bool = False

    def not_ready_reasons(self) -> list[str]:
        """Return the reasons for which the process is not ready; none when it is.

        A later outage of broker or database does not count. It would take all replicas out of the load balancer at
        once, and callers would get connection errors in place of a 503.
        """
        connections = self.publisher.connections
        broker = connections.last_failure or "the broker has not been reached yet"
        database = self.pool.last_failure or "the database has not been reached yet"
        reasons = {
            "draining": self.draining,
            broker: not connections.has_connected,
            database: not self.database_was_reached,
        }
        return [reason for reason, holds in reasons.items() if holds]


RUNTIME = web.AppKey("runtime", Runtime)


@asynccontextmanager
async def open_runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Open the state of a process. Broker and database may be down: it becomes ready when both have answered."""
    async with AsyncExitStack() as stack:
        tracing = Tracing(settings) if settings.traces == "on" else NoTracing()
        stack.push_async_callback(tracing.close)
        pool = Pool(settings)
        await pool.open()
        stack.push_async_callback(pool.close)
        queries = Queries(pool)
        ids = IdSupply(queries)
        stack.push_async_callback(ids.close)
        publisher = Publisher(settings)
        publisher.start()
        stack.push_async_callback(publisher.close)
        idempotency = Idempotency(
            queries,
            longest_run_s=settings.confirm_timeout_s,
            longest_settle_s=settings.database_timeout_s,
            max_keys=settings.max_idempotency_keys,
        )
        stack.push_async_callback(idempotency.close)
        key_watch = KeyWatch(queries)
        stack.push_async_callback(key_watch.close)
        layout = Layout(settings.messages_per_envelope, settings.queue_shards)
        runtime = Runtime(
            settings=settings,
            pool=pool,
            queries=queries,
            ids=ids,
            idempotency=idempotency,
            key_watch=key_watch,
            publisher=publisher,
            depths=QueueDepths(settings, publisher.connections),
            pipeline=Pipeline(
                queries=queries, ids=ids, idempotency=idempotency, publisher=publisher, layout=layout, tracing=tracing
            ),
            admission=Admission(
                max_requests=settings.max_requests_in_flight,
                max_bytes=settings.max_bytes_in_flight,
                broker=publisher,
                deadline_s=settings.confirm_timeout_s,
            ),
            counters=Counters(),
            request_log=RequestLog(settings.request_log_sample, direct_writer()),
            tracing=tracing,
        )
        _run(stack, _reach_database(runtime), "reach the database")
        _run(stack, idempotency.sweep_for_ever(), "sweep idempotency keys")
        _run(stack, key_watch.watch_for_ever(), "watch API keys")
        _run(stack, runtime.depths.watch_for_ever(), "watch the depths of queues")
        _run(stack, _watch_event_loop(runtime.counters.loop_lag_s), "watch the event loop")
        yield runtime


def _run(stack: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
    """Run a task until the stack is closed."""
    stack.push_async_callback(_stop, asyncio.create_task(work, name=name))


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _reach_database(runtime: Runtime) -> None:
    """Check the role's rights, lease message ids, look up a key. Until all succeed, the process is not ready.

    So a process that is newer than the schema, or whose role lacks a right, takes no requests.
    """
    while not runtime.database_was_reached:
        try:
            await runtime.queries.check_rights()
            await runtime.ids.take(0)
            await runtime.queries.find_account(bytes(32), [""])
            await runtime.queries.find_account(bytes(32))
            runtime.database_was_reached = True
            runtime.pool.log_reached()
        except DatabaseUnavailable:
            await asyncio.sleep(random.uniform(0.1, 1.0))  # noqa: S311 - full jitter


async def _watch_event_loop(lag_s: Histogram) -> None:
    """Measure how late a timer fires. Every request waits at least as long."""
    loop = asyncio.get_running_loop()
    while True:
        due_at = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lag_s.observe(max(0.0, loop.time() - due_at))
