"""Waiting for a condition, for as long as a busy machine may need."""

import asyncio
from collections.abc import Callable


async def eventually(holds: Callable[[], bool], *, timeout: float = 60.0) -> None:
    """Return as soon as `holds()` is true. Raises TimeoutError after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not holds():  # noqa: ASYNC110 - what we wait for knows nothing of us, and sets no event
            await asyncio.sleep(0.01)
