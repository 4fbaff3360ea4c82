"""Validation of messages (`validate`), and payloads from valid messages (`build`). No IO, no clock, no randomness.

Validation checks the whole batch at once, with one regular expression and sets. It checks message by message only if
that fails: most batches are clean, and the first check costs a fraction of the second (scripts/bench stages, rows
"validate").
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import UNSET

from gateway import errors
from gateway.amqp.confirms import Outcome
from gateway.amqp.outgoing import Outgoing
from gateway.ingest.contact_data import SMALL_BYTES, is_contact_data, is_contact_data_fast, is_null, is_object
from gateway.ingest.decoding import DecodedBody
from gateway.ingest.envelopes import Layout, Placement, place
from gateway.ingest.wire import (
    MAX_ECHO,
    NOT_A_MESSAGE,
    ErrorRow,
    Message,
    MistypedMessage,
    Payload,
    encode,
)

# The form of E.164, as in the contract, without numbering plans. [0-9], because \d matches digits of any script.
# tests/unit/test_e164.py holds the copies in SQL, OpenAPI, AsyncAPI and the examples equal to this pattern.
E164 = r"\+[1-9][0-9]{1,14}"
_is_number = re.compile(E164).fullmatch
_are_numbers = re.compile(rf"{E164}(?:\n{E164})*").fullmatch
# Characters of a number and the newline after it. One text of megabytes must not reach `_are_numbers`: in a text like
# "+10\n+10\n…" it takes 60 ms and 130 MB.
MAX_NUMBER = 17

MACRO = "{{messageId}}"
NO_CONTACT_DATA = msgspec.Raw(b"[]")  # fails the check of `contact_data`
PLAIN = Layout()
Finished = TypeVar("Finished")  # a Payload, or its bytes


class Draft(NamedTuple):
    """The valid messages of a request, and error rows for the others."""

    messages: list[Message]
    recipients: list[str]  # one per message
    list_numbers: list[str]  # one per message, with the request's default
    indexes: Sequence[int]  # one per message: its position in the request
    rows: list[ErrorRow]
    size: int  # number of messages in the request, valid or not
    dry_run: bool = False  # True: nothing is to be published

    def distinct_list_numbers(self) -> list[str]:
        """Return the list numbers to resolve, each once."""
        return list(set(self.list_numbers))


class BatchIds(msgspec.Struct, frozen=True):
    """The message ids of one batch."""

    messages: list[str]  # one for each message of the request, by its index
    envelopes: list[str]  # for AMQP messages that carry several SMS; unused by other layouts


NO_IDS = BatchIds([], [])


class Origin(NamedTuple):
    """The fields that all payloads of one request share."""

    account_id: int
    request_id: str
    accepted_at: str  # ISO 8601, UTC, milliseconds


class Batch(msgspec.Struct, frozen=True):
    """The AMQP messages to publish, and error rows for the messages of the request that are not published.

    The request's texts are in the payloads alone: decoded, they may take four times the memory.
    """

    ids: list[str]  # one per message
    recipients: list[str]  # one per message
    indexes: Sequence[int]  # one per message: its position in the request
    rows: list[ErrorRow]
    outgoing: Outgoing
    placements: list[Placement] | None = None  # one per AMQP message; None: one message per AMQP message, one queue

    def outcomes_of_messages(self, outcomes: bytes) -> bytes:
        """Return one outcome per message, from one per AMQP message: each message has the outcome of its envelope.

        The messages of an envelope that is TOO_LARGE are NACKED: each of them may be small enough. Such an envelope was
        made before the broker's limit was known.
        """
        if self.placements is None:
            return outcomes
        spread = bytearray(len(self.ids))
        for (_, positions), outcome in zip(self.placements, outcomes, strict=True):
            if outcome == Outcome.TOO_LARGE and len(positions) > 1:
                outcome = Outcome.NACKED
            for position in positions:
                spread[position] = outcome
        return bytes(spread)


def validate(decoded: DecodedBody) -> Draft:
    """Return the valid messages of a request, and an error row for each of the others."""
    draft = _validate_whole(decoded) if decoded.typed else None
    if draft is None:
        draft = _validate_each(decoded)
    if decoded.taken_out is not None:
        # Only now: a check of an original would parse it again.
        for message in draft.messages:
            message.contact_data = decoded.taken_out.put_back(message.contact_data)
            message.metadata = decoded.taken_out.put_back(message.metadata)
    return draft


def _validate_whole(decoded: DecodedBody) -> Draft | None:
    """Return the draft if the whole batch passes at once; None if it must be checked message by message."""
    messages = decoded.messages
    try:
        recipients = [message.to for message in messages]
        joined_recipients = "\n".join(recipients)  # type: ignore[arg-type]  # a value that is no string raises TypeError
        default = decoded.list_number
        list_numbers = [message.list_number or default for message in messages]
        distinct_numbers = set(list_numbers)
        joined_numbers = "\n".join(distinct_numbers)  # type: ignore[arg-type]
        clean = (
            len(joined_recipients) < MAX_NUMBER * len(messages)
            and _are_numbers(joined_recipients)
            # With a newline inside a value, one value would count as two.
            and joined_recipients.count("\n") == len(messages) - 1
            and len(joined_numbers) < MAX_NUMBER * len(distinct_numbers)
            and _are_numbers(joined_numbers)
            and joined_numbers.count("\n") == len(distinct_numbers) - 1
            and all([message.body for message in messages])
        )
    except TypeError:
        return None
    if not clean:
        return None
    with_objects = [m for m in messages if m.contact_data is not UNSET or m.metadata is not UNSET]
    if any(_error_in_objects(message, is_contact_data_fast) for message in with_objects):  # stops at the first
        return None
    indexes = range(len(messages))
    return Draft(messages, recipients, list_numbers, indexes, [], len(messages), decoded.dry_run)  # type: ignore[arg-type]  # all strings


def _validate_each(decoded: DecodedBody) -> Draft:
    indexes: list[int] = []
    draft = Draft(
        messages=[],
        recipients=[],
        list_numbers=[],
        indexes=indexes,
        rows=[],
        size=len(decoded.messages),
        dry_run=decoded.dry_run,
    )
    for index, message in enumerate(decoded.messages):
        list_number = message.list_number or decoded.list_number
        error = _first_error(message, list_number)
        if error is None:
            draft.messages.append(message)  # type: ignore[arg-type]  # every field was checked: it has a Message's types
            draft.recipients.append(message.to)  # type: ignore[arg-type]  # checked above
            draft.list_numbers.append(list_number)  # type: ignore[arg-type]  # checked above
            indexes.append(index)
        else:
            draft.rows.append(_row(index, message.to, error))
    return draft


def _first_error(message: Message | MistypedMessage, list_number: object) -> errors.RowError | None:
    """Return the error of the first check that fails, in the contract's order; None if all pass."""
    to, body = message.to, message.body
    if to is None or to == "":
        return errors.NOT_A_MESSAGE if message is NOT_A_MESSAGE else errors.MISSING_TO
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
    return _error_in_objects(message, is_contact_data)


