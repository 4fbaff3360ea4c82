-- Applied by the consumer when there is no `deliveries` table yet; or apply it with your own migrations.

-- Ids that were handed on. The primary key is what drops repeats.
CREATE TABLE inbox (
    id         text COLLATE "C" PRIMARY KEY,
    expires_at timestamptz NOT NULL
);

CREATE INDEX inbox_expires_at ON inbox (expires_at);

-- What was handed on. Not unique by id, on purpose: that nothing stands here twice is the inbox's work, and this
-- table can be asked whether it was done.
CREATE TABLE deliveries (
    number       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id           text NOT NULL,
    list_number  text NOT NULL,
    recipient    text NOT NULL,
    body         bytea NOT NULL, -- UTF-8; a text column refuses U+0000, which an SMS may contain
    delivered_at timestamptz NOT NULL DEFAULT now()
);
