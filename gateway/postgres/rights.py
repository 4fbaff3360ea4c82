"""The rights of the database role of `serve`, and the check that names the missing ones."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Exactly the rights to serve, for a separate database role. This role can neither create a key nor read its prefix.
# Rights with columns name each column, so that the check finds a role that has only some of them.
SERVICE_RIGHTS = {
    "accounts": "SELECT (id, status)",
    "api_keys": (
        "SELECT (sha256, account_id, revoked_at, expires_at, last_used_on, lifetime, replaced_by), "
        "UPDATE (last_used_on)"
    ),
    "sending_lists": "SELECT (id, account_id, number, status)",
    "idempotency_keys": (
        "SELECT (account_id, key, body_sha256, first_id, holder, held_until, answer, not_found, created_at), "
        "INSERT (account_id, key, body_sha256, first_id, holder, held_until, not_found), "
        "UPDATE (holder, held_until, answer, not_found), DELETE"
    ),
    "SEQUENCE message_id_leases": "USAGE",  # nextval; setval would need UPDATE
    "schema_migrations": "SELECT (version)",  # for `status`
}
# Without USAGE on a schema, PostgreSQL says that its tables do not exist. Only schemas in the search path count: others
# may belong to another gateway.
FIND_HIDDEN_SCHEMA = """
    SELECT quote_ident(nspname)
    FROM pg_class AS rel JOIN pg_namespace AS nsp ON nsp.oid = relnamespace
    WHERE relname = 'message_id_leases' AND relkind = 'S' AND to_regclass('message_id_leases') IS NULL
        AND NOT has_schema_privilege(nsp.oid, 'USAGE')
        AND nspname IN (
            SELECT CASE WHEN name = '$user' THEN current_user ELSE name END
            FROM regexp_matches(current_setting('search_path'), '"((?:[^"]|"")*)"|([^",[:space:]]+)', 'g') AS part,
                 coalesce(replace(part[1], '""', '"'), lower(part[2])) AS name
        )
"""
# UPDATE on a sequence includes nextval: a role with pg_write_all_data has it.
FIND_MISSING = """
    SELECT target, action, column_name
    FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (target, action, column_name)
    WHERE NOT CASE
        WHEN target LIKE 'SEQUENCE %' THEN has_sequence_privilege(substr(target, 10), action || ', UPDATE')
        WHEN column_name <> '' THEN has_column_privilege(target, column_name, action)
        ELSE has_table_privilege(target, action)
    END
"""
# Where row-level security is active for the role, rows are seen or changed only by a permissive policy for it. Without
# one, a SELECT returns no row: every key is unknown. What the condition of a policy hides is not checked. 0 is PUBLIC.
FIND_WITHOUT_POLICY = """
    SELECT target, string_agg(action, ', ' ORDER BY place) AS actions
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (target, action, place)
    WHERE row_security_active(target) AND NOT EXISTS (
        SELECT FROM pg_policy
        WHERE polrelid = target::regclass AND polpermissive
            AND polcmd IN (
                '*', CASE action WHEN 'SELECT' THEN 'r' WHEN 'INSERT' THEN 'a' WHEN 'UPDATE' THEN 'w' ELSE 'd' END
            )
            AND EXISTS (SELECT FROM unnest(polroles) AS holder WHERE holder = 0 OR pg_has_role(holder, 'USAGE'))
    )
    GROUP BY target ORDER BY min(place)
"""
FIND_SELF = """
    SELECT quote_ident(current_user) AS role,
           pg_has_role(relowner, 'MEMBER') OR pg_has_role(nspowner, 'MEMBER') AS is_owner
    FROM pg_class AS rel JOIN pg_namespace AS nsp ON nsp.oid = relnamespace
    WHERE relname = 'message_id_leases' AND relkind = 'S'
    ORDER BY pg_table_is_visible(rel.oid) DESC LIMIT 1
"""
_rights_in = re.compile(r"([A-Z]+)(?: \(([^)]*)\))?").findall


class Right(NamedTuple):
    """One right, as GRANT names its parts."""

    target: str
    action: str
    column: str  # "": the whole target


ALL_RIGHTS = [
    Right(target, action, column.strip())
    for target, rights in SERVICE_RIGHTS.items()
    for action, columns in _rights_in(rights)
    for column in columns.split(",")
]
# No request needs the other rights. `status` reads schema_migrations, and ingest/key_watch.py these columns.
_KEY_WATCH_COLUMNS = ("last_used_on", "lifetime", "replaced_by")
RIGHTS_OF_REQUESTS = [
    right for right in ALL_RIGHTS if right.target != "schema_migrations" and right.column not in _KEY_WATCH_COLUMNS
]


class MissingRights(Exception):
    """The database role lacks rights. The text names them, and says what to run."""


async def check_rights(connection: Any, rights: Sequence[Right]) -> None:
    """Raise MissingRights unless the role of this connection has these rights, and may use them on rows.

    Raises UndefinedTableError or UndefinedColumnError if the database is not migrated.
    """
    without_policy = []
    schema = await connection.fetchval(FIND_HIDDEN_SCHEMA)
    if schema is not None:
        missing = [f"USAGE ON SCHEMA {schema}"]
    else:
        missing = _join(await connection.fetch(FIND_MISSING, *_arrays(rights)))
        on_tables = dict.fromkeys((right.target, right.action) for right in rights if " " not in right.target)
        without_policy = await connection.fetch(FIND_WITHOUT_POLICY, *_arrays(on_tables))
    if missing or without_policy:
        role, is_owner = await connection.fetchrow(FIND_SELF)
        problems = [_lacks(role, missing, is_owner=is_owner)] if missing else []
        problems += [_has_no_policy(role, without_policy)] if without_policy else []
        raise MissingRights("; ".join(problems))


def _arrays(rows: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """Return one array for each column."""
    return [list(column) for column in zip(*rows, strict=True)]


def _lacks(role: str, missing: Sequence[str], *, is_owner: bool) -> str:
    command = f"python -m gateway migrate --grant-to {role}"
    if is_owner:  # `--grant-to` refuses an owner: rights would not limit it
        command = "; ".join(f"GRANT {right} TO {role}" for right in missing)
    return f"the role {role} lacks {', '.join(missing)}: as the owner of the tables, run `{command}`"


def _has_no_policy(role: str, without_policy: Sequence[tuple[str, str]]) -> str:
    named = ", ".join(f"{table} ({actions})" for table, actions in without_policy)
    # One for each action: policies are joined by OR, so one for all would open what a policy of the operator hides.
    command = "; ".join(
        f"CREATE POLICY {_policy_name(role, action)} ON {table} FOR {action} TO {role} "
        f"{'WITH CHECK' if action == 'INSERT' else 'USING'} (true)"
        for table, actions in without_policy
        for action in actions.split(", ")
    )
    return (
        f"row-level security has no policy for the role {role} on {named}: as the owner of the tables, run `{command}`"
    )


def _policy_name(role: str, action: str) -> str:
    """Return an SQL name for a policy, from the role's SQL name."""
    return f'{role[:-1]}_{action.lower()}"' if role.endswith('"') else f"{role}_{action.lower()}"


def _join(missing: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return one text for each target and action, such as "SELECT (id, status) ON accounts"."""
    columns: dict[tuple[str, str], list[str]] = {}
    for target, action, column in missing:
        columns.setdefault((target, action), []).append(column)
    return [
        f"{action} ON {target}" if names == [""] else f"{action} ({', '.join(names)}) ON {target}"
        for (target, action), names in columns.items()
    ]
