"""The benchmarks' command line: one command for each question."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from benchmarks import capacity as sizing
from benchmarks import compare as comparing
from benchmarks import limit as limits
from benchmarks import load as loading
from benchmarks import memory as memories
from benchmarks import observing as watching
from benchmarks import report, tables, traffic
from benchmarks import stages as staging
from benchmarks.runs import FASTAPI, GATEWAY, LIMIT
from benchmarks.stand import QUEUE_TYPES
from benchmarks.workers import WorkerError
from testbed.servers import ServerError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write an HTML page with plots to this file.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often everything is run; figures are medians.")]
Seconds = Annotated[float, typer.Option(min=0.5, help="Measured time of a run, after its warm-up.")]

EXIT_VOID = 1
EXIT_UNUSABLE = 2
SYSTEMS = (LIMIT, GATEWAY, FASTAPI)
_SIZES = ",".join(map(str, comparing.IN_FLIGHT))
_CARRIED = ",".join(map(str, limits.SMS_PER_MESSAGE))
_IN_FLIGHT = ",".join(map(str, comparing.IN_FLIGHT.values()))


def numbers(text: str) -> tuple[int, ...]:
    """`1,10,100`, all of them at least 1."""
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,10,100")
    return tuple(map(int, text.split(",")))


def queue_type_of(text: str) -> str:
    """One of RabbitMQ's."""
    if text not in QUEUE_TYPES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(QUEUE_TYPES)}")
    return text


def settings_of(given: list[str]) -> dict[str, str]:
    """`NAME=VALUE` each."""
    if wrong := [one for one in given if not re.fullmatch(r"GATEWAY_[A-Z_]+=.*", one)]:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form GATEWAY_NAME=VALUE")
    return {name: value for name, _, value in (one.partition("=") for one in given)}


@app.command()
def stages(*, json_file: JsonFile = None, report_file: ReportFile = None) -> None:
    """What each step on a batch's way costs, and what the plain form of each trick would."""
    measured = staging.measure()
    tables.show_stages(measured)
    write(json_file, measured, report_file, report.of_stages)


@app.command()
def observing(*, json_file: JsonFile = None, report_file: ReportFile = None) -> None:
    """What a request's record, its line in the log and its spans cost."""
    measured = watching.measure()
    tables.show_observing(measured)
    write(json_file, measured, report_file, report.of_observing)


