"""The demo counts what is in the queue, and its exit code is 1 when anything differs."""

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from examples import demo
from gateway.errors import OUTCOME_UNKNOWN, QUEUE_REJECTED, row_errors
from testbed import Servers
from tests.support.outbound_queue import OutboundQueue

GOOD = 1 + 1_000 - 42  # messages of both requests


@pytest.fixture
def amqp_url(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the demo run once, on the session's servers, with an empty database; delete its queue before and after."""
    if servers.postgres is None:
        pytest.skip("the demo needs an empty database")
    database_url = servers.postgres.create_database("demo")
    environment = {"GATEWAY_DATABASE_URL": database_url, "GATEWAY_AMQP_URL": servers.amqp_url}
    its_servers = SimpleNamespace(environment=lambda: environment, amqp_url=servers.amqp_url)
    monkeypatch.setattr(demo, "Servers", lambda: nullcontext(its_servers))
    # It would change the environment of the tests that follow.
    monkeypatch.setattr(demo, "forget_settings", list)
    monkeypatch.setattr(sys, "argv", ["scripts/demo", "--once"])
    asyncio.run(delete_queue(servers.amqp_url))
    yield servers.amqp_url
    asyncio.run(delete_queue(servers.amqp_url))
    servers.postgres.drop_database("demo")


async def delete_queue(amqp_url: str) -> None:
    async with OutboundQueue(amqp_url, demo.QUEUE) as queue:
        await queue.delete()


def test_the_messages_that_the_demo_counts_are_in_the_queue(amqp_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert f"{GOOD} messages in the queue, exactly the {GOOD}" in shown
    assert shown.count('\n  {"id":"') == 3, "payloads"
    assert asyncio.run(demo.look_into_queue(amqp_url))[0] == GOOD, "they stay in the queue"
    of_the_queue = {QUEUE_REJECTED.code, OUTCOME_UNKNOWN.code}
    assert set(re.findall(r'"code": "(\w+)"', shown)) == {each.code for each in row_errors()} - of_the_queue


def test_a_message_that_is_not_in_the_queue_ends_the_demo_with_exit_code_1(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = demo.look_into_queue

    async def find_too_few(url: str, expected: int | None = None) -> tuple[int, list[bytes]]:
        return GOOD - 1, (await look(url))[1]

    monkeypatch.setattr(demo, "look_into_queue", find_too_few)
    monkeypatch.setattr(demo, "DEPTH_TIMEOUT_S", 0.5)
    assert demo.main() == 1
    assert f"messages in {demo.QUEUE}: expected {GOOD}, found {GOOD - 1}" in capsys.readouterr().err


SEND = demo.send


@pytest.mark.parametrize(
    ("send", "shown"),
    [
        (lambda gateway, _key, *rest: SEND(gateway, "another key", *rest), "invalid_api_key"),
        (lambda *_: {"queued_count": 1, "errors": [{"code": "missing_to"}]}, "error codes: expected ['invalid_phone']"),
    ],
)
def test_another_answer_ends_the_demo_with_exit_code_1(
    amqp_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    send: Callable[..., demo.Message],
    shown: str,
) -> None:
    monkeypatch.setattr(demo, "send", send)
    assert demo.main() == 1
    assert shown in capsys.readouterr().err


def test_a_command_that_fails_ends_the_demo_with_its_output_and_exit_code_1(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    administer = demo.administer
    monkeypatch.setattr(demo, "administer", lambda settings, *_: administer(settings, "key", "create"))
    assert demo.main() == 1
    shown = capsys.readouterr().err
    assert "python -m gateway key create failed:" in shown
    assert "Missing argument" in shown


def test_the_full_batch_is_for_both_lists() -> None:
    messages, _ = demo.mixed_batch(("one", "other"))
    assert {message["list_number"] for message in messages} >= {"one", "other"}
