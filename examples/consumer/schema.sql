-- The consumer applies this file when there is no table `deliveries`; or apply it with your own migrations.

-- Ids that were handed on. The primary key drops repeats.
CREATE TABLE inbox (
    id         text COLLATE "C" PRIMARY KEY,
    expires_at timestamptz NOT NULL
);

CREATE INDEX inbox_expires_at ON inbox (expires_at);

-- Deliveries. The id is deliberately not unique: the inbox drops repeats, and this table can prove it.
CREATE TABLE deliveries (
    number       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id           text NOT NULL,
    list_number  text NOT NULL,
    recipient    text NOT NULL,
    body         bytea NOT NULL, -- UTF-8; a text column refuses U+0000, which an SMS may contain
    delivered_at timestamptz NOT NULL DEFAULT now()
);
