"""The database role and the broker user of a gateway may do what serving takes, and nothing else."""

import re
import shlex
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import asyncpg
import pytest
from aio_pika.abc import AbstractChannel
from yarl import URL

from gateway.amqp.connection import declare_topology
from gateway.cli import status
from gateway.cli.admin import Admin, AdminError, open_admin
from gateway.postgres import queries
from gateway.postgres.pool import connect_to_primary
from gateway.postgres.rights import ALL_RIGHTS, RIGHTS_OF_REQUESTS, SERVICE_RIGHTS, MissingRights, Right, check_rights
from testbed import Servers
from tests.support.callers import make_caller
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway, run_gateway
from tests.support.outbound_queue import OutboundQueue

# All that the gateway ever says to the database, by name; and what `status` asks about migrations.
STATEMENTS = {name: sql for name, sql in vars(queries).items() if name.isupper() and isinstance(sql, str)}
STATEMENTS["APPLIED_MIGRATIONS"] = status.APPLIED_MIGRATIONS


class Role(NamedTuple):
    name: str
    url: str


@pytest.fixture(scope="module")
def role(servers: Servers) -> Iterator[Role]:
    """Create a database role for serving, and grant its rights as docs/operations.md says."""
    if servers.postgres is None:
        pytest.skip("makes and drops a database role: needs a PostgreSQL of its own")
    name = f"service {uuid.uuid4().hex[:8]}"  # no name that could go unquoted
    servers.postgres.execute(f'CREATE ROLE "{name}" LOGIN')
    completed = run_gateway("migrate", "--grant-to", name, database_url=servers.database_url)
    assert completed.returncode == 0, completed.stderr
    assert "idempotency_keys" in completed.stdout
    yield Role(name, str(URL(servers.database_url).with_user(name)))
    own = urlsplit(servers.database_url).path[1:]
    for statement in ("DROP OWNED BY", "DROP ROLE"):
        servers.postgres._run(
            servers.postgres._program("psql"), servers.postgres._url(own), f'--command={statement} "{name}"'
        )


@pytest.fixture
async def service(role: Role) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect_to_primary(role.url)
    yield connection
    await connection.close()


@pytest.fixture
async def owner(servers: Servers) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect_to_primary(servers.database_url)
    yield connection
    await connection.close()


async def may_run(connection: asyncpg.Connection, sql: str) -> bool:
    """Return True if the role may run the statement. The statement is only planned, except one with a sequence."""
    try:
        if "nextval" in sql:
            await connection.execute(sql)
        else:
            await connection.execute(f"EXPLAIN (GENERIC_PLAN) {sql}")
    except asyncpg.InsufficientPrivilegeError:
        return False
    return True


async def test_the_role_may_run_each_statement_of_the_gateway(service: asyncpg.Connection) -> None:
    assert len(STATEMENTS) >= 9
    assert [name for name, sql in STATEMENTS.items() if not await may_run(service, sql)] == []


def shown(right: Right) -> str:
    return f"{right.action}{f' ({right.column})' if right.column else ''} ON {right.target}"


