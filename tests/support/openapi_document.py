"""Checks of answers against gateway/web/openapi.json."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from tests.support.callers import SEND_PATH, SINGLE_PATH

DOCUMENT: dict[str, Any] = msgspec.json.decode((Path(__file__).parents[2] / "gateway/web/openapi.json").read_bytes())
COMPONENTS = DOCUMENT["components"]
SEND_BULK, SEND_SINGLE = (DOCUMENT["paths"][path]["post"] for path in (SEND_PATH, SINGLE_PATH))
REQUEST = SEND_BULK["requestBody"]["content"]["application/json"]
RESPONSES: dict[str, dict[str, Any]] = SEND_BULK["responses"]
SINGLE_REQUEST = SEND_SINGLE["requestBody"]["content"]["application/json"]
SINGLE_RESPONSES: dict[str, dict[str, Any]] = SEND_SINGLE["responses"]
OF_SOME_ANSWERS_ONLY = ("Retry-After", "Idempotent-Replayed", "Preference-Applied", "Allow")


def validator_of(schema: Mapping[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """Return a validator of one schema of the document, which may refer to the others."""
    return jsonschema_rs.Draft202012Validator({**schema, "components": COMPONENTS})


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """Return the target of a reference; return anything else as it is."""
    if "$ref" not in node:
        return node
    _, kind, name = node["$ref"].removeprefix("#/").split("/")
    found: dict[str, Any] = COMPONENTS[kind][name]
    return found


def example_of(code: str) -> Any:
    """Return the example of the answer to a request that is refused with this code."""
    (found,) = (
        response["content"]["application/json"]["examples"][code]["value"]
        for status, response in RESPONSES.items()
        if status != "200" and code in response["content"]["application/json"]["examples"]
    )
    return found


_body_validators = {
    (path, int(status)): validator_of(response["content"]["application/json"]["schema"])
    for path, responses in ((SEND_PATH, RESPONSES), (SINGLE_PATH, SINGLE_RESPONSES))
    for status, response in responses.items()
}
_header_validators = {
    (path, int(status)): {
        name: (resolved(header).get("required", False), validator_of(resolved(header)["schema"]))
        for name, header in response["headers"].items()
    }
    for path, responses in ((SEND_PATH, RESPONSES), (SINGLE_PATH, SINGLE_RESPONSES))
    for status, response in responses.items()
}


def faults_of_either(status: int, headers: Mapping[str, str], body: bytes) -> list[str]:
    """Return the differences between an answer and the document of the path that fits better."""
    return min((faults_of(status, headers, body, path) for path in (SEND_PATH, SINGLE_PATH)), key=len)


def faults_of(status: int, headers: Mapping[str, str], body: bytes, path: str = SEND_PATH) -> list[str]:
    """Return the differences between an answer to a POST and the document. `headers` ignore case."""
    if (path, status) not in _body_validators:
        return [f"status {status} is not documented"]
    faults = []
    if headers.get("Content-Type") != "application/json":
        faults.append(f"Content-Type is {headers.get('Content-Type')}")
    documented = _header_validators[path, status]
    faults += [
        f"{name} is not documented for {status}"
        for name in OF_SOME_ANSWERS_ONLY
        if name in headers and name not in documented
    ]
    for name, (required, validator) in documented.items():
        value: Any = headers.get(name)
        if value is None:
            faults += [f"{name} is missing"] if required else []
        elif not validator.is_valid(value) and not (value.isdecimal() and validator.is_valid(int(value))):
            faults.append(f"{name} is {value!r}")
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return [*faults, f"the body is not JSON: {error}"]
    faults += [error.message for error in _body_validators[path, status].iter_errors(decoded)]
    if status == 200 and path == SEND_PATH and not faults:
        rows = decoded["errors"]
        if decoded["error_count"] != len(rows):
            faults.append(f"error_count is {decoded['error_count']}, and there are {len(rows)} rows")
        if any(before["index"] >= after["index"] for before, after in pairwise(rows)):
            faults.append("the rows do not ascend")
    return faults
