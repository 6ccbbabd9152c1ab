-- Whose tokens are taken in place of API keys, and what they stand for.
--
-- It fits the binary before this one: that knows nothing of the table, and cannot delete a cluster that a provider uses.

CREATE TABLE identity_providers (
    id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    type text NOT NULL,
    -- Of type oidc: the `iss` of its tokens, letter by letter.
    issuer text,
    ca_certificate text,
    -- Of type tokenReview: the cluster that is asked.
    cluster_id uuid,
    -- The `aud` that a token must have.
    audience text NOT NULL,
    -- [{"claims": {"project_id": "42"}, "role": "deliverer", "grants": {…}}], in the order in which they are tried.
    rules jsonb NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT identity_providers_pkey PRIMARY KEY (id),
    CONSTRAINT identity_providers_name_key UNIQUE (name),
    CONSTRAINT identity_providers_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE RESTRICT,
    CONSTRAINT identity_providers_type_check CHECK (type IN ('oidc', 'tokenReview')),
    CONSTRAINT identity_providers_issuer_check CHECK ((issuer IS NULL) = (type <> 'oidc')),
    CONSTRAINT identity_providers_ca_certificate_check CHECK (ca_certificate IS NULL OR type = 'oidc'),
    CONSTRAINT identity_providers_cluster_id_check CHECK ((cluster_id IS NULL) = (type <> 'tokenReview')),
    CONSTRAINT identity_providers_audience_check CHECK (audience <> ''),
    CONSTRAINT identity_providers_rules_check CHECK (jsonb_typeof(rules) = 'array')
);
-- The door looks for them by what a token says of itself, and finds one provider for each audience: a token that is to be
-- reviewed goes to no cluster that it was not made for.
CREATE UNIQUE INDEX identity_providers_issuer_audience_key ON identity_providers (issuer, audience)
    WHERE type = 'oidc';
CREATE UNIQUE INDEX identity_providers_audience_key ON identity_providers (audience) WHERE type = 'tokenReview';
CREATE INDEX identity_providers_cluster_id_idx ON identity_providers (cluster_id) WHERE cluster_id IS NOT NULL;
