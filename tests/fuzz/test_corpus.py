"""The corpus: inputs that once showed a defect, each named after it. They must find nothing any more."""

from pathlib import Path

import pytest

from testbed import Servers
from tests.fuzz.campaigns import CORPUS
from tests.fuzz.fuzzed_gateway import open_fuzzed_gateway
from tests.fuzz.raw import HttpFuzzer

HTTP = sorted((CORPUS / "http").iterdir())


async def test_nothing_that_was_found_over_http_is_found_again(servers: Servers) -> None:
    """Send each file as it is, then cut off. In a file, KEY and LIST stand for the caller's own."""
    async with open_fuzzed_gateway(servers.environment()) as gateway:
        fuzzer = HttpFuzzer(gateway, 1)
        caller = gateway.damaged
        for path in HTTP:
            data = path.read_bytes().replace(b"KEY", caller.key.encode())
            data = data.replace(b"LIST", caller.list_number.encode())
            await fuzzer.converse_damaged([], data)
            for _ in range(20):
                await fuzzer.hang_up(data)
        await gateway.settle()
        assert fuzzer.tally.findings == []
        assert gateway.faults() == []


@pytest.mark.parametrize("target", ["requests", "frames"])
def test_nothing_that_was_found_in_the_pure_modules_is_found_again(target: str) -> None:
    pure = pytest.importorskip("tests.fuzz.pure", reason="atheris has no wheel for this machine")
    judge, _ = pure.TARGETS[target]
    paths: list[Path] = sorted((CORPUS / target).iterdir())
    assert paths
    for path in paths:
        judge(path.read_bytes())
