-- Accounts, API keys, sending lists, and the sequence of message id leases.
--
-- The gateway reads these tables on every request, without a cache. Both queries use the unique indexes below, and take
-- about 0.1 ms.

-- migrate:up

CREATE TABLE accounts (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL CHECK (name <> ''),
    status     text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id bigint NOT NULL REFERENCES accounts (id),
    -- Only the digest is stored: nobody can send with a copy of this table. A key has 190 random bits, so SHA-256 cannot
    -- be searched. A slow hash would only let callers without a key use CPU time.
    sha256     bytea NOT NULL UNIQUE CHECK (octet_length(sha256) = 32),
    -- The first characters of the key, by which people recognise it.
    prefix     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

CREATE INDEX api_keys_account_id ON api_keys (account_id);

CREATE TABLE sending_lists (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id bigint NOT NULL REFERENCES accounts (id),
    number     text NOT NULL CHECK (number ~ '^\+[1-9][0-9]{1,14}$'),
    status     text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive')),
    created_at timestamptz NOT NULL DEFAULT now(),
    -- The account comes first: queries look up numbers within an account.
    UNIQUE (account_id, number)
);

-- A number is active for one account at a time.
CREATE UNIQUE INDEX sending_lists_active_number ON sending_lists (number) WHERE status = 'active';

-- Each value is one of 62⁶ / 256 leases, of 256 rows of 62² message ids each (gateway/ingest/message_ids.py). The
-- sequence must never go back: a value used twice would be a million message ids used twice.
CREATE SEQUENCE message_id_leases AS bigint MINVALUE 0 START 0 MAXVALUE 221875919 NO CYCLE;

-- migrate:down

DROP SEQUENCE message_id_leases;
DROP TABLE sending_lists;
DROP TABLE api_keys;
DROP TABLE accounts;
