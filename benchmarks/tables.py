"""What a person sees in the terminal: one line per run as it ends, tables at the end."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from benchmarks.compare import Bar, Comparison, Summary
from benchmarks.figures import Figure, short
from benchmarks.limit import Limits
from benchmarks.load import Moment, Outcome
from benchmarks.machine import Machine
from benchmarks.memory import Memory
from benchmarks.observing import Observing
from benchmarks.runs import Run
from benchmarks.stages import Stages

console = Console()


def show_machine(machine: Machine) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    console.print(f"{machine.date} · commit {machine.commit} · {machine.cores} × {machine.processor} · {versions}")


def show_run(run: Run) -> None:
    setup = run.setup
    kind = f"{run.system} {setup.queue_type} {setup.batch}×{setup.in_flight}"
    if setup.sms_per_message > 1:
        kind += f", {setup.sms_per_message} SMS an AMQP message"
    if setup.all_bad:
        kind += f", all bad ({setup.all_bad})"
    if run.void:
        console.print(f"[red]void[/red] {kind}: {run.void}")
    elif run.setup.all_bad:
        console.print(
            f"{kind}: {short(run.requests_per_s)} requests/s, "
            f"CPU {short(run.server_cpu_us_per_request / setup.batch)} µs a message",
            highlight=False,
        )
    else:
        console.print(
            f"{kind}: {short(run.messages_per_s)} msg/s, {short(run.requests_per_s)} requests/s, "
            f"p50 {short(run.p50_ms)} ms, CPU {short(run.server_cpu_us_per_message)} µs a message "
            f"(broker {short(run.broker_cpu_us_per_message)}, load {short(run.client_cpu_us_per_message)})",
            highlight=False,
        )


def show_stages(stages: Stages) -> None:
    sizes = list(stages.stages[0].us_per_message)
    table = Table(title="CPU µs per message, by batch size: lowest of several samples")
    table.add_column("stage")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right")
    for stage in stages.stages:
        name = f"[dim]  instead: {stage.name}[/dim]" if stage.plain else stage.name
        table.add_row(name, *(short(stage.us_per_message[size].lowest) for size in sizes))
    show_machine(stages.machine)
    console.print(table)
    for one in stages.refusing:
        console.print(
            f"row 6: a batch refused as a whole ({one.flaw}) ÷ a clean one up to the publish: "
            f"{one.ratio.shown(short)} (bar ≤ 3)",
            highlight=False,
        )


def show_observing(observing: Observing) -> None:
    table = Table(title="CPU µs a request, of any size: lowest of several samples")
    table.add_column("watched by")
    for name in ("event loop", "process"):
        table.add_column(name, justify="right")
    for one in observing.watchers:
        table.add_row(one.name, short(one.loop_us.lowest), short(one.process_us.lowest))
    show_machine(observing.machine)
    console.print(table)


def show_limits(limits: Limits) -> None:
    table = Table(title="The bare publisher: median (lowest-highest)")
    for name in ("queue", "SMS per AMQP message"):
        table.add_column(name)
    for name in ("SMS/s", "client CPU µs", "broker CPU µs", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for one in limits.summaries:
        figures = (
            one.messages_per_s,
            one.client_cpu_us_per_message,
            one.broker_cpu_us_per_message,
            one.p50_ms,
            one.p99_ms,
        )
        table.add_row(one.queue_type, str(one.sms_per_message), *map(_shown, figures))
    show_machine(limits.machine)
    console.print(table)
    _show_others(limits.other_cores)
    _show_void(limits.void)


def show_comparison(comparison: Comparison) -> None:
    options = comparison.options
    envelopes = f", {options.messages_per_envelope} SMS an envelope" if options.messages_per_envelope > 1 else ""
    show_machine(comparison.machine)
    _show_summaries(
        comparison,
        f"{options.queue_type} queue{envelopes}, {options.rounds} rounds: median, lowest-highest",
        {
            "msg/s": lambda one: one.messages_per_s,
            "requests/s": lambda one: one.requests_per_s,
            "÷ limit": lambda one: one.of_limit,
            "p50 ms": lambda one: one.p50_ms,
            "p99 ms": lambda one: one.p99_ms,
        },
    )
    _show_summaries(
        comparison,
        "CPU in µs, of the system per message and request, of the others per message; peak memory",
        {
            "message": lambda one: one.server_cpu_us_per_message,
            "request": lambda one: one.server_cpu_us_per_request,
            "broker": lambda one: one.broker_cpu_us_per_message,
            "database": lambda one: one.database_cpu_us_per_message,
            "load": lambda one: one.client_cpu_us_per_message,
            "MB": lambda one: one.peak_mb,
        },
    )
    for system, line in comparison.cpu_per_request.items():
        console.print(f"{system}: CPU of a request of n messages = {short(line.a)} + {short(line.b)}·n µs")
    _show_bars(comparison.bars)
    for flaw, ratio in comparison.refused_over_http.items():
        console.print(
            f"CPU of a batch refused as a whole (wrong {flaw}) ÷ a clean one, publishing included: "
            f"{ratio.shown(short)}. Row 6 is measured by `stages`",
            highlight=False,
        )
    _show_others(comparison.other_cores)
    _show_void(comparison.void)


def _show_summaries(
    comparison: Comparison, title: str, columns: Mapping[str, Callable[[Summary], Figure | None]]
) -> None:
    table = Table(title=title, padding=(0, 0), pad_edge=False)
    for name in ("batch", "system"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparison.summaries:
        table.add_row(
            f"{one.batch:,}×{one.in_flight}",
            one.system,
            *(_shown(figure(one)) for figure in columns.values()),
            end_section=one.system == comparison.options.systems[-1],
        )
    console.print(table)


def show_memory(memory: Memory) -> None:
    show_machine(memory.machine)
    _show_bars(memory.bars)
    console.print(f"growth from the middle third of the run to the last: {short(memory.growth_mb)} MB")
    console.print(f"answers by status: {memory.statuses}")
    if memory.void:
        console.print(f"[red]void[/red]: {memory.void}")


class LoadProgress:
    """The live line of a load test; into a pipe, a line every PLAIN_EVERY_S seconds."""

    PLAIN_EVERY_S = 5

    def __init__(self, total_s: float, before_s: float) -> None:
        """`total_s` in all, `before_s` of them before the measurement."""
        self._total_s = total_s
        self._before_s = before_s
        self._current: Moment | None = None
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "LoadProgress":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, moment: Moment) -> None:
        """Shows whole seconds: the one before, once the next has begun."""
        done, self._current = self._current, moment
        if done is None or done is moment:
            return
        passed = done.at_s + 1 + self._before_s
        phase = "warm-up " if done.at_s < 0 else ""
        line = (
            f"{phase}{passed:.0f} of {self._total_s:.0f} s · {short(done.messages_per_s)} msg/s · "
            f"{short(done.requests_per_s)} requests/s · {done.in_flight} in flight · "
            f"slowest {short(done.slowest_ms)} ms · {done.failures} failed"
        )
        if console.is_terminal:
            self._live.update(Text(line), refresh=True)
        elif round(passed) % self.PLAIN_EVERY_S == 0:
            console.print(line, highlight=False)


def show_load(outcome: Outcome) -> None:
    latencies = outcome.latencies
    console.print(
        f"{short(outcome.messages_per_s)} messages/s accepted, {short(outcome.requests_per_s)} requests/s, "
        f"{outcome.failures} of {outcome.requests} requests failed ({outcome.error_rate:.2%}); "
        f"answers by status, whole run: {outcome.statuses}; the generator took {outcome.generator_cpu:.2f} cores",
        highlight=False,
    )
    table = Table(title="Latency, ms" + (", from the moment a request was due" if outcome.options.rate else ""))
    for name in latencies.percentiles_ms:
        table.add_column(f"{name} %", justify="right")
    table.add_row(*(f"{value:,.2f}" for value in latencies.percentiles_ms.values()))
    console.print(table)
    if outcome.first_failure:
        console.print(Text(f"the first failure said {outcome.first_failure}"))
    for sentence in [outcome.ended_early, *outcome.broken]:
        if sentence:
            console.print(Text(sentence, style="red"))


def show_capacity(rows: Sequence[tuple[str, str]], source: str) -> None:
    table = Table(title=source or None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _show_bars(bars: Sequence[Bar]) -> None:
    table = Table(title="against the bars")
    for name in ("row", "figure", "measured", "bar", ""):
        table.add_column(name)
    for bar in bars:
        sign = "≥" if bar.at_least else "≤"
        style = {"met": "green", "missed": "red"}.get(bar.verdict, "yellow")
        table.add_row(
            bar.row, bar.what, bar.measured.shown(short), f"{sign} {short(bar.bar)}", Text(bar.verdict, style=style)
        )
    console.print(table)


def _shown(figure: Figure | None) -> str:
    """The spread on a line of its own, and in thousands, so that the table fits a terminal."""
    if figure is None:
        return ""
    spread = figure.spread(_brief)
    return _brief(figure.median) + (f"\n[dim]{spread}[/dim]" if spread else "")


def _brief(value: float) -> str:
    return f"{short(value / 1000)}k" if value >= 10_000 else short(value)


def _show_others(cores: Figure) -> None:
    console.print(
        f"other processes, and other machines on the same host, took {cores.shown(short)} cores meanwhile",
        highlight=False,
    )


def _show_void(void: list[Run]) -> None:
    if void:
        console.print(f"[red]{len(void)} runs were void and count for nothing:[/red]")
    for run in void:
        show_run(run)
