"""A gateway process on real servers, for hostile clients to attack; its memory, descriptors, log and queue."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from gateway.cli.admin import Admin, open_admin
from testbed import Gateway, Servers
from testbed.processes import http_get
from tests.support.callers import SEND_PATH
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.outbound_queue import OutboundQueue


class AttackedGateway:
    """The process under attack. open_gateway() starts one."""

    def __init__(self, process: Gateway, queue: OutboundQueue, admin: Admin) -> None:
        self.process = process
        self.queue = queue
        self.admin = admin
        self.url = process.url + SEND_PATH

    def descriptors(self) -> int:
        """Return the number of its open file descriptors."""
        return self.process.footprint().descriptors

    def memory_mb(self) -> float:
        """Return its resident memory in MiB."""
        return self.process.footprint().resident_bytes / 2**20

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        _, text = http_get(self.process.ops_port, "/metrics") or (0, b"")
        (value,) = re.findall(rf"^{name} (\S+)$".encode(), text, re.MULTILINE)
        return float(value)

    def log_lines(self) -> list[dict[str, str]]:
        """Return the lines of its log."""
        return [msgspec.json.decode(line) for line in self.process.log.read_text().splitlines()]

    def alarms(self) -> list[dict[str, str]]:
        """Return the errors and tracebacks in its log, which no client may cause."""
        return [line for line in self.log_lines() if line["level"] in ("error", "critical") or "traceback" in line]


@asynccontextmanager
async def open_gateway(servers: Servers, **settings: str) -> AsyncIterator[AttackedGateway]:
    """Start a gateway process with these settings (names without GATEWAY_, in any case); end it afterwards."""
    environment = process_environment(servers, **{f"GATEWAY_{key.upper()}": value for key, value in settings.items()})
    async with (
        running(GatewayProcess(environment)) as process,
        open_admin(servers.database_url) as admin,
        OutboundQueue(servers.amqp_url, environment["GATEWAY_AMQP_QUEUE"]) as queue,
    ):
        yield AttackedGateway(process, queue, admin)
        await queue.delete()
