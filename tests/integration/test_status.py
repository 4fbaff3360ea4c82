"""`python -m gateway status`, with everything up, and with each part down, hung or missing."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import msgspec
import pytest
from aiohttp import web
from pamqp import commands
from pamqp.base import Frame
from yarl import URL

from gateway import __version__
from gateway.cli import status
from testbed import Port, Servers
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.scripted_broker import ScriptedBroker, Session
from tests.support.tcp_proxy import TcpProxy

ROOT = Path(__file__).parents[2]


async def run_status(gateway: GatewayUnderTest, *arguments: str, **changes: str) -> tuple[int, str]:
    """Run the command with a gateway's settings, some of them changed; return exit status and output."""
    settings = gateway.runtime.settings
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")} | {
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_AMQP_URL": settings.amqp_url,
        "GATEWAY_AMQP_QUEUE": settings.amqp_queue,
        "GATEWAY_AMQP_EXCHANGE": settings.amqp_exchange,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "status", *arguments),
        cwd=ROOT,
        env=environment | changes,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert errors == b""
    return process.returncode or 0, output.decode()


async def test_when_all_is_well_it_says_so_and_leaves_nothing_behind(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    await gateway.send([gateway.message()] * 3)
    await queue.take_all()
    code, output = await run_status(gateway, "--json", "--gateway", gateway.ops_url)
    found: dict[str, Any] = msgspec.json.decode(output)
    assert (code, found["ok"], found["problems"], found["version"]) == (0, True, [], __version__)
    assert found["gateways"] == [{"url": gateway.ops_url, "status": "ready", "problem": ""}]
    [node] = found["nodes"]
    assert node["version"].startswith("RabbitMQ ")
    assert node["confirm_ms"] > 0
    empty = {"configured_type": "quorum", "messages": 0, "consumers": 0, "problem": ""}
    assert found["queues"] == [
        {"name": queue.name, "kind": "outbound"} | empty,
        {"name": f"{queue.name}.dead", "kind": "dead_letters"} | empty,
    ]
    [host] = found["hosts"]
    assert (host["role"], host["lag_s"], host["sslmode"]) == ("primary", None, "disable")
    assert found["schema"]["pending"] == found["schema"]["newer"] == []
    assert len(found["schema"]["applied"]) == len(list((ROOT / "migrations").glob("*.sql")))
    assert 0 < found["schema"]["leases_used"] < found["schema"]["leases_in_all"] == 62**6 // 256
    assert found["settings"]["amqp_queue"] == queue.name
    assert "guest:guest" not in output
    assert await queue.depth() == 0

    code, text = await run_status(gateway)  # nobody at the default port, perhaps: that is no problem
    assert text.endswith("no problems\n") == (code == 0)
    assert f"✓ queue        {queue.name}" in text
    assert f"✓ dead letters {queue.name}.dead" in text
    assert "sslmode=disable\n" in text
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("  "))


async def problems_of_queues(gateway: GatewayUnderTest, *arguments: str, **changes: str) -> tuple[int, list[str]]:
    code, output = await run_status(gateway, "--json", *arguments, **changes)
    return code, [one for one in msgspec.json.decode(output)["problems"] if one.startswith("queue ")]


