"""Servers for the questions that start their own."""

import pytest

from testbed import Servers


@pytest.fixture
def named_servers(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the session's servers in the environment: a benchmark then uses them, and starts none."""
    for name, value in servers.environment().items():
        monkeypatch.setenv(name, value)
