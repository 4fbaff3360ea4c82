"""Promise 6: nobody sends from a list they do not own. Random accounts and lists, real HTTP, an oracle in SQL.

The oracle asks the database one question per message: does this key own this number now? It knows nothing of the
gateway's queries. The requests of a round are in flight together, from different accounts. The gateway coalesces
their lookups, and a mix-up would happen there.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.cli.admin import Admin
from gateway.postgres.queries import FIND_ACCOUNTS_AND_LISTS, RESOLVE_LISTS
from gateway.web import bodies
from testbed import Servers
from tests.properties import MORE
from tests.support.callers import make_caller
from tests.support.gateways import GatewayUnderTest
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import BODY

EXAMPLES = settings(
    derandomize=MORE == 1,
    max_examples=30 * MORE,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # a world takes real servers: to shrink a failure would take minutes
    # One gateway and one queue for all examples is meant: each example has accounts and numbers of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ACCOUNTS, NUMBERS = 4, 5

ORACLE = """
    SELECT $3 ~ '^[+][1-9][0-9]{1,14}$' AS has_recipient,
           $2 ~ '^[+][1-9][0-9]{1,14}$' AS is_number,
           (SELECT list.id
            FROM api_keys, accounts, sending_lists AS list
            WHERE api_keys.sha256 = sha256(convert_to($1, 'UTF8')) AND api_keys.revoked_at IS NULL
              AND accounts.id = api_keys.account_id AND accounts.status = 'active'
              AND list.account_id = accounts.id AND list.status = 'active'
              AND list.number = $2) AS list_id
"""
ORACLE_OF_KEYS = """
    SELECT accounts.status FROM api_keys, accounts
    WHERE api_keys.sha256 = sha256(convert_to($1, 'UTF8')) AND revoked_at IS NULL AND accounts.id = account_id
