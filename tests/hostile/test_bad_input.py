"""Every row of table.py, against a gateway process with real servers, while a neighbour sends good requests beside it.

No answer but the row's, no 5xx, nothing in the queue that was not counted, nothing but short lines in the log, and no
request of the neighbour's that goes wrong.
"""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from testbed import Servers
from tests.hostile import table
from tests.hostile.stand import Caller, Neighbour, Stand, new_caller, open_stand
from tests.hostile.table import CLOSED, KEPT, UNREAD, Idempotency, Message, Row
from tests.support.raw_http import RawAnswer, connect, exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNDISTURBED_S = 2.0
NEXT = b"GET /next HTTP/1.1\r\nHost: gateway\r\n\r\n"
ROOM_MB = 192  # bodies of 5 MB, one at a time, and what the allocator keeps of them


class House:
    """The stand with its accounts, and the count of what has been queued."""

    def __init__(self, stand: Stand, caller: Caller, neighbour: Neighbour, names: dict[bytes, str]) -> None:
        self.stand = stand
        self.caller = caller
        self.neighbour = neighbour
        self.counted = 0
        self.unknown = 0
        self.undisturbed_p99_ms = 0.0
        self.memory_before_mb = 0.0
        self._names = {placeholder: name.encode() for placeholder, name in names.items()}

    def fill_in(self, data: bytes) -> bytes:
        """The same bytes with the real keys and list numbers."""
        for placeholder, name in self._names.items():
            assert len(placeholder) == len(name)
            data = data.replace(placeholder, name)
        return data

    def read(self, answer: RawAnswer) -> str:
        """An answer as the table writes it; all that holds for every answer is checked."""
        fields = answer.raw[answer.raw.rindex(b"HTTP/1.") :].partition(b"\r\n\r\n")[0].lower()
        for field in (b"x-request-id", b"content-type: application/json", b"server: sms-gateway", b"date"):
            assert b"\r\n" + field in fields, answer.raw
        decoded = answer.json()
        if answer.status == 200:
            self.counted += decoded["queued_count"]
            replayed = " replayed" if b"\r\nidempotent-replayed: true" in fields else ""
            self.counted -= decoded["queued_count"] if replayed else 0
            return f"200 {decoded['queued_count']}{replayed}"
        assert set(decoded) == {"error", "code"}
        assert (b"\r\nallow: post" in fields) is (answer.status == 405)
        return f"{answer.status} {decoded['code']}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(servers: Servers) -> AsyncIterator[House]:
    """The house, with the neighbour at work."""
    async with open_stand(servers) as stand:
        caller, foreign = await new_caller(stand.admin), await new_caller(stand.admin)
        revoked, suspended = await stand.admin.create_key(caller.account_id), await new_caller(stand.admin)
        await stand.admin.revoke_key(revoked["id"])
        await stand.admin.set_account_status(suspended.account_id, "suspended")
        inactive = await stand.admin.add_list(caller.account_id, table.INACTIVE_LIST.decode().replace("I", "7"))
        await stand.admin.set_list_status(inactive["id"], "inactive")
        names = {
            table.KEY: caller.key,
            table.LIST: caller.list_number,
            table.FOREIGN_KEY: foreign.key,
            table.FOREIGN_LIST: foreign.list_number,
            table.REVOKED_KEY: revoked["key"],
            table.SUSPENDED_KEY: suspended.key,
            table.INACTIVE_LIST: inactive["number"],
        }
        async with Neighbour(stand, await new_caller(stand.admin)) as neighbour:
            house = House(stand, caller, neighbour, names)
            house.undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            house.memory_before_mb = stand.memory_mb()
            yield house


