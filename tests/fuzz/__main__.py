"""Fuzz the gateway, one target after the other. The same seed draws the same cases.

    scripts/fuzz --minutes 30                   each target for 30 minutes
    scripts/fuzz --minutes 5 --target http --seed 7

http        conversations over raw sockets with a gateway process: pipelined, split, damaged byte by byte, cut off.
            A well-behaved caller sends beside them, and a consumer counts the queued messages (tests/fuzz/raw.py)
document    schemathesis on gateway/web/openapi.json, against a gateway process
requests    decode and validate under a coverage-guided fuzzer, compared with a slow model (tests/fuzz/pure.py)
frames      the parser of the broker's frames, in the same way

Each finding is written to a file in --findings. To keep one as a test, copy it to tests/fuzz/corpus/ under a name that
describes it.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from testbed import Servers
from tests.fuzz import campaigns
from tests.fuzz.campaigns import Result
from tests.support.gateways import run_gateway

TARGETS = ("http", "document", "requests", "frames")
VERSIONS = ("aiohttp", "msgspec", "atheris", "schemathesis")


async def main() -> int:
    """Fuzz the targets; return exit code 0 if nothing was found."""
    options = _options()
    print(f"seed {options.seed}", flush=True)
    targets: Sequence[str] = options.target or TARGETS
    seconds = options.minutes * 60
    results: list[Result] = []
    with Servers(fsync=False) as servers:
        migrated = run_gateway("migrate", database_url=servers.database_url)
        if migrated.returncode:
            raise SystemExit(migrated.stderr)
        for target in targets:
            began = time.monotonic()
            result = await campaigns.run_campaign(
                target, servers.environment(), options.seed, seconds, options.findings
            )
            results.append(result)
            print(f"{target}: {result.cases:,} cases in {time.monotonic() - began:.0f} s", flush=True)
            for line in (*result.notes, *result.findings):
                print(f"    {line}", flush=True)
    _show(results, options.seed)
    return 1 if any(result.findings for result in results) else 0


def _show(results: Sequence[Result], seed: int) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    print(f"\n{'target':10} {'cases':>12} {'findings':>9}   seed {seed}, Python {sys.version.split()[0]}, {versions}")
    for result in results:
        print(f"{result.target:10} {result.cases:12,} {len(result.findings):9}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1.0,
        metavar="N",
        help="for each target; default 1, and on a slow machine at least 0.5",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="repeat this draw")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this one only; may be given several times")
    parser.add_argument("--findings", type=Path, default=Path("findings"), metavar="FOLDER", help="default: findings")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
