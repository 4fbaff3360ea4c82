"""The OpenAPI document is served, and is true: its examples are sent, and the answers are those in it."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from email.parser import BytesParser
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest

from gateway.cli.admin import Admin
from gateway.ingest.wire import MAX_BODY_BYTES
from gateway.web import openapi
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import (
    GatewayProcess,
    GatewayUnderTest,
    MakeSettings,
    StartGateway,
    process_environment,
    running,
)
from tests.support.openapi_document import REQUEST, RESPONSES, example_of, faults_of
from tests.support.outbound_queue import OutboundQueue
from tests.support.raw_http import RawAnswer, exchange
from tests.support.scripted_broker import Published, ScriptedBroker, Session

FILE = Path(__file__).parents[2] / "gateway/web/openapi.json"
ANSWERS = RESPONSES["200"]["content"]["application/json"]["examples"]
LIST_NUMBER_OF_THE_EXAMPLES = "+18005551000"


def in_the_callers_name(gateway: GatewayUnderTest, example: Any) -> bytes:
    """Return a request example with the caller's list number."""
    return msgspec.json.encode(example).replace(
        LIST_NUMBER_OF_THE_EXAMPLES.encode(), gateway.caller.list_number.encode()
    )


# The document is served


@pytest.mark.parametrize("listener", ["api", "operations"])
async def test_the_document_is_served_without_a_key(gateway: GatewayUnderTest, listener: str) -> None:
    url = (gateway.api_url if listener == "api" else gateway.ops_url) + "/openapi.json"
    async with gateway.session.get(url) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert response.headers["X-Request-Id"]
        assert await response.read() == FILE.read_bytes()
    async with gateway.session.head(url) as response:
        assert response.status == 200
        assert int(response.headers["Content-Length"]) == FILE.stat().st_size


async def test_the_document_is_read_only(gateway: GatewayUnderTest) -> None:
    async with gateway.session.post(f"{gateway.api_url}/openapi.json") as response:
        assert faults_of(response.status, response.headers, await response.read()) == []
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("listener", ["api", "operations"])
async def test_the_page_and_all_it_loads_come_from_the_listener(
    start_gateway: StartGateway, make_settings: MakeSettings, listener: str
) -> None:
    gateway = await start_gateway(make_settings(api_docs="on" if listener == "api" else "off"))
    url = gateway.api_url if listener == "api" else gateway.ops_url
    async with gateway.session.get(f"{url}/docs") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        page = await response.text()
    loads = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sorted(loads) == sorted(path.lstrip("/") for path in openapi.PAGE_PATHS[1:])
    for path in loads:
        async with gateway.session.get(f"{url}/{path}") as response:
            assert response.status == 200, path
            assert int(response.headers["Content-Length"]) == len(await response.read())
    async with gateway.session.post(f"{url}/docs") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


async def test_several_workers_serve_the_page_and_its_document_on_both_ports(servers: Servers) -> None:
    settings = process_environment(servers, GATEWAY_API_DOCS="on")
    async with running(GatewayProcess(settings, workers=2)) as process, aiohttp.ClientSession() as session:
        for url, path in product((process.url, process.ops_url), (openapi.PATH, *openapi.PAGE_PATHS)):
            async with session.get(f"{url}{path}") as response:
                assert response.status == 200, (url, path)
    async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
        await queue.delete()


async def test_the_api_serves_no_page_unless_told_to(gateway: GatewayUnderTest) -> None:
    for path in openapi.PAGE_PATHS:
        async with gateway.session.get(f"{gateway.api_url}{path}") as response:
            assert (response.status, (await response.json())["code"]) == (404, "not_found")


# Its examples are true


@pytest.mark.parametrize("name", REQUEST["examples"])
async def test_each_request_example_gives_the_answer_of_the_same_name(gateway: GatewayUnderTest, name: str) -> None:
    body = in_the_callers_name(gateway, REQUEST["examples"][name]["value"])
    status, answer, headers = await gateway.post(body)
    assert faults_of(status, headers, msgspec.json.encode(answer)) == []
    assert (status, answer) == (200, ANSWERS[name]["value"])


@pytest.mark.parametrize("code", ["queue_rejected", "outcome_unknown"])
async def test_a_message_that_the_queue_refuses_is_a_row_as_documented(
    start_gateway: StartGateway, make_settings: MakeSettings, code: str
) -> None:
    def take_the_first(session: Session, published: Published) -> None:
        if published.delivery_tag == 1:
            session.ack(1)
        elif code == "queue_rejected":
            session.nack(2)

    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = take_the_first
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.3))
        status, answer, headers = await gateway.post(gateway.caller.body(2))
        assert faults_of(status, headers, msgspec.json.encode(answer)) == []
        for row in answer["errors"]:
            if "message_id" in row:
                row["message_id"] = "AbC12345"
        assert answer == ANSWERS[code]["value"]


