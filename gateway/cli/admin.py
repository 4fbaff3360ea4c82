"""Administration of accounts, keys and lists, for the command line: one method per task, SQL as named constants.

It runs on one connection, and shares no SQL with requests (postgres/queries.py).
"""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import asyncpg

from gateway.ingest.auth import hash_key
from gateway.postgres.pool import DATABASE_ERRORS, connect_to_primary, reason
from gateway.postgres.rights import ALL_RIGHTS, SERVICE_RIGHTS
from gateway.telemetry.log import KEY_ALPHABET, KEY_CHARACTERS, KEY_PREFIX, KEY_SHOWN

CREATE_ACCOUNT = "INSERT INTO accounts (name) VALUES ($1) RETURNING id, name, status"
FIND_ACCOUNT = "SELECT id FROM accounts WHERE id = $1"
SET_ACCOUNT_STATUS = "UPDATE accounts SET status = $2 WHERE id = $1 RETURNING id, name, status"
LIST_ACCOUNTS = """
    SELECT account.id, name, account.status, created_at,
           (SELECT count(*) FROM api_keys WHERE account_id = account.id AND revoked_at IS NULL
                AND (expires_at IS NULL OR expires_at > now())) AS keys,
           (SELECT count(*) FROM sending_lists AS list WHERE account_id = account.id AND list.status = 'active')
               AS lists
    FROM accounts AS account
    ORDER BY id
"""

CREATE_KEY = """
    INSERT INTO api_keys (account_id, sha256, prefix, name, lifetime, expires_at)
    VALUES ($1, $2, $3, $4, $5, now() + $5::interval)
    RETURNING id, account_id, name, prefix, expires_at
"""
# The successor has the name and the lifetime of the key that it replaces, even if an earlier rotation has changed the
# end of that key. A key with a successor is not replaced again: a successor that was lost would stay valid unnoticed.
ROTATE_KEY = """
    WITH successor AS (SELECT nextval(pg_get_serial_sequence('api_keys', 'id')) AS id), old AS (
        UPDATE api_keys SET expires_at = least(expires_at, now() + $4::interval), replaced_by = successor.id
        FROM successor
        WHERE api_keys.id = $1 AND replaced_by IS NULL AND revoked_at IS NULL
            AND (expires_at IS NULL OR expires_at > now())
        RETURNING account_id, name, lifetime, expires_at AS ends_at, replaced_by
    )
    INSERT INTO api_keys (id, account_id, sha256, prefix, name, lifetime, expires_at)
    OVERRIDING SYSTEM VALUE
    SELECT replaced_by, account_id, $2, $3, name, lifetime, now() + lifetime FROM old
    RETURNING id, account_id, name, prefix, expires_at, $1 AS replaces, (SELECT ends_at FROM old) AS old_expires_at
"""
FIND_SUCCESSOR = """
    SELECT successor.id, successor.prefix, successor.last_used_on,
           coalesce(successor.expires_at <= now(), false) AS has_expired
    FROM api_keys AS old JOIN api_keys AS successor ON successor.id = old.replaced_by
    WHERE old.id = $1 AND old.revoked_at IS NULL AND (old.expires_at IS NULL OR old.expires_at > now())
"""
# A revoked key replaces no other: its predecessors get its own successor, or none.
REVOKE_KEY = """
    WITH replaced AS (
        UPDATE api_keys SET replaced_by = (SELECT replaced_by FROM api_keys WHERE id = $1) WHERE replaced_by = $1
    )
    UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1
    RETURNING id, account_id, prefix, revoked_at
"""
LIST_KEYS = """
    SELECT id, account_id, name, prefix, created_at, expires_at, replaced_by, last_used_on, revoked_at
    FROM api_keys WHERE account_id = $1 ORDER BY id
"""
LIST_EXPIRING_KEYS = """
    SELECT key.id, account_id, account.name AS account, key.name, prefix, expires_at, last_used_on
    FROM api_keys AS key JOIN accounts AS account ON account.id = account_id
    WHERE revoked_at IS NULL AND replaced_by IS NULL AND expires_at > now() AND expires_at < now() + $1::interval
    ORDER BY expires_at
"""

