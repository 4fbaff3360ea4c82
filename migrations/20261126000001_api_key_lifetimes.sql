-- A name, an end and the last day of use for each API key.
--
-- The columns have constant defaults, so PostgreSQL adds them without rewriting the table. An earlier version of the
-- gateway does not read them: it accepts a key beyond its end. So let no key expire before all processes are upgraded.

-- migrate:up

ALTER TABLE api_keys
    ADD COLUMN name text NOT NULL DEFAULT '',
    ADD COLUMN expires_at timestamptz,
    ADD COLUMN last_used_on date;

-- For the count of the keys about to expire.
CREATE INDEX api_keys_expires_at ON api_keys (expires_at) WHERE revoked_at IS NULL;

-- migrate:down

DROP INDEX api_keys_expires_at;
ALTER TABLE api_keys
    DROP COLUMN name,
    DROP COLUMN expires_at,
    DROP COLUMN last_used_on;
