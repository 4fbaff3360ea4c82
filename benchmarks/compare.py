"""How near to the broker's limit is the gateway, and how far from an ordinary service?

Bare publisher, gateway and FastAPI service run in turn, round after round, under the same load; ratios are taken
within a round, since what the machine can do drifts from minute to minute, and only then is their median.
"""

from collections.abc import Callable, Sequence

import msgspec

from benchmarks import machine, runs
from benchmarks.figures import Figure, Line
from benchmarks.machine import Machine
from benchmarks.runs import FASTAPI, GATEWAY, LIMIT, Run, Setup
from benchmarks.stand import open_stand

# Messages in a batch → batches in flight. More of the small ones: a client of single messages is not alone.
IN_FLIGHT = {1: 64, 10: 32, 100: 16, 1_000: 8}
FULL_BATCH = 1_000
# Fewer than this in any run behind a figure, and chance decides: a slow system needs longer runs (--seconds).
FEWEST_REQUESTS = 30


class Options(msgspec.Struct, frozen=True):
    """What is compared."""

    sizes: dict[int, int] = msgspec.field(default_factory=lambda: dict(IN_FLIGHT))
    systems: tuple[str, ...] = (LIMIT, GATEWAY, FASTAPI)
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
    extras: bool = True  # the lone batch and the refused batches, too


class Summary(msgspec.Struct):
    """One system at one batch size, over all rounds."""

    system: str
    batch: int
    in_flight: int
    messages_per_s: Figure
    requests_per_s: Figure
    of_limit: Figure | None
    server_cpu_us_per_message: Figure
    server_cpu_us_per_request: Figure
    broker_cpu_us_per_message: Figure
    database_cpu_us_per_message: Figure
    client_cpu_us_per_message: Figure
    p50_ms: Figure
    p99_ms: Figure
    peak_mb: Figure


class Bar(msgspec.Struct):
    """One figure of the bars (benchmarks/README.md) against what it has to reach."""

    row: str
    what: str
    measured: Figure
    bar: float
    at_least: bool  # else: at most
    fewest_requests: int | None = None  # in any of the runs behind it, where requests were counted

    @property
    def verdict(self) -> str:
        """Met or missed; neither where it stands on too little."""
        if self.fewest_requests is not None and self.fewest_requests < FEWEST_REQUESTS:
            return f"too few requests: {self.fewest_requests}"
        return "met" if self.is_met else "missed"

    @property
    def is_met(self) -> bool:
        return self.measured.median >= self.bar if self.at_least else self.measured.median <= self.bar


class Comparison(msgspec.Struct):
    """Everything `compare --json` writes."""

    machine: Machine
    options: Options
    summaries: list[Summary]
    cpu_per_request: dict[str, Line]  # system → CPU µs of a request = a + b·n
    bars: list[Bar]
    # CPU of a batch refused as a whole ÷ a clean one, over HTTP, by flaw. No bar: the clean one is published as well,
    # and row 6 asks for the cost up to the publish, which `stages` measures.
    refused_over_http: dict[str, Figure]
    other_cores: Figure  # what else the machine was doing, over all runs
    void: list[Run]
    runs: list[Run]


def compare(options: Options, on_run: Callable[[Run], None]) -> Comparison:
    """All runs; `on_run` hears of each as it ends."""
    rounds: list[list[Run]] = []
    described = machine.describe()
    with open_stand(options.lists) as stand:
        for _ in range(options.rounds):
            rounds.append([])
            for system, setup in _plan(options):
                run = runs.run(system, stand, setup)
                rounds[-1].append(run)
                on_run(run)
    return evaluate(described, options, rounds)


def _plan(options: Options) -> list[tuple[str, Setup]]:
    """The runs of one round."""
    base = Setup(
        queue_type=options.queue_type,
        sms_per_message=options.messages_per_envelope,
        shards=options.shards,
        warm_up_s=options.warm_up_s,
        duration_s=options.seconds,
        amqp_connections=options.amqp_connections,
        processes=options.processes,
        settings=options.settings,
    )
    replace = msgspec.structs.replace
    planned = [
        (system, replace(base, batch=batch, in_flight=in_flight))
        for batch, in_flight in options.sizes.items()
        for system in options.systems
    ]
    if options.extras:
        lone = replace(base, batch=FULL_BATCH, in_flight=1)
        planned += [(system, lone) for system in options.systems if system != FASTAPI]
        if GATEWAY in options.systems:
            planned += [(GATEWAY, replace(base, batch=FULL_BATCH, all_bad=flaw)) for flaw in ("format", "type")]
    return planned


