"""The import rules of benchmarks/: questions → drivers, report. Reads source only."""

import ast
from pathlib import Path

import pytest

from benchmarks.drivers.workers import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
FORBIDDEN = {
    "drivers": ("benchmarks.questions", "benchmarks.report", "benchmarks.__main__"),
    "report": ("benchmarks.questions", "benchmarks.drivers", "benchmarks.__main__"),
    "questions": ("benchmarks.__main__",),
}


def imports_of(path: Path) -> set[str]:
    """Return the full dotted names of all imports. `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    paths = sorted((FOLDER / room).glob("*.py"))
    assert len(paths) > 1
    for path in paths:
        upwards = {name for name in imports_of(path) if name.startswith(FORBIDDEN[room])}
        assert not upwards, f"{path.name} imports {sorted(upwards)}"
