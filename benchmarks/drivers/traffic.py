"""Request bodies, and the AMQP payloads that they become. Seeded, so that every run sends the same bytes."""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import msgspec

from gateway.ingest import decoding
from gateway.ingest.batch import BatchIds, Origin, build, validate

SEED = 20261123
# 50 characters of text make 111 bytes of JSON a message, and an AMQP payload of 270.
BODY_LENGTH = 50
_REFERENCE = " Ref: {{messageId}}"

# One flaw for each way to fail. WRONG_TYPE alone makes the decoder fail, not a check after it.
WRONG_FORMAT: dict[str, Any] = {"to": "4155559876"}
WRONG_TYPE: dict[str, Any] = {"to": 4155559876}
FLAWS: tuple[dict[str, Any], ...] = (
    WRONG_FORMAT,
    {"to": ""},
    {"body": ""},
    {"list_number": "1-800-FLOWERS"},
    {"wrap_links": "yes"},
)


def messages(
    count: int,
    list_numbers: Sequence[str],
    *,
    body_length: int = BODY_LENGTH,
    bad: int = 0,
    flaws: Sequence[dict[str, Any]] = FLAWS,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """Return messages, of which `bad`, spread evenly, have a flaw. The lists take turns."""
    chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
    text = "Your parcel is on its way and arrives today. " * (body_length // 45 + 1)
    body = text[: body_length - len(_REFERENCE)] + _REFERENCE if body_length > len(_REFERENCE) else text[:body_length]
    made: list[dict[str, Any]] = [
        {"to": f"+1{chance.randrange(2 * 10**9, 10**10)}", "list_number": number, "body": body}
        for number in islice(cycle(list_numbers), count)
    ]
    for n, flaw in zip(range(bad), cycle(flaws), strict=False):
        made[n * count // bad].update(flaw)
    return made


def request_bodies(
    kinds: int, count: int, list_numbers: Sequence[str], *, body_length: int = BODY_LENGTH, bad_share: float = 0.0
) -> list[tuple[bytes, int]]:
    """Return `kinds` different request bodies, each with the number of its good messages.

    The share of bad messages holds over all bodies together, so that it also holds for batches of one.
    """
    made = []
    bad_before = 0
    for number in range(kinds):
        bad_now = round(bad_share * count * (number + 1))
        bad = bad_now - bad_before
        bad_before = bad_now
        content = messages(count, list_numbers, body_length=body_length, bad=bad, seed=SEED + number)
        made.append((msgspec.json.encode({"messages": content}), count - bad))
    return made


def payloads(count: int, *, body_length: int = BODY_LENGTH) -> list[bytes]:
    """Return the payloads that the gateway publishes for `count` good messages. The bare publisher sends the same."""
    number = "+18005551000"
    body = msgspec.json.encode({"messages": messages(count, [number], body_length=body_length)})
    origin = Origin(42, "0123456789abcdef" * 2, "2026-11-23T11:00:00.123Z")
    ids = BatchIds([f"{n:08}" for n in range(count)], [])
    return list(build(validate(decoding.decode_bulk(body)), {number: 7}, ids, origin).outgoing.payloads)


def envelopes(single: Sequence[bytes], sms_per_message: int) -> list[bytes]:
    """Return AMQP bodies of several payloads each, as JSON arrays, or the payloads as they are for one SMS each."""
    if sms_per_message == 1:
        return list(single)
    groups = (single[at : at + sms_per_message] for at in range(0, len(single), sms_per_message))
    return [b"[" + b",".join(group) + b"]" for group in groups]
