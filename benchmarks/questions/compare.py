"""The gateway beside the bare publisher, a FastAPI service and, if given, an older checkout (the baseline).

All systems run in turn, round after round, under the same load. The speed of a machine drifts from minute to minute, so
a ratio is taken within its round, and the median over the rounds follows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.drivers import runs
from benchmarks.drivers.backends import open_backends
from benchmarks.drivers.generator import SINGLE, WITH_IDS
from benchmarks.drivers.runs import Run
from benchmarks.drivers.systems import BARE_PUBLISHER, BASELINE, FASTAPI, FASTAPI_LOGGED, GATEWAY, Setup
from benchmarks.questions.run_report import closing_parts
from benchmarks.report import bars, machine, plots
from benchmarks.report.bars import Bar
from benchmarks.report.document import Cell, Chart, Report, Sentence, Table
from benchmarks.report.figures import Figure, Line, short
from benchmarks.report.machine import Machine

# Messages in a batch → batches in flight. Small batches come from many clients at once.
IN_FLIGHT = {1: 64, 10: 32, 100: 16, 1_000: 8}
FULL_BATCH = 1_000
FORMS = {SINGLE: (1, 1.05), WITH_IDS: (FULL_BATCH, 1.1)}  # form of a request → batch size, and bar of its CPU


class Options(msgspec.Struct, frozen=True):
    """The systems and the loads to compare."""

    sizes: dict[int, int] = msgspec.field(default_factory=lambda: dict(IN_FLIGHT))
    systems: tuple[str, ...] = (BARE_PUBLISHER, GATEWAY, FASTAPI)
    rounds: int = 3
    seconds: float = 3.0
    warm_up_s: float = 1.0
    queue_type: str = "quorum"
    messages_per_envelope: int = 1
    shards: int = 1
    lists: int = 1
    amqp_connections: int = 2
    processes: int = 1
    settings: dict[str, str] = {}  # of the gateway
    baseline: str = ""  # the folder of the checkout that the system BASELINE is run from
    extras: bool = True  # the lone batch, the refused batches, single sends and answers with ids, too


class Summary(msgspec.Struct):
    """One system at one batch size, over all rounds."""

    system: str
    batch: int
    in_flight: int
    messages_per_s: Figure
    requests_per_s: Figure
    of_bare_publisher: Figure | None
    server_cpu_us_per_message: Figure
    server_cpu_us_per_request: Figure
    broker_cpu_us_per_message: Figure
    database_cpu_us_per_message: Figure
    client_cpu_us_per_message: Figure
    p50_ms: Figure
    p99_ms: Figure
    peak_mb: Figure


class AgainstBaseline(msgspec.Struct):
    """The gateway's figures ÷ the baseline's at one batch size, each ratio taken within its round."""

    batch: int
    in_flight: int
    messages_per_s: Figure
    p50: Figure
    p99: Figure
    gateway_cpu_per_request: Figure
    broker_cpu_per_message: Figure
    peak_memory: Figure


class Comparison(msgspec.Struct):
    """The content of the file that `compare --json` writes."""

    machine: Machine
    options: Options
    summaries: list[Summary]
    cpu_per_request: dict[str, Line]  # system → CPU µs of a request = a + b·n
    bars: list[Bar]
    baseline_commit: str
    against_baseline: list[AgainstBaseline]
    # CPU of a batch refused as a whole ÷ a clean one, over HTTP, by flaw. It has no bar, since the clean batch is
    # published as well. Row 6 counts the cost up to the publish, which `stages` measures.
    refused_over_http: dict[str, Figure]
    other_cores: Figure  # cores that other processes took, over all runs
    void: list[Run]
    runs: list[Run]


def measure(options: Options, on_run: Callable[[Run], None]) -> Comparison:
    """Measure all runs. `on_run` is called with each run as it ends."""
    rounds: list[list[Run]] = []
    described = machine.describe()
    with open_backends(options.lists) as backends:
        for _ in range(options.rounds):
            rounds.append([])
            for system, setup in _plan(options):
                run = runs.run(system, backends, setup)
                rounds[-1].append(run)
                on_run(run)
    return evaluate(described, options, rounds)


def _plan(options: Options) -> list[tuple[str, Setup]]:
    """Return the runs of one round."""
    base = Setup(
        queue_type=options.queue_type,
        sms_per_message=options.messages_per_envelope,
        shards=options.shards,
        warm_up_s=options.warm_up_s,
        duration_s=options.seconds,
        amqp_connections=options.amqp_connections,
        processes=options.processes,
        settings=options.settings,
        baseline=options.baseline,
    )
    replace = msgspec.structs.replace
    planned = [
        (system, replace(base, batch=batch, in_flight=in_flight))
        for batch, in_flight in options.sizes.items()
        for system in options.systems
    ]
    if options.extras:
        lone = replace(base, batch=FULL_BATCH, in_flight=1)
        planned += [(system, lone) for system in options.systems if system not in (FASTAPI, FASTAPI_LOGGED)]
        if GATEWAY in options.systems:
            planned += [(GATEWAY, replace(base, batch=FULL_BATCH, all_bad=flaw)) for flaw in ("format", "type")]
            planned += [
                (GATEWAY, replace(base, batch=batch, in_flight=options.sizes[batch], form=form))
                for form, (batch, _) in FORMS.items()
                if batch in options.sizes
            ]
    return planned


def evaluate(described: Machine, options: Options, rounds: Sequence[Sequence[Run]]) -> Comparison:
    """Compute medians and ratios of the runs that are not void."""
    everything = [run for one in rounds for run in one]
    valid = [[run for run in one if not run.void] for one in rounds]
    summaries = [
        summary
        for batch, in_flight in options.sizes.items()
        for system in options.systems
        if (summary := _summarise(valid, system, batch, in_flight))
    ]
    lines = {}
    for system in options.systems:
        points = [(float(one.batch), one.server_cpu_us_per_request.median) for one in summaries if one.system == system]
        if len(points) > 1:
            lines[system] = Line.through(points)
    return Comparison(
        machine=described,
        options=options,
        summaries=summaries,
        cpu_per_request=lines,
        bars=_bars(valid, options),
        baseline_commit=machine.commit_of(Path(options.baseline)) if options.baseline else "",
        against_baseline=[
            against
            for batch, in_flight in options.sizes.items()
            if (against := _against_baseline(valid, batch, in_flight))
        ],
        refused_over_http=_refused(valid, options),
        other_cores=Figure.of(run.other_cores for run in everything),
        void=[run for run in everything if run.void],
        runs=everything,
    )


def _find(one_round: Sequence[Run], system: str, batch: int, in_flight: int, variant: str = "") -> Run | None:
    """Return a run. `variant` is the flaw of its messages, or the form of its requests."""
    return next(
        (
            run
            for run in one_round
            if (run.system, run.setup.batch, run.setup.in_flight, run.setup.all_bad or run.setup.form)
            == (system, batch, in_flight, variant)
        ),
        None,
    )


def _summarise(rounds: Sequence[Sequence[Run]], system: str, batch: int, in_flight: int) -> Summary | None:
    bare = (BARE_PUBLISHER, batch, in_flight)
    found = [run for one in rounds if (run := _find(one, system, batch, in_flight))]
    if not found:
        return None
    return Summary(
        system=system,
        batch=batch,
        in_flight=in_flight,
        messages_per_s=Figure.of(run.messages_per_s for run in found),
        requests_per_s=Figure.of(run.requests_per_s for run in found),
        of_bare_publisher=_ratio(rounds, (system, batch, in_flight), bare, _rate_ratio),
        server_cpu_us_per_message=Figure.of(run.server_cpu_us_per_message for run in found),
        server_cpu_us_per_request=Figure.of(run.server_cpu_us_per_request for run in found),
        broker_cpu_us_per_message=Figure.of(run.broker_cpu_us_per_message for run in found),
        database_cpu_us_per_message=Figure.of(run.database_cpu_us_per_message for run in found),
        client_cpu_us_per_message=Figure.of(run.client_cpu_us_per_message for run in found),
        p50_ms=Figure.of(run.p50_ms for run in found),
        p99_ms=Figure.of(run.p99_ms for run in found),
        peak_mb=Figure.of(run.peak_mb for run in found),
    )


_Key = tuple[str, int, int] | tuple[str, int, int, str]


def _ratio(
    rounds: Sequence[Sequence[Run]], one: _Key, other: _Key, ratio: Callable[[Run, Run], float]
) -> Figure | None:
    """Return the ratio of two runs, taken within each round that has both."""
    pairs = [(_find(runs_, *one), _find(runs_, *other)) for runs_ in rounds]
    values = [ratio(ours, theirs) for ours, theirs in pairs if ours and theirs]
    return Figure.of(values) if values else None


def _rate(run: Run) -> float:
    return run.messages_per_s


def _rate_ratio(one: Run, other: Run) -> float:
    return _rate(one) / _rate(other)


def _cpu(run: Run) -> float:
    return run.server_cpu_us_per_message


def _bars(rounds: Sequence[Sequence[Run]], options: Options) -> list[Bar]:
    """Return those bars of benchmarks/README.md that this comparison measured."""
    found: list[Bar] = []

    def add(row: str, what: str, measured: Figure | None, bar: float, *keys: _Key, at_least: bool) -> None:
        if measured is not None:
            behind = [run.requests for one in rounds for key in keys if (run := _find(one, *key))]
            found.append(Bar(row, what, measured, bar, at_least, min(behind)))

    def of_gateway(key: _Key, figure: Callable[[Run], float]) -> Figure | None:
        values = [figure(run) for one in rounds if (run := _find(one, *key))]
        return Figure.of(values) if values else None

    full = options.sizes.get(FULL_BATCH, 0)
    gateway, fastapi, bare = [(system, FULL_BATCH, full) for system in (GATEWAY, FASTAPI, BARE_PUBLISHER)]
    if options.messages_per_envelope == 1:
        share = _ratio(rounds, gateway, bare, _rate_ratio)
        add("1", "accepted msg/s ÷ bare publisher's", share, 0.9, gateway, bare, at_least=True)
        add("2", "gateway CPU µs per message, batch of 1,000", of_gateway(gateway, _cpu), 2.5, gateway, at_least=False)
        cpu_share = _ratio(rounds, gateway, bare, lambda ours, theirs: _cpu(ours) / _cpu(theirs))
        add("2", "gateway's CPU per message ÷ bare publisher's", cpu_share, 7, gateway, bare, at_least=False)
        for batch, bar in ((100, 0.7), (10, 0.45)):
            small = (GATEWAY, batch, options.sizes.get(batch, 0)), (BARE_PUBLISHER, batch, options.sizes.get(batch, 0))
            share = _ratio(rounds, *small, _rate_ratio)
            add("14", f"accepted msg/s ÷ bare publisher's, batch of {batch}", share, bar, *small, at_least=True)
    else:
        add("3", "gateway CPU µs per message, envelopes", of_gateway(gateway, _cpu), 1.2, gateway, at_least=False)
        add("3", "accepted SMS/s, envelopes", of_gateway(gateway, _rate), 833_000, gateway, at_least=True)
    faster = _ratio(rounds, gateway, fastapi, _rate_ratio)
    add("4", "accepted msg/s ÷ FastAPI's, batch of 1,000", faster, 8, gateway, fastapi, at_least=True)
    cheaper = _ratio(rounds, gateway, fastapi, lambda ours, theirs: _cpu(theirs) / _cpu(ours))
    add("4", "FastAPI's CPU per message ÷ gateway's", cheaper, 50, gateway, fastapi, at_least=True)
    alone = (GATEWAY, FULL_BATCH, 1), (BARE_PUBLISHER, FULL_BATCH, 1)
    lone = _ratio(rounds, *alone, lambda ours, theirs: ours.p50_ms / theirs.p50_ms)
    add("5", "p50 of a lone batch ÷ bare publisher's", lone, 1.3, *alone, at_least=False)
    for batch, bar in ((1, 6.2), (10, 6.5)):
        in_flight = options.sizes.get(batch, 0)
        pair = (GATEWAY, batch, in_flight), (FASTAPI, batch, in_flight)
        requests = _ratio(rounds, *pair, lambda ours, theirs: ours.requests_per_s / theirs.requests_per_s)
        add("9", f"requests/s ÷ FastAPI's, batch of {batch}", requests, bar, *pair, at_least=True)
    for form, (batch, bar) in FORMS.items():
        in_flight = options.sizes.get(batch, 0)
        variant, plain = (GATEWAY, batch, in_flight, form), (GATEWAY, batch, in_flight)
        cpu = _ratio(rounds, variant, plain, lambda one, other: _cpu(one) / _cpu(other))
        add("17", f"CPU {form} ÷ without, batch of {batch:,}", cpu, bar, variant, plain, at_least=False)
    for batch, bar in ((1, 0.55), (10, 0.65), (100, 0.8)):
        in_flight = options.sizes.get(batch, 0)
        pair = (GATEWAY, batch, in_flight), (BASELINE, batch, in_flight)
        cpu = _ratio(
            rounds, *pair, lambda ours, older: ours.server_cpu_us_per_request / older.server_cpu_us_per_request
        )
        add("15", f"CPU per request ÷ baseline's, batch of {batch}", cpu, bar, *pair, at_least=False)
    return found


def _against_baseline(rounds: Sequence[Sequence[Run]], batch: int, in_flight: int) -> AgainstBaseline | None:
    def ratio(figure: Callable[[Run], float]) -> Figure | None:
        keys = (GATEWAY, batch, in_flight), (BASELINE, batch, in_flight)
        return _ratio(rounds, *keys, lambda ours, older: figure(ours) / (figure(older) or 1.0))

    figures = (
        ratio(_rate),
        ratio(lambda run: run.p50_ms),
        ratio(lambda run: run.p99_ms),
        ratio(lambda run: run.server_cpu_us_per_request),
        ratio(lambda run: run.broker_cpu_us_per_message),
        ratio(lambda run: run.peak_mb),
    )
    present = [figure for figure in figures if figure is not None]
    return AgainstBaseline(batch, in_flight, *present) if len(present) == len(figures) else None


def _refused(rounds: Sequence[Sequence[Run]], options: Options) -> dict[str, Figure]:
    clean = (GATEWAY, FULL_BATCH, options.sizes.get(FULL_BATCH, 0))
    ratios = {
        flaw: _ratio(
            rounds,
            (GATEWAY, FULL_BATCH, IN_FLIGHT[FULL_BATCH], flaw),
            clean,
            lambda bad, good: bad.server_cpu_us_per_request / good.server_cpu_us_per_request,
        )
        for flaw in ("format", "type")
    }
    return {flaw: ratio for flaw, ratio in ratios.items() if ratio is not None}


def report(comparison: Comparison) -> Report:
    """Return all figures: against the bars, against the baseline, and by system and batch size."""
    options = comparison.options
    cpu: dict[str, dict[str, Figure]] = {}
    for one in comparison.summaries:
        cpu.setdefault(f"{one.batch:,}", {})[one.system] = one.server_cpu_us_per_message
    envelopes = f", {options.messages_per_envelope} SMS an envelope" if options.messages_per_envelope > 1 else ""
    lines = [
        Sentence(f"{system}: CPU of a request of n messages = {short(line.a)} + {short(line.b)} · n µs")
        for system, line in comparison.cpu_per_request.items()
    ]
    refused = [
        Sentence(
            f"CPU of a batch refused as a whole (wrong {flaw}) ÷ a clean one, publishing included: "
            f"{ratio.shown(short)}. Row 6 is measured by `stages`."
        )
        for flaw, ratio in comparison.refused_over_http.items()
    ]
    return Report(
        f"Gateway, bare publisher and others: {options.queue_type} queue{envelopes}",
        comparison.machine,
        [
            Chart("Accepted messages a second, by batch size", plots.bars(_rates(comparison), "msg/s")),
            Chart("CPU of the system per message, by batch size", plots.bars(cpu, "µs")),
            _throughput_chart(comparison),
            *_summary_tables(comparison),
            *lines,
            bars.table_of(comparison.bars),
            *_baseline_parts(comparison),
            *refused,
            *closing_parts(comparison.other_cores, comparison.void),
        ],
    )


def rates_picture(comparison: Comparison) -> str:
    """Return the rates alone, as an SVG file that a document can show."""
    return plots.standalone(plots.bars(_rates(comparison), "msg/s"))


def _rates(comparison: Comparison) -> dict[str, dict[str, Figure]]:
    rates: dict[str, dict[str, Figure]] = {}
    for one in comparison.summaries:
        rates.setdefault(f"batch of {one.batch:,}", {})[one.system] = one.messages_per_s
    return rates


def _throughput_chart(comparison: Comparison) -> Chart:
    largest = max(comparison.options.sizes)
    over_time = {
        run.system: run.ticks  # of the last round, since it overwrites those before
        for run in comparison.runs
        if run.setup.batch == largest and run.setup.in_flight > 1 and not (run.setup.all_bad or run.setup.form)
    }
    return Chart(
        f"Throughput over time, batches of {largest:,}, last round",
        plots.lines(over_time, x_label="seconds of measurement", y_label="messages/s"),
    )


def _summary_tables(comparison: Comparison) -> list[Table]:
    rates: Mapping[str, Callable[[Summary], Figure | None]] = {
        "msg/s": lambda one: one.messages_per_s,
        "requests/s": lambda one: one.requests_per_s,
        "÷ bare pub.": lambda one: one.of_bare_publisher,
        "p50 ms": lambda one: one.p50_ms,
        "p99 ms": lambda one: one.p99_ms,
    }
    costs: Mapping[str, Callable[[Summary], Figure | None]] = {
        "message": lambda one: one.server_cpu_us_per_message,
        "request": lambda one: one.server_cpu_us_per_request,
        "broker": lambda one: one.broker_cpu_us_per_message,
        "database": lambda one: one.database_cpu_us_per_message,
        "load": lambda one: one.client_cpu_us_per_message,
        "MB": lambda one: one.peak_mb,
    }
    titles = {
        f"{comparison.options.rounds} rounds: median, lowest-highest": rates,
        "CPU in µs, of the system per message and request, of the others per message; peak memory": costs,
    }
    return [
        Table(
            title,
            ["batch", "system", *columns],
            [
                [f"{one.batch:,}×{one.in_flight}", one.system, *(figure(one) for figure in columns.values())]
                for one in comparison.summaries
            ],
            text_columns=2,
        )
        for title, columns in titles.items()
    ]


def _baseline_parts(comparison: Comparison) -> list[Table]:
    if not comparison.against_baseline:
        return []
    rows: list[list[Cell]] = [
        [
            f"{one.batch:,}×{one.in_flight}",
            one.messages_per_s,
            one.p50,
            one.p99,
            one.gateway_cpu_per_request,
            one.broker_cpu_per_message,
            one.peak_memory,
        ]
        for one in comparison.against_baseline
    ]
    title = f"Gateway ÷ baseline ({comparison.baseline_commit}), within the round"
    return [Table(title, ["batch", "msg/s", "p50", "p99", "CPU", "broker CPU", "MB"], rows)]
