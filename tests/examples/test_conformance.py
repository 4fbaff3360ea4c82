"""The conformance kit: it passes against the gateway, and fails where a server breaks a rule.

The wrong servers are the gateway behind a proxy that spoils requests or answers.
"""

import asyncio
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from examples.conformance.__main__ import check
from examples.conformance.cases import CASES
from examples.conformance.target import SINGLE, Target
from gateway.cli.admin import Admin
from tests.support.callers import make_caller
from tests.support.gateways import ROOT, GatewayUnderTest


@pytest.fixture
async def foreign_list_number(admin: Admin) -> str:
    return (await make_caller(admin, "foreign")).list_number


def target_of(gateway: GatewayUnderTest, url: str, foreign: str) -> Target:
    return Target(url, gateway.caller.key, gateway.caller.list_number, foreign)


async def run_kit(url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "examples.conformance", "--url", url, *options]
    return await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


async def test_the_gateway_holds_every_rule(gateway: GatewayUnderTest, foreign_list_number: str) -> None:
    caller = gateway.caller
    options = ["--key", caller.key, "--list-number", caller.list_number]
    completed = await run_kit(gateway.api_url, *options, "--foreign-list-number", foreign_list_number)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert completed.stdout.endswith(f"{len(CASES)} rules, 0 broken, 0 skipped\n")
    assert completed.stdout.count(" holds\n") == len(CASES)


async def test_without_a_second_account_one_rule_is_skipped(gateway: GatewayUnderTest) -> None:
    caller = gateway.caller
    completed = await run_kit(gateway.api_url, "--key", caller.key, "--list-number", caller.list_number)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert completed.stdout.count(" skipped: ") == 1
    last_line = f"{len(CASES)} rules, 0 broken, 1 skipped"
    assert completed.stdout.endswith(f"\n{last_line}\n")
    assert last_line in (ROOT / "docs/api.md").read_text()


async def test_a_server_that_is_not_there_is_an_error(gateway: GatewayUnderTest) -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        nobody = await run_kit(f"http://127.0.0.1:{bound.getsockname()[1]}", "--key", "k", "--list-number", "+1")
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "Connection refused" in nobody.stderr
    assert (await run_kit("sms.example.com", "--key", "k", "--list-number", "+1")).returncode == 2


async def test_a_wrong_option_is_named_and_breaks_no_rule(gateway: GatewayUnderTest) -> None:
    caller, api, other_key = gateway.caller, gateway.api_url, "trk_" + "x" * 32
    for url, key, number, says in (
        (api, other_key, caller.list_number, "--key: the server answers 401: it does not accept this API key"),
        (api, caller.key, "+18005550000", "--list-number: '+18005550000' is refused: list_not_found"),
        (api, caller.key, "800", "--list-number: '800' is refused: invalid_list_number"),
        (gateway.ops_url, caller.key, caller.list_number, "--url: the server answers 404 to /api/v2/send/bulk"),
        (f"{api}/api/v2", caller.key, caller.list_number, "--url: the server answers 404 to /api/v2/api/v2/send/bulk"),
    ):
        wrong = await run_kit(url, "--key", key, "--list-number", number)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1), wrong.stderr
        assert wrong.stderr.startswith(f"error: {says}")


async def test_a_server_that_does_not_speak_http_is_an_error() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"true}")
        writer.write(b"AMQP\0\0\x09\x01\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        broker = await run_kit(url, "--key", "k", "--list-number", "+18005551000")
    assert (broker.returncode, broker.stdout) == (2, "")
    assert broker.stderr.startswith("error: --url: no HTTP answer: ")


async def test_the_account_of_the_foreign_list_is_another(gateway: GatewayUnderTest) -> None:
    caller = gateway.caller
    number = caller.list_number
    options = ["--key", caller.key, "--list-number", number, "--foreign-list-number", number]
    same = await run_kit(gateway.api_url, *options)
    assert (same.returncode, same.stdout) == (2, "")
    assert "--foreign-list-number is that of another account, not --list-number" in same.stderr


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://127.0.0.1:port", "k"),
        ("http://127.0.0.1:65536", "k"),
        ("http://[::1", "k"),
        ("http://", "k"),
        ("http://exa mple", "k"),
        ("http://127.0.0.1:1/p\u00e4th", "k"),
        ("http://127.0.0.1:1", "trk_\u2026"),
        ("http://127.0.0.1:1", "trk_x\n"),
    ],
)
async def test_arguments_that_no_request_can_carry_are_no_broken_rules(url: str, key: str) -> None:
    completed = await run_kit(url, "--key", key, "--list-number", "+18005551000")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert "Traceback" not in completed.stderr


