"""Promise 10: every row of table.py, against a gateway process, while a neighbour sends valid requests.

Each answer is exactly the row's. No answer is a 5xx, the queue contains counted messages only, no client causes an
error in the log, and no request of the neighbour fails.
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
from tests.hostile.attacked_gateway import AttackedGateway, open_gateway
from tests.hostile.table import CLOSED, KEPT, UNREAD, Idempotency, Message, Row
from tests.support.callers import Caller, make_caller
from tests.support.neighbour import Neighbour
from tests.support.raw_http import RawAnswer, connect, exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNDISTURBED_S = 2.0
NEXT = b"GET /next HTTP/1.1\r\nHost: gateway\r\n\r\n"
ROOM_MB = 192  # bodies of 5 MB, one at a time, and the memory that the allocator keeps of them


class Attack:
    """The gateway under attack, its accounts, and the count of queued messages."""

    def __init__(self, gateway: AttackedGateway, caller: Caller, neighbour: Neighbour, names: dict[bytes, str]) -> None:
        self.gateway = gateway
        self.caller = caller
        self.neighbour = neighbour
        self.counted = 0
        self.unknown = 0
        self.undisturbed_p99_ms = 0.0
        self.memory_before_mb = 0.0
        self._names = {placeholder: name.encode() for placeholder, name in names.items()}

    def fill_in(self, data: bytes) -> bytes:
        """Return the same bytes with the real keys and list numbers."""
        for placeholder, name in self._names.items():
            assert len(placeholder) == len(name)
            data = data.replace(placeholder, name)
        return data

    def read(self, answer: RawAnswer) -> str:
        """Return an answer as the table writes it, count its messages, and check what holds for every answer."""
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
async def attack(servers: Servers) -> AsyncIterator[Attack]:
    """Yield a gateway with the table's accounts, and a neighbour that sends."""
    async with open_gateway(servers) as gateway:
        caller, foreign = await make_caller(gateway.admin), await make_caller(gateway.admin)
        revoked, suspended = await gateway.admin.create_key(caller.account_id), await make_caller(gateway.admin)
        await gateway.admin.revoke_key(revoked["id"])
        await gateway.admin.set_account_status(suspended.account_id, "suspended")
        inactive = await gateway.admin.add_list(caller.account_id, table.INACTIVE_LIST.decode().replace("I", "7"))
        await gateway.admin.set_list_status(inactive["id"], "inactive")
        names = {
            table.KEY: caller.key,
            table.LIST: caller.list_number,
            table.FOREIGN_KEY: foreign.key,
            table.FOREIGN_LIST: foreign.list_number,
            table.REVOKED_KEY: revoked["key"],
            table.SUSPENDED_KEY: suspended.key,
            table.INACTIVE_LIST: inactive["number"],
        }
        async with Neighbour(gateway.url, await make_caller(gateway.admin)) as neighbour:
            attack = Attack(gateway, caller, neighbour, names)
            attack.undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            attack.memory_before_mb = gateway.memory_mb()
            yield attack


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
async def test_the_answer_is_exactly(attack: Attack, row: Row) -> None:
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(attack.fill_in(row.request))
        assert attack.read(await conversation.read_answer()) == row.answer
        if row.then is KEPT:
            await conversation.send(NEXT)
            assert attack.read(await conversation.read_answer()) == "404 not_found"
        elif row.then is CLOSED:
            assert await conversation.is_closed()
        else:
            assert row.then is UNREAD


@pytest.mark.parametrize("row", table.IDEMPOTENCY, ids=lambda row: row.name)
async def test_under_an_idempotency_key_the_answers_are_exactly(attack: Attack, row: Idempotency) -> None:
    answers = [
        attack.read(await exchange(attack.gateway.url, request=attack.fill_in(request))) for request in row.requests
    ]
    assert answers == row.answers


