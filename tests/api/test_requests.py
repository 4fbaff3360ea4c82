"""docs/api.md, "Request-level errors" and the answer's form: every row through HTTP, against the real servers."""

import asyncio
import gzip
import hashlib
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import asyncpg
import msgspec
import pytest
from yarl import URL

from gateway.cli.admin import Admin
from gateway.errors import InvalidJson
from gateway.telemetry.requests import RequestRecord
from gateway.telemetry.tracing import NoTracing
from gateway.web import openapi
from tests.support.admission import entered, held_slot
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.raw_http import connect, exchange


async def assert_refused(outcome: tuple[int, Any, Any], status: int, code: str) -> str:
    """Assert that a whole request was refused, with exactly the keys `error` and `code`; return the sentence."""
    got_status, answer, _ = outcome
    assert (got_status, answer.get("code")) == (status, code)
    assert set(answer) == {"error", "code"}
    sentence: str = answer["error"]
    assert sentence
    return sentence


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"messages":null}', b'{"messages":{}}', b'{"messages":"x"}', b'{"messages":7}', b'{"messages":[]}'],
)
async def test_messages_must_be_a_filled_array(gateway: GatewayUnderTest, body: bytes) -> None:
    await assert_refused(await gateway.post(body), 400, "missing_messages")


BAD_JSON = {
    "empty": b"",
    "no object": b"[]",
    "null": b"null",
    "a number": b"1",
    "trailing comma": b'{"messages":[],}',
    "trailing data": b'{"messages":[]} x',
    "NaN": b'{"messages":[NaN]}',
    "comment": b'{"messages":[]/**/}',
    "byte order mark": b'\xef\xbb\xbf{"messages":[]}',
    "utf-16": '{"messages":[]}'.encode("utf-16"),
    "invalid UTF-8": b'{"messages":[{"to":"\xff"}]}',
    "invalid UTF-8 in an unknown field": b'{"messages":[{"unknown":"\xff"}]}',
    "lone surrogate": b'{"messages":[{"to":"\\ud800"}]}',
    "100,000 brackets": b'{"messages":' + b"[" * 100_000,
    "deep nesting": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"messages":[]}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
async def test_bad_json_is_refused_as_such(gateway: GatewayUnderTest, body: bytes) -> None:
    sentence = await assert_refused(await gateway.post(body), 400, "invalid_json")
    assert sentence.startswith(f"{InvalidJson.sentence}: ")


@pytest.mark.parametrize("key", ["", " "])
async def test_an_empty_key_is_no_key(gateway: GatewayUnderTest, key: str) -> None:
    sentence = await assert_refused(await gateway.post(b"{}", X_Api_Key=key), 401, "missing_api_key")
    assert sentence == "API key required"


async def test_a_key_is_required(gateway: GatewayUnderTest) -> None:
    async with gateway.session.post(gateway.url, data=b"{}", headers={"Authorization": gateway.caller.key}) as response:
        assert response.status == 401
        assert await response.json() == {"error": "API key required", "code": "missing_api_key"}


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key[:-1] + ("a" if key[-1] != "a" else "b"),
        lambda _: "trk_" + "0" * 32,
        lambda key: key[4:],
        lambda key: key.upper(),
        lambda key: key + "x",
        lambda key: key + "x" * 7_000,
        lambda _: "sk_live_1234",
    ],
    ids=["last character", "unknown", "no prefix", "upper case", "too long", "7 kB", "another kind"],
)
async def test_a_wrong_key_is_invalid(gateway: GatewayUnderTest, change: Any) -> None:
    sentence = await assert_refused(
        await gateway.post(b"{}", X_Api_Key=change(gateway.caller.key)), 401, "invalid_api_key"
    )
    assert sentence == "Invalid API key"


@pytest.mark.parametrize(
    "lines",
    [[b"X-Api-Key: \xff\xfe\xe9"], [b"X-Api-Key: KEY", b"X-Api-Key: KEY"], [b"X-Api-Key: KEY, KEY"]],
    ids=["bytes over 127", "two headers", "two keys in one"],
)
async def test_a_key_that_no_client_should_send_is_invalid(gateway: GatewayUnderTest, lines: list[bytes]) -> None:
    headers = [line.replace(b"KEY", gateway.caller.key.encode()) for line in lines]
    answer = await exchange(gateway.url, headers=[*headers, b"Content-Length: 2"], body=b"{}")
    await assert_refused((answer.status, answer.json(), None), 401, "invalid_api_key")


async def test_only_the_digest_of_a_key_is_stored(gateway: GatewayUnderTest, admin: Admin) -> None:
    (row,) = await admin.list_keys(gateway.caller.account_id)
    assert gateway.caller.key not in str(row)
    account = await gateway.runtime.queries.find_account(hashlib.sha256(gateway.caller.key.encode()).digest())
    assert account is not None
    assert account.id == gateway.caller.account_id


