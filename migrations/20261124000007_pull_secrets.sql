-- Pull secrets: what is declared, and each (cluster, namespace) that it is declared for.
--
-- The binary before this one does not know these tables. Where an account or a cluster is used, it refuses to delete it,
-- as the foreign keys say; it does not raise generations, so what it changes of accounts arrives with the next
-- comparison.

CREATE TABLE pull_secrets (
    id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    -- The document of the API, as src/domain/pull_secret.rs reads it.
    declaration jsonb NOT NULL,
    -- Its `accountSelector`, for those who change labels of accounts; null where accounts are named.
    account_selector jsonb,
    -- Grows with every change of the declaration: what `ETag` says.
    version bigint NOT NULL DEFAULT 1,
    -- Grows with everything that the Secrets must follow: the declaration, and the accounts.
    generation bigint NOT NULL DEFAULT 1,
    -- It goes once its last target has gone.
    deleted_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pull_secrets_pkey PRIMARY KEY (id),
    CONSTRAINT pull_secrets_name_key UNIQUE (name),
    CONSTRAINT pull_secrets_declaration_check CHECK (jsonb_typeof(declaration) = 'object')
);
CREATE INDEX pull_secrets_account_selector_idx ON pull_secrets (id) WHERE account_selector IS NOT NULL;

-- The accounts that a declaration names.
CREATE TABLE pull_secret_accounts (
    pull_secret_id uuid NOT NULL,
    account_id uuid NOT NULL,
    CONSTRAINT pull_secret_accounts_pkey PRIMARY KEY (pull_secret_id, account_id),
    CONSTRAINT pull_secret_accounts_pull_secret_id_fkey FOREIGN KEY (pull_secret_id)
        REFERENCES pull_secrets (id) ON DELETE CASCADE,
    CONSTRAINT pull_secret_accounts_account_id_fkey FOREIGN KEY (account_id) REFERENCES registry_accounts (id)
);
CREATE INDEX pull_secret_accounts_account_id_idx ON pull_secret_accounts (account_id);

-- The clusters that a declaration names, and what became of its namespace selectors there.
CREATE TABLE pull_secret_clusters (
    pull_secret_id uuid NOT NULL,
    cluster_id uuid NOT NULL,
    -- It selects namespaces there by label.
    selects boolean NOT NULL,
    -- The version of the declaration that the cluster's namespaces were compared with last.
    compared_version bigint NOT NULL DEFAULT 0,
    CONSTRAINT pull_secret_clusters_pkey PRIMARY KEY (pull_secret_id, cluster_id),
    CONSTRAINT pull_secret_clusters_pull_secret_id_fkey FOREIGN KEY (pull_secret_id)
        REFERENCES pull_secrets (id) ON DELETE CASCADE,
    CONSTRAINT pull_secret_clusters_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id)
);
CREATE INDEX pull_secret_clusters_cluster_id_idx ON pull_secret_clusters (cluster_id);

CREATE TABLE pull_secret_targets (
    pull_secret_id uuid NOT NULL,
    cluster_id uuid NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    -- Whether the Secret shall be there; what is not wanted any more is removed, and then its row is.
    wanted boolean NOT NULL DEFAULT true,
    state text NOT NULL DEFAULT 'pending',
    -- What is wanted: raised together with that of the pull secret, in one transaction. It is here too so that whoever
    -- stores a result sees it in the row that he locks.
    generation bigint NOT NULL,
    applied_generation bigint NOT NULL DEFAULT 0,
    -- The version of the declaration that was applied.
    applied_version bigint NOT NULL DEFAULT 0,
    -- The Secret as it was written or found last.
    uid text,
    resource_version text,
    -- HMAC of what was written, under a key that is not in the database.
    content_mac bytea,
    -- The ServiceAccounts that regcred attached it to.
    attached text[] NOT NULL DEFAULT '{}',
    -- Tries since it was in order, or since something changed.
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    last_error_type text,
    last_error_detail text,
    last_synced_at timestamptz,
    -- Nobody else works on it until then; by the clock of the database.
    lease_until timestamptz,
    -- Grows with every claim. A result is stored under the token of its claim alone.
    lease_token bigint NOT NULL DEFAULT 0,
    -- When it became wanting, for the time from a change to its being in order.
    pending_since timestamptz DEFAULT now(),
    CONSTRAINT pull_secret_targets_pkey PRIMARY KEY (pull_secret_id, cluster_id, namespace),
    CONSTRAINT pull_secret_targets_pull_secret_id_fkey FOREIGN KEY (pull_secret_id) REFERENCES pull_secrets (id),
    CONSTRAINT pull_secret_targets_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id),
    CONSTRAINT pull_secret_targets_state_check CHECK (state IN ('pending', 'synced', 'failed', 'conflict'))
);
-- Finds what is due, cluster by cluster: a cluster that does not answer keeps no other one waiting.
CREATE INDEX pull_secret_targets_due_idx ON pull_secret_targets (cluster_id, next_attempt_at);
-- Finds what is not in order.
CREATE INDEX pull_secret_targets_state_idx ON pull_secret_targets (state) WHERE state <> 'synced';

-- When the namespaces of a cluster are compared with the selectors, and by whom.
CREATE TABLE cluster_comparisons (
    cluster_id uuid NOT NULL,
    next_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz,
    lease_token bigint NOT NULL DEFAULT 0,
    compared_at timestamptz,
    last_error_type text,
    last_error_detail text,
    CONSTRAINT cluster_comparisons_pkey PRIMARY KEY (cluster_id),
    CONSTRAINT cluster_comparisons_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE CASCADE
);

-- Which replica watches a cluster.
CREATE TABLE cluster_watches (
    cluster_id uuid NOT NULL,
    lease_until timestamptz NOT NULL,
    -- Grows with every replica that takes it.
    epoch bigint NOT NULL DEFAULT 1,
    CONSTRAINT cluster_watches_pkey PRIMARY KEY (cluster_id),
    CONSTRAINT cluster_watches_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE CASCADE
);
