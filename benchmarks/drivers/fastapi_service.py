"""The FastAPI service: the same contract in FastAPI, pydantic, asyncpg and aio-pika, for comparison.

Each library is used as its documentation shows. The service is neither crippled nor tuned: one query finds all lists of
a batch, ids are leased in blocks, and all messages of a batch are published together.

    uvicorn benchmarks.drivers.fastapi_service:app --loop uvloop --http httptools
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import aio_pika
import aiormq
import asyncpg
from aio_pika.abc import AbstractExchange
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

MAX_MESSAGES = 1_000
CONFIRM_TIMEOUT_S = 10.0
IDS_PER_LEASE = 983_040  # 221,875,920 leases of these are all ids of 8 characters
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
E164 = r"^\+[1-9][0-9]{1,14}$"

FIND_ACCOUNT = """
    SELECT account.id, account.status
    FROM api_keys AS key JOIN accounts AS account ON account.id = key.account_id
    WHERE key.sha256 = $1 AND key.revoked_at IS NULL
"""
FIND_LISTS = """
    SELECT number, id FROM sending_lists
    WHERE account_id = $1 AND number = ANY($2::text[]) AND status = 'active'
"""


class ContactData(BaseModel):
    model_config = ConfigDict(extra="allow")

    first_name: StrictStr | None = None
    last_name: StrictStr | None = None
    timezone: StrictStr | None = None
    custom_fields: dict[str, Any] | None = None


class MessageIn(BaseModel):
    to: Annotated[StrictStr, Field(pattern=E164)]
    list_number: Annotated[StrictStr, Field(pattern=E164)]
    body: Annotated[StrictStr, Field(min_length=1)]
    wrap_links: StrictBool | None = False
    contact_data: ContactData | None = None
    metadata: dict[str, Any] | None = None


class BulkRequest(BaseModel):
    """A request. Each message is validated by itself later, since a bad one does not spoil the others."""

    messages: Annotated[list[Any], Field(min_length=1)]
    list_number: str | None = None


class ErrorRow(BaseModel):
    index: int
    to: str | None
    code: str
    error: str


class BulkResponse(BaseModel):
    queued_count: int
    error_count: int
    errors: list[ErrorRow]


class Payload(BaseModel):
    id: str
    account_id: int
    list_id: int
    list_number: str
    to: str
    body: str
    wrap_links: bool
    contact_data: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    accepted_at: str
    request_id: str
    index: int


class IdGenerator:
    """A source of 8-character ids from leased blocks of a database sequence."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool
        self._lock = asyncio.Lock()
        self._next = self._end = 0

    async def take(self, count: int) -> list[str]:
        async with self._lock:
            if self._end - self._next < count:
                lease = await self._pool.fetchval("SELECT nextval('message_id_leases')")
                self._next = lease * IDS_PER_LEASE
                self._end = self._next + IDS_PER_LEASE
            first = self._next
            self._next += count
        return [self._encode(number) for number in range(first, first + count)]

    @staticmethod
    def _encode(number: int) -> str:
        characters = []
        for _ in range(8):
            number, digit = divmod(number, 62)
            characters.append(DIGITS[digit])
        return "".join(reversed(characters))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool and the broker connection, declare the topology."""
    queue_name = os.environ["GATEWAY_AMQP_QUEUE"]
    exchange_name = os.environ["GATEWAY_AMQP_EXCHANGE"]
    async with asyncpg.create_pool(os.environ["GATEWAY_DATABASE_URL"], min_size=2, max_size=10) as pool:
        connection = await aio_pika.connect_robust(os.environ["GATEWAY_AMQP_URL"])
        async with connection:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            exchange = await channel.declare_exchange(exchange_name, aio_pika.ExchangeType.DIRECT, durable=True)
            queue_type = os.environ.get("GATEWAY_AMQP_QUEUE_TYPE", "quorum")
            queue = await channel.declare_queue(queue_name, durable=True, arguments={"x-queue-type": queue_type})
            await queue.bind(exchange, routing_key=queue_name)
            app.state.pool = pool
            app.state.exchange = exchange
            app.state.routing_key = queue_name
            app.state.ids = IdGenerator(pool)
            yield


app = FastAPI(lifespan=lifespan)


def refusal(status: int, code: str, sentence: str) -> HTTPException:
    return HTTPException(status, {"error": sentence, "code": code})


@app.exception_handler(HTTPException)
async def answer_refusal(_request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error.detail, error.status_code)


@app.exception_handler(RequestValidationError)
async def answer_invalid_request(_request: Request, error: RequestValidationError) -> JSONResponse:
    is_json = all(problem["type"] != "json_invalid" for problem in error.errors())
    code = "missing_messages" if is_json else "invalid_json"
    return JSONResponse({"error": "messages must be a non-empty array of message objects", "code": code}, 400)


async def authenticate(request: Request, x_api_key: Annotated[str | None, Header()] = None) -> int:
    """Return the id of the account that owns the key."""
    if not x_api_key:
        raise refusal(401, "missing_api_key", "API key required")
    digest = hashlib.sha256(x_api_key.encode()).digest()
    account = await request.app.state.pool.fetchrow(FIND_ACCOUNT, digest)
    if account is None:
        raise refusal(401, "invalid_api_key", "Invalid API key")
    if account["status"] != "active":
        raise refusal(403, "account_suspended", "Account is suspended")
    account_id: int = account["id"]
    return account_id


def explain(index: int, raw: Any, error: ValidationError) -> ErrorRow:
    """Return the row of a bad message, for its first failing check. Missing fields come first."""
    to = raw.get("to") if isinstance(raw, dict) else None
    shown = to if isinstance(to, str) else None
    if not isinstance(raw, dict):
        return ErrorRow(index=index, to=None, code="missing_to", error="to is required")
    for field in ("to", "list_number", "body"):
        if not raw.get(field):
            return ErrorRow(index=index, to=shown, code=f"missing_{field}", error=f"{field} is required")
    failed = {problem["loc"][0] for problem in error.errors()}
    if "body" in failed:
        return ErrorRow(index=index, to=shown, code="missing_body", error="body must be a string")
    if "to" in failed:
        return ErrorRow(index=index, to=shown, code="invalid_phone", error="to must be an E.164 phone number")
    if "list_number" in failed:
        return ErrorRow(
            index=index, to=shown, code="invalid_list_number", error="list_number must be an E.164 phone number"
        )
    return ErrorRow(index=index, to=shown, code="invalid_field", error=f"{failed.pop()} has the wrong type")


def validate(bulk: BulkRequest) -> tuple[list[tuple[int, MessageIn]], list[ErrorRow]]:
    good: list[tuple[int, MessageIn]] = []
    errors: list[ErrorRow] = []
    for index, raw in enumerate(bulk.messages):
        if bulk.list_number and isinstance(raw, dict) and not raw.get("list_number"):
            raw["list_number"] = bulk.list_number
        try:
            good.append((index, MessageIn.model_validate(raw)))
        except ValidationError as error:
            errors.append(explain(index, raw, error))
    return good, errors


async def publish(exchange: AbstractExchange, routing_key: str, payload: Payload) -> Any:
    message = aio_pika.Message(
        payload.model_dump_json(exclude_none=True).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=payload.id,
        type="sms.v1",
    )
    return await exchange.publish(message, routing_key, mandatory=True, timeout=CONFIRM_TIMEOUT_S)


@app.post("/api/v2/send/bulk")
async def send_bulk(
    bulk: BulkRequest, request: Request, account_id: Annotated[int, Depends(authenticate)]
) -> BulkResponse:
    if len(bulk.messages) > MAX_MESSAGES:
        raise refusal(413, "too_many_messages", "A request may carry at most 1,000 messages")
    good, errors = validate(bulk)
    state = request.app.state
    numbers = list({message.list_number for _, message in good})
    lists = {row["number"]: row["id"] for row in await state.pool.fetch(FIND_LISTS, account_id, numbers)}
    ids = await state.ids.take(len(good))
    accepted_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
    payloads: list[Payload] = []
    for (index, message), message_id in zip(good, ids, strict=True):
        list_id = lists.get(message.list_number)
        if list_id is None:
            errors.append(ErrorRow(index=index, to=message.to, code="list_not_found", error="No such active list"))
            continue
        payloads.append(
            Payload(
                id=message_id,
                account_id=account_id,
                list_id=list_id,
                list_number=message.list_number,
                to=message.to,
                body=message.body.replace("{{messageId}}", message_id),
                wrap_links=bool(message.wrap_links),
                contact_data=message.contact_data.model_dump(exclude_none=True) if message.contact_data else None,
                metadata=message.metadata,
                accepted_at=accepted_at,
                request_id=request_id,
                index=index,
            )
        )
    outcomes = await asyncio.gather(
        *(publish(state.exchange, state.routing_key, payload) for payload in payloads), return_exceptions=True
    )
    for payload, outcome in zip(payloads, outcomes, strict=True):
        if isinstance(outcome, (aiormq.exceptions.DeliveryError, aio_pika.exceptions.PublishError)):
            errors.append(
                ErrorRow(index=payload.index, to=payload.to, code="queue_rejected", error="The queue refused it")
            )
        elif isinstance(outcome, BaseException):
            errors.append(
                ErrorRow(index=payload.index, to=payload.to, code="outcome_unknown", error="It may be queued or not")
            )
    errors.sort(key=lambda row: row.index)
    return BulkResponse(queued_count=len(bulk.messages) - len(errors), error_count=len(errors), errors=errors)