@app.command()
def limit(
    *,
    queue_types: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(QUEUE_TYPES),
    sms_per_message: Annotated[str, typer.Option(help="SMS per AMQP message, separated by commas.")] = _CARRIED,
    in_flight: Annotated[int, typer.Option(min=1, help="Batches of 1,000 SMS on the wire at once.")] = 8,
    amqp_connections: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Rounds = 3,
    seconds: Seconds = 2.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """How fast is the broker itself? A bare publisher against a private RabbitMQ."""
    options = limits.Options(
        queue_types=tuple(map(queue_type_of, queue_types.split(","))),
        sms_per_message=numbers(sms_per_message),
        in_flight=in_flight,
        amqp_connections=amqp_connections,
        rounds=rounds,
        seconds=seconds,
    )
    measured = limits.measure(options, tables.show_run)
    tables.show_limits(measured)
    write(json_file, measured, report_file, report.of_limits)
    if measured.void:
        raise typer.Exit(EXIT_VOID)


@app.command()
def compare(
    *,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = _SIZES,
    in_flight: Annotated[str, typer.Option(help="Batches in flight, one number for each size.")] = _IN_FLIGHT,
    systems: Annotated[str, typer.Option(help="What takes part, separated by commas.")] = ",".join(SYSTEMS),
    queue_type: Annotated[str, typer.Option(help="quorum, classic or stream.")] = "quorum",
    messages_per_envelope: Annotated[int, typer.Option(min=1, help="SMS per AMQP message.")] = 1,
    shards: Annotated[int, typer.Option(min=1, help="Queues; a list has one, so give as many --lists at least.")] = 1,
    lists: Annotated[int, typer.Option(min=1, help="Sending lists that the messages take turns with.")] = 1,
    amqp_connections: Annotated[int, typer.Option(min=1, help="Of the gateway and of the bare publisher.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Load generators.")] = 1,
    setting: Annotated[
        list[str] | None, typer.Option(help="Of the gateway, such as GATEWAY_DATABASE_POOL_SIZE=20; may be repeated.")
    ] = None,
    extras: Annotated[bool, typer.Option(help="The lone batch and the refused batches as well.")] = True,
    rounds: Rounds = 3,
    seconds: Seconds = 3.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
    plot: Annotated[Path | None, typer.Option(help="Write the rates as an SVG picture, for a document.")] = None,
) -> None:
    """Gateway, broker's limit and a FastAPI service, interleaved: rates, ratios, CPU, latency, memory."""
    sizes, flights = numbers(batch), numbers(in_flight)
    if len(sizes) != len(flights):
        raise typer.BadParameter("--in-flight needs one number for each size of --batch")
    chosen = tuple(systems.split(","))
    if not set(chosen) <= set(SYSTEMS):
        raise typer.BadParameter(f"--systems: {systems} is not among {', '.join(SYSTEMS)}")
    options = comparing.Options(
        sizes=dict(zip(sizes, flights, strict=True)),
        systems=chosen,
        rounds=rounds,
        seconds=seconds,
        queue_type=queue_type_of(queue_type),
        messages_per_envelope=messages_per_envelope,
        shards=shards,
        lists=lists,
        amqp_connections=amqp_connections,
        processes=processes,
        settings=settings_of(setting or []),
        extras=extras,
    )
    comparison = comparing.compare(options, tables.show_run)
    tables.show_comparison(comparison)
    write(json_file, comparison, report_file, report.of_comparison)
    if plot is not None:
        plot.write_text(report.rates_picture(comparison), encoding="utf-8")
    if comparison.void:
        raise typer.Exit(EXIT_VOID)


@app.command()
def memory(
    *,
    connections: Annotated[int, typer.Option(min=1, help="Requests of 5 MB at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=3.0)] = 15.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """What the gateway holds: idle, and at 64 concurrent 5 MB requests."""
    measured = memories.measure(memories.Options(connections=connections, seconds=seconds))
    tables.show_memory(measured)
    write(json_file, measured, report_file, report.of_memory)
    if measured.void:
        raise typer.Exit(EXIT_VOID)


@app.command()
def load(
    *,
    url: Annotated[str, typer.Option(help="Of the gateway, such as https://sms.example.com")],
    key: Annotated[str, typer.Option(envvar="SMS_API_KEY", help="Better given in the environment than typed.")],
    list_number: Annotated[list[str], typer.Option(help="May be repeated: messages take turns.")],
    connections: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 16,
    rate: Annotated[
        float,
        typer.Option(min=0, help="Open loop: messages a second that arrive, come what may. 0: closed loop."),
    ] = 0.0,
    batch: Annotated[int, typer.Option(min=1, max=1_000, help="Messages in a request.")] = 100,
    bad_share: Annotated[float, typer.Option(min=0, max=1, help="Share of bad messages.")] = 0.0,
    body_length: Annotated[int, typer.Option(min=1, help="Characters of a text.")] = traffic.BODY_LENGTH,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of measurement.")] = 30.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds before it.")] = 2.0,
    ramp: Annotated[float, typer.Option(min=0, help="Seconds from nothing to the full load, before warm-up.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as failed.")] = 30.0,
    processes: Annotated[int, typer.Option(min=1, help="Load generators, for more than one core.")] = 1,
    max_p99_ms: Annotated[float | None, typer.Option(help="Exit 1 when the p99 is above.")] = None,
    min_rate: Annotated[float | None, typer.Option(help="Exit 1 below these accepted messages a second.")] = None,
    max_error_rate: Annotated[float | None, typer.Option(help="Exit 1 above this share of failed requests.")] = None,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Load on a gateway of yours. Exit status 0: fine, 1: a threshold is broken, 2: unusable, 3: the server is gone.

    A request fails that is not answered 200 with just its good messages queued. Everything that is accepted is really
    queued: point it at a deployment whose messages nobody delivers.
    """
    if processes > connections:
        raise typer.BadParameter("each of --processes needs a connection at least")
    options = loading.Options(
        url=url,
        list_numbers=tuple(list_number),
        batch=batch,
        connections=connections,
        rate=rate,
        bad_share=bad_share,
        body_length=body_length,
        duration_s=duration,
        warm_up_s=warm_up,
        ramp_s=ramp,
        timeout_s=timeout,
        processes=processes,
        thresholds=loading.Thresholds(max_p99_ms, min_rate, max_error_rate),
    )
    with tables.LoadProgress(ramp + warm_up + duration, ramp + warm_up) as progress:
        outcome = loading.run(options, key, progress.show)
    tables.show_load(outcome)
    write(json_file, outcome, report_file, report.of_load)
    raise typer.Exit(outcome.exit_code)


@app.command()
def capacity(
    *,
    measured: Annotated[Path | None, typer.Option("--from", help="A file that `compare --json` wrote.")] = None,
    gateway_us: Annotated[float | None, typer.Option(help="Gateway CPU µs per message.")] = None,
    broker_us: Annotated[float | None, typer.Option(help="Broker CPU µs per message.")] = None,
    database_us: Annotated[float | None, typer.Option(help="Database CPU µs per message.")] = None,
    queue_rate: Annotated[float | None, typer.Option(help="Messages a second that one queue takes.")] = None,
    sms_per_message: Annotated[int | None, typer.Option(min=1, help="SMS per AMQP message.")] = None,
    per_minute: Annotated[float, typer.Option(min=1, help="Messages a minute that are wanted.")] = 50e6,
    headroom: Annotated[float, typer.Option(min=0, max=0.95, help="Share of each core that stays free.")] = 0.5,
    copies: Annotated[int, typer.Option(min=1, help="Of each message: members of the queue.")] = 3,
    cores_per_node: Annotated[int, typer.Option(min=1, help="Of a broker node.")] = 8,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """From measured costs to what 50 million messages a minute take: cores, nodes, queues, network."""
    costs = sizing.Costs()
    if measured is not None:
        comparison = msgspec.json.decode(measured.read_bytes(), type=comparing.Comparison)
        try:
            costs = sizing.costs_of(comparison, str(measured))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    given = {
        "gateway_cpu_us": gateway_us,
        "broker_cpu_us": broker_us,
        "database_cpu_us": database_us,
        "queue_messages_per_s": queue_rate,
        "sms_per_message": sms_per_message,
    }
    costs = msgspec.structs.replace(costs, **{name: value for name, value in given.items() if value is not None})
    if not all(getattr(costs, name) for name in given):
        raise typer.BadParameter("give --from, or all of --gateway-us, --broker-us, --database-us, --queue-rate")
    wanted = sizing.Wanted(per_minute / 60, headroom, cores_per_node, copies)
    result = sizing.calculate(costs, wanted)
    tables.show_capacity(report.capacity_rows(result), costs.source)
    write(json_file, result, report_file, report.of_capacity)


Figures = TypeVar("Figures", bound=msgspec.Struct)


def write(
    json_path: Path | None, figures: Figures, report_path: Path | None, make_report: Callable[[Figures], str]
) -> None:
    """The files that were asked for."""
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2))
        typer.echo(f"wrote {json_path}")
    if report_path is not None:
        report_path.write_text(make_report(figures), encoding="utf-8")
        typer.echo(f"wrote {report_path}")


def main() -> None:
    """Expected errors are one line and exit status 2; Ctrl-C ends everything that was started."""
    try:
        app()
    except (ServerError, WorkerError, OSError, msgspec.DecodeError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()
