"""The consumers in docs/consumers.md, as they stand there, on a queue that a gateway has declared and filled."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika
import pytest
from aio_pika.exceptions import ChannelPreconditionFailed

from gateway.cli.admin import Admin
from tests.support.callers import new_number
from tests.support.documents import code_blocks, filled_in
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue

PAGE = "docs/consumers.md"
URL, QUEUE = "amqp://guest:guest@127.0.0.1/", '"sms.outbound"'


async def start(program: str, folder: Path) -> asyncio.subprocess.Process:
    """Start a program of the document, alone in a folder."""
    (folder / "consumer.py").write_text(program)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "consumer.py"),
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def consuming(program: str, folder: Path) -> AsyncIterator[asyncio.StreamReader]:
    """Run a program of the document; yield what it prints. Ctrl-C ends it."""
    process = await start(program, folder)
    assert process.stdout
    try:
        yield process.stdout
        assert process.returncode is None
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.communicate()


async def read_lines(printed: asyncio.StreamReader, count: int) -> list[list[str]]:
    """Return the words of as many lines."""
    async with asyncio.timeout(60):
        return [(await printed.readline()).decode().split() for _ in range(count)]


def program_of(heading: str, gateway: GatewayUnderTest, **changes: str) -> str:
    (program,) = code_blocks(PAGE, heading, "python")
    settings = gateway.runtime.settings
    return filled_in(program, **{URL: settings.amqp_url, QUEUE: f'"{settings.amqp_queue}"'}, **changes)


async def until_free(queue: OutboundQueue) -> None:
    """Return when the queue has no consumer."""
    async with asyncio.timeout(30), await aio_pika.connect(queue.url) as connection:
        channel = await connection.channel()
        while (await channel.declare_queue(queue.name, passive=True)).declaration_result.consumer_count:  # noqa: ASYNC110 - the broker sets no event
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("heading", ["### aio-pika", "### pika"])
@pytest.mark.parametrize("per_envelope", [1, 10])
async def test_a_first_consumer_takes_every_sms(
    start_gateway: StartGateway, make_settings: MakeSettings, tmp_path: Path, heading: str, per_envelope: int
) -> None:
    gateway = await start_gateway(make_settings(messages_per_envelope=per_envelope))
    settings = gateway.runtime.settings
    status, answer, _ = await gateway.post(gateway.caller.body(25))
    assert (status, answer["queued_count"]) == (200, 25)
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        async with consuming(program_of(heading, gateway), tmp_path) as printed:
            handed_on = await read_lines(printed, 25)
            assert len({words[0] for words in handed_on}) == 25
            # The ack of the last message follows its line.
            await gateway.post(gateway.caller.body(1))
            await read_lines(printed, 1)
        # What was not acked comes back when the broker has noticed the end of the connection. Only the ack of the last
        # message may be lost with the program.
        await until_free(queue)
        assert await queue.depth() <= 1
        await queue.delete()


@pytest.mark.parametrize("heading", ["### aio-pika", "### pika"])
async def test_a_first_consumer_sends_what_it_cannot_handle_to_the_dead_letters(
    gateway: GatewayUnderTest, queue: OutboundQueue, tmp_path: Path, heading: str
) -> None:
    program = program_of(heading, gateway, **{'print(sms["id"]': 'print(sms["no such field"]'})
    await gateway.post(gateway.caller.body(1))
    process = await start(program, tmp_path)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert b"KeyError: 'no such field'" in errors
    async with OutboundQueue(gateway.runtime.settings.amqp_url, f"{queue.name}.dead") as dead:
        assert len(await dead.take_payloads()) == 1
    assert await queue.depth() == 0


async def test_a_declaration_as_in_a_tutorial_is_refused(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    async with await aio_pika.connect(gateway.runtime.settings.amqp_url) as connection:
        with pytest.raises(ChannelPreconditionFailed):
            await (await connection.channel()).declare_queue(queue.name, durable=True)
    status, answer, _ = await gateway.post(gateway.caller.body(1))
    assert (status, answer["queued_count"]) == (200, 1)


async def test_each_list_is_paced_by_itself(
    gateway: GatewayUnderTest, queue: OutboundQueue, admin: Admin, tmp_path: Path
) -> None:
    per_minute, count = 600, 30
    program = program_of("## Pacing", gateway, **{"17_000": str(per_minute)})
    other = new_number()
    await admin.add_list(gateway.caller.account_id, other)
    await gateway.post(gateway.caller.body(count))
    await gateway.send([gateway.message(list_number=other)])
    async with consuming(program, tmp_path) as printed:
        lines = await read_lines(printed, count + 1)
    lists = [words[1] for words in lines]
    assert lists[-1] == lists[0], "the other list did not wait for the 30 messages before its own"
    times = [float(words[2]) for words in lines if words[1] == lines[0][1]]
    assert len(times) == count
    # The first line may be late, and no line may be early.
    assert times[-1] - times[0] > 0.9 * (count - 2) * 60 / per_minute