@pytest.mark.parametrize("right", ALL_RIGHTS, ids=shown)
async def test_the_role_has_no_right_that_no_statement_needs_and_a_missing_one_is_named(
    owner: asyncpg.Connection, role: Role, right: Right
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(f'REVOKE {shown(right)} FROM "{role.name}"')
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        with pytest.raises(MissingRights, match=re.escape(f'the role "{role.name}" lacks {shown(right)}: ')):
            await check_rights(owner, ALL_RIGHTS)
        if right not in RIGHTS_OF_REQUESTS:
            await check_rights(owner, RIGHTS_OF_REQUESTS)
        refused = []
        for name, sql in STATEMENTS.items():
            await owner.execute("SAVEPOINT before")
            if not await may_run(owner, sql):
                refused.append(name)
            await owner.execute("ROLLBACK TO SAVEPOINT before")
        assert refused
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    ("right", "column", "missing"),
    [
        (
            "SELECT",
            "key",
            "SELECT (account_id, body_sha256, first_id, holder, held_until, answer, not_found, created_at)",
        ),
        ("INSERT", "key", "INSERT (account_id, body_sha256, first_id, holder, held_until, not_found)"),
        ("UPDATE", "answer", "UPDATE (holder, held_until, not_found)"),
    ],
)
async def test_a_right_to_one_column_is_no_right_to_the_others(
    owner: asyncpg.Connection, role: Role, right: str, column: str, missing: str
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(f'REVOKE {right} ON idempotency_keys FROM "{role.name}"')
        await owner.execute(f'GRANT {right} ({column}) ON idempotency_keys TO "{role.name}"')
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        with pytest.raises(MissingRights, match=re.escape(f"lacks {missing} ON idempotency_keys: as the owner")):
            await check_rights(owner, RIGHTS_OF_REQUESTS)
    finally:
        await transaction.rollback()


ENABLE = "ALTER TABLE {} ENABLE ROW LEVEL SECURITY"
POLICY = "CREATE POLICY theirs ON accounts {} USING (true)"
SEES_NO_ACCOUNT = 'row-level security has no policy for the role "{}" on accounts (SELECT)'


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([ENABLE.format("accounts")], SEES_NO_ACCOUNT),
        ([ENABLE.format("accounts"), POLICY.format("TO postgres")], SEES_NO_ACCOUNT),
        ([ENABLE.format("accounts"), POLICY.format("FOR UPDATE")], SEES_NO_ACCOUNT),
        ([ENABLE.format("accounts"), POLICY.format("AS RESTRICTIVE")], SEES_NO_ACCOUNT),
        (
            [
                ENABLE.format("accounts"),
                ENABLE.format("idempotency_keys"),
                "CREATE POLICY read ON idempotency_keys FOR SELECT USING (true)",
                "CREATE POLICY write ON idempotency_keys FOR INSERT WITH CHECK (true)",
            ],
            f"{SEES_NO_ACCOUNT}, idempotency_keys (UPDATE, DELETE)",
        ),
        (
            [
                "ALTER TABLE accounts OWNER TO {}",
                ENABLE.format("accounts"),
                "ALTER TABLE accounts FORCE ROW LEVEL SECURITY",
            ],
            SEES_NO_ACCOUNT,
        ),
    ],
)
async def test_row_level_security_without_a_policy_is_named_with_the_command_that_helps(
    owner: asyncpg.Connection, role: Role, given: list[str], says: str
) -> None:
    """Every key would be refused: its account is not seen."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("INSERT INTO accounts (name) VALUES ('seen')")
        for statement in given:
            await owner.execute(statement.replace("{}", f'"{role.name}"'))
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        assert not await owner.fetchval("SELECT count(id) FROM accounts")
        with pytest.raises(MissingRights) as hidden:
            await check_rights(owner, RIGHTS_OF_REQUESTS)
        assert str(hidden.value).startswith(f"{says.format(role.name)}: as the owner of the tables, run `CREATE POLICY")
        (command,) = re.findall(r"run `(.*)`$", str(hidden.value))
        await owner.execute(f"RESET ROLE; {command}")
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        await check_rights(owner, RIGHTS_OF_REQUESTS)
        assert await owner.fetchval("SELECT count(id) FROM accounts")
        policies = await owner.fetch("SELECT polcmd FROM pg_policy WHERE polname LIKE $1", f"{role.name}%")
        assert b"*" not in {polcmd for (polcmd,) in policies}, "it would open what the operator's own policies hide"
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    "given",
    [
        ["ALTER ROLE {} BYPASSRLS"],
        [POLICY.format("TO {}")],
        [POLICY.format("FOR SELECT TO PUBLIC")],
        ["CREATE ROLE people", "GRANT people TO {}", POLICY.format("TO people")],
    ],
)
async def test_row_level_security_that_lets_the_role_through_is_no_problem(
    owner: asyncpg.Connection, role: Role, given: list[str]
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("INSERT INTO accounts (name) VALUES ('seen')")
        for statement in [ENABLE.format("accounts"), *given]:
            await owner.execute(statement.replace("{}", f'"{role.name}"'))
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        assert await owner.fetchval("SELECT count(id) FROM accounts")
        await check_rights(owner, ALL_RIGHTS)
    finally:
        await transaction.rollback()


async def test_missing_rights_and_row_level_security_are_named_together(owner: asyncpg.Connection, role: Role) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(ENABLE.format("api_keys"))
        await owner.execute(f'REVOKE DELETE ON idempotency_keys FROM "{role.name}"; SET LOCAL ROLE "{role.name}"')
        with pytest.raises(MissingRights) as both:
            await check_rights(owner, ALL_RIGHTS)
        assert "lacks DELETE ON idempotency_keys: as" in str(both.value)
        assert f'; row-level security has no policy for the role "{role.name}" on api_keys (SELECT, UPDATE)' in str(
            both.value
        )
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO accounts (name) VALUES ('mine')",
        "UPDATE accounts SET status = 'active'",
        "SELECT name FROM accounts",
        "INSERT INTO api_keys (account_id, sha256, prefix) VALUES (1, sha256('x'), 'trk_x')",
        "UPDATE api_keys SET revoked_at = NULL",
        "DELETE FROM api_keys",
        "SELECT prefix FROM api_keys",
        "INSERT INTO sending_lists (account_id, number) VALUES (1, '+18005551000')",
        "UPDATE sending_lists SET account_id = 1",
        "TRUNCATE idempotency_keys",
        "UPDATE idempotency_keys SET first_id = 0",
        "SELECT setval('message_id_leases', 0)",  # every id would be handed out again
        "DROP TABLE accounts",
        "ALTER TABLE accounts DISABLE TRIGGER ALL",
        "CREATE TABLE public.mine (id int)",
        "DELETE FROM schema_migrations",
        "SELECT pg_read_file('PG_VERSION')",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "CREATE ROLE another",
    ],
)
async def test_the_role_may_not(service: asyncpg.Connection, sql: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await service.execute(sql)


async def test_the_gateway_serves_as_the_role_with_idempotency_keys(
    role: Role, make_settings: MakeSettings, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(make_settings(database_url=role.url))
    async with OutboundQueue(gateway.runtime.settings.amqp_url, gateway.runtime.settings.amqp_queue) as queue:
        assert (await gateway.send([gateway.message()]))[1]["queued_count"] == 1
        body = gateway.caller.body()[:-2] + b",{}]}"
        for replayed in (None, "true"):
            status, answer, headers = await gateway.post(body, Idempotency_Key="one")
            assert (status, answer["error_count"], headers.get("Idempotent-Replayed")) == (200, 1, replayed)
        assert not await gateway.runtime.queries.sweep_keys()
        assert (await gateway.runtime.queries.count_keys())[gateway.caller.account_id] == 1
        assert await queue.depth() == 2
        await queue.delete()


async def test_a_process_without_a_right_is_not_ready_and_names_it_as_status_does(
    servers: Servers, role: Role, owner: asyncpg.Connection, make_settings: MakeSettings, start_gateway: StartGateway
) -> None:
    for right in ("SELECT (id, number) ON sending_lists", "DELETE ON idempotency_keys"):
        await owner.execute(f'REVOKE {right} FROM "{role.name}"')
    settings = make_settings(database_url=role.url)
    gateway = await start_gateway(settings, wait_until_ready=False)
    await eventually(lambda: gateway.runtime.pool.failures > 0)
    await eventually(gateway.runtime.publisher.connections.is_usable)
    command = f'python -m gateway migrate --grant-to "{role.name}"'
    problem = (
        f'the role "{role.name}" lacks SELECT (id, number) ON sending_lists, DELETE ON idempotency_keys: as the owner '
        f"of the tables, run `{command}`"
    )
    host = settings.database().hosts[0]
    async with gateway.session.get(gateway.ops_url + "/readyz") as response:
        assert response.status == 503
        assert (await response.json())["reasons"] == [f"the database refuses a right: {host}: {problem}"]
    found = await status.collect(settings, [URL(gateway.ops_url)], [])
    assert f"schema: {problem}" in found.problems
    assert any(one.startswith(f"gateway {gateway.ops_url}") and "DELETE" in one for one in found.problems)
    completed = run_gateway(*shlex.split(command)[3:], database_url=servers.database_url)
    assert completed.returncode == 0, completed.stderr
    await gateway.wait_until_ready()
    assert (await status.collect(settings, [], [])).schema.problem == ""


async def test_migrations_that_the_role_may_not_read_are_unknown(
    role: Role, owner: asyncpg.Connection, make_settings: MakeSettings
) -> None:
    await owner.execute(f'REVOKE ALL (version) ON schema_migrations FROM "{role.name}"')
    try:
        found = await status.collect(make_settings(database_url=role.url), [], ["1"])
    finally:
        await owner.execute(f'GRANT SELECT (version) ON schema_migrations TO "{role.name}"')
    assert "lacks SELECT (version) ON schema_migrations" in found.schema.problem
    assert "\n✗ schema       migrations unknown\n" in status.as_text(found)


async def test_a_schema_that_the_role_may_not_use_is_no_missing_migration(
    owner: asyncpg.Connection, role: Role
) -> None:
    """PostgreSQL says of its tables that they do not exist."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        with pytest.raises(MissingRights, match="lacks USAGE ON SCHEMA public: as the owner"):
            await check_rights(owner, RIGHTS_OF_REQUESTS)
        # A schema that is not in the search path does not count.
        await owner.execute("SAVEPOINT ours; SET LOCAL search_path = 'other'")
        with pytest.raises(asyncpg.UndefinedTableError):
            await check_rights(owner, RIGHTS_OF_REQUESTS)
        await owner.execute("ROLLBACK TO SAVEPOINT ours")
        assert "lacks USAGE ON SCHEMA public" in (await status._check_schema(owner, [])).problem
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    ("schema", "search_path"),
    [
        ("My Gateway", '"My Gateway"'),
        ("a,b", 'public, "a,b"'),
        ('say "hi"', '"say ""hi"""'),
        ("gateway_of_acme", "Gateway_Of_Acme"),  # PostgreSQL folds a name without quotes
        (None, '"$user", public'),
    ],
)
async def test_a_schema_that_the_role_may_not_use_is_found_whatever_its_name(
    owner: asyncpg.Connection, role: Role, schema: str | None, search_path: str
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        name = await owner.fetchval("SELECT quote_ident($1)", schema or role.name)
        await owner.execute(f"CREATE SCHEMA {name}; ALTER SEQUENCE message_id_leases SET SCHEMA {name}")
        await owner.execute("SELECT set_config('search_path', $1, true)", search_path)
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        with pytest.raises(MissingRights, match=re.escape(f"lacks USAGE ON SCHEMA {name}: as the owner")):
            await check_rights(owner, RIGHTS_OF_REQUESTS)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    "given",
    [
        ["GRANT pg_read_all_data, pg_write_all_data TO {}"],
        ["REVOKE ALL ON SEQUENCE message_id_leases FROM {}", "GRANT UPDATE ON SEQUENCE message_id_leases TO {}"],
    ],
)
async def test_a_right_that_includes_another_counts_for_it(
    owner: asyncpg.Connection, role: Role, given: list[str]
) -> None:
    """PostgreSQL lets a role with UPDATE on a sequence lease ids, too."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(f'REVOKE USAGE ON SEQUENCE message_id_leases FROM "{role.name}"')
        for statement in given:
            await owner.execute(statement.format(f'"{role.name}"'))
        await owner.execute(f'SET LOCAL ROLE "{role.name}"')
        assert await may_run(owner, queries.LEASE_MESSAGE_IDS)
        await check_rights(owner, ALL_RIGHTS)
    finally:
        await transaction.rollback()


async def test_an_owner_without_its_own_right_is_told_the_grant(owner: asyncpg.Connection, role: Role) -> None:
    """`migrate --grant-to` would refuse it."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        for table in SERVICE_RIGHTS:
            if " " not in table:
                await owner.execute(f'ALTER TABLE {table} OWNER TO "{role.name}"')
        await owner.execute(f'ALTER SEQUENCE message_id_leases OWNER TO "{role.name}"')
        await owner.execute(f'SET LOCAL SESSION AUTHORIZATION "{role.name}"')
        await check_rights(owner, ALL_RIGHTS)
        await owner.execute(f'REVOKE ALL ON accounts FROM "{role.name}"')
        with pytest.raises(MissingRights) as missing:
            await check_rights(owner, ALL_RIGHTS)
        (command,) = re.findall(r"run `(.*)`$", str(missing.value))
        assert command == f'GRANT SELECT (id, status) ON accounts TO "{role.name}"'
        await owner.execute(command)
        await check_rights(owner, ALL_RIGHTS)
    finally:
        await transaction.rollback()


