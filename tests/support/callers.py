"""Accounts to call a gateway as."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.cli.admin import Admin
from tests.conftest import new_number
from tests.support.secrecy import BODY

SEND_PATH = "/api/v2/send/bulk"
RECIPIENT = "+14155551234"


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
