-- Indexes of the orders and filters of lists, and whether the selectors of pull secrets match anything.
--
-- The previous binary keeps working: it does not maintain the new columns, so warnings about selectors that it
-- stores appear with the next change by this release.

-- The name is the second column: it completes the order, and a search for a part of a name reads the index alone.
CREATE INDEX registry_accounts_created_at_name_idx ON registry_accounts (created_at, name);
CREATE INDEX clusters_created_at_name_idx ON clusters (created_at, name);
CREATE INDEX pull_secrets_created_at_name_idx ON pull_secrets (created_at, name);
CREATE INDEX identity_providers_created_at_name_idx ON identity_providers (created_at, name);
-- Names of API keys are not unique.
CREATE INDEX api_keys_name_id_idx ON api_keys (name COLLATE "C", id);

-- Resources that do not expire come last. The column is included so that Postgres can read the index alone.
CREATE INDEX registry_accounts_expiry_idx ON registry_accounts
    (coalesce(expires_at, 'infinity'::timestamptz), name) INCLUDE (expires_at);
CREATE INDEX api_keys_expiry_idx ON api_keys
    (coalesce(expires_at, 'infinity'::timestamptz), id) INCLUDE (expires_at);

CREATE INDEX registry_accounts_last_verification_result_idx ON registry_accounts (last_verification_result, name);

-- Targets by state, in the order of a list. Synced targets, most of them, are not in it: a result that confirms
-- `synced` adds no entry. A claim changes no column of it.
CREATE INDEX pull_secret_targets_state_list_idx ON pull_secret_targets (state, pull_secret_id, namespace, cluster_id)
    WHERE state <> 'synced';
-- Finds the oldest change that is not synced.
CREATE INDEX pull_secret_targets_pending_since_idx ON pull_secret_targets (pending_since)
    WHERE pending_since IS NOT NULL;

-- Whether the account selector matches an account. Null without a selector.
ALTER TABLE pull_secrets ADD COLUMN selects_account boolean;
-- Selectors are compared here by their labels alone: one with expressions may match none all the same.
UPDATE pull_secrets SET selects_account = EXISTS (
    SELECT FROM registry_accounts WHERE labels @> (account_selector -> 'matchLabels')
) WHERE account_selector IS NOT NULL;

-- Places in `targets` of the namespace selectors that matched nothing in the cluster at `compared_version`.
ALTER TABLE pull_secret_clusters ADD COLUMN unmatched_targets integer[] NOT NULL DEFAULT '{}';
