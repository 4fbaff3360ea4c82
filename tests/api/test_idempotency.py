"""docs/api.md, "Idempotency-Key": through HTTP and the real database. The broker is scripted where it must fail.

Promise 5.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from gateway.cli.admin import Admin
from gateway.ingest.message_ids import ids_at
from gateway.postgres.queries import HeldKey, KnownKey
from tests.support.callers import make_caller
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.raw_http import exchange
from tests.support.scripted_broker import Published, ScriptedBroker, Session
from tests.support.secrecy import BODY

HOLD_FOR_A_MINUTE = 60.0


def batch(gateway: GatewayUnderTest, count: int = 3, **changes: Any) -> bytes:
    return gateway.caller.body(count, **changes)


async def keys_of(gateway: GatewayUnderTest) -> Sequence[asyncpg.Record]:
    connection = await asyncpg.connect(gateway.runtime.settings.database_url)
    try:
        rows: Sequence[asyncpg.Record] = await connection.fetch(
            "SELECT * FROM idempotency_keys WHERE account_id = $1 ORDER BY key", gateway.caller.account_id
        )
        return rows
    finally:
        await connection.close()


async def test_a_repeated_request_is_answered_again_and_published_once(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    messages = [gateway.message(), gateway.message(to="bad"), gateway.message(body="a body")]
    body = msgspec.json.encode({"messages": messages})
    first = await gateway.post(body, Idempotency_Key="order-1")
    again = await gateway.post(body, Idempotency_Key="order-1")
    assert first[:2] == again[:2]
    assert (first[0], first[1]["queued_count"], first[1]["error_count"]) == (200, 2, 1)
    assert "Idempotent-Replayed" not in first[2]
    assert again[2]["Idempotent-Replayed"] == "true"
    assert first[2]["X-Request-Id"] != again[2]["X-Request-Id"]
    assert len(await queue.take_all()) == 2


async def test_a_batch_without_a_good_message_is_answered_again_too(gateway: GatewayUnderTest) -> None:
    body = batch(gateway, to="bad")
    first = await gateway.post(body, Idempotency_Key="k")
    again = await gateway.post(body, Idempotency_Key="k")
    assert (first[1], again[2].get("Idempotent-Replayed")) == (again[1], "true")
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 422


async def test_another_body_under_the_same_key_is_refused(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await gateway.post(batch(gateway), Idempotency_Key="k")
    status, answer, _ = await gateway.post(batch(gateway, 2), Idempotency_Key="k")
    assert (status, answer["code"]) == (422, "idempotency_key_reused")
    assert len(await queue.take_all()) == 3


async def test_keys_are_each_accounts_own(gateway: GatewayUnderTest, queue: OutboundQueue, admin: Admin) -> None:
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 200
    gateway.caller = await make_caller(admin)
    status, answer, headers = await gateway.post(batch(gateway, 2), Idempotency_Key="k")
    assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 2, None)


BAD_KEYS = {"empty": [b""], "256": [b"k" * 256], "a space": [b"a b"], "not ASCII": ["ä".encode()], "two": [b"k", b"k"]}


@pytest.mark.parametrize("keys", BAD_KEYS.values(), ids=BAD_KEYS)
async def test_a_bad_key_is_refused_before_anything_happens(
    gateway: GatewayUnderTest, queue: OutboundQueue, keys: list[bytes]
) -> None:
    headers = [b"Idempotency-Key: " + key for key in keys]
    headers += [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: %d" % len(batch(gateway))]
    answer = await exchange(gateway.url, headers=headers, body=batch(gateway))
    assert (answer.status, answer.json()["code"]) == (400, "invalid_idempotency_key")
    assert await queue.depth() == 0


@pytest.mark.parametrize("key", ["k", "!" * 255, '"8e03978e-40d5-43e8-bc93-6894a57f9324"', "~"])
async def test_any_visible_ascii_is_a_key(gateway: GatewayUnderTest, key: str) -> None:
    for replayed in (None, "true"):
        status, _, headers = await gateway.post(batch(gateway), Idempotency_Key=key)
        assert (status, headers.get("Idempotent-Replayed")) == (200, replayed)


async def test_a_refused_request_leaves_no_key_behind(gateway: GatewayUnderTest, admin: Admin) -> None:
    assert (await gateway.post(b"{", Idempotency_Key="k"))[0] == 400
    assert (await gateway.post(b"{}", Idempotency_Key="k"))[0] == 400
    assert (await gateway.post(batch(gateway, 1001), Idempotency_Key="k"))[0] == 413
    assert (await gateway.post(batch(gateway), Idempotency_Key="k", Content_Encoding="gzip"))[0] == 415
    assert (await gateway.post(batch(gateway), Idempotency_Key="k", X_Api_Key="trk_wrong"))[0] == 401
    await admin.set_account_status(gateway.caller.account_id, "suspended")
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 403
    await admin.set_account_status(gateway.caller.account_id, "active")
    assert await keys_of(gateway) == []
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 200


async def test_fifty_identical_requests_at_once_are_published_once(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    outcomes = await asyncio.gather(*(gateway.post(batch(gateway), Idempotency_Key="k") for _ in range(50)))
    statuses = [status for status, _, _ in outcomes]
    assert set(statuses) <= {200, 409}
    first = [headers for status, _, headers in outcomes if status == 200 and "Idempotent-Replayed" not in headers]
    assert len(first) == 1
    for status, answer, headers in outcomes:
        if status == 409:
            assert (answer["code"], headers["Retry-After"]) == ("idempotency_in_progress", "1")
    assert len(await queue.take_all()) == 3


async def test_an_unknown_outcome_runs_again_elsewhere_with_the_same_ids(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
        one, other = await start_gateway(settings), await start_gateway(settings)
        other.caller = one.caller
        broker.mode = "silent"
        assert (await one.post(batch(one), Idempotency_Key="k"))[0] == 504
        broker.mode = "ack"
        status, answer, headers = await other.post(batch(one), Idempotency_Key="k")
        assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 3, None)
        ids = [published.properties.message_id for published in broker.published]
        assert len(ids) == 6
        assert ids[:3] == ids[3:]
        bodies = [msgspec.json.decode(published.body) for published in broker.published]
        assert [body["id"] for body in bodies] == ids
        assert [body["body"] for body in bodies] == [f"Hello {message_id}, {BODY}" for message_id in ids]
        assert (await one.post(batch(one), Idempotency_Key="k"))[2]["Idempotent-Replayed"] == "true"
        assert len(broker.published) == 6


async def test_a_repeat_during_the_first_run_is_told_to_wait(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, confirm_timeout_s=2.0))
        broker.mode = "silent"
        first = asyncio.create_task(gateway.post(batch(gateway), Idempotency_Key="k"))
        await eventually(lambda: len(broker.published) == 3)
        status, answer, headers = await gateway.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["code"]) == (409, "idempotency_in_progress")
        assert int(headers["Retry-After"]) > 0
        assert (await first)[0] == 504
        assert len(broker.published) == 3


async def test_an_answer_with_an_unknown_row_is_not_final(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5))
        broker.mode = "silent"
        broker.on_publish = lambda session, message: session.ack(1) if message.delivery_tag == 1 else None
        first = await gateway.post(batch(gateway), Idempotency_Key="k")
        assert (first[0], first[1]["queued_count"], first[1]["error_count"]) == (200, 1, 2)
        unknown_ids = [row["message_id"] for row in first[1]["errors"]]
        broker.on_publish, broker.mode = None, "ack"
        async with asyncio.timeout(10):  # the connection with the unconfirmed messages is replaced meanwhile
            second = await gateway.post(batch(gateway), Idempotency_Key="k")
            while second[0] == 504:  # of this run nothing is queued; of the first, something may be
                await asyncio.sleep(0.1)
                second = await gateway.post(batch(gateway), Idempotency_Key="k")
        assert (second[0], second[1]["queued_count"]) == (200, 3)
        assert [published.properties.message_id for published in broker.published[-3:]][1:] == unknown_ids


async def test_after_a_503_nothing_is_remembered(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url))
        broker.mode = "silent"
        broker.on_publish = lambda session, published: session.nack(published.delivery_tag)
        assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 503
        broker.on_publish, broker.mode = None, "ack"
        assert (await gateway.post(batch(gateway, 2), Idempotency_Key="k"))[0] == 200


async def leave_a_batch_unknown(
    broker: ScriptedBroker, start_gateway: StartGateway, make_settings: MakeSettings
) -> tuple[GatewayUnderTest, GatewayUnderTest]:
    """Leave a batch unknown under the key `k`; yield that gateway and another one with the same caller."""
    settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
    gateway, other = await start_gateway(settings), await start_gateway(settings)
    other.caller = gateway.caller
    broker.mode = "silent"
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 504
    return gateway, other


async def test_what_a_second_run_refuses_may_still_be_queued_by_the_first(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """A caller that is told `not queued` would send it again under a new key, with new ids."""
    async with ScriptedBroker() as broker:
        gateway, other = await leave_a_batch_unknown(broker, start_gateway, make_settings)

        def ack_one_nack_one_return_one(session: Session, published: Published) -> None:
            if published.delivery_tag == 3:
                session.ack(1)
                session.nack(2)
                session.return_(3)
                session.ack(3)

        broker.on_publish = ack_one_nack_one_return_one
        status, answer, _ = await other.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["queued_count"]) == (200, 1)
        assert [(row["code"], row["may_be_queued"]) for row in answer["errors"]] == [("outcome_unknown", True)] * 2
        broker.on_publish, broker.mode = None, "ack"
        status, answer, headers = await other.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 3, None)


async def test_a_refused_second_run_keeps_the_ids_and_does_not_say_that_nothing_is_queued(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway, other = await leave_a_batch_unknown(broker, start_gateway, make_settings)
        broker.on_publish = lambda session, published: session.nack(published.delivery_tag)
        status, answer, _ = await other.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["code"]) == (504, "outcome_unknown")
        broker.on_publish, broker.mode = None, "ack"
        assert (await other.post(batch(gateway), Idempotency_Key="k"))[0] == 200
        ids = [published.properties.message_id for published in broker.published]
        assert ids[:3] == ids[3:6] == ids[6:]


async def test_the_hold_of_a_dead_process_ends_by_itself(gateway: GatewayUnderTest) -> None:
    queries = gateway.runtime.queries

    async def hold(first_id: int, hold_s: float, body: bytes = bytes(32)) -> HeldKey | KnownKey | None:
        return await queries.hold_key(
            gateway.caller.account_id, "k", body, first_id=first_id, holder=first_id, hold_s=hold_s, numbers=[]
        )

    assert await hold(100, 0.3) == HeldKey(100, {})
    assert await hold(200, HOLD_FOR_A_MINUTE) == KnownKey(is_same_body=True, answer=None)
    await asyncio.sleep(0.4)
    assert await hold(300, HOLD_FOR_A_MINUTE, b"x" * 32) == KnownKey(is_same_body=False, answer=None)
    assert await hold(300, HOLD_FOR_A_MINUTE) == HeldKey(100, {}), "it carries the ids of the run that died"
    await queries.keep_answer(gateway.caller.account_id, "k", 100, b"too late")
    assert await hold(400, HOLD_FOR_A_MINUTE) == KnownKey(is_same_body=True, answer=None)
    await queries.keep_answer(gateway.caller.account_id, "k", 300, b"in time")
    assert await hold(400, HOLD_FOR_A_MINUTE) == KnownKey(is_same_body=True, answer=b"in time")


async def test_a_list_that_is_gone_by_the_second_run_shifts_no_id(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
        gateway, other = await start_gateway(settings), await start_gateway(settings)
        other.caller = gateway.caller
        second = await admin.add_list(gateway.caller.account_id, gateway.caller.list_number[:-1] + "77")
        messages = [gateway.message(list_number=second["number"]), gateway.message()]
        body = msgspec.json.encode({"messages": messages})
        broker.mode = "silent"
        assert (await gateway.post(body, Idempotency_Key="k"))[0] == 504
        await admin.set_list_status(second["id"], "inactive")
        broker.mode = "ack"
        assert (await other.post(body, Idempotency_Key="k"))[1]["queued_count"] == 1
        ids = [published.properties.message_id for published in broker.published]
        assert ids[1:2] == ids[2:]


async def test_a_row_is_one_a_batch_and_names_the_block_of_ids(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await gateway.post(batch(gateway), Idempotency_Key="k")
    (row,) = await keys_of(gateway)
    assert [payload["id"] for payload in await queue.take_payloads()] == ids_at(row["first_id"], 3)


async def test_sweeps_at_once_remove_the_expired_and_nothing_else(gateway: GatewayUnderTest) -> None:
    connection = await asyncpg.connect(gateway.runtime.settings.database_url)
    insert = """
        INSERT INTO idempotency_keys (account_id, key, body_sha256, first_id, holder, held_until, answer, created_at)
        SELECT $1, $2 || n, decode(repeat('00', 32), 'hex'), 0, 0, now() + $4, 'x', now() - $3::interval
        FROM generate_series(1, $5) AS n
    """
    day, hour, minute = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
    try:
        await connection.execute(insert, gateway.caller.account_id, "old-", day + minute, -hour, 2_500)
        await connection.execute(insert, gateway.caller.account_id, "young-", day - hour, -hour, 10)
        await connection.execute(insert, gateway.caller.account_id, "running-", day + minute, minute, 10)
    finally:
        await connection.close()

    async def sweep() -> None:
        while await gateway.runtime.queries.sweep_keys():
            pass

    await asyncio.gather(sweep(), sweep(), sweep())
    await sweep()
    left = [row["key"].split("-")[0] for row in await keys_of(gateway)]
    assert sorted(left) == ["running"] * 10 + ["young"] * 10
