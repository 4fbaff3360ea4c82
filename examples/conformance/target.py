"""The server under test: one HTTP request, and its answer."""

import http.client
import json
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

BULK, SINGLE = "/api/v2/send/bulk", "/api/v2/send"
RECIPIENT = "+14155551234"
TIMEOUT_S = 30.0


class Broken(Exception):
    """The server breaks a rule of the contract; the text says how."""


def expect(what: str, found: object, wanted: object) -> None:
    """Raise Broken unless the two are equal."""
    if found != wanted:
        raise Broken(f"{what} is {found!r}, not {wanted!r}")


class Answer(NamedTuple):
    """An answer whose body is JSON."""

    status: int
    headers: http.client.HTTPMessage
    json: Any

    def expect_queued(self, count: int) -> "Answer":
        """Raise Broken unless this answer to a batch has queued `count` messages, and refused none."""
        expect("the status", self.status, 200)
        expect("the answer", self.json, {"queued_count": count, "error_count": 0, "errors": []})
        return self

    def expect_refusal(self, status: int, code: str) -> "Answer":
        """Raise Broken unless this answer refuses the request as a whole."""
        expect("the status", self.status, status)
        expect("the code", self.json.get("code"), code)
        if not self.json.get("error") or not isinstance(self.json["error"], str):
            raise Broken("the refusal has no `error` sentence")
        return self


class Target:
    """A server with an account. Good messages are really queued there."""

    def __init__(self, url: str, key: str, list_number: str, foreign_list_number: str = "") -> None:
        """`foreign_list_number` is an active list of another account; without one its case is skipped."""
        self.url = urlsplit(url)
        self.key = key
        self.list_number = list_number
        self.foreign_list_number = foreign_list_number

    def message(self, **changes: Any) -> dict[str, Any]:
        """Return a good message with some fields changed; a field set to ... is left out."""
        good = {"to": RECIPIENT, "list_number": self.list_number, "body": "Ref: {{messageId}}"}
        return {name: value for name, value in (good | changes).items() if value is not ...}

    def send(self, *messages: Any, headers: dict[str, str] | None = None, **top_level: Any) -> Answer:
        """Send a batch."""
        return self.post({"messages": list(messages), **top_level}, headers=headers)

    def post(
        self, body: object, path: str = BULK, *, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Answer:
        """Send a request. Raises Broken and OSError.

        Bytes are sent as they are, an iterator over bytes in chunks, and anything else as JSON. A header set to "" is
        left out. Every answer must be JSON with a request id.
        """
        try:
            return _checked(*self.exchange(body, path, headers=headers, method=method))
        except http.client.HTTPException as error:
            raise Broken(f"no HTTP answer: {type(error).__name__} {error}") from None

    def exchange(
        self, body: object, path: str = BULK, *, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request, as `post` does, and return any answer with its body. Raises HTTPException and OSError."""
        sent = {"X-Api-Key": self.key, "Content-Type": "application/json"} | (headers or {})
        connection_class = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = connection_class(self.url.hostname or "", self.url.port, timeout=TIMEOUT_S)
        try:
            connection.request(
                method,
                self.url.path.rstrip("/") + path,
                body if isinstance(body, (bytes, Iterator)) else json.dumps(body).encode(),
                {name: value for name, value in sent.items() if value},
            )
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    @staticmethod
    def new_key() -> str:
        """Return an Idempotency-Key that was never used."""
        return f"conformance-{secrets.token_hex(8)}"


def _checked(answer: http.client.HTTPResponse, body: bytes) -> Answer:
    expect("Content-Type", answer.headers.get("Content-Type", "").partition(";")[0], "application/json")
    if not answer.headers.get("X-Request-Id"):
        raise Broken("the answer has no X-Request-Id")
    try:
        return Answer(answer.status, answer.headers, json.loads(body))
    except (ValueError, RecursionError):
        raise Broken("the answer is not JSON") from None
