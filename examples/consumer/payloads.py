"""Decode the bytes of one AMQP message into SMS, or raise Poison. No IO, no clock.

A decoded SMS can be stored. Everything that PostgreSQL would refuse is checked here, because one bad message must not
hold up the others of its group.
"""

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

Id = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{1,64}\Z")]
Number = Annotated[str, Meta(pattern=r"^\+[1-9][0-9]{1,14}\Z")]


class Sms(msgspec.Struct, frozen=True):
    """The fields that this consumer needs; docs/asyncapi.yaml describes all. Unknown fields are ignored."""

    id: Id
    list_number: Number
    to: Number
    body: str
    accepted_at: Annotated[datetime, Meta(tz=True)]


Envelope = Annotated[list[Sms], Meta(min_length=1)]


class Poison(Exception):
    """Raised for a message from which no SMS can ever be read."""


_sms = msgspec.json.Decoder(Sms)
_envelope = msgspec.json.Decoder(Envelope)


def decode(message_type: str | None, body: bytes) -> list[Sms]:
    """Return the SMS in one AMQP message. Raises Poison."""
    try:
        match message_type:
            case "sms.v1":
                return [_sms.decode(body)]
            case "sms.batch.v1":
                return _envelope.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Poison(str(error)) from error
    raise Poison(f"unknown type {message_type!r}")
