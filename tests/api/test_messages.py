"""docs/api.md, "Per-message codes": every row, through HTTP, against the real servers."""

from typing import Any

import msgspec
import pytest

from examples.conformance.refusals import REFUSED
from gateway.cli.admin import Admin
from tests.support.callers import make_caller, new_number
from tests.support.gateways import GatewayUnderTest
from tests.support.outbound_queue import OutboundQueue


@pytest.mark.parametrize(("changes", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_one_bad_message_costs_only_itself(
    gateway: GatewayUnderTest, queue: OutboundQueue, changes: dict[str, Any], code: str
) -> None:
    bad = gateway.message(**changes)
    status, answer = await gateway.send([gateway.message(body="before"), bad, gateway.message(body="after")])
    assert status == 200
    assert answer["queued_count"] == 2
    (row,) = answer["errors"]
    to = bad.get("to")
    assert row == {"index": 1, "to": to[:64] if isinstance(to, str) else None, "code": code, "error": row["error"]}
    assert row["error"]
    assert [payload["body"] for payload in await queue.take_payloads()] == ["before", "after"]


@pytest.mark.parametrize("element", [None, [], 1, "x", True, 1.5])
async def test_an_element_that_is_no_object_lacks_everything(
    gateway: GatewayUnderTest, queue: OutboundQueue, element: object
) -> None:
    status, answer = await gateway.send([element, gateway.message()])
    assert (status, answer["queued_count"]) == (200, 1)
    assert [(row["index"], row["to"], row["code"]) for row in answer["errors"]] == [(0, None, "missing_to")]
    assert await queue.depth() == 1


@pytest.mark.parametrize(
    ("broken", "first"),
    [
        (("to", "list_number", "body"), "missing_to"),
        (("list_number", "body"), "missing_list_number"),
        (("body",), "missing_body"),
    ],
)
async def test_presence_is_checked_before_format_and_in_order(
    gateway: GatewayUnderTest, broken: tuple[str, ...], first: str
) -> None:
    message = gateway.message(to="bad", list_number="bad", wrap_links=1) | dict.fromkeys(broken)
    _, answer = await gateway.send([message])
    assert [row["code"] for row in answer["errors"]] == [first]


async def test_formats_are_checked_before_other_fields_and_those_before_ownership(gateway: GatewayUnderTest) -> None:
    foreign = new_number()
    _, answer = await gateway.send(
        [
            gateway.message(to="bad", list_number="bad", wrap_links=1),
            gateway.message(list_number="bad", wrap_links=1),
            gateway.message(list_number=foreign, wrap_links=1),
            gateway.message(list_number=foreign),
        ]
    )
    assert [row["code"] for row in answer["errors"]] == [
        "invalid_phone",
        "invalid_list_number",
        "invalid_field",
        "list_not_found",
    ]


async def test_a_foreign_an_inactive_and_an_unknown_list_look_the_same(
    gateway: GatewayUnderTest, queue: OutboundQueue, admin: Admin
) -> None:
    foreign, inactive, unknown = (await make_caller(admin)).list_number, new_number(), new_number()
    await admin.set_list_status((await admin.add_list(gateway.caller.account_id, inactive))["id"], "inactive")
    _, answer = await gateway.send(
        [gateway.message(list_number=number) for number in (foreign, inactive, unknown)] + [gateway.message()]
    )
    assert answer["queued_count"] == 1
    rows = answer["errors"]
    assert [row.pop("index") for row in rows] == [0, 1, 2]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["code"] == "list_not_found"
    assert await queue.depth() == 1


async def test_a_thousand_foreign_lists_are_a_thousand_rows(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    status, answer = await gateway.send([gateway.message(list_number=f"+1999{n:07}") for n in range(1000)])
    assert (status, answer["queued_count"], answer["error_count"]) == (200, 0, 1000)
    assert {row["code"] for row in answer["errors"]} == {"list_not_found"}
    assert await queue.depth() == 0


async def test_when_every_message_is_bad_the_batch_is_still_processed(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    status, answer = await gateway.send([gateway.message(to="bad")] * 1000)
    assert (status, answer["queued_count"], answer["error_count"]) == (200, 0, 1000)
    assert await queue.depth() == 0


async def test_one_bad_among_a_thousand(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    messages = [gateway.message(body=f"number {n}") for n in range(1000)]
    messages[500] = gateway.message(body=5)
    status, answer = await gateway.send(messages)
    assert (status, answer["queued_count"]) == (200, 999)
    assert [row["index"] for row in answer["errors"]] == [500]
    assert [payload["index"] for payload in await queue.take_payloads()] == [n for n in range(1000) if n != 500]


async def test_the_top_level_list_number_is_the_default(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    other = new_number()
    messages = [
        gateway.message(list_number=...),
        gateway.message(list_number=None),
        gateway.message(list_number=""),
        gateway.message(list_number=other),
    ]
    _, answer = await gateway.send(messages, list_number=gateway.caller.list_number)
    assert answer["queued_count"] == 3
    assert [(row["index"], row["code"]) for row in answer["errors"]] == [(3, "list_not_found")]
    assert {payload["list_number"] for payload in await queue.take_payloads()} == {gateway.caller.list_number}


@pytest.mark.parametrize(
    ("default", "code"), [(7, "invalid_list_number"), ("x", "invalid_list_number"), (None, "missing_list_number")]
)
async def test_a_bad_default_costs_only_the_messages_that_need_it(
    gateway: GatewayUnderTest, default: object, code: str
) -> None:
    _, answer = await gateway.send([gateway.message(), gateway.message(list_number=...)], list_number=default)
    assert answer["queued_count"] == 1
    assert [(row["index"], row["code"]) for row in answer["errors"]] == [(1, code)]


async def test_unknown_fields_are_ignored(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    message = gateway.message(expiration="1", user_id="root", routing_key="x", id="forged", account_id=1, index=9)
    status, answer = await gateway.send([message], priority=9)
    assert (status, answer["queued_count"]) == (200, 1)
    (payload,) = await queue.take_payloads()
    assert payload["account_id"] == gateway.caller.account_id
    assert payload["id"] != "forged"
    assert set(payload) == {
        *("id", "account_id", "list_id", "list_number", "to", "body", "wrap_links"),
        *("accepted_at", "request_id", "index"),
    }


async def test_a_repeated_key_counts_with_its_last_value(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    message = msgspec.json.encode(gateway.message()).decode()
    body = f'{{"messages":[{{"to":5,"body":"first",{message[1:]}]}}'
    status, answer, _ = await gateway.post(body.encode())
    assert (status, answer["queued_count"]) == (200, 1)
    (payload,) = await queue.take_payloads()
    assert payload["body"].startswith("Hello ")
