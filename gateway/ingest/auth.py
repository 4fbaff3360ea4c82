"""API keys: from the X-Api-Key header to an account. The database has only the SHA-256 of a key."""

import hashlib
from collections.abc import Sequence

from gateway.errors import AccountSuspended, InvalidApiKey, MissingApiKey
from gateway.postgres.queries import Account, Queries
from gateway.telemetry.log import KEY_PATTERN


def hash_key(key: str) -> bytes:
    """Return the stored form of a key. A key has 190 random bits, so one round of SHA-256 is enough."""
    return hashlib.sha256(key.encode("ascii")).digest()


def digest(keys: Sequence[str]) -> bytes:
    """Return the stored form of the key in a request's X-Api-Key headers. Raises MissingApiKey or InvalidApiKey.

    A malformed key costs neither a digest nor a query. Its quick refusal reveals nothing: the form is public.
    """
    if not any(keys):
        raise MissingApiKey
    if len(keys) > 1 or not KEY_PATTERN.fullmatch(keys[0]):
        raise InvalidApiKey
    return hash_key(keys[0])


async def authenticate(key_sha256: bytes, queries: Queries, list_numbers: Sequence[str] = ()) -> Account:
    """Return the account of a key, with those of its lists that have one of these numbers.

    Raises InvalidApiKey, AccountSuspended or DatabaseUnavailable. Unknown, revoked and expired keys cost the same.
    """
    account = await queries.find_account(key_sha256, list_numbers)
    if account is None:
        raise InvalidApiKey
    if not account.is_active:
        raise AccountSuspended
    return account
