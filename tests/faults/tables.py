"""The results of scenarios and of overload as tables for a terminal."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from tests.faults.overload import Overload
from tests.faults.runner import Report

COLUMNS = (
    *("scenario", "runs", "faults", "requests", "counted", "lost", "doubled", "503 queued"),
    *("longest gap", "recovery", "longest request", ""),
)


def print_scenarios(reports: Sequence[Report]) -> None:
    """Print one line per scenario: totals of its runs, and their worst times."""
    by_name: dict[str, list[Report]] = {}
    for report in reports:
        by_name.setdefault(report.scenario, []).append(report)
    if by_name:
        print()
        _print_table(COLUMNS, [_row_of(name, runs) for name, runs in by_name.items()])


def _row_of(name: str, reports: Sequence[Report]) -> list[str]:
    found = [report.findings for report in reports]
    recoveries = [each.recovery_s for each in found]
    known = [each for each in recoveries if each is not None]
    return [
        name,
        str(len(reports)),
        str(sum(report.faults for report in reports)),
        f"{sum(each.requests for each in found):,}",
        f"{sum(each.counted for each in found):,}",
        str(sum(len(each.lost) for each in found)),
        str(sum(len(each.doubled) for each in found)),
        str(sum(len(each.refused_but_consumed) for each in found)),
        f"{max(each.longest_gap_s for each in found):.2f} s",
        f"{max(known):.2f} s" if len(known) == len(recoveries) else "never",
        f"{max(each.longest_request_s for each in found):.2f} s",
        "kept" if not any(report.broken for report in reports) else "BROKEN",
    ]


def print_overload(measured: Overload) -> None:
    """Print one line per load: medians of its runs, and their worst times."""
    loads = [("peak", measured.peaks, "")]
    for stage in measured.stages:
        shares = stage.shares()
        of_the_peak = f"{median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})"
        loads.append((f"{stage.multiple:g}×", stage.runs, of_the_peak))
    columns = (
        *("load", "runs", "asked msg/s", "goodput msg/s", "of the peak", "shed", "accepted p99", "refused p99"),
        *("memory", "answers"),
    )
    rows = []
    for load, runs, of_the_peak in loads:
        answers = sum((Counter(run.statuses) for run in runs), Counter[str]())
        rows.append(
            [
                load,
                str(len(runs)),
                f"{median(run.asked_per_s for run in runs):,.0f}",
                f"{median(run.goodput_per_s for run in runs):,.0f}",
                of_the_peak,
                f"{median(run.shed_share for run in runs):.0%}",
                f"{max(run.accepted_p99_s for run in runs):.2f} s",
                f"{max(run.refused_p99_s for run in runs):.2f} s",
                f"{max(run.peak_mb for run in runs):.0f} MB",
                ", ".join(f"{count} × {status}" for status, count in answers.items()),
            ]
        )
    print()
    _print_table(columns, rows)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print names to the left, figures to the right."""
    widths = [max(len(row[number]) for row in (columns, *rows)) for number in range(len(columns))]
    for row in (columns, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
