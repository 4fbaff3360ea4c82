"""A caller's connection: broken bodies, transfer codings, half-closed connections, unread answers."""

import asyncio
import gc
import logging
import re
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from gateway.ingest.admission import Slot
from gateway.web.bodies import SMALL_REQUEST_BYTES
from gateway.web.connections import LINGER_S, _Connection
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.raw_http import connect, exchange


def post(gateway: GatewayUnderTest, body: bytes) -> bytes:
    """Return a request of the gateway's caller."""
    head = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (gateway.caller.key.encode(), len(body)) + body


async def test_a_broken_chunk_is_answered_at_once_and_gives_its_reservation_back(gateway: GatewayUnderTest) -> None:
    key = b"X-Api-Key: " + gateway.caller.key.encode()
    beginning = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + key + b"\r\n\r\n"
    async with connect(gateway.url) as conversation:
        await conversation.send(beginning + b"1\r\n{\r\n")
        await eventually(lambda: gateway.runtime.admission.reserved_bytes > 0)
        await conversation.send(b"zz\r\n")
        async with asyncio.timeout(gateway.runtime.settings.body_timeout_s / 2):
            answer = await conversation.read_answer()
        assert (answer.status, answer.json()["code"]) == (400, "malformed_http")
        assert await conversation.is_closed()
    await eventually(lambda: gateway.runtime.admission.requests == 0)
    assert gateway.runtime.admission.reserved_bytes == 0


@pytest.mark.parametrize(
    "lines",
    [
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity, chunked",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: chunked, gzip",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
    ],
)
async def test_a_transfer_coding_other_than_chunked_is_refused(gateway: GatewayUnderTest, lines: bytes) -> None:
    body = gateway.caller.body()
    answer = await exchange(
        gateway.url,
        headers=[b"X-Api-Key: " + gateway.caller.key.encode(), lines],
        body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
    )
    assert (answer.status, answer.json()["code"]) == (400, "malformed_http")


@pytest.mark.parametrize("requests", [1, 3])
async def test_a_caller_that_half_closes_after_its_requests_gets_its_answers(
    gateway: GatewayUnderTest, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = gateway.caller.body()
    writer.write(post(gateway, body) * requests)
    writer.write_eof()
    async with asyncio.timeout(10):
        answers = await reader.read()
    writer.close()
    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b'"queued_count":1') == requests
    assert "malformed" not in caplog.text


@pytest.mark.parametrize("requests", [1, 40])
async def test_requests_before_malformed_http_are_served_although_it_comes_in_the_same_read(
    gateway: GatewayUnderTest, requests: int
) -> None:
    async with connect(gateway.url) as conversation:
        # A C program may send a body with the NUL of its string.
        await conversation.send(post(gateway, gateway.caller.body()) * requests + b"\0")
        for _ in range(requests):
            assert (await conversation.read_answer()).json()["queued_count"] == 1
        assert (await conversation.read_answer()).json()["code"] == "malformed_http"
        assert await conversation.is_closed()


@pytest.mark.parametrize("begun", ["half a head", "no byte of a body", "half a body", "half a chunk"])
async def test_a_half_close_inside_a_request_takes_no_answer_from_those_before(
    gateway: GatewayUnderTest, queue: OutboundQueue, begun: str
) -> None:
    request = post(gateway, gateway.caller.body())
    head, _, body = request.partition(b"\r\n\r\n")
    chunked = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    tail = {
        "half a head": head[:40],
        "no byte of a body": head + b"\r\n\r\n",
        "half a body": head + b"\r\n\r\n" + body[:20],
        "half a chunk": chunked + b"\r\n\r\n20\r\n" + body[:10],
    }[begun]
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(request * 3 + tail)
    writer.write_eof()
    async with asyncio.timeout(5):
        answers = await reader.read()
    writer.close()
    assert answers.count(b"HTTP/1.1 ") == answers.count(b'"queued_count":1') == 3
    assert len(await queue.take_all()) == 3
    await eventually(lambda: gateway.runtime.admission.requests == 0)


