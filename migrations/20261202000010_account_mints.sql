-- Minted accounts: the source of each, and the state of its mints.
--
-- The login itself is in registry_accounts, as that of any account. The previous binary keeps working: it delivers minted
-- logins and does not replace them. It knows no minted accounts, so a password that it sets is replaced by the next mint.

CREATE TABLE account_mints (
    account_id uuid NOT NULL,
    -- JSON without secrets. Text, because the secret is bound to its bytes.
    source text NOT NULL,
    -- Cluster whose tokens are the identity. Another cluster of the same name is not. NULL without such an identity, and
    -- after an older release removed the cluster.
    cluster_id uuid,
    -- Secret of the source, sealed; the empty text for an identity without one. Always bound to source and registry: no
    -- older release opens it.
    secret bytea NOT NULL,
    secret_key_id text NOT NULL,
    serial bigint NOT NULL DEFAULT 1,
    minted_at timestamptz NOT NULL DEFAULT now(),
    valid_until timestamptz NOT NULL,
    refresh_at timestamptz NOT NULL,
    -- When the next mint is due: refresh_at, or later after a failure.
    next_attempt_at timestamptz NOT NULL,
    -- Consecutive failures, and the reason of the last one.
    failures integer NOT NULL DEFAULT 0,
    error_reason text,
    error_detail text,
    -- A worker that holds the lease mints. A result is stored only under the token of its claim, and a change of the source
    -- raises the token.
    lease_until timestamptz,
    lease_token bigint NOT NULL DEFAULT 0,
    CONSTRAINT account_mints_pkey PRIMARY KEY (account_id),
    CONSTRAINT account_mints_account_id_fkey FOREIGN KEY (account_id) REFERENCES registry_accounts (id) ON DELETE CASCADE,
    CONSTRAINT account_mints_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE SET NULL,
    CONSTRAINT account_mints_source_check CHECK (octet_length(source) <= 65536),
    CONSTRAINT account_mints_error_check CHECK ((error_reason IS NULL) = (error_detail IS NULL))
);
CREATE INDEX account_mints_next_attempt_at_idx ON account_mints (next_attempt_at);
CREATE INDEX account_mints_valid_until_idx ON account_mints (valid_until);
CREATE INDEX account_mints_cluster_id_idx ON account_mints (cluster_id) WHERE cluster_id IS NOT NULL;

-- Event streams tell of mints and of new reasons for failures. The version of the account does not change.
CREATE FUNCTION account_mints_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    INSERT INTO resource_changes (kind, change, resource_id, name, version, labels_before, labels)
    SELECT 'registryAccount', 'changed', id, name, version, labels, labels FROM registry_accounts WHERE id IN (
        SELECT n.account_id FROM new_rows n JOIN old_rows o USING (account_id)
        WHERE (o.serial, o.error_reason) IS DISTINCT FROM (n.serial, n.error_reason)
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER account_mints_record_update AFTER UPDATE ON account_mints
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION account_mints_record_change();
