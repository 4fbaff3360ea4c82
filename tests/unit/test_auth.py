"""API keys: the form of a key, the query for it, and the refusals."""

import hashlib
from collections.abc import Sequence
from typing import cast

import pytest

from gateway.errors import AccountSuspended, InvalidApiKey, MissingApiKey
from gateway.ingest.auth import authenticate, digest, hash_key
from gateway.postgres.queries import Account, Queries

KEY = "trk_" + "0aZ9" * 8


class Accounts:
    """Stands in for Queries: one account, by the hash of its key."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.asked: list[bytes] = []

    async def find_account(self, key_hash: bytes, _numbers: Sequence[str]) -> Account | None:
        self.asked.append(key_hash)
        return self.account if key_hash == hashlib.sha256(KEY.encode()).digest() else None


async def authenticated(*keys: str, is_active: bool = True) -> tuple[Account, list[bytes]]:
    """Return the account, and the hashes that were asked for."""
    accounts = Accounts(Account(7, is_active, {}))
    return await authenticate(digest(keys), cast("Queries", accounts)), accounts.asked


async def test_a_key_is_looked_up_by_its_hash() -> None:
    assert await authenticated(KEY) == (Account(7, True, {}), [hash_key(KEY)])
    assert hash_key(KEY) == hashlib.sha256(KEY.encode()).digest()


@pytest.mark.parametrize("keys", [(), ("",), ("", "")])
async def test_no_key_is_missing(keys: tuple[str, ...]) -> None:
    with pytest.raises(MissingApiKey):
        await authenticated(*keys)


@pytest.mark.parametrize(
    "keys",
    [
        *[(KEY, KEY), (KEY, ""), ("", KEY)],
        *[(KEY[:-1],), (KEY + "0",), (KEY.upper(),), (f" {KEY}",), (f"{KEY}\n",), (KEY[4:],), (KEY[:-1] + "é",)],
        *[("trk_" + "_" * 32,), ("trk_" + "\u0661" * 32,)],
    ],
)
async def test_a_malformed_key_is_invalid_without_a_query(keys: tuple[str, ...]) -> None:
    accounts = Accounts(Account(7, True, {}))
    with pytest.raises(InvalidApiKey):
        await authenticate(digest(keys), cast("Queries", accounts))
    assert accounts.asked == []


async def test_an_unknown_key_is_invalid() -> None:
    with pytest.raises(InvalidApiKey):
        await authenticated("trk_" + "1" * 32)


async def test_a_suspended_account_is_refused() -> None:
    with pytest.raises(AccountSuspended):
        await authenticated(KEY, is_active=False)
