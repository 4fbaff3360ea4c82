"""Mutate modules, and run the tests beside them on each mutant: a mutant that survives is a hole in the tests.

    python -m tests.mutations gateway/amqp/window.py gateway/ingest/auth.py
    python -m tests.mutations gateway/amqp/window.py --list

The tests are tests/unit/test_MODULE.py and tests/properties/test_MODULE.py, or those in TESTS. They run in a copy of
the repository. Tests that need servers start them for each mutant, unless GATEWAY_DATABASE_URL and GATEWAY_AMQP_URL
name some (`scripts/services`). Survivors that need no test are in survivors.txt, with the reason. The exit code is 1
if there are others.
"""

import argparse
import os
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import cache_from_source
from pathlib import Path

from tests.mutations.edits import Edit, edits_of
from tests.mutations.runs import OUTPUT, run_tests

ROOT = Path(__file__).parents[2]
EXPLAINED = Path(__file__).with_name("survivors.txt")
TESTS = {
    "examples/consumer/consumer.py": ["tests/examples/test_consumer.py"],
    "examples/consumer/inbox.py": ["tests/examples/test_consumer.py"],
    "examples/consumer/payloads.py": ["tests/unit/test_e164.py", "tests/examples"],
    "examples/consumer/settings.py": ["tests/examples/test_settings.py"],
    "examples/demo.py": ["tests/examples/test_demo.py", "tests/examples/test_demo_counts.py"],
    "gateway/amqp/connection.py": ["tests/integration/publisher"],
    "gateway/amqp/publisher.py": ["tests/integration/publisher"],
    "gateway/amqp/transport.py": ["tests/unit/test_transport.py", "tests/integration/publisher"],
    "gateway/cli/admin.py": ["tests/integration/test_least_rights.py", "tests/integration/test_command_line.py"],
    "gateway/ingest/contact_data.py": [
        *("tests/unit/test_batch.py", "tests/unit/test_decoding.py", "tests/properties/test_contact_data.py"),
    ],
    "gateway/ingest/decoding.py": [
        *("tests/unit/test_decoding.py", "tests/properties/test_decoding.py"),
        *("tests/properties/test_in_place.py", "tests/properties/test_batch.py"),
        *("tests/unit/test_batch.py", "tests/properties/test_contact_data.py", "tests/unit/test_second_pass.py"),
    ],
    "gateway/ingest/idempotency.py": ["tests/unit/test_idempotency.py", "tests/api/test_idempotency.py"],
    "gateway/postgres/pool.py": ["tests/unit/test_pool.py", "tests/integration/test_database.py"],
    "gateway/postgres/rights.py": ["tests/integration/test_least_rights.py"],
    "gateway/postgres/queries.py": ["tests/unit/test_queries.py", "tests/api/test_idempotency.py"],
    "gateway/telemetry/log.py": ["tests/unit/test_log.py", "tests/unit/test_secrets.py"],
    "gateway/telemetry/requests.py": ["tests/unit/test_request_log.py", "tests/unit/test_counters.py"],
    "gateway/tls.py": ["tests/unit/test_config.py", "tests/integration/tls"],
    "gateway/web/api.py": ["tests/unit/test_api.py", "tests/api"],
    "gateway/web/connections.py": ["tests/integration/test_drain.py", "tests/api/test_connections.py", "tests/hostile"],
    "gateway/web/sockets.py": ["tests/unit/test_sockets.py", "tests/integration/test_sockets.py"],
}
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")


def tests_of(module: str) -> list[str]:
    """Return the tests beside a module."""
    beside = [f"tests/{tier}/test_{Path(module).stem}.py" for tier in ("unit", "properties")]
    return TESTS.get(module) or [path for path in beside if (ROOT / path).exists()]


def survivors_of(module: str, edits: list[Edit], jobs: int) -> Iterator[Edit]:
    """Yield the mutations of a module that no test notices."""
    if not (tests := tests_of(module)):
        sys.exit(f"{module} has no tests beside it")
    source = (ROOT / module).read_text()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            folders.put(shutil.copytree(ROOT, Path(temporary, str(number)), ignore=NOT_COPIED))
        begin = time.monotonic()
        if not run_tests(Path(temporary, "0"), tests, None):
            sys.exit(f"the tests of {module} fail without a mutation:\n{Path(temporary, '0', OUTPUT).read_text()}")
        # Other mutants take the processor too.
        timeout_s = 4 * (time.monotonic() - begin) + 10

        def survives(edit: Edit) -> bool:
            folder = folders.get()
            (folder / module).write_text(edit.apply(source))
            # Python takes a compiled file of the same second and size for the same source.
            Path(cache_from_source(str(folder / module))).unlink(missing_ok=True)
            survived = run_tests(folder, tests, timeout_s)
            folders.put(folder)
            return survived

        for edit, survived in zip(edits, pool.map(survives, edits), strict=True):
            if survived:
                yield edit


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="a path such as gateway/amqp/window.py")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one mutation of N")
    parser.add_argument("--list", action="store_true", help="only list the mutations")
    options = parser.parse_args()
    explained = set(EXPLAINED.read_text().splitlines())
    exit_code = 0
    for module in options.modules:
        source = (ROOT / module).read_text()
        edits = edits_of(source)[:: options.every]
        if options.list:
            print("".join(f"{module}: {edit.describe(source)}\n" for edit in edits), end="")
            continue
        survivors = [f"{module}: {edit.describe(source)}" for edit in survivors_of(module, edits, options.jobs)]
        new = [each for each in survivors if each not in explained]
        print(f"{module}: {len(edits)} mutants, {len(survivors)} survive, {len(new)} of them unexplained", flush=True)
        print("".join(f"  {each}\n" for each in new), end="", flush=True)
        exit_code |= bool(new)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
