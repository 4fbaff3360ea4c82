"""The rate of the broker with the bare publisher, by queue type and SMS per AMQP message."""

from collections.abc import Callable, Iterator

import msgspec

from benchmarks.drivers import runs
from benchmarks.drivers.backends import QUEUE_TYPES, open_backends
from benchmarks.drivers.runs import Run
from benchmarks.drivers.systems import BARE_PUBLISHER, Setup
from benchmarks.questions.run_report import closing_parts
from benchmarks.report import machine, plots
from benchmarks.report.document import Cell, Chart, Report, Table
from benchmarks.report.figures import Figure
from benchmarks.report.machine import Machine

SMS_PER_MESSAGE = (1, 10, 50, 100, 500)


class Options(msgspec.Struct, frozen=True):
    """The runs to measure."""

    queue_types: tuple[str, ...] = QUEUE_TYPES
    sms_per_message: tuple[int, ...] = SMS_PER_MESSAGE
    rounds: int = 3
    seconds: float = 2.0
    warm_up_s: float = 0.5
    batch: int = 1_000
    in_flight: int = 8
    amqp_connections: int = 2


class Summary(msgspec.Struct):
    """One queue type with one number of SMS per AMQP message, over all rounds."""

    queue_type: str
    sms_per_message: int
    messages_per_s: Figure
    client_cpu_us_per_message: Figure
    broker_cpu_us_per_message: Figure
    p50_ms: Figure
    p99_ms: Figure


class Measured(msgspec.Struct):
    """The content of the file that `publisher --json` writes."""

    machine: Machine
    options: Options
    summaries: list[Summary]
    other_cores: Figure  # cores that other processes took, over all runs
    void: list[Run]
    runs: list[Run]


def measure(options: Options, on_run: Callable[[Run], None]) -> Measured:
    """Measure all runs. `on_run` is called with each run as it ends."""
    done: list[Run] = []
    described = machine.describe()
    with open_backends() as backends:
        for _ in range(options.rounds):
            for setup in _setups(options):
                done.append(runs.run(BARE_PUBLISHER, backends, setup))
                on_run(done[-1])
    summaries = []
    for setup in _setups(options):
        found = [run for run in done if run.setup == setup and not run.void]
        if found:
            summaries.append(_summarise(setup, found))
    others = Figure.of(run.other_cores for run in done)
    return Measured(described, options, summaries, others, [run for run in done if run.void], done)


def _setups(options: Options) -> Iterator[Setup]:
    for queue_type in options.queue_types:
        for sms_per_message in options.sms_per_message:
            yield Setup(
                batch=options.batch,
                in_flight=options.in_flight,
                queue_type=queue_type,
                sms_per_message=sms_per_message,
                warm_up_s=options.warm_up_s,
                duration_s=options.seconds,
                amqp_connections=options.amqp_connections,
            )


def _summarise(setup: Setup, found: list[Run]) -> Summary:
    return Summary(
        queue_type=setup.queue_type,
        sms_per_message=setup.sms_per_message,
        messages_per_s=Figure.of(run.messages_per_s for run in found),
        client_cpu_us_per_message=Figure.of(run.client_cpu_us_per_message for run in found),
        broker_cpu_us_per_message=Figure.of(run.broker_cpu_us_per_message for run in found),
        p50_ms=Figure.of(run.p50_ms for run in found),
        p99_ms=Figure.of(run.p99_ms for run in found),
    )


def report(measured: Measured) -> Report:
    """Return the rates as a chart and all figures as a table."""
    rates: dict[str, dict[str, Figure]] = {}
    rows: list[list[Cell]] = []
    for one in measured.summaries:
        rates.setdefault(one.queue_type, {})[f"{one.sms_per_message} SMS"] = one.messages_per_s
        figures = (
            one.messages_per_s,
            one.client_cpu_us_per_message,
            one.broker_cpu_us_per_message,
            one.p50_ms,
            one.p99_ms,
        )
        rows.append([f"{one.queue_type}, {one.sms_per_message}", *figures])
    head = ["queue, SMS per AMQP message", "SMS/s", "client CPU µs", "broker CPU µs", "p50 ms", "p99 ms"]
    return Report(
        "The bare publisher",
        measured.machine,
        [
            Chart("SMS a second, by queue type and SMS per AMQP message", plots.bars(rates, "SMS/s", one_scale=True)),
            Table("The bare publisher: median, lowest-highest", head, rows),
            *closing_parts(measured.other_cores, measured.void),
        ],
    )
