"""How fast is the broker itself? The bare publisher over queue types and SMS per AMQP message: the physical limit."""

from collections.abc import Callable, Iterator

import msgspec

from benchmarks import machine, runs
from benchmarks.figures import Figure
from benchmarks.machine import Machine
from benchmarks.runs import LIMIT, Run, Setup
from benchmarks.stand import QUEUE_TYPES, open_stand

SMS_PER_MESSAGE = (1, 10, 50, 100, 500)


class Options(msgspec.Struct, frozen=True):
    """What is measured."""

    queue_types: tuple[str, ...] = QUEUE_TYPES
    sms_per_message: tuple[int, ...] = SMS_PER_MESSAGE
    rounds: int = 3
    seconds: float = 2.0
    warm_up_s: float = 0.5
    batch: int = 1_000
    in_flight: int = 8
    amqp_connections: int = 2


class Summary(msgspec.Struct):
    """One queue type with one number of SMS in an AMQP message, over all rounds."""

    queue_type: str
    sms_per_message: int
    messages_per_s: Figure
    client_cpu_us_per_message: Figure
    broker_cpu_us_per_message: Figure
    p50_ms: Figure
    p99_ms: Figure


class Limits(msgspec.Struct):
    """Everything `limit --json` writes."""

    machine: Machine
    options: Options
    summaries: list[Summary]
    other_cores: Figure  # what else the machine was doing, over all runs
    void: list[Run]
    runs: list[Run]


def measure(options: Options, on_run: Callable[[Run], None]) -> Limits:
    """All runs; `on_run` hears of each as it ends."""
    done: list[Run] = []
    described = machine.describe()
    with open_stand() as stand:
        for _ in range(options.rounds):
            for setup in _setups(options):
                done.append(runs.run(LIMIT, stand, setup))
                on_run(done[-1])
    summaries = []
    for setup in _setups(options):
        found = [run for run in done if run.setup == setup and not run.void]
        if found:
            summaries.append(_summarise(setup, found))
    others = Figure.of(run.other_cores for run in done)
    return Limits(described, options, summaries, others, [run for run in done if run.void], done)


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
