"""API keys: from the X-Api-Key header to an account. The database has only the SHA-256 of a key."""

import hashlib
import re
from collections.abc import Sequence

from gateway.errors import AccountSuspended, InvalidApiKey, MissingApiKey
from gateway.postgres.queries import Account, Queries

KEY_PREFIX = "trk_"
KEY_CHARACTERS = 32
_is_key = re.compile(rf"{KEY_PREFIX}[0-9A-Za-z]{{{KEY_CHARACTERS}}}").fullmatch


def hash_key(key: str) -> bytes:
    """Return the stored form of a key. A key has 190 random bits, so one round of SHA-256 is enough."""
    return hashlib.sha256(key.encode("ascii")).digest()


async def authenticate(keys: Sequence[str], queries: Queries) -> Account:
    """Return the account of a request from the values of its X-Api-Key headers.

    Raises MissingApiKey, InvalidApiKey, AccountSuspended or DatabaseUnavailable. An unknown and a revoked key cost the
    same: a digest and a query. A malformed key costs neither. Its quick refusal reveals nothing: the form is public.
    """
    if not any(keys):
        raise MissingApiKey
    if len(keys) > 1 or not _is_key(keys[0]):
        raise InvalidApiKey
    account = await queries.find_account(hash_key(keys[0]))
    if account is None:
        raise InvalidApiKey
    if not account.is_active:
        raise AccountSuspended
    return account
