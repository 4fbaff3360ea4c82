"""API keys that expire, are rotated and noted as used: through HTTP, on the real database and by its clock."""

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from gateway.cli.admin import Admin, AdminError, open_admin
from gateway.errors import DatabaseUnavailable
from gateway.ingest import key_watch
from gateway.ingest.key_watch import KeyWatch
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest
from tests.support.outbound_queue import OutboundQueue

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)


async def post_with(gateway: GatewayUnderTest, key: str, count: int = 1) -> tuple[int, str]:
    status, answer, _ = await gateway.post(gateway.caller.body(count), X_Api_Key=key)
    return status, answer.get("code", "")


async def first_refusal(gateway: GatewayUnderTest, key: str, count: int = 1) -> tuple[int, str]:
    """Send with a key until it is refused, up to ten seconds; return the refusal."""
    answer = 200, ""
    for _ in range(100):
        if (answer := await post_with(gateway, key, count)) != (200, ""):
            break
        await asyncio.sleep(0.1)
    return answer


# A small body asks for key and lists in one query, a large one in two.
@pytest.mark.parametrize("count", [1, 1_000])
async def test_an_expired_key_is_refused_as_an_unknown_one(
    gateway: GatewayUnderTest, admin: Admin, queue: OutboundQueue, count: int
) -> None:
    created = await admin.create_key(gateway.caller.account_id, lifetime=2 * SECOND)
    assert await post_with(gateway, created["key"], count) == (200, "")
    assert await first_refusal(gateway, created["key"], count) == (401, "invalid_api_key")
    now = await admin._connection.fetchval("SELECT now()")
    assert now >= created["expires_at"]


async def test_a_key_without_an_end_has_none(gateway: GatewayUnderTest, admin: Admin) -> None:
    created = await admin.create_key(gateway.caller.account_id, "billing, production")
    assert (created["name"], created["expires_at"]) == ("billing, production", None)
    assert await post_with(gateway, created["key"]) == (200, "")


