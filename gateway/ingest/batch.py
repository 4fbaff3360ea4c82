"""Turns messages into a draft, and a draft into payloads. No IO, no clock, no randomness.

Both steps look at the whole batch first, with one regular expression and sets, and at single messages only when the
whole did not pass: clean batches are the rule, and cost a fraction of a look at each message (scripts/bench stages,
rows "validate").
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec import UNSET

from gateway import errors
from gateway.amqp.outgoing import Outgoing
from gateway.ingest.envelopes import Layout, Placed, place
from gateway.ingest.wire import (
    Bulk,
    ErrorRow,
    Message,
    Misfit,
    Payload,
    encode,
    is_contact_data,
    is_object,
    sent_nothing,
)

# Structural E.164, as the contract has it: no numbering-plan lookup. [0-9] and not \d, which takes any script's digits.
_E164 = r"\+[1-9][0-9]{1,14}"
_is_number = re.compile(_E164).fullmatch
_are_numbers = re.compile(rf"{_E164}(?:\n{_E164})*").fullmatch

MACRO = "{{messageId}}"
PLAIN = Layout()


class Draft(NamedTuple):
    """The messages that passed validation, and the rows of those that did not."""

    messages: list[Message]
    list_numbers: list[str]  # one for each of messages, the request's default filled in
    indexes: Sequence[int]  # where each of messages stood in the request
    rows: list[ErrorRow]
    size: int  # how many messages the request had, good and bad

    def distinct_list_numbers(self) -> list[str]:
        """What the one ownership query asks for."""
        return list(set(self.list_numbers))


class BatchIds(NamedTuple):
    """The message ids of one batch."""

    messages: list[str]  # one for each message of the request, by its index
    envelopes: list[str]  # for AMQP messages that carry several SMS; unused by other layouts


class Origin(NamedTuple):
    """The fields that all payloads of one request share."""

    account_id: int
    request_id: str
    accepted_at: str  # ISO 8601, UTC, milliseconds


class Batch(NamedTuple):
    """The messages that the caller may send, and the AMQP messages that carry them."""

    ids: list[str]  # one for each of messages
    messages: list[Message]
    indexes: Sequence[int]  # index of each of messages in the request
    rows: list[ErrorRow]
    outgoing: Outgoing
    placed: list[Placed] | None = None  # contents and shard of each AMQP message; None: one message each, one queue

    def outcomes_of_messages(self, outcomes: bytes) -> bytes:
        """Return one outcome per message, from one per AMQP message; an envelope's outcome holds for all it carries."""
        if self.placed is None:
            return outcomes
        spread = bytearray(len(self.messages))
        for (_, positions), outcome in zip(self.placed, outcomes, strict=True):
            for position in positions:
                spread[position] = outcome
        return bytes(spread)


def validate(bulk: Bulk) -> Draft:
    """Split a request into the good messages and a row for each bad one."""
    return (bulk.typed and _validate_whole(bulk)) or _validate_each(bulk)


def _validate_whole(bulk: Bulk) -> Draft | None:
    """The draft of a batch without a single bad message; None when it has to be looked at message by message."""
    messages = bulk.messages
    try:
        recipients = [message.to for message in messages]
        joined = "\n".join(recipients)  # type: ignore[arg-type]  # what is no string raises TypeError
        default = bulk.list_number
        list_numbers = [message.list_number or default for message in messages]
        distinct = "\n".join(names := set(list_numbers))  # type: ignore[arg-type]
        clean = (
            _are_numbers(joined)
            # A newline inside a value would let one value pass for two.
            and joined.count("\n") == len(messages) - 1
            and _are_numbers(distinct)
            and distinct.count("\n") == len(names) - 1
            and all([message.body for message in messages])
            and not any([message.contact_data is not UNSET or message.metadata is not UNSET for message in messages])
        )
    except TypeError:
        return None
    if not clean:
        return None
    return Draft(messages, list_numbers, range(len(messages)), [], len(messages))  # type: ignore[arg-type]  # all strings


def _validate_each(bulk: Bulk) -> Draft:
    draft = Draft([], [], indexes := [], [], len(bulk.messages))
    for index, message in enumerate(bulk.messages):
        list_number = message.list_number or bulk.list_number
        refusal = _refusal(message, list_number)
        if refusal is None:
            draft.messages.append(_as_sent(message))
            draft.list_numbers.append(list_number)  # type: ignore[arg-type]  # has been checked
            indexes.append(index)
        else:
            draft.rows.append(_row(index, message.to, refusal))
    return draft