async def test_an_answer_that_is_nested_too_deeply_is_a_broken_rule() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text="[" * 100_000, content_type="application/json", headers={"X-Request-Id": "1"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        target = Target(site.name.replace(":0", f":{runner.addresses[0][1]}"), "k", "+18005551000")
        assert await asyncio.to_thread(check, "good_batch", target) == "broken: the answer is not JSON"
    finally:
        await runner.cleanup()


class Exchange(NamedTuple):
    """A request that was answered, as a wrong server sees it. `headers` and `answer` may be changed."""

    path: str
    sent: dict[str, str]
    headers: dict[str, str]
    answer: Any


Spoil = Callable[[Exchange, int], int]  # returns the status to answer with


def answers(change: Callable[[Exchange], object]) -> Spoil:
    """Return a flaw in the answers of 200."""

    def spoil(exchange: Exchange, status: int) -> int:
        if status == 200:
            change(exchange)
        return status

    return spoil


def always(change: Callable[[Exchange], object]) -> Spoil:
    """Return a flaw in all answers."""

    def spoil(exchange: Exchange, status: int) -> int:
        change(exchange)
        return status

    return spoil


def instead_of(code: str, status: int) -> Spoil:
    """Return a flaw: this status in place of the one that belongs to a code."""
    return lambda exchange, given: status if exchange.answer.get("code") == code else given


def in_rows(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Return a flaw in the error rows."""
    return answers(lambda exchange: [change(row) for row in exchange.answer.get("errors", [])])


def rename(code: str, other: str = "other") -> Spoil:
    """Return a flaw: another code, in rows and in refusals."""

    def spoil(exchange: Exchange, status: int) -> int:
        for part in (exchange.answer, *exchange.answer.get("errors", [])):
            if part.get("code") == code:
                part["code"] = other
        return status

    return spoil


def _count_all(exchange: Exchange) -> None:
    if "queued_count" in exchange.answer:
        exchange.answer["queued_count"] += exchange.answer["error_count"]


def _number_in_reverse(exchange: Exchange) -> None:
    exchange.answer.get("errors", []).reverse()


# Each flaw, and the cases that must notice it.
FLAWS: dict[str, tuple[Spoil, set[str]]] = {
    "201 for 200": (lambda _, status: 201 if status == 200 else status, {"good_batch", "texts", "chunked_body"}),
    "no X-Request-Id": (answers(lambda exchange: exchange.headers.pop("X-Request-Id")), {"good_batch"}),
    "a request id of its own": (answers(lambda e: e.headers.update({"X-Request-Id": "own"})), {"request_id"}),
    "any request id comes back": (
        always(lambda e: e.headers.update({"X-Request-Id": e.sent.get("X-Request-Id", "x")})),
        {"request_id"},
    ),
    "text/plain": (answers(lambda e: e.headers.update({"Content-Type": "text/plain"})), {"good_batch"}),
    "an extra field": (answers(lambda exchange: exchange.answer.update(x=1)), {"good_batch", "optional_fields"}),
    "refused messages are counted": (answers(_count_all), {"refused_messages", "no_objects"}),
    "rows out of order": (answers(_number_in_reverse), {"refused_messages"}),
    "the whole `to`": (in_rows(lambda row: row.update(to=(row["to"] or "") * 100)), {"refused_messages"}),
    "rows without sentences": (in_rows(lambda row: row.update(error="")), {"refused_messages"}),
    "refusals without sentences": (always(lambda exchange: exchange.answer.pop("error", 0)), {"authentication"}),
    "missing_to": (rename("missing_to"), {"no_objects", "order_of_checks", "refused_single_sends"}),
    "invalid_field": (rename("invalid_field"), {"refused_messages", "dry_run"}),
    "invalid_list_number": (rename("invalid_list_number"), {"default_list"}),
    "missing_messages": (instead_of("missing_messages", 422), {"number_of_messages", "idempotency_key_of_a_refusal"}),
    "too_many_messages": (instead_of("too_many_messages", 400), {"number_of_messages"}),
    "invalid_json": (instead_of("invalid_json", 422), {"invalid_json", "refused_single_sends"}),
    "payload_too_large": (rename("payload_too_large"), {"size_of_body"}),
    "unsupported_media_type": (instead_of("unsupported_media_type", 400), {"media_type"}),
    "missing_api_key": (rename("missing_api_key", "invalid_api_key"), {"authentication"}),
    "403 for an unknown key": (instead_of("invalid_api_key", 403), {"authentication"}),
    "404 for a method": (instead_of("method_not_allowed", 404), {"paths_and_methods"}),
    "no Allow": (always(lambda exchange: exchange.headers.pop("Allow", 0)), {"paths_and_methods"}),
    "replays are not marked": (
        answers(lambda exchange: exchange.headers.pop("Idempotent-Replayed", 0)),
        {"idempotency_key", "single_send"},
    ),
    "409 for a reused key": (instead_of("idempotency_key_reused", 409), {"idempotency_key"}),
    "any Idempotency-Key": (rename("invalid_idempotency_key"), {"idempotency_key_of_a_refusal"}),
    "ids of nine characters": (
        answers(lambda e: [row.update(message_id=row["message_id"] + "0") for row in e.answer.get("messages", [])]),
        {"ids_in_answers"},
    ),
    "no Preference-Applied": (answers(lambda e: e.headers.pop("Preference-Applied", 0)), {"ids_in_answers"}),
    "a dry run that is not marked": (answers(lambda exchange: exchange.answer.pop("dry_run", 0)), {"dry_run"}),
    "another status of a single send": (
        answers(lambda e: e.path == SINGLE and e.answer.update(status="sent")),
        {"single_send"},
    ),
    "a foreign list has words of its own": (
        in_rows(lambda row: row["index"] == 1 and row.update(error=row["error"] + ", but of another account")),
        {"foreign_list"},
    ),
}


def relay(url: str, method: str, path: str, sent: dict[str, str], body: bytes) -> tuple[Exchange, int]:
    """Send a request to the gateway; return the exchange, and the status of the answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        headers = {name: value for name, value in answer.getheaders() if name not in ("Content-Length", "Connection")}
        return Exchange(path, sent, headers, json.loads(answer.read())), answer.status
    finally:
        connection.close()


@asynccontextmanager
async def wrong_server(gateway: GatewayUnderTest, spoil: Spoil) -> AsyncIterator[str]:
    """Yield the URL of a proxy before the gateway that spoils its answers."""

    async def forward(request: web.Request) -> web.Response:
        sent = {name: value for name, value in request.headers.items() if name not in ("Host", "Transfer-Encoding")}
        body = await request.read()
        exchange, status = await asyncio.to_thread(relay, gateway.api_url, request.method, request.path, sent, body)
        status = spoil(exchange, status)
        return web.Response(status=status, headers=exchange.headers, body=json.dumps(exchange.answer).encode())

    app = web.Application(client_max_size=10_000_000)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app, auto_decompress=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("name", FLAWS)
async def test_a_flaw_breaks_the_rules_that_it_concerns(
    gateway: GatewayUnderTest, foreign_list_number: str, name: str
) -> None:
    spoil, concerned = FLAWS[name]
    async with wrong_server(gateway, spoil) as url:
        target = target_of(gateway, url, foreign_list_number)
        results = {case: await asyncio.to_thread(check, case, target) for case in sorted(concerned)}
    assert {case for case, result in results.items() if result.startswith("broken")} == concerned, results


async def test_the_proxy_alone_breaks_nothing(gateway: GatewayUnderTest, foreign_list_number: str) -> None:
    async with wrong_server(gateway, lambda _, status: status) as url:
        target = target_of(gateway, url, foreign_list_number)
        results = {case: await asyncio.to_thread(check, case, target) for case in CASES}
    assert {case: result for case, result in results.items() if result != "holds"} == {}


def test_each_rule_is_broken_by_a_flaw() -> None:
    assert set().union(*(concerned for _, concerned in FLAWS.values())) == CASES.keys()
