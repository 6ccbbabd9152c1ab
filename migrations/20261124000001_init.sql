-- Registry accounts, clusters and API keys. Secret values are stored sealed (src/crypto/sealer.rs): the
-- ciphertext in one column, the id of the master key that sealed it in the column beside it.

CREATE TABLE registry_accounts (
    id uuid NOT NULL,
    name text NOT NULL,
    registry text NOT NULL,
    username text NOT NULL,
    password bytea NOT NULL,
    password_key_id text NOT NULL,
    email text,
    labels jsonb NOT NULL DEFAULT '{}',
    plain_http boolean NOT NULL DEFAULT false,
    expires_at timestamptz,
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT registry_accounts_pkey PRIMARY KEY (id),
    CONSTRAINT registry_accounts_name_key UNIQUE (name),
    CONSTRAINT registry_accounts_labels_check CHECK (jsonb_typeof(labels) = 'object')
);
-- Selection by label (`labels @> …`).
CREATE INDEX registry_accounts_labels_idx ON registry_accounts USING gin (labels jsonb_path_ops);
-- `master-key rotate` and `list` look for rows of one key.
CREATE INDEX registry_accounts_password_key_id_idx ON registry_accounts (password_key_id);

CREATE TABLE clusters (
    id uuid NOT NULL,
    name text NOT NULL,
    -- Null exactly for auth_type inCluster.
    server text,
    ca_certificate text,
    tls_server_name text,
    auth_type text NOT NULL,
    client_certificate text,
    credential bytea,
    credential_key_id text,
    allow_plain_http boolean NOT NULL DEFAULT false,
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT clusters_pkey PRIMARY KEY (id),
    CONSTRAINT clusters_name_key UNIQUE (name),
    CONSTRAINT clusters_auth_type_check CHECK (auth_type IN ('token', 'clientCertificate', 'inCluster', 'none')),
    CONSTRAINT clusters_server_check CHECK ((server IS NULL) = (auth_type = 'inCluster')),
    CONSTRAINT clusters_credential_check CHECK (
        (credential IS NULL) = (auth_type IN ('inCluster', 'none'))
        AND (credential IS NULL) = (credential_key_id IS NULL)
    )
);
CREATE INDEX clusters_credential_key_id_idx ON clusters (credential_key_id);

CREATE TABLE api_keys (
    id uuid NOT NULL,
    name text NOT NULL,
    role text NOT NULL,
    -- HMAC-SHA-256 of the key under a pepper that is not in the database.
    mac bytea NOT NULL,
    -- PHC string of argon2id.
    hash text NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT api_keys_pkey PRIMARY KEY (id)
);
-- A revoked key frees its name.
CREATE UNIQUE INDEX api_keys_name_key ON api_keys (name) WHERE revoked_at IS NULL;
