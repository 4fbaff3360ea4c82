"""One pattern for E.164 numbers: all copies of `batch.E164` outside the gateway are equal to it."""

import re
from pathlib import Path

import pytest

from gateway.ingest.batch import E164

ROOT = Path(__file__).parents[2]
COPIES = [
    "migrations/20261123000000_accounts_keys_lists.sql",
    "gateway/web/openapi.json",
    "docs/asyncapi.yaml",
    "examples/consumer/payloads.py",
    "benchmarks/drivers/fastapi_service.py",
]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_pattern_is_equal_to_it(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\\", "\\")  # JSON escapes the backslash
    patterns = re.findall(r"\^(\\\+\[1-9\].*?)(?:\$|\\Z)", text)
    assert patterns == [E164] * len(patterns)
    assert patterns, "the copy is gone: remove it from the list"


def test_there_are_no_other_copies() -> None:
    files = [
        path
        for folder in ("gateway", "migrations", "docs", "examples", "benchmarks", "testbed")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sql", ".json", ".yaml")
    ]
    found = {str(path.relative_to(ROOT)) for path in files if re.search(r"\\\+\[1-9\]\[0-9\]\{1,", path.read_text())}
    assert found == {*COPIES, "gateway/ingest/batch.py"}
