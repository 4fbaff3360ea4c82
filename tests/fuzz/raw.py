"""The target `http`: conversations over raw sockets, pipelined, split anywhere, damaged byte by byte, cut off.

There are three kinds. All requests are whole: each must be answered, in order, as the OpenAPI document says. Or the
last request is damaged: every answer must be HTTP and as the document says. Or the conversation is cut off.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tests.fuzz.answers import Answer, AnswerReader, NotHttp
from tests.fuzz.fuzzed_gateway import FuzzedGateway
from tests.fuzz.requests import Request, Requests
from tests.support.callers import Caller
from tests.support.openapi_document import faults_of_either

CONVERSATIONS_AT_ONCE = 24
PIPELINED = (1, 2, 4, 8, 16, 32)
ANSWER_TIMEOUT_S = 20.0
QUIET_S = 0.15  # after a damaged request: a gateway that is silent for so long waits for more bytes
PATIENT_S = 2.5  # in a few conversations: longer than the gateway's own timeout
SENTINEL = "fuzz-sentinel"
MAY_REFUSE = {503, 504}  # of the statuses from 500 on


@dataclass
class Tally:
    """The counts and findings so far."""

    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, bytes]] = field(default_factory=list)  # a description, and the bytes that were sent


class HttpFuzzer:
    """A source of conversations, drawn from a seed."""

    def __init__(self, gateway: FuzzedGateway, seed: int) -> None:
        self._gateway = gateway
        self._address = urlsplit(gateway.process.url)
        self._random = random.Random(seed)  # noqa: S311 - conversations that can be repeated
        self._whole = Requests(f"{seed} whole", key=gateway.whole.key, list_number=gateway.whole.list_number)
        self._damaged = Requests(f"{seed} damaged", key=gateway.damaged.key, list_number=gateway.damaged.list_number)
        self.tally = Tally()

    async def run(self, *, until: float, most: int | None = None) -> None:
        """Hold conversations until time.monotonic() is `until`, or `most` requests were sent."""

        async def converse_on() -> None:
            while time.monotonic() < until and (most is None or self.tally.requests < most):
                await self._converse()

        await asyncio.gather(*(converse_on() for _ in range(CONVERSATIONS_AT_ONCE)))

    async def _converse(self) -> None:
        count = self._random.choice(PIPELINED)
        kind = self._random.random()
        if kind < 0.75:
            requests = [self._whole.whole() for _ in range(count)]
            await self.converse_whole(requests)
        elif kind < 0.92:
            before = [self._damaged.whole().data for _ in range(self._random.choice((0, 0, 1, 3)))]
            await self.converse_damaged(before, self._damaged.mutant())
        else:
            data = b"".join(self._damaged.whole().data for _ in range(count))
            self.tally.requests += count
            await self.hang_up(data[: self._random.randrange(len(data))])

    async def converse_whole(self, requests: Sequence[Request]) -> None:
        """Send whole requests. Each must be answered in order; an answer may announce the end of the connection."""
        sent = b"".join(request.data for request in requests)
        self.tally.requests += len(requests)
        answers: list[Answer] = []
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answers = await self._exchange(sent, len(requests))
        except NotHttp as error:
            return self._found(f"no HTTP: {error}", sent)
        except TimeoutError:
            return self._found(f"{len(answers)} of {len(requests)} answers after {ANSWER_TIMEOUT_S} s", sent)
        self._count(self._gateway.whole, answers, sent)
        if len(answers) < len(requests) and not (answers and answers[-1].headers.get("Connection") == "close"):
            self._found(f"{len(answers)} of {len(requests)} answers, and closed without a word", sent)
        for request, answer in zip(requests, answers, strict=False):
            if answer.headers.get("X-Request-Id") != request.request_id:
                self._found(f"{request.request_id} was answered as {answer.headers.get('X-Request-Id')}", sent)
        return None

    async def converse_damaged(self, before: Iterable[bytes], mutant: bytes) -> None:
        """Send a damaged request and then a sentinel, which is answered if the connection still serves.

        The gateway may close the connection, or wait for more bytes.
        """
        whole = b"".join(before)
        sentinel = b"GET /sentinel HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n\r\n" % SENTINEL.encode()
        sent = whole + mutant + sentinel
        self.tally.requests += 1 + whole.count(b"X-Request-Id: ")
        quiet_s = PATIENT_S if self._random.random() < 0.02 else QUIET_S
        try:
            answers = await self._exchange(sent, None, quiet_s)
        except NotHttp as error:
            if b"HEAD" not in sent:  # an answer to HEAD has no body
                self._found(f"no HTTP: {error}", sent)
            return
        self._count(self._gateway.damaged, answers, sent)

    async def hang_up(self, data: bytes) -> None:
        """Send bytes, wait for a moment or not at all, and close the connection."""
        _, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            with suppress(ConnectionError):
                await self._send(writer, data)
                await asyncio.sleep(self._random.choice((0, 0, 0.001, 0.01)))
        finally:
            if self._random.random() < 0.5:
                writer.transport.abort()
            else:
                writer.close()

    async def _exchange(self, sent: bytes, expected: int | None, quiet_s: float | None = None) -> list[Answer]:
        """Send bytes and read answers, until `expected` answers, the sentinel's, the end, or `quiet_s` of silence."""
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        answers: list[Answer] = []
        sending = asyncio.create_task(self._send(writer, sent))
        try:
            incoming = AnswerReader()
            while (expected is None or len(answers) < expected) and not _is_sentinel(answers):
                try:
                    async with asyncio.timeout(quiet_s):
                        data = await reader.read(1 << 16)
                except (TimeoutError, ConnectionError):
                    break
                answers += incoming.feed(data)
                if not data:
                    if incoming.rest:
                        raise NotHttp(f"broken off: {incoming.rest[:200]!r}")
                    break
            return answers
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await sending
            writer.transport.abort()

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        pieces = self._random.choice((1, 1, 1, 2, 5))
        cuts = sorted(self._random.randrange(len(data) + 1) for _ in range(pieces - 1))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.write(data[start:end])
            await writer.drain()
            if pieces > 1:
                await asyncio.sleep(0)

    def _count(self, caller: Caller, answers: Sequence[Answer], sent: bytes) -> None:
        for answer in answers:
            for fault in faults_of_either(answer.status, answer.headers, answer.body):
                self._found(f"{answer.status} {answer.body[:300]!r}: {fault}", sent)
            if answer.status >= 500 and answer.status not in MAY_REFUSE:
                self._found(f"{answer.status} {answer.body[:300]!r}", sent)
            self.tally.statuses[_label(answer)] += 1
            if answer.status == 200 and "Idempotent-Replayed" not in answer.headers:
                told = msgspec.json.decode(answer.body)
                if not told.get("dry_run"):
                    self._gateway.count(caller, told.get("queued_count", 1))

    def _found(self, finding: str, sent: bytes) -> None:
        self.tally.findings.append((finding, sent))


def _is_sentinel(answers: Sequence[Answer]) -> bool:
    return bool(answers) and answers[-1].headers.get("X-Request-Id") == SENTINEL


def _label(answer: Answer) -> str:
    if answer.status == 200:
        return "200"
    code = answer.body.rpartition(b'"code":"')[2].partition(b'"')[0]
    return f"{answer.status} {code.decode()}"


def write_findings(tally: Tally, directory: Path, seed: int) -> None:
    """Write each finding as two files: the bytes that were sent, and the description."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, (finding, sent) in enumerate(tally.findings[:100]):
        (directory / f"http-{seed}-{number}.http").write_bytes(sent)
        (directory / f"http-{seed}-{number}.txt").write_text(finding)
