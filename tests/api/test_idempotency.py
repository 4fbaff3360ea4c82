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
from gateway.errors import OutcomeUnknown
from gateway.ingest.batch import BatchIds
from gateway.ingest.idempotency import Submission
from gateway.ingest.message_ids import ids_at
from gateway.ingest.wire import Answer, ErrorRow
from gateway.postgres import queries
from gateway.postgres.queries import ANSWER_UNIT, EndedRun, HeldKey, Hold, KnownKey, Queries
from tests.support.callers import make_caller, new_number
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


@pytest.mark.parametrize("change", [{"to": "bad"}, {"list_number": "+18005559999"}], ids=["to", "list_number"])
async def test_a_batch_of_which_nothing_is_queued_leaves_no_row_and_runs_again(
    gateway: GatewayUnderTest, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = batch(gateway, **change)
    with monkeypatch.context() as without_writes:
        without_writes.setattr(gateway.runtime.queries, "settle_key", None)
        first = await gateway.post(body, Idempotency_Key="k")
    assert await keys_of(gateway) == []
    again = await gateway.post(body, Idempotency_Key="k")
    assert (first[0], first[1], again[2].get("Idempotent-Replayed")) == (200, again[1], None)
    assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[1]["queued_count"] == 3
    status, answer, _ = await gateway.post(body, Idempotency_Key="k")
    assert (status, answer["code"]) == (422, "idempotency_key_reused")


async def test_a_batch_that_is_too_large_for_the_queue_leaves_no_row(gateway: GatewayUnderTest) -> None:
    for connection in gateway.runtime.publisher.connections.open:
        connection.max_payload_bytes = 100
    for _ in range(2):
        status, answer, headers = await gateway.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 0, None)
        assert await keys_of(gateway) == []


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


