-- The successor of each API key: the key that a rotation created in its place.
--
-- A key with a successor ends by design, so it does not count among the keys about to expire. The column is null for
-- all existing rows, so PostgreSQL adds it without rewriting the table. An earlier version of the gateway does not read
-- it.

-- migrate:up

-- Null: no successor, or the last one was revoked.
ALTER TABLE api_keys ADD COLUMN replaced_by bigint REFERENCES api_keys (id);

-- migrate:down

ALTER TABLE api_keys DROP COLUMN replaced_by;