ADD_LIST = """
    INSERT INTO sending_lists (account_id, number) VALUES ($1, $2) RETURNING id, account_id, number, status
"""
SET_LIST_STATUS = "UPDATE sending_lists SET status = $2 WHERE id = $1 RETURNING id, account_id, number, status"
LIST_LISTS = "SELECT id, account_id, number, status, created_at FROM sending_lists WHERE account_id = $1 ORDER BY id"

FIND_ROLE = """
    SELECT quote_ident(rolname) AS role, quote_ident(nspname) AS schema,
           pg_has_role(role.oid, relowner, 'MEMBER') OR pg_has_role(role.oid, nspowner, 'MEMBER') AS is_owner,
           has_schema_privilege(role.oid, nsp.oid, 'CREATE') AS may_create,
           has_schema_privilege(role.oid, nsp.oid, 'USAGE') AS may_use,
           has_database_privilege(role.oid, current_database(), 'CONNECT') AS may_connect,
           quote_ident(current_database()) AS database,
           pg_has_role(current_user, relowner, 'USAGE') AS can_grant
    FROM pg_roles AS role, pg_class AS rel
    JOIN pg_namespace AS nsp ON nsp.oid = relnamespace
    WHERE rolname = $1 AND rel.oid = 'accounts'::regclass
"""
# A role has its own rights, those of PUBLIC, and those of each role of which it is a member, some only after SET ROLE.
FIND_POWERS = """
    SELECT rolname AS holder, power
    FROM pg_roles AS holder,
         unnest(ARRAY[
             CASE WHEN rolsuper THEN 'SUPERUSER' END,
             CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
             CASE WHEN rolreplication THEN 'REPLICATION' END,
             CASE WHEN rolname ~ '^pg_(execute_server_program|read_server_files|write_server_files)$'
                  THEN 'rights on the server''s files' END
         ]) AS power
    WHERE pg_has_role($1::name, holder.oid, 'MEMBER') AND power IS NOT NULL
    ORDER BY holder, power
"""
FIND_RIGHTS = """
    WITH holder AS (SELECT oid, rolname FROM pg_roles WHERE pg_has_role($1::name, oid, 'MEMBER')),
         rel AS (
             SELECT oid, relname, relkind FROM pg_class
             WHERE oid = ANY($2::text[]::regclass[]) OR relkind = 'S' AND oid IN (
                 SELECT objid FROM pg_depend
                 WHERE classid = 'pg_class'::regclass AND refobjid = ANY($2::text[]::regclass[])
             )
         )
    SELECT relname AS what, action, '' AS column_name, rolname AS holder
    FROM holder, rel,
         unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']
             || CASE WHEN current_setting('server_version_num')::int >= 170000 THEN '{MAINTAIN}'::text[] END) AS action
    WHERE relkind <> 'S' AND has_table_privilege(holder.oid, rel.oid, action)
    UNION ALL
    SELECT relname, action, attname, rolname
    FROM holder, rel JOIN pg_attribute ON attrelid = rel.oid AND attnum > 0 AND NOT attisdropped,
         unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS action
    WHERE relkind <> 'S' AND has_column_privilege(holder.oid, rel.oid, attnum, action)
    UNION ALL
    SELECT relname, action, '', rolname
    FROM holder, rel, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS action
    WHERE relkind = 'S' AND has_sequence_privilege(holder.oid, rel.oid, action)
"""

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 30.0

Row = dict[str, Any]


class AdminError(Exception):
    """The task cannot be done. The text gives the reason, and says what to do."""


