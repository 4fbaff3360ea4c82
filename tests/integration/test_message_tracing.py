"""Message tracing: the commands of docs/operations.md show a message that the gateway publishes, with its routing."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import Port, RabbitMQ
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway

MANUAL = Path(__file__).parents[2] / "docs/operations.md"
SECTION = MANUAL.read_text().partition("\n## Message tracing\n")[2].partition("\n## ")[0]


class TraceableRabbitMQ(RabbitMQ):
    """A private broker that keeps its management API and its trace files to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.management_port = Port()

    def _prepare(self) -> None:
        super()._prepare()
        traces = self.directory / "traces"
        (self.directory / "advanced.config").write_text(f'[{{rabbitmq_tracing, [{{directory, "{traces}"}}]}}].\n')

    def _configuration(self) -> list[str]:
        address = ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}"]
        return [*super()._configuration(), *address]

    def shell(self, commands: str) -> str:
        """Run commands as an operator would on this node, and return their standard output."""
        variables = {
            "MANAGEMENT": f"http://127.0.0.1:{self.management_port}",
            "ADMIN": "guest",
            "PASSWORD": self.password,
            "PATH": f"{self._program('rabbitmq-plugins').parent}:/usr/bin:/bin",
        }
        environment = self._environment() | variables
        command = ["sh", "-e", "-c", commands]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        super().close()
        self.management_port.release()


@pytest.fixture
def rabbitmq() -> Iterator[TraceableRabbitMQ]:
    """Start a broker for this module: tracing slows down every message of a node."""
    with TraceableRabbitMQ() as rabbitmq:
        yield rabbitmq


async def test_the_manuals_commands_show_a_published_message_and_its_routing(
    rabbitmq: TraceableRabbitMQ, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    switch_on, read, switch_off = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    names = {"amqp_exchange": "sms.outbound", "amqp_queue": "sms.outbound"}  # the defaults, which the manual names
    gateway = await start_gateway(make_settings(amqp_url=rabbitmq.url, **names))

    rabbitmq.shell(switch_on)
    await gateway.send([gateway.message(to="+14155551234")])
    # The plugin writes the file some time after the broker has confirmed the message.
    await eventually(lambda: "Payload" in rabbitmq.shell(read))
    trace = rabbitmq.shell(read)
    assert trace.count("Message published") == 1
    assert re.search(r"^Exchange: +sms\.outbound$", trace, re.MULTILINE)
    assert re.search(r"^Routing keys: +\[<<\"sms\.outbound\">>\]$", trace, re.MULTILINE)
    assert re.search(r"^Routed queues: +\[<<\"sms\.outbound\">>\]$", trace, re.MULTILINE)
    assert "+14155551234" in trace

    rabbitmq.shell(switch_off)
    assert "rabbitmq_tracing" not in rabbitmq.shell("rabbitmq-plugins list --enabled --minimal")
