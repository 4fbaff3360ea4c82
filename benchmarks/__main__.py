"""Benchmarks of the gateway. benchmarks/README.md explains each command and its figures."""

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import typer

from benchmarks.drivers import traffic
from benchmarks.drivers.backends import QUEUE_TYPES
from benchmarks.drivers.checkouts import checked_out
from benchmarks.drivers.systems import BARE_PUBLISHER, BASELINE, FASTAPI, FASTAPI_LOGGED, GATEWAY
from benchmarks.drivers.workers import WorkerError
from benchmarks.questions import (
    bare_publisher,
    bodies,
    capacity,
    compare,
    keyed,
    load,
    memory,
    neighbour,
    observing,
    refusals,
    stages,
    sweep,
)
from benchmarks.questions.run_report import show_run
from benchmarks.report import page, terminal
from benchmarks.report.document import Report
from testbed import ServerError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write an HTML page with plots to this file.")]
Rounds = Annotated[int, typer.Option(min=1, help="Number of rounds. Figures are medians over them.")]
Seconds = Annotated[float, typer.Option(min=0.5, help="Measured time of a run, after its warm-up.")]

Baseline = Annotated[
    Path | None, typer.Option(help="Folder with another checkout of this repository, measured in turn with this one.")
]

EXIT_VOID = 1
EXIT_UNUSABLE = 2
EXPECTED_ERRORS = (
    *(ServerError, WorkerError, stages.StagesError, capacity.CapacityError, load.LoadError),
    *(OSError, msgspec.DecodeError),
)
SYSTEMS = {"publisher": BARE_PUBLISHER, "gateway": GATEWAY, "fastapi": FASTAPI, "fastapi-logged": FASTAPI_LOGGED}
DEFAULT_SYSTEMS = ("publisher", "gateway", "fastapi")
_SIZES = ",".join(map(str, compare.IN_FLIGHT))
_SMS_PER_MESSAGE = ",".join(map(str, bare_publisher.SMS_PER_MESSAGE))
_IN_FLIGHT = ",".join(map(str, compare.IN_FLIGHT.values()))


def numbers(text: str, least: int = 1) -> tuple[int, ...]:
    """Parse `1,10,100`. Each number is at least `least`."""
    if not all(part.strip().isdecimal() and int(part) >= least for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,10,100")
    return tuple(map(int, text.split(",")))


def queue_type_of(text: str) -> str:
    """Return `text` when it is a queue type of RabbitMQ."""
    if text not in QUEUE_TYPES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(QUEUE_TYPES)}")
    return text


def settings_of(given: list[str]) -> dict[str, str]:
    """Parse settings of the form `NAME=VALUE`."""
    if wrong := [one for one in given if not re.fullmatch(r"GATEWAY_[A-Z_]+=.*", one)]:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form GATEWAY_NAME=VALUE")
    return {name: value for name, _, value in (one.partition("=") for one in given)}


def url_of(text: str) -> str:
    """Return `text` when it is the URL of an HTTP server."""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise typer.BadParameter(f"--url: {text!r} is not a URL such as http://127.0.0.1:8080")
    return text


def systems_of(text: str, baseline: Path | None) -> tuple[str, ...]:
    """Parse the systems to compare. The baseline comes right after the gateway."""
    names = text.split(",")
    if not set(names) <= SYSTEMS.keys():
        raise typer.BadParameter(f"--systems: {text} is not among {', '.join(SYSTEMS)}")
    chosen = [SYSTEMS[name] for name in names]
    if baseline is not None:
        place = chosen.index(GATEWAY) + 1 if GATEWAY in chosen else len(chosen)
        chosen.insert(place, BASELINE)
    return tuple(chosen)


def checkout_of(baseline: Path | None) -> Path | None:
    """Return the absolute path of the baseline when it is a checkout of this repository."""
    if baseline is not None and not (baseline / "gateway" / "__main__.py").exists():
        raise typer.BadParameter(f"--baseline: {baseline} is no checkout of this repository")
    return baseline.resolve() if baseline else None


@app.command("stages")
def stages_command(
    *, baseline: Baseline = None, rounds: Rounds = 3, json_file: JsonFile = None, report_file: ReportFile = None
) -> None:
    """CPU time of each step of a batch, and of the plain form that each optimised step replaced.

    With --baseline, ratios of this checkout to another one, over --rounds rounds of 20 s.
    """
    if other := checkout_of(baseline):
        against = stages.measure_against(other, rounds)
        publish(against, stages.report_against(against), json_file, report_file)
    else:
        measured = stages.measure()
        publish(measured, stages.report(measured), json_file, report_file)


@app.command("observing")
def observing_command(*, json_file: JsonFile = None, report_file: ReportFile = None) -> None:
    """CPU time of a request's record, its log line and its spans."""
    measured = observing.measure()
    publish(measured, observing.report(measured), json_file, report_file)