async def test_fifty_identical_requests_at_once_are_one(attack: Attack) -> None:
    request = attack.fill_in(table.keyed(b"fifty"))
    answers = await asyncio.gather(*(exchange(attack.gateway.url, request=request) for _ in range(50)))
    read = [attack.read(answer) for answer in answers]
    assert read.count("200 1") == 1
    assert set(read) <= {"200 1", "200 1 replayed", "409 idempotency_in_progress"}


@pytest.mark.parametrize("row", table.MESSAGES, ids=lambda row: row.name[:80].encode("unicode_escape").decode())
async def test_one_bad_message_costs_exactly_its_row(attack: Attack, row: Message) -> None:
    body = attack.fill_in(b'{"messages":[' + b",".join([table.GOOD, row.element, table.GOOD]) + b"]}")
    answer = await exchange(attack.gateway.url, request=attack.fill_in(table.post(body)))
    assert attack.read(answer) == ("200 3" if row.code is None else "200 2")
    assert [(error["index"], error["code"]) for error in answer.json()["errors"]] == (
        [] if row.code is None else [(1, row.code)]
    )


async def test_head_has_the_headers_and_no_body(attack: Attack) -> None:
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(table.head(b"Connection: close", first=b"HEAD " + table.PATH + b" HTTP/1.1"))
        answer = await conversation.read_until_closed()
        assert answer.startswith(b"HTTP/1.1 405 ")
        assert answer.endswith(b"\r\n\r\n")
        assert b"\r\nAllow: POST\r\n" in answer


async def test_a_hundred_pipelined_requests_are_answered_in_order(attack: Attack) -> None:
    refused = [table.first_line(b"POST /%d HTTP/1.1" % number) for number in range(50)]
    requests = [request for pair in zip([table.post()] * 50, refused, strict=True) for request in pair]
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(attack.fill_in(b"".join(requests)))
        answers = [attack.read(await conversation.read_answer()) for _ in requests]
    assert answers == ["200 1", "404 not_found"] * 50


async def test_a_request_smuggled_in_a_body_is_a_body(attack: Attack) -> None:
    smuggled = table.post()
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(attack.fill_in(table.post(smuggled) + NEXT))
        assert attack.read(await conversation.read_answer()) == "400 invalid_json"
        assert attack.read(await conversation.read_answer()) == "404 not_found"


async def test_a_request_behind_malformed_http_is_not_processed(attack: Attack) -> None:
    """The end of the malformed request is unknown: a valid one behind it may be part of an attack."""
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(attack.fill_in(table.chunked(end=b"zz\r\n{}\r\n0\r\n\r\n") + table.post()))
        assert attack.read(await conversation.read_answer()) == "400 malformed_http"
        assert await conversation.is_closed()


@pytest.mark.parametrize(
    "trailer", [b"X-Api-Key: " + table.FOREIGN_KEY, b"Content-Encoding: gzip", b"X-Request-Id: leaked"]
)
async def test_a_trailer_is_never_a_header(attack: Attack, trailer: bytes) -> None:
    """A load balancer may use the same connection for another caller's request."""
    async with connect(attack.gateway.url) as conversation:
        await conversation.send(attack.fill_in(table.chunked(table.ONE, end=b"0\r\n" + trailer + b"\r\n\r\n")))
        answer = await conversation.read_answer()
        assert attack.read(answer) == "200 1"
        assert b"\r\nConnection: close\r\n" in answer.raw, "so that it is not used again"
        await conversation.send(attack.fill_in(table.post()))
        assert await conversation.is_closed()


