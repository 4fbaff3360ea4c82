"""Scenarios cite exactly the promises of docs/reliability.md that, according to its table, they show."""

import pytest

from tests.faults import overload
from tests.faults.promises import PROMISES, Promise, read_promises
from tests.faults.scenarios import SCENARIOS

HEAD = "\n| # | promise | how it is kept | shown by |\n|---|---|---|---|\n"


def test_the_scenarios_cite_the_promises_that_the_document_says_they_show() -> None:
    cited = {number for scenario in SCENARIOS.values() for number in scenario.promises} | set(overload.PROMISES_SHOWN)
    claimed = {
        number
        for number, promise in PROMISES.items()
        if "scripts/faults" in promise.shown_by or "scripts/soak" in promise.shown_by
    }
    assert cited == claimed


def test_every_scenario_that_the_document_names_is_one() -> None:
    for promise in PROMISES.values():
        _, _, named = promise.shown_by.partition("--scenario ")
        assert not named or named.partition(",")[0] in {*SCENARIOS, "overload"}


def test_the_table_is_read_without_markdown() -> None:
    rows = "| 1 | A count holds: `n` | by | `x` |\n| 2 | Two | | y |\n\n| 3 | of another | table | z |\n"
    assert read_promises(HEAD + rows) == {1: Promise("A count holds: n", "x"), 2: Promise("Two", "y")}


@pytest.mark.parametrize("rows", ["", "| 2 | from | the | middle |", "| 1 | a | b | c |\n| 1 | twice | b | c |"])
def test_a_table_that_is_missing_or_misnumbered_is_refused(rows: str) -> None:
    with pytest.raises(ValueError, match="no table of promises"):
        read_promises(HEAD + rows + "\n\n")
