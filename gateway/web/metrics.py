"""Every metric, once: its name, what it says, and where it is read; on the operations listener as /metrics.

Nothing is kept here. What happens is counted where it happens, in plain numbers; what is (in flight, unconfirmed, the
window) is read when somebody scrapes. No label grows with callers: labels hold codes, stages, states and workers.
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
from gateway.runtime import RUNTIME, Runtime
from gateway.telemetry.counters import CANCELLED, OK, QUEUED, REPLAYED, STAGES, Histogram

BUILD = "gateway_build"
WORKER = "worker"  # the label that tells the processes of `serve --workers` apart

# Series that are there from the start, at 0: of one that appears with a 1, no rate can see the first.
_REQUESTS = [(200, OK), CANCELLED, *((kind.status, kind.code) for kind in errors.kinds())]
_MESSAGES = sorted(
    {QUEUED, REPLAYED, *(refusal.code for refusal in errors.refusals())}
    | {kind.code for kind in errors.kinds() if kind.status >= 500 or kind.status in (409, 422)}
)
_SHED = ("account_share", "bytes", "slots")
_PROCESS = ProcessCollector(registry=None)  # CPU, memory, descriptors: the names that every exporter has
_KEYED = ("first", "again", "replayed", "in_progress", "conflict")


class ProcessMetrics(Collector):
    """What one process of the gateway has to show."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        yield build_info()
        yield from _of_requests(self._runtime)
        yield from _of_load(self._runtime)
        yield from _of_broker(self._runtime)
        yield from _of_database(self._runtime)
        yield from _PROCESS.collect()


def build_info() -> Metric:
    return InfoMetricFamily(
        BUILD, "Which gateway this is; always 1.", {"version": __version__, "python": platform.python_version()}
    )


def _of_requests(runtime: Runtime) -> Iterator[Metric]:
    seen = runtime.counters
    yield _counter(
        "gateway_requests",
        "Requests answered, by HTTP status and the code of their refusal; ok: not refused, whatever its rows say. "
        "499 cancelled: the drain ended before the request did.",
        ("status", "code"),
        {(str(status), code): seen.requests[status, code] for status, code in [*_REQUESTS, *seen.requests]},
    )
    yield _counter(
        "gateway_messages",
        "SMS of decoded requests, by what their caller was told: queued (confirmed by the broker), the code of their "
        "row or of the refusal of the whole request, or replayed (the answer of an earlier request, by its "
        "Idempotency-Key).",
        ("outcome",),
        {(code,): seen.messages[code] for code in [*_MESSAGES, *seen.messages]},
    )
    yield _counter("gateway_request_body_bytes", "Bytes of request bodies read whole.", (), {(): seen.body_bytes})
    yield _histogram("gateway_request_messages", "SMS in a decoded request.", (), {(): seen.request_messages})
    yield _histogram(
        "gateway_request_duration_seconds",
        "From a request's head to its answer being ready, by whether it was refused as a whole.",
        ("result",),
        {("answered",): seen.answered_s, ("refused",): seen.refused_s},
    )
    yield _histogram(
        "gateway_stage_duration_seconds",
        "Time of a request in each stage it has passed: authenticate (the key's query), read (the body), validate "
        "(decoding included), resolve_lists (message ids, the lists' query, the Idempotency-Key), build (payloads), "
        "publish (until the broker has confirmed, or the deadline). A stage that refuses the request is not counted.",
        ("stage",),
        {(stage,): seconds for stage, seconds in zip(STAGES, seen.stages_s, strict=True)},
    )
    yield _counter(
        "gateway_idempotent_requests",
        "Requests with an Idempotency-Key: first, again (run again with the same message ids), replayed (the kept "
        "answer), in_progress (409), conflict (422: another body).",
        ("result",),
        {(result,): runtime.idempotency.requests[result] for result in _KEYED},
    )


def _of_load(runtime: Runtime) -> Iterator[Metric]:
    admission, settings, ids = runtime.admission, runtime.settings, runtime.ids
    yield _gauge("gateway_requests_in_flight", "Requests that hold a place.", admission.requests)
    yield _gauge("gateway_requests_in_flight_limit", "Beyond it requests are shed.", settings.max_requests_in_flight)
    yield _gauge("gateway_messages_in_flight", "SMS decoded and not yet answered.", runtime.counters.messages_in_flight)
    yield _gauge("gateway_body_bytes_in_flight", "Bytes reserved for request bodies.", admission.reserved_bytes)
    yield _gauge("gateway_body_bytes_in_flight_limit", "Beyond it requests are shed.", settings.max_bytes_in_flight)
    shed: dict[tuple[str, ...], float] = {(reason,): admission.shed[reason] for reason in _SHED}
    yield _counter(
        "gateway_shed",
        "Requests answered 503 overloaded, by what there was too little of: slots, bytes (room for the body), "
        "account_share (others' room is not this account's), confirm_window (the broker confirms too slowly).",
        ("reason",),
        {**shed, ("confirm_window",): runtime.publisher.shed},
    )
    yield _histogram(
        "gateway_event_loop_lag_seconds",
        "How much later than asked for a task ran, four times a second: what every request waits at least.",
        (),
        {(): runtime.counters.loop_lag_s},
    )
    yield _counter("gateway_message_id_leases", "Blocks of message ids leased from the database.", (), {(): ids.leases})
    yield _gauge("gateway_message_ids_available", "Message ids left in the leases that are held.", ids.available)
    yield _gauge("gateway_ready", "1 when /readyz answers 200.", not runtime.not_ready_reasons())
    yield _gauge("gateway_draining", "1 from SIGTERM on.", runtime.draining)