ROWS = {
    f"{kind}: {row.name}": row
    for kind, rows in {
        "key": table.KEYS,
        "line": table.LINES,
        "header": table.HEADERS,
        "length": table.LENGTHS,
        "type": table.TYPES,
        "json": table.JSON,
    }.items()
    for row in rows
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
async def test_the_answer_is_exactly(house: House, row: Row) -> None:
    async with connect(house.stand.url) as conversation:
        await conversation.send(house.fill_in(row.request))
        assert house.read(await conversation.read_answer()) == row.answer
        if row.then is KEPT:
            await conversation.send(NEXT)
            assert house.read(await conversation.read_answer()) == "404 not_found"
        elif row.then is CLOSED:
            assert await conversation.is_closed()
        else:
            assert row.then is UNREAD


@pytest.mark.parametrize("row", table.IDEMPOTENCY, ids=lambda row: row.name)
async def test_under_an_idempotency_key_the_answers_are_exactly(house: House, row: Idempotency) -> None:
    answers = [house.read(await exchange(house.stand.url, request=house.fill_in(request))) for request in row.requests]
    assert answers == row.answers


async def test_fifty_identical_requests_at_once_are_one(house: House) -> None:
    request = house.fill_in(table.keyed(b"fifty"))
    answers = await asyncio.gather(*(exchange(house.stand.url, request=request) for _ in range(50)))
    read = [house.read(answer) for answer in answers]
    assert read.count("200 1") == 1
    assert set(read) <= {"200 1", "200 1 replayed", "409 idempotency_in_progress"}


@pytest.mark.parametrize("row", table.MESSAGES, ids=lambda row: row.name[:80].encode("unicode_escape").decode())
async def test_one_bad_message_costs_exactly_its_row(house: House, row: Message) -> None:
    body = house.fill_in(b'{"messages":[' + b",".join([table.GOOD, row.element, table.GOOD]) + b"]}")
    answer = await exchange(house.stand.url, request=house.fill_in(table.post(body)))
    assert house.read(answer) == ("200 3" if row.code is None else "200 2")
    assert [(error["index"], error["code"]) for error in answer.json()["errors"]] == (
        [] if row.code is None else [(1, row.code)]
    )


async def test_head_has_the_headers_and_no_body(house: House) -> None:
    async with connect(house.stand.url) as conversation:
        await conversation.send(table.head(b"Connection: close", first=b"HEAD " + table.PATH + b" HTTP/1.1"))
        answer = await conversation.read_until_closed()
        assert answer.startswith(b"HTTP/1.1 405 ")
        assert answer.endswith(b"\r\n\r\n")
        assert b"\r\nAllow: POST\r\n" in answer


async def test_a_hundred_pipelined_requests_are_answered_in_order(house: House) -> None:
    refused = [table.first_line(b"POST /%d HTTP/1.1" % number) for number in range(50)]
    requests = [request for pair in zip([table.post()] * 50, refused, strict=True) for request in pair]
    async with connect(house.stand.url) as conversation:
        await conversation.send(house.fill_in(b"".join(requests)))
        answers = [house.read(await conversation.read_answer()) for _ in requests]
    assert answers == ["200 1", "404 not_found"] * 50


async def test_a_request_smuggled_in_a_body_is_a_body(house: House) -> None:
    smuggled = table.post()
    async with connect(house.stand.url) as conversation:
        await conversation.send(house.fill_in(table.post(smuggled) + NEXT))
        assert house.read(await conversation.read_answer()) == "400 invalid_json"
        assert house.read(await conversation.read_answer()) == "404 not_found"


async def test_behind_malformed_http_nothing_is_looked_at(house: House) -> None:
    """Where one request ends is not known any more: a good one behind it may be part of an attack."""
    async with connect(house.stand.url) as conversation:
        await conversation.send(house.fill_in(table.chunked(end=b"zz\r\n{}\r\n0\r\n\r\n") + table.post()))
        assert house.read(await conversation.read_answer()) == "400 malformed_http"
        assert await conversation.is_closed()


@pytest.mark.parametrize(
    "trailer", [b"X-Api-Key: " + table.FOREIGN_KEY, b"Content-Encoding: gzip", b"X-Request-Id: leaked"]
)
async def test_a_trailer_is_nobodys_header(house: House, trailer: bytes) -> None:
    """A load balancer may send the next caller's request over the same connection."""
    async with connect(house.stand.url) as conversation:
        await conversation.send(house.fill_in(table.chunked(table.ONE, end=b"0\r\n" + trailer + b"\r\n\r\n")))
        answer = await conversation.read_answer()
        assert house.read(answer) == "200 1"
        assert b"\r\nConnection: close\r\n" in answer.raw, "so that it is not used again"
        await conversation.send(house.fill_in(table.post()))
        assert await conversation.is_closed()


async def test_what_is_sent_behind_a_last_answer_does_not_take_it_away(house: House) -> None:
    """Closed with bytes unread, the kernel sends a reset, and a caller who reads late finds nothing."""
    data = house.fill_in(table.chunked(table.ONE) + table.post(table.padded(10_000)) * 200)
    address = urlsplit(house.stand.url)

    def send_and_read_late() -> bytes:
        with socket.create_connection((address.hostname, address.port), timeout=5) as caller:
            caller.send(data)  # as much as there is room for
            time.sleep(0.5)
            return b"".join(iter(lambda: caller.recv(65_536), b""))

    for _ in range(5):
        answer = RawAnswer(await asyncio.to_thread(send_and_read_late))
        assert house.read(answer) == "200 1"
        assert b"\r\nConnection: close\r\n" in answer.raw
        assert answer.raw.count(b"HTTP/1.1 ") == 1


async def test_who_hangs_up_before_hearing_that_it_is_malformed_leaves_no_traceback(house: House) -> None:
    address = urlsplit(house.stand.url)

    def send_and_reset() -> None:
        with socket.create_connection((address.hostname, address.port), timeout=5) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.send(b"no HTTP at all\r\n\r\n")

    for _ in range(150):
        await asyncio.to_thread(send_and_reset)
    assert (await exchange(house.stand.url, request=NEXT)).status == 404
    assert house.stand.alarms() == []


@pytest.mark.parametrize("cut", [lambda size: 40, lambda size: size - 300, lambda size: size - 1])
async def test_who_hangs_up_in_the_middle_has_sent_nothing(house: House, cut: Callable[[int], int]) -> None:
    request = house.fill_in(table.post(table.padded(1_000)))
    for _ in range(20):
        await exchange(house.stand.url, request=request[: cut(len(request))], hang_up=True)


async def test_who_hangs_up_after_the_body_may_have_sent_something(house: House) -> None:
    for _ in range(20):
        await exchange(house.stand.url, request=house.fill_in(table.post()), hang_up=True)
        house.unknown += 1


async def test_nothing_is_queued_that_was_not_counted_and_the_neighbour_noticed_nothing(
    house: House, record_property: Callable[[str, object], None]
) -> None:
    """The last: it looks back on all above."""
    stand, neighbour = house.stand, house.neighbour
    beside_p99_ms = neighbour.p99_ms()
    figures = {
        "the neighbour's requests": len(neighbour.took_s),
        "p99 undisturbed, ms": round(house.undisturbed_p99_ms, 1),
        "p99 beside the table, ms": round(beside_p99_ms, 1),
        "memory before, MB": round(house.memory_before_mb),
        "memory after, MB": round(stand.memory_mb()),
    }
    for name, value in figures.items():
        record_property(name, value)
    print(figures)
    assert neighbour.wrong == []
    await neighbour.stop()
    assert len(neighbour.took_s) == neighbour.counted > 0
    assert stand.memory_mb() < house.memory_before_mb + ROOM_MB
    assert stand.alarms() == []
    counted = house.counted + neighbour.counted
    assert counted <= await stand.queue.depth() <= counted + house.unknown