class Stage(NamedTuple):
    """A gateway on a scripted broker, on which each refusal is brought about."""

    gateway: GatewayUnderTest
    broker: ScriptedBroker
    admin: Admin

    @property
    def good(self) -> bytes:
        return msgspec.json.encode({"messages": [self.gateway.message()]})

    async def post(self, body: bytes | None = None, *headers: str, key: str | None = "") -> RawAnswer:
        """POST a request; return the raw answer. `key` replaces the caller's own; None sends none."""
        sent = self.good if body is None else body
        lines = [*headers, f"Content-Length: {len(sent)}"]
        if key is not None:
            lines.append(f"X-Api-Key: {key or self.gateway.caller.key}")
        return await exchange(self.gateway.url, headers=[line.encode() for line in lines], body=sent)

    async def call(self, request_line: str) -> RawAnswer:
        return await exchange(self.gateway.url, request=f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


Refuse = Callable[[Stage], Awaitable[RawAnswer]]


async def request_timeout(stage: Stage) -> RawAnswer:
    headers = [f"X-Api-Key: {stage.gateway.caller.key}".encode(), b"Content-Length: 100"]
    return await exchange(stage.gateway.url, headers=headers, body=b"{")


async def payload_too_large(stage: Stage) -> RawAnswer:
    headers = [f"X-Api-Key: {stage.gateway.caller.key}".encode(), b"Content-Length: %d" % (MAX_BODY_BYTES + 1)]
    return await exchange(stage.gateway.url, headers=headers)


async def account_suspended(stage: Stage) -> RawAnswer:
    await stage.admin.set_account_status(stage.gateway.caller.account_id, "suspended")
    return await stage.post()


async def idempotency_in_progress(stage: Stage) -> RawAnswer:
    stage.broker.mode = "silent"
    first = asyncio.create_task(stage.post(None, "Idempotency-Key: k"))
    await stage.broker.wait_published(1)
    answer = await stage.post(None, "Idempotency-Key: k")
    await first
    return answer


async def idempotency_key_reused(stage: Stage) -> RawAnswer:
    await stage.post(None, "Idempotency-Key: k")
    return await stage.post(stage.good + b" ", "Idempotency-Key: k")


async def too_many_idempotency_keys(stage: Stage) -> RawAnswer:
    stage.gateway.runtime.idempotency.stored_keys[stage.gateway.caller.account_id] = 1_000_000
    return await stage.post(None, "Idempotency-Key: k")


async def internal_error(stage: Stage) -> RawAnswer:
    del stage.gateway.runtime.pipeline  # a bug of ours
    return await stage.post()


async def queue_unavailable(stage: Stage) -> RawAnswer:
    stage.broker.sessions[-1].blocked("low on memory")
    await eventually(lambda: not stage.gateway.runtime.publisher.connections.is_usable())
    return await stage.post()


async def database_unavailable(stage: Stage) -> RawAnswer:
    await stage.gateway.runtime.pool.close()
    return await stage.post()


async def overloaded(stage: Stage) -> RawAnswer:
    stage.gateway.runtime.admission.requests = stage.gateway.runtime.settings.max_requests_in_flight
    try:
        return await stage.post()
    finally:
        stage.gateway.runtime.admission.requests = 0


async def draining(stage: Stage) -> RawAnswer:
    stage.gateway.runtime.admission.closed = True
    return await stage.post()


async def outcome_unknown(stage: Stage) -> RawAnswer:
    stage.broker.mode = "silent"
    return await stage.post()


REFUSALS: dict[str, Refuse] = {
    "missing_messages": lambda stage: stage.post(b"{}"),
    "invalid_field": lambda stage: stage.post(b'{"messages":[{}],"dry_run":1}'),
    "invalid_json": lambda stage: stage.post(b"{"),  # as the example: it ends too early
    "malformed_http": lambda stage: stage.post(None, "Transfer-Encoding: chunked"),
    "invalid_idempotency_key": lambda stage: stage.post(None, "Idempotency-Key:"),
    "missing_api_key": lambda stage: stage.post(key=None),
    "invalid_api_key": lambda stage: stage.post(key="trk_nonsense"),
    "account_suspended": account_suspended,
    "not_found": lambda stage: stage.call("POST /api/v2/sends"),
    "method_not_allowed": lambda stage: stage.call("GET /api/v2/send/bulk"),
    "request_timeout": request_timeout,
    "idempotency_in_progress": idempotency_in_progress,
    "too_many_messages": lambda stage: stage.post(b'{"messages":[' + b"1," * 1000 + b"1]}"),
    "payload_too_large": payload_too_large,
    "unsupported_media_type": lambda stage: stage.post(None, "Content-Type: text/plain"),
    "expectation_failed": lambda stage: stage.post(None, "Expect: miracles"),
    "idempotency_key_reused": idempotency_key_reused,
    "too_many_idempotency_keys": too_many_idempotency_keys,
    "internal_error": internal_error,
    "queue_unavailable": queue_unavailable,
    "database_unavailable": database_unavailable,
    "overloaded": overloaded,
    "draining": draining,
    "outcome_unknown": outcome_unknown,
}


def test_every_documented_refusal_is_brought_about() -> None:
    documented = {
        code
        for status, response in RESPONSES.items()
        if status != "200"
        for code in response["content"]["application/json"]["examples"]
    }
    assert set(REFUSALS) == documented


@pytest.mark.parametrize("code", REFUSALS)
async def test_each_refusal_is_answered_as_its_example(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin, code: str
) -> None:
    async with ScriptedBroker() as broker:
        settings = make_settings(
            amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.3, body_timeout_s=0.2, database_timeout_s=0.5
        )
        stage = Stage(await start_gateway(settings), broker, admin)
        answer = await REFUSALS[code](stage)
        head, _, body = answer.raw.partition(b"\r\n\r\n")
        headers = BytesParser().parsebytes(head.partition(b"\r\n")[2], headersonly=True)
        assert faults_of(answer.status, dict(headers) and headers, body) == []  # type: ignore[arg-type]
        said = re.sub(r"[0-9a-f]{16}-[0-9a-f]+$", "5f2c9a7e01d4b836-1f", answer.json()["error"])
        assert {"error": said, "code": answer.json()["code"]} == example_of(code)
