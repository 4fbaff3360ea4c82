"""The numbered promises of docs/reliability.md, which scenarios cite. The table there is the only list."""

import re
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


class Promise(NamedTuple):
    """A row of the table, without Markdown."""

    text: str
    shown_by: str


def read_promises(document: str) -> dict[int, Promise]:
    """Return the rows, by number, of the table whose columns begin with `#` and `promise` and end with `shown by`.

    Raises ValueError when there is no such table, or when its rows are not numbered from 1.
    """
    _, _, after = document.partition("\n| # | promise |")
    table, _, _ = after.partition("\n\n")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|.*\| (.+?) \|$", table.replace("`", ""), re.MULTILINE)
    if not rows or [int(number) for number, *_ in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{DOCUMENT.name} has no table of promises, numbered from 1")
    return {int(number): Promise(*cells) for number, *cells in rows}


PROMISES = read_promises(DOCUMENT.read_text())