async def test_a_half_closed_body_is_no_complete_request(gateway: GatewayUnderTest) -> None:
    parts = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(post(gateway, gateway.caller.body())[:-1])
    writer.write_eof()
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    await eventually(lambda: gateway.runtime.admission.requests == 0)


async def test_a_request_is_in_flight_until_its_answer_is_written(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(max_requests_in_flight=4, answer_timeout_s=6.0))
    admission, account_id = gateway.runtime.admission, gateway.caller.account_id
    request = post(gateway, msgspec.json.encode({"messages": [{"to": "\1" * 64}] * 1_000}))
    with ExitStack() as stack:
        for _ in range(3):  # an account alone may hold three of four slots
            unread = stack.enter_context(socket.socket())
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port))
            unread.setblocking(False)
            await fill_with_unread_answers(unread, request)
        assert admission.requests == admission.requests_of[account_id] == 3
        assert admission.reserved_bytes > 3 * 256 * 1024, "the answers, which are larger than the bodies"
        assert (await gateway.send([gateway.message()]))[0] == 503
        await eventually(lambda: admission.requests == 0, timeout=60)  # answer_timeout_s has passed
        assert (admission.reserved_bytes, dict(admission.bytes_of)) == (0, {})
        assert (await gateway.send([gateway.message()]))[0] == 200


async def fill_with_unread_answers(sender: socket.socket, request: bytes) -> None:
    """Send requests over a socket until it has taken nothing for half a second."""
    requests, at, moved = request * 40, 0, asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < moved + 0.5:
        try:
            at += sender.send(requests[at : at + 65536])
            moved = asyncio.get_running_loop().time()
        except BlockingIOError:
            await asyncio.sleep(0.01)


async def test_a_body_with_wide_characters_reserves_what_it_costs(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings())
    admission = gateway.runtime.admission
    database = await asyncpg.connect(gateway.runtime.settings.database_url)
    try:
        for text, factor in (("plain", 1), ("\N{PILE OF POO}", 2), ("\\ud83d\\udca9", 2)):
            # Above SMALL_REQUEST_BYTES: of a small request the lists are looked up with the key, before it is weighed.
            body = gateway.caller.body(body="TEXT" + "a" * SMALL_REQUEST_BYTES).replace(b"TEXT", text.encode())
            async with database.transaction():
                await database.execute("LOCK TABLE sending_lists")
                request = asyncio.create_task(gateway.post(body))
                weight = factor * len(body)
                await eventually(lambda weight=weight: admission.reserved_bytes == weight)  # type: ignore[misc]
            assert (await request)[0] == 200
    finally:
        await database.close()


@pytest.mark.parametrize("end", [b"zz\r\n", None], ids=["a broken chunk", "a hang-up"])
async def test_a_body_that_breaks_after_its_refusal_is_no_error(
    gateway: GatewayUnderTest, end: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(gateway.url) as conversation:
        await conversation.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        assert (await conversation.read_answer()).status == 404
        if end is not None:
            await conversation.send(end)
            async with asyncio.timeout(LINGER_S / 2):
                assert await conversation.is_closed()
    await asyncio.sleep(0.1)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


PIECE = bytes(64 * 1024)
CHUNKS = b"".join(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) for _ in range(79))
UNFINISHED = {
    "too slow": (b"Content-Length: 5000000", PIECE * 70, 408),
    "too large": (b"Transfer-Encoding: chunked", CHUNKS + CHUNKS[:200_000], 413),
    "a broken chunk": (b"Transfer-Encoding: chunked", CHUNKS + b"zz\r\n", 400),
    "a hang-up": (b"Content-Length: 5000000", PIECE * 70, None),
}


