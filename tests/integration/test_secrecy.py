"""The watch over the logs of a test run fails for every leak and for nothing else: runs of pytest within this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RUN = """
import logging, sys, time
import pytest
from testbed import Gateway
from tests.support.secrecy import BODY, PASSWORD, LogWatch

KEY = "trk_" + "k" * 32
NUMBER = "+1415" + "5551234"  # not in a traceback's own line
LEAKS = {
    "key": ("gateway.web.api", KEY),
    "number": ("asyncpg.pool", "to +14155551234."),
    "number without plus": ("gateway", "14155551234"),
    "password": ("asyncio", PASSWORD),
    "url": ("examples.consumer", "amqp://u:hunter2@h/"),
    "text": ("aiohttp.server", f"Hello, {BODY}"),
    "text of a library": ("some.library", f"Hello, {BODY}"),
}

class Shouting(Gateway):
    says = ""
    def _command(self):
        return [sys.executable, "-c", f"import time; print({self.says!r}, flush=True); time.sleep(60)"]
    def _answers(self):
        return bool(self.log.read_text())

def run_as_a_process(text):
    class Saying(Shouting):
        says = text
    with Saying({}) as process:
        assert process._environment()["GATEWAY_LOG_LEVEL"] == "DEBUG"

@pytest.mark.parametrize("name", LEAKS)
def test_record(name):
    logger, text = LEAKS[name]
    logging.getLogger(logger).log(logging.WARNING if "library" in logger else logging.DEBUG, "%s", text)

def test_words_of_code():
    try:
        raise TypeError(KEY)
    except TypeError:
        logging.getLogger("gateway").exception("failed")

def test_process():
    run_as_a_process(KEY)

def test_clean():
    logging.getLogger("gateway").info("connected to amqp://u:***@h/, 10 messages of +4479******12 in 14155 ms")
    logging.getLogger("aiormq.connection").error(KEY)
    logging.getLogger("aiormq.connection").debug(PASSWORD)
    try:
        raise KeyError(NUMBER)
    except KeyError:
        logging.getLogger("gateway").exception("failed")
    run_as_a_process("all is well")
"""

CONFTEST = """
from tests.support.secrecy import LogWatch

def pytest_configure(config):
    config.pluginmanager.register(LogWatch())
"""


def run_pytest(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    (folder / "test_run.py").write_text(RUN)
    return subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments, "test_run.py"],
        cwd=folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_each_leak_fails_the_run_and_is_named(tmp_path: Path) -> None:
    completed = run_pytest(tmp_path, "-k", "not clean")
    assert completed.returncode == 1, completed.stdout
    assert "9 passed" in completed.stdout, "no single test notices"
    told = [line for line in completed.stdout.splitlines() if line.startswith("test_run.py::")]
    named = {line.partition(": ")[0].removeprefix("test_run.py::") for line in told}
    assert named == {
        *(f"test_record[{name}]" for name in ("key", "number", "number without plus", "password", "url", "text")),
        *("test_record[text of a library]", "test_words_of_code", "test_process"),
    }
    assert any("test_process: the log of a gateway process shows an API key" in line for line in told)


def test_leaks_in_other_processes_of_a_run_are_told_too(tmp_path: Path) -> None:
    completed = run_pytest(tmp_path, "-p", "xdist", "-n", "2", "-k", "key or process")
    assert completed.returncode == 1, completed.stdout
    assert "2 passed" in completed.stdout
    assert "test_run.py::test_record[key]: a record of gateway.web.api shows an API key" in completed.stdout
    assert "test_run.py::test_process: the log of a gateway process shows an API key" in completed.stdout


def test_a_run_in_which_nothing_leaks_passes(tmp_path: Path) -> None:
    completed = run_pytest(tmp_path, "-k", "clean")
    assert (completed.returncode, "secrets in logs" in completed.stdout) == (0, False), completed.stdout
