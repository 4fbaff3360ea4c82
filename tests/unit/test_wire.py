"""Encoding of answers, by example."""

from gateway.ingest.wire import Answer, ErrorRow, decode_answer, encode, encode_with_ids

ROWS = [ErrorRow(0, None, "missing_to", "no"), ErrorRow(3, "+1", "outcome_unknown", "?", True, "AbC12345")]


def test_a_row_has_the_extra_fields_only_where_they_are_set() -> None:
    assert encode(Answer(1, 2, ROWS)) == (
        b'{"queued_count":1,"error_count":2,"errors":[{"index":0,"to":null,"code":"missing_to","error":"no"},'
        b'{"index":3,"to":"+1","code":"outcome_unknown","error":"?","may_be_queued":true,"message_id":"AbC12345"}]}'
    )


def test_an_answer_with_ids_has_those_of_the_messages_without_a_row() -> None:
    encoded = encode_with_ids(Answer(2, 2, ROWS), ["id0", "id1", "id2", "id3"])
    assert encoded.endswith(b',"messages":[{"index":1,"message_id":"id1"},{"index":2,"message_id":"id2"}]}')


def test_a_stored_answer_is_the_one_that_was_encoded() -> None:
    answer = Answer(1, 2, ROWS)
    assert decode_answer(encode(answer)) == answer