async def test_revocation_takes_effect_on_the_next_request(
    gateway: GatewayUnderTest, queue: OutboundQueue, admin: Admin
) -> None:
    assert (await gateway.send([gateway.message()]))[0] == 200
    await admin.revoke_key(gateway.caller.key_id)
    await assert_refused(await gateway.post(b'{"messages":[]}'), 401, "invalid_api_key")
    assert await queue.depth() == 1


async def test_suspension_takes_effect_on_the_next_request_and_so_does_its_end(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    assert (await gateway.send([gateway.message()]))[0] == 200
    await admin.set_account_status(gateway.caller.account_id, "suspended")
    sentence = await assert_refused(await gateway.post(b'{"messages":[]}'), 403, "account_suspended")
    assert sentence == "Account is suspended"
    await admin.set_account_status(gateway.caller.account_id, "active")
    assert (await gateway.send([gateway.message()]))[0] == 200


async def test_deactivating_a_list_takes_effect_on_the_next_request_and_so_does_its_end(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    async def queued() -> int:
        _, answer = await gateway.send([gateway.message()])
        count: int = answer["queued_count"]
        return count

    assert await queued() == 1
    await admin.set_list_status(gateway.caller.list_id, "inactive")
    assert await queued() == 0
    await admin.set_list_status(gateway.caller.list_id, "active")
    assert await queued() == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v2/send/bulk", 405, "method_not_allowed"),
        ("PUT", "/api/v2/send/bulk", 405, "method_not_allowed"),
        ("DELETE", "/api/v2/send/bulk", 405, "method_not_allowed"),
        ("GET", "/api/v2/%73end/bulk", 405, "method_not_allowed"),  # a letter that is quoted is the same letter
        ("POST", "/api/v2/sends", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("POST", "/api/v2/send/bulk/", 404, "not_found"),
        ("POST", "/api/v2/send%2Fbulk", 404, "not_found"),  # another path: the slash is data
        ("GET", "/livez", 404, "not_found"),
    ],
)
async def test_other_paths_and_methods(
    gateway: GatewayUnderTest, method: str, path: str, status: int, code: str
) -> None:
    async with gateway.session.request(method, URL(gateway.api_url + path, encoded=True)) as response:
        await assert_refused((response.status, await response.json(), None), status, code)
        assert response.headers.get("Allow") == ("POST" if status == 405 else None)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/api/v2/send/bulk", "/api/v2/send/bulk"),
        ("/api/v2/send", "/api/v2/send"),
        ("/api/v2/%73end", "/api/v2/send"),
        ("/api/v2/send%2Fbulk", ""),
    ],
)
async def test_a_trace_has_the_route_of_the_calls_that_send_alone(
    gateway: GatewayUnderTest, path: str, route: str
) -> None:
    routes = list[str]()

    class NotedRoutes(NoTracing):
        def begin(self, _record: RequestRecord, _method: str, route: str, _headers: Mapping[str, str]) -> None:
            routes.append(route)

    gateway.runtime.tracing = NotedRoutes()
    async with gateway.session.post(URL(gateway.api_url + path, encoded=True)) as response:
        assert response.status == (401 if route else 404)
    assert routes == [route]


async def test_a_body_that_does_not_arrive_is_not_waited_for(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(body_timeout_s=0.2))
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: 100"]
    answer = await exchange(gateway.url, headers=headers, body=b'{"messages"')
    await assert_refused((answer.status, answer.json(), None), 408, "request_timeout")


