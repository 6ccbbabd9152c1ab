-- End of a cluster's credential, and its renewal with the cluster's TokenRequest API.
--
-- The columns describe the credential of one version of the cluster. The previous binary does not know
-- them: a change that it makes leaves them behind at an older version, and they do not count then. A
-- cluster of type serviceAccount has auth_type token, which the previous binary can use.

ALTER TABLE clusters
    ADD COLUMN credential_version bigint,
    ADD COLUMN credential_expires_at timestamptz,
    -- Days of the last expiry warning.
    ADD COLUMN expiry_warned_days smallint,
    -- ServiceAccount whose tokens replace the credential.
    ADD COLUMN service_account_namespace text,
    ADD COLUMN service_account_name text,
    -- Number of renewals, over all versions. Fences a renewal, and tells cached clients apart.
    ADD COLUMN credential_renewals bigint NOT NULL DEFAULT 0,
    -- Also the end of the lease of a claimed renewal.
    ADD COLUMN next_renewal_at timestamptz,
    ADD COLUMN renewal_failures integer NOT NULL DEFAULT 0,
    ADD COLUMN renewal_error text,
    ADD CONSTRAINT clusters_service_account_check CHECK (
        (service_account_namespace IS NULL) = (service_account_name IS NULL)
    );
CREATE INDEX clusters_next_renewal_at_idx ON clusters (next_renewal_at) WHERE next_renewal_at IS NOT NULL;
CREATE INDEX clusters_credential_expires_at_idx ON clusters (credential_expires_at)
    WHERE credential_expires_at IS NOT NULL;
