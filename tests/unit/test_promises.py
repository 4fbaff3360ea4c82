"""Promises are numbered once, in the table of docs/reliability.md: every citation is one of its numbers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = {
    int(number)
    for number in re.findall(r"^\| (\d+) \|", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"), re.MULTILINE)
}
# "promise 7", "promises 2, 3 and 4", "promises 1 to 3"; and the tuples of the scenarios: "promises=(1, 11)".
IN_PROSE = re.compile(r"\bpromises?\s+(\d+(?:(?:\s*,\s*|\s+and\s+|\s+to\s+)\d+)*)", re.IGNORECASE)
IN_CODE = re.compile(r"\bpromises(?:_\w+)?\b[^=()\n]*=\s*\(([\d, ]+)\)", re.IGNORECASE)

THIS = Path(__file__)
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != THIS]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*")) if path.is_file() and path.suffix != ".pyc"]


def numbers(citation: str) -> set[int]:
    """Return the numbers of a citation; "1 to 3" is a range."""
    found = {int(number) for number in re.findall(r"\d+", citation)}
    for first, last in re.findall(r"(\d+)\s+to\s+(\d+)", citation):
        found |= set(range(int(first), int(last) + 1))
    return found


def cited_in(text: str) -> set[int]:
    """Return the numbers of all promises that a text cites."""
    return {
        number for pattern in (IN_PROSE, IN_CODE) for citation in pattern.findall(text) for number in numbers(citation)
    }


def test_promises_are_numbered_from_1_without_a_gap() -> None:
    assert len(PROMISES) >= 15
    assert set(range(1, len(PROMISES) + 1)) == PROMISES


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Promise 7: from the commit on.", {7}),
        ("Promises 2, 3 and 4.", {2, 3, 4}),
        ("promises 1 to 3", {1, 2, 3}),
        ("promises: tuple[int, ...] = (1, 3)", {1, 3}),
        ("promises=(1, 11),", {1, 11}),
        ("PROMISES_SHOWN = (8,)", {8}),
        ("a compromise 5 and promised 6", set()),
    ],
)
def test_citations_are_found_in_every_form(text: str, numbers: set[int]) -> None:
    assert cited_in(text) == numbers


def test_every_cited_promise_is_one_of_the_table() -> None:
    wrong = {
        str(path.relative_to(ROOT)): unknown
        for path in [*TESTS, *PAGES, *SCRIPTS]
        if (unknown := cited_in(path.read_text(encoding="utf-8")) - PROMISES)
    }
    assert wrong == {}


def test_every_promise_is_cited_by_a_test_or_a_scenario() -> None:
    cited = {number for path in TESTS for number in cited_in(path.read_text(encoding="utf-8"))}
    assert PROMISES - cited == set()
