"""Reports: each command's figures as one HTML page that needs nothing else, for a browser or a mail."""

from collections.abc import Sequence
from html import escape

from benchmarks import machine, plots
from benchmarks.capacity import Capacity
from benchmarks.compare import Bar, Comparison
from benchmarks.figures import Figure, short
from benchmarks.limit import Limits
from benchmarks.load import Outcome
from benchmarks.machine import Machine
from benchmarks.memory import Memory
from benchmarks.observing import Observing
from benchmarks.runs import Run
from benchmarks.stages import Stages

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.machine { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } td small { display: block; color: var(--soft) }
svg { width: 100%; height: auto; font-size: 12px } svg text { fill: currentColor }
svg .grid { stroke: var(--line) } svg .spread { stroke: currentColor; stroke-width: 1.5 }
.legend span { margin-right: 1.2rem } .legend i { display: inline-block; width: 1em; height: .7em; margin-right: .4em }
.good { color: #12804f } .bad { color: #c62828; font-weight: 600 } .plain { color: var(--soft); padding-left: 1.5rem }
.big { display: flex; flex-wrap: wrap; gap: 2rem } .big b { display: block; font-size: 1.6rem }
"""

_VERDICT_STYLES = {"met": "good", "missed": "bad"}


def page(title: str, made_on: Machine, *sections: str) -> str:
    """The whole file."""
    versions = ", ".join(f"{name} {version}" for name, version in made_on.versions.items())
    where = (
        f"{made_on.date} · commit {made_on.commit} · {made_on.cores} × {made_on.processor}, {made_on.memory_gb} GB, "
        f"Linux {made_on.kernel}, load average {made_on.load_average:.1f} before · {versions}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="machine">{escape(where)}</p>{"".join(sections)}</body></html>\n'
    )


def of_stages(stages: Stages) -> str:
    sizes = list(stages.stages[0].us_per_message)
    rows = [
        [
            f'<span class="plain">instead: {escape(stage.name)}</span>' if stage.plain else escape(stage.name),
            *(_cell(stage.us_per_message[size]) for size in sizes),
        ]
        for stage in stages.stages
    ]
    largest = max(sizes)
    ours = {stage.name: stage.us_per_message[largest] for stage in stages.stages if not stage.plain}
    refusing = [[escape(one.flaw), _cell(one.ratio), "≤ 3"] for one in stages.refusing]
    return page(
        "Stages of a batch",
        stages.machine,
        _section(
            "CPU µs per message, by batch size: median, lowest-highest",
            _table(["stage", *(f"{size:,}" for size in sizes)], rows),
        ),
        _section(f"At {largest:,} messages", plots.bars({"": ours}, "µs")),
        _section(
            "A batch refused as a whole ÷ a clean one, up to the publish", _table(["flaw", "ratio", "bar"], refusing)
        ),
    )


def of_observing(observing: Observing) -> str:
    rows = [[escape(one.name), _cell(one.loop_us), _cell(one.process_us)] for one in observing.watchers]
    return page(
        "What it costs to be watched",
        observing.machine,
        _section(
            "CPU µs a request, of any size: median, lowest-highest",
            _table(["watched by", "event loop", "process"], rows),
        ),
        _section("Of the event loop", plots.bars({"": {one.name: one.loop_us for one in observing.watchers}}, "µs")),
    )


def of_limits(limits: Limits) -> str:
    rates: dict[str, dict[str, Figure]] = {}
    for one in limits.summaries:
        rates.setdefault(one.queue_type, {})[f"{one.sms_per_message} SMS"] = one.messages_per_s
    rows = [
        [
            f"{one.queue_type}, {one.sms_per_message}",
            _cell(one.messages_per_s),
            _cell(one.client_cpu_us_per_message),
            _cell(one.broker_cpu_us_per_message),
            _cell(one.p50_ms),
            _cell(one.p99_ms),
        ]
        for one in limits.summaries
    ]
    head = ["queue, SMS per AMQP message", "SMS/s", "client CPU µs", "broker CPU µs", "p50 ms", "p99 ms"]
    return page(
        "The broker's limit: a bare publisher",
        limits.machine,
        _section("SMS a second, by queue type and SMS per AMQP message", plots.bars(rates, "SMS/s", one_scale=True)),
        _section("Figures: median (lowest-highest)", _table(head, rows)),
        _others(limits.other_cores),
        _void(limits.void),
    )


def rates_picture(comparison: Comparison) -> str:
    """The rates alone, as an SVG file that a document can show."""
    return plots.standalone(plots.bars(_rates(comparison), "msg/s"))


def _rates(comparison: Comparison) -> dict[str, dict[str, Figure]]:
    rates: dict[str, dict[str, Figure]] = {}
    for one in comparison.summaries:
        rates.setdefault(f"{one.batch:,}", {})[one.system] = one.messages_per_s
    return rates


def of_comparison(comparison: Comparison) -> str:
    options = comparison.options
    rates = _rates(comparison)
    cpu: dict[str, dict[str, Figure]] = {}
    for one in comparison.summaries:
        cpu.setdefault(f"{one.batch:,}", {})[one.system] = one.server_cpu_us_per_message
    rows = [
        [
            f"{one.batch:,} × {one.in_flight}, {one.system}",
            *map(
                _cell,
                (
                    one.messages_per_s,
                    one.requests_per_s,
                    one.of_limit,
                    one.server_cpu_us_per_message,
                    one.broker_cpu_us_per_message,
                    one.p50_ms,
                    one.p99_ms,
                    one.peak_mb,
                ),
            ),
        ]
        for one in comparison.summaries
    ]
    head = [
        "batch × in flight",
        "msg/s",
        "requests/s",
        "÷ limit",
        "CPU µs/msg",
        "broker µs/msg",
        "p50 ms",
        "p99 ms",
        "MB",
    ]
    fits = [
        [escape(system), f"{short(line.a)} + {short(line.b)} · n"]
        for system, line in comparison.cpu_per_request.items()
    ]
    over_time = {}
    for run in comparison.runs:
        if run.setup.batch == max(options.sizes) and run.setup.in_flight > 1 and not run.setup.all_bad:
            over_time[run.system] = run.ticks  # the last round's
    envelopes = f", {options.messages_per_envelope} SMS an envelope" if options.messages_per_envelope > 1 else ""
    return page(
        f"Gateway, limit and comparison: {options.queue_type} queue{envelopes}",
        comparison.machine,
        _bars_table(comparison.bars),
        _section("Accepted messages a second, by batch size", plots.bars(rates, "msg/s")),
        _section("CPU of the system per message, by batch size", plots.bars(cpu, "µs")),
        _section(
            f"Throughput over time, batches of {max(options.sizes):,}, last round",
            plots.lines(over_time, x_label="seconds of measurement", y_label="messages/s"),
        ),
        _section("CPU µs of a request of n messages", _table(["system", "a + b · n"], fits)),
        _section(f"Figures of {options.rounds} rounds: median (lowest-highest)", _table(head, rows)),
        _others(comparison.other_cores),
        _void(comparison.void),
    )


def of_memory(memory: Memory) -> str:
    return page(
        "Memory of the gateway",
        memory.machine,
        _bars_table(memory.bars),
        _section(
            f"Resident memory under {memory.options.connections} concurrent 5 MB requests",
            plots.lines({"gateway": memory.samples}, x_label="seconds", y_label="MB"),
        ),
        _statuses(memory.statuses),
        f'<p class="bad">Void: {escape(memory.void)}</p>' if memory.void else "",
    )


def of_load(outcome: Outcome) -> str:
    options, moments, latencies = outcome.options, outcome.moments, outcome.latencies
    arrivals = f"open loop, {options.rate:,.0f} msg/s arriving" if options.rate else "closed loop"
    verdict = "".join(f'<p class="bad">{escape(text)}</p>' for text in [outcome.ended_early, *outcome.broken] if text)
    figures = {
        "messages/s accepted": f"{outcome.messages_per_s:,.0f}",
        "requests/s": f"{outcome.requests_per_s:,.1f}",
        "p50": f"{latencies.at(50):,.1f} ms",
        "p99": f"{latencies.at(99):,.1f} ms",
        "failed": f"{outcome.error_rate:.2%}",
    }
    big = "".join(f"<span><b>{value}</b>{escape(name)}</span>" for name, value in figures.items())
    table = [[f"{name} %", f"{value:,.2f}"] for name, value in latencies.percentiles_ms.items()]
    since = f" (what the first failure said: {escape(outcome.first_failure)})" if outcome.first_failure else ""
    return page(
        f"Load test of {options.url}",
        outcome.machine,
        f"<p>{arrivals}, {options.connections} connections, batches of {options.batch:,}, "
        f"{options.bad_share:.0%} bad messages, texts of {options.body_length} characters, {options.duration_s:g} s "
        f"after {options.warm_up_s + options.ramp_s:g} s of warm-up and ramp</p>",
        f'{verdict}<div class="big">{big}</div>',
        _section(
            "Accepted messages a second",
            plots.lines(
                {"gateway": [(moment.at_s, moment.messages_per_s) for moment in moments]},
                x_label="seconds of measurement",
                y_label="messages/s",
            ),
        ),
        _section(
            "Latency by percentile",
            plots.lines(
                {"gateway": latencies.curve_ms},
                x_label="share of requests that were answered within",
                y_label="ms",
                x_ticks=plots.PERCENTILE_TICKS,
                scale_x=plots.percentile_scale,
            ),
        ),
        _section(
            "Slowest request of each second",
            plots.lines(
                {"gateway": [(moment.at_s, moment.slowest_ms) for moment in moments]},
                x_label="seconds of measurement",
                y_label="ms",
            ),
        ),
        _section("Latency", _table(["percentile", "ms"], table)),
        _statuses(outcome.statuses) + since,
    )


def of_capacity(capacity: Capacity) -> str:
    rows = [[escape(name), value] for name, value in capacity_rows(capacity)]
    return page(
        f"What {capacity.wanted.messages_per_s * 60:,.0f} messages a minute take",
        capacity.costs.machine or machine.describe(),
        f"<p>{escape(capacity.costs.source)}</p>",
        _table(["", ""], rows),
    )


def capacity_rows(capacity: Capacity) -> list[tuple[str, str]]:
    """What a person reads, here and in the terminal."""
    costs, wanted = capacity.costs, capacity.wanted
    free = f"{wanted.headroom:.0%} of each kept free"
    return [
        ("messages a second", f"{wanted.messages_per_s:,.0f}"),
        (f"gateway, at {short(costs.gateway_cpu_us)} µs a message", f"{capacity.gateway_cores:.1f} cores"),
        (f"gateway processes of one core, {free}", f"{capacity.gateway_processes}"),
        (
            f"broker, at {short(costs.broker_cpu_us)} µs a message and copy, {wanted.copies} copies",
            f"{capacity.broker_cores:.1f} cores",
        ),
        (f"broker nodes of {wanted.cores_per_broker_node} cores, {free}", f"{capacity.broker_nodes}"),
        (f"queues (shards) of {short(costs.queue_messages_per_s)} messages/s, {free}", f"{capacity.queues}"),
        (f"database, at {short(costs.database_cpu_us)} µs a message", f"{capacity.database_cores:.1f} cores"),
        ("network, callers to gateways", f"{capacity.network_in_gbit:.2f} Gbit/s"),
        ("network, gateways to broker", f"{capacity.network_amqp_gbit:.2f} Gbit/s"),
        ("network, between broker nodes", f"{capacity.network_copies_gbit:.2f} Gbit/s"),
    ]


def _bars_table(bars: Sequence[Bar]) -> str:
    rows = [
        [
            f"{escape(bar.row)}. {escape(bar.what)}",
            _cell(bar.measured),
            f"{'≥' if bar.at_least else '≤'} {short(bar.bar)}",
            f'<span class="{_VERDICT_STYLES.get(bar.verdict, "plain")}">{bar.verdict}</span>',
        ]
        for bar in bars
    ]
    return _section("against the bars", _table(["figure", "measured", "bar", ""], rows))


def _others(cores: Figure) -> str:
    return f"<p>Other processes took {cores.shown(short)} cores meanwhile.</p>"


def _void(void: Sequence[Run]) -> str:
    if not void:
        return ""
    rows = [[f"{run.system}, {run.setup.batch:,} × {run.setup.in_flight}", escape(run.void)] for run in void]
    return _section('<span class="bad">Void runs, which count for nothing</span>', _table(["run", "why"], rows))


def _statuses(statuses: dict[str, int]) -> str:
    rows = [[escape(status), f"{count:,}"] for status, count in sorted(statuses.items())]
    return _section("Answers by status, whole run", _table(["status", "requests"], rows))


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{short(figure.median)}<small>{figure.spread(short)}</small>"