async def test_a_role_that_may_not_connect_gets_no_rights_and_is_told_why(
    owner: asyncpg.Connection, role: Role
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        name = await owner.fetchval("SELECT quote_ident(current_database())")
        await owner.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
        with pytest.raises(AdminError, match=re.escape(f'GRANT CONNECT ON DATABASE {name} TO "{role.name}"')):
            await Admin(owner).grant_service(role.name)
    finally:
        await transaction.rollback()


async def test_rights_that_would_limit_nothing_are_not_given(servers: Servers, role: Role) -> None:
    async with open_admin(servers.database_url) as admin:
        with pytest.raises(AdminError, match="there is no database role nobody: CREATE ROLE nobody LOGIN"):
            await admin.grant_service("nobody")
        with pytest.raises(AdminError, match="postgres owns the tables"):
            await admin.grant_service("postgres")
    async with open_admin(role.url) as admin:
        with pytest.raises(AdminError, match="only the owner of the tables can grant"):
            await admin.grant_service(role.name)


async def test_granting_again_takes_away_what_was_given_beyond(
    servers: Servers, role: Role, owner: asyncpg.Connection
) -> None:
    await owner.execute(f'GRANT INSERT, SELECT ON accounts TO "{role.name}"')
    await owner.execute(f'GRANT ALL ON SEQUENCE message_id_leases TO "{role.name}"')
    async with open_admin(servers.database_url) as admin:
        assert [row["may"] for row in await admin.grant_service(role.name)] == list(SERVICE_RIGHTS.values())
    for right, what in (("INSERT", "accounts"), ("SELECT", "accounts"), ("UPDATE", "message_id_leases")):
        kind = "sequence" if "lease" in what else "table"
        assert not await owner.fetchval(f"SELECT has_{kind}_privilege($1, $2, $3)", role.name, what, right)
    assert await owner.fetchval("SELECT has_column_privilege($1, 'accounts', 'id', 'SELECT')", role.name)


ACCOUNT = "INSERT INTO accounts (name) VALUES ('mine')"
KEY = "INSERT INTO api_keys (account_id, sha256, prefix) VALUES (1, sha256('x'), 'trk_x')"


@pytest.mark.parametrize(
    ("given", "allows", "says"),
    [
        (["GRANT pg_write_all_data TO {}"], KEY, "INSERT on api_keys (as pg_write_all_data)"),
        (["GRANT pg_read_all_data TO {}"], "SELECT prefix FROM api_keys", "SELECT on api_keys (as pg_read_all_data)"),
        (["GRANT INSERT ON accounts TO PUBLIC"], ACCOUNT, "INSERT on accounts. Revoke them"),
        (["GRANT SELECT (name) ON accounts TO PUBLIC"], "SELECT name FROM accounts", "SELECT on accounts. Revoke"),
        (["GRANT TRUNCATE ON accounts TO PUBLIC"], "SELECT", "TRUNCATE on accounts. Revoke"),
        (["GRANT TRIGGER ON accounts TO PUBLIC"], "SELECT", "TRIGGER on accounts. Revoke"),
        (["GRANT REFERENCES ON accounts TO PUBLIC"], "SELECT", "REFERENCES on accounts. Revoke"),
        (
            ["GRANT UPDATE ON SEQUENCE message_id_leases TO PUBLIC"],
            "SELECT setval('message_id_leases', nextval('message_id_leases'))",  # a rollback does not undo setval
            "UPDATE on message_id_leases",
        ),
        (
            ["GRANT UPDATE ON SEQUENCE accounts_id_seq TO {}"],
            "SELECT setval('accounts_id_seq', nextval('accounts_id_seq'))",
            "UPDATE on accounts_id_seq",
        ),
        (
            ["CREATE ROLE admins", "GRANT DELETE ON api_keys TO admins", "GRANT admins TO {}"],
            "DELETE FROM api_keys",
            "DELETE on api_keys (as admins)",
        ),
        (
            [
                "CREATE ROLE admins",
                "GRANT DELETE ON api_keys TO admins",
                "ALTER ROLE {} NOINHERIT",
                "GRANT admins TO {}",
            ],
            "SET LOCAL ROLE admins",
            "DELETE on api_keys (as admins)",
        ),
        (["ALTER SCHEMA public OWNER TO {}"], "DROP TABLE idempotency_keys", "owns the tables or their schema"),
        (["GRANT CREATE ON SCHEMA public TO {}"], "CREATE TABLE mine (id int)", "may create tables"),
        (["GRANT CREATE ON SCHEMA public TO PUBLIC"], "CREATE TABLE mine (id int)", "may create tables"),
        (["ALTER ROLE {} CREATEROLE"], "CREATE ROLE another", "has CREATEROLE"),
        (["ALTER ROLE {} REPLICATION"], "SELECT", "has REPLICATION"),
        (["CREATE ROLE boss SUPERUSER", "GRANT boss TO {}"], "SET LOCAL ROLE boss", "has SUPERUSER (as boss)"),
        (
            ["GRANT pg_execute_server_program TO {}"],
            "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",  # one that reads nothing breaks the pipe
            "rights on the server's files (as pg_execute_server_program)",
        ),
    ],
)
async def test_a_role_with_more_rights_by_other_ways_is_refused(
    owner: asyncpg.Connection, role: Role, given: list[str], allows: str, says: str
) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("INSERT INTO accounts OVERRIDING SYSTEM VALUE VALUES (1, 'first') ON CONFLICT DO NOTHING")
        for statement in given:
            await owner.execute(statement.replace("{}", f'"{role.name}"'))
        with pytest.raises(AdminError) as refused:
            await Admin(owner).grant_service(role.name)
        assert says in str(refused.value)
        await owner.execute(f'SET LOCAL SESSION AUTHORIZATION "{role.name}"')
        await owner.execute(allows)  # otherwise the right is none, and the refusal without a reason
    finally:
        await transaction.rollback()


async def test_a_refused_role_gets_nothing_and_another_may_use_the_schema(owner: asyncpg.Connection) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC; CREATE ROLE modest; CREATE ROLE mighty")
        await owner.execute("GRANT pg_write_all_data TO mighty")
        with pytest.raises(AdminError):
            await Admin(owner).grant_service("mighty")
        assert not await owner.fetchval("SELECT has_column_privilege('mighty', 'accounts', 'id', 'SELECT')")
        await Admin(owner).grant_service("modest")
        await owner.execute("SET LOCAL SESSION AUTHORIZATION modest")
        await owner.execute("SELECT id FROM accounts")
    finally:
        await transaction.rollback()


async def test_a_membership_that_gives_no_right_is_no_reason_to_refuse(owner: asyncpg.Connection, role: Role) -> None:
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute("CREATE ROLE people")
        await owner.execute(f'GRANT people, pg_monitor TO "{role.name}"')
        await Admin(owner).grant_service(role.name)
    finally:
        await transaction.rollback()


# --- the broker ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def broker_user(servers: Servers) -> AsyncIterator[str]:
    """Create a user who may only write to sms.least, by the command of docs/security.md; yield its URL."""
    if servers.rabbitmq is None:
        pytest.skip("makes and removes a broker user: needs a RabbitMQ of its own")
    user = f"service-{uuid.uuid4().hex[:8]}"
    servers.rabbitmq.ctl("add_user", user, "s3cret")
    servers.rabbitmq.ctl("set_permissions", "--vhost", "/", user, "", r"^sms\.least(\.dead)?$", "")
    yield str(URL(servers.amqp_url).with_user(user).with_password("s3cret"))
    servers.rabbitmq.ctl("delete_user", user)


async def test_the_user_publishes_to_its_exchange_and_may_do_nothing_else(
    servers: Servers,
    broker_user: str,
    make_settings: MakeSettings,
    start_gateway: StartGateway,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = {"amqp_exchange": "sms.least", "amqp_queue": "sms.least"}
    restricted = make_settings(**names, amqp_url=broker_user, amqp_topology="check")
    gateway = await start_gateway(restricted, wait_until_ready=False)
    await eventually(lambda: "no exchange 'sms.least'" in caplog.text)  # and `declare`, below, is what to do
    await declare_topology(make_settings(**names))
    await eventually(gateway.runtime.publisher.connections.is_usable)
    async with open_admin(servers.database_url) as admin:
        gateway.caller = await make_caller(admin)
    async with OutboundQueue(servers.amqp_url, "sms.least") as queue:
        assert (await gateway.send([gateway.message()] * 3))[1]["queued_count"] == 3
        assert len(await queue.take_payloads()) == 3
        await eventually(lambda: all(depth.is_known() for depth in gateway.runtime.depths.all))
        assert [node.problem for node in (await status.collect(restricted, [], [])).nodes] == [""]
        declares = make_settings(**names, amqp_url=broker_user)
        (problem,) = [node.problem for node in (await status.collect(declares, [], [])).nodes]
        assert "ACCESS_REFUSED" in problem
        assert "set GATEWAY_AMQP_TOPOLOGY=check, or give it the right" in problem

        connection = await aio_pika.connect(broker_user)
        async with connection:

            async def refused(attempt: Callable[[AbstractChannel], Awaitable[object]]) -> bool:
                channel = await connection.channel()
                with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
                    await attempt(channel)
                return True

            message = aio_pika.Message(b"elsewhere")
            assert await refused(lambda channel: channel.default_exchange.publish(message, "sms.least"))
            assert await refused(lambda channel: channel.default_exchange.publish(message, "sms.least.dead"))
            assert await refused(lambda channel: publish_to(channel, "amq.direct", message))
            assert await refused(lambda channel: publish_to(channel, "sms.least.dlx", message))
            assert await refused(lambda channel: get_from(channel, "sms.least"))
            assert await refused(lambda channel: get_from(channel, "sms.least.dead"))
            assert await refused(lambda channel: channel.declare_queue("mine"))
            assert await refused(lambda channel: channel.queue_delete("sms.least"))
            assert await refused(lambda channel: channel.declare_exchange("mine"))
            assert await refused(lambda channel: channel.exchange_delete("sms.least"))
        await queue.delete()


async def publish_to(channel: AbstractChannel, exchange: str, message: aio_pika.Message) -> None:
    await (await channel.get_exchange(exchange, ensure=False)).publish(message, "sms.least")


async def get_from(channel: AbstractChannel, queue: str) -> None:
    await (await channel.get_queue(queue, ensure=False)).get()


async def test_a_user_who_may_not_declare_gets_an_error_that_says_what_to_do(
    broker_user: str, make_settings: MakeSettings
) -> None:
    with pytest.raises(OSError, match="set GATEWAY_AMQP_TOPOLOGY=check, or give it the right"):
        await declare_topology(make_settings(amqp_url=broker_user, amqp_exchange="other.least"))
