"""The gateway as a process of its own."""

import os
import signal
import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from testbed.processes import Port, Server, http_get


class Gateway(Server):
    """A gateway process with the given settings (GATEWAY_…). It inherits none from the environment."""

    name = "Gateway"
    last_signal = signal.SIGTERM

    def __init__(self, settings: Mapping[str, str], *, python: str = sys.executable) -> None:
        super().__init__()
        self.python = python
        self.ops_port = Port()
        self.settings = settings

    @property
    def url(self) -> str:
        """Return the URL of its API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ops_url(self) -> str:
        """Return the URL of the operations listener: probes and metrics."""
        return f"http://127.0.0.1:{self.ops_port}"

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        own = {
            "GATEWAY_API_HOST": "127.0.0.1",
            "GATEWAY_API_PORT": str(self.port),
            "GATEWAY_OPS_PORT": str(self.ops_port),
            # It runs from the working tree and need not be installed.
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        return inherited | own | dict(self.settings)

    def _command(self) -> list[str]:
        return [self.python, "-m", "gateway", "serve"]

    def _answers(self) -> bool:
        answer = http_get(self.ops_port, "/readyz")
        return answer is not None and answer[0] == HTTPStatus.OK

    def close(self) -> None:
        """Kill it, remove its folder, and release its ports."""
        super().close()
        self.ops_port.release()
