"""A soak: a nemesis draws faults from a seed, for hours, under load; what leaks, shows over time.

    scripts/soak --hours 8                  prints its seed at the start; --seed repeats the draw
    scripts/soak --hours 8 --plot soak.svg

Round after round a fault is drawn (sometimes two at once), and how long it lasts; half of the rounds send again with an
Idempotency-Key and read with the reference consumer. After each round callers and consumers are compared, and memory
and descriptors of the gateways sampled. They must be flat: the last fifth of the soak is compared with the second.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.report import plots
from tests.faults.__main__ import COLUMNS, print_table, row_of, silence_consumers, try_to_play
from tests.faults.play import Report
from tests.faults.scenarios import FAST, KEYED, STEADY, Scenario, together
from tests.faults.stand import open_stand

HOLD_S = (0.5, 12.0)  # beyond heartbeats, net ticks and deadlines, and below all of them
TWO_AT_ONCE = 0.25
GROWTH_MB = 20.0
GROWTH_DESCRIPTORS = 5  # the pools of connections differ by that much from one moment to the next
TOO_SHORT = 15  # rounds: below that, fifths say nothing
# Each draw is one of these, or two of different kinds: two at once that need the same server would mend each other.
KINDS = {
    "broker": ("leader_killed", "leader_paused", "publishers_node_killed", "publishers_node_paused", "quorum_lost"),
    "refusal": ("memory_alarm", "disk_alarm", "queue_full", "binding_deleted"),
    "broker's network": ("broker_black_hole", "broker_half_open", "broker_resets"),
    "database": ("database_paused", "database_stopped", "database_backends_terminated", "database_failed_over"),
    "database's network": ("database_black_hole", "database_half_open", "database_resets"),
    "gateway": ("gateway_killed", "gateway_paused"),
}
MAY_COINCIDE = (
    *(("broker", "database's network"), ("broker's network", "database"), ("refusal", "database's network")),
    *(("broker's network", "database's network"), ("gateway", "database"), ("gateway", "broker's network")),
)


class Sample(msgspec.Struct):
    """One gateway after one round."""

    at_s: float
    resident_mb: float
    descriptors: int


class Soak(msgspec.Struct):
    """Everything `--json` writes."""

    seed: int
    hours: float
    reports: list[Report]
    samples: list[Sample]  # of the gateway that no fault restarts
    failures: list[str]
    leaks: list[str]


class Nemesis:
    """Draws faults; the same seed, the same faults."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a draw that can be repeated
        self._scenarios = {scenario.name: scenario for scenario in FAST}

    def draw(self) -> Scenario:
        """The next round."""
        kinds: Sequence[str] = [self._random.choice(list(KINDS))]
        if self._random.random() < TWO_AT_ONCE:
            kinds = self._random.choice(MAY_COINCIDE)
        drawn = [self._scenarios[self._random.choice(KINDS[kind])] for kind in kinds]
        hold_s = round(self._random.uniform(*HOLD_S), 1)
        keyed = self._random.random() < 0.5 and "queue_full" not in [each.name for each in drawn]
        return replace(
            drawn[0],
            name=" + ".join(scenario.name for scenario in drawn),
            fault=together(*(scenario.fault for scenario in drawn)),
            faults=len(drawn),
            stops_gateways=any(scenario.stops_gateways for scenario in drawn),
            hurts_broker=any(scenario.hurts_broker for scenario in drawn),
            hold_s=hold_s,
            load=KEYED if keyed else STEADY,
        )


async def main() -> int:
    """Soak for as long as was asked for; the exit code says whether every promise was kept."""
    options = _options()
    print(f"seed {options.seed}", flush=True)
    silence_consumers()
    soak = Soak(options.seed, options.hours, [], [], [], [])
    nemesis = Nemesis(options.seed)
    began = time.monotonic()
    async with open_stand() as stand:
        while time.monotonic() - began < options.hours * 3600:
            scenario = nemesis.draw()
            if scenario.hurts_broker and not stand.has_own_broker:
                continue
            report = await try_to_play(stand, scenario, None, soak.failures)
            at_s = time.monotonic() - began
            if report is None:
                print(f"{at_s:7.0f} s  {scenario.name}: could not be played", flush=True)
                continue
            soak.reports.append(report)
            sample = Sample(at_s, report.resident_mb[-1], report.descriptors[-1])
            soak.samples.append(sample)
            keyed = ", keyed" if scenario.load.keyed else ""
            held = f"{sample.resident_mb:.0f} MB, {sample.descriptors} descriptors"
            said = "; ".join(report.broken) or "kept"
            print(f"{at_s:7.0f} s  {scenario.name}, {scenario.hold_s:g} s{keyed}: {said}  ({held})", flush=True)
    soak.leaks = leaks(soak.samples)
    _show(soak)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(soak)))
    if options.plot:
        options.plot.write_text(picture(soak))
    return 1 if soak.leaks or soak.failures or any(report.broken for report in soak.reports) else 0


def leaks(samples: Sequence[Sample]) -> list[str]:
    """What is higher in the last fifth than in the second; the first is still warming up."""
    if len(samples) < TOO_SHORT:
        return []
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    found = []
    grown_mb = median(each.resident_mb for each in late) - median(each.resident_mb for each in early)
    if grown_mb > GROWTH_MB:
        found.append(f"memory grew by {grown_mb:.0f} MB")
    more = median(each.descriptors for each in late) - median(each.descriptors for each in early)
    if more > GROWTH_DESCRIPTORS:
        found.append(f"{more:g} descriptors more than in the beginning")
    return found


def _show(soak: Soak) -> None:
    by_name: dict[str, list[Report]] = {}
    for report in soak.reports:
        by_name.setdefault(report.scenario, []).append(report)
    print()
    print_table(COLUMNS, [row_of(name, reports) for name, reports in sorted(by_name.items())])
    counted = sum(report.findings.counted for report in soak.reports)
    lost = sum(len(report.findings.lost) for report in soak.reports)
    doubled = sum(len(report.findings.doubled) for report in soak.reports)
    print(f"seed {soak.seed}: {len(soak.reports)} rounds, {counted:,} counted, {lost} lost, {doubled} doubled")
    for line in (*soak.leaks, *(f"could not be played: {failure}" for failure in soak.failures)):
        print(line)


def picture(soak: Soak) -> str:
    """Memory and descriptors over time, as an SVG that stands alone."""
    drawn = plots.lines(
        {
            "resident MB": [(each.at_s / 60, each.resident_mb) for each in soak.samples],
            "descriptors": [(each.at_s / 60, each.descriptors) for each in soak.samples],
        },
        x_label="minutes",
        y_label="resident MB (above), descriptors (below)",
    )
    return plots.standalone(drawn.partition("<p class")[0])  # the labels say which is which; a legend would be HTML


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0, metavar="N", help="how long; 0.1 is six minutes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="repeat this draw")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write memory and descriptors over time, as SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