class Admin:
    """Administration tasks on one connection. Each returns the rows that it created, changed or found.

    Raises AdminError when an account, key or list does not exist, or when a constraint forbids the change.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def create_account(self, name: str) -> Row:
        """Create an active account."""
        if not name.strip():
            raise AdminError("an account needs a name")
        return await self._one(CREATE_ACCOUNT, name)

    async def set_account_status(self, account_id: int, status: str) -> Row:
        """Set an account's status: "active" or "suspended"."""
        return await self._one(SET_ACCOUNT_STATUS, account_id, status, missing=f"there is no account {account_id}")

    async def list_accounts(self) -> list[Row]:
        """Return all accounts, with the numbers of their usable keys and active lists."""
        return await self._all(LIST_ACCOUNTS)

    async def create_key(self, account_id: int, name: str = "", lifetime: timedelta | None = None) -> Row:
        """Create an API key. Only this row holds the key itself, under "key"; the database stores its SHA-256.

        Without a lifetime the key does not expire.
        """
        key = _new_key()
        row = await self._one(CREATE_KEY, account_id, hash_key(key), key[:KEY_SHOWN], name, lifetime)
        return row | {"key": key}

    async def rotate_key(self, key_id: int, overlap: timedelta) -> Row:
        """Create a key like this one, and let this one expire after `overlap`, or earlier if it would anyway.

        Raises AdminError if this key is not usable or has a successor. The text says what to do.
        """
        key = _new_key()
        row = await self._connection.fetchrow(ROTATE_KEY, key_id, hash_key(key), key[:KEY_SHOWN], overlap)
        if row is None:
            raise AdminError(await self._why_not_rotated(key_id))
        return dict(row) | {"key": key}

    async def _why_not_rotated(self, key_id: int) -> str:
        successor = await self._connection.fetchrow(FIND_SUCCESSOR, key_id)
        if successor is None:
            return f"there is no usable key {key_id}: it does not exist, is revoked or has expired"
        new_id, prefix, day, has_expired = successor
        used = f"last used on {day}" if day else "not used yet"
        again = f"run `python -m gateway key revoke {new_id}`, then rotate key {key_id} again"
        if has_expired:
            return f"key {key_id} is replaced already, by key {new_id} ({prefix}…, {used}), which has expired: {again}"
        return (
            f"key {key_id} is replaced already, by key {new_id} ({prefix}…, {used}). To replace that one, rotate key "
            f"{new_id}. If it was lost, {again}"
        )

    async def list_expiring_keys(self, within: timedelta) -> list[Row]:
        """Return the usable keys of all accounts that expire within this time and have no successor, sorted by end."""
        return await self._all(LIST_EXPIRING_KEYS, within)

    async def revoke_key(self, key_id: int) -> Row:
        """Revoke a key. The time of an earlier revocation stays."""
        return await self._one(REVOKE_KEY, key_id, missing=f"there is no key {key_id}")

    async def list_keys(self, account_id: int) -> list[Row]:
        """Return an account's keys, revoked ones included, without the keys themselves."""
        return await self._all_of(account_id, LIST_KEYS)

    async def add_list(self, account_id: int, number: str) -> Row:
        """Create an active list for an E.164 number."""
        await self._one(FIND_ACCOUNT, account_id, missing=f"there is no account {account_id}")
        return await self._one(ADD_LIST, account_id, number)

    async def set_list_status(self, list_id: int, status: str) -> Row:
        """Set a list's status: "active" or "inactive"."""
        return await self._one(SET_LIST_STATUS, list_id, status, missing=f"there is no list {list_id}")

    async def list_lists(self, account_id: int) -> list[Row]:
        """Return an account's lists, inactive ones included."""
        return await self._all_of(account_id, LIST_LISTS)

    async def grant_service(self, role: str) -> list[Row]:
        """Give an existing database role SERVICE_RIGHTS, and revoke its other rights on our tables, in one transaction.

        Raises AdminError when this connection may not grant them, or when the role would have more rights than these.
        """
        found = await self._connection.fetchrow(FIND_ROLE, role)
        if found is None:
            raise AdminError(f"there is no database role {role}: CREATE ROLE {role} LOGIN PASSWORD '...' creates it")
        if not found["can_grant"]:
            raise AdminError(f"only the owner of the tables can grant {role} its rights: run migrate as the owner")
        if found["is_owner"]:  # a superuser is a member of every role
            raise AdminError(
                f"{role} owns the tables or their schema, or is a member of a role that does, so rights would not "
                "limit it. Choose another role"
            )
        schema = found["schema"]
        if found["may_create"]:
            raise AdminError(f"{role} may create tables: REVOKE CREATE ON SCHEMA {schema} FROM {found['role']}, PUBLIC")
        if not found["may_connect"]:  # the owner of the tables need not own the database
            raise AdminError(
                f"{role} may not connect: GRANT CONNECT ON DATABASE {found['database']} TO {found['role']}, as the "
                "owner of the database"
            )
        statements = [
            *(f"REVOKE ALL ON {target} FROM {found['role']}" for target in SERVICE_RIGHTS),
            *(f"GRANT {rights} ON {target} TO {found['role']}" for target, rights in SERVICE_RIGHTS.items()),
        ]
        if not found["may_use"]:
            statements.append(f"GRANT USAGE ON SCHEMA {schema} TO {found['role']}")
        async with self._connection.transaction():
            for statement in statements:
                await self._connection.execute(statement)
            await self._refuse_more_rights(role)
        return [{"role": role, "on": target.split()[-1], "may": rights} for target, rights in SERVICE_RIGHTS.items()]

    async def _refuse_more_rights(self, role: str) -> None:
        """Raise AdminError if the role has rights beyond SERVICE_RIGHTS: by a membership, PUBLIC or an attribute."""
        if powers := await self._all(FIND_POWERS, role):
            named = ", ".join(f"{row['power']}{_via(row['holder'], role)}" for row in powers)
            raise AdminError(f"{role} has {named}: rights on tables would not limit it. Choose another role")
        granted = {(right.target.split()[-1], right.action, right.column) for right in ALL_RIGHTS}
        beyond = sorted(
            {
                f"{row['action']} on {row['what']}{_via(row['holder'], role)}"
                for row in await self._all(FIND_RIGHTS, role, [target.split()[-1] for target in SERVICE_RIGHTS])
                if not {(row["what"], row["action"], name) for name in ("", row["column_name"])} & granted
            }
        )
        if beyond:
            raise AdminError(
                f"{role} has more rights than it needs to serve, by grants to PUBLIC or by a membership: "
                f"{', '.join(beyond)}. Revoke them, or choose another role"
            )

    async def _one(self, sql: str, *arguments: object, missing: str = "") -> Row:
        try:
            row = await self._connection.fetchrow(sql, *arguments)
        except asyncpg.ForeignKeyViolationError:
            raise AdminError(f"there is no account {arguments[0]}") from None
        except asyncpg.UniqueViolationError:
            raise AdminError(
                "that number is a list already, of this account, or an active list of another account"
            ) from None
        except asyncpg.CheckViolationError:
            raise AdminError("that is not an E.164 number such as +18005551000") from None
        if row is None:
            raise AdminError(missing)
        return dict(row)

    async def _all_of(self, account_id: int, sql: str) -> list[Row]:
        if rows := await self._all(sql, account_id):
            return rows
        await self._one(FIND_ACCOUNT, account_id, missing=f"there is no account {account_id}")
        return []

    async def _all(self, sql: str, *arguments: object) -> list[Row]:
        return [dict(row) for row in await self._connection.fetch(sql, *arguments)]


