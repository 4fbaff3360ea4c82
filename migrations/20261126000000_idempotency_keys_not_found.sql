-- The lists that no run of a batch has found, with its Idempotency-Key.
--
-- The column has a constant default, so PostgreSQL adds it without rewriting the table. An earlier version of the
-- gateway leaves it empty: a later run then reports every list that it does not find as unknown, never as not found.

-- migrate:up

-- A list number that is not here may have been used by an earlier run, and its messages may be queued.
ALTER TABLE idempotency_keys ADD COLUMN not_found text[] NOT NULL DEFAULT '{}';

-- migrate:down

ALTER TABLE idempotency_keys DROP COLUMN not_found;