def evaluate(described: Machine, options: Options, rounds: Sequence[Sequence[Run]]) -> Comparison:
    """Medians and ratios of the runs that count."""
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
        refused_over_http=_refused(valid, options),
        other_cores=Figure.of(run.other_cores for run in everything),
        void=[run for run in everything if run.void],
        runs=everything,
    )


def _find(one_round: Sequence[Run], system: str, batch: int, in_flight: int, all_bad: str = "") -> Run | None:
    return next(
        (
            run
            for run in one_round
            if (run.system, run.setup.batch, run.setup.in_flight, run.setup.all_bad)
            == (system, batch, in_flight, all_bad)
        ),
        None,
    )


def _summarise(rounds: Sequence[Sequence[Run]], system: str, batch: int, in_flight: int) -> Summary | None:
    limit = (LIMIT, batch, in_flight)
    found = [run for one in rounds if (run := _find(one, system, batch, in_flight))]
    if not found:
        return None
    return Summary(
        system=system,
        batch=batch,
        in_flight=in_flight,
        messages_per_s=Figure.of(run.messages_per_s for run in found),
        requests_per_s=Figure.of(run.requests_per_s for run in found),
        of_limit=_ratio(rounds, (system, batch, in_flight), limit, lambda ours, bare: _rate(ours) / _rate(bare)),
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
    """The ratio of two runs, taken within each round that has both."""
    pairs = [(_find(runs_, *one), _find(runs_, *other)) for runs_ in rounds]
    values = [ratio(ours, theirs) for ours, theirs in pairs if ours and theirs]
    return Figure.of(values) if values else None


def _rate(run: Run) -> float:
    return run.messages_per_s


def _cpu(run: Run) -> float:
    return run.server_cpu_us_per_message


def _bars(rounds: Sequence[Sequence[Run]], options: Options) -> list[Bar]:
    """Which of the bars (benchmarks/README.md) this comparison measured."""
    bars: list[Bar] = []

    def add(row: str, what: str, measured: Figure | None, bar: float, *keys: _Key, at_least: bool) -> None:
        if measured is not None:
            behind = [run.requests for one in rounds for key in keys if (run := _find(one, *key))]
            bars.append(Bar(row, what, measured, bar, at_least, min(behind)))

    def of_gateway(key: _Key, figure: Callable[[Run], float]) -> Figure | None:
        values = [figure(run) for one in rounds if (run := _find(one, *key))]
        return Figure.of(values) if values else None

    full = options.sizes.get(FULL_BATCH, 0)
    gateway, fastapi, limit = [(system, FULL_BATCH, full) for system in (GATEWAY, FASTAPI, LIMIT)]
    if options.messages_per_envelope == 1:
        share = _ratio(rounds, gateway, limit, lambda ours, bare: _rate(ours) / _rate(bare))
        add("1", "accepted msg/s ÷ bare publisher's", share, 0.9, gateway, limit, at_least=True)
        add("2", "gateway CPU µs per message, batch of 1,000", of_gateway(gateway, _cpu), 2.5, gateway, at_least=False)
    else:
        add("3", "gateway CPU µs per message, envelopes", of_gateway(gateway, _cpu), 1.2, gateway, at_least=False)
        add("3", "accepted SMS/s, envelopes", of_gateway(gateway, _rate), 833_000, gateway, at_least=True)
    faster = _ratio(rounds, gateway, fastapi, lambda ours, theirs: _rate(ours) / _rate(theirs))
    add("4", "accepted msg/s ÷ FastAPI's, batch of 1,000", faster, 8, gateway, fastapi, at_least=True)
    cheaper = _ratio(rounds, gateway, fastapi, lambda ours, theirs: _cpu(theirs) / _cpu(ours))
    add("4", "FastAPI's CPU per message ÷ gateway's", cheaper, 50, gateway, fastapi, at_least=True)
    alone = (GATEWAY, FULL_BATCH, 1), (LIMIT, FULL_BATCH, 1)
    lone = _ratio(rounds, *alone, lambda ours, bare: ours.p50_ms / bare.p50_ms)
    add("5", "p50 of a lone batch ÷ bare publisher's", lone, 1.3, *alone, at_least=False)
    for batch in (1, 10):
        in_flight = options.sizes.get(batch, 0)
        pair = (GATEWAY, batch, in_flight), (FASTAPI, batch, in_flight)
        requests = _ratio(rounds, *pair, lambda ours, theirs: ours.requests_per_s / theirs.requests_per_s)
        add("9", f"requests/s ÷ FastAPI's, batch of {batch}", requests, 5, *pair, at_least=True)
    return bars


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
