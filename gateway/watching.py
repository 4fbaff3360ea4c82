"""Who watches outbound messages live, and what they are shown: what was published, with its outcome, as it was settled.

The broker has no part in it: a queue bound beside the outbound one would make a message count as routed that is in no
outbound queue (ARCHITECTURE.md). Nobody is waited for: a watcher that reads too slowly misses messages, and is told how
many. While nobody watches it costs a batch one call.
"""

import asyncio
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.amqp.confirms import Outcome
from gateway.log import mask_number

MOST_WATCHERS = 4
# What a watcher has yet to read; the last payload may go beyond it, by 5 MB at the most.
MOST_KEPT_PAYLOADS, MOST_KEPT_OCTETS = 1_000, 4 * 1024 * 1024
# More than anybody reads. A line takes some 6 µs: whatever the load, a watcher takes less than a hundredth of a core.
MOST_LINES_A_SECOND, LINES_AT_ONCE = 1_000, 100
SIGN_OF_LIFE = b"\n"
SIGN_OF_LIFE_S = 5.0  # without anything to show, so that both ends notice when the other is gone

OUTCOMES = {
    Outcome.ACKED: "queued",
    Outcome.NACKED: "rejected",
    Outcome.RETURNED: "rejected",
    Outcome.UNKNOWN: "unknown",
}


class Choice(NamedTuple):
    """Which messages a watcher wants to see, and whether whole."""

    account_id: int | None = None
    list_number: str | None = None
    whole: bool = False


class Line(msgspec.Struct, omit_defaults=True):
    """One SMS as a watcher is shown it. Numbers are masked, and there is no text, unless it asked for the whole."""

    outcome: str
    id: str
    account_id: int
    list_id: int
    list_number: str
    to: str
    body_characters: int
    accepted_at: str
    request_id: str
    index: int
    body: str | UnsetType = UNSET
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class Missed(msgspec.Struct):
    """So many AMQP messages went by unseen, and unlooked at, since the last line: there were more than can be shown."""

    missed: int


class TooManyWatchers(Exception):
    """There is a bound on what watching may cost."""


class _Sms(msgspec.Struct):
    """A payload, read back."""

    id: str
    account_id: int
    list_id: int
    list_number: str
    to: str
    body: str
    accepted_at: str
    request_id: str
    index: int
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


_sms_of = msgspec.json.Decoder(_Sms | list[_Sms]).decode
_encode_lines = msgspec.json.Encoder().encode_lines


class Watcher:
    """One who watches: what was published and is yet to be shown. What finds no room there is missed, at no cost."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        # As it stands in a payload; inside a string its quotes would be escaped. Spares decoding what nobody wants.
        self._mark = f'"list_number":"{choice.list_number}"'.encode() if choice.list_number else b""
        self._kept: deque[tuple[int, bytes]] = deque()
        self._octets = 0
        self._missed = 0
        self._something_new = asyncio.Event()
        self._next_at = 0.0
        self.is_over = False

    def see(self, account_id: int, list_numbers: Container[str], payloads: Sequence[bytes], outcomes: bytes) -> None:
        """Keep what it wants to see of a batch, as long as there is room."""
        wanted = self._choice
        if wanted.account_id not in (None, account_id):
            return
        if wanted.list_number is not None and wanted.list_number not in list_numbers:
            return
        for place, payload in enumerate(payloads):
            if self._octets >= MOST_KEPT_OCTETS or len(self._kept) >= MOST_KEPT_PAYLOADS:
                self._missed += len(payloads) - place
                break
            if self._mark in payload:
                self._kept.append((outcomes[place], payload))
                self._octets += len(payload)
        self._something_new.set()

    async def next_lines(self) -> bytes:
        """The next lines of JSON, LINES_AT_ONCE or an envelope's; a mere sign of life when there are none."""
        now = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._next_at - now()))
        try:
            async with asyncio.timeout(SIGN_OF_LIFE_S):
                await self._something_new.wait()
        except TimeoutError:
            return SIGN_OF_LIFE
        lines: list[Line | Missed] = []
        if self._missed:
            lines.append(Missed(self._missed))
            self._missed = 0
        while self._kept and len(lines) < LINES_AT_ONCE:
            outcome, payload = self._kept.popleft()
            self._octets -= len(payload)
            lines += self._lines_of(outcome, payload)
        if not self._kept and not self.is_over:
            self._something_new.clear()
        self._next_at = now() + len(lines) / MOST_LINES_A_SECOND
        return _encode_lines(lines)

    def _lines_of(self, outcome: int, payload: bytes) -> list[Line]:
        carried = _sms_of(payload)
        wanted = self._choice.list_number
        return [
            self._line(OUTCOMES[Outcome(outcome)], sms)
            for sms in (carried if isinstance(carried, list) else [carried])
            if wanted in (None, sms.list_number)
        ]

    def _line(self, outcome: str, sms: _Sms) -> Line:
        whole = self._choice.whole
        return Line(
            outcome,
            sms.id,
            sms.account_id,
            sms.list_id,
            sms.list_number if whole else mask_number(sms.list_number),
            sms.to if whole else mask_number(sms.to),
            len(sms.body),
            sms.accepted_at,
            sms.request_id,
            sms.index,
            *((sms.body, sms.contact_data, sms.metadata) if whole else ()),
        )

    def end(self) -> None:
        """Nothing more is shown than what is kept."""
        self.is_over = True
        self._something_new.set()


class Watchers:
    """All who watch this process."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []
        self._closed = False

    def see(self, account_id: int, list_numbers: Container[str], payloads: Sequence[bytes], outcomes: bytes) -> None:
        """Show a batch that has been settled: whose it is, all lists in it, one outcome per payload."""
        for watcher in self._watchers:
            watcher.see(account_id, list_numbers, payloads, outcomes)

    @contextmanager
    def watch(self, choice: Choice) -> Iterator[Watcher]:
        """A watcher, for the length of the block. Raises TooManyWatchers."""
        if len(self._watchers) >= MOST_WATCHERS:
            raise TooManyWatchers
        watcher = Watcher(choice)
        if self._closed:
            watcher.end()
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def close(self) -> None:
        """Send everybody home: the process ends."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end()
