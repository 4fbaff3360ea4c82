-- One row per batch with an Idempotency-Key: the run that holds it, its message ids, and its answer.
--
-- gateway/ingest/idempotency.py deletes rows after a day. The answer of a valid batch has a few dozen bytes.

-- migrate:up

CREATE TABLE idempotency_keys (
    account_id  bigint NOT NULL REFERENCES accounts (id),
    key         text NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 255),
    body_sha256 bytea NOT NULL CHECK (octet_length(body_sha256) = 32),
    -- The position of the batch's first message id (gateway/ingest/message_ids.py). The other ids follow it.
    first_id    bigint NOT NULL,
    -- The run that holds the row, and the end of its hold by the database's clock. Another run may take the row after it.
    holder      bigint NOT NULL,
    held_until  timestamptz NOT NULL,
    answer      bytea,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, key)
);

CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);

-- migrate:down

DROP TABLE idempotency_keys;
