"""A well-behaved caller beside an attack, whose requests must not be affected by it."""

import asyncio
import time
from statistics import quantiles
from types import TracebackType
from typing import Self

import aiohttp

from tests.support.callers import Caller


class Neighbour:
    """A caller that sends one valid batch after another over a kept connection, during an `async with` block."""

    def __init__(self, url: str, caller: Caller, *, messages: int = 1, pause_s: float = 0.005) -> None:
        self.caller = caller
        self.counted = 0  # messages
        self.failures: list[str] = []  # every answer that is not a full success
        self.took_s: list[float] = []
        self._url = url
        self._messages = messages
        self._pause_s = pause_s
        self._is_stopping = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        self._task = asyncio.create_task(self._keep_sending())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        await self._session.close()

    async def stop(self) -> None:
        """Send no more, and wait for the last answer."""
        self._is_stopping = True
        await self._task

    async def _keep_sending(self) -> None:
        body = self.caller.body(self._messages)
        while not self._is_stopping:
            began = time.monotonic()
            try:
                async with self._session.post(self._url, data=body, headers=self.caller.headers) as response:
                    answer = await response.json()
                self.counted += answer.get("queued_count", 0)
                if (response.status, answer.get("queued_count")) != (200, self._messages):
                    self.failures.append(f"{response.status} {answer}")
            except (aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(repr(error))
            self.took_s.append(time.monotonic() - began)
            await asyncio.sleep(self._pause_s)

    async def measure(self, seconds: float) -> float:
        """Return the 99th percentile of the answer times in the next seconds, in milliseconds."""
        first = len(self.took_s)
        await asyncio.sleep(seconds)
        return self.p99_ms(first)

    def p99_ms(self, first: int = 0) -> float:
        """Return the 99th percentile of the answer times from request `first` on, in milliseconds."""
        took_s = self.took_s[first:]
        return 1000 * (quantiles(took_s, n=100)[-1] if len(took_s) > 1 else max(took_s, default=0.0))