async def test_envelopes_of_a_second_run_have_ids_of_their_own(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """The layout may have changed: as many envelopes as before need not hold the same SMS."""
    async with ScriptedBroker() as broker:
        settings = make_settings(
            amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5, messages_per_envelope=2
        )
        gateway, other = await start_gateway(settings), await start_gateway(settings)
        other.caller = gateway.caller
        broker.mode = "silent"
        assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[0] == 504
        broker.mode = "ack"
        assert (await other.post(batch(gateway), Idempotency_Key="k"))[1]["queued_count"] == 3
        envelopes = [msgspec.json.decode(published.body) for published in broker.published]
        ids = [[sms["id"] for sms in envelope] for envelope in envelopes]
        assert ids[:2] == ids[2:]
        all_ids = {published.properties.message_id for published in broker.published}.union(*ids)
        assert len(all_ids) == 4 + 3


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
        assert await keys_of(gateway) == []
        assert gateway.runtime.idempotency.stored_keys[gateway.caller.account_id] == 0
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


async def test_a_second_run_without_a_connection_says_unknown_and_keeps_the_ids(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway, other = await leave_a_batch_unknown(broker, start_gateway, make_settings)
        third = await start_gateway(gateway.runtime.settings)
        third.caller = gateway.caller
        await other.runtime.publisher.close()
        status, answer, _ = await other.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["code"]) == (504, "outcome_unknown")
        broker.mode = "ack"
        assert (await third.post(batch(gateway), Idempotency_Key="k"))[0] == 200
        ids = [published.properties.message_id for published in broker.published]
        assert ids[:3] == ids[3:]


async def test_an_unknown_outcome_is_told_at_its_deadline_although_its_row_cannot_be_settled(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, confirm_timeout_s=0.5, database_timeout_s=20.0)
        gateway = await start_gateway(settings)
        broker.mode = "silent"
        locker = await asyncpg.connect(settings.database_url)
        async with locker.transaction(), asyncio.timeout(10):
            first = asyncio.create_task(gateway.post(batch(gateway), Idempotency_Key="k"))
            await broker.wait_published(3)
            await locker.execute("LOCK TABLE idempotency_keys IN SHARE MODE")
            assert (await first)[0] == 504
        await locker.close()


async def test_an_answer_that_is_too_long_is_not_stored(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    strange = gateway.message(to="\x01" * 64)
    body = msgspec.json.encode({"messages": [gateway.message(), *([strange] * 999)]})
    for _ in range(2):
        status, answer, headers = await gateway.post(body, Idempotency_Key="k")
        assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 1, None)
    (one, other) = await queue.take_payloads()
    assert one["id"] == other["id"]


def hold_of(gateway: GatewayUnderTest, first_position: int, hold_s: float = HOLD_FOR_A_MINUTE, **changes: Any) -> Hold:
    """Return a hold of the key `k` by the run that `first_position` stands for."""
    hold = Hold(gateway.caller.account_id, "k", bytes(32), first_position, first_position, hold_s, (), may_insert=True)
    return hold._replace(**changes)


def end_of(
    gateway: GatewayUnderTest, holder: int, answer: bytes | None = None, *, is_forgotten: bool = False
) -> EndedRun:
    """Return the end of a run with the key `k`."""
    return EndedRun(gateway.caller.account_id, "k", holder, answer, is_forgotten)


def known_key(first_position: int, answer: bytes | None = None, *, is_same_body: bool = True) -> KnownKey:
    """Return what a run is told whose key another run holds, or has ended."""
    return KnownKey(is_same_body, answer, first_position)


async def test_the_hold_of_a_dead_process_ends_by_itself(gateway: GatewayUnderTest) -> None:
    queries = gateway.runtime.queries
    assert await queries.hold_key(hold_of(gateway, 100, 0.3)) == HeldKey(100, [])
    assert await queries.hold_key(hold_of(gateway, 200)) == known_key(100)
    await asyncio.sleep(0.4)
    other_body = hold_of(gateway, 300, body_sha256=b"x" * 32)
    assert await queries.hold_key(other_body) == known_key(100, is_same_body=False)
    assert await queries.hold_key(hold_of(gateway, 300)) == HeldKey(100, []), "it carries the ids of the run that died"
    await queries.settle_key(end_of(gateway, 100, b"too late"))
    assert await queries.hold_key(hold_of(gateway, 400)) == known_key(100)
    await queries.settle_key(end_of(gateway, 300, b"in time"))
    assert await queries.hold_key(hold_of(gateway, 400)) == known_key(100, b"in time")


async def test_a_stored_answer_outlives_its_hold(gateway: GatewayUnderTest) -> None:
    """Also in a row of which the hold has ended: another run would publish the batch again."""
    queries = gateway.runtime.queries
    await queries.hold_key(hold_of(gateway, 100, 0.1))
    await queries.settle_key(end_of(gateway, 100, b"stored"))
    await asyncio.sleep(0.2)
    for _ in range(2):
        assert await queries.hold_key(hold_of(gateway, 200)) == known_key(100, b"stored")


@pytest.mark.parametrize("is_forgotten", [True, False], ids=["forget", "release"])
async def test_a_late_run_does_not_touch_the_row_of_the_next_one(
    gateway: GatewayUnderTest, *, is_forgotten: bool
) -> None:
    queries = gateway.runtime.queries
    await queries.hold_key(hold_of(gateway, 100, 0.05))
    await asyncio.sleep(0.1)
    assert await queries.hold_key(hold_of(gateway, 200)) == HeldKey(100, [])
    await queries.settle_key(end_of(gateway, 100, is_forgotten=is_forgotten))
    assert await queries.hold_key(hold_of(gateway, 300)) == known_key(100)
    await queries.settle_key(end_of(gateway, 200, is_forgotten=is_forgotten))
    assert await queries.hold_key(hold_of(gateway, 300)) == HeldKey(300 if is_forgotten else 100, [])


@pytest.mark.parametrize("is_forgotten", [True, False], ids=["forget", "keep"])
async def test_a_run_does_not_touch_another_accounts_row(
    gateway: GatewayUnderTest, admin: Admin, *, is_forgotten: bool
) -> None:
    queries, other = gateway.runtime.queries, await make_caller(admin)
    theirs = hold_of(gateway, 100, account_id=other.account_id)
    await queries.hold_key(theirs)
    await queries.hold_key(hold_of(gateway, 200))
    await queries.settle_key(end_of(gateway, 200, None if is_forgotten else b"mine", is_forgotten=is_forgotten))
    assert await queries.hold_key(theirs._replace(holder=300)) == known_key(theirs.first_position)


async def test_a_second_run_that_ends_with_an_error_or_queues_nothing_keeps_the_row(gateway: GatewayUnderTest) -> None:
    """A later version may refuse all messages of the batch, though the first run queued them."""
    runtime, caller = gateway.runtime, gateway.caller
    sent = Submission(caller.account_id, "k", bytes(32), 1, [caller.list_number], None, 0.0)
    for error in (OutcomeUnknown, asyncio.CancelledError, ZeroDivisionError):
        block = await runtime.ids.take(1)
        with pytest.raises(error):
            async with runtime.idempotency.claim(sent, block, BatchIds(block.ids, [])) as claim:
                raise error
    assert claim.is_retry
    block = await runtime.ids.take(1)
    async with runtime.idempotency.claim(sent, block, BatchIds(block.ids, [])) as claim:
        await claim.store(Answer(0, 1, [ErrorRow(0, "bad", "invalid_phone", "bad")]), b"")
    (row,) = await keys_of(gateway)
    assert row["answer"] is None


async def test_each_run_is_a_holder_of_its_own_and_holds_for_the_longest_run_and_two_seconds(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, confirm_timeout_s=1.5))
        broker.mode = "silent"
        runs = [asyncio.create_task(gateway.post(batch(gateway), Idempotency_Key=f"{n}")) for n in range(5)]
        await broker.wait_published(15)
        rows = await keys_of(gateway)
        assert len({row["holder"] for row in rows}) == 5
        assert {row["held_until"] - row["created_at"] for row in rows} == {timedelta(seconds=3.5)}
        assert {status for status, _, _ in await asyncio.gather(*runs)} == {504}


