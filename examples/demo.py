"""The gateway at work, step by step, from an empty database to messages in the queue.

PostgreSQL, RabbitMQ and the gateway process are real and private to this run, also if the environment names others:
all settings of the environment (GATEWAY_…) are ignored. The gateway's counts are compared with
the messages in the queue; the first difference ends the demo with exit code 1.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import aio_pika

from testbed import Gateway, ServerError, Servers

Message = dict[str, Any]

QUEUE = "sms.outbound"
WITH_IDS = {"Prefer": "return=representation"}
DEPTH_TIMEOUT_S = 5.0  # a quorum queue counts a message a moment after confirming it
REPOSITORY = Path(__file__).parents[1]


class Mismatch(Exception):
    """Raised when the gateway's answer and the queue do not agree."""


def step(text: str) -> None:
    """Print a line for a step that is done."""
    print(f"✓ {text}", flush=True)


def title(text: str) -> None:
    """Print the title of the next part."""
    print(f"\n{text}\n", flush=True)


def expect(name: str, expected: object, actual: object) -> None:
    """Raise Mismatch when the two differ."""
    if expected != actual:
        raise Mismatch(f"{name}: expected {expected}, found {actual}")


def forget_settings() -> list[str]:
    """Remove the gateway's settings from the environment of this process, and return their names."""
    names = sorted(name for name in os.environ if name.startswith("GATEWAY_"))
    for name in names:
        del os.environ[name]
    return names