async def test_bytes_sent_behind_the_last_answer_do_not_discard_it(attack: Attack) -> None:
    """A close with unread bytes makes the kernel send a reset, and a caller that reads late gets no answer."""
    data = attack.fill_in(table.chunked(table.ONE) + table.post(table.padded(10_000)) * 200)
    address = urlsplit(attack.gateway.url)

    def send_and_read_late() -> bytes:
        with socket.create_connection((address.hostname, address.port), timeout=5) as caller:
            caller.send(data)  # as much as the socket takes
            time.sleep(0.5)
            return b"".join(iter(lambda: caller.recv(65_536), b""))

    for _ in range(5):
        answer = RawAnswer(await asyncio.to_thread(send_and_read_late))
        assert attack.read(answer) == "200 1"
        assert b"\r\nConnection: close\r\n" in answer.raw
        assert answer.raw.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("request_head", "refusal"),
    [
        (table.chunked(lines=(b"Content-Encoding: gzip",), end=b""), "415 unsupported_media_type"),
        (table.head(b"X-Api-Key: unknown", b"Transfer-Encoding: chunked"), "401 invalid_api_key"),
        (table.head(b"Transfer-Encoding: chunked", first=b"POST /other HTTP/1.1"), "404 not_found"),
    ],
    ids=["coding", "key", "path"],
)
async def test_bytes_sent_behind_a_body_that_comes_after_its_refusal_do_not_discard_the_answer(
    attack: Attack, request_head: bytes, refusal: str
) -> None:
    address, start = urlsplit(attack.gateway.url), attack.fill_in(request_head) + b"64\r\n" + b"a" * 50

    def send_slowly_and_read_late() -> bytes:
        with socket.create_connection((address.hostname, address.port), timeout=5) as caller:
            caller.sendall(start)
            time.sleep(0.5)  # longer than QUIET_S
            caller.sendall(b"a" * 50 + b"\r\n0\r\n\r\n")
            for _ in range(3):
                time.sleep(0.05)
                caller.sendall(NEXT)
            return b"".join(iter(lambda: caller.recv(65_536), b""))

    answer = RawAnswer(await asyncio.to_thread(send_slowly_and_read_late))
    assert attack.read(answer) == refusal
    assert b"\r\nConnection: close\r\n" in answer.raw
    assert answer.raw.count(b"HTTP/1.1 ") == 1


async def test_a_client_that_resets_before_reading_its_400_leaves_no_traceback(attack: Attack) -> None:
    address = urlsplit(attack.gateway.url)

    def send_and_reset() -> None:
        with socket.create_connection((address.hostname, address.port), timeout=5) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.send(b"no HTTP at all\r\n\r\n")

    for _ in range(150):
        await asyncio.to_thread(send_and_reset)
    assert (await exchange(attack.gateway.url, request=NEXT)).status == 404
    assert attack.gateway.alarms() == []


@pytest.mark.parametrize("cut", [lambda size: 40, lambda size: size - 300, lambda size: size - 1])
async def test_a_request_that_was_cut_off_queues_nothing(attack: Attack, cut: Callable[[int], int]) -> None:
    request = attack.fill_in(table.post(table.padded(1_000)))
    for _ in range(20):
        await exchange(attack.gateway.url, request=request[: cut(len(request))], hang_up=True)


async def test_a_request_whose_client_hangs_up_after_the_body_may_be_queued(attack: Attack) -> None:
    for _ in range(20):
        await exchange(attack.gateway.url, request=attack.fill_in(table.post()), hang_up=True)
        attack.unknown += 1


async def test_only_counted_messages_are_queued_and_no_request_of_the_neighbour_failed(
    attack: Attack, record_property: Callable[[str, object], None]
) -> None:
    """Check the sums of all tests above; it must come last."""
    gateway, neighbour = attack.gateway, attack.neighbour
    beside_p99_ms = neighbour.p99_ms()
    figures = {
        "the neighbour's requests": len(neighbour.took_s),
        "p99 undisturbed, ms": round(attack.undisturbed_p99_ms, 1),
        "p99 beside the table, ms": round(beside_p99_ms, 1),
        "memory before, MB": round(attack.memory_before_mb),
        "memory after, MB": round(gateway.memory_mb()),
    }
    for name, value in figures.items():
        record_property(name, value)
    print(figures)
    assert neighbour.failures == []
    await neighbour.stop()
    assert len(neighbour.took_s) == neighbour.counted > 0
    assert gateway.memory_mb() < attack.memory_before_mb + ROOM_MB
    assert gateway.alarms() == []
    counted = attack.counted + neighbour.counted
    assert counted <= await gateway.queue.depth() <= counted + attack.unknown
