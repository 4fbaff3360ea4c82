"""Scenarios cite promises that docs/reliability.md makes, and every promise is cited."""

import pytest

from tests.faults import overload
from tests.faults.promises import PROMISES, read_promises
from tests.faults.scenarios import SCENARIOS

CITED = {number for scenario in SCENARIOS.values() for number in scenario.promises} | set(overload.PROMISES_SHOWN)


def test_every_cited_promise_is_made_and_every_promise_is_cited() -> None:
    assert set(PROMISES) == CITED


def test_the_table_is_read_without_markdown() -> None:
    rows = "| 1 | **A count** holds: `n` | x |\n| 2 | Two | y |\n\n| 3 | of another table |\n"
    assert read_promises(f"\n| # | promise | kept by |\n|---|---|---|\n{rows}") == {1: "A count holds: n", 2: "Two"}


@pytest.mark.parametrize("rows", ["", "| 2 | from the middle | x |", "| 1 | a | x |\n| 1 | twice | x |"])
def test_a_table_that_is_missing_or_misnumbered_is_refused(rows: str) -> None:
    with pytest.raises(ValueError, match="no table of promises"):
        read_promises(f"| # | promise | kept by |\n|---|---|---|\n{rows}\n\n")
