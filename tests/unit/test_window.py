"""The window follows the broker: wide while confirms are quick, narrow when they are slow, never shut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.window import FLOOR_MESSAGES, ConfirmWindow


def window(most: int = 100_000) -> ConfirmWindow:
    return ConfirmWindow(most_messages=most, target_s=2.0)


def test_quick_confirms_leave_it_wide_open() -> None:
    w = window()
    for now in range(1, 50):
        w.note(1_000, written_at=now - 1.9, now=now)
    assert w.messages == 100_000


def test_slow_confirms_narrow_it_down_to_the_floor_and_no_further() -> None:
    w = window()
    widths = []
    for n in range(20):
        w.note(1_000, written_at=10.0 * n, now=10.0 * n + 2.1)
        widths.append(w.messages)
    assert widths[:3] == [70_000, 49_000, 34_300]
    assert widths[-1] == FLOOR_MESSAGES


def test_batches_that_were_on_the_wire_together_narrow_it_once() -> None:
    w = window()
    for n in range(90):
        w.note(1_000, written_at=0.001 * n, now=5.0 + 0.001 * n)
    assert w.messages == 70_000


def test_it_opens_again_by_what_is_confirmed_in_time() -> None:
    w = window()
    w.note(1_000, written_at=0.0, now=5.0)
    for n in range(10):
        w.note(1_000, written_at=6.0 + n, now=6.1 + n)
    assert w.messages == 80_000


def test_a_window_smaller_than_the_floor_stays_what_it_is() -> None:
    w = window(most=1_000)
    w.note(1_000, written_at=0.0, now=9.0)
    assert w.messages == 1_000


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1_000), st.floats(0, 30), st.floats(0, 30)), max_size=60))
def test_it_never_leaves_its_bounds(batches: list[tuple[int, float, float]]) -> None:
    w = window()
    for messages, written_at, waited_s in batches:
        w.note(messages, written_at=written_at, now=written_at + waited_s)
        assert FLOOR_MESSAGES <= w.messages <= 100_000
        assert 0 <= w.confirm_s <= 30