"""

ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
FULL_WIDTH = str.maketrans("+0123456789", "＋０１２３４５６７８９")
MATHEMATICAL = str.maketrans("0123456789", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗")

# How a caller may write a number that is, or is not, theirs.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda number: number,
    "space behind": lambda number: number + " ",
    "newline behind": lambda number: number + "\n",
    "newline before": lambda number: "\n" + number,
    "twice": lambda number: number + "\n" + number,
    "NUL behind": lambda number: number + "\x00",
    "NUL inside": lambda number: number[:5] + "\x00" + number[5:],
    "only NUL": lambda _: "\x00",
    "quote": lambda number: number + "'",
    "or true": lambda number: number + "' OR '1'='1",
    "union": lambda number: f"' UNION SELECT account_id, number, id FROM sending_lists WHERE number = '{number}'--",  # noqa: S608
    "comment": lambda number: number + "/**/",
    "array": lambda number: "{" + number + "}",
    "two in an array": lambda number: f'{{"{number}","{number}"}}',
    "percent": lambda number: number[:-1] + "%",
    "underscore": lambda number: number[:-1] + "_",
    "only percent": lambda _: "%",
    "pattern": lambda number: f"^\\{number}$",
    "backslash": lambda number: "\\" + number,
    "dollar": lambda _: "$1",
    "Arabic digits": lambda number: number.translate(ARABIC),
    "full width": lambda number: number.translate(FULL_WIDTH),
    "one mathematical digit": lambda number: number[:-1] + number[-1].translate(MATHEMATICAL),
    "right to left": lambda number: "\u200f" + number,
    "zero-width space": lambda number: number + "\u200b",
    "combining accent": lambda number: number + "\u0301",
    "byte order mark": lambda number: "\ufeff" + number,
    "no plus": lambda number: number[1:],
    "double zero": lambda number: "00" + number[1:],
    "huge": lambda number: number * 2_000,
    "cut": lambda number: number[:-1],
    "macro": lambda _: "{{messageId}}",
}


class Number(NamedTuple):
    """The owners of a number: one account actively, some no longer."""

    active_of: int | None
    inactive_of: frozenset[int]


class Sent(NamedTuple):
    """One message: its list number, the spelling of that number, and its recipient."""

    number: int
    spelling: str
    from_default: bool  # left to the request's own list_number
    to: str | None


class Request(NamedTuple):
    """A request of one account. All keyed requests of a round use the same Idempotency-Key."""

    account: int
    messages: list[Sent]
    default: tuple[int, str] | None
    keyed: bool


class Move(NamedTuple):
    """A number that moves to another account before the round: its row moves, or a new row is added."""

    number: int
    to: int
    keeps_row: bool


class Round(NamedTuple):
    """Moves, and then requests in flight together."""

    moves: list[Move]
    requests: list[Request]


accounts = st.integers(0, ACCOUNTS - 1)
any_number = st.integers(0, NUMBERS)  # the last one exists nowhere
spellings = st.one_of(st.just("plain"), st.just("plain"), st.just("plain"), st.sampled_from(sorted(SPELLINGS)))
numbers = st.builds(Number, st.none() | accounts | accounts, st.frozensets(accounts, max_size=2))
sent_messages = st.builds(
    Sent,
    any_number,
    spellings,
    st.integers(0, 5).map(lambda drawn: drawn == 0),
    st.one_of(st.none(), st.none(), st.none(), st.sampled_from(["+1", "+1'; DROP TABLE accounts; --", "١٢٣", "x\x00"])),
)
requests = st.builds(
    Request,
    accounts,
    st.lists(sent_messages, min_size=1, max_size=8),
    st.none() | st.tuples(any_number, spellings),
    st.booleans(),
)
rounds = st.builds(
    Round,
    st.lists(st.builds(Move, st.integers(0, NUMBERS - 1), accounts, st.booleans()), max_size=3),
    st.lists(requests, min_size=2, max_size=10),
)


class World:
    """The accounts, keys and numbers of one example."""

    def __init__(self, database: asyncpg.Connection, admin: Admin) -> None:
        self._database = database
        self._admin = admin
        self.ids: list[int] = []
        self.keys: list[str] = []
        base = uuid.uuid4().int % 10**11
        self.numbers = [f"+1{base:011}{number:02}" for number in range(NUMBERS + 1)]

    async def make(self, owners: Sequence[Number], suspended: int | None, revoked: int | None) -> None:
        for account in range(ACCOUNTS):
            caller = await make_caller(self._admin, f"account {account}")
            self.ids.append(caller.account_id)
            self.keys.append(caller.key)
            if account == revoked:
                await self._admin.revoke_key(caller.key_id)
        if suspended is not None:
            await self._admin.set_account_status(self.ids[suspended], "suspended")
        rows = [
            (self.ids[account], self.numbers[place], "active" if account == number.active_of else "inactive")
            for place, number in enumerate(owners)
            for account in {number.active_of, *number.inactive_of} - {None}
            if account is not None
        ]
        insert = "INSERT INTO sending_lists (account_id, number, status) VALUES ($1, $2, $3)"
        await self._database.executemany(insert, rows)

    async def move(self, move: Move) -> None:
        """Move a number to its new owner in one transaction."""
        number, owner = self.numbers[move.number], self.ids[move.to]
        async with self._database.transaction():
            if move.keeps_row:
                await self._database.execute(
                    "DELETE FROM sending_lists WHERE number = $1 AND account_id = $2 AND status = 'inactive'",
                    *(number, owner),
                )
                await self._database.execute(
                    "UPDATE sending_lists SET account_id = $2 WHERE number = $1 AND status = 'active'", number, owner
                )
            else:
                await self._database.execute("UPDATE sending_lists SET status = 'inactive' WHERE number = $1", number)
                await self._database.execute(
                    "INSERT INTO sending_lists (account_id, number) VALUES ($2, $1)"
                    " ON CONFLICT (account_id, number) DO UPDATE SET status = 'active'",
                    *(number, owner),
                )


class Expected(NamedTuple):
    """The oracle's answer to one request."""

    status: int
    rows: list[tuple[int, str, str]]  # index, to, code
    payloads: list[dict[str, Any]]


_tokens = count()


def written(world: World, number: int, spelling: str) -> str:
    return SPELLINGS[spelling](world.numbers[number])


def body_of(world: World, request: Request) -> dict[str, Any]:
    """Return the request's body. Every text is different, so that a payload identifies its message."""
    messages = []
    for sent in request.messages:
        token = next(_tokens)
        message = {"to": sent.to or f"+49{token:012}", "body": f"{token} {BODY} '; --\x00 {{{{x}}}}"}
        if not sent.from_default:
            message["list_number"] = written(world, sent.number, sent.spelling)
        messages.append(message)
    body: dict[str, Any] = {"messages": messages}
    if request.default is not None:
        body["list_number"] = written(world, *request.default)
    return body


