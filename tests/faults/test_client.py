"""The callers under steady load."""

import asyncio

import pytest

from tests.faults.client import Load, SteadyLoad
from tests.support.callers import NOBODY


async def fail_beside_the_load() -> None:
    async with SteadyLoad(["http://127.0.0.1:1"], NOBODY, Load()):
        await asyncio.sleep(0.01)
        raise TimeoutError("never served")


async def test_an_error_beside_the_load_is_raised_and_not_hidden_by_the_end_of_the_load() -> None:
    with pytest.raises(TimeoutError, match="never served"):
        await fail_beside_the_load()
