"""ConfirmTracker by example. Promises 2 and 3. Random orders of events: tests/properties/test_confirms.py."""

from collections.abc import Callable

import pytest

from gateway.amqp.confirms import REFUSED_IS_UNKNOWN, ConfirmTracker, Outcome, PublishedRange

ACKED, NACKED, RETURNED, UNKNOWN = Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN


def ids(size: int) -> list[str]:
    return [f"id{n:06}" for n in range(size)]


def ack(tracker: ConfirmTracker, tag: int, *, multiple: bool = False) -> list[PublishedRange]:
    return tracker.settle(acked=True, delivery_tag=tag, multiple=multiple)


def nack(tracker: ConfirmTracker, tag: int, *, multiple: bool = False) -> list[PublishedRange]:
    return tracker.settle(acked=False, delivery_tag=tag, multiple=multiple)


Settling = Callable[[ConfirmTracker, int], list[PublishedRange]]


def test_batches_take_contiguous_delivery_tags_from_1() -> None:
    tracker = ConfirmTracker()
    first, second = tracker.add(ids(3)), tracker.add(ids(2))
    assert (first.first_tag, first.last_tag, second.first_tag, second.last_tag) == (1, 3, 4, 5)


def test_one_ack_for_all_settles_every_older_batch() -> None:
    tracker = ConfirmTracker()
    first, second, third = (tracker.add(ids(2)) for _ in range(3))
    assert ack(tracker, 4, multiple=True) == [first, second]
    assert list(first.outcomes() + second.outcomes()) == [ACKED] * 4
    assert (third.unsettled, tracker.oldest()) == (2, third)


def test_an_ack_for_all_leaves_what_was_nacked_before() -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(3))
    assert nack(tracker, 2) == []
    assert ack(tracker, 3, multiple=True) == [published]
    assert list(published.outcomes()) == [ACKED, NACKED, ACKED]


def test_a_batch_settled_before_older_ones_is_reported_at_once_and_only_once() -> None:
    tracker = ConfirmTracker()
    elder, younger = tracker.add(ids(1)), tracker.add(ids(1))
    assert ack(tracker, 2) == [younger]
    assert tracker.oldest() is elder
    assert ack(tracker, 2, multiple=True) == [elder]
    assert ack(tracker, 2, multiple=True) == []


@pytest.mark.parametrize("multiple", [False, True])
@pytest.mark.parametrize("tag", [-1, 0, 4, 5, 2**63])
def test_a_tag_that_was_never_given_out_changes_nothing(tag: int, multiple: bool) -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(3))
    assert ack(tracker, tag, multiple=multiple) == []
    assert nack(tracker, tag, multiple=multiple) == []
    assert published.unsettled == 3
    assert list(published.outcomes()) == [UNKNOWN] * 3


def test_the_first_answer_counts_and_a_second_one_changes_nothing() -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(2))
    ack(tracker, 1)
    nack(tracker, 1)
    assert published.unsettled == 1
    assert nack(tracker, 2) == [published]
    assert ack(tracker, 2, multiple=True) == []
    assert list(published.outcomes()) == [ACKED, NACKED]


@pytest.mark.parametrize("settle", [ack, nack])
def test_a_returned_message_stays_returned_when_it_is_acked(settle: Settling) -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(2))
    assert tracker.mark_returned("id000001")
    assert published.unsettled == 2  # a return settles nothing: its ack follows
    assert settle(tracker, 2) == []
    assert ack(tracker, 1) == [published]
    assert list(published.outcomes()) == [ACKED, RETURNED]


@pytest.mark.parametrize("outcome", [UNKNOWN, NACKED])
def test_a_lost_channel_leaves_the_written_unknown_or_refused_and_the_returned_returned(outcome: Outcome) -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(4))
    ack(tracker, 1)
    nack(tracker, 2)
    tracker.mark_returned("id000002")
    assert tracker.lose(outcome) == [published]
    assert list(published.outcomes()) == [ACKED, NACKED, RETURNED, outcome]
    assert published.unsettled == 0
    assert tracker.oldest() is None


def test_confirms_after_the_loss_change_nothing() -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(2))
    tracker.lose()
    assert ack(tracker, 2, multiple=True) == []
    assert not tracker.mark_returned("id000000")
    assert tracker.lose() == []
    assert list(published.outcomes()) == [UNKNOWN] * 2


def test_a_return_is_taken_once_and_only_for_what_is_on_the_wire() -> None:
    tracker = ConfirmTracker()
    tracker.add(ids(2))
    ack(tracker, 1)
    assert not tracker.mark_returned("id000000"), "acked already"
    assert not tracker.mark_returned("stranger")
    assert tracker.mark_returned("id000001")
    assert not tracker.mark_returned("id000001"), "returned already"


def test_until_it_is_settled_a_message_is_unknown_and_never_acked() -> None:
    published = ConfirmTracker().add(ids(3))
    assert list(published.outcomes()) == [UNKNOWN] * 3
    assert published.unsettled == 3, "asking settles nothing"


def test_a_withdrawn_batch_gives_its_tags_to_the_next() -> None:
    tracker = ConfirmTracker()
    first = tracker.add(ids(2))
    tracker.withdraw(tracker.add(["never001", "never002"]))
    third = tracker.add(["id000009"])
    assert third.first_tag == 3
    assert not tracker.mark_returned("never001")
    assert ack(tracker, 3, multiple=True) == [first, third]


def test_only_the_newest_batch_can_be_withdrawn() -> None:
    tracker = ConfirmTracker()
    first, second = tracker.add(ids(1)), tracker.add(ids(1))
    with pytest.raises(ValueError, match="newest"):
        tracker.withdraw(first)
    tracker.withdraw(second)
    tracker.withdraw(first)
    with pytest.raises(ValueError, match="newest"):
        tracker.withdraw(first)


def test_a_nack_of_a_classic_queue_is_unknown() -> None:
    """A classic queue that dies nacks messages that it has on disk."""
    tracker = ConfirmTracker(nacked=Outcome.UNKNOWN)
    published = tracker.add(["A", "B"])
    tracker.settle(acked=False, delivery_tag=2, multiple=True)
    assert list(published.outcomes()) == [Outcome.UNKNOWN] * 2


def test_what_refuses_a_second_copy_says_nothing_of_the_first() -> None:
    outcomes = bytes([ACKED, NACKED, RETURNED, UNKNOWN, Outcome.TOO_LARGE])
    assert list(outcomes.translate(REFUSED_IS_UNKNOWN)) == [ACKED, *[UNKNOWN] * 4]


@pytest.mark.parametrize("touch", [lambda tracker: ack(tracker, 1), lambda tracker: tracker.mark_returned("id000000")])
def test_a_channel_is_untouched_until_its_first_confirm_or_return(touch: Callable[[ConfirmTracker], object]) -> None:
    tracker = ConfirmTracker()
    assert not tracker.is_untouched(), "the broker has been sent nothing"
    tracker.add(ids(1))
    tracker.add(["younger1"])
    assert tracker.is_untouched()
    touch(tracker)
    assert not tracker.is_untouched()