async def foretell(database: asyncpg.Connection, world: World, request: Request, body: dict[str, Any]) -> Expected:
    """Return the oracle's answer: one query for the key, one for each message."""
    key = world.keys[request.account]
    status = await database.fetchval(ORACLE_OF_KEYS, key)
    if status != "active":
        return Expected(401 if status is None else 403, [], [])
    rows, payloads = [], []
    for index, message in enumerate(body["messages"]):
        to, number = message["to"], message.get("list_number", body.get("list_number"))
        if number is None:
            code, list_id = "missing_list_number", None
        else:
            # PostgreSQL knows no text with a NUL: whatever has one is no number.
            asked = [text if "\x00" not in text else "NUL" for text in (number, to)]
            found = await database.fetchrow(ORACLE, key, *asked)
            list_id = found["list_id"]
            if not found["has_recipient"]:
                code = "invalid_phone"
            elif not found["is_number"]:
                code = "invalid_list_number"
            else:
                code = "" if list_id is not None else "list_not_found"
        if code:
            rows.append((index, to, code))
        else:
            payload = {"account_id": world.ids[request.account], "list_id": list_id, "list_number": number}
            payloads.append(payload | {"to": to, "body": message["body"], "index": index})
    return Expected(200, rows, payloads)


async def send(
    gateway: GatewayUnderTest, world: World, request: Request, body: dict[str, Any], key: str | None
) -> tuple[int, Any]:
    headers = {"X_Api_Key": world.keys[request.account]} | ({"Idempotency_Key": key} if key else {})
    status, answer, _ = await gateway.post(msgspec.json.encode(body), **headers)
    return status, answer


async def play(
    gateway: GatewayUnderTest,
    queue: OutboundQueue,
    database: asyncpg.Connection,
    world: World,
    number: int,
    part: Round,
) -> None:
    """Run one round: the moves, the oracle, all requests at once, and then compare with the queue."""
    for move in part.moves:
        await world.move(move)
    bodies = [body_of(world, request) for request in part.requests]
    expected = [
        await foretell(database, world, request, body) for request, body in zip(part.requests, bodies, strict=True)
    ]
    keyed: set[int] = set()  # an account may use the key once a round, every account the same
    calls = []
    for request, body in zip(part.requests, bodies, strict=True):
        has_key = request.keyed and request.account not in keyed
        keyed |= {request.account} if has_key else set()
        calls.append(send(gateway, world, request, body, f"round-{number}" if has_key else None))
    for (status, answer), told in zip(await asyncio.gather(*calls), expected, strict=True):
        assert status == told.status
        if status == 200:
            assert [(row["index"], row["to"], row["code"]) for row in answer["errors"]] == told.rows
            assert answer["queued_count"] == len(told.payloads)
    consumed = {payload["body"]: payload for payload in await queue.take_payloads()}
    promised = {payload["body"]: payload for told in expected for payload in told.payloads}
    assert consumed.keys() == promised.keys()
    for text, payload in promised.items():
        assert payload.items() <= consumed[text].items()


@pytest.fixture
async def database(servers: Servers) -> AsyncIterator[asyncpg.Connection]:
    """Open a connection for the oracle."""
    connection = await asyncpg.connect(servers.database_url)
    yield connection
    await connection.close()


@pytest.fixture(params=[FIND_ACCOUNTS_AND_LISTS, RESOLVE_LISTS], ids=["with the key", "after the key"])
async def sharing_gateway(gateway: GatewayUnderTest, request: pytest.FixtureRequest) -> AsyncIterator[GatewayUnderTest]:
    """Yield a gateway that finds lists by one of the two queries.

    Check at the end that it has found lists of several accounts, or keys, in one query.
    """
    accounts_per_query: list[int] = []
    fetch = asyncpg.Connection.fetch

    async def fetch_and_count(connection: object, sql: str, *arguments: Sequence[Any], **options: Any) -> Any:
        if sql == request.param:
            accounts, _ = arguments
            accounts_per_query.append(len(set(accounts)))
        return await fetch(connection, sql, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncpg.Connection, "fetch", fetch_and_count)
        if request.param == RESOLVE_LISTS:
            patch.setattr(bodies, "SMALL_REQUEST_BYTES", 0)
        yield gateway
    shared = [accounts for accounts in accounts_per_query if accounts > 1]
    assert len(shared) >= 10, "nothing could have been mixed up: the test has shown nothing"


@EXAMPLES
@given(
    owners=st.lists(numbers, min_size=NUMBERS, max_size=NUMBERS),
    suspended=st.none() | st.none() | accounts,
    revoked=st.none() | st.none() | accounts,
    parts=st.lists(rounds, min_size=1, max_size=3),
)
async def test_every_message_goes_out_from_a_list_of_its_senders_or_not_at_all(
    sharing_gateway: GatewayUnderTest,
    queue: OutboundQueue,
    database: asyncpg.Connection,
    admin: Admin,
    owners: list[Number],
    suspended: int | None,
    revoked: int | None,
    parts: list[Round],
) -> None:
    world = World(database, admin)
    await world.make(owners, suspended, revoked)
    for number, part in enumerate(parts):
        await play(sharing_gateway, queue, database, world, number, part)
