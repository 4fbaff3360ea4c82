"""Admission keeps its limits under any order of requests. Promise 8."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Overloaded
from gateway.ingest.admission import Admission
from tests.properties import MORE

strangers = count(1_000)


@contextmanager
def held(admission: Admission, size: int, account_id: int | None = None) -> Iterator[None]:
    """Hold a slot and `size` bytes, for the given account or for a new one."""
    with admission.admit() as place:
        place.reserve(next(strangers) if account_id is None else account_id, size)
        yield


@settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)
@given(
    comings=st.lists(st.integers(0, 60), max_size=30),
    goings=st.lists(st.integers(0, 29), max_size=30),
)
def test_neither_limit_is_ever_passed_and_nothing_that_fits_is_refused(comings: list[int], goings: list[int]) -> None:
    admission = Admission(max_requests=4, max_bytes=100)
    inside: list[tuple[int, ExitStack]] = []
    for size, leaves in zip(comings, [*goings, *[0] * 30], strict=False):
        place = ExitStack()
        fits = len(inside) < 4 and sum(held for held, _ in inside) + size <= 100
        try:
            place.enter_context(held(admission, size))
        except Overloaded:
            assert not fits
        else:
            assert fits
            inside.append((size, place))
        if leaves % 3 and inside:
            inside.pop(leaves % len(inside))[1].close()
        assert (admission.requests, admission.reserved_bytes) == (len(inside), sum(held for held, _ in inside))
    for _, place in inside:
        place.close()
    assert (admission.requests, admission.reserved_bytes) == (0, 0)
