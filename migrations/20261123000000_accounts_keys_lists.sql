-- Who may send, and from which lists; and the sequence that message ids are leased from.
--
-- The gateway reads these tables on every request, without a cache: both of its questions are answered from the
-- unique indexes below, in about 0.1 ms.

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
    -- Only the digest is stored: a copy of this table lets nobody send. A key has 190 random bits, so a plain SHA-256
    -- cannot be searched, and a slow hash would only let callers without a key burn our CPU.
    sha256     bytea NOT NULL UNIQUE CHECK (octet_length(sha256) = 32),
    -- The first characters, so that people can tell their keys apart.
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
    -- Led by the account: the question is always "which of these numbers are this account's".
    UNIQUE (account_id, number)
);

-- A number sends for one account at a time.
CREATE UNIQUE INDEX sending_lists_active_number ON sending_lists (number) WHERE status = 'active';

-- Each value is a lease of 256 rows of 62² message ids (gateway/message_ids.py); 62⁶ / 256 leases in all. It must
-- never run backwards: a value handed out twice would be a million message ids handed out twice.
CREATE SEQUENCE message_id_leases AS bigint MINVALUE 0 START 0 MAXVALUE 221875919 NO CYCLE;

-- migrate:down

DROP SEQUENCE message_id_leases;
DROP TABLE sending_lists;
DROP TABLE api_keys;
DROP TABLE accounts;