async def test_runs_at_once_share_statements_and_each_gets_its_own_result(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    """Two accounts, new and known keys, one key twice, and one with two bodies, in one statement."""
    queries, other = gateway.runtime.queries, await make_caller(admin)
    await queries.hold_key(hold_of(gateway, 1, key="answered"))
    await queries.settle_key(end_of(gateway, 1, b"{}")._replace(key="answered"))
    holds = [
        hold_of(gateway, 10, key="new"),
        hold_of(gateway, 20, account_id=other.account_id, key="new", not_found=["+18005551000", "+18005552000"]),
        hold_of(gateway, 30, key="answered"),
        hold_of(gateway, 40, key="twice"),
        hold_of(gateway, 50, key="twice"),
        hold_of(gateway, 60, key="twice", body_sha256=b"x" * 32),
        hold_of(gateway, 70, key="answered", body_sha256=b"x" * 32),
        hold_of(gateway, 80, key="absent", may_insert=False),
    ]
    assert await queries._hold_keys(holds) == [
        HeldKey(10, []),
        HeldKey(20, ["+18005551000", "+18005552000"]),
        known_key(1, b"{}"),
        HeldKey(40, []),
        known_key(40),
        known_key(40, is_same_body=False),
        known_key(1, b"{}", is_same_body=False),
        None,
    ]
    ends = [
        end_of(gateway, 10, b"ten")._replace(key="new"),
        end_of(gateway, 20, b"twenty")._replace(account_id=other.account_id, key="new"),
        end_of(gateway, 40, is_forgotten=True)._replace(key="twice"),
        end_of(gateway, 50, b"not held")._replace(key="twice"),
    ]
    await queries._settle_keys(ends)
    assert {row["key"]: row["answer"] for row in await keys_of(gateway)} == {"answered": b"{}", "new": b"ten"}
    assert await queries.hold_key(hold_of(gateway, 90, key="new")) == known_key(10, b"ten")


async def test_holds_and_ends_of_several_processes_do_not_deadlock(
    gateway: GatewayUnderTest, start_gateway: StartGateway
) -> None:
    other = await start_gateway(gateway.runtime.settings)
    names = [f"{number:03}" for number in range(200)]

    async def take_turns(queries: Queries, order: list[str], first_position: int) -> None:
        for number in range(first_position, first_position + 10):
            held = await queries._hold_keys(
                [hold_of(gateway, number * 1_000 + n, key=key) for n, key in enumerate(order)]
            )
            mine = [(n, key) for n, key in enumerate(order) if isinstance(held[n], HeldKey)]
            ends = [end_of(gateway, number * 1_000 + n)._replace(key=key) for n, key in mine]
            if ends:
                await queries._settle_keys(ends)

    async with asyncio.timeout(20):
        await asyncio.gather(
            take_turns(gateway.runtime.queries, names, 100),
            take_turns(other.runtime.queries, names[::-1], 200),
            take_turns(other.runtime.queries, names[::2] + names[1::2], 300),
        )
    assert gateway.runtime.pool.failures == other.runtime.pool.failures == 0


async def deactivate(admin: Admin, list_id: int) -> None:
    await admin.set_list_status(list_id, "inactive")


async def test_a_list_that_is_gone_by_the_second_run_is_not_said_to_have_queued_nothing(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    async with ScriptedBroker() as broker:
        gateway, other = await leave_a_batch_unknown(broker, start_gateway, make_settings)
        await deactivate(admin, gateway.caller.list_id)
        broker.mode = "ack"
        for _ in range(2):
            status, answer, _ = await other.post(batch(gateway), Idempotency_Key="k")
            assert (status, answer["code"]) == (504, "outcome_unknown")
        (row,) = await keys_of(gateway)
        assert row["answer"] is None
        await admin.set_list_status(gateway.caller.list_id, "active")
        status, answer, headers = await other.post(batch(gateway), Idempotency_Key="k")
        assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 3, None)
        ids = [published.properties.message_id for published in broker.published]
        assert ids[:3] == ids[3:]


async def test_a_list_that_is_gone_by_the_second_run_gives_unknown_rows_with_the_ids_of_the_first(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    """Three lists: one found by both runs, one by the first alone, one by none."""
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
        gateway, other = await start_gateway(settings), await start_gateway(settings)
        other.caller = gateway.caller
        second = await admin.add_list(gateway.caller.account_id, gateway.caller.list_number[:-1] + "77")
        messages = [gateway.message(list_number=second["number"]), gateway.message()]
        messages += [gateway.message(list_number="+18005559999"), gateway.message(to="bad")]
        body = msgspec.json.encode({"messages": messages})
        broker.mode = "silent"
        assert (await gateway.post(body, Idempotency_Key="k"))[0] == 504
        await deactivate(admin, second["id"])
        broker.mode = "ack"
        ids = [published.properties.message_id for published in broker.published]
        for published in (3, 4):
            status, answer, headers = await other.post(body, Idempotency_Key="k")
            assert (status, answer["queued_count"], headers.get("Idempotent-Replayed")) == (200, 1, None)
            assert [(row["index"], row["code"], row.get("message_id")) for row in answer["errors"]] == [
                (0, "outcome_unknown", ids[0]),
                (2, "list_not_found", None),
                (3, "invalid_phone", None),
            ]
            assert answer["errors"][0]["may_be_queued"] is True
            assert [each.properties.message_id for each in broker.published[2:]] == ids[1:] * (published - 2)
        await admin.set_list_status(second["id"], "active")
        for replayed in (None, "true"):
            status, answer, headers = await other.post(body, Idempotency_Key="k")
            assert (answer["queued_count"], headers.get("Idempotent-Replayed")) == (2, replayed)


async def test_a_list_that_only_the_second_run_found_is_remembered_too(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.5)
        gateways = [await start_gateway(settings) for _ in range(3)]
        caller = gateways[0].caller
        second = await admin.add_list(caller.account_id, caller.list_number[:-1] + "78")
        await deactivate(admin, second["id"])
        body = msgspec.json.encode({"messages": [caller.message(list_number=second["number"]), caller.message()]})
        broker.mode = "silent"
        for gateway, state, code in zip(gateways, ("inactive", "active", "inactive"), ("", "", "unknown"), strict=True):
            gateway.caller = caller
            await admin.set_list_status(second["id"], state)
            broker.mode = "ack" if code else "silent"
            status, answer, _ = await gateway.post(body, Idempotency_Key="k")
            assert status == (200 if code else 504)
        assert [(row["index"], row["code"]) for row in answer["errors"]] == [(0, "outcome_unknown")]


async def test_a_row_of_an_earlier_version_makes_every_list_that_is_gone_unknown(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    async with ScriptedBroker() as broker:
        gateway, other = await leave_a_batch_unknown(broker, start_gateway, make_settings)
        connection = await asyncpg.connect(gateway.runtime.settings.database_url)
        await connection.execute("UPDATE idempotency_keys SET not_found = DEFAULT")
        await connection.close()
        await deactivate(admin, gateway.caller.list_id)
        assert (await other.post(batch(gateway), Idempotency_Key="k"))[0] == 504


async def test_an_answer_whose_row_cannot_be_settled_is_true_and_counted(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """The database fails between publishing and storing the answer. The retry has the same ids."""
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=1.0, database_timeout_s=0.4)
        gateway = await start_gateway(settings)
        broker.mode = "silent"
        locker = await asyncpg.connect(settings.database_url)
        async with locker.transaction():
            first = asyncio.create_task(gateway.post(batch(gateway), Idempotency_Key="k"))
            await broker.wait_published(3)
            await locker.execute("LOCK TABLE idempotency_keys IN SHARE MODE")
            broker.sessions[-1].ack(3, multiple=True)
            status, answer, _ = await first
            assert (status, answer["queued_count"]) == (200, 3)
            assert gateway.runtime.idempotency.unsettled == 1
        await locker.close()
        broker.mode = "ack"
        async with asyncio.timeout(10):  # until the hold has ended
            second = await gateway.post(batch(gateway), Idempotency_Key="k")
            while second[0] != 200:
                assert second[0] in (409, 503)
                await asyncio.sleep(0.1)
                second = await gateway.post(batch(gateway), Idempotency_Key="k")
        assert "Idempotent-Replayed" not in second[2]
        ids = [published.properties.message_id for published in broker.published]
        assert ids[:3] == ids[3:]


async def test_an_answer_is_given_only_when_its_row_is_settled(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1))
        broker.mode = "silent"
        locker = await asyncpg.connect(gateway.runtime.settings.database_url)
        async with locker.transaction():
            first = asyncio.create_task(gateway.post(batch(gateway), Idempotency_Key="k"))
            await broker.wait_published(3)
            await locker.execute("LOCK TABLE idempotency_keys IN SHARE MODE")
            broker.sessions[-1].ack(3, multiple=True)
            await asyncio.sleep(0.6)  # a fraction of the database's timeout
            assert not first.done()
        await locker.close()
        assert (await first)[0] == 200
        assert (await gateway.post(batch(gateway), Idempotency_Key="k"))[2]["Idempotent-Replayed"] == "true"


async def test_an_account_stores_a_bounded_number_of_keys_and_may_repeat_them_beyond_it(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, max_idempotency_keys=2, confirm_timeout_s=0.5))
        assert (await gateway.post(batch(gateway), Idempotency_Key="1"))[0] == 200
        broker.mode = "silent"
        assert (await gateway.post(batch(gateway), Idempotency_Key="2"))[0] == 504
        broker.mode = "ack"
        for counted in range(2):  # by itself, and by counting rows
            status, answer, _ = await gateway.post(batch(gateway), Idempotency_Key="3")
            assert (status, answer["code"]) == (429, "too_many_idempotency_keys")
            assert (await gateway.post(batch(gateway, to="bad"), Idempotency_Key="4"))[0] == 200, "it stores nothing"
            assert (await gateway.post(batch(gateway)))[0] == 200
            if not counted:
                gateway.runtime.idempotency.stored_keys.clear()
                gateway.runtime.idempotency.stored_keys.update(await gateway.runtime.queries.count_keys())
        assert (await gateway.post(batch(gateway), Idempotency_Key="1"))[2]["Idempotent-Replayed"] == "true"
        async with asyncio.timeout(10):  # the connection with the unconfirmed messages is replaced meanwhile
            while (await gateway.post(batch(gateway), Idempotency_Key="2"))[0] == 504:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert (await gateway.post(batch(gateway), Idempotency_Key="2"))[2]["Idempotent-Replayed"] == "true"
        assert [row["key"] for row in await keys_of(gateway)] == ["1", "2"]


async def test_a_long_answer_counts_as_several_keys(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    account_id, idempotency = gateway.caller.account_id, gateway.runtime.idempotency
    messages = [gateway.message(), *([gateway.message(to="bad")] * 999)]
    assert (await gateway.post(msgspec.json.encode({"messages": messages}), Idempotency_Key="k"))[0] == 200
    (row,) = await keys_of(gateway)
    assert idempotency.stored_keys[account_id] == 1 + len(row["answer"]) // ANSWER_UNIT > 10
    assert (await gateway.runtime.queries.count_keys())[account_id] > 1, "PostgreSQL compresses it"


async def test_many_unknown_lists_count_as_several_keys(gateway: GatewayUnderTest) -> None:
    not_found = [new_number() for _ in range(1_000)]
    await gateway.runtime.queries.hold_key(hold_of(gateway, 100, not_found=not_found))
    assert (await gateway.runtime.queries.count_keys())[gateway.caller.account_id] > 1


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
        await connection.execute(insert, gateway.caller.account_id, "old-", day + minute, -hour, 4_500)
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


async def test_a_large_table_is_counted_by_a_sample(
    gateway: GatewayUnderTest, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the pages: the standard deviation is about 6 %."""
    connection = await asyncpg.connect(gateway.runtime.settings.database_url)
    other = await make_caller(admin)
    insert = """
        INSERT INTO idempotency_keys (account_id, key, body_sha256, first_id, holder, held_until)
        SELECT $1, n, decode(repeat('00', 32), 'hex'), 0, 0, now() FROM generate_series(1, $2) AS n
    """
    delete = "DELETE FROM idempotency_keys WHERE account_id = ANY($1)"
    try:
        await connection.execute(insert, gateway.caller.account_id, 15_000)
        await connection.execute(insert, other.account_id, 5_000)
        size = await connection.fetchval("SELECT pg_relation_size('idempotency_keys')")
        monkeypatch.setattr(
            queries, "COUNT_KEYS", queries.COUNT_KEYS.replace(str(queries.SAMPLE_BYTES), str(size // 3))
        )
        counted = await gateway.runtime.queries.count_keys()
        assert 9_000 < counted[gateway.caller.account_id] < 21_000
        assert 2_000 < counted[other.account_id] < 8_000
    finally:
        await connection.execute(delete, [gateway.caller.account_id, other.account_id])
        await connection.close()
