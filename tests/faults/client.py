"""Callers under steady load. They record what the gateway answered about every message."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from itertools import count, takewhile
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec

from tests.faults.ledger import NO_ANSWER, Attempt
from tests.support.callers import SEND_PATH, SINGLE_PATH, Caller
from tests.support.eventually import eventually

CONNECT_TIMEOUT_S = 2.0
UPLOAD_S, PIECES = 3.0, 12
SINGLE_EVERY = 4  # of so many requests, one is a single send
AFTER_A_FAILURE_S = 0.1  # short, so that the moment of recovery is seen
IN_PROGRESS = "idempotency_in_progress"


class Load(NamedTuple):
    """The number of callers, the size and the pace of their batches."""

    workers: int = 2  # per gateway, each with a keep-alive connection and one request at a time
    batch: int = 50
    every_s: float = 0.2
    # Send again with the same Idempotency-Key, perhaps to another gateway, until nothing is unknown.
    keyed: bool = False
    repeated: bool = False  # and then once more: the answer must be the stored one
    patience_s: float = 30.0
    uploads: int = 0  # more workers per gateway, whose bodies take UPLOAD_S to arrive


class SteadyLoad:
    """Callers that send during an `async with` block; `attempts` is the record of their requests."""

    def __init__(self, targets: Sequence[str], caller: Caller, load: Load) -> None:
        # Every text begins with it, which tells these messages from those of another load.
        self.name = uuid.uuid4().hex[:8]
        self.attempts: list[Attempt] = []
        self._targets = targets
        self._caller = caller
        self._load = load
        self._batches = count()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight: set[float] = set()  # the moment at which each request without an answer was sent

    async def __aenter__(self) -> Self:
        workers = (self._load.workers + self._load.uploads) * len(self._targets)
        timeout = aiohttp.ClientTimeout(total=self._load.patience_s, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(workers)]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                await self.stop()
            else:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
        finally:
            await self._session.close()

    async def stop(self) -> None:
        """Begin no further batch, and wait for requests in flight. Raises TimeoutError, and what a worker raised."""
        self._stopping.set()
        async with asyncio.timeout(2 * self._load.patience_s):
            await asyncio.gather(*self._tasks)

    def served_since(self, moment: float) -> bool:
        """Return whether every gateway has counted a whole batch after `moment`."""
        good = {attempt.target for attempt in self.attempts if attempt.is_whole and attempt.answered_at >= moment}
        return len(good) == len(self._targets)

    def failed_since(self, moment: float) -> bool:
        """Return whether a request has failed after `moment`, or one sent before it has no answer yet."""
        recent = reversed(self.attempts)
        answered = takewhile(lambda attempt: attempt.answered_at >= moment, recent)
        return min(self._in_flight, default=moment) < moment or not all(attempt.is_whole for attempt in answered)

    async def serves(self, *, timeout: float) -> None:
        """Wait until every gateway has counted a whole batch from now on. Raises TimeoutError."""
        now = time.monotonic()
        await eventually(lambda: self.served_since(now), timeout=timeout)

    async def _work(self, number: int) -> None:
        # Evenly spread, not all at once.
        await asyncio.sleep(self._load.every_s * number / len(self._tasks))
        target = number % len(self._targets)
        is_slow = number >= self._load.workers * len(self._targets)
        while not self._stopping.is_set():
            began = time.monotonic()
            if self._load.keyed:
                await self._send_until_counted(target)
            else:
                attempt, _ = await self._send(target, next(self._batches), 0, is_slow=is_slow)
                if attempt.status != 200:
                    await asyncio.sleep(AFTER_A_FAILURE_S)
            await asyncio.sleep(max(0.0, began + self._load.every_s - time.monotonic()))

    async def _send_until_counted(self, target: int) -> None:
        """Send one batch with one key until the answer leaves nothing unknown, as a careful caller does."""
        batch = next(self._batches)
        for number in count():
            attempt, retry_after_s = await self._send(target, batch, number)
            if attempt.status == 200 and not attempt.unknown:
                if self._load.repeated:
                    again, _ = await self._send(target, batch, number + 1)
                    assert again.is_replay, f"the answer to {attempt.request_id} was not stored"
                return
            if attempt.code != IN_PROGRESS:
                target = (target + 1) % len(self._targets)
            await asyncio.sleep(retry_after_s)

    async def _send(self, target: int, batch: int, number: int, *, is_slow: bool = False) -> tuple[Attempt, float]:
        """Send one request and record it. Return the record, and the delay before a retry."""
        is_single = batch % SINGLE_EVERY == SINGLE_EVERY - 1 and not is_slow
        size = 1 if is_single else self._load.batch
        request_id = f"{self.name}.{batch}.{number}"
        messages = [
            {
                "to": "+14155551234",
                "list_number": self._caller.list_number,
                "body": f"{self.name} {batch} {index} {{{{messageId}}}}",
            }
            for index in range(size)
        ]
        headers = self._caller.headers | {"X-Request-Id": request_id}
        if self._load.keyed:
            headers["Idempotency-Key"] = f"{self.name}.{batch}"
        body = msgspec.json.encode(messages[0] if is_single else {"messages": messages})
        url = self._targets[target] + (SINGLE_PATH if is_single else SEND_PATH)
        if is_slow:
            headers["Content-Length"] = str(len(body))
        every_index = frozenset(range(size))
        retry_after_s = AFTER_A_FAILURE_S
        sent_at = time.monotonic()
        self._in_flight.add(sent_at)
        try:
            data = _in_pieces(body) if is_slow else body
            async with self._session.post(url, data=data, headers=headers) as response:
                answer = msgspec.json.decode(await response.read())
                status, replayed = response.status, "Idempotent-Replayed" in response.headers
                retry_after_s = float(response.headers.get("Retry-After", AFTER_A_FAILURE_S))
        except (aiohttp.ClientError, TimeoutError) as error:
            told: dict[str, Any] = {"status": NO_ANSWER, "code": type(error).__name__, "unknown": every_index}
        else:
            told = {"status": status, "is_replay": replayed} | _told(status, answer, size)
        finally:
            self._in_flight.discard(sent_at)
        attempt = Attempt(request_id, target, batch, size, sent_at, time.monotonic(), **told)
        self.attempts.append(attempt)
        return attempt, retry_after_s


async def _in_pieces(body: bytes) -> AsyncIterator[bytes]:
    """Yield the body in PIECES pieces, over UPLOAD_S."""
    size = len(body) // PIECES + 1
    for start in range(0, len(body), size):
        yield body[start : start + size]
        await asyncio.sleep(UPLOAD_S / PIECES)


def _told(status: int, answer: dict[str, Any], size: int) -> dict[str, Any]:
    """Return what an answer says about each message, as fields of an Attempt."""
    every_index = frozenset(range(size))
    if status != 200:
        # 504: the outcome is unknown. Any other refusal, 503 among them, promises that nothing was queued.
        certain = every_index if status != 504 else frozenset()
        return {"code": answer.get("code", ""), "refused": certain, "unknown": every_index - certain}
    if "success" in answer:
        assert answer["success"] is True, answer
        assert size == 1, answer
        return {}
    rows = answer["errors"]
    assert answer["queued_count"] + answer["error_count"] == size, answer
    assert answer["error_count"] == len({row["index"] for row in rows}) == len(rows), answer
    unknown = frozenset(row["index"] for row in rows if row.get("may_be_queued"))
    refused = frozenset(row["index"] for row in rows) - unknown
    return {"code": "+".join(sorted({row["code"] for row in rows})), "refused": refused, "unknown": unknown}
