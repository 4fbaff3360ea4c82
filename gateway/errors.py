"""All that the gateway refuses: a whole request (by an exception), or one message (by the error in its row).

GatewayError                    status  code                    send it again …
├── MissingMessages             400     missing_messages        corrected
├── InvalidIdempotencyKey       400     invalid_idempotency_key corrected
├── InvalidJson                 400     invalid_json            corrected
├── InvalidDryRun               400     invalid_field           corrected
├── MessageRefused              400     (that of the message)   corrected
├── MalformedHttp               400     malformed_http          corrected
├── MissingApiKey               401     missing_api_key         with a key
├── InvalidApiKey               401     invalid_api_key         with another key
├── AccountSuspended            403     account_suspended       once the account is active
├── NotFound                    404     not_found               to another path
├── MethodNotAllowed            405     method_not_allowed      with a method of the Allow header
├── RequestTimeout              408     request_timeout         always
├── IdempotencyInProgress       409     idempotency_in_progress after Retry-After, with the same key
├── TooManyMessages             413     too_many_messages       in parts
├── PayloadTooLarge             413     payload_too_large       in parts
├── UnsupportedMediaType        415     unsupported_media_type  as plain JSON
├── ExpectationFailed           417     expectation_failed      without the Expect header
├── IdempotencyKeyReused        422     idempotency_key_reused  with another key
├── TooManyIdempotencyKeys      429     too_many_idempotency_keys  without a key, or later
├── InternalError               500     internal_error          after a fix of the gateway
├── Unavailable                 503     (its subclasses)        always: nothing of the request was queued
│   ├── QueueUnavailable                queue_unavailable
│   ├── DatabaseUnavailable             database_unavailable
│   ├── Overloaded                      overloaded
│   └── Draining                        draining
└── OutcomeUnknown              504     outcome_unknown         with the same Idempotency-Key: messages may be queued
"""

import math
from typing import ClassVar, NamedTuple

MAX_RETRY_AFTER_S = 10  # load cannot be predicted for longer


class GatewayError(Exception):
    """A refusal of a whole request. `str()` returns the sentence for the caller."""

    status: ClassVar[int]
    code: str
    sentence: ClassVar[str]

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__(sentence or self.sentence)

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers of this refusal, beside those of every answer."""
        return {}


class MissingMessages(GatewayError):
    """The body has no `messages`, or `messages` is empty or not an array."""

    status, code = 400, "missing_messages"
    sentence = "messages must be a non-empty array of message objects"


class InvalidIdempotencyKey(GatewayError):
    """The request has several Idempotency-Key headers, or one that is too long or not visible ASCII."""

    status, code = 400, "invalid_idempotency_key"
    sentence = "Idempotency-Key must be sent once, as 1 to 255 visible ASCII characters"


class InvalidJson(GatewayError):
    """The body is not JSON in UTF-8, or not an object. `reason` says what is wrong, and never quotes the body."""

    status, code = 400, "invalid_json"
    sentence = "The request body must be one JSON object in UTF-8"

    def __init__(self, reason: str = "") -> None:
        super().__init__(f"{self.sentence}: {reason}" if reason else None)


class InvalidDryRun(GatewayError):
    """The value of `dry_run` is neither a boolean nor null."""

    status, code = 400, "invalid_field"
    sentence = "dry_run must be true or false"


class MalformedHttp(GatewayError):
    """The request is not valid HTTP/1.1 or 1.0, its head is too large, or its Transfer-Encoding is not `chunked`.

    Also raised if the caller hangs up before its body has been read. Nobody gets that answer.
    """

    status, code = 400, "malformed_http"
    sentence = "The request is not valid HTTP"


class MissingApiKey(GatewayError):
    """The request has no X-Api-Key header, or only empty ones."""

    status, code, sentence = 401, "missing_api_key", "API key required"


class InvalidApiKey(GatewayError):
    """The key is malformed, unknown, revoked or expired, or the X-Api-Key header is repeated."""

    status, code, sentence = 401, "invalid_api_key", "Invalid API key"


class AccountSuspended(GatewayError):
    """The key's account is suspended."""

    status, code, sentence = 403, "account_suspended", "Account is suspended"


class NotFound(GatewayError):
    """The path does not exist."""

    status, code = 404, "not_found"
    sentence = "There is nothing at this path. Send messages to POST /api/v2/send/bulk or /api/v2/send"


class MethodNotAllowed(GatewayError):
    """The path exists, but not with this method. `allow` is the Allow header's value."""

    status, code = 405, "method_not_allowed"
    sentence = "This path does not take that method; see the Allow header"

    def __init__(self, allow: str) -> None:
        super().__init__()
        self.allow = allow

    def headers(self) -> dict[str, str]:
        """Return the Allow header."""
        return {"Allow": self.allow}


class RequestTimeout(GatewayError):
    """Head or body of the request did not arrive in time (header_timeout_s, body_timeout_s)."""

    status, code = 408, "request_timeout"
    sentence = "The request body did not arrive in time. Nothing was queued; send it again"


class IdempotencyInProgress(GatewayError):
    """Another request with the same Idempotency-Key is still running."""

    status, code = 409, "idempotency_in_progress"
    sentence = "The first request with this Idempotency-Key has not ended yet; send it again in a moment"

    def headers(self) -> dict[str, str]:
        """Return the Retry-After header, in seconds."""
        return {"Retry-After": "1"}


class TooManyMessages(GatewayError):
    """The request has more than 1,000 messages."""

    status, code = 413, "too_many_messages"
    sentence = "A request may carry at most 1,000 messages. Split it"


