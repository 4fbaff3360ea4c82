"""The Idempotency-Key: the sweep of expired rows, and the settling of a row at the end of a run."""

import asyncio
from typing import cast

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.ingest import idempotency
from gateway.ingest.batch import BatchIds
from gateway.ingest.idempotency import Idempotency, Submission
from gateway.ingest.message_ids import IdBlock
from gateway.ingest.wire import Answer
from gateway.postgres.queries import EndedRun, HeldKey, Hold, Queries
from tests.support.eventually import eventually

ENDED = EndedRun(7, "key", 1, None, is_forgotten=False)


class Rows:
    """Stands in for Queries. A list holds the results of its next calls."""

    def __init__(self) -> None:
        self.sweeps: list[bool | Exception] = []
        self.counts = [{1: 10}, {2: 20}]
        self.ended: list[EndedRun] = []
        self.may_settle = asyncio.Event()
        self.failure: Exception | None = None

    async def sweep_keys(self) -> bool:
        result = self.sweeps.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def count_keys(self) -> dict[int, int]:
        if len(self.counts) == 1:
            await asyncio.Event().wait()
        return self.counts.pop(0)

    async def resolve_lists(self, account_id: int, numbers: list[str]) -> dict[str, int]:
        return dict.fromkeys(numbers, account_id)

    async def hold_key(self, hold: Hold) -> HeldKey:
        return HeldKey(hold.first_position, hold.not_found)

    async def settle_key(self, run: EndedRun) -> None:
        self.ended.append(run)
        await self.may_settle.wait()
        if self.failure is not None:
            raise self.failure


def opened(rows: Rows, longest_settle_s: float = 60.0) -> Idempotency:
    return Idempotency(cast("Queries", rows), longest_run_s=10.0, longest_settle_s=longest_settle_s, max_keys=100)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_the_sweep_removes_all_expired_rows_counts_the_others_and_outlives_an_outage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idempotency, "SWEEP_INTERVAL_S", 0.001)
    rows = Rows()
    rows.sweeps = [DatabaseUnavailable(), True, True, False, False]
    keys = opened(rows)
    keys.stored_keys.update({1: 5, 3: 7})
    sweeping = asyncio.create_task(keys.sweep_for_ever())
    await eventually(lambda: not rows.sweeps, timeout=5.0)
    assert keys.stored_keys == {1: 10}
    assert [record.message for record in caplog.records] == ["expired idempotency keys stay until the next sweep"]
    assert not sweeping.done()
    sweeping.cancel()


async def test_an_answer_that_is_late_waits_for_its_row_all_the_same() -> None:
    rows = Rows()
    keys = opened(rows)
    asyncio.get_running_loop().call_later(0.05, rows.may_settle.set)
    await keys.settle(ENDED, deadline=now() - 1.0)
    assert keys.unsettled == 0


async def test_an_answer_waits_for_its_row_no_longer_than_a_query_takes_and_the_end_of_the_process_does() -> None:
    rows = Rows()
    keys = opened(rows, longest_settle_s=0.01)
    async with asyncio.timeout(5):
        await keys.settle(ENDED, deadline=now() + 60.0)
    assert keys.unsettled == 1
    closing = asyncio.create_task(keys.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    rows.may_settle.set()
    async with asyncio.timeout(5):
        await closing
    assert not keys._settling


async def test_a_row_that_cannot_be_settled_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()
    rows.may_settle.set()
    rows.failure = DatabaseUnavailable()
    keys = opened(rows)
    await keys.settle(ENDED, deadline=now() + 60.0)
    assert keys.unsettled == 1
    assert "an idempotency key stays held until its hold expires" in caplog.text
    await keys.close()


async def test_a_run_that_is_cancelled_while_its_answer_is_stored_settles_its_row_once() -> None:
    """A second settlement would take the stored answer away, and a retry would publish again."""
    rows = Rows()
    keys = opened(rows)

    async def run() -> None:
        sent = Submission(7, "key", bytes(32), 1, ["+18005551000"], None, now() + 60.0)
        async with keys.claim(sent, IdBlock(0, ["00000000"]), BatchIds(["00000000"], [])) as claim:
            await claim.store(Answer(1, 0, []), b"encoded")

    running = asyncio.create_task(run())
    await eventually(lambda: bool(rows.ended), timeout=5.0)
    running.cancel()
    rows.may_settle.set()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    await keys.close()
    assert [ended.answer for ended in rows.ended] == [b"encoded"]


async def test_a_hold_outlasts_the_longest_run() -> None:
    assert opened(Rows()).hold_s == 12.0