async def test_a_rotated_key_is_accepted_beside_its_successor_until_the_overlap_ends(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    old = await admin.create_key(gateway.caller.account_id, "billing", 90 * DAY)
    new = await admin.rotate_key(old["id"], 2 * SECOND)
    assert (new["name"], new["replaces"], new["account_id"]) == ("billing", old["id"], gateway.caller.account_id)
    assert new["expires_at"] - old["expires_at"] < timedelta(minutes=1), "it has the same lifetime"
    assert await post_with(gateway, old["key"]) == await post_with(gateway, new["key"]) == (200, "")
    assert await first_refusal(gateway, old["key"]) == (401, "invalid_api_key")
    assert await post_with(gateway, new["key"]) == (200, "")
    with pytest.raises(AdminError, match="no usable key"):
        await admin.rotate_key(old["id"], DAY)


async def test_a_rotation_does_not_prolong_a_key(gateway: GatewayUnderTest, admin: Admin) -> None:
    old = await admin.create_key(gateway.caller.account_id, lifetime=timedelta(hours=1))
    assert (await admin.rotate_key(old["id"], DAY))["old_expires_at"] == old["expires_at"]
    endless = await admin.rotate_key(gateway.caller.key_id, DAY)
    assert endless["expires_at"] is None
    assert endless["old_expires_at"] is not None


async def test_a_replaced_key_is_rotated_again_only_once_its_successor_is_revoked(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    """An operator lost the new key. If it stayed valid beside a second one, nobody would know of it."""
    old = await admin.create_key(gateway.caller.account_id)
    lost = await admin.rotate_key(old["id"], DAY)
    with pytest.raises(AdminError) as refused:
        await admin.rotate_key(old["id"], DAY)
    assert str(refused.value) == (
        f"key {old['id']} is replaced already, by key {lost['id']} ({lost['prefix']}…, not used yet). To replace that "
        f"one, rotate key {lost['id']}. If it was lost, run `python -m gateway key revoke {lost['id']}`, then rotate "
        f"key {old['id']} again"
    )
    await admin._connection.execute("UPDATE api_keys SET last_used_on = '2026-11-26' WHERE id = $1", lost["id"])
    with pytest.raises(AdminError, match=r"trk_\w{4}…, last used on 2026-11-26\)"):
        await admin.rotate_key(old["id"], DAY)
    assert len(await admin.list_keys(gateway.caller.account_id)) == 3, "with that of the fixture"
    await admin.revoke_key(lost["id"])
    second = await admin.rotate_key(old["id"], DAY)
    assert second["old_expires_at"] == lost["old_expires_at"], "the overlap is that of the first rotation"
    assert await post_with(gateway, lost["key"]) == (401, "invalid_api_key")
    assert await post_with(gateway, old["key"]) == await post_with(gateway, second["key"]) == (200, "")


async def test_a_key_whose_successor_has_expired_is_rotated_once_that_is_revoked(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    """The overlap may be longer than the successor's lifetime."""
    old = await admin.create_key(gateway.caller.account_id, lifetime=timedelta(hours=1))
    new = await admin.rotate_key(old["id"], DAY)
    await admin._connection.execute("UPDATE api_keys SET expires_at = now() WHERE id = $1", new["id"])
    with pytest.raises(AdminError, match=rf"which has expired: run `python -m gateway key revoke {new['id']}`, then"):
        await admin.rotate_key(old["id"], DAY)
    await admin.revoke_key(new["id"])
    assert await post_with(gateway, (await admin.rotate_key(old["id"], DAY))["key"]) == (200, "")


async def test_of_two_rotations_at_the_same_time_one_is_refused(gateway: GatewayUnderTest, servers: Servers) -> None:
    async with open_admin(servers.database_url) as one, open_admin(servers.database_url) as other:
        rotations = [admin.rotate_key(gateway.caller.key_id, DAY) for admin in (one, other)]
        outcomes = await asyncio.gather(*rotations, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, AdminError)]
        assert len(refused) == 1
        assert "is replaced already" in str(refused[0])
        assert len(await one.list_keys(gateway.caller.account_id)) == 2


@pytest.mark.parametrize("lifetime", [None, 90 * DAY])
async def test_each_successor_has_the_same_lifetime(
    gateway: GatewayUnderTest, admin: Admin, lifetime: timedelta | None
) -> None:
    old = await admin.create_key(gateway.caller.account_id, lifetime=lifetime)
    first = await admin.rotate_key(old["id"], DAY)
    second = await admin.rotate_key(first["id"], DAY)
    await admin.revoke_key(second["id"])
    third = await admin.rotate_key(first["id"], DAY)  # its end is that of the overlap by now
    ends = [row["expires_at"] for row in (first, second, third)]
    if lifetime is None:
        assert ends == [None, None, None]
    else:
        assert all(abs(end - old["expires_at"]) < timedelta(minutes=1) for end in ends)


async def test_an_expired_key_does_not_count_as_usable(gateway: GatewayUnderTest, admin: Admin) -> None:
    account_id = gateway.caller.account_id
    await admin.create_key(account_id, lifetime=timedelta(microseconds=1))
    (account,) = [row for row in await admin.list_accounts() if row["id"] == account_id]
    assert account["keys"] == 1, "that of the fixture"


async def test_a_revoked_and_an_unknown_key_are_not_rotated(gateway: GatewayUnderTest, admin: Admin) -> None:
    await admin.revoke_key(gateway.caller.key_id)
    for key_id in (gateway.caller.key_id, 10**15):
        with pytest.raises(AdminError, match=f"there is no usable key {key_id}"):
            await admin.rotate_key(key_id, DAY)


async def last_used(admin: Admin, gateway: GatewayUnderTest) -> bool:
    """Return whether the caller's key was used today; None is never."""
    (row,) = [row for row in await admin.list_keys(gateway.caller.account_id) if row["id"] == gateway.caller.key_id]
    return row["last_used_on"] is not None and bool(
        await admin._connection.fetchval("SELECT $1 = current_date", row["last_used_on"])
    )


async def test_the_day_of_the_last_use_is_written_in_the_background(gateway: GatewayUnderTest, admin: Admin) -> None:
    watch = gateway.runtime.key_watch
    await watch.write()  # what other requests of the fixture have noted
    assert not await last_used(admin, gateway)
    assert (await gateway.send([gateway.message(to="bad")]))[0] == 200
    assert (await gateway.post(b"{"))[0] == 400
    await gateway.post(gateway.caller.body(), X_Api_Key="trk_" + "x" * 32)
    assert not await last_used(admin, gateway), "a request writes nothing itself"
    assert len(watch._used) == 1
    await watch.write()
    assert await last_used(admin, gateway)
    assert watch._used == set()


async def test_what_cannot_be_written_is_kept(gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = gateway.runtime.key_watch
    await gateway.send([gateway.message()])

    async def fail(_keys: object) -> None:
        watch.note(b"meanwhile")
        raise DatabaseUnavailable

    monkeypatch.setattr(gateway.runtime.queries, "note_key_use", fail)
    with pytest.raises(DatabaseUnavailable):
        await watch.write()
    assert len(watch._used) == 2
    await watch.close()  # says what is lost, and raises nothing


async def test_a_write_that_is_cancelled_keeps_its_keys(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a drain the task is cancelled, perhaps within a write; `close` then writes what is left."""
    watch = gateway.runtime.key_watch
    await gateway.send([gateway.message()])
    monkeypatch.setattr(gateway.runtime.queries, "note_key_use", lambda _keys: asyncio.sleep(60))
    writing = asyncio.create_task(watch.write())
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    monkeypatch.undo()
    assert len(watch._used) == 1


async def test_keys_about_to_expire_are_counted_although_nothing_can_be_written(
    gateway: GatewayUnderTest, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role of `serve` may lack the right to write, or the database be read-only."""
    key = await admin.create_key(gateway.caller.account_id, lifetime=30 * DAY)
    await admin._connection.execute("UPDATE api_keys SET expires_at = now() + $2 WHERE id = $1", key["id"], DAY)
    await gateway.send([gateway.message()])

    async def fail(_keys: object) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(gateway.runtime.queries, "note_key_use", fail)
    monkeypatch.setattr(key_watch, "INTERVAL_S", 0.01)
    watch = KeyWatch(gateway.runtime.queries)
    watch.note(b"a key")
    watching = asyncio.create_task(watch.watch_for_ever())
    try:
        await eventually(lambda: watch.expiring > 0)
    finally:
        watching.cancel()


async def test_processes_that_write_the_same_keys_wait_for_each_other(gateway: GatewayUnderTest, admin: Admin) -> None:
    keys = [await admin.create_key(gateway.caller.account_id) for _ in range(50)]
    for key in keys:
        await post_with(gateway, key["key"])
    used, url = list(gateway.runtime.key_watch._used), gateway.runtime.settings.database_url
    assert len(used) >= 50
    queries = gateway.runtime.queries
    for _ in range(10):
        await admin._connection.execute("UPDATE api_keys SET last_used_on = NULL")
        await asyncio.gather(*(queries.note_key_use(order) for order in (used, used[::-1], used[25:] + used[:25])))
    connection = await asyncpg.connect(url)
    noted = await connection.fetchval("SELECT count(*) FROM api_keys WHERE last_used_on = current_date")
    await connection.close()
    assert noted >= 50


async def test_keys_about_to_expire_are_counted_and_listed(gateway: GatewayUnderTest, admin: Admin) -> None:
    queries, account_id = gateway.runtime.queries, gateway.caller.account_id
    before = await queries.count_expiring_keys()
    soon = await admin.create_key(account_id, "soon", 90 * DAY)
    later = await admin.create_key(account_id, "later", 90 * DAY)
    for key, days in ((soon, 13), (later, 15)):
        await admin._connection.execute(
            "UPDATE api_keys SET expires_at = now() + $2 WHERE id = $1", key["id"], days * DAY
        )
    revoked = await admin.create_key(account_id, "revoked", DAY)
    await admin.revoke_key(revoked["id"])
    assert await queries.count_expiring_keys() == before + 1
    listed = [row for row in await admin.list_expiring_keys(14 * DAY) if row["account_id"] == account_id]
    assert [(row["id"], row["name"]) for row in listed] == [(soon["id"], "soon")]


async def test_a_key_with_a_successor_is_not_counted_unless_the_successor_is_revoked(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    """The key ends by design, after the overlap: the alert would tell an operator of work that is done."""
    queries, account_id = gateway.runtime.queries, gateway.caller.account_id

    async def listed() -> list[int]:
        return [row["id"] for row in await admin.list_expiring_keys(14 * DAY) if row["account_id"] == account_id]

    before = await queries.count_expiring_keys()
    old = await admin.create_key(account_id, "billing", 90 * DAY)
    new = await admin.rotate_key(old["id"], DAY)
    assert (await queries.count_expiring_keys(), await listed()) == (before, [])
    newest = await admin.rotate_key(new["id"], DAY)
    await admin.revoke_key(new["id"])
    assert (await queries.count_expiring_keys(), await listed()) == (before, []), "the newest key replaces both"
    shown = {row["id"]: row["replaced_by"] for row in await admin.list_keys(account_id)}
    assert (shown[old["id"]], shown[new["id"]], shown[newest["id"]]) == (newest["id"], newest["id"], None)
    await admin.revoke_key(newest["id"])
    assert (await queries.count_expiring_keys(), await listed()) == (before + 1, [old["id"]])


async def test_a_key_with_a_short_life_is_counted_in_its_second_half(gateway: GatewayUnderTest, admin: Admin) -> None:
    """Otherwise the key and its successors would always be counted."""
    queries = gateway.runtime.queries
    before = await queries.count_expiring_keys()
    key = await admin.create_key(gateway.caller.account_id, "rotated each week", 10 * DAY)
    for days_left, counted in ((6, 0), (4, 1)):
        await admin._connection.execute(
            "UPDATE api_keys SET expires_at = now() + $2 WHERE id = $1", key["id"], days_left * DAY
        )
        assert await queries.count_expiring_keys() == before + counted
