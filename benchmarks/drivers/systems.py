"""The systems under test as processes of their own: the gateway, an older gateway and the FastAPI service."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec

from benchmarks.drivers import traffic
from benchmarks.drivers.backends import Backends, Names
from benchmarks.drivers.workers import REPOSITORY
from testbed import Gateway, Server

BARE_PUBLISHER, GATEWAY, BASELINE, FASTAPI = "bare publisher", "gateway", "baseline", "fastapi"
FASTAPI_LOGGED = "fastapi, access log"  # the same with uvicorn's access log, as uvicorn ships


class Setup(msgspec.Struct, frozen=True):
    """The load and the settings of a run, the same for all systems that are compared."""

    batch: int = 1_000
    in_flight: int = 8  # batches: connections of the HTTP client, or batches in flight of the bare publisher
    queue_type: str = "quorum"
    sms_per_message: int = 1
    shards: int = 1  # queues; the FastAPI service always has one
    body_length: int = traffic.BODY_LENGTH
    warm_up_s: float = 1.0
    duration_s: float = 3.0
    amqp_connections: int = 2  # of the bare publisher: as many as the gateway has by default
    processes: int = 1  # of the load generator
    settings: dict[str, str] = {}  # of the gateway, beside those that the run needs
    baseline: str = ""  # the folder of the checkout that the system BASELINE is run from
    form: str = ""  # of the requests, as in generator.Plan
    all_bad: str = ""  # one flaw in every message, "format" or "type": nothing may be queued


class FastApiService(Server):
    """The FastAPI service, one uvicorn process."""

    name = "FastAPI"

    def __init__(self, settings: dict[str, str], *, access_log: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self._access_log = access_log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _environment(self) -> dict[str, str]:
        return super()._environment() | self.settings | {"PYTHONPATH": str(REPOSITORY)}

    def _command(self) -> list[str]:
        options = f"--host 127.0.0.1 --port {self.port} --loop uvloop --http httptools"
        service = ["-m", "uvicorn", "benchmarks.drivers.fastapi_service:app", *options.split()]
        # The access log has lines of level info.
        log = ["--log-level", "info"] if self._access_log else ["--log-level", "warning", "--no-access-log"]
        return [sys.executable, *service, *log]

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port.number, timeout=1.0)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == HTTPStatus.NOT_FOUND
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def serving(system: str, backends: Backends, names: Names, setup: Setup) -> Iterator[Server]:
    """Run the gateway, the baseline or the FastAPI service as a fresh process."""
    settings = backends.servers.environment() | names.settings() | {"GATEWAY_AMQP_QUEUE_TYPE": setup.queue_type}
    server: Server
    if system in (FASTAPI, FASTAPI_LOGGED):
        server = FastApiService(settings, access_log=system == FASTAPI_LOGGED)
    else:
        own_python = Path(setup.baseline, ".venv", "bin", "python")
        python = str(own_python) if system == BASELINE and own_python.exists() else sys.executable
        server = Gateway(settings | _gateway_settings(system, setup), python=python)
    with server:
        yield server


def _gateway_settings(system: str, setup: Setup) -> dict[str, str]:
    settings = {
        "GATEWAY_DRAIN_DELAY_S": "0",
        "GATEWAY_AMQP_CONNECTIONS": str(setup.amqp_connections),
    }
    if setup.shards > 1:
        settings["GATEWAY_QUEUE_SHARDS"] = str(setup.shards)
    if setup.sms_per_message > 1:
        settings["GATEWAY_MESSAGES_PER_ENVELOPE"] = str(setup.sms_per_message)
    if system == BASELINE:
        settings["PYTHONPATH"] = setup.baseline
    return settings | setup.settings
