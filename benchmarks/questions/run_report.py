"""The parts of a report that all questions about runs share."""

from collections.abc import Sequence

from benchmarks.drivers.runs import Run
from benchmarks.report import terminal
from benchmarks.report.document import Sentence, Table
from benchmarks.report.figures import Figure, short


def show_run(run: Run) -> None:
    """Print one line for a run that has ended."""
    if run.void:
        terminal.show_line(f"void: {_kind(run)}: {run.void}", is_bad=True)
    elif run.setup.all_bad:
        terminal.show_line(
            f"{_kind(run)}: {short(run.requests_per_s)} requests/s, "
            f"CPU {short(run.server_cpu_us_per_request / run.setup.batch)} µs a message"
        )
    else:
        terminal.show_line(
            f"{_kind(run)}: {short(run.messages_per_s)} msg/s, {short(run.requests_per_s)} requests/s, "
            f"p50 {short(run.p50_ms)} ms, CPU {short(run.server_cpu_us_per_message)} µs a message "
            f"(broker {short(run.broker_cpu_us_per_message)}, load {short(run.client_cpu_us_per_message)})"
        )


def _kind(run: Run) -> str:
    setup = run.setup
    kind = f"{run.system} {setup.queue_type} {setup.batch}×{setup.in_flight}"
    if setup.sms_per_message > 1:
        kind += f", {setup.sms_per_message} SMS an AMQP message"
    return kind + (f", all bad ({setup.all_bad})" if setup.all_bad else "")


def closing_parts(other_cores: Figure, void: Sequence[Run]) -> list[Table | Sentence]:
    """Return the other load of the machine, and the void runs with their reasons."""
    others = f"Other processes, and other virtual machines, took {other_cores.shown(short)} cores meanwhile."
    if not void:
        return [Sentence(others)]
    rows = [[_kind(run), run.void] for run in void]
    return [
        Sentence(others),
        Table("Void runs", ["run", "reason"], rows, text_columns=2),
        Sentence("Void runs enter no figure.", is_bad=True),
    ]