def _error_in_objects(
    message: Message | MistypedMessage, check: Callable[[msgspec.Raw], bool]
) -> errors.RowError | None:
    """Return the error in `contact_data` or `metadata`, None if both pass. Remove those that are null.

    Null means absent. `check` checks `contact_data`.
    """
    contact_data, metadata = message.contact_data, message.metadata
    if contact_data is not UNSET and not check(contact_data):
        if not is_null(contact_data):
            if len(contact_data) > SMALL_BYTES:  # the message by message check that follows would parse it again
                message.contact_data = NO_CONTACT_DATA
            return errors.INVALID_CONTACT_DATA
        message.contact_data = UNSET
    if metadata is not UNSET and not is_object(metadata):
        if not is_null(metadata):
            return errors.INVALID_METADATA
        message.metadata = UNSET
    return None


def build(
    draft: Draft,
    lists: Mapping[str, int],
    ids: BatchIds,
    origin: Origin,
    *,
    lost_lists: Collection[str] = (),
    layout: Layout = PLAIN,
    most_bytes: int | None = None,
) -> Batch:
    """Build the payloads of the messages whose list number is in `lists`: the account's active list ids by number.

    Messages to `lost_lists` become unknown: an earlier run of the batch may have published them. Envelopes above
    `most_bytes` are split; None: the broker's limit is not known.
    A message's id depends only on its index. So it stays the same when the batch runs again under an Idempotency-Key,
    even if another version refuses other messages, or a list has become inactive.
    """
    if not lists.keys() >= set(draft.list_numbers):
        draft = drop_unresolved(draft, lists, lost_lists, ids)
    used = ids.messages if len(draft.indexes) == draft.size else [ids.messages[index] for index in draft.indexes]
    if layout.is_plain:
        placements = None
        outgoing = Outgoing(used, _payloads(draft, lists, used, origin, encode))
    else:
        contents = _payloads(draft, lists, used, origin, lambda content: content)
        placements, outgoing = _pack(contents, ids.envelopes, layout, most_bytes)
    return Batch(used, draft.recipients, draft.indexes, draft.rows, outgoing, placements)


