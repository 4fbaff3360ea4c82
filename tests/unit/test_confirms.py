"""ConfirmTracker against a model that is obvious and slow: one dictionary entry per message, no ranges, no tables."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.confirms import ConfirmTracker, Outcome, PublishedRange

EXAMPLES = settings(derandomize=True, max_examples=400, deadline=None)

ACKED, NACKED, RETURNED, UNKNOWN = Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN


class Model:
    """What the contract says, one message at a time."""

    def __init__(self) -> None:
        self.next_tag = 1
        self.outcome: dict[int, Outcome | None] = {}  # by tag; None: unsettled
        self.returned: set[int] = set()
        self.tag_of: dict[str, int] = {}
        self.lost = False

    def add(self, ids: list[str]) -> list[int]:
        tags = list(range(self.next_tag, self.next_tag + len(ids)))
        self.next_tag += len(ids)
        for tag, message_id in zip(tags, ids, strict=True):
            self.outcome[tag] = None
            self.tag_of[message_id] = tag
        return tags

    def settle(self, tag: int, outcome: Outcome) -> None:
        if tag in self.outcome and self.outcome[tag] is None:
            self.outcome[tag] = RETURNED if tag in self.returned else outcome

    def settle_up_to(self, tag: int, outcome: Outcome, *, multiple: bool) -> None:
        if tag >= self.next_tag:  # never given out: changes nothing, multiple or not
            return
        for each in list(self.outcome) if multiple else [tag]:
            if each <= tag:
                self.settle(each, outcome)

    def return_(self, message_id: str) -> bool:
        tag = self.tag_of.get(message_id)
        if tag is None or tag in self.returned or self.outcome[tag] is not None:
            return False
        self.returned.add(tag)
        return True

    def lose(self) -> None:
        for tag in self.outcome:
            self.settle(tag, UNKNOWN)

    def withdraw(self, tags: list[int]) -> None:
        for tag in tags:
            del self.outcome[tag]
            self.returned.discard(tag)
        self.tag_of = {message_id: tag for message_id, tag in self.tag_of.items() if tag not in tags}
        self.next_tag = tags[0]


@dataclass
class Add:
    size: int


@dataclass
class Settle:
    acked: bool
    tag: int
    multiple: bool


@dataclass
class Return:
    number: int  # of the message, counted over everything ever added; some were never


class Lose:
    pass


class Withdraw:
    pass


# Few messages, so that what happens often happens to the same one twice.
tags = st.integers(-1, 10)
steps = st.lists(
    st.one_of(
        st.builds(Add, st.integers(1, 3)),
        st.builds(Add, st.integers(1, 3)),
        st.builds(Settle, st.booleans(), tags, st.booleans()),
        st.builds(Settle, st.booleans(), tags, st.booleans()),
        st.builds(Settle, st.just(True), tags, st.just(False)),
        st.builds(Return, st.integers(0, 8)),
        st.just(Withdraw()),
    ),
    min_size=12,
    max_size=40,
)


@EXAMPLES
@given(steps=steps, is_lost_at_the_end=st.booleans())
def test_whatever_the_order_every_message_ends_as_the_model_says(
    steps: list[Add | Settle | Return | Withdraw], is_lost_at_the_end: bool
) -> None:
    tracker, model, numbers = ConfirmTracker(), Model(), count()
    ranges: dict[PublishedRange, list[int]] = {}  # to their tags
    reported: list[PublishedRange] = []

    def unsettled(published: PublishedRange) -> int:
        return sum(model.outcome[tag] is None for tag in ranges[published])

    for step in [*steps, *([Lose()] if is_lost_at_the_end else [])]:
        settled: list[PublishedRange] = []
        match step:
            case Add(size):
                ids = [f"id{next(numbers):06}" for _ in range(size)]
                published = tracker.add(ids)
                ranges[published] = model.add(ids)
                assert (published.first_tag, published.last_tag) == (ranges[published][0], ranges[published][-1])
            case Settle(acked, tag, multiple):
                settled = tracker.settle(acked=acked, delivery_tag=tag, multiple=multiple)
                model.settle_up_to(tag, ACKED if acked else NACKED, multiple=multiple)
            case Return(number):
                message_id = f"id{number:06}"
                assert tracker.mark_returned(message_id) == model.return_(message_id)
            case Withdraw():
                newest = next(reversed(ranges), None)
                if newest is None or newest in reported or unsettled(newest) < len(newest.ids):
                    continue  # the publisher withdraws nothing but what was just added
                tracker.withdraw(newest)
                model.withdraw(ranges.pop(newest))
            case Lose():
                settled = tracker.lose()
                model.lose()
        # Each range is reported once, by the very call that settled its last message, in the order of publishing.
        assert settled == [known for known in ranges if known not in reported and not unsettled(known)]
        reported += settled
        waiting = [known for known in ranges if known not in reported]
        assert tracker.oldest() is (waiting[0] if waiting else None)
        for published, its_tags in ranges.items():
            assert published.unsettled == unsettled(published)
            expected = [model.outcome[tag] for tag in its_tags]
            if None not in expected:
                assert list(published.outcomes()) == expected
            else:  # what is not settled is unknown, or known to have come back; never queued
                assert list(published.outcomes()) == [
                    (RETURNED if tag in model.returned else UNKNOWN) if outcome is None else outcome
                    for tag, outcome in zip(its_tags, expected, strict=True)
                ]


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


def test_a_batch_settled_before_its_elders_is_reported_at_once_and_only_once() -> None:
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
def test_what_came_back_stays_returned_though_it_is_acked(settle: Settling) -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(2))
    assert tracker.mark_returned("id000001")
    assert published.unsettled == 2  # a return settles nothing: its ack follows
    assert settle(tracker, 2) == []
    assert ack(tracker, 1) == [published]
    assert list(published.outcomes()) == [ACKED, RETURNED]


def test_a_lost_channel_leaves_the_written_unknown_and_the_returned_returned() -> None:
    tracker = ConfirmTracker()
    published = tracker.add(ids(4))
    ack(tracker, 1)
    nack(tracker, 2)
    tracker.mark_returned("id000002")
    assert tracker.lose() == [published]
    assert list(published.outcomes()) == [ACKED, NACKED, RETURNED, UNKNOWN]
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


def test_where_a_nack_says_nothing_certain_it_is_unknown() -> None:
    """A classic queue that dies has messages nacked that it has on disk."""
    tracker = ConfirmTracker(nacked=Outcome.UNKNOWN)
    published = tracker.add(["A", "B"])
    tracker.settle(acked=False, delivery_tag=2, multiple=True)
    assert list(published.outcomes()) == [Outcome.UNKNOWN] * 2
