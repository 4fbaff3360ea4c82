"""The clients that docs/api.md shows, generated from the OpenAPI document of a running gateway, send both ways.

scripts/clients installs the generators.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.documents import code_blocks, filled_in
from tests.support.gateways import GatewayUnderTest
from tests.support.openapi_document import REQUEST, RESPONSES, SINGLE_REQUEST, SINGLE_RESPONSES
from tests.support.outbound_queue import OutboundQueue

CLIENTS = Path(sys.prefix) / "clients"
PAGE = "docs/api.md"
TSC = "tsc --strict --exactOptionalPropertyTypes --target es2022 --lib es2022,dom --module esnext"
# The documented answers, through the generated classes and back.
READ_ALL = """
import json, sys
from sms_gateway_client.models import Answer, Refused, SingleAnswer
for kind, answer in json.load(sys.stdin):
    read = {"Answer": Answer, "Refused": Refused, "SingleAnswer": SingleAnswer}[kind].from_dict(answer)
    assert read.to_dict() == answer, (read, answer)
    print(read)
"""
ANSWERS = [
    (kind if status == "200" else "Refused", example["value"])
    for kind, responses in (("Answer", RESPONSES), ("SingleAnswer", SINGLE_RESPONSES))
    for status, response in responses.items()
    for example in response["content"]["application/json"]["examples"].values()
]
# The generators know types, and not the forms of strings.
WRONG_TYPES = {"no_object", "missing_to", "missing_body", "invalid_field"}


async def run(command: str, folder: Path, stdin: str = "") -> str:
    """Run a command in a folder, with the generators in its PATH; return what it prints."""
    process = await asyncio.create_subprocess_shell(
        f"{command} 2>&1",
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{CLIENTS}/bin:{CLIENTS}/node_modules/.bin:{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "sms-gateway-client"),
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await process.communicate(stdin.encode())
    assert process.returncode == 0, printed.decode()
    return printed.decode()


def generate_command(gateway: GatewayUnderTest, heading: str) -> str:
    """Return the command of the document that reads /openapi.json, for this gateway."""
    (commands,) = code_blocks(PAGE, heading)
    (command,) = (line for line in commands.splitlines() if "/openapi.json" in line)
    return filled_in(command, **{"http://127.0.0.1:8080": gateway.api_url})


def program(gateway: GatewayUnderTest, heading: str, language: str) -> str:
    """Return the program of the document, for this gateway and its caller."""
    (text,) = code_blocks(PAGE, heading, language)
    caller = gateway.caller
    values = {"http://127.0.0.1:8080": gateway.api_url, "trk_…": caller.key, "+18005551000": caller.list_number}
    return filled_in(text, **values)


async def assert_queued(queue: OutboundQueue, printed: str) -> None:
    """Compare the queue with what a program of the document has printed."""
    batched, single = await queue.take_payloads()
    assert (batched["to"], batched["metadata"]) == ("+14155551234", {"order": 77})
    assert batched["body"] == f"Hello. Ref: {batched['id']}"
    assert (single["to"], single["body"]) == ("+14155551234", "Your code is 4711")
    assert printed == f"1 queued, refused: []\nqueued {single['id']}\n"


async def test_a_generated_python_client_sends_a_batch_and_a_single_message(
    gateway: GatewayUnderTest, queue: OutboundQueue, tmp_path: Path
) -> None:
    printed = await run(generate_command(gateway, "### Python"), tmp_path)
    assert "Warning" not in printed
    assert "Error" not in printed
    (tmp_path / "send.py").write_text(program(gateway, "### Python", "python"))
    await assert_queued(queue, await run("python send.py", tmp_path))
    (tmp_path / "read.py").write_text(READ_ALL)
    assert (await run("python read.py", tmp_path, json.dumps(ANSWERS))).count("\n") == len(ANSWERS)


async def test_a_generated_typescript_client_sends_a_batch_and_a_single_message(
    gateway: GatewayUnderTest, queue: OutboundQueue, tmp_path: Path
) -> None:
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    await run(generate_command(gateway, "### TypeScript"), tmp_path)
    (tmp_path / "send.ts").write_text(program(gateway, "### TypeScript", "ts"))
    (tmp_path / "examples.ts").write_text(typed_examples())
    await run(f"{TSC} --moduleResolution bundler send.ts examples.ts", tmp_path)
    await assert_queued(queue, await run("node send.js", tmp_path))


def typed_examples() -> str:
    """Return a TypeScript module in which every example has the type of its schema, and wrong types are errors."""
    lines = ['import type { components } from "./gateway";', 'type Schemas = components["schemas"];']
    values = [
        (kind, example["value"], name in WRONG_TYPES)
        for kind, request in (("Bulk", REQUEST), ("Single", SINGLE_REQUEST))
        for name, example in request["examples"].items()
    ]
    for number, (kind, value, is_wrong) in enumerate([*values, *((kind, value, False) for kind, value in ANSWERS)]):
        lines.append("// @ts-expect-error" if is_wrong else "")
        lines.append(f'export const example_{number}: Schemas["{kind}"] = {json.dumps(value)};')
    return "\n".join(lines)


@pytest.mark.parametrize("heading", ["### Python", "### TypeScript"])
def test_the_packages_in_the_document_are_those_that_are_tested(heading: str) -> None:
    (commands,) = code_blocks(PAGE, heading)
    folder = Path(__file__).parents[1] / "clients"
    locked = (folder / "requirements.in").read_text() + (folder / "package.json").read_text()
    installed = [word for line in commands.splitlines() for word in line.split()[2:] if " install " in line]
    assert installed
    assert [name for name in installed if name not in locked and name != "./sms-gateway-client"] == []
