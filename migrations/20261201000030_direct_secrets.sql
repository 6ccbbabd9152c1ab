-- Secrets of direct delivery, with the accounts in them. They do not follow a change of an account, so the accounts name
-- them. A row says what was delivered, not that the Secret still exists.
--
-- The previous binary does not know the table and the column: its deliveries and changes are not recorded.

CREATE TABLE direct_secrets (
    account_id uuid NOT NULL,
    cluster_id uuid NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    -- Time at which the login was read for the delivery, or later.
    delivered_at timestamptz NOT NULL,
    CONSTRAINT direct_secrets_pkey PRIMARY KEY (account_id, cluster_id, namespace, name),
    CONSTRAINT direct_secrets_account_id_fkey FOREIGN KEY (account_id) REFERENCES registry_accounts (id) ON DELETE CASCADE,
    CONSTRAINT direct_secrets_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE CASCADE
);
-- Finds the accounts of a Secret, and the Secrets of a namespace.
CREATE INDEX direct_secrets_secret_idx ON direct_secrets (cluster_id, namespace, name);

-- Time of the last change that docker configs show; NULL if there was none.
ALTER TABLE registry_accounts ADD COLUMN login_changed_at timestamptz;