@pytest.mark.parametrize(("line", "body", "status"), UNFINISHED.values(), ids=UNFINISHED)
async def test_what_was_read_of_a_failed_body_does_not_wait_for_the_garbage_collector(
    start_gateway: StartGateway, make_settings: MakeSettings, line: bytes, body: bytes, status: int | None
) -> None:
    gateway = await start_gateway(make_settings(body_timeout_s=0.5))
    admission, key = gateway.runtime.admission, b"X-Api-Key: " + gateway.caller.key.encode()
    with traced_without_collector() as kept_mb:
        for _ in range(4):
            async with connect(gateway.url) as conversation:
                head = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\n%b\r\n%b\r\n\r\n" % (key, line)
                await conversation.send(head + body)
                if status is None:
                    await eventually(lambda: admission.reserved_bytes > 0)
                    await asyncio.sleep(0.1)
                else:
                    assert (await conversation.read_answer()).status == status
            await eventually(lambda: admission.requests == 0)
        await asyncio.sleep(0.1)
        assert kept_mb() < 4, "less than one body"


LARGE_ANSWER = msgspec.json.encode({"messages": [{"to": "\1" * 64}] * 1_000})


async def test_an_answer_does_not_stay_with_an_idle_connection(gateway: GatewayUnderTest) -> None:
    request = post(gateway, LARGE_ANSWER)
    with traced_without_collector() as kept_mb:
        async with AsyncExitStack() as stack:
            for _ in range(8):
                idle = await stack.enter_async_context(connect(gateway.url))
                await idle.send(request)
                assert (await idle.read_answer()).status == 200
            assert kept_mb() < 1, "less than two answers"


async def test_an_answer_is_counted_with_the_bytes_in_flight(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    monkeypatch.setattr(Slot, "hold_answer", lambda _slot, size: held.append(size))
    _, _, headers = await gateway.post(LARGE_ANSWER)
    assert held == [int(headers["Content-Length"])]


async def test_an_unread_answer_does_not_outlive_its_connection(gateway: GatewayUnderTest) -> None:
    request = post(gateway, LARGE_ANSWER)
    with traced_without_collector() as kept_mb:
        for _ in range(3):
            with socket.socket() as unread:
                unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                unread.connect((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port))
                unread.setblocking(False)
                await fill_with_unread_answers(unread, request)
                assert gateway.runtime.admission.requests == 1
            await eventually(lambda: gateway.runtime.admission.requests == 0)
        await asyncio.sleep(0.1)
        assert kept_mb() < 1, "less than two answers"


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
HANG_UPS = {
    "at once": lambda _request: b"",
    "in a head": lambda request: request[:50],
    "behind a head": lambda request: request[: request.index(b"{")],
    "in a body": lambda request: request[:-1],
    "in chunks": lambda request: request.replace(b"\r\n\r\n", b"\r\n" + CHUNKED + b"1\r\n").replace(b"Content", b"X"),
    "behind a request": lambda request: request,
    "in the body of a second request": lambda request: request + request[:-1],
    "in the body of a request without a key": lambda request: request.replace(b"X-Api-Key", b"X-Other")[:-1],
    "behind malformed HTTP": lambda request: b"X" + request,
}


@pytest.mark.parametrize("sent", HANG_UPS.values(), ids=HANG_UPS)
async def test_a_connection_whose_caller_hangs_up_does_not_wait_for_the_garbage_collector(
    gateway: GatewayUnderTest, sent: Callable[[bytes], bytes]
) -> None:
    def connections() -> int:
        return sum(isinstance(each, _Connection) for each in gc.get_objects())

    request = post(gateway, gateway.caller.body())
    gc.collect()
    gc.disable()
    try:
        for pause_s in (0, 0.05, 0.3):
            async with connect(gateway.url) as conversation:
                await eventually(lambda: connections() > 0)
                await conversation.send(sent(request))
                await asyncio.sleep(pause_s)
            await eventually(lambda: gateway.runtime.admission.requests == 0)
        await eventually(lambda: connections() == 0, timeout=5)
    finally:
        gc.enable()


@contextmanager
def traced_without_collector() -> Iterator[Callable[[], float]]:
    """Switch the garbage collector off; yield a function that returns the memory allocated since and kept, in MB."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()
        gc.enable()
