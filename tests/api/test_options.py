"""docs/api.md, "Options": ids in answers, and dry runs; through HTTP, on the real servers."""

from typing import Any

import msgspec
import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.web.api import prefers_representation
from tests.support.callers import SINGLE_PATH
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.scripted_broker import ScriptedBroker

IDS = "return=representation"


def batch(gateway: GatewayUnderTest, **top_level: Any) -> bytes:
    """Return a batch of which the messages 0, 2 and 4 are good."""
    bad = [gateway.message(to="bad"), gateway.message(list_number="+18005559999")]
    good = gateway.message()
    return msgspec.json.encode({"messages": [good, bad[0], good, bad[1], good], **top_level})


@pytest.mark.parametrize(
    "prefer",
    [IDS, "Return = Representation", 'return="representation"', "respond-async, return=representation; foo=bar"],
)
async def test_an_answer_lists_the_ids_of_what_was_queued(
    gateway: GatewayUnderTest, queue: OutboundQueue, prefer: str
) -> None:
    status, answer, headers = await gateway.post(batch(gateway), Prefer=prefer)
    assert (status, headers["Preference-Applied"]) == (200, IDS)
    assert [row["index"] for row in answer["messages"]] == [0, 2, 4]
    assert [row["index"] for row in answer["errors"]] == [1, 3]
    queued = {message.message_id: msgspec.json.decode(message.body)["index"] for message in await queue.take_all()}
    assert queued == {row["message_id"]: row["index"] for row in answer["messages"]}


async def test_without_the_preference_there_are_no_ids(gateway: GatewayUnderTest) -> None:
    _, answer, headers = await gateway.post(batch(gateway), Prefer="return=minimal")
    assert set(answer) == {"queued_count", "error_count", "errors"}
    assert "Preference-Applied" not in headers


def prefers(*lines: str) -> bool:
    return prefers_representation(CIMultiDictProxy(CIMultiDict([("Prefer", line) for line in lines])))


@pytest.mark.parametrize(
    "lines",
    [
        ["return=representation;"],
        ["return=representation ; foo"],
        ["wait=10,\treturn=representation"],
        [",, return=representation,"],
        ['x="a, b; c", return=representation'],
        ['x="a \\" b, return=minimal", return=representation'],
        ['return="repre\\sentation"'],
        ["respond-async", "return=representation"],
        ['x="not closed', "return=representation"],
    ],
)
def test_the_preference_is_found_in_any_spelling(lines: list[str]) -> None:
    assert prefers(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        ["representation"],
        ["return"],
        ["return="],
        ["return; return=representation"],
        ["return=minimal, return=representation"],
        ["return=minimal", "return=representation"],
        ["returns=representation"],
        ["return=representation2"],
        ["return=representation x"],
        ["x; return=representation"],
        ["x=return=representation"],
        ['x="a, return=representation"'],
        ['x="a, return=representation, b"'],
        ['x="a", y="b\\", return=representation"'],
        ['x="not closed, return=representation'],
        ['return="representation'],
        ['return="representation;x"'],
        ['return=minimal;x="a, return=representation"'],
        ['return="minimal\\", return=representation'],
    ],
)
def test_what_only_looks_like_the_preference_is_ignored(lines: list[str]) -> None:
    """A comma or a semicolon in a quoted string does not separate (RFC 9110, 5.6.4)."""
    assert not prefers(*lines)


@pytest.mark.parametrize("part", ['"', '\\"', "\\", 'x="', ",", ";", "return=", 'return="\\a', "return ", '"\\', " "])
def test_a_hostile_header_costs_no_more_than_its_length(part: str) -> None:
    """With quadratic backtracking, half a million characters would take hours."""
    for begin in ("", "return", "return=", 'return="'):
        assert not prefers(begin + part * (500_000 // len(part)) + 'x"')


async def test_a_replayed_answer_has_the_ids_of_the_first_run(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    body = batch(gateway)
    without = await gateway.post(body, Idempotency_Key="k")
    again = await gateway.post(body, Idempotency_Key="k", Prefer=IDS)
    once_more = await gateway.post(body, Idempotency_Key="k")
    assert again[2]["Idempotent-Replayed"] == "true"
    assert without[1] == once_more[1]
    assert [row["index"] for row in again[1]["messages"]] == [0, 2, 4]
    assert {row["message_id"] for row in again[1]["messages"]} == {one.message_id for one in await queue.take_all()}


async def test_what_is_unknown_is_no_message_that_was_queued(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = lambda session, published: session.ack(1) if published.delivery_tag == 3 else None
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.3))
        _, answer, _ = await gateway.post(batch(gateway), Prefer=IDS)
        first, *unknown = [published.properties.message_id for published in broker.published]
        assert answer["messages"] == [{"index": 0, "message_id": first}]
        assert [row["message_id"] for row in answer["errors"] if row.get("may_be_queued")] == unknown


async def test_a_dry_run_says_what_a_batch_would_get_and_publishes_nothing(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    left = gateway.runtime.ids.available
    rehearsed = await gateway.post(batch(gateway, dry_run=True), Idempotency_Key="k", Prefer=IDS)
    assert gateway.runtime.ids.available == left
    assert await queue.take_all() == []
    real = await gateway.post(batch(gateway), Idempotency_Key="k")
    assert "Idempotent-Replayed" not in real[2]
    assert rehearsed[:2] == (200, real[1] | {"dry_run": True})
    assert "Preference-Applied" not in rehearsed[2]
    assert len(await queue.take_all()) == 3


async def test_a_dry_run_of_a_single_send(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    status, answer, _ = await gateway.post_single(gateway.message(dry_run=True))
    assert (status, answer) == (200, {"success": True, "status": "dry_run", "dry_run": True})
    status, answer, _ = await gateway.post_single(gateway.message(dry_run=True, list_number="+18005559999"))
    assert (status, answer["code"]) == (400, "list_not_found")
    assert await queue.take_all() == []


@pytest.mark.parametrize("value", [False, None])
@pytest.mark.parametrize("flaw", [{}, {"list_number": 5}], ids=["typed", "mistyped"])
async def test_false_and_null_are_no_dry_run(
    gateway: GatewayUnderTest, queue: OutboundQueue, value: object, flaw: dict[str, Any]
) -> None:
    good = gateway.message()
    body = msgspec.json.encode({"messages": [good, good | flaw], "dry_run": value})
    status, answer, _ = await gateway.post(body)
    assert (status, "dry_run" in answer) == (200, False)
    assert (await gateway.post_single(good | {"dry_run": value}))[1]["status"] == "queued"
    assert len(await queue.take_all()) == answer["queued_count"] + 1


@pytest.mark.parametrize("value", ["true", 1, 0, "", [], {}, [True], 1.0])
async def test_any_other_value_is_refused(gateway: GatewayUnderTest, queue: OutboundQueue, value: object) -> None:
    for path, body in (("", {"messages": [gateway.message()]}), (SINGLE_PATH, gateway.message())):
        encoded = msgspec.json.encode(body | {"dry_run": value})
        status, answer, _ = await (gateway.post(encoded, path) if path else gateway.post(encoded))
        assert (status, answer["code"], answer["error"]) == (400, "invalid_field", "dry_run must be true or false")
    assert await queue.take_all() == []


async def test_dry_runs_are_counted_apart(gateway: GatewayUnderTest) -> None:
    await gateway.post(batch(gateway, dry_run=True))
    counters = gateway.runtime.counters
    assert (counters.messages["dry_run"], counters.messages["queued"]) == (5, 0)
    assert counters.requests[200, "dry_run"] == 1
    assert sum(counters.answered_s.counts) == 0
