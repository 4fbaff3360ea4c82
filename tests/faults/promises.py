"""The numbered promises of docs/reliability.md, which scenarios cite. The table there is the only list."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def read_promises(text: str) -> dict[int, str]:
    """Return the promises by number, without Markdown, from the table with the columns `#` and `promise`.

    Raises ValueError when there is no such table, or a number is missing or stands there twice.
    """
    _, _, after = text.partition("| # | promise |")
    table, _, _ = after.partition("\n\n")
    rows = re.findall(r"^\| *(\d+) *\| *(.+?) *\|", table, re.MULTILINE)
    if not rows or [int(number) for number, _ in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{DOCUMENT.name} has no table of promises, numbered from 1")
    return {int(number): re.sub(r"[*`]", "", promise) for number, promise in rows}


PROMISES = read_promises(DOCUMENT.read_text())