def administer(settings: dict[str, str], *arguments: str) -> str:
    """Run `python -m gateway …`, as an operator would, and return its output. Raises ServerError when it fails."""
    command = [sys.executable, "-m", "gateway", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ServerError(f"python -m gateway {shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def curl(gateway: Gateway, key: str, body: str) -> str:
    """Return a request for ids in the answer as a curl command."""
    sent = {"X-Api-Key": key, "Content-Type": "application/json"} | WITH_IDS
    headers = " ".join(f"-H '{name}: {value}'" for name, value in sent.items())
    return f"curl -s {gateway.url}/api/v2/send/bulk \\\n  {headers} \\\n  -d {shlex.quote(body)}"


def send(gateway: Gateway, key: str, messages: list[Message], shown: str) -> Message:
    """Send a batch, print its body as `shown`, and return the answer. Raises Mismatch unless it is a 200."""
    print(f"$ {curl(gateway, key[:8] + '…', shown)}\n")
    body = json.dumps({"messages": messages})
    connection = HTTPConnection("127.0.0.1", gateway.port.number, timeout=30)
    begin = time.perf_counter()
    headers = {"X-Api-Key": key, "Content-Type": "application/json"} | WITH_IDS
    connection.request("POST", "/api/v2/send/bulk", body, headers)
    response = connection.getresponse()
    content = response.read()
    elapsed_ms = (time.perf_counter() - begin) * 1000
    connection.close()
    print(f"HTTP {response.status} {response.reason}, {elapsed_ms:.0f} ms")
    if response.status != HTTPStatus.OK:
        raise Mismatch(f"the gateway answered {content.decode(errors='replace')}")
    answer: Message = json.loads(content)
    return answer


def show_what_to_try(gateway: Gateway, settings: dict[str, str], ignored: list[str], send_one: str) -> None:
    """Print commands for this gateway, as another terminal takes them; `ignored`: settings that it may have."""
    status = f"{shlex.quote(sys.executable)} -m gateway status --gateway {gateway.ops_url}"
    title("The gateway runs until Ctrl-C. Try it, in another terminal. A message more:")
    print(send_one)
    title("The state of gateway, broker and database:")
    if others := [name for name in ignored if name not in settings]:
        print(f"unset {' '.join(others)}")
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"(cd {shlex.quote(str(REPOSITORY))} && {status})")
    title("The API's documentation, as a page, and the metrics:")
    print(f"{gateway.ops_url}/docs\n{gateway.ops_url}/metrics", flush=True)


def mixed_batch(lists: tuple[str, str]) -> tuple[list[Message], Counter[str]]:
    """Return 1,000 messages, some of them bad, and the number of bad ones by error code."""
    messages: list[Message] = [
        {
            "to": f"+1415555{number:04d}",
            "list_number": lists[number % 2],
            "body": f"Hello number {number}, your reference is {{{{messageId}}}}",
        }
        for number in range(1000)
    ]
    flaws: dict[str, Message] = {
        "missing_to": {"to": ""},
        "missing_list_number": {"list_number": None},
        "missing_body": {"body": ""},
        "invalid_phone": {"to": "4155559876"},
        "invalid_list_number": {"list_number": "1-800-FLOWERS"},
        "list_not_found": {"list_number": "+18005559999"},
        "invalid_field": {"wrap_links": "yes, please"},
    }
    expected = Counter({code: count for count, code in enumerate(flaws, start=3)})
    for place, code in zip(range(10, 1000, 23), expected.elements(), strict=False):
        messages[place].update(flaws[code])
    return messages, expected


def show_errors(errors: list[Message]) -> None:
    """Print one row of each error code, and the number of rows with that code."""
    examples = {row["code"]: row for row in reversed(errors)}
    counts = Counter(row["code"] for row in errors)
    for code in counts:
        print(f"  {counts[code]:3d} × {json.dumps(examples[code], ensure_ascii=False)}")


async def look_into_queue(amqp_url: str, expected: int | None = None) -> tuple[int, list[bytes]]:
    """Return the queue's depth and its first three payloads, which stay in the queue.

    If the depth is known, wait for it for at most DEPTH_TIMEOUT_S.
    """
    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        deadline = time.monotonic() + DEPTH_TIMEOUT_S
        while True:
            queue = await channel.declare_queue(QUEUE, passive=True)
            depth = queue.declaration_result.message_count or 0
            if expected in (None, depth) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        taken = [message for _ in range(3) if (message := await queue.get(fail=False)) is not None]
        for message in taken:
            await message.nack(requeue=True)
        return depth, [message.body for message in taken]


def show(once: bool) -> None:
    """Run all parts of the demo; unless `once`, leave the gateway running until Ctrl-C."""
    print("SMS gateway: a demonstration on this machine, with private servers\n")
    ignored = forget_settings()
    begin = time.monotonic()
    with Servers() as servers:
        settings = servers.environment()
        step(f"PostgreSQL and RabbitMQ started in {time.monotonic() - begin:.1f} s")

        administer(settings, "migrate")
        step("database migrated")

        account = str(json.loads(administer(settings, "account", "create", "Acme", "--json"))["id"])
        key = str(json.loads(administer(settings, "key", "create", account, "--json"))["key"])
        lists = ("+18005551000", "+18005552000")
        for number in lists:
            administer(settings, "list", "add", account, number, "--json")
        step(f"account Acme created, with an API key and the sending lists {lists[0]} and {lists[1]}")

        with Gateway(settings | {"GATEWAY_DRAIN_DELAY_S": "0"}) as gateway:
            step(f"gateway ready on {gateway.url}")

            title("The documented request: two messages, the second with a bad phone number")
            body = "Your promo code is SAVE20. Ref: {{messageId}}"
            two: list[Message] = [
                {"to": "+14155551234", "list_number": lists[0], "body": body},
                {"to": "4155559876", "list_number": lists[0], "body": body},
            ]
            answer = send(gateway, key, two, json.dumps({"messages": two}, indent=2))
            print(json.dumps(answer, indent=2, ensure_ascii=False))
            expect("queued", 1, answer["queued_count"])
            expect("error codes", ["invalid_phone"], [row["code"] for row in answer["errors"]])
            step("1 queued, 1 refused: a bad message does not affect the others")
            queued, ids = answer["queued_count"], [row["message_id"] for row in answer["messages"]]

            title("A full batch: 1,000 messages to both lists, some of them bad, with every code of the validation")
            messages, flaws = mixed_batch(lists)
            answer = send(gateway, key, messages, '{"messages": [… 1,000 of them …]}')
            print(f'"queued_count": {answer["queued_count"]}, "error_count": {answer["error_count"]}, "errors":')
            show_errors(answer["errors"])
            expect("queued", len(messages) - flaws.total(), answer["queued_count"])
            expect("error rows by code", flaws, Counter(row["code"] for row in answer["errors"]))
            step(f"{answer['queued_count']} queued, {answer['error_count']} refused, each with its reason")
            queued += answer["queued_count"]
            ids += [row["message_id"] for row in answer["messages"]]

            title(f"The first messages in the queue {QUEUE}")
            depth, payloads = asyncio.run(look_into_queue(servers.amqp_url, queued))
            for payload in payloads:
                print(f"  {payload.decode()}")
            expect(f"messages in {QUEUE}", queued, depth)
            expect("ids", ids[: len(payloads)], [json.loads(payload)["id"] for payload in payloads])
            step(f"{depth} messages in the queue, exactly the {queued} that the gateway counted")

            if once:
                return
            show_what_to_try(gateway, settings, ignored, curl(gateway, key, json.dumps({"messages": two[:1]})))
            with suppress(KeyboardInterrupt):
                signal.pause()
            print("\nstopping")


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end by itself instead of running until Ctrl-C")
    try:
        show(parser.parse_args().once)
    except (Mismatch, ServerError) as error:
        print(f"✗ {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