@app.command("publisher")
def publisher_command(
    *,
    queue_types: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(QUEUE_TYPES),
    sms_per_message: Annotated[str, typer.Option(help="SMS per AMQP message, separated by commas.")] = _SMS_PER_MESSAGE,
    in_flight: Annotated[int, typer.Option(min=1, help="Batches of 1,000 SMS in flight.")] = 8,
    amqp_connections: Annotated[int, typer.Option(min=1, help="Connections of the publisher.")] = 2,
    rounds: Rounds = 3,
    seconds: Seconds = 2.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Rate of a bare publisher against a private RabbitMQ, by queue type and SMS per AMQP message."""
    options = bare_publisher.Options(
        queue_types=tuple(map(queue_type_of, queue_types.split(","))),
        sms_per_message=numbers(sms_per_message),
        in_flight=in_flight,
        amqp_connections=amqp_connections,
        rounds=rounds,
        seconds=seconds,
    )
    measured = bare_publisher.measure(options, show_run)
    publish(measured, bare_publisher.report(measured), json_file, report_file)
    if measured.void:
        raise typer.Exit(EXIT_VOID)


@app.command("compare")
def compare_command(
    *,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = _SIZES,
    in_flight: Annotated[str, typer.Option(help="Batches in flight, one number for each size.")] = _IN_FLIGHT,
    systems: Annotated[str, typer.Option(help=f"Among {', '.join(SYSTEMS)}.")] = ",".join(DEFAULT_SYSTEMS),
    queue_type: Annotated[str, typer.Option(help="quorum, classic or stream.")] = "quorum",
    messages_per_envelope: Annotated[int, typer.Option(min=1, help="SMS per AMQP message.")] = 1,
    shards: Annotated[int, typer.Option(min=1, help="Queues. Each list uses one: give as many --lists.")] = 1,
    lists: Annotated[int, typer.Option(min=1, help="Sending lists, used in turn by the messages.")] = 1,
    amqp_connections: Annotated[int, typer.Option(min=1, help="Of the gateway and of the bare publisher.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Load generator processes.")] = 1,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A setting such as GATEWAY_DATABASE_POOL_SIZE=20. Repeatable."),
    ] = None,
    baseline: Baseline = None,
    against: Annotated[
        str, typer.Option(help="A commit, checked out and measured in turn with this checkout, as --baseline.")
    ] = "",
    extras: Annotated[bool, typer.Option(help="Also the lone batch, refused batches, single sends, ids.")] = True,
    rounds: Rounds = 3,
    seconds: Seconds = 3.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
    plot: Annotated[Path | None, typer.Option(help="Write the rates as an SVG picture to this file.")] = None,
) -> None:
    """Gateway, bare publisher and a FastAPI service, interleaved: rates, ratios, CPU, latency, memory."""
    sizes, flights = numbers(batch), numbers(in_flight)
    if len(sizes) != len(flights):
        raise typer.BadParameter("--in-flight needs one number for each size of --batch")
    if against and baseline:
        raise typer.BadParameter("--against and --baseline exclude each other")
    with ExitStack() as stack:
        try:
            other = stack.enter_context(checked_out(against)) if against else checkout_of(baseline)
        except LookupError as error:
            raise typer.BadParameter(f"--against: {error}") from None
        options = compare.Options(
            sizes=dict(zip(sizes, flights, strict=True)),
            systems=systems_of(systems, other),
            rounds=rounds,
            seconds=seconds,
            queue_type=queue_type_of(queue_type),
            messages_per_envelope=messages_per_envelope,
            shards=shards,
            lists=lists,
            amqp_connections=amqp_connections,
            processes=processes,
            settings=settings_of(setting or []),
            baseline=str(other or ""),
            extras=extras,
        )
        comparison = compare.measure(options, show_run)
    publish(comparison, compare.report(comparison), json_file, report_file)
    if plot is not None:
        plot.write_text(compare.rates_picture(comparison), encoding="utf-8")
    if comparison.void:
        raise typer.Exit(EXIT_VOID)


@app.command("sweep")
def sweep_command(
    *,
    backlog: Annotated[
        str, typer.Option(help="Messages in the queue at the start, separated by commas.")
    ] = "0,1000000",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = ",".join(map(str, sweep.SERIES)),
    connections: Annotated[
        str, typer.Option(help="Connections, separated by commas. Default: 4 to 64, and 16 to 256 for batches of 100.")
    ] = "",
    backoff: Annotated[bool, typer.Option(help="Also with callers that wait for Retry-After after a 503.")] = False,
    baseline: Baseline = None,
    rounds: Rounds = 3,
    seconds: Seconds = 10.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Rate by number of connections, on an empty queue and on a backlog of messages."""
    given = numbers(connections) if connections else ()
    options = sweep.Options(
        series={size: given or sweep.SERIES.get(size, sweep.SERIES[1_000]) for size in numbers(batch)},
        backlogs=numbers(backlog, least=0),
        backoff=(False, True) if backoff else (False,),
        rounds=rounds,
        seconds=seconds,
        baseline=str(checkout_of(baseline) or ""),
    )
    measured = sweep.measure(options, lambda reading: typer.echo(sweep.show(reading)))
    publish(measured, sweep.report(measured), json_file, report_file)
    if any(reading.void for reading in measured.readings):
        raise typer.Exit(EXIT_VOID)


@app.command("refusals")
def refusals_command(
    *,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,100,1000",
    rounds: Rounds = 3,
    seconds: Seconds = 2.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """CPU of the gateway per refused request, beside that of an accepted one."""
    options = refusals.Options(batches=numbers(batch), rounds=rounds, seconds=seconds)
    measured = refusals.measure(options, lambda reading: typer.echo(refusals.show(reading)))
    publish(measured, refusals.report(measured), json_file, report_file)
    if any(reading.void for reading in measured.readings):
        raise typer.Exit(EXIT_VOID)


@app.command("bodies")
def bodies_command(
    *,
    like: Annotated[str, typer.Option(help="Only shapes whose name contains this, such as contact_data.")] = "",
    rounds: Rounds = 1,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """CPU of the gateway for bodies of 5 MB in all shapes of testbed/bodies.py, beside that of a clean one."""
    if not bodies.chosen(like):
        raise typer.BadParameter(f'no shape has "{like}" in its name; testbed/bodies.py has the names')
    options = bodies.Options(like=like, rounds=rounds)
    measured = bodies.measure(options, lambda reading: typer.echo(bodies.show(reading)))
    publish(measured, bodies.report(measured), json_file, report_file)


@app.command("keyed")
def keyed_command(
    *,
    connections: Annotated[str, typer.Option(help="Connections, separated by commas.")] = "64,128,256",
    commit_ms: Annotated[int, typer.Option(min=0, help="Time of a commit, as with a synchronous standby.")] = 10,
    rounds: Rounds = 3,
    seconds: Seconds = 3.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Rate of requests with an Idempotency-Key while each commit takes 10 ms."""
    options = keyed.Options(connections=numbers(connections), commit_ms=commit_ms, rounds=rounds, seconds=seconds)
    measured = keyed.measure(options, lambda reading: typer.echo(keyed.show(reading)))
    publish(measured, keyed.report(measured), json_file, report_file)
    if any(reading.void for reading in measured.readings):
        raise typer.Exit(EXIT_VOID)


@app.command("neighbour")
def neighbour_command(
    *,
    rate: Annotated[
        str, typer.Option(help="Messages a second of the others, separated by commas. 0: as many as are accepted.")
    ] = "10000,0",
    connections: Annotated[int, typer.Option(min=1, help="Connections of the other accounts together.")] = 40,
    batch: Annotated[int, typer.Option(min=1, max=1_000, help="Messages in the others' requests.")] = 1_000,
    slow_bodies: Annotated[int, typer.Option(min=1, help="Connections of account A with slow bodies.")] = 300,
    slow_batch: Annotated[int, typer.Option(min=1, max=1_000, help="Messages in a slow body.")] = 10,
    rounds: Rounds = 3,
    seconds: Seconds = 12.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Latency of a caller beside ten accounts, and beside one with their load and slow bodies."""
    options = neighbour.Options(
        rates=numbers(rate, least=0),
        connections=connections,
        batch=batch,
        slow_bodies=slow_bodies,
        slow_batch=slow_batch,
        rounds=rounds,
        seconds=seconds,
    )
    measured = neighbour.measure(options, lambda reading: typer.echo(neighbour.show(reading)))
    publish(measured, neighbour.report(measured), json_file, report_file)
    if any(reading.void for reading in measured.readings):
        raise typer.Exit(EXIT_VOID)


@app.command("memory")
def memory_command(
    *,
    connections: Annotated[int, typer.Option(min=1, help="Concurrent requests of 5 MB.")] = 64,
    seconds: Annotated[float, typer.Option(min=3.0, help="Duration of the load.")] = 15.0,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Resident memory of the gateway, idle and under 64 concurrent requests of 5 MB."""
    measured = memory.measure(memory.Options(connections=connections, seconds=seconds))
    publish(measured, memory.report(measured), json_file, report_file)
    if measured.void:
        raise typer.Exit(EXIT_VOID)


@app.command("load")
def load_command(
    *,
    url: Annotated[str, typer.Option(help="URL of the gateway, such as https://sms.example.com")],
    key: Annotated[str, typer.Option(envvar="SMS_API_KEY", help="API key. Prefer the environment variable.")],
    list_number: Annotated[list[str], typer.Option(help="Sending list. Repeatable: messages take turns.")],
    connections: Annotated[int, typer.Option(min=1, help="Largest number of requests in flight.")] = 16,
    rate: Annotated[
        float,
        typer.Option(min=0, help="Open loop: messages a second, however slow the server is. 0: closed loop."),
    ] = 0.0,
    batch: Annotated[int, typer.Option(min=1, max=1_000, help="Messages in a request.")] = 100,
    single: Annotated[bool, typer.Option(help="Single sends instead of batches.")] = False,
    bad_share: Annotated[float, typer.Option(min=0, max=1, help="Share of bad messages.")] = 0.0,
    body_length: Annotated[int, typer.Option(min=1, help="Length of a text, in characters.")] = traffic.BODY_LENGTH,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of measurement.")] = 30.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of full load before the measurement.")] = 2.0,
    ramp: Annotated[float, typer.Option(min=0, help="Seconds to reach the full load, before warm-up.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as failed.")] = 30.0,
    processes: Annotated[int, typer.Option(min=1, help="Load generator processes, for more than one core.")] = 1,
    max_p99_ms: Annotated[float | None, typer.Option(help="Exit 1 when the p99 is above.")] = None,
    min_rate: Annotated[float | None, typer.Option(help="Exit 1 below these accepted messages a second.")] = None,
    max_error_rate: Annotated[float | None, typer.Option(help="Exit 1 above this share of failed requests.")] = None,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Load test of a deployment of your own.

    Exit status: 0 success, 1 a threshold is broken or nothing was accepted, 2 unusable options, address or key, 3 the
    server is gone. A request succeeds when the answer is 200 and queued_count is the number of its good messages.
    Accepted messages are really queued: use a deployment whose messages are not delivered.
    """
    if single and bad_share:
        raise typer.BadParameter("--single and --bad-share exclude each other: a bad single send is a failed request")
    if processes > connections:
        raise typer.BadParameter("each of --processes needs at least one connection")
    options = load.Options(
        url=url_of(url),
        list_numbers=tuple(list_number),
        batch=1 if single else batch,
        connections=connections,
        rate=rate,
        bad_share=bad_share,
        body_length=body_length,
        duration_s=duration,
        warm_up_s=warm_up,
        ramp_s=ramp,
        timeout_s=timeout,
        processes=processes,
        thresholds=load.Thresholds(max_p99_ms, min_rate, max_error_rate),
        single=single,
    )
    with terminal.Progress() as progress:
        outcome = load.run(options, key, load.Progress(options, progress.show).add)
    publish(outcome, load.report(outcome), json_file, report_file)
    raise typer.Exit(outcome.exit_code)


@app.command("capacity")
def capacity_command(
    *,
    measured: Annotated[Path | None, typer.Option("--from", help="A file that `compare --json` wrote.")] = None,
    gateway_us: Annotated[float | None, typer.Option(help="Gateway CPU µs per message.")] = None,
    broker_us: Annotated[float | None, typer.Option(help="Broker CPU µs per message.")] = None,
    database_us: Annotated[float | None, typer.Option(help="Database CPU µs per message.")] = None,
    queue_rate: Annotated[float | None, typer.Option(help="Messages a second of one queue.")] = None,
    sms_per_message: Annotated[int | None, typer.Option(min=1, help="SMS per AMQP message.")] = None,
    per_minute: Annotated[float, typer.Option(min=1, help="Messages a minute to reach.")] = 50e6,
    headroom: Annotated[float, typer.Option(min=0, max=0.95, help="Share of each core that stays free.")] = 0.5,
    copies: Annotated[int, typer.Option(min=1, help="Copies of each message (members of the queue).")] = 3,
    cores_per_node: Annotated[int, typer.Option(min=1, help="Cores of a broker node.")] = 8,
    json_file: JsonFile = None,
    report_file: ReportFile = None,
) -> None:
    """Cores, nodes, queues and network for 50 million messages a minute, from measured costs."""
    costs = capacity.costs_in(measured) if measured is not None else capacity.Costs()
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
    wanted = capacity.Wanted(per_minute / 60, headroom, cores_per_node, copies)
    result = capacity.calculate(costs, wanted)
    publish(result, capacity.report(result), json_file, report_file)


def publish(figures: msgspec.Struct, report: Report, json_path: Path | None, page_path: Path | None) -> None:
    """Print the report, and write the files that were asked for."""
    terminal.show(report)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2))
        typer.echo(f"wrote {json_path}")
    if page_path is not None:
        page_path.write_text(page.render(report), encoding="utf-8")
        typer.echo(f"wrote {page_path}")


def main() -> None:
    """Run a command. An expected error is one line on standard error and exit status 2."""
    try:
        app()
    except EXPECTED_ERRORS as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_UNUSABLE)


if __name__ == "__main__":
    main()