async def test_a_thousand_messages_are_taken_and_one_more_is_not(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    _, answer = await gateway.send([gateway.message()] * 1000)
    assert answer == {"queued_count": 1000, "error_count": 0, "errors": []}
    body = gateway.caller.body(1001)
    await assert_refused(await gateway.post(body), 413, "too_many_messages")
    await assert_refused(await gateway.post(b'{"messages":[' + b"1," * 1000 + b"1]}"), 413, "too_many_messages")
    await assert_refused(await gateway.post(b'{"messages":[' + b"{}," * 139_000 + b"{}]}"), 413, "too_many_messages")
    assert await queue.depth() == 1000


def padded(gateway: GatewayUnderTest, size: int) -> bytes:
    """Return a valid request of exactly `size` bytes."""
    body = msgspec.json.encode({"messages": [gateway.message()], "padding": ""})
    return body[:-2] + b" " * (size - len(body)) + body[-2:]


@pytest.mark.parametrize("chunked", [False, True])
async def test_five_megabytes_are_taken_and_one_byte_more_is_not(
    gateway: GatewayUnderTest, queue: OutboundQueue, *, chunked: bool
) -> None:
    async def in_chunks(body: bytes) -> Any:
        for at in range(0, len(body), 100_000):
            yield body[at : at + 100_000]

    largest, larger = padded(gateway, 5_242_880), padded(gateway, 5_242_881)
    status, answer, _ = await gateway.post(in_chunks(largest) if chunked else largest)
    assert (status, answer["queued_count"]) == (200, 1)
    await assert_refused(await gateway.post(in_chunks(larger) if chunked else larger), 413, "payload_too_large")
    assert await queue.depth() == 1


async def test_a_body_announced_as_too_large_is_not_read(gateway: GatewayUnderTest) -> None:
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: 10000000000"]
    answer = await exchange(gateway.url, headers=headers, body=b"")
    await assert_refused((answer.status, answer.json(), None), 413, "payload_too_large")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain"},
        {"Content_Type": "multipart/form-data; boundary=x"},
        {"Content_Type": "application/json; charset=utf-16"},
        {"Content_Type": "application/jsonl"},
        {"Content_Encoding": "gzip"},
        {"Content_Encoding": "br"},
        {"Content_Encoding": "foo"},
        {"Content_Encoding": "gzip, gzip"},
    ],
    ids=str,
)
async def test_only_plain_json_is_taken(gateway: GatewayUnderTest, headers: dict[str, str]) -> None:
    body = gzip.compress(gateway.caller.body())
    await assert_refused(await gateway.post(body, **headers), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Type: application/json; charset=utf-8",
        b'Content-Type: APPLICATION/JSON ; charset="UTF-8"',
        b'Content-Type: application/json; x="a, b; charset=utf-16"; charset=utf-8',
        b"Content-Encoding: identity",
        b"Content-Encoding: Identity",
        b"Content-Encoding:",
        b"Accept: */*",
    ],
)
async def test_json_may_be_announced_in_any_spelling_or_not_at_all(
    gateway: GatewayUnderTest, queue: OutboundQueue, line: bytes
) -> None:
    body = gateway.caller.body()
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: %d" % len(body), line]
    answer = await exchange(gateway.url, headers=headers, body=body)
    assert answer.status == 200
    assert await queue.depth() == 1


async def test_the_body_is_not_asked_for_without_a_good_key(gateway: GatewayUnderTest) -> None:
    headers = [b"X-Api-Key: nonsense", b"Content-Length: 100", b"Expect: 100-continue"]
    answer = await exchange(gateway.url, headers=headers, body=b"")
    assert (answer.status, answer.raw.count(b"HTTP/1.1 ")) == (401, 1)


async def test_the_body_is_asked_for_with_a_good_key(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    body = gateway.caller.body()
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: %d" % len(body), b"Expect: 100-continue"]
    answer = await exchange(gateway.url, headers=headers, body=body)
    assert answer.raw.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    assert await queue.depth() == 1


@pytest.mark.parametrize("expectation", [b"100-continue", b"miracles"])
@pytest.mark.parametrize(("line", "status"), [(b"POST /nope", 404), (b"PUT /api/v2/send/bulk", 405)])
async def test_no_expectation_is_met_on_an_unknown_path(
    gateway: GatewayUnderTest, line: bytes, status: int, expectation: bytes
) -> None:
    request = line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: " + expectation + b"\r\n\r\n{}"
    answer = await exchange(gateway.url, request=request)
    assert (answer.status, answer.raw.count(b"HTTP/1.1 ")) == (status, 1)
    assert b"\r\nX-Request-Id: " in answer.raw
    assert set(answer.json()) == {"error", "code"}


async def test_an_old_client_is_not_told_to_continue(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    body = gateway.caller.body()
    head = f"X-Api-Key: {gateway.caller.key}\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    request = b"POST /api/v2/send/bulk HTTP/1.0\r\n" + head.encode() + body
    answer = await exchange(gateway.url, request=request)
    assert answer.raw.startswith(b"HTTP/1.0 200 ")
    assert await queue.depth() == 1


async def test_no_other_expectation_is_met(gateway: GatewayUnderTest) -> None:
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: 2", b"Expect: miracles"]
    answer = await exchange(gateway.url, headers=headers, body=b"{}")
    await assert_refused((answer.status, answer.json(), None), 417, "expectation_failed")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n{}",
        b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: a\x00b\r\n\r\n",
    ],
    ids=["nonsense", "TLS", "two lengths", "signed length", "length and chunks", "NUL in a header"],
)
async def test_malformed_http_is_answered_in_json(gateway: GatewayUnderTest, request_bytes: bytes) -> None:
    answer = await exchange(gateway.url, request=request_bytes)
    await assert_refused((answer.status, answer.json(), None), 400, "malformed_http")
    assert b"\r\nX-Request-Id: " in answer.raw