def _payloads(
    draft: Draft, lists: Mapping[str, int], ids: Sequence[str], origin: Origin, finish: Callable[[Payload], Finished]
) -> list[Finished]:
    """Return what `finish` makes of the payload of each message; `ids` has one per message.

    If `finish` encodes them, only one Payload is in memory at a time. All at once, 5 MB of texts took twice as long:
    with an emoji, a text takes four times its bytes (scripts/bench bodies, "letters and an emoji as all bodies").
    """
    account_id, request_id, accepted_at = origin
    return [
        finish(
            Payload(
                message_id,
                account_id,
                lists[list_number],
                list_number,
                recipient,
                message.body.replace(MACRO, message_id),  # type: ignore[union-attr]  # validated: a string
                message.wrap_links is True,
                message.contact_data,
                message.metadata,
                accepted_at,
                request_id,
                index,
            )
        )
        for message, recipient, list_number, message_id, index in zip(
            draft.messages, draft.recipients, draft.list_numbers, ids, draft.indexes, strict=True
        )
    ]


def _pack(
    contents: list[Payload], envelope_ids: list[str], layout: Layout, most_bytes: int | None
) -> tuple[list[Placement], Outgoing]:
    """Distribute and encode the messages: each alone, or in envelopes of one list, split above `most_bytes`."""
    placements = place([content.list_id for content in contents], layout)
    if layout.messages_per_envelope == 1:
        carried = [contents[positions[0]] for _, positions in placements]
        ids, payloads = [content.id for content in carried], list(map(encode, carried))
    else:
        envelopes = [part for whole in placements for part in _envelopes(whole, contents, most_bytes)]
        placements, payloads = [placement for placement, _ in envelopes], [payload for _, payload in envelopes]
        # A part beyond the ids that were taken for envelopes has the id of its first SMS.
        surplus = [contents[positions[0]].id for _, positions in placements[len(envelope_ids) :]]
        ids = envelope_ids[: len(placements)] + surplus
    return placements, Outgoing(ids, payloads, [shard for shard, _ in placements])


def _envelopes(whole: Placement, contents: list[Payload], most_bytes: int | None) -> Iterator[tuple[Placement, bytes]]:
    """Yield an envelope with its payload. Above `most_bytes` it is halved, as often as needed and possible."""
    shard, positions = whole
    payload = encode([contents[position] for position in positions])
    if most_bytes is None or len(payload) <= most_bytes or len(positions) == 1:
        yield whole, payload
        return
    middle = len(positions) // 2
    for half in (positions[:middle], positions[middle:]):
        yield from _envelopes(Placement(shard, half), contents, most_bytes)


def drop_unresolved(
    draft: Draft, lists: Mapping[str, int], lost_lists: Collection[str] = (), ids: BatchIds = NO_IDS
) -> Draft:
    """Return the draft without the messages whose list number is not in `lists`, and an error row for each.

    The row of a message to one of `lost_lists` says that the message is unknown, and has its id from `ids`.
    """
    indexes: list[int] = []
    kept = draft._replace(messages=[], recipients=[], list_numbers=[], indexes=indexes, rows=list(draft.rows))
    for message, recipient, list_number, index in zip(
        draft.messages, draft.recipients, draft.list_numbers, draft.indexes, strict=True
    ):
        if list_number in lists:
            kept.messages.append(message)
            kept.recipients.append(recipient)
            kept.list_numbers.append(list_number)
            indexes.append(index)
        elif list_number in lost_lists:
            kept.rows.append(unknown_row(index, recipient, ids.messages[index]))
        else:
            kept.rows.append(_row(index, recipient, errors.LIST_NOT_FOUND))
    return kept


def unknown_row(index: int, recipient: str, message_id: str) -> ErrorRow:
    """Return the row of a valid message that may be queued."""
    return ErrorRow(index, recipient, *errors.OUTCOME_UNKNOWN, may_be_queued=True, message_id=message_id)


def _row(index: int, to: object, error: errors.RowError) -> ErrorRow:
    return ErrorRow(index, to[:MAX_ECHO] if isinstance(to, str) else None, error.code, error.sentence)
