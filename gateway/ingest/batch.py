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


class Batch(NamedTuple):
    """The messages that are the caller's to send, and the payloads that carry them."""

    ids: list[str]  # one for each of messages
    messages: list[Message]
    indexes: Sequence[int]  # where each of messages stood in the request
    rows: list[ErrorRow]
    payload_ids: list[str]  # one for each of payloads: the AMQP message_id
    payloads: list[bytes]
    placed: list[Placed] | None = None  # what each payload carries, and where to; None: one message each, one queue

    @property
    def shards(self) -> list[int] | None:
        """The shard of each payload, ascending; None where there is one queue."""
        return [shard for shard, _ in self.placed] if self.placed is not None else None

    def outcomes_of_messages(self, outcomes: bytes) -> bytes:
        """One outcome per message, from one per payload: what becomes of an envelope becomes of all it carries."""
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


def ids_needed(draft: Draft, layout: Layout) -> int:
    """How many ids build() may use: one for each message of the request, and one for each envelope."""
    return draft.size + layout.most_envelopes(draft.list_numbers)


def build(
    draft: Draft,
    lists: Mapping[str, int],
    ids: list[str],
    *,
    account_id: int,
    accepted_at: str,
    request_id: str,
    layout: Layout = PLAIN,
) -> Batch:
    """Payloads for the draft's messages whose list is among `lists` (list number → list id, the account's own).

    `ids` holds ids_needed() ids. A message's id depends on its index alone, whatever else was refused: when the batch
    runs again, on another version perhaps, or without a list that is gone, nobody's id has shifted.
    """
    envelope_ids = ids[draft.size :]
    messages, list_numbers, indexes, rows, _ = draft
    if not lists.keys() >= set(list_numbers):
        messages, list_numbers, indexes, rows, _ = _own(draft, lists)
    if len(indexes) < draft.size:
        ids = [ids[index] for index in indexes]
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
        for message, list_number, message_id, index in zip(messages, list_numbers, ids, indexes, strict=False)
    ]
    ids = ids[: len(contents)]
    if layout.is_plain:
        return Batch(ids, messages, indexes, rows, ids, [encode(content) for content in contents])
    placed = place([content.list_id for content in contents], layout)
    if layout.messages_per_envelope == 1:
        carried = [positions[0] for _, positions in placed]
        payload_ids = [ids[position] for position in carried]
        payloads = [encode(contents[position]) for position in carried]
    else:
        payload_ids = envelope_ids[: len(placed)]
        payloads = [encode([contents[position] for position in positions]) for _, positions in placed]
    return Batch(ids, messages, indexes, rows, payload_ids, payloads, placed)


def _own(draft: Draft, lists: Mapping[str, int]) -> Draft:
    """The draft without the messages whose list is not the caller's: each gets a row."""
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
