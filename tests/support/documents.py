"""The examples in the documents, as tests run them."""

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]


def code_blocks(page: str, heading: str, language: str = "") -> list[str]:
    """Return the blocks of a language under a heading of a page, up to the next heading of its level."""
    text = (ROOT / page).read_text(encoding="utf-8")
    level = len(heading.split(" ")[0])
    end = rf"(?=^#{{2,{level}}} |\Z)"
    section = re.search(rf"^{re.escape(heading)}\n(.*?){end}", text, re.MULTILINE | re.DOTALL)
    assert section, f"{page} has no heading {heading}"
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", section[1], re.MULTILINE | re.DOTALL)
    return [dedent(block) for _, name, block in found if name == language]


def row_of_versions(name: str) -> str:
    """Return the row of docs/operations.md, "Tested versions"."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {name} \|.*$", text.partition("\n## Tested versions\n")[2], re.MULTILINE)
    assert row, f"{name} has no row"
    return row[0]


def filled_in(text: str, **replacements: str) -> str:
    """Replace each value in a text; every value must occur."""
    for old, new in replacements.items():
        assert old in text, f"no {old}"
        text = text.replace(old, new)
    return text