class PayloadTooLarge(GatewayError):
    """The body has more than 5 MiB."""

    status, code = 413, "payload_too_large"
    sentence = "A request body may have at most 5,242,880 bytes. Split it"


class UnsupportedMediaType(GatewayError):
    """The Content-Type is not application/json in UTF-8, or the body has a Content-Encoding."""

    status, code = 415, "unsupported_media_type"
    sentence = "Send the body as application/json in UTF-8, without Content-Encoding"


class ExpectationFailed(GatewayError):
    """The Expect header is not 100-continue."""

    status, code = 417, "expectation_failed"
    sentence = "The only expectation this service meets is 100-continue"


class IdempotencyKeyReused(GatewayError):
    """The Idempotency-Key was sent before with another body, or to the other path."""

    status, code = 422, "idempotency_key_reused"
    sentence = "This Idempotency-Key was sent with another body. Use a new key for a new batch"


class TooManyIdempotencyKeys(GatewayError):
    """The account has stored max_idempotency_keys within 24 hours, and this key is new."""

    status, code = 429, "too_many_idempotency_keys"
    sentence = "This account has used too many Idempotency-Keys in 24 hours. Nothing was queued; send larger batches"


class InternalError(GatewayError):
    """An unexpected exception was caught at the outermost handler."""

    status, code = 500, "internal_error"
    sentence = "Something went wrong on our side. Please report the request id"


class Unavailable(GatewayError):
    """Nothing of this request was queued. Sending it again is always safe."""

    status = 503

    def __init__(self, sentence: str | None = None, *, retry_after_s: float = 1.0) -> None:
        """`retry_after_s` is the expected time until a retry succeeds; it is rounded up to 1 … MAX_RETRY_AFTER_S."""
        super().__init__(sentence)
        self.retry_after_s = min(max(math.ceil(retry_after_s), 1), MAX_RETRY_AFTER_S)

    def headers(self) -> dict[str, str]:
        """Return the Retry-After header, in seconds."""
        return {"Retry-After": str(self.retry_after_s)}


class QueueUnavailable(Unavailable):
    """No message was queued: nothing could be written to the broker in time, or the broker refused all messages."""

    code = "queue_unavailable"
    sentence = "The message queue is unavailable. Nothing was queued; send it again"


class DatabaseUnavailable(Unavailable):
    """A query failed or timed out, or the database is known to be down."""

    code = "database_unavailable"
    sentence = "The database is unavailable. Nothing was queued; send it again"


class Overloaded(Unavailable):
    """A bound on requests, bytes or unconfirmed messages is reached."""

    code = "overloaded"
    sentence = "Too many requests are in flight. Nothing was queued; send it again"


class Draining(Unavailable):
    """The process is draining after SIGTERM."""

    code = "draining"
    sentence = "This process is shutting down. Nothing was queued; send it again"


class OutcomeUnknown(GatewayError):
    """No message is known to be queued, but some may be."""

    status, code = 504, "outcome_unknown"
    sentence = "The queue did not confirm these messages: they may or may not be queued"
    message_id = ""  # of the message, if the request is a single send


class MessageRefused(GatewayError):
    """The message of a single send was refused, with the code and the sentence that its error row would have."""

    status = 400

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class RowError(NamedTuple):
    """The error of one message: `code` and `error` of its row."""

    code: str
    sentence: str


MISSING_TO = RowError("missing_to", "to is required")
NOT_A_MESSAGE = RowError("missing_to", "A message must be an object with to, list_number and body")
MISSING_LIST_NUMBER = RowError("missing_list_number", "list_number is required")
MISSING_BODY = RowError("missing_body", "body is required and must be a non-empty string")
INVALID_PHONE = RowError("invalid_phone", "to must be an E.164 phone number such as +14155551234")
INVALID_LIST_NUMBER = RowError("invalid_list_number", "list_number must be an E.164 phone number such as +18005551000")
INVALID_WRAP_LINKS = RowError("invalid_field", "wrap_links must be true or false")
INVALID_CONTACT_DATA = RowError(
    "invalid_field",
    "contact_data must be an object; first_name, last_name and timezone strings, custom_fields an object",
)
INVALID_METADATA = RowError("invalid_field", "metadata must be an object")
LIST_NOT_FOUND = RowError("list_not_found", "No active list of this account has this list_number")
QUEUE_REJECTED = RowError(
    "queue_rejected",
    "The queue refused this message; it is not queued. Send it again in a new batch, with a new Idempotency-Key",
)
TOO_LARGE = RowError("queue_rejected", "This message is larger than the queue accepts; it is not queued. Shorten it")
OUTCOME_UNKNOWN = RowError("outcome_unknown", "The queue did not confirm this message: it may or may not be queued")


def drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks of an exception and of its causes, once nobody will show them.

    A traceback holds its frames, and the frames hold the request's body. Where a future or a stream keeps the
    exception, that is a cycle: the body would stay in memory until the garbage collector's next run.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def kinds() -> list[type[GatewayError]]:
    """Return all refusals of a whole request that have a code, in the order of the tree above."""
    return [kind for kind in _below(GatewayError) if hasattr(kind, "code")]


def row_errors() -> list[RowError]:
    """Return all errors of a single message."""
    return [value for value in globals().values() if isinstance(value, RowError)]


def _below(kind: type[GatewayError]) -> list[type[GatewayError]]:
    return [one for child in kind.__subclasses__() for one in (child, *_below(child))]
