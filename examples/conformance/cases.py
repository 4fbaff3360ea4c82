"""The cases. Each is a function of the server under test: it raises Broken, or returns."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from examples.conformance.refusals import REFUSED
from examples.conformance.target import BULK, SINGLE, Broken, Target, expect

MOST_MESSAGES, MOST_BYTES = 1_000, 5_242_880
IDS = {"Prefer": "return=representation"}
is_message_id = re.compile(r"[0-9A-Za-z]{8}").fullmatch

Check = Callable[[Target], None]


class Case(NamedTuple):
    """A rule of the contract, and its check."""

    rule: str
    check: Check


CASES: dict[str, Case] = {}


def case(rule: str) -> Callable[[Check], Check]:
    """Return a decorator that adds a check to CASES, by the name of the function."""

    def add(check: Check) -> Check:
        CASES[check.__name__] = Case(rule, check)
        return check

    return add


@case("A batch of good messages is queued.")
def good_batch(target: Target) -> None:
    target.send(target.message(), target.message(body="second")).expect_queued(2)


@case("wrap_links, contact_data and metadata are taken; null means absent; unknown fields are ignored.")
def optional_fields(target: Target) -> None:
    contact = {"first_name": "Ann", "last_name": None, "timezone": "Europe/Berlin", "custom_fields": {"x": [1]}}
    full = target.message(wrap_links=True, contact_data=contact, metadata={"order": 7}, unknown={"a": [1]})
    empty = target.message(wrap_links=None, contact_data=None, metadata=None)
    target.send(full, empty, unknown=[{}]).expect_queued(2)


@case("The list_number at the top level is that of messages which carry none.")
def default_list(target: Target) -> None:
    bare = target.message(list_number=...)
    target.send(bare, target.message(), list_number=target.list_number).expect_queued(2)
    answer = target.send(bare, target.message(list_number="bad"), list_number=target.list_number)
    expect("the codes", [row["code"] for row in answer.json["errors"]], ["invalid_list_number"])


@case("Control characters, emoji, right-to-left and long texts are legal.")
def texts(target: Target) -> None:
    bodies = ["\x00\x01\n", "\N{PILE OF POO}", "\u202e\u0627", "{{name}} {{messageId}}", "x" * 100_000]
    target.send(*(target.message(body=body) for body in bodies)).expect_queued(len(bodies))


@case("Each flawed message has its code, and costs only itself.")
def refused_messages(target: Target) -> None:
    bad = [target.message(**changes) for _, changes, _ in REFUSED]
    answer = target.send(target.message(), *bad, target.message())
    expect("the status", answer.status, 200)
    expect("queued_count", answer.json["queued_count"], 2)
    expect("error_count", answer.json["error_count"], len(bad))
    expect("the indexes", [row["index"] for row in answer.json["errors"]], list(range(1, len(bad) + 1)))
    for (name, _, code), sent, row in zip(REFUSED, bad, answer.json["errors"], strict=True):
        expect(f"the code for {name}", row["code"], code)
        to = sent.get("to")
        expect(f"the echo for {name}", row["to"], to[:64] if isinstance(to, str) else None)
        if not row["error"]:
            raise Broken(f"the row for {name} has no sentence")


@case("An element that is no object is missing_to.")
def no_objects(target: Target) -> None:
    answer = target.send(None, 5, "text", [], target.message())
    expect("the codes", [row["code"] for row in answer.json["errors"]], ["missing_to"] * 4)
    expect("queued_count", answer.json["queued_count"], 1)


@case("The first failing check counts: presence, then form, then ownership.")
def order_of_checks(target: Target) -> None:
    unknown = "+18005550000000"
    flawed = [
        target.message(to=..., list_number=..., body=...),
        target.message(to="bad", list_number=..., body=...),
        target.message(to="bad", list_number="bad", body=...),
        target.message(to="bad", list_number="bad"),
        target.message(list_number="bad", wrap_links=5),
        target.message(list_number=unknown, wrap_links=5),
        target.message(list_number=unknown),
    ]
    codes = ["missing_to", "missing_list_number", "missing_body", "invalid_phone", "invalid_list_number"]
    codes += ["invalid_field", "list_not_found"]
    answer = target.send(*flawed)
    expect("the status when all messages are refused", answer.status, 200)
    expect("the codes", [row["code"] for row in answer.json["errors"]], codes)


@case("Another account's list is not found, in the same words as an unknown one.")
def foreign_list(target: Target) -> None:
    answer = target.send(
        target.message(list_number="+18005550000000"), target.message(list_number=target.foreign_list_number)
    )
    expect("queued_count", answer.json["queued_count"], 0)
    unknown, foreign = answer.json["errors"]
    expect("the refusal of a foreign list", foreign | {"index": 0}, unknown)


@case("1,000 messages are taken, 1,001 are not, and none is missing_messages.")
def number_of_messages(target: Target) -> None:
    target.send(*[target.message()] * MOST_MESSAGES).expect_queued(MOST_MESSAGES)
    target.send(*[target.message()] * (MOST_MESSAGES + 1)).expect_refusal(413, "too_many_messages")
    bodies: list[dict[str, Any]] = [{}, {"messages": None}, {"messages": []}, {"messages": {}}, {"messages": "x"}]
    for body in bodies:
        target.post(body).expect_refusal(400, "missing_messages")


@case("What is not one JSON object in UTF-8 is invalid_json.")
def invalid_json(target: Target) -> None:
    good = json.dumps({"messages": [target.message()]}).encode()
    for body in (b"", b"{", b"[]", b'"text"', b"5", b"null", good + b"}", good[:-1], b'{"x":"\xff"}', b"[" * 100_000):
        target.post(body).expect_refusal(400, "invalid_json")


@case("5,242,880 bytes are taken, and one more is not.")
def size_of_body(target: Target) -> None:
    good = json.dumps({"messages": [target.message()]}).encode()
    target.post(good.ljust(MOST_BYTES)).expect_queued(1)
    target.post(good.ljust(MOST_BYTES + 1)).expect_refusal(413, "payload_too_large")


@case("A body may be sent in chunks.")
def chunked_body(target: Target) -> None:

    def chunks() -> Iterator[bytes]:
        good = json.dumps({"messages": [target.message()]}).encode()
        yield good[:10]
        yield good[10:]

    target.post(chunks()).expect_queued(1)


@case("JSON in UTF-8 is the only media type; without a Content-Type the body is taken for it.")
def media_type(target: Target) -> None:
    body = json.dumps({"messages": [target.message()]}).encode()
    for good in ("", "application/json; charset=utf-8"):
        target.post(body, headers={"Content-Type": good}).expect_queued(1)
    for bad in ("text/plain", "application/json; charset=latin-1", "application/x-www-form-urlencoded"):
        target.post(body, headers={"Content-Type": bad}).expect_refusal(415, "unsupported_media_type")
    target.post(gzip.compress(body), headers={"Content-Encoding": "gzip"}).expect_refusal(415, "unsupported_media_type")


@case("A request without a key, or with an unknown or malformed one, is refused before its body is looked at.")
def authentication(target: Target) -> None:
    target.post(b"{", headers={"X-Api-Key": ""}).expect_refusal(401, "missing_api_key")
    for key in ("trk_" + "0" * 32, "trk_short", "x", target.key + "x", target.key.swapcase()):
        target.post(b"{", headers={"X-Api-Key": key}).expect_refusal(401, "invalid_api_key")


@case("Other paths are 404, other methods 405 with Allow.")
def paths_and_methods(target: Target) -> None:
    target.post({}, "/api/v2/nothing").expect_refusal(404, "not_found")
    for path in (BULK, SINGLE):
        for method in ("GET", "PUT", "DELETE"):
            answer = target.post({}, path, method=method).expect_refusal(405, "method_not_allowed")
            expect("Allow", answer.headers.get("Allow"), "POST")


@case("A sane X-Request-Id comes back; any other is replaced.")
def request_id(target: Target) -> None:
    for body in ({"messages": [target.message()]}, {}):
        answer = target.post(body, headers={"X-Request-Id": "order-7.retry_1"})
        expect("X-Request-Id", answer.headers["X-Request-Id"], "order-7.retry_1")
    for insane in ("with space", "x" * 1_000, "<script>"):
        answer = target.post({}, headers={"X-Request-Id": insane})
        if answer.headers["X-Request-Id"] == insane:
            raise Broken(f"X-Request-Id {insane[:20]!r} came back")


@case("A repeated request gets the first answer again, marked; another body under its key is 422.")
def idempotency_key(target: Target) -> None:
    key = target.new_key()
    body = {"messages": [target.message(), target.message(to="bad")]}
    first = target.post(body, headers={"Idempotency-Key": key})
    expect("the status", first.status, 200)
    expect("Idempotent-Replayed of the first answer", first.headers.get("Idempotent-Replayed"), None)
    again = target.post(body, headers={"Idempotency-Key": key})
    expect("the second answer", (again.status, again.json), (first.status, first.json))
    expect("Idempotent-Replayed", again.headers.get("Idempotent-Replayed"), "true")
    other = target.send(target.message(), headers={"Idempotency-Key": key})
    other.expect_refusal(422, "idempotency_key_reused")


@case("A refusal keeps nothing: its key can be used again. A key that is no key is refused.")
def idempotency_key_of_a_refusal(target: Target) -> None:
    key = target.new_key()
    target.send(headers={"Idempotency-Key": key}).expect_refusal(400, "missing_messages")
    expect(
        "queued_count", target.send(target.message(to="bad"), headers={"Idempotency-Key": key}).json["queued_count"], 0
    )
    target.send(target.message(), headers={"Idempotency-Key": key}).expect_queued(1)
    for bad in ("with space", "x" * 256):
        refused = target.send(target.message(), headers={"Idempotency-Key": bad})
        refused.expect_refusal(400, "invalid_idempotency_key")


@case("With `Prefer: return=representation` the answer has the id of each queued message, also when it is replayed.")
def ids_in_answers(target: Target) -> None:
    headers = IDS | {"Idempotency-Key": target.new_key()}
    batch = [target.message(), target.message(to="bad"), target.message()]
    answer = target.send(*batch, headers=headers)
    expect("the indexes", [row["index"] for row in answer.json.get("messages", [])], [0, 2])
    expect("Preference-Applied", answer.headers.get("Preference-Applied"), "return=representation")
    ids = [row["message_id"] for row in answer.json["messages"]]
    if len(set(ids)) != len(ids) or not all(map(is_message_id, ids)):
        raise Broken(f"{ids} are not different ids of eight letters and digits")
    again = target.send(*batch, headers=headers)
    expect("the ids of the second answer", again.json.get("messages"), answer.json["messages"])
    if "messages" in target.send(target.message()).json:
        raise Broken("an answer has ids that nobody asked for")


@case("A dry run has the counts and rows of a real one, and uses no key; a value that is no boolean is refused.")
def dry_run(target: Target) -> None:
    batch, key = [target.message(), target.message(to="bad")], {"Idempotency-Key": target.new_key()}
    dry = target.send(*batch, headers=key, dry_run=True)
    real = target.send(*batch, headers=key, dry_run=False)
    expect("Idempotent-Replayed of the real answer", real.headers.get("Idempotent-Replayed"), None)
    expect("the answer to a dry run", dry.json, real.json | {"dry_run": True})
    values: list[object] = ["true", 1, []]
    for value in values:
        target.send(target.message(), dry_run=value).expect_refusal(400, "invalid_field")
        target.post(target.message(dry_run=value), SINGLE).expect_refusal(400, "invalid_field")
    single = target.post(target.message(dry_run=True), SINGLE)
    expect("the single answer", (single.status, single.json.get("dry_run")), (200, True))
    if "message_id" in single.json:
        raise Broken("a dry run has taken a message id")


@case("One message is answered with its id, and again with the same id under its Idempotency-Key.")
def single_send(target: Target) -> None:
    headers = {"Idempotency-Key": target.new_key()}
    first = target.post(target.message(), SINGLE, headers=headers)
    expect("the status", first.status, 200)
    expect("the fields", sorted(first.json), ["message_id", "status", "success"])
    expect("success and status", (first.json["success"], first.json["status"]), (True, "queued"))
    if not is_message_id(first.json["message_id"]):
        raise Broken(f"{first.json['message_id']!r} is no id of eight letters and digits")
    again = target.post(target.message(), SINGLE, headers=headers)
    expect("the second answer", (again.json, again.headers.get("Idempotent-Replayed")), (first.json, "true"))


@case("A refused message is a 400 with its code, and what is no object is invalid_json.")
def refused_single_sends(target: Target) -> None:
    for name, changes, code in REFUSED:
        answer = target.post(target.message(**changes), SINGLE)
        expect(f"the answer to {name}", (answer.status, answer.json.get("code")), (400, code))
    target.post(target.message(list_number="+18005550000000"), SINGLE).expect_refusal(400, "list_not_found")
    for body in (b"", b"[]", b'"text"', b"{"):
        target.post(body, SINGLE).expect_refusal(400, "invalid_json")
