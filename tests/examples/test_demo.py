"""The demo: what it prints at its end works in another terminal, and nothing is left when it has ended."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder for temporary files; PostgreSQL's user can enter it."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o711)
        yield Path(made)


def shell(command: str, environment: dict[str, str]) -> str:
    """Run a command, as pasted into another terminal, and return what it prints."""
    done = subprocess.run(  # noqa: S603
        ["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def last_parts(demo: subprocess.Popen[str]) -> list[str]:
    """Return what the demo prints for other terminals: a request, the command for the state, and two addresses."""
    assert demo.stdout is not None
    text = ""
    while not text.endswith("/metrics\n"):
        line = demo.stdout.readline()
        assert line, f"it ended:\n{text}"
        assert "✗" not in line, text + line
        text += line
    return re.split(r"\n[^\n]+:\n\n(?=curl|unset|export|http)", text)[1:]


# A port that nothing listens on, and a queue that the demo does not read.
EXPORTED = {
    "GATEWAY_DATABASE_URL": "postgres://user@127.0.0.1:1/gateway",
    "GATEWAY_AMQP_URL": "amqp://127.0.0.1:1/",
    "GATEWAY_AMQP_QUEUE": "another",
}


@pytest.mark.parametrize("exported", [{}, EXPORTED], ids=["no settings", "settings of other servers"])
def test_what_the_demo_says_at_its_end_works_and_nothing_stays(folder: Path, exported: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")} | exported
    command = [sys.executable, "-m", "examples.demo"]
    with subprocess.Popen(  # noqa: S603
        command, cwd=ROOT, env=environment | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True
    ) as demo:
        try:
            one_more, state, pages = last_parts(demo)
            assert '"queued_count":1' in shell(one_more, environment)
            docs, metrics = pages.split()
            status = shell(state, environment)
            expected = (docs.removesuffix("/docs"), "ready", "primary", "sms.outbound")
            assert all(word in status for word in expected), status
            assert "<title>" in shell(f"curl -s {docs}", environment)
            assert "gateway_messages_total" in shell(f"curl -s {metrics}", environment)
            below = psutil.Process(demo.pid).children(recursive=True)
            demo.send_signal(signal.SIGINT)
            assert demo.wait(30) == 0
        finally:
            demo.kill()
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert list(folder.iterdir()) == []