def _new_key() -> str:
    return KEY_PREFIX + "".join(secrets.choice(KEY_ALPHABET) for _ in range(KEY_CHARACTERS))


def _via(holder: str, role: str) -> str:
    return "" if holder == role else f" (as {holder})"


def unreachable(error: BaseException) -> AdminError:
    """Return the AdminError for a failed connection to the database."""
    return AdminError(f"cannot reach the database of GATEWAY_DATABASE_URL: {reason(error)}")


def _refused(error: BaseException) -> AdminError:
    """Return the AdminError for a statement that the database refused or did not answer."""
    match error:
        case asyncpg.UndefinedTableError():
            return AdminError("the database has no tables yet: run `python -m gateway migrate`")
        case asyncpg.UndefinedColumnError():
            return AdminError("the tables are those of an older version: run `python -m gateway migrate`")
        case asyncpg.InsufficientPrivilegeError():
            return AdminError(
                f"the user of GATEWAY_DATABASE_URL may not do this ({error.args[0]}). Use the owner of the tables"
            )
        case asyncpg.ReadOnlySQLTransactionError():
            return AdminError(
                f"the database of GATEWAY_DATABASE_URL is read-only ({error.args[0]}). Name the primary, with a user "
                "and a database that may write"
            )
        case _:
            return AdminError(f"the database of GATEWAY_DATABASE_URL failed: {reason(error)}")


@asynccontextmanager
async def open_admin(database_url: str, **options: Any) -> AsyncIterator[Admin]:
    """Connect to the primary, with `options` of asyncpg.connect. Every failure of the database is an AdminError."""
    try:
        connection = await connect_to_primary(
            database_url, timeout=CONNECT_TIMEOUT_S, command_timeout=COMMAND_TIMEOUT_S, **options
        )
    except DATABASE_ERRORS as error:
        raise unreachable(error) from None
    try:
        yield Admin(connection)
    except DATABASE_ERRORS as error:
        raise _refused(error) from None
    finally:
        with suppress(*DATABASE_ERRORS):
            await connection.close(timeout=CONNECT_TIMEOUT_S)
