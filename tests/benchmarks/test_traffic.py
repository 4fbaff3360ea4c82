"""Shares of bad messages, sizes of texts, and the same bytes in every run."""

import msgspec
import pytest

from benchmarks.drivers import traffic
from gateway.ingest import batch, decoding

LISTS = ["+18005551000", "+18005552000"]


@pytest.mark.parametrize(("kinds", "count"), [(16, 1), (16, 10), (4, 1_000)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_bad_messages_holds_over_all_bodies(kinds: int, count: int, share: float) -> None:
    bodies = traffic.request_bodies(kinds, count, LISTS, bad_share=share)
    assert sum(good for _, good in bodies) == round(kinds * count * (1 - share))
    for body, good in bodies:
        draft = batch.validate(decoding.decode_bulk(body))
        assert len(draft.messages) == good


def test_lists_take_turns() -> None:
    numbers = [message["list_number"] for message in traffic.messages(4, LISTS)]
    assert numbers == LISTS * 2


@pytest.mark.parametrize("length", [1, 10, 50, 5_000])
def test_texts_have_the_length_asked_for(length: int) -> None:
    assert {len(message["body"]) for message in traffic.messages(3, LISTS, body_length=length)} == {length}


def test_every_run_sends_the_same() -> None:
    assert traffic.request_bodies(3, 10, LISTS) == traffic.request_bodies(3, 10, LISTS)


def test_envelopes_carry_every_payload_once() -> None:
    payloads = traffic.payloads(25)
    carried = [msgspec.json.decode(envelope) for envelope in traffic.envelopes(payloads, 10)]
    assert [len(one) for one in carried] == [10, 10, 5]
    assert [sms for one in carried for sms in one] == [msgspec.json.decode(payload) for payload in payloads]
