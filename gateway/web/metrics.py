"""All metrics: name, help text and source of each; served by the operations listener as `/metrics`.

This module keeps no state. Counters are plain numbers where the events happen, and gauges are read at each scrape. The
number of series does not grow with callers: labels hold codes, stages, states and workers.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gateway import __version__, errors
from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import STATES
from gateway.amqp.depths import KINDS, OUTBOUND, QueueDepths
from gateway.amqp.publisher import Publisher
from gateway.amqp.reconnection import PublishConnections
from gateway.postgres.queries import EXPIRES_SOON_DAYS
from gateway.runtime import RUNTIME, Runtime
from gateway.telemetry.counters import CANCELLED, DRY_RUN, OK, QUEUED, REPLAYED, STAGES, Histogram

BUILD = "gateway_build"
WORKER = "worker"  # the label that tells the processes of `serve --workers` apart

# Series that exist from the start, at 0: `rate()` misses the first event of a series that begins with a 1.
_REFUSED = {error.code for error in errors.row_errors()}
# A refused single send has the code of its message. If its outcome is unknown, the answer is a 504.
_REQUESTS = [
    *((200, OK), (200, DRY_RUN), CANCELLED),
    *((kind.status, kind.code) for kind in errors.kinds()),
    *((errors.MessageRefused.status, code) for code in sorted(_REFUSED - {errors.OUTCOME_UNKNOWN.code})),
]
# Error rows, and the refusals that can follow the decoding: 409, 422, 429, 5xx.
_MESSAGES = sorted(
    {QUEUED, REPLAYED, DRY_RUN, CANCELLED[1], *_REFUSED}
    | {kind.code for kind in errors.kinds() if kind.status >= 500 or kind.status in (409, 422, 429)}
)
_SHED_REASONS = ("account_share", "bytes", "confirm_window", "slots")
_PROCESS = ProcessCollector(registry=None)  # CPU, memory, descriptors, under the usual names
_IDEMPOTENT_RESULTS = ("first", "again", "replayed", "in_progress", "conflict", "too_many")


class ProcessMetrics(Collector):
    """The metrics of one gateway process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics with their current values."""
        yield build_info()
        yield from _request_metrics(self._runtime)
        yield from _load_metrics(self._runtime)
        yield from _connection_metrics(self._runtime.publisher.connections)
        yield from _message_metrics(self._runtime.publisher)
        yield from _queue_metrics(self._runtime.depths)
        yield from _database_metrics(self._runtime)
        yield from _PROCESS.collect()


def build_info() -> Metric:
    """Return the versions of the gateway and of Python, as labels."""
    return InfoMetricFamily(BUILD, "Version; always 1.", {"version": __version__, "python": platform.python_version()})


def _request_metrics(runtime: Runtime) -> Iterator[Metric]:
    counters = runtime.counters
    yield _counter(
        "gateway_requests",
        "Requests answered, by HTTP status and refusal code. ok: not refused as a whole; its rows may have errors. "
        "dry_run: nothing was to be queued. 499 cancelled: the drain ended before the request.",
        ("status", "code"),
        {(str(status), code): counters.requests[status, code] for status, code in [*_REQUESTS, *counters.requests]},
    )
    yield _counter(
        "gateway_messages",
        "SMS of decoded requests, by the answer to their caller: queued (confirmed by the broker), replayed (the "
        "answer to an earlier request with the same Idempotency-Key), dry_run (nothing was to be queued), cancelled "
        "(the drain ended before the request), or the code of the error row or of the refusal.",
        ("outcome",),
        {(code,): counters.messages[code] for code in [*_MESSAGES, *counters.messages]},
    )
    yield _total("gateway_request_body_bytes", "Bytes of request bodies read completely.", counters.body_bytes)
    yield _histogram("gateway_request_messages", "SMS in a decoded request.", (), {(): counters.request_messages})
    yield _histogram(
        "gateway_request_duration_seconds",
        "Time from a request's head to its answer, without dry runs. refused: the whole request was refused.",
        ("result",),
        {("answered",): counters.answered_s, ("refused",): counters.refused_s},
    )
    yield _histogram(
        "gateway_stage_duration_seconds",
        "Time of a request in each stage: authenticate (the key's query), wait (for room, if there is none), read (the "
        "body), validate (with decoding), resolve_lists (message ids, the lists' query, the Idempotency-Key), build "
        "(payloads), publish (until all confirms or the deadline; after a slow body, with its wait for room). A small "
        "request has no read; without an Idempotency-Key it has no resolve_lists: authenticate has the lists' query, "
        "build the message ids. A stage that refuses the request is not counted.",
        ("stage",),
        {(stage,): seconds for stage, seconds in zip(STAGES, counters.stages_s, strict=True)},
    )
    yield _counter(
        "gateway_idempotent_requests",
        "Requests with an Idempotency-Key: first, again (a second run with the same message ids), replayed (the stored "
        "answer), in_progress (409), conflict (422: another body), too_many (429).",
        ("result",),
        {(result,): runtime.idempotency.requests[result] for result in _IDEMPOTENT_RESULTS},
    )
    yield _total(
        "gateway_idempotent_unsettled",
        "Answers given before the row of their Idempotency-Key was settled: a retry may run again, with the same ids.",
        runtime.idempotency.unsettled,
    )


def _load_metrics(runtime: Runtime) -> Iterator[Metric]:
    admission, settings, ids = runtime.admission, runtime.settings, runtime.ids
    yield _gauge("gateway_requests_in_flight", "Requests that hold a slot.", admission.requests)
    yield _gauge("gateway_requests_waiting", "Requests that wait for room, with a slot.", admission.waiting)
    yield _gauge("gateway_requests_in_flight_limit", "Requests beyond it are shed.", settings.max_requests_in_flight)
    yield _gauge(
        "gateway_messages_in_flight", "SMS in decoded, unanswered requests.", runtime.counters.messages_in_flight
    )
    yield _gauge("gateway_body_bytes_in_flight", "Bytes reserved for bodies and answers.", admission.reserved_bytes)
    yield _gauge("gateway_body_bytes_in_flight_limit", "Bodies beyond it wait.", settings.max_bytes_in_flight)
    yield _counter(
        "gateway_shed",
        "Requests refused as overloaded, at once or after a wait, by the exhausted resource: slots, account_share (of "
        "slots), bytes (of bodies, or the account's share of them), confirm_window (the broker confirms too slowly). "
        "Connections beyond max_connections, batches that the publisher refuses, and readers of the API document are "
        "not counted here.",
        ("reason",),
        {(reason,): admission.shed[reason] for reason in _SHED_REASONS},
    )
    yield _histogram(
        "gateway_event_loop_lag_seconds",
        "Delay of a task beyond its due time, measured four times a second. Every request waits at least as long.",
        (),
        {(): runtime.counters.loop_lag_s},
    )
    yield _total("gateway_message_id_leases", "Blocks of message ids leased from the database.", ids.leases)
    yield _gauge("gateway_message_ids_available", "Unused message ids of the blocks leased.", ids.available)
    yield _gauge(
        "gateway_api_keys_expiring",
        f"Usable API keys of all accounts that expire within {EXPIRES_SOON_DAYS} days and have no successor.",
        runtime.key_watch.expiring,
    )
    yield _gauge("gateway_ready", "1 while /readyz answers 200.", not runtime.not_ready_reasons())
    yield _gauge("gateway_draining", "1 after SIGTERM.", runtime.draining)


def _connection_metrics(connections: PublishConnections) -> Iterator[Metric]:
    states = connections.states()
    yield _labelled_gauge(
        "gateway_broker_connections",
        "Publish connections: open, half_open (one batch at a time after a slow predecessor), blocked (by a broker "
        "alarm), overdue (a batch is past its deadline), lost, connecting, draining (waits for late confirms only).",
        "state",
        {state: states[state] for state in (*STATES, "connecting", "draining")},
    )
    yield _total("gateway_broker_connects", "Publish connections opened.", connections.connects)
    yield _total("gateway_broker_connect_failures", "Failed attempts to connect.", connections.connect_failures)
    yield _total(
        "gateway_broker_blocked_seconds",
        "Time that broker alarms blocked publish connections, summed over connections.",
        connections.blocked_s,
    )
    yield _total(
        "gateway_late_confirms",
        "AMQP messages that the broker acked or nacked only after their caller was told outcome unknown.",
        connections.late_confirms,
    )


def _message_metrics(publisher: Publisher) -> Iterator[Metric]:
    yield _counter(
        "gateway_published",
        "AMQP messages by the broker's response within the deadline: acked, nacked, returned (unroutable), unknown (no "
        "response, or a nack of a queue whose type is classic or not verified; the message may be queued), too_large "
        "(not queued). An envelope counts once.",
        ("outcome",),
        {
            (outcome.name.lower(),): publisher.outcomes[outcome]
            for outcome in (Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN, Outcome.TOO_LARGE)
        },
    )
    yield _total(
        "gateway_republished",
        "AMQP messages published again with the same id, because their connection was lost.",
        publisher.republished,
    )
    yield _gauge(
        "gateway_unconfirmed_messages",
        "Unconfirmed AMQP messages, those not written yet included.",
        publisher.unconfirmed_messages,
    )
    yield _gauge("gateway_unconfirmed_bytes", "Bytes of unconfirmed AMQP messages.", publisher.unconfirmed_bytes)
    yield _gauge(
        "gateway_unconfirmed_age_seconds",
        "Age of the oldest unconfirmed batch, since its write.",
        publisher.oldest_age_s,
    )
    yield _gauge(
        "gateway_confirm_window_messages",
        "Limit of unconfirmed AMQP messages. It shrinks when confirms are slow and grows when they are fast.",
        publisher.window.messages,
    )
    yield _gauge("gateway_confirm_wait_seconds", "Time to confirm a batch, smoothed.", publisher.window.confirm_s)


def _queue_metrics(depths: QueueDepths) -> Iterator[Metric]:
    known = {kind: [one for one in depths.all if one.kind == kind and one.is_known()] for kind in KINDS}
    yield _labelled_gauge(
        "gateway_queue_messages",
        "AMQP messages ready in the queues, without those delivered and not acked: outbound (all shards), "
        "dead_letters. Asked every 15 s; absent if no queue has answered for a minute, and for streams.",
        "queue",
        {kind: sum(one.messages for one in answers) for kind, answers in known.items() if answers},
    )
    yield _labelled_gauge(
        "gateway_queue_consumers",
        "Consumers of the queues: outbound (all shards), dead_letters. Absent as gateway_queue_messages is.",
        "queue",
        {kind: sum(one.consumers for one in answers) for kind, answers in known.items() if answers},
    )
    yield _gauge(
        "gateway_queues_unread",
        "Outbound queues with messages and without a consumer.",
        sum(one.messages > 0 and one.consumers == 0 for one in known[OUTBOUND]),
    )
    yield _labelled_gauge(
        "gateway_queues_unknown",
        "Queues whose depth is not known: no answer for a minute, no such queue, or refused. The log says which.",
        "queue",
        {kind: sum(one.kind == kind and not one.is_known() for one in depths.all) for kind in KINDS},
    )


def _database_metrics(runtime: Runtime) -> Iterator[Metric]:
    pool = runtime.pool
    idle = pool.idle_connections
    yield _labelled_gauge(
        "gateway_database_connections",
        "Connections of the pool: used by a query, or idle.",
        "state",
        {"used": pool.connections - idle, "idle": idle},
    )
    yield _gauge(
        "gateway_database_connections_limit", "Size of the connection pool.", runtime.settings.database_pool_size
    )
    yield _gauge("gateway_database_up", "1 while the database's primary answers.", pool.is_up)
    yield _total("gateway_database_failures", "Database queries that failed or timed out.", pool.failures)


async def show(request: web.Request) -> web.Response:
    """Answer with the metrics of this process."""
    return _exposition(request, ProcessMetrics(request.app[RUNTIME]))


def show_workers(request: web.Request, expositions: Mapping[int, str | None], restarts: int) -> web.Response:
    """Answer with the metrics of all workers, each with its `worker` label; None: the worker did not answer.

    The workers' values are not summed. A restarted worker's counter starts again at 0: Prometheus recognises that as
    a reset in the worker's own series, but not in a sum.
    """
    return _exposition(request, WorkersMetrics(expositions, restarts))


class WorkersMetrics(Collector):
    """The metrics of a supervisor: those of its workers, and the number of workers that answer."""

    def __init__(self, expositions: Mapping[int, str | None], restarts: int) -> None:
        self._expositions = expositions
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics with their current values."""
        answering = sum(text is not None for text in self._expositions.values())
        yield build_info()
        yield _labelled_gauge(
            "gateway_workers",
            "Worker processes: answering or not answering their supervisor.",
            "state",
            {"answering": answering, "silent": len(self._expositions) - answering},
        )
        yield _total("gateway_worker_restarts", "Restarts of worker processes.", self._restarts)
        families: dict[str, Metric] = {}
        _merge(families, "supervisor", _PROCESS.collect())
        for number, text in self._expositions.items():
            _merge(families, str(number), text_string_to_metric_families(text or ""))
        yield from families.values()


def _merge(families: dict[str, Metric], worker: str, more: Iterable[Metric]) -> None:
    """Add the samples of one process, with its `worker` label, to the families of all processes."""
    for family in more:
        if family.name != f"{BUILD}_info":  # collect() has yielded it
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [sample._replace(labels={WORKER: worker, **sample.labels}) for sample in family.samples]


def _exposition(request: web.Request, collector: Collector) -> web.Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    encode, content_type = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
    return web.Response(body=encode(registry), headers={hdrs.CONTENT_TYPE: content_type})


def _counter(name: str, help_text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _total(name: str, help_text: str, value: float) -> Metric:
    return _counter(name, help_text, (), {(): value})


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value)


def _labelled_gauge(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family


def _histogram(name: str, help_text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], Histogram]) -> Metric:
    family = HistogramMetricFamily(name, help_text, labels=labels)
    for label_values, histogram in values.items():
        bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(label_values, buckets, histogram.total)
    return family
