-- The key that a rotation created in place of an API key.
--
-- Such a key ends by design: it is not counted among the keys about to expire. The column is null for all existing
-- rows, so PostgreSQL adds it without rewriting the table. An earlier version of the gateway does not read it.

-- migrate:up

-- Null: no usable key replaces this one.
ALTER TABLE api_keys ADD COLUMN replaced_by bigint REFERENCES api_keys (id);

-- migrate:down

ALTER TABLE api_keys DROP COLUMN replaced_by;
