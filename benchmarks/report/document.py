"""A report as data: tables, charts and sentences. page.py and terminal.py render it. No IO, no clock."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.report.figures import Figure
from benchmarks.report.machine import Machine


class Verdict(NamedTuple):
    """A word that is shown in green (good), in red (bad) or plainly (None)."""

    text: str
    is_good: bool | None


Cell = str | Figure | Verdict | None


class Table(NamedTuple):
    """A table. The first `text_columns` are aligned to the left, the others to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1


class Chart(NamedTuple):
    """A plot, as inline SVG with an optional legend. The terminal leaves it out."""

    title: str
    svg: str


class Sentence(NamedTuple):
    """A line of text, in red when `is_bad`."""

    text: str
    is_bad: bool = False


class Report(NamedTuple):
    """Everything that one command shows, in order."""

    title: str
    machine: Machine
    parts: Sequence[Table | Chart | Sentence]
