"""The confirm window grows while confirms are quick, and shrinks while they are slow."""

import pytest

from gateway.amqp.window import FLOOR_MESSAGES, START_MESSAGES, UNLIMITED, ConfirmWindow


def window(most: int = 100_000, bytes_a_message: int = 1_000) -> ConfirmWindow:
    opened = ConfirmWindow(most_messages=most, most_bytes=most * bytes_a_message, target_s=2.0)
    opened.messages = most
    return opened


def adapt(w: ConfirmWindow, messages: int, *, published_at: float, now: float, unconfirmed: int = 100_000) -> None:
    w.adapt(messages, unconfirmed=unconfirmed, published_at=published_at, now=now)


def test_the_window_starts_small_and_grows_while_it_is_used() -> None:
    w = ConfirmWindow(most_messages=100_000, most_bytes=10**9, target_s=2.0)
    assert w.messages == START_MESSAGES
    adapt(w, 1_000, published_at=0.0, now=0.1, unconfirmed=9_000)
    assert w.messages == START_MESSAGES, "who uses half of it shows nothing about the whole"
    adapt(w, 1_000, published_at=0.0, now=0.1, unconfirmed=10_000)
    assert w.messages == START_MESSAGES + 1_000


def test_the_window_starts_no_larger_than_its_limit() -> None:
    assert ConfirmWindow(most_messages=1_000, most_bytes=10**9, target_s=2.0).messages == 1_000


def test_there_is_room_for_what_is_not_unconfirmed() -> None:
    w = window(10_000)
    assert w.room(9_500) == 500
    assert w.room(12_000) == -2_000, "it has shrunk since"


def test_a_batch_larger_than_the_window_goes_alone() -> None:
    assert window(1_000).room(0) == UNLIMITED


def test_large_messages_weigh_more_and_grow_the_window_as_well() -> None:
    """If bytes had a limit of their own, a window that was narrow once would never be used up again."""
    w = window(100_000, bytes_a_message=1_000)
    assert w.weigh(1_000, 200_000) == 1_000
    assert w.weigh(100, 5_000_000) == 5_000
    w.messages = FLOOR_MESSAGES
    for n in range(100):
        load = w.weigh(100, 5_000_000)
        adapt(w, load, published_at=float(n), now=n + 0.2, unconfirmed=w.messages)
    assert w.messages == 100_000


def test_quick_confirms_leave_the_window_at_its_largest() -> None:
    w = window()
    for now in range(1, 50):
        adapt(w, 1_000, published_at=now - 2.0, now=now)  # exactly the target
    assert w.messages == 100_000


def test_the_time_to_confirm_is_smoothed() -> None:
    w = window()
    assert w.confirm_s == 0
    adapt(w, 1_000, published_at=10.0, now=11.0)
    adapt(w, 1_000, published_at=10.0, now=12.0)
    assert w.confirm_s == pytest.approx(0.1 * 2.0 + 0.9 * 0.1 * 1.0)


def test_slow_confirms_narrow_the_window_down_to_its_floor() -> None:
    w = window()
    widths = []
    for n in range(20):
        adapt(w, 1_000, published_at=10.0 * n, now=10.0 * n + 2.1)
        widths.append(w.messages)
    assert widths[:3] == [70_000, 49_000, 34_300]
    assert widths[-1] == FLOOR_MESSAGES == 2_000, "two full batches"


def test_batches_that_were_in_flight_together_narrow_the_window_once() -> None:
    w = window()
    for n in range(90):
        adapt(w, 1_000, published_at=0.001 * n, now=5.0 + 0.001 * n)
    assert w.messages == 70_000
    adapt(w, 1_000, published_at=5.0, now=9.0)  # written in the moment in which it narrowed
    assert w.messages == 70_000
    adapt(w, 1_000, published_at=5.001, now=9.0)
    assert w.messages == 49_000


def test_the_window_grows_again_with_what_is_confirmed_in_time() -> None:
    w = window()
    adapt(w, 1_000, published_at=0.0, now=5.0)
    for n in range(10):
        adapt(w, 1_000, published_at=6.0 + n, now=6.1 + n)
    assert w.messages == 80_000


def test_a_window_smaller_than_the_floor_stays_what_it_is() -> None:
    w = window(most=1_000)
    adapt(w, 1_000, published_at=0.0, now=9.0)
    assert w.messages == 1_000
