-- One row for each batch that came with an Idempotency-Key: who runs it, with which message ids, and its answer.
--
-- Rows live for a day (gateway/idempotency.py sweeps them). The answer of a good batch is a few dozen octets.

-- migrate:up

CREATE TABLE idempotency_keys (
    account_id  bigint NOT NULL REFERENCES accounts (id),
    key         text NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 255),
    body_sha256 bytea NOT NULL CHECK (octet_length(body_sha256) = 32),
    -- The place of the batch's first message id (gateway/message_ids.py); the others follow it.
    first_id    bigint NOT NULL,
    -- The run that may settle the row, and until when no other may take it. On the database's clock alone.
    holder      bigint NOT NULL,
    held_until  timestamptz NOT NULL,
    answer      bytea,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, key)
);

CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);

-- migrate:down

DROP TABLE idempotency_keys;
