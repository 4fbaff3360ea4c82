"""Requests that share a connection, cut anywhere, get the answers that each gets alone and in one piece. Promise 10.

The rows of table.py and a few more go to a gateway process: over TCP, over TLS, and over a unix socket.
"""

import asyncio
import random
import re
from collections.abc import Coroutine, Iterable
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from testbed import Servers
from tests.hostile import table
from tests.hostile.listeners import KINDS, Listener, open_listener
from tests.hostile.table import CLOSED, KEPT, Row, chunked, head, post
from tests.support.callers import Caller, make_caller

SEED = 2026
LARGEST = 20_000  # bytes of a row: larger ones only take longer
AHEAD = (0, 1, 2, 3, 5, 40)  # requests before the last one of a connection; aiohttp lets 32 wait
CUTS = (0, 1, 3, 10, 30)
PAUSES_S = (0.0, 0.0, 0.0, 0.002)  # after a piece
AT_ONCE = 32  # connections
OTHER_ACCOUNTS = (table.FOREIGN_KEY, table.FOREIGN_LIST, table.REVOKED_KEY, table.SUSPENDED_KEY, table.INACTIVE_LIST)
MANY = b'{"messages":[' + b",".join([table.GOOD] * 99) + b",{}]}"
SINGLE = b"POST /api/v2/send HTTP/1.1"
EXPECT = b"Expect: 100-continue"

answers_in = re.compile(rb"HTTP/1\.[01] .*?(?=HTTP/1\.[01] |$)", re.DOTALL).findall
varying = re.compile(rb"\r\nDate: [^\r]+|\b[0-9a-f]{16}-[0-9a-f]+\b|(?<=\"message_id\":\")\w{8}")
queued_counts = re.compile(rb'"queued_count":(\d+)').findall
T = TypeVar("T")

# fmt: off
ROWS = [
    *chain(table.KEYS, table.LINES, table.HEADERS, table.LENGTHS, table.TYPES, table.JSON),
    Row("many messages", post(MANY), "200 99"),
    Row("many messages, chunked", chunked(MANY[:1_000], MANY[1_000:1_001], MANY[1_001:]), "200 99", CLOSED),
    Row("a single send", post(table.GOOD, first=SINGLE), "200"),
    Row("a bad single send", post(b"{}", first=SINGLE), "400 missing_to"),
    Row("a probe", head(first=b"GET /livez HTTP/1.1"), "404 not_found"),
    Row("a scrape", head(first=b"GET /metrics HTTP/1.1"), "404 not_found"),
    Row("the document", head(first=b"GET /api/v2/openapi.json HTTP/1.1"), "200"),
    Row("HEAD", head(b"Connection: close", first=b"HEAD /api/v2/openapi.json HTTP/1.1"), "200", CLOSED),
    Row("Expect", post(table.ONE, EXPECT), "200 1"),
    Row("Expect, many messages", post(MANY, EXPECT), "200 99"),
    Row("Expect, chunked", chunked(MANY, lines=(EXPECT,)), "200 99", CLOSED),
    Row("Expect, no key", post(table.ONE, EXPECT, key=None), "401 missing_api_key"),
    Row("a body for a wrong path", post(MANY, first=b"PUT /nowhere HTTP/1.1"), "404 not_found"),
    Row("chunks for a wrong path", chunked(MANY).replace(table.PATH, b"/nowhere"), "404 not_found", CLOSED),
    Row("blank lines around the JSON", post(b"\r\n\r\n" * 20 + table.ONE + b"\r\n\r\n"), "200 1"),
    Row("a request in a body", post(head()), "400 invalid_json"),
]
# fmt: on


class Connection(NamedTuple):
    """Requests of one connection, of which the last one ends it, in pieces with pauses."""

    rows: list[Row]
    pieces: list[bytes]
    pauses_s: list[float]


def connections(rows: list[Row]) -> list[Connection]:
    """Return a connection for each row that ends one, with rows before it."""
    draw = random.Random(SEED)  # noqa: S311 - a draw that can be repeated
    kept = [row for row in rows if row.then is KEPT]
    draw.shuffle(kept)
    ahead = cycle(kept)
    drawn = []
    for last in rows:
        if last.then is CLOSED:
            sent = [*islice(ahead, draw.choice(AHEAD)), last]
            data = b"".join(row.request for row in sent)
            cuts = sorted(draw.choices(range(len(data)), k=draw.choice(CUTS)))
            pieces = [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]
            drawn.append(Connection(sent, pieces, draw.choices(PAUSES_S, k=len(pieces))))
    return drawn


@pytest.mark.parametrize("kind", KINDS)
async def test_each_request_of_a_connection_gets_the_answer_that_it_gets_alone(
    servers: Servers, tmp_path: Path, kind: str
) -> None:
    print("seed", SEED)
    async with open_listener(servers, tmp_path, kind) as listener:
        caller = await make_caller(listener.gateway.admin)
        rows = rows_of(caller)
        alone = dict(zip(rows, await some_at_once(answer_alone(listener, row) for row in rows), strict=True))
        sent = connections(rows)
        received = await some_at_once(converse(listener, each) for each in sent)
        for connection, answers in zip(sent, received, strict=True):
            expected = list(chain.from_iterable(alone[row] for row in connection.rows))
            assert answers == expected, ([row.name for row in connection.rows], list(map(len, connection.pieces)))
        assert sum(map(queued_by, chain(alone.values(), received))) == await listener.gateway.queue.depth()
        assert listener.gateway.alarms() == []


def rows_of(caller: Caller) -> list[Row]:
    """Return the rows that are short and need no other account, as requests of this caller."""
    key, number = caller.key.encode(), caller.list_number.encode()
    return [
        row._replace(request=row.request.replace(table.KEY, key).replace(table.LIST, number))
        for row in ROWS
        if len(row.request) <= LARGEST
        and row.then in (KEPT, CLOSED)
        and not any(each in row.request for each in OTHER_ACCOUNTS)
    ]


async def some_at_once(conversations: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Return the results, in order."""
    free = asyncio.Semaphore(AT_ONCE)

    async def hold(conversation: Coroutine[None, None, T]) -> T:
        async with free:
            return await conversation

    return await asyncio.gather(*map(hold, conversations))


async def answer_alone(listener: Listener, row: Row) -> list[bytes]:
    """Send a request alone and in one piece; return its answer, with the interim one before it."""
    async with listener.connect() as conversation:
        await conversation.send(row.request)
        if row.then is CLOSED:
            return normal(await conversation.read_until_closed())
        return normal((await conversation.read_answer()).raw)


async def converse(listener: Listener, connection: Connection) -> list[bytes]:
    """Send the pieces; return the answers."""
    async with listener.connect() as conversation:
        for piece, pause_s in zip(connection.pieces, connection.pauses_s, strict=True):
            await conversation.send(piece)
            await asyncio.sleep(pause_s)
        return normal(await conversation.read_until_closed())


def normal(answers: bytes) -> list[bytes]:
    """Return the answers without what differs each time: the date, our own request id, a message id."""
    return answers_in(varying.sub(b"", answers))


def queued_by(answers: list[bytes]) -> int:
    """Return the number of messages that answers count as queued."""
    counts = map(int, queued_counts(b"".join(answers)))
    return sum(counts) + b"".join(answers).count(b'"success":true')