async def test_messages_that_nobody_reads_are_a_problem(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await gateway.send([gateway.message()] * 3)
    code, problems = await problems_of_queues(gateway)
    stale = "An SMS is stale 30 minutes after it was accepted"
    assert (code, problems) == (1, [f"queue {queue.name}: no consumer reads its messages (3). {stale}"])
    code, text = await run_status(gateway)
    assert code == 1
    assert f"✗ queue        {queue.name}" in text
    assert f"    no consumer reads its messages (3). {stale}\n" in text


async def keep(_message: aio_pika.abc.AbstractIncomingMessage) -> None:
    """Neither ack nor reject."""


async def test_a_backlog_and_dead_letters_above_their_limits_are_problems(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    await gateway.send([gateway.message()] * 8)
    connection = await aio_pika.connect(gateway.runtime.settings.amqp_url)
    async with connection, connection.channel() as channel:
        outbound = await channel.get_queue(queue.name, ensure=False)
        for _ in range(2):
            await (await outbound.get()).reject(requeue=False)
        await channel.set_qos(prefetch_count=1)
        await outbound.consume(keep)
        while (await queue.depth()) != 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await problems_of_queues(gateway, "--max-backlog", "5", "--max-dead-letters", "2") == (0, [])
        code, problems = await problems_of_queues(gateway, "--max-backlog", "4")
        assert code == 1
        assert problems == [
            f"queue {queue.name}: messages (5) above the limit of 4: the consumers are too slow, or hang",
            f"queue {queue.name}.dead: dead letters (2): see docs/runbook.md#gatewaydeadletters",
        ]


async def test_a_missing_queue_of_dead_letters_is_a_problem(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    connection = await aio_pika.connect(gateway.runtime.settings.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.queue_delete(f"{queue.name}.dead")
    code, (problem,) = await problems_of_queues(gateway)
    assert code == 1
    assert problem.startswith(f"queue {queue.name}.dead: does not exist. `python -m gateway declare` makes it")
    assert problem.endswith("RabbitMQ drops what consumers reject")


async def test_each_shard_is_looked_at_and_a_stream_is_not_judged(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    settings = make_settings(queue_shards=2)
    gateway = await start_gateway(settings)
    await gateway.send([gateway.message()])
    found = await status.collect(settings, [], [])
    assert [queue.name for queue in found.queues] == [*settings.queues(), f"{settings.amqp_queue}.dead"]
    (problem,) = [one for one in found.problems if one.startswith("queue ")]
    assert problem.startswith(
        f"queue {settings.amqp_queue}.{gateway.caller.list_id % 2}: no consumer reads its messages (1)"
    )

    settings = make_settings(amqp_queue_type="stream")
    gateway = await start_gateway(settings)
    await gateway.send([gateway.message()] * 3)
    found = await status.collect(settings, [], [], limits=status.Limits(backlog=0))
    assert [(queue.name, queue.problem) for queue in found.queues] == [(settings.amqp_queue, "")]


class Questions:
    """The methods that a scripted broker was sent. It answers no passive declaration after the first `answered`."""

    def __init__(self, broker: ScriptedBroker, answered: int = 10_000) -> None:
        self.methods: list[Frame] = []
        self._left = answered
        broker.on_method = self._note

    def _note(self, _session: Session, _channel: int, method: Frame) -> bool:
        self.methods.append(method)
        self._left -= isinstance(method, commands.Queue.Declare) and method.passive
        return self._left < 0

    def count(self, kind: type[Frame]) -> int:
        return sum(isinstance(method, kind) for method in self.methods)


async def test_many_shards_are_asked_about_on_one_channel(make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        questions = Questions(broker)
        settings = make_settings(amqp_url=broker.url, queue_shards=256)
        node, queues = await status._check_node(settings, URL(broker.url))
    assert [queue.messages for queue in queues] == [0] * 257  # with the dead letters
    assert node.problem == ""
    # For the counts, the right to publish, what exists, its arguments, and the confirm.
    assert questions.count(commands.Channel.Open) == 5
    # One for each count, and two to verify a queue. Each is a round trip.
    assert questions.count(commands.Queue.Declare) == 3 * 257 + 1
    assert len(questions.methods) < 3 * 257 + 30


async def test_a_refused_question_costs_no_other_queue_its_answer(make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, queue_shards=4)
        refused = settings.queues()[1]
        broker.on_declare = lambda frame: (
            (403, "ACCESS_REFUSED - no")
            if isinstance(frame, commands.Queue.Declare) and frame.queue == refused
            else None
        )
        node, queues = await status._check_node(settings, URL(broker.url))
    assert [queue.messages for queue in queues] == [0, None, 0, 0, 0]
    assert "Its messages are not counted" in queues[1].problem
    assert node.problem == ""


async def test_the_counts_of_a_broker_that_hangs_later_are_kept(make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        Questions(broker, answered=3)
        settings = make_settings(amqp_url=broker.url, queue_shards=4)
        found = await status.collect(settings, [], [])
    nobody = "no answer from a broker node"
    assert [(queue.messages, queue.problem) for queue in found.queues] == [(0, "")] * 3 + [(None, nobody)] * 2
    (node,) = found.nodes
    assert node.problem == "it answers too slowly, or hangs: not every answer came within 3 s"


async def test_every_problem_of_a_node_is_reported(make_settings: MakeSettings) -> None:
    """A right is missing, and publishing is blocked."""
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        settings = make_settings(amqp_url=broker.url)
        broker.on_declare = lambda frame: (
            (403, "ACCESS_REFUSED - no right to configure")
            if isinstance(frame, commands.Queue.Declare) and frame.queue and not frame.passive
            else None
        )
        node, _ = await status._check_node(settings, URL(broker.url))
    assert "no right to configure" in node.problem
    assert "no confirm in time: a memory or disk alarm" in node.problem


def test_the_default_limit_of_a_backlog_is_half_an_hour_of_sms(make_settings: MakeSettings) -> None:
    queue = status.Queue("q", "quorum", messages=510_000, consumers=1)
    assert status._contents_problem(queue, make_settings(), status.Limits()) == ""
    queue.messages = 510_001
    assert "above the limit of 510,000" in status._contents_problem(queue, make_settings(), status.Limits())
    queue.messages = 5_101
    envelopes = make_settings(messages_per_envelope=100)
    assert "above the limit of 5,100" in status._contents_problem(queue, envelopes, status.Limits())


async def test_a_missing_exchange_is_a_problem_and_is_not_made(gateway: GatewayUnderTest) -> None:
    settings = gateway.runtime.settings
    async with await aio_pika.connect(settings.amqp_url) as connection:
        channel = await connection.channel()
        await channel.exchange_delete(settings.amqp_exchange)
        code, output = await run_status(gateway, "--json")
        problems = msgspec.json.decode(output)["problems"]
        assert code == 1
        (problem,) = [problem for problem in problems if f"no exchange '{settings.amqp_exchange}'" in problem]
        assert "Run `python -m gateway declare`" in problem
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.get_exchange(settings.amqp_exchange)


async def test_a_queue_of_another_type_is_a_problem_that_names_the_command(
    gateway: GatewayUnderTest, make_settings: MakeSettings
) -> None:
    names = {name: getattr(gateway.runtime.settings, name) for name in ("amqp_exchange", "amqp_queue")}
    for topology in ("declare", "check"):
        settings = make_settings(**names, amqp_queue_type="classic", amqp_topology=topology)
        (problem,) = [node.problem for node in (await status.collect(settings, [], [])).nodes]
        assert "inequivalent arg 'x-queue-type'" in problem
        assert "to new names, and run `python -m gateway declare`" in problem


@pytest.mark.parametrize("is_missing", [True, False])
async def test_dead_letters_that_a_gateway_would_have_to_declare_are_verified_too(
    gateway: GatewayUnderTest, is_missing: bool
) -> None:
    """With GATEWAY_AMQP_TOPOLOGY=declare a gateway could not connect, or would make the exchange only then."""
    settings = gateway.runtime.settings
    async with await aio_pika.connect(settings.amqp_url) as connection:
        channel = await connection.channel()
        if is_missing:
            await channel.exchange_delete(f"{settings.amqp_exchange}.dlx")
        else:
            await channel.queue_delete(f"{settings.amqp_queue}.dead")
            await channel.declare_queue(f"{settings.amqp_queue}.dead", durable=True)  # classic
    (problem,) = (await status.collect(settings, [], [])).problems
    assert problem.startswith("broker ")
    assert (f"no exchange '{settings.amqp_exchange}.dlx'" in problem) == is_missing
    assert (f"inequivalent arg 'x-queue-type' for queue '{settings.amqp_queue}.dead'" in problem) != is_missing
    assert "un `python -m gateway declare`" in problem
    checks = msgspec.structs.replace(settings, amqp_topology="check")  # it needs no right to them
    assert (await status.collect(checks, [], [])).ok


async def test_everything_that_is_down_is_reported_by_name(gateway: GatewayUnderTest, servers: Servers) -> None:
    nowhere = Port()
    broker, database = urlsplit(servers.amqp_url), urlsplit(servers.database_url)
    async with (
        TcpProxy(broker.hostname or "", broker.port or 0) as hung_broker,
        TcpProxy(database.hostname or "", database.port or 0) as hung_database,
    ):
        hung_broker.black_hole()
        hung_database.black_hole()
        settings = {
            "GATEWAY_AMQP_URL": f"amqp://u:secret@127.0.0.1:{nowhere}/,amqp://u:secret@127.0.0.1:{hung_broker.port}/",
            "GATEWAY_DATABASE_URL": f"postgres://u:secret@127.0.0.1:{nowhere},127.0.0.1:{hung_database.port}/d?sslmode=disable",
        }
        code, output = await run_status(gateway, "--json", "--gateway", f"http://127.0.0.1:{nowhere}", **settings)
        assert code == 1
        found = msgspec.json.decode(output)
        assert found["schema"]["applied"] is found["schema"]["pending"] is found["schema"]["newer"] is None
        named = " ".join(found["problems"])
        for part in (
            f"gateway http://127.0.0.1:{nowhere}:",
            f"broker 127.0.0.1:{nowhere}:",
            "queue ",
            "schema: no primary",
        ):
            assert part in named
        for hung in (f"broker 127.0.0.1:{hung_broker.port}:", f"database 127.0.0.1:{hung_database.port}:"):
            assert f"{hung} no answer within 3 s" in found["problems"]
        assert "secret" not in output
    nowhere.release()


NOT_READY = '{"status": "not ready", "reasons": ["draining", "no broker"]}'
WORKERS = f'{{"workers": [{{"status": "ready"}}, {NOT_READY}, {NOT_READY}, {{"status": "does not answer"}}]}}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (NOT_READY, "draining; no broker"),
        (WORKERS, "draining; no broker; a worker does not answer"),
        ("<h1>Not Found</h1>", "/readyz answered 404: <h1>Not Found</h1>"),
        ("[1]", "/readyz answered 404: [1]"),
        ("{}", "/readyz answered 404: {}"),
        ("", "/readyz answered 404"),
        (b"no UTF-8: \xff\xfe", "/readyz answered 404: no UTF-8: \ufffd\ufffd"),
        (b'{"a":' * 100_000, "/readyz answered 404: " + '{"a":' * 40),
    ],
)
@pytest.mark.parametrize("charset", [None, "base64"])
async def test_a_named_gateway_that_is_not_ready_is_a_problem(
    text: str | bytes, problem: str, charset: str | None
) -> None:
    """Also where the port is that of another service, which may answer with anything."""

    async def answer(_request: web.Request) -> web.Response:
        body = text.encode() if isinstance(text, str) else text
        return web.Response(status=404, body=body, content_type="text/html", charset=charset)

    app = web.Application()
    app.router.add_get("/readyz", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = URL(f"http://127.0.0.1:{runner.addresses[0][1]}")
        assert await status._check_gateway(url, must_run=True) == status.GatewayState(str(url), "not ready", problem)
    finally:
        await runner.cleanup()


async def test_a_missing_queue_is_a_problem_and_is_not_made(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    missing = f"{queue.name}.missing"
    code, output = await run_status(gateway, "--json", GATEWAY_AMQP_QUEUE=missing)
    assert code == 1
    says = f"queue {missing}: does not exist. `python -m gateway declare` makes it"
    assert any(line.startswith(says) for line in msgspec.json.decode(output)["problems"])
    connection = await aio_pika.connect(gateway.runtime.settings.amqp_url)
    async with connection, connection.channel() as channel:
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.declare_queue(missing, passive=True)


async def test_an_alarm_at_the_broker_is_a_problem(
    gateway: GatewayUnderTest, queue: OutboundQueue, servers: Servers
) -> None:
    if servers.rabbitmq is None:
        pytest.skip("needs a broker of its own, to raise an alarm in")
    await asyncio.to_thread(servers.rabbitmq.alarm, True)
    try:
        code, text = await run_status(gateway)
    finally:
        await asyncio.to_thread(servers.rabbitmq.alarm, False)
    assert code == 1
    assert "no confirm in time: a memory or disk alarm" in text
    assert f"✓ queue        {queue.name}" in text


async def test_pending_and_newer_migrations_are_distinguished(make_settings: MakeSettings, servers: Servers) -> None:
    known = sorted(path.name.partition("_")[0] for path in (ROOT / "migrations").glob("*.sql"))
    behind = await status.collect(make_settings(), [], [*known, "29990101000000"])
    assert behind.schema.pending == ["29990101000000"]
    assert any("pending migrations: 1" in problem for problem in behind.problems)
    ahead = await status.collect(make_settings(), [], known[:-1])
    assert (ahead.schema.newer, ahead.schema.problem) == (known[-1:], "")


async def test_migrations_of_a_database_that_cannot_be_reached_are_unknown(make_settings: MakeSettings) -> None:
    nowhere = Port()
    url = f"postgres://u@127.0.0.1:{nowhere}/d"
    down = await status.collect(msgspec.structs.replace(make_settings(), database_url=url), [], ["1"])
    nowhere.release()
    assert "✗ schema       migrations unknown\n    no primary answers\n" in status.as_text(down)
