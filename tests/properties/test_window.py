"""The confirm window keeps its bounds under any order of confirms. Promise 8."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.window import FLOOR_MESSAGES, ConfirmWindow
from tests.properties import MORE


def window(most: int = 100_000, bytes_a_message: int = 1_000) -> ConfirmWindow:
    opened = ConfirmWindow(most_messages=most, most_bytes=most * bytes_a_message, target_s=2.0)
    opened.messages = most
    return opened


def adapt(w: ConfirmWindow, messages: int, *, published_at: float, now: float, unconfirmed: int = 100_000) -> None:
    w.adapt(messages, unconfirmed=unconfirmed, published_at=published_at, now=now)


@settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1_000), st.floats(0, 30), st.floats(0, 30)), max_size=60))
def test_the_window_never_leaves_its_bounds(batches: list[tuple[int, float, float]]) -> None:
    w = window()
    for messages, published_at, waited_s in batches:
        adapt(w, messages, published_at=published_at, now=published_at + waited_s)
        assert FLOOR_MESSAGES <= w.messages <= 100_000
        assert 0 <= w.confirm_s <= 30
