-- The lifetime of each API key, which its successor gets.
--
-- A rotation changes the end of the old key. Computed from that end, the successor of a second rotation would live only
-- as long as the overlap.

-- migrate:up

-- Null: without end.
ALTER TABLE api_keys ADD COLUMN lifetime interval;
UPDATE api_keys SET lifetime = expires_at - created_at WHERE expires_at IS NOT NULL;

-- migrate:down

ALTER TABLE api_keys DROP COLUMN lifetime;
