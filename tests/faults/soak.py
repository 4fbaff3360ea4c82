"""A soak: faults drawn from a seed, for hours, under load. A leak shows over time.

    scripts/soak --hours 8                  prints its seed at the start; --seed repeats the draw
    scripts/soak --hours 8 --plot soak.svg

Each round draws a fault, sometimes two at once, and its duration. In half of the rounds callers retry with an
Idempotency-Key, and the reference consumer reads. After each round, callers are compared with consumers, and memory and
descriptors of a gateway are sampled. They must stay flat: the last fifth of the soak is compared with the second.
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

from tests.faults.deployment import open_deployment
from tests.faults.runner import Report, silence_consumers, try_scenario
from tests.faults.scenarios import FAST, KEYED, STEADY, Scenario, together
from tests.faults.tables import print_scenarios

HOLD_S = (0.5, 12.0)  # from below to above all heartbeats, net ticks and deadlines
TWO_AT_ONCE = 0.25
GROWTH_MB = 20.0
GROWTH_DESCRIPTORS = 5  # the pools of connections differ by that much from one moment to the next
TOO_SHORT = 15  # rounds: below that, fifths say nothing
# A draw is one of these, or two of different kinds: two faults of one server would mend each other.
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
    """The footprint of one gateway after one round."""

    at_s: float
    resident_mb: float
    descriptors: int


class Soak(msgspec.Struct):
    """The content of the file that `--json` names."""

    seed: int
    hours: float
    reports: list[Report]
    samples: list[Sample]  # of the gateway that no fault restarts
    failures: list[str]
    leaks: list[str]


class Nemesis:
    """A source of faults; the same seed gives the same faults."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a draw that can be repeated
        self._scenarios = {scenario.name: scenario for scenario in FAST}

    def draw(self) -> Scenario:
        """Return the scenario of the next round."""
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
    """Run faults for the given time; return exit code 0 if every promise was kept."""
    options = _options()
    print(f"seed {options.seed}", flush=True)
    silence_consumers()
    soak = Soak(options.seed, options.hours, [], [], [], [])
    nemesis = Nemesis(options.seed)
    began = time.monotonic()
    async with open_deployment() as deployment:
        while time.monotonic() - began < options.hours * 3600:
            scenario = nemesis.draw()
            if scenario.hurts_broker and not deployment.has_own_broker:
                continue
            report = await try_scenario(deployment, scenario, soak.failures)
            if report is not None:
                _note(soak, scenario, report, time.monotonic() - began)
    soak.leaks = leaks(soak.samples)
    _show(soak)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(soak)))
    if options.plot:
        options.plot.write_text(picture(soak.samples))
    return 1 if soak.leaks or soak.failures or any(report.broken for report in soak.reports) else 0


def _note(soak: Soak, scenario: Scenario, report: Report, at_s: float) -> None:
    """Record one round, and print it."""
    sample = Sample(at_s, report.resident_mb[-1], report.descriptors[-1])
    soak.reports.append(report)
    soak.samples.append(sample)
    keyed = ", keyed" if scenario.load.keyed else ""
    verdict = "; ".join(report.broken) or "kept"
    footprint = f"{sample.resident_mb:.0f} MB, {sample.descriptors} descriptors"
    print(f"{at_s:7.0f} s  {scenario.name}, {scenario.hold_s:g} s{keyed}: {verdict}  ({footprint})", flush=True)


def leaks(samples: Sequence[Sample]) -> list[str]:
    """Describe the growth from the second fifth to the last; in the first fifth, the gateway warms up."""
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
    print_scenarios(sorted(soak.reports, key=lambda report: report.scenario))
    counted = sum(report.findings.counted for report in soak.reports)
    lost = sum(len(report.findings.lost) for report in soak.reports)
    doubled = sum(len(report.findings.doubled) for report in soak.reports)
    print(f"seed {soak.seed}: {len(soak.reports)} rounds, {counted:,} counted, {lost} lost, {doubled} doubled")
    for line in (*soak.leaks, *(f"could not be run: {failure}" for failure in soak.failures)):
        print(line)


def picture(samples: Sequence[Sample]) -> str:
    """Return memory and descriptors over time as an SVG file, each scaled from zero to its maximum."""
    width, height, left = 640, 120, 10
    longest_s = max((sample.at_s for sample in samples), default=0.0) or 1.0
    parts = []
    for number, (name, values) in enumerate(
        {
            "resident MB": [sample.resident_mb for sample in samples],
            "descriptors": [float(sample.descriptors) for sample in samples],
        }.items()
    ):
        top, most = 20 + number * (height + 30), max(values, default=0.0) or 1.0
        points = " ".join(
            f"{left + sample.at_s / longest_s * width:.1f},{top + height * (1 - value / most):.1f}"
            for sample, value in zip(samples, values, strict=True)
        )
        label = f"{name}, 0 to {most:.0f}, over {longest_s / 60:.0f} minutes"
        parts.append(f'<text x="{left}" y="{top - 6}">{label}</text>')
        parts.append(f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="#6b7280"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 2 * left} {2 * (height + 30)}">'
        f"<style>text{{font:11px sans-serif;fill:#6b7280}}</style>{''.join(parts)}</svg>\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0, metavar="N", help="duration; 0.1 is six minutes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="repeat this draw")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write memory and descriptors over time, as SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
