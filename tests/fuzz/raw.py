"""The target `http`: conversations over raw sockets. Pipelined, split anywhere, damaged byte by byte, cut off.

Three kinds: all requests whole (each must be answered, in order, as the document says); a damaged one at the end (what
is answered must be HTTP and as the document says, whatever the parser made of it); and cut off at any moment.
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

from tests.fuzz.answers import Answer, AnswerReader, NotHttp
from tests.fuzz.requests import Request, Requests
from tests.fuzz.stand import Caller, Stand
from tests.support.openapi_document import faults_of

CONVERSATIONS_AT_ONCE = 24
PIPELINED = (1, 2, 4, 8, 16, 32)
ANSWER_TIMEOUT_S = 20.0
QUIET_S = 0.15  # after a damaged request: whoever says nothing for so long is waiting for more of it
PATIENT_S = 2.5  # now and then: until the gateway itself gives up
SENTINEL = "fuzz-sentinel"
MAY_REFUSE = {503, 504}  # of the statuses from 500 on


@dataclass
class Tally:
    """What happened so far."""

    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, bytes]] = field(default_factory=list)  # what is wrong, and what was sent


class HttpFuzzer:
    """Conversations drawn from a seed."""

    def __init__(self, stand: Stand, seed: int) -> None:
        self._stand = stand
        self._address = urlsplit(stand.process.url)
        self._random = random.Random(seed)  # noqa: S311 - conversations that can be repeated
        self._whole = Requests(f"{seed} whole", key=stand.whole.key, list_number=stand.whole.list_number)
        self._damaged = Requests(f"{seed} damaged", key=stand.damaged.key, list_number=stand.damaged.list_number)
        self.tally = Tally()

    async def run(self, *, until: float, most: int | None = None) -> None:
        """Converse until time.monotonic() is `until`, or `most` requests were made."""

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
        """Each is answered, in order; the connection may be closed after an answer that says so."""
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
        self._count(self._stand.whole, answers, sent)
        if len(answers) < len(requests) and not (answers and answers[-1].headers.get("Connection") == "close"):
            self._found(f"{len(answers)} of {len(requests)} answers, and closed without a word", sent)
        for request, answer in zip(requests, answers, strict=False):
            if answer.headers.get("X-Request-Id") != request.request_id:
                self._found(f"{request.request_id} was answered as {answer.headers.get('X-Request-Id')}", sent)
        return None

    async def converse_damaged(self, before: Iterable[bytes], mutant: bytes) -> None:
        """A sentinel behind tells whether the connection still serves; it may be closed, or wait for more."""
        whole = b"".join(before)
        sentinel = b"GET /sentinel HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n\r\n" % SENTINEL.encode()
        sent = whole + mutant + sentinel
        self.tally.requests += 1 + whole.count(b"X-Request-Id: ")
        quiet_s = PATIENT_S if self._random.random() < 0.02 else QUIET_S
        try:
            answers = await self._exchange(sent, None, quiet_s)
        except NotHttp as error:
            if b"HEAD" not in sent:  # whose answers have no body
                self._found(f"no HTTP: {error}", sent)
            return
        self._count(self._stand.damaged, answers, sent)

    async def hang_up(self, data: bytes) -> None:
        """Send, wait for a moment or not at all, and go."""
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
        """Send, and read until so many answers are there, or the sentinel's, or the end, or nothing comes any more."""
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
            for fault in faults_of(answer.status, answer.headers, answer.body):
                self._found(f"{answer.status} {answer.body[:300]!r}: {fault}", sent)
            if answer.status >= 500 and answer.status not in MAY_REFUSE:
                self._found(f"{answer.status} {answer.body[:300]!r}", sent)
            self.tally.statuses[_label(answer)] += 1
            if answer.status == 200 and "Idempotent-Replayed" not in answer.headers:
                caller.counted += int(answer.body.split(b'"queued_count":', 1)[1].split(b",", 1)[0])

    def _found(self, what: str, sent: bytes) -> None:
        self.tally.findings.append((what, sent))


def _is_sentinel(answers: Sequence[Answer]) -> bool:
    return bool(answers) and answers[-1].headers.get("X-Request-Id") == SENTINEL


def _label(answer: Answer) -> str:
    if answer.status == 200:
        return "200"
    code = answer.body.rpartition(b'"code":"')[2].partition(b'"')[0]
    return f"{answer.status} {code.decode()}"


def write_findings(tally: Tally, directory: Path, seed: int) -> None:
    """Each as two files: what was sent, and what is wrong with what came of it."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, (what, sent) in enumerate(tally.findings[:100]):
        (directory / f"http-{seed}-{number}.http").write_bytes(sent)
        (directory / f"http-{seed}-{number}.txt").write_text(what)
