-- Sessions of the web console. A session acts for the API key that it was created with, and ends with it.
--
-- The previous binary does not know the table: it refuses the cookie.

CREATE TABLE sessions (
    id uuid NOT NULL,
    api_key_id uuid NOT NULL,
    -- HMAC over the ids above and the secret in the cookie, under a key outside the database: a writer of the database
    -- cannot make a session.
    mac bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Time of the last request, up to a minute late.
    last_used_at timestamptz NOT NULL DEFAULT now(),
    -- Address that the session was created from.
    source_ip text COLLATE "C",
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_api_key_id_fkey FOREIGN KEY (api_key_id) REFERENCES api_keys (id) ON DELETE CASCADE
);
-- Lists the sessions of a key.
CREATE INDEX sessions_api_key_id_idx ON sessions (api_key_id, created_at);
-- Finds ended sessions.
CREATE INDEX sessions_created_at_idx ON sessions (created_at);
