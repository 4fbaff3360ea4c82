"""X-Api-Key → Account. Only the SHA-256 of a key is known here and in the database."""

import hashlib
import re

from multidict import CIMultiDictProxy

from gateway.errors import AccountSuspended, InvalidApiKey, MissingApiKey
from gateway.postgres.queries import Account, Store

HEADER = "X-Api-Key"
KEY_PREFIX = "trk_"
KEY_CHARACTERS = 32
_is_key = re.compile(rf"{KEY_PREFIX}[0-9A-Za-z]{{{KEY_CHARACTERS}}}").fullmatch


def hash_key(key: str) -> bytes:
    """The form in which a key is stored. It has 190 random bits: one round of SHA-256 is enough, a slow hash is not."""
    return hashlib.sha256(key.encode("ascii")).digest()


async def authenticate(headers: "CIMultiDictProxy[str]", store: Store) -> Account:
    """Who is calling. Raises MissingApiKey, InvalidApiKey, AccountSuspended or DatabaseUnavailable.

    Unknown and revoked keys cost the same: a digest and a query. What has not the form of a key costs neither; the form
    is public, so its quick refusal tells nothing.
    """
    keys = headers.getall(HEADER, [])
    if not any(keys):
        raise MissingApiKey
    if len(keys) > 1 or not _is_key(keys[0]):
        raise InvalidApiKey
    account = await store.find_account(hash_key(keys[0]))
    if account is None:
        raise InvalidApiKey
    if not account.is_active:
        raise AccountSuspended
    return account
