"""Dead letters: the commands of docs/runbook.md show one, and put all of them back, unchanged and each to its shard."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from tests.support.broker_node import RabbitMQNode
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway

RUNBOOK = (Path(__file__).parents[2] / "docs/runbook.md").read_text()
LOOK = RUNBOOK.partition("\n## GatewayDeadLetters\n")[2].partition("\n### ")[0]
PUT_BACK = RUNBOOK.partition("\n### Dead letters put back\n")[2].partition("\n## ")[0]
NAMES = {"amqp_exchange": "sms.outbound", "amqp_queue": "sms.outbound"}  # the defaults, which the runbook names


@pytest.fixture
def rabbitmq() -> Iterator[RabbitMQNode]:
    """Start a broker for this module: the commands enable plugins."""
    with RabbitMQNode() as rabbitmq:
        yield rabbitmq


def command_in(section: str) -> str:
    (command,) = re.findall(r"^ *```sh\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    return str(command)


async def test_the_runbooks_commands_put_dead_letters_back(
    rabbitmq: RabbitMQNode, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    settings = make_settings(amqp_url=rabbitmq.url, **NAMES, queue_shards=2)
    gateway = await start_gateway(settings)
    await gateway.send([gateway.message(metadata={"n": n}) for n in range(50)])
    connection = await aio_pika.connect(rabbitmq.url)
    async with connection, connection.channel() as channel:

        async def take(name: str) -> list[AbstractIncomingMessage]:
            queue = await channel.get_queue(name, ensure=False)
            taken = []
            while (message := await queue.get(fail=False)) is not None:
                taken.append(message)
            return taken

        async def depth(name: str) -> int:
            declared = await channel.declare_queue(name, passive=True)
            return declared.declaration_result.message_count or 0

        async def until_deep(name: str, messages: int) -> None:
            async with asyncio.timeout(60):
                while await depth(name) < messages:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        (filled,) = [name for name in settings.queues() if await depth(name)]
        rejected = await take(filled)
        for message in rejected:
            await message.reject(requeue=False)
        await until_deep("sms.outbound.dead", 50)

        rabbitmq.shell("rabbitmq-plugins enable rabbitmq_management")
        shown = rabbitmq.shell(command_in(LOOK))
        assert '"reason":"rejected"' in shown
        assert f'"message_id":"{rejected[0].message_id}"' in shown
        await until_deep("sms.outbound.dead", 50)  # the command has taken one, and puts it back

        for name in settings.queues():
            await (await channel.get_queue(name, ensure=False)).unbind("sms.outbound", name)
        with pytest.raises(AssertionError):  # nothing is bound to the exchange: all would be lost
            rabbitmq.shell(command_in(PUT_BACK))
        assert await depth("sms.outbound.dead") == 50
        for name in settings.queues():
            await (await channel.get_queue(name, ensure=False)).bind("sms.outbound", name)

        rabbitmq.shell(command_in(PUT_BACK))
        await eventually(lambda: "sms-dead-letters" not in rabbitmq.shell("rabbitmqctl list_parameters"))
        assert await depth("sms.outbound.dead") == 0
        back = await take(filled)
        # RabbitMQ keeps no order on the way through the dead letters.
        assert sorted((one.message_id, one.type, one.body) for one in back) == sorted(
            (one.message_id, one.type, one.body) for one in rejected
        )
        assert all(one.delivery_mode == aio_pika.DeliveryMode.PERSISTENT for one in back)
        for other in {*settings.queues()} - {filled}:
            assert await depth(other) == 0

        # Rejected once more, a message becomes a dead letter again, and stays one: the shovel has ended.
        await back[0].reject(requeue=False)
        await until_deep("sms.outbound.dead", 1)
        assert "sms-dead-letters" not in rabbitmq.shell("rabbitmqctl list_parameters")
    assert re.search("^rabbitmq_shovel$", rabbitmq.shell("rabbitmq-plugins list --enabled --minimal"), re.MULTILINE)
