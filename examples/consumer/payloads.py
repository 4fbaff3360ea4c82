"""The bytes of one AMQP message → SMS, or Poison. No IO, no clock.

What passes here can be stored: the shape is checked for all that PostgreSQL would refuse later, in the middle of a
group, where one bad message would hold up its neighbours.
"""

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

Id = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{1,64}\Z")]
Number = Annotated[str, Meta(pattern=r"^\+[1-9][0-9]{1,14}\Z")]


class Sms(msgspec.Struct, frozen=True):
    """What this consumer needs of a payload; docs/consumers.md shows all of it. Unknown fields are ignored."""

    id: Id
    list_number: Number
    to: Number
    body: str
    accepted_at: Annotated[datetime, Meta(tz=True)]


Envelope = Annotated[list[Sms], Meta(min_length=1)]


class Poison(Exception):
    """No SMS can be read from this, now or ever."""


_sms = msgspec.json.Decoder(Sms)
_envelope = msgspec.json.Decoder(Envelope)


def decode(message_type: str | None, body: bytes) -> list[Sms]:
    """The SMS in one AMQP message. Raises Poison."""
    try:
        match message_type:
            case "sms.v1":
                return [_sms.decode(body)]
            case "sms.batch.v1":
                return _envelope.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Poison(str(error)) from error
    raise Poison(f"unknown type {message_type!r}")
