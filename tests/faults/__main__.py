"""The fault suite: what dies, hangs, fills up or is cut off, under steady load, and what it costs.

    scripts/faults                              every scenario once, then overload
    scripts/faults --repeat 10                  each ten times in a row
    scripts/faults --scenario leader_killed     one of them; may be given several times

Callers write down what they are told about every message, consumers what they get; at the end of each scenario the
two are compared (tests/faults/ledger.py). With GATEWAY_AMQP_URL set, the broker it names is used:
scenarios that would have to break it are left out.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from testbed import ServerError
from tests.faults import overload
from tests.faults.overload import Overload
from tests.faults.play import Report, play
from tests.faults.scenarios import PROMISES, SCENARIOS, Scenario
from tests.faults.stand import Stand, open_stand

OVERLOAD = "overload"
ROOM_S = 0.5  # beyond a request's deadline
COLUMNS = (
    *("scenario", "runs", "faults", "requests", "counted", "lost", "doubled", "503 queued"),
    *("longest gap", "recovery", "longest request", ""),
)


class Results(msgspec.Struct):
    """Everything `--json` writes."""

    reports: list[Report]
    overloads: list[Overload]
    failures: list[str]  # scenarios that could not be played to their end


async def main() -> int:
    """Play what was asked for; the exit code says whether every promise was kept."""
    options = _options()
    if options.list:
        for scenario in SCENARIOS.values():
            print(f"{scenario.name:45} promises {', '.join(map(str, scenario.promises))}")
        print(f"{OVERLOAD:45} promises 8")
        print("\nThe promises:")
        for number, promise in PROMISES.items():
            print(f"{number:3} {promise}")
        return 0
    names = options.scenario or [*SCENARIOS, OVERLOAD]
    if unknown := set(names) - {*SCENARIOS, OVERLOAD}:
        print(f"faults: there is no scenario {', '.join(sorted(unknown))}; --list shows them", file=sys.stderr)
        return 2
    silence_consumers()
    results = Results([], [], [])
    async with open_stand() as stand:
        for name in names:
            await _play_one(stand, name, options, results)
    show(results)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    kept = not any(report.broken for report in results.reports) and not any(each.broken for each in results.overloads)
    return 0 if kept and not results.failures else 1


def silence_consumers() -> None:
    """That our own consumers lose their connections is no news here."""
    for name in ("aio_pika", "aiormq", "examples"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


async def _play_one(stand: Stand, name: str, options: argparse.Namespace, results: Results) -> None:
    """All repetitions of one scenario."""
    if name == OVERLOAD:
        rounds = max(options.repeat, overload.ROUNDS)
        results.overloads.append(
            await overload.measure(stand, rounds=rounds, seconds=options.seconds or overload.SECONDS)
        )
        return
    scenario = SCENARIOS[name]
    if scenario.hurts_broker and not stand.has_own_broker:
        print(f"{name}: left out, the broker is not ours to break", flush=True)
        return
    for number in range(1, options.repeat + 1):
        began = time.monotonic()
        report = await try_to_play(stand, scenario, options.seconds, results.failures)
        said = "could not be played" if report is None else "; ".join(report.broken) or "kept"
        print(f"{name} {number}/{options.repeat}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        if report is not None:
            results.reports.append(report)


async def try_to_play(stand: Stand, scenario: Scenario, hold_s: float | None, failures: list[str]) -> Report | None:
    """Play it, and leave a whole stand behind; None, and a line in `failures`, when that is not possible."""
    try:
        try:
            return await play(stand, scenario, room_s=ROOM_S, hold_s=hold_s)
        except BaseException:
            await stand.stop_gateways()  # the next scenario begins with new ones
            raise
        finally:
            await stand.heal()
    except (ServerError, TimeoutError, OSError) as error:
        failures.append(f"{scenario.name}: {type(error).__name__} {error}")
        print(failures[-1], flush=True)
        return None


def show(results: Results) -> None:
    """The tables."""
    by_name: dict[str, list[Report]] = {}
    for report in results.reports:
        by_name.setdefault(report.scenario, []).append(report)
    rows = [row_of(name, reports) for name, reports in by_name.items()]
    if rows:
        print()
        print_table(COLUMNS, rows)
    for measured in results.overloads:
        print()
        print_table(*overload_table(measured))
        for broken in measured.broken:
            print(f"overload: {broken}")
    for report in results.reports:
        for broken in report.broken:
            print(f"{report.scenario}: {broken}")
    for failure in results.failures:
        print(f"could not be played: {failure}")


def row_of(name: str, reports: Sequence[Report]) -> list[str]:
    """A scenario's line under COLUMNS: totals, and the worst times."""
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


def overload_table(measured: Overload) -> tuple[Sequence[str], list[list[str]]]:
    """Its columns and rows: medians of the runs, and the worst times."""
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
    return columns, rows


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names to the left, figures to the right."""
    widths = [max(len(row[number]) for row in (columns, *rows)) for number in range(len(columns))]
    for row in (columns, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", action="append", metavar="NAME", help="this one only; --list names them")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="each N times in a row")
    parser.add_argument("--seconds", type=float, metavar="S", help="keep things broken for S seconds each time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
