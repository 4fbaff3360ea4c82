"""Run tests in a copy of the repository."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTPUT = "output-of-the-tests"
# Most of a run is importing libraries. So each run is a fork of a process that has imported them.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["aio_pika", "aiohttp.web", "asyncpg", "hypothesis", "msgspec", "pytest", "uvloop", "yaml"]
)


def run_tests(folder: Path, tests: list[str], timeout_s: float | None) -> bool:
    """Run tests in a copy of the repository; return False if one fails, or if they take too long."""
    (folder / OUTPUT).unlink(missing_ok=True)
    process = FORKS.Process(target=_be_pytest, args=(folder, tests))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        # All that the tests have started is in the group as well.
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    if not (folder / OUTPUT).exists():
        # Otherwise it would count as a failed test.
        raise ChildProcessError("the tests were not started")
    return process.exitcode == 0


def _be_pytest(folder: Path, tests: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    with Path(OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # pytest warns of plugins that it did not import itself.
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        sys.exit(pytest.main([*options, *tests]))
