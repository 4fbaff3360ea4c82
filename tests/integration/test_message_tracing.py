"""Message tracing: the commands of docs/operations.md show a message that the gateway publishes, with its routing."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker_node import RabbitMQNode
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway

MANUAL = Path(__file__).parents[2] / "docs/operations.md"
SECTION = MANUAL.read_text().partition("\n## Message tracing\n")[2].partition("\n## ")[0]


class TraceableRabbitMQ(RabbitMQNode):
    """A private broker that keeps its trace files to itself."""

    def _prepare(self) -> None:
        super()._prepare()
        traces = self.directory / "traces"
        (self.directory / "advanced.config").write_text(f'[{{rabbitmq_tracing, [{{directory, "{traces}"}}]}}].\n')


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
