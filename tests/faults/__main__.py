"""The fault suite: servers die, hang, fill up or are cut off under steady load, and every message is accounted for.

    scripts/faults                              every scenario once, then overload
    scripts/faults --repeat 10                  each ten times in a row
    scripts/faults --scenario leader_killed     one scenario; may be given several times

Callers record what they are told about every message, and consumers what they get. At the end of each scenario the two
records are compared (tests/faults/ledger.py). With GATEWAY_AMQP_URL set, the broker that it names is used, and the
scenarios that would break it are left out.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path

import msgspec

from tests.faults import overload
from tests.faults.deployment import Deployment, open_deployment
from tests.faults.overload import Overload
from tests.faults.promises import PROMISES
from tests.faults.runner import Report, silence_consumers, try_scenario
from tests.faults.scenarios import SCENARIOS
from tests.faults.tables import print_overload, print_scenarios

OVERLOAD = "overload"


class Results(msgspec.Struct):
    """The content of the file that `--json` names."""

    reports: list[Report]
    overloads: list[Overload]
    failures: list[str]  # scenarios that could not be run to their end


async def main() -> int:
    """Run the scenarios; return exit code 0 if every promise was kept."""
    options = _options()
    if options.list:
        _list()
        return 0
    names = options.scenario or [*SCENARIOS, OVERLOAD]
    if unknown := set(names) - {*SCENARIOS, OVERLOAD}:
        print(f"faults: there is no scenario {', '.join(sorted(unknown))}; --list shows them", file=sys.stderr)
        return 2
    silence_consumers()
    results = Results([], [], [])
    async with open_deployment() as deployment:
        for name in names:
            await _run_one(deployment, name, options, results)
    _show(results)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    kept = not any(report.broken for report in results.reports) and not any(each.broken for each in results.overloads)
    return 0 if kept and not results.failures else 1


def _list() -> None:
    shown = {name: scenario.promises for name, scenario in SCENARIOS.items()} | {OVERLOAD: overload.PROMISES_SHOWN}
    for name, promises in shown.items():
        print(f"{name:45} promises {', '.join(map(str, promises))}")
    print("\nThe promises (docs/reliability.md):")
    for number, promise in PROMISES.items():
        print(f"{number:3} {promise.text}")


async def _run_one(deployment: Deployment, name: str, options: argparse.Namespace, results: Results) -> None:
    """Run all repetitions of one scenario."""
    if name == OVERLOAD:
        rounds = max(options.repeat, overload.ROUNDS)
        seconds = options.seconds or overload.SECONDS
        results.overloads.append(await overload.measure(deployment, rounds=rounds, seconds=seconds))
        return
    scenario = SCENARIOS[name]
    if scenario.hurts_broker and not deployment.has_own_broker:
        print(f"{name}: left out, the broker that GATEWAY_AMQP_URL names must not be broken", flush=True)
        return
    for number in range(1, options.repeat + 1):
        began = time.monotonic()
        report = await try_scenario(deployment, scenario, results.failures, hold_s=options.seconds)
        verdict = "could not be run" if report is None else "; ".join(report.broken) or "kept"
        print(f"{name} {number}/{options.repeat}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
        if report is not None:
            results.reports.append(report)


def _show(results: Results) -> None:
    """Print the tables, then a line for each broken promise and each failure."""
    print_scenarios(results.reports)
    for measured in results.overloads:
        print_overload(measured)
        for broken in measured.broken:
            print(f"{OVERLOAD}: {broken}")
    for report in results.reports:
        for broken in report.broken:
            print(f"{report.scenario}: {broken}")
    for failure in results.failures:
        print(f"could not be run: {failure}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", action="append", metavar="NAME", help="run this one only; --list names them")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each N times in a row")
    parser.add_argument("--seconds", type=float, metavar="S", help="keep things broken for S seconds each time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")
    parser.add_argument("--list", action="store_true", help="name the scenarios and the promises they show")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
