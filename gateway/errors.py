"""Every refusal the gateway can give: of a whole request (an exception), or of one message (a code in a row).

GatewayError                    status  code                    the caller may send it again
├── MissingMessages             400     missing_messages        after mending it
├── InvalidIdempotencyKey       400     invalid_idempotency_key after mending it
├── InvalidJson                 400     invalid_json            after mending it
├── MalformedHttp               400     malformed_http          after mending it
├── MissingApiKey               401     missing_api_key         with a key
├── InvalidApiKey               401     invalid_api_key         with another key
├── AccountSuspended            403     account_suspended       once the account is active
├── NotFound                    404     not_found               elsewhere
├── MethodNotAllowed            405     method_not_allowed      as one of Allow
├── RequestTimeout              408     request_timeout         always
├── IdempotencyInProgress       409     idempotency_in_progress in a moment, with the same key
├── TooManyMessages             413     too_many_messages       in parts
├── PayloadTooLarge             413     payload_too_large       in parts
├── UnsupportedMediaType        415     unsupported_media_type  as plain JSON
├── ExpectationFailed           417     expectation_failed      without it
├── IdempotencyKeyReused        422     idempotency_key_reused  with another key
├── InternalError               500     internal_error          it is our bug
├── Unavailable                 503     (its children)          always: nothing of the request was queued
│   ├── QueueUnavailable                queue_unavailable
│   ├── DatabaseUnavailable             database_unavailable
│   ├── Overloaded                      overloaded
│   └── Draining                        draining
└── OutcomeUnknown              504     outcome_unknown         it may be queued already
"""

import math
from typing import ClassVar, NamedTuple

MAX_RETRY_AFTER_S = 10  # a promise for longer than that nobody can keep


class GatewayError(Exception):
    """A refusal of a whole request; `str()` of it is the sentence the caller reads."""

    status: ClassVar[int]
    code: ClassVar[str]
    sentence: ClassVar[str]

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__(sentence or self.sentence)

    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to this refusal, beside those every answer has."""
        return {}


class MissingMessages(GatewayError):
    status, code = 400, "missing_messages"
    sentence = "messages must be a non-empty array of message objects"


class InvalidIdempotencyKey(GatewayError):
    status, code = 400, "invalid_idempotency_key"
    sentence = "Idempotency-Key must be sent once, as 1 to 255 visible ASCII characters"


class InvalidJson(GatewayError):
    status, code = 400, "invalid_json"
    sentence = "The request body must be one JSON object in UTF-8"


class MalformedHttp(GatewayError):
    status, code = 400, "malformed_http"
    sentence = "The request is not valid HTTP"


class MissingApiKey(GatewayError):
    status, code, sentence = 401, "missing_api_key", "API key required"


class InvalidApiKey(GatewayError):
    status, code, sentence = 401, "invalid_api_key", "Invalid API key"


class AccountSuspended(GatewayError):
    status, code, sentence = 403, "account_suspended", "Account is suspended"


class NotFound(GatewayError):
    status, code = 404, "not_found"
    sentence = "There is nothing at this path. Send messages to POST /api/v2/send/bulk"


class MethodNotAllowed(GatewayError):
    status, code = 405, "method_not_allowed"
    sentence = "This path does not take that method; see the Allow header"

    def __init__(self, allow: str) -> None:
        super().__init__()
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


class RequestTimeout(GatewayError):
    status, code = 408, "request_timeout"
    sentence = "The request body did not arrive in time. Nothing was queued; send it again"


class IdempotencyInProgress(GatewayError):
    status, code = 409, "idempotency_in_progress"
    sentence = "The first request with this Idempotency-Key has not ended yet; send it again in a moment"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class TooManyMessages(GatewayError):
    status, code = 413, "too_many_messages"
    sentence = "A request may carry at most 1,000 messages. Split it"


class PayloadTooLarge(GatewayError):
    status, code = 413, "payload_too_large"
    sentence = "A request body may have at most 5,242,880 bytes. Split it"


class UnsupportedMediaType(GatewayError):
    status, code = 415, "unsupported_media_type"
    sentence = "Send the body as application/json in UTF-8, without Content-Encoding"


class ExpectationFailed(GatewayError):
    status, code = 417, "expectation_failed"
    sentence = "The only expectation this service meets is 100-continue"


class IdempotencyKeyReused(GatewayError):
    status, code = 422, "idempotency_key_reused"
    sentence = "This Idempotency-Key was sent with another body. Use a new key for a new batch"


class InternalError(GatewayError):
    status, code = 500, "internal_error"
    sentence = "Something went wrong on our side. Please report the request id"


class Unavailable(GatewayError):
    """Nothing of this request was queued; it is always safe to send again."""

    status = 503

    def __init__(self, sentence: str | None = None, *, retry_after_s: float = 1.0) -> None:
        """`retry_after_s`: what was measured says that it is worth another try then."""
        super().__init__(sentence)
        self.retry_after_s = min(max(math.ceil(retry_after_s), 1), MAX_RETRY_AFTER_S)

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class QueueUnavailable(Unavailable):
    code = "queue_unavailable"
    sentence = "The message queue is unavailable. Nothing was queued; send it again"


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"
    sentence = "The database is unavailable. Nothing was queued; send it again"


class Overloaded(Unavailable):
    code = "overloaded"
    sentence = "Too many requests are in flight. Nothing was queued; send it again"


class Draining(Unavailable):
    code = "draining"
    sentence = "This process is shutting down. Nothing was queued; send it again"


class OutcomeUnknown(GatewayError):
    status, code = 504, "outcome_unknown"
    sentence = "The queue did not confirm in time: these messages may or may not be queued"


class Refusal(NamedTuple):
    """Why one message was refused: the `code` and `error` of its row."""

    code: str
    sentence: str


MISSING_TO = Refusal("missing_to", "to is required")
MISSING_LIST_NUMBER = Refusal("missing_list_number", "list_number is required")
MISSING_BODY = Refusal("missing_body", "body is required and must be a non-empty string")
INVALID_PHONE = Refusal("invalid_phone", "to must be an E.164 phone number such as +14155551234")
INVALID_LIST_NUMBER = Refusal("invalid_list_number", "list_number must be an E.164 phone number such as +18005551000")
INVALID_WRAP_LINKS = Refusal("invalid_field", "wrap_links must be true or false")
INVALID_CONTACT_DATA = Refusal(
    "invalid_field",
    "contact_data must be an object; first_name, last_name and timezone strings, custom_fields an object",
)
INVALID_METADATA = Refusal("invalid_field", "metadata must be an object")
LIST_NOT_FOUND = Refusal("list_not_found", "No active list of this account has this list_number")
QUEUE_REJECTED = Refusal("queue_rejected", "The queue refused this message; it is not queued. Send it again")
OUTCOME_UNKNOWN = Refusal(
    "outcome_unknown", "The queue did not confirm this message in time: it may or may not be queued"
)


def kinds() -> list[type[GatewayError]]:
    """Every refusal of a whole request that has a code, in the order of the tree above."""
    return [kind for kind in _below(GatewayError) if hasattr(kind, "code")]


def refusals() -> list[Refusal]:
    """Every refusal of a single message."""
    return [value for value in globals().values() if isinstance(value, Refusal)]


def _below(kind: type[GatewayError]) -> list[type[GatewayError]]:
    return [one for child in kind.__subclasses__() for one in (child, *_below(child))]
