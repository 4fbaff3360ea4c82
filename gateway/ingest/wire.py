"""The JSON shapes of messages, answers and payloads, and the limits of the contract. No IO, no clock.

`contact_data` and `metadata` keep the caller's bytes. Requests are decoded in `decoding`.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

MAX_MESSAGES = 1_000  # contract: per request
MAX_BODY_BYTES = 5_242_880  # contract: 5 MB
MAX_ECHO = 64  # contract: characters of `to` in an error row


class Message(msgspec.Struct, gc=False):
    """One message as the caller sent it. `null` means absent."""

    to: str | None = None
    list_number: str | None = None
    body: str | None = None
    wrap_links: bool | None = None
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class MistypedMessage(msgspec.Struct, gc=False):
    """An element of `messages` in which at least one value has the wrong type.

    Strings and null are decoded. WRONG_TYPE replaces any other value, and fails every check.
    """

    to: object = None
    list_number: object = None
    body: object = None
    wrap_links: object = None
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


WRONG_TYPE: Final = object()
NOT_A_MESSAGE: Final = MistypedMessage()  # stands for an element of `messages` that is no object


class ErrorRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One message that was not queued. `to` is the start of the caller's value if that is a string, otherwise null."""

    index: int
    to: str | None
    code: str
    error: str
    may_be_queued: bool = False
    message_id: str = ""


class Answer(msgspec.Struct):
    """The answer to a batch: queued_count + error_count is the number of messages in the request."""

    queued_count: int
    error_count: int
    errors: list[ErrorRow]


class QueuedMessage(msgspec.Struct, gc=False):
    """One message that was queued, in an answer with ids."""

    index: int
    message_id: str


class AnswerWithIds(Answer):
    """The answer to a batch whose caller prefers to have the ids of what was queued."""

    messages: list[QueuedMessage]


class DryRunAnswer(Answer):
    """The answer to a dry run: the counts and rows of validation and ownership."""

    dry_run: bool = True


class SingleAnswer(msgspec.Struct):
    """The answer to a single send whose message was queued."""

    success: bool
    message_id: str
    status: str


class SingleDryRunAnswer(msgspec.Struct):
    """The answer to a dry run of a single send whose message would be published."""

    success: bool = True
    status: str = "dry_run"
    dry_run: bool = True


class Payload(msgspec.Struct, gc=False):
    """The payload for one SMS, fields in this order: AMQP type `sms.v1`, or an array of them as `sms.batch.v1`."""

    id: str
    account_id: int
    list_id: int
    list_number: str
    to: str
    body: str
    wrap_links: bool
    contact_data: Raw | UnsetType
    metadata: Raw | UnsetType
    accepted_at: str
    request_id: str
    index: int


_encoder = msgspec.json.Encoder()
_answer = msgspec.json.Decoder(Answer)


encode = _encoder.encode


def encode_with_ids(answer: Answer, ids: Sequence[str]) -> bytes:
    """Return the encoded answer with the id of each queued message. `ids` has one for each message of the request."""
    refused = {row.index for row in answer.errors}
    messages = [QueuedMessage(index, one) for index, one in enumerate(ids) if index not in refused]
    return encode(AnswerWithIds(answer.queued_count, answer.error_count, answer.errors, messages))


def decode_answer(encoded: bytes) -> Answer:
    """Return a stored answer to a batch."""
    return _answer.decode(encoded)
