"""What one who watches is shown, how much is kept for him, and what he misses. No server."""

from typing import Any

import msgspec
import pytest

from gateway import watching
from gateway.amqp.confirms import Outcome
from gateway.watching import MOST_KEPT_OCTETS, MOST_KEPT_PAYLOADS, MOST_WATCHERS, Choice, TooManyWatchers, Watchers

Shown = list[dict[str, Any]]

NUMBER, OTHER = "+18005551000", "+18005552000"


def sms(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{number:08}",
        "account_id": 42,
        "list_id": 7,
        "list_number": NUMBER,
        "to": "+447911123412",
        "body": "Hello",
        "wrap_links": False,
        "accepted_at": "2026-11-23T11:00:00.123Z",
        "request_id": "r",
        "index": number,
    } | changes


def encoded(*payloads: Any) -> list[bytes]:
    return [msgspec.json.encode(payload) for payload in payloads]


def acked(payloads: list[bytes]) -> bytes:
    return bytes([Outcome.ACKED]) * len(payloads)


async def shown_of(choice: Choice, payloads: list[bytes], outcomes: bytes = b"", *, account_id: int = 42) -> Shown:
    """What a watcher is shown of one batch."""
    watchers = Watchers()
    with watchers.watch(choice) as watcher:
        watchers.see(account_id, {NUMBER, OTHER}, payloads, outcomes or acked(payloads))
        watcher.end()
        return decoded(await watcher.next_lines())


def decoded(lines: bytes) -> Shown:
    return [msgspec.json.decode(line) for line in lines.splitlines()]


async def test_numbers_are_masked_and_the_text_is_its_length() -> None:
    [line] = await shown_of(Choice(), encoded(sms(metadata={"k": "+447911123412"})))
    assert line == {
        "outcome": "queued",
        "id": "00000000",
        "account_id": 42,
        "list_id": 7,
        "list_number": "+1800*****00",
        "to": "+4479******12",
        "body_characters": 5,
        "accepted_at": "2026-11-23T11:00:00.123Z",
        "request_id": "r",
        "index": 0,
    }


async def test_the_whole_is_shown_to_those_who_may_see_it() -> None:
    [line] = await shown_of(Choice(whole=True), encoded(sms(metadata={"k": 1})))
    assert (line["to"], line["list_number"], line["body"]) == ("+447911123412", "+18005551000", "Hello")
    assert line["metadata"] == {"k": 1}
    assert "contact_data" not in line


async def test_each_message_is_shown_with_what_became_of_it() -> None:
    outcomes = bytes([Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN])
    shown = await shown_of(Choice(), encoded(*map(sms, range(4))), outcomes)
    assert [line["outcome"] for line in shown] == ["queued", "rejected", "rejected", "unknown"]


async def test_an_envelope_is_shown_as_what_it_carries() -> None:
    shown = await shown_of(Choice(), encoded([sms(1), sms(2)], [sms(3)]))
    assert [line["index"] for line in shown] == [1, 2, 3]


async def test_only_what_was_asked_for_is_shown() -> None:
    payloads = encoded(sms(1), sms(2, list_number=OTHER), sms(3, metadata={"list_number": OTHER}), sms(4, body=OTHER))
    assert [line["index"] for line in await shown_of(Choice(list_number=OTHER), payloads)] == [2]
    assert len(await shown_of(Choice(account_id=42), payloads)) == 4
    watchers = Watchers()
    with watchers.watch(Choice(account_id=43)) as of_another, watchers.watch(Choice(list_number="+18")) as of_none:
        watchers.see(42, {NUMBER, OTHER}, payloads, acked(payloads))
        assert not of_another._kept
        assert not of_none._kept


async def test_who_reads_too_slowly_misses_what_finds_no_room_and_is_told() -> None:
    shown = await shown_of(Choice(), encoded(*map(sms, range(MOST_KEPT_PAYLOADS + 17))))
    assert shown[0] == {"missed": 17}
    assert shown[1]["index"] == 0


async def test_what_is_kept_for_the_slow_is_bounded_in_octets() -> None:
    payloads = encoded(*(sms(n, body="x" * 1_000_000) for n in range(20)))
    watchers = Watchers()
    with watchers.watch(Choice()) as watcher:
        watchers.see(42, {NUMBER}, payloads, acked(payloads))
        assert sum(len(payload) for _, payload in watcher._kept) <= MOST_KEPT_OCTETS + len(payloads[0])
        shown = decoded(await watcher.next_lines())
        assert shown[0] == {"missed": 20 - len(shown[1:])}
        assert watcher._octets == 0
        watchers.see(42, {NUMBER}, payloads[:1], acked(payloads[:1]))
        assert len(decoded(await watcher.next_lines())) == 1


async def test_lines_come_in_portions_and_the_rest_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SIGN_OF_LIFE_S", 0.05)
    payloads = encoded(*map(sms, range(250)))
    watchers = Watchers()
    with watchers.watch(Choice()) as watcher:
        watchers.see(42, {NUMBER, OTHER}, payloads, acked(payloads))
        portions = [decoded(await watcher.next_lines()) for _ in range(3)]
        assert [len(portion) for portion in portions] == [100, 100, 50]
        assert [line["index"] for portion in portions for line in portion] == list(range(250))
        assert await watcher.next_lines() == watching.SIGN_OF_LIFE


async def test_watchers_are_few_and_go_when_the_process_does() -> None:
    watchers = Watchers()
    with watchers.watch(Choice()), watchers.watch(Choice()), watchers.watch(Choice()):
        with watchers.watch(Choice()) as last:
            assert len(watchers._watchers) == MOST_WATCHERS
            with pytest.raises(TooManyWatchers), watchers.watch(Choice()):
                pass
            watchers.close()
            assert last.is_over
        with watchers.watch(Choice()) as late:
            assert late.is_over
    assert not watchers._watchers
