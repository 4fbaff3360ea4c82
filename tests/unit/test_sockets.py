"""The number of connections fits the descriptors that the process may have."""

import resource

import pytest

from gateway.web.sockets import SPARE_DESCRIPTORS, Limits, fit_descriptors

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "connections"),
    [
        (UNLIMITED, UNLIMITED, None, 1_000),
        (1_000 + SPARE_DESCRIPTORS, 4_096, None, 1_000),
        (256, UNLIMITED, 1_000 + SPARE_DESCRIPTORS, 1_000),
        (256, 4_096, 1_000 + SPARE_DESCRIPTORS, 1_000),
        (256, 512, 512, 512 - SPARE_DESCRIPTORS),
        (64, 64, 64, 1),
    ],
)
def test_connections_leave_descriptors_for_everything_else(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None, connections: int
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert fit_descriptors(Limits(1.0, 1.0, 1_000)).max_connections == connections
    assert raised == ([] if raised_to is None else [(raised_to, hard)])