async def test_a_caller_that_hangs_up_in_the_middle_disturbs_nobody(
    gateway: GatewayUnderTest, queue: OutboundQueue, caplog: pytest.LogCaptureFixture
) -> None:
    headers = [b"X-Api-Key: " + gateway.caller.key.encode(), b"Content-Length: 100"]
    await exchange(gateway.url, headers=headers, body=b'{"messages"', hang_up=True)
    assert (await gateway.send([gateway.message()]))[0] == 200
    assert await queue.depth() == 1
    await eventually(lambda: gateway.runtime.admission.requests == 0)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


async def test_a_caller_that_hangs_up_after_the_body_is_still_served(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    body = gateway.caller.body()
    database = await asyncpg.connect(gateway.runtime.settings.database_url)
    try:
        async with database.transaction():
            await database.execute("LOCK TABLE sending_lists")  # the request waits here until its caller has gone
            request = asyncio.create_task(gateway.post(body))
            while not await database.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            request.cancel()
    finally:
        await database.close()
    await eventually(lambda: gateway.runtime.admission.requests == 0)
    assert await queue.depth() == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("order-77", True),
        ("a" * 128, True),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("a" * 129, False),
        ("with space", False),
        ('quote"', False),
    ],
)
async def test_a_valid_request_id_is_returned_and_any_other_is_replaced(
    gateway: GatewayUnderTest, given: str, *, kept: bool
) -> None:
    for body in (b"{}", gateway.caller.body()):
        _, _, headers = await gateway.post(body, X_Request_Id=given)
        assert (headers["X-Request-Id"] == given) is kept


async def test_requests_beyond_the_slots_are_refused_before_they_cost_anything(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(max_requests_in_flight=1))
    with held_slot(gateway.runtime.admission):
        outcome = await gateway.post(b"{}")
        await assert_refused(outcome, 503, "overloaded")
        assert int(outcome[2]["Retry-After"]) > 0
    assert (await gateway.send([gateway.message()]))[0] == 200


async def test_a_body_beyond_the_limit_of_bytes_waits(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    gateway = await start_gateway(make_settings(max_bytes_in_flight=1000))
    admission = gateway.runtime.admission
    async with entered(admission, 900):
        request = asyncio.create_task(gateway.send([gateway.message()]))
        await eventually(lambda: admission.waiting == 1)
    assert (await request)[0] == 200


async def test_room_for_a_body_is_taken_only_by_those_with_a_key(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(max_bytes_in_flight=1000))
    headers = [b"X-Api-Key: trk_" + b"0" * 32, b"Content-Length: 5000000"]
    answer = await exchange(gateway.url, headers=headers, body=b"")
    await assert_refused((answer.status, answer.json(), None), 401, "invalid_api_key")


async def test_an_answer_that_the_caller_does_not_read_is_abandoned(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(answer_timeout_s=0.3))
    pipelined = 400  # answers of 30 kB: more than the sockets' buffers take
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.api_url.rsplit(":", 1)[1]), limit=1024)
    try:
        writer.write(f"GET {openapi.PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * pipelined)
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # typed as a write-only transport
        await asyncio.sleep(1.5)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):  # what was on the way still comes
            await reader.readexactly(pipelined * 30_000)
    finally:
        writer.transport.abort()
    assert (await gateway.send([gateway.message()]))[0] == 200


async def test_a_bug_is_answered_without_a_traceback(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.runtime.ids, "take", None)  # the bug
    body = gateway.caller.body()
    sentence = await assert_refused(await gateway.post(body, X_Request_Id="bug-1"), 500, "internal_error")
    assert "bug-1" in sentence
    assert "NoneType" not in sentence
    assert "bug-1" in caplog.text


@pytest.mark.parametrize(
    ("version", "lines", "stays_open"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: close"], False),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: keep-alive"], True),
    ],
)
async def test_a_counted_answer_is_complete_in_every_version_of_http(
    gateway: GatewayUnderTest, version: bytes, lines: list[bytes], stays_open: bool
) -> None:
    body = gateway.caller.body()
    head = [
        b"POST /api/v2/send/bulk HTTP/" + version,
        b"Host: x",
        b"X-Api-Key: " + gateway.caller.key.encode(),
        b"X-Request-Id: mine",
        b"Content-Length: %d" % len(body),
        *lines,
    ]
    async with connect(gateway.url) as conversation:
        for _ in range(2 if stays_open else 1):
            await conversation.send(b"\r\n".join([*head, b"", b""]) + body)
            answer = await conversation.read_answer()
            assert answer.status == 200
            assert answer.json() == {"queued_count": 1, "error_count": 0, "errors": []}
            assert answer.headers["x-request-id"] == "mine"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["server"] == "sms-gateway"
            assert abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 3
        if not stays_open:
            assert await conversation.is_closed()
