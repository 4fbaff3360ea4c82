"""A seed repeats its draw, and a leak is found in the samples."""

from xml.etree import ElementTree

import pytest

from tests.faults.soak import TOO_SHORT, Nemesis, Sample, leaks, picture


def test_the_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    def drawn(seed: int) -> list[tuple[str, float, bool]]:
        nemesis = Nemesis(seed)
        rounds = [nemesis.draw() for _ in range(50)]
        return [(scenario.name, scenario.hold_s, scenario.load.keyed) for scenario in rounds]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert any(" + " in name for name, _, _ in drawn(7))


def samples(count: int, *, mb_each: float = 0.0, descriptors_each: float = 0.0) -> list[Sample]:
    """Return one sample a minute. The first is 30 MB smaller, as a process is that has just started."""
    return [
        Sample(60.0 * number, 70.0 + mb_each * number - 30 * (number == 0), int(20 + descriptors_each * number))
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("taken", "found"),
    [
        (samples(100), []),
        (samples(100, mb_each=0.1), []),
        (samples(100, mb_each=0.5), ["memory grew by 30 MB"]),
        (samples(100, descriptors_each=0.5), ["30 descriptors more than in the beginning"]),
        (samples(TOO_SHORT - 1, mb_each=9.0), []),
    ],
)
def test_what_grows_is_a_leak_and_what_warms_up_is_not(taken: list[Sample], found: list[str]) -> None:
    assert leaks(taken) == found


def test_the_picture_is_well_formed_and_shows_every_sample() -> None:
    svg = ElementTree.fromstring(picture(samples(20)))  # noqa: S314 - our own text
    lines = [line.attrib["points"].split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [20, 20]
