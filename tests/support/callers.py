"""Accounts to call as, and clients that call a gateway as one of them."""

import io
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDictProxy

from gateway.cli.admin import Admin
from tests.support.secrecy import BODY

SEND_PATH = "/api/v2/send/bulk"
SINGLE_PATH = "/api/v2/send"
RECIPIENT = "+14155551234"


def new_number() -> str:
    """Return an E.164 number that no other test has."""
    return f"+1{uuid.uuid4().int % 10**13:013}"


@dataclass(frozen=True)
class Caller:
    """An account with an API key and a sending list."""

    account_id: int = 0
    key_id: int = 0
    key: str = ""
    list_id: int = 0
    list_number: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of a request with a JSON body."""
        return {"X-Api-Key": self.key, "Content-Type": "application/json"}

    def message(self, **changes: Any) -> dict[str, Any]:
        """Return a valid message from the caller's list with some fields changed; a field set to ... is left out."""
        valid = {"to": RECIPIENT, "list_number": self.list_number, "body": f"Hello {{{{messageId}}}}, {BODY}"}
        return {name: value for name, value in (valid | changes).items() if value is not ...}

    def body(self, count: int = 1, **changes: Any) -> bytes:
        """Return a request body with `count` copies of message(**changes)."""
        return msgspec.json.encode({"messages": [self.message(**changes)] * count})


NOBODY = Caller()  # no account: for gateways that are called before there is one


async def make_caller(admin: Admin, name: str = "caller") -> Caller:
    """Create an account with a key and a list."""
    account_id = (await admin.create_account(name))["id"]
    created = await admin.create_key(account_id)
    list_number = new_number()
    list_id = (await admin.add_list(account_id, list_number))["id"]
    return Caller(account_id, created["id"], created["key"], list_id, list_number)


class Client:
    """Calls the gateway at `api_url` as `caller`."""

    def __init__(self, api_url: str, session: aiohttp.ClientSession, caller: Caller = NOBODY) -> None:
        self.api_url = api_url
        self.session = session
        self.caller = caller

    @property
    def url(self) -> str:
        """Return the URL that batches are sent to."""
        return self.api_url + SEND_PATH

    def message(self, **changes: Any) -> dict[str, Any]:
        """Return a valid message of the caller; see Caller.message."""
        return self.caller.message(**changes)

    async def post(
        self, body: bytes | AsyncIterator[bytes], path: str = SEND_PATH, **headers: str
    ) -> tuple[int, Any, "CIMultiDictProxy[str]"]:
        """POST raw bytes; return status, decoded answer, headers. `headers` are spelt with _ for -."""
        sent = self.caller.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        data = io.BytesIO(body) if isinstance(body, bytes) else body
        async with self.session.post(self.api_url + path, data=data, headers=sent) as response:
            raw = await response.read()
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["X-Request-Id"]
            return response.status, msgspec.json.decode(raw), response.headers

    async def post_single(self, message: Any, **headers: str) -> tuple[int, Any, "CIMultiDictProxy[str]"]:
        """POST one message to the single send; see `post`."""
        return await self.post(msgspec.json.encode(message), SINGLE_PATH, **headers)

    async def send(self, messages: Any, **top_level: Any) -> tuple[int, Any]:
        """POST messages; return status and decoded answer. The form of a 200 is checked."""
        status, answer, _ = await self.post(msgspec.json.encode({"messages": messages, **top_level}))
        if status == 200:
            assert answer["queued_count"] + answer["error_count"] == len(messages)
            assert answer["error_count"] == len(answer["errors"])
            assert [row["index"] for row in answer["errors"]] == sorted(row["index"] for row in answer["errors"])
            assert "error" not in answer
        return status, answer
