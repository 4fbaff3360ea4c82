"""ConfirmTracker against a slow and obvious model: one dictionary entry per message. Promises 2 and 3."""

from dataclasses import dataclass
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.confirms import ConfirmTracker, Outcome, PublishedRange
from tests.properties import MORE

EXAMPLES = settings(derandomize=MORE == 1, max_examples=400 * MORE, deadline=None)

ACKED, NACKED, RETURNED, UNKNOWN = Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN


class Model:
    """A model of outcomes, one message at a time."""

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
class AckRange:
    first: int
    last: int


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
        st.builds(lambda first, count: AckRange(first, first + count), tags, st.integers(0, 6)),
        st.builds(Return, st.integers(0, 8)),
        st.just(Withdraw()),
    ),
    min_size=12,
    max_size=40,
)


@EXAMPLES
@given(steps=steps, is_lost_at_the_end=st.booleans())
def test_in_any_order_of_events_every_message_ends_as_the_model_says(
    steps: list[Add | Settle | AckRange | Return | Withdraw], is_lost_at_the_end: bool
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
            case AckRange(first, last):
                settled = tracker.ack_range(first, last)
                for tag in range(first, last + 1):
                    model.settle(tag, ACKED)
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
