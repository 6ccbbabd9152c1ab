-- Signing in to the web console through an identity provider.
--
-- The previous binary ignores the columns of providers. It does not find sessions of people, and refuses their cookies:
-- it reads a session together with its API key.

ALTER TABLE identity_providers
    -- Client that regcred is at the provider; NULL if people do not sign in through it.
    ADD COLUMN login_client_id text COLLATE "C",
    -- Secret of the client, sealed. Always bound to issuer, CA and client: no older release opens it.
    ADD COLUMN login_secret bytea,
    ADD COLUMN login_secret_key_id text,
    ADD CONSTRAINT identity_providers_login_check CHECK (
        (login_client_id IS NULL) = (login_secret IS NULL) AND (login_secret IS NULL) = (login_secret_key_id IS NULL)
        AND (login_client_id IS NULL OR type = 'oidc')
    );

-- A session belongs to an API key, or to a subject of an identity provider.
ALTER TABLE sessions
    ALTER COLUMN api_key_id DROP NOT NULL,
    ADD COLUMN identity_provider_id uuid,
    ADD COLUMN subject text COLLATE "C",
    -- JSON of the verified claims. Text, because the HMAC is over its bytes: a writer of the database cannot change it.
    -- The rules of the provider are applied to it at each request.
    ADD COLUMN claims text COLLATE "C",
    ADD CONSTRAINT sessions_identity_provider_id_fkey
        FOREIGN KEY (identity_provider_id) REFERENCES identity_providers (id) ON DELETE CASCADE,
    ADD CONSTRAINT sessions_owner_check CHECK (
        (api_key_id IS NULL) <> (identity_provider_id IS NULL)
        AND (identity_provider_id IS NULL) = (subject IS NULL) AND (subject IS NULL) = (claims IS NULL)
        AND octet_length(claims) <= 16384
    );
-- Lists the sessions of a subject.
CREATE INDEX sessions_subject_idx ON sessions (identity_provider_id, subject, created_at)
    WHERE identity_provider_id IS NOT NULL;
