"""The OpenAPI document has every status, code, sentence and limit of the gateway. No server."""

import re
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

import gateway
from gateway import errors
from gateway.ingest import batch, contact_data, decoding, idempotency, wire
from gateway.web import answers, api
from tests.support.openapi_document import (
    COMPONENTS,
    DOCUMENT,
    REQUEST,
    RESPONSES,
    SINGLE_REQUEST,
    SINGLE_RESPONSES,
    resolved,
    validator_of,
)

ERRORS = {
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.GatewayError) and hasattr(kind, "code")
}
ROWS = {value for value in vars(errors).values() if isinstance(value, errors.RowError)}
REFUSED = {status: response for status, response in RESPONSES.items() if status != "200"}


def contents_of(response: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = response["content"]["application/json"]
    return content


ANSWERS = contents_of(RESPONSES["200"])


def test_the_document_is_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["info"]["version"] == gateway.__version__


def test_it_has_every_status_and_code_and_no_other() -> None:
    documented = {
        (int(status), code)
        for status, response in REFUSED.items()
        for code in contents_of(response)["schema"]["properties"]["code"]["enum"]
    }
    assert documented == {(kind.status, kind.code) for kind in ERRORS}


def test_every_request_level_code_has_an_example_that_reads_as_the_answer_does() -> None:
    examples = {
        (int(status), code): example["value"]
        for status, response in REFUSED.items()
        for code, example in contents_of(response)["examples"].items()
    }
    assert set(examples) == {(kind.status, kind.code) for kind in ERRORS}
    for kind in ERRORS:
        example = examples[kind.status, kind.code]
        # Without the request id, and without what is wrong with a body.
        sentence = re.sub(r": ([0-9a-f]{16}-[0-9a-f]+|it ends too early)$", "", example["error"])
        assert (sentence, example["code"]) == (kind.sentence, kind.code)


def test_a_single_send_has_the_same_refusals_and_those_of_a_message() -> None:
    documented = {
        (int(status), code)
        for status, response in SINGLE_RESPONSES.items()
        if status != "200"
        for code in contents_of(response)["schema"]["properties"]["code"]["enum"]
    }
    of_batches = {(kind.status, kind.code) for kind in (errors.MissingMessages, errors.TooManyMessages)}
    of_messages = {(400, row.code) for row in ROWS - {errors.OUTCOME_UNKNOWN}}
    assert documented == {(kind.status, kind.code) for kind in ERRORS} - of_batches | of_messages
    sentences = {row.sentence for row in ROWS} | {kind.sentence for kind in ERRORS}
    for response in SINGLE_RESPONSES.values():
        content = contents_of(response)
        for example in content["examples"].values():
            validator_of(content["schema"]).validate(example["value"])
            said = example["value"].get("error", errors.MISSING_TO.sentence)
            assert re.sub(r": ([0-9a-f]{16}-[0-9a-f]+|it ends too early)$", "", said) in sentences
    assert set(SINGLE_REQUEST["examples"]) == set(contents_of(SINGLE_RESPONSES["200"])["examples"])
    for example in SINGLE_REQUEST["examples"].values():
        validator_of(SINGLE_REQUEST["schema"]).validate(example["value"])


def test_every_per_message_code_is_there_and_has_its_examples() -> None:
    assert set(COMPONENTS["schemas"]["ErrorRow"]["properties"]["code"]["enum"]) == {row.code for row in ROWS}
    shown = {
        (row["code"], row["error"]) for example in ANSWERS["examples"].values() for row in example["value"]["errors"]
    }
    assert shown == {(row.code, row.sentence) for row in ROWS}
    assert {row.code for row in ROWS} <= set(ANSWERS["examples"])


def test_the_examples_are_as_the_schemas_say() -> None:
    for response in RESPONSES.values():
        content = contents_of(response)
        for example in content["examples"].values():
            validator_of(content["schema"]).validate(example["value"])
    is_valid = validator_of(REQUEST["schema"]).is_valid
    refused_for_their_form = {
        name
        for name in REQUEST["examples"]
        if {row["code"] for row in ANSWERS["examples"][name]["value"]["errors"]} - {"list_not_found"}
    }
    assert {name for name, example in REQUEST["examples"].items() if not is_valid(example["value"])} == (
        refused_for_their_form
    )


def test_the_limits_are_the_gateways() -> None:
    schemas = COMPONENTS["schemas"]
    assert schemas["Bulk"]["properties"]["messages"]["maxItems"] == wire.MAX_MESSAGES
    assert schemas["Answer"]["properties"]["errors"]["maxItems"] == wire.MAX_MESSAGES
    assert schemas["ErrorRow"]["properties"]["index"]["maximum"] == wire.MAX_MESSAGES - 1
    assert f"{wire.MAX_BODY_BYTES:,} bytes" in DOCUMENT["paths"][api.SEND_BULK]["post"]["requestBody"]["description"]
    assert schemas["E164"]["pattern"] == f"^{batch.E164}$"
    retry_after = COMPONENTS["headers"]["Retry-After"]["schema"]
    assert (retry_after["minimum"], retry_after["maximum"]) == (1, errors.MAX_RETRY_AFTER_S)


def test_the_fields_are_those_of_the_wire() -> None:
    schemas = COMPONENTS["schemas"]
    for schema, struct in (
        ("Message", wire.Message),
        ("ContactData", contact_data.ContactData),
        ("QueuedMessage", wire.QueuedMessage),
        ("ErrorRow", wire.ErrorRow),
        ("Refused", answers.Refused),
    ):
        assert set(schemas[schema]["properties"]) == set(struct.__struct_fields__), schema
    for schema, kinds in (
        ("Answer", (wire.AnswerWithIds, wire.DryRunAnswer)),
        ("SingleAnswer", (wire.SingleAnswer, wire.SingleDryRunAnswer)),
    ):
        assert set(schemas[schema]["properties"]) == {name for kind in kinds for name in kind.__struct_fields__}
    assert set(schemas["Bulk"]["properties"]) == set(decoding.DecodedBody.__struct_fields__) - {"typed", "taken_out"}


def test_the_headers_are_the_gateways() -> None:
    assert COMPONENTS["securitySchemes"]["ApiKey"]["name"] == api.API_KEY_HEADER
    assert set(COMPONENTS["parameters"]) == {api.IDEMPOTENCY_HEADER, api.PREFER_HEADER, answers.REQUEST_ID_HEADER}
    assert api.REPLAYED_HEADERS.keys() | api.PREFERENCE_HEADERS.keys() <= RESPONSES["200"]["headers"].keys()
    assert set(resolved(RESPONSES["405"]["headers"]["Allow"])["schema"]["enum"]) == set(api.ALLOWED.values())
    for kind in ERRORS:
        sent = kind("POST") if kind is errors.MethodNotAllowed else kind()
        assert set(REFUSED[str(kind.status)]["headers"]) == {answers.REQUEST_ID_HEADER, *sent.headers()}, kind


@pytest.mark.parametrize("good", ["!", "~" * 255, "7f9c24e8-3b12-4fef-91e0-4d5f2c3a9b10"])
@pytest.mark.parametrize("bad", ["", "a b", "~" * 256, "\x7f", "é"])
def test_an_idempotency_key_is_what_the_gateway_takes(good: str, bad: str) -> None:
    is_valid = validator_of(COMPONENTS["parameters"]["Idempotency-Key"]["schema"]).is_valid
    assert (is_valid(good), is_valid(bad)) == (True, False)
    assert idempotency.parse_key([good]) == good
    with pytest.raises(errors.InvalidIdempotencyKey):
        idempotency.parse_key([bad])
