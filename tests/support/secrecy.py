"""Fails the whole run if a log shows a secret: an API key, a password, a message's text, a whole phone number.

Three kinds of logs are read. In this process: every record that the gateway would print, at DEBUG, before masking. Of
each gateway process, which runs at DEBUG too: its log when it is closed. Of each command: its standard error.
tests/conftest.py registers the plugin.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from gateway.telemetry import log
from testbed import Gateway, RabbitMQ

BODY = "nobody's business"  # part of the texts that tests send: wherever it shows, a text has leaked
PASSWORD = RabbitMQ.password  # of the session's servers, PostgreSQL included: like no other text

SECRETS = {
    "an API key": re.compile(r"trk_[0-9A-Za-z]{32}"),
    "a whole phone number": re.compile(r"\+[1-9][0-9]{6,14}|\b1?4155551234\b|\b447911123412\b"),
    "a password in a URL": re.compile(r"://[^\s/:@]*:(?!\*+@)[^\s/@]+@"),
    "a password": re.compile(PASSWORD),
    "the text of a message": re.compile(re.escape(BODY)),
}
EXAMPLES = re.compile(r"such as \+18005551000|user:password@host")  # in hints to operators
WATCHED_AT_DEBUG = ("gateway", "examples", "aiohttp", "asyncio", "asyncpg")


class Leak(NamedTuple):
    """A secret in a log."""

    test: str
    where: str
    secret: str
    text: str

    def __str__(self) -> str:
        return f"{self.test}: {self.where} shows {self.secret}: {self.text!r}"


class LogWatch(logging.Handler):
    """A pytest plugin that reads the logs, and fails the session if something has leaked."""

    def __init__(self) -> None:
        super().__init__()
        self.leaks: list[Leak] = []
        self._test = "before the first test"

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(log.SILENCED) and record.levelno < logging.CRITICAL:
            return  # the gateway prints none of these; its processes show whether that is true
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += "\n" + log.trace(record.exc_info[1])
        self.look_at(text, f"a record of {record.name}")

    def look_at(self, text: str, where: str) -> None:
        """Record the secrets in a text."""
        text = EXAMPLES.sub("", text)
        for secret, pattern in SECRETS.items():
            if found := pattern.search(text):
                around = text[max(0, found.start() - 100) : found.end() + 100]
                self.leaks.append(Leak(self._test, where, secret, around))

    @contextmanager
    def of_processes(self) -> Iterator[None]:
        """Have each gateway process run at DEBUG, and look at its log before it is removed."""
        close, environment = Gateway.close, Gateway._environment

        def close_and_look(process: Gateway) -> None:
            process.kill()
            if process._directory is not None:
                self.look_at(process.log.read_text(errors="replace"), "the log of a gateway process")
            close(process)

        def environment_at_debug(process: Gateway) -> dict[str, str]:
            return {"GATEWAY_LOG_LEVEL": "DEBUG"} | environment(process)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gateway, "close", close_and_look)
            patch.setattr(Gateway, "_environment", environment_at_debug)
            yield

    # What pytest calls

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self) -> Iterator[None]:
        logging.getLogger().addHandler(self)
        for name in WATCHED_AT_DEBUG:
            logging.getLogger(name).setLevel(logging.DEBUG)
        yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        with self.of_processes():
            return (yield)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        logging.getLogger().removeHandler(self)
        if self.leaks:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["leaks"] = [tuple(leak) for leak in self.leaks]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the leaks of a process of pytest-xdist. One that has died has no output."""
        self.leaks += [Leak(*leak) for leak in getattr(node, "workeroutput", {}).get("leaks", [])]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.leaks:
            terminalreporter.section("secrets in logs", red=True)
            for leak in self.leaks:
                terminalreporter.line(str(leak))


watch = LogWatch()  # of this run; registered by tests/conftest.py
