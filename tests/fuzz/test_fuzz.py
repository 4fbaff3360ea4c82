"""A few seconds of each campaign, always with the same seed; `scripts/fuzz` runs them longer."""

import importlib.util
from pathlib import Path

import pytest

from testbed import Servers
from tests.fuzz import campaigns

SEED = 2026
MOST = {"http": 2_000, "document": 4, "requests": 10_000, "frames": 10_000}
SECONDS = {"document": 12}  # it takes all its time; the others end with their number of cases


@pytest.mark.parametrize("target", MOST)
async def test_a_short_campaign_finds_nothing(servers: Servers, tmp_path: Path, target: str) -> None:
    if target in ("requests", "frames") and importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this machine")
    result = await campaigns.run_campaign(
        target, servers.environment(), SEED, SECONDS.get(target, 60), tmp_path, most=MOST[target]
    )
    print(f"{target}: {result.cases:,} cases, seed {SEED}", *result.notes, sep="\n    ")
    assert result.findings == []
    assert result.cases >= MOST[target]