def _as_sent(message: Message | Misfit) -> Message:
    """A message that passed every check, without what was sent as null: that is as good as not sent."""
    if sent_nothing(message.contact_data):
        message.contact_data = UNSET
    if sent_nothing(message.metadata):
        message.metadata = UNSET
    return message  # type: ignore[return-value]  # every field has been checked to be what a Message has


def _refusal(message: Message | Misfit, list_number: object) -> errors.Refusal | None:
    """The first failing check, in the contract's order; None when all pass."""
    to, body = message.to, message.body
    if to is None or to == "":
        return errors.MISSING_TO
    if list_number is None or list_number == "":
        return errors.MISSING_LIST_NUMBER
    if not isinstance(body, str) or not body:
        return errors.MISSING_BODY
    if not isinstance(to, str) or not _is_number(to):
        return errors.INVALID_PHONE
    if not isinstance(list_number, str) or not _is_number(list_number):
        return errors.INVALID_LIST_NUMBER
    if message.wrap_links not in (True, False, None):
        return errors.INVALID_WRAP_LINKS
    contact_data, metadata = message.contact_data, message.metadata
    if not sent_nothing(contact_data) and not is_contact_data(contact_data):
        return errors.INVALID_CONTACT_DATA
    if not sent_nothing(metadata) and not is_object(metadata):
        return errors.INVALID_METADATA
    return None


def build(draft: Draft, lists: Mapping[str, int], ids: BatchIds, origin: Origin, *, layout: Layout = PLAIN) -> Batch:
    """Build the payloads of the draft's messages whose list is in `lists` (list number → list id, the account's own).

    The id of a message depends on its index alone. When a batch runs again without a list that is gone, the other
    messages keep their ids.
    """
    messages, list_numbers, indexes, rows, _ = draft
    if not lists.keys() >= set(list_numbers):
        messages, list_numbers, indexes, rows, _ = _only_owned(draft, lists)
    used = ids.messages if len(indexes) == draft.size else [ids.messages[index] for index in indexes]
    account_id, request_id, accepted_at = origin
    contents = [
        Payload(
            message_id,
            account_id,
            lists[list_number],
            list_number,
            message.to,  # type: ignore[arg-type]  # validated: a string
            message.body.replace(MACRO, message_id),  # type: ignore[union-attr]  # validated: a string
            message.wrap_links is True,
            message.contact_data,
            message.metadata,
            accepted_at,
            request_id,
            index,
        )
        for message, list_number, message_id, index in zip(messages, list_numbers, used, indexes, strict=True)
    ]
    if layout.is_plain:
        outgoing = Outgoing(used, list(map(encode, contents)), None, account_id)
        return Batch(used, messages, indexes, rows, outgoing)
    placed = place([content.list_id for content in contents], layout)
    outgoing = _pack(contents, placed, ids.envelopes, layout)
    return Batch(used, messages, indexes, rows, outgoing, placed)


def _pack(contents: list[Payload], placed: list[Placed], envelope_ids: list[str], layout: Layout) -> Outgoing:
    """Encode messages as `placed` says: each alone, or several of a list in one envelope."""
    if layout.messages_per_envelope == 1:
        carried = [contents[positions[0]] for _, positions in placed]
        ids, payloads = [content.id for content in carried], list(map(encode, carried))
    else:
        ids = envelope_ids[: len(placed)]
        payloads = [encode([contents[position] for position in positions]) for _, positions in placed]
    account_id = contents[0].account_id if contents else 0
    return Outgoing(ids, payloads, [shard for shard, _ in placed], account_id)


def _only_owned(draft: Draft, lists: Mapping[str, int]) -> Draft:
    """Return the draft without the messages whose list is not the caller's; each of those gets a row."""
    mine = Draft([], [], indexes := [], list(draft.rows), draft.size)
    for message, list_number, index in zip(draft.messages, draft.list_numbers, draft.indexes, strict=True):
        if list_number in lists:
            mine.messages.append(message)
            mine.list_numbers.append(list_number)
            indexes.append(index)
        else:
            mine.rows.append(_row(index, message.to, errors.LIST_NOT_FOUND))
    return mine


def _row(index: int, to: object, refusal: errors.Refusal) -> ErrorRow:
    return ErrorRow(index, to if isinstance(to, str) else None, refusal.code, refusal.sentence)
