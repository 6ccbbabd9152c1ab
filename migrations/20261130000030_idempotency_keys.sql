-- Keys of the header `Idempotency-Key`. A row commits with the change that it names, and is kept for 24 hours.
--
-- The previous binary does not know the table: it ignores the header.

CREATE TABLE idempotency_keys (
    -- The caller: its kind, and the id of its API key or the name of the token's provider and subject.
    principal text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    -- HMAC over the columns above and method, path, query and body, under a key outside the database. A plain hash
    -- would let a reader of the database test guessed passwords, which bodies contain.
    request_digest bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (principal, key)
);
-- Finds expired rows.
CREATE INDEX idempotency_keys_created_at_idx ON idempotency_keys (created_at);