def _of_broker(runtime: Runtime) -> Iterator[Metric]:
    publisher = runtime.publisher
    connections = publisher.connections
    states = connections.states()
    yield _labelled_gauge(
        "gateway_broker_connections",
        "Publish connections: open, half_open (one batch at a time after a slow predecessor), blocked (a broker "
        "alarm), overdue (a batch is past its deadline), lost, connecting, draining (only waits for late confirms).",
        "state",
        {state: states[state] for state in (*STATES, "connecting", "draining")},
    )
    yield _counter("gateway_broker_connects", "Publish connections opened.", (), {(): connections.connected})
    yield _counter(
        "gateway_broker_connect_failures", "Attempts to open one that failed.", (), {(): connections.connect_failures}
    )
    yield _counter(
        "gateway_broker_blocked_seconds",
        "Time that broker alarms blocked publish connections, added up over connections.",
        (),
        {(): connections.blocked_s},
    )
    yield _counter(
        "gateway_published",
        "AMQP messages by what the broker said of them in time: acked, nacked, returned (unroutable), unknown "
        "(nothing: they may be queued). An envelope counts once.",
        ("outcome",),
        {
            (outcome.name.lower(),): publisher.outcomes[outcome]
            for outcome in (Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN)
        },
    )
    yield _counter(
        "gateway_late_confirms",
        "AMQP messages of batches that the broker settled only after they had been answered as unknown.",
        (),
        {(): connections.late_confirms},
    )
    yield _counter(
        "gateway_republished",
        "AMQP messages published again, with the same id, after their connection was lost.",
        (),
        {(): publisher.republished},
    )
    yield _gauge("gateway_unconfirmed_messages", "AMQP messages on the wire.", publisher.unconfirmed_messages)
    yield _gauge("gateway_unconfirmed_bytes", "Bytes of them.", publisher.unconfirmed_bytes)
    yield _gauge("gateway_unconfirmed_age_seconds", "Age of the oldest batch on the wire.", publisher.oldest_age_s)
    yield _gauge(
        "gateway_confirm_window_messages",
        "How many may be on the wire: shrinks when confirms take long, grows while they are fast.",
        publisher.window.messages,
    )
    yield _gauge(
        "gateway_confirm_wait_seconds", "What a batch waits for its confirms, smoothed.", publisher.window.confirm_s
    )


def _of_database(runtime: Runtime) -> Iterator[Metric]:
    database = runtime.database
    idle = database.idle_connections
    yield _labelled_gauge(
        "gateway_database_connections",
        "Connections of the pool, by whether a query uses them.",
        "state",
        {"used": database.connections - idle, "idle": idle},
    )
    yield _gauge("gateway_database_connections_limit", "Size of the pool.", runtime.settings.database_pool_size)
    yield _gauge("gateway_database_up", "1 while a primary of the database answers.", database.is_up)
    yield _counter("gateway_database_failures", "Queries that failed or timed out.", (), {(): database.failures})


async def show(request: web.Request) -> web.Response:
    """What this process has to show."""
    return _exposition(request, ProcessMetrics(request.app[RUNTIME]))


def show_workers(request: web.Request, expositions: Mapping[int, str | None], restarts: int) -> web.Response:
    """What the workers have to show, each under its own label; None from one that does not answer.

    Nothing is added up here: a counter that starts again at 0 is a reset that Prometheus sees in its own series, and
    would be a sum that falls.
    """
    return _exposition(request, WorkersMetrics(expositions, restarts))


class WorkersMetrics(Collector):
    """What a supervisor has to show: its workers' own, put together, and how many of them answer."""

    def __init__(self, expositions: Mapping[int, str | None], restarts: int) -> None:
        self._expositions = expositions
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        answering = sum(text is not None for text in self._expositions.values())
        yield build_info()
        yield _labelled_gauge(
            "gateway_workers",
            "Worker processes, by whether they answer their supervisor.",
            "state",
            {"answering": answering, "silent": len(self._expositions) - answering},
        )
        yield _counter("gateway_worker_restarts", "Workers started again.", (), {(): self._restarts})
        families: dict[str, Metric] = {}
        _merge(families, "supervisor", _PROCESS.collect())
        for number, text in self._expositions.items():
            _merge(families, str(number), text_string_to_metric_families(text or ""))
        yield from families.values()


def _merge(families: dict[str, Metric], worker: str, more: Iterable[Metric]) -> None:
    """Add one process's samples, under its label, to the families of all."""
    for family in more:
        if family.name != f"{BUILD}_info":  # said once already
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [sample._replace(labels={WORKER: worker, **sample.labels}) for sample in family.samples]


def _exposition(request: web.Request, collector: Collector) -> web.Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    encode, content_type = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
    return web.Response(body=encode(registry), headers={hdrs.CONTENT_TYPE: content_type})


def _counter(name: str, says: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(name, says, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _gauge(name: str, says: str, value: float) -> Metric:
    return GaugeMetricFamily(name, says, value)


def _labelled_gauge(name: str, says: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, says, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family


def _histogram(name: str, says: str, labels: Sequence[str], values: Mapping[tuple[str, ...], Histogram]) -> Metric:
    family = HistogramMetricFamily(name, says, labels=labels)
    for label_values, one in values.items():
        bounds = [*map(str, map(float, one.bounds)), "+Inf"]
        buckets = list(zip(bounds, accumulate(one.counts), strict=True))
        family.add_metric(label_values, buckets, one.total)
    return family
