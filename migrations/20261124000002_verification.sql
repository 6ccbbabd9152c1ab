-- Whether logins work: what the last check found, when the next one is due, whom to trust.

ALTER TABLE registry_accounts
    ADD COLUMN ca_certificate text,
    ADD COLUMN last_verified_at timestamptz,
    ADD COLUMN last_verification_result text,
    ADD COLUMN last_verification_detail text,
    -- Null: not verified in the background.
    ADD COLUMN verify_interval_seconds integer,
    -- When the next check is due; while one is under way, when it is taken for lost.
    ADD COLUMN next_verification_at timestamptz,
    -- The nearest of the warnings before expires_at that was given, in days.
    ADD COLUMN expiry_warned_days smallint,
    ADD CONSTRAINT registry_accounts_last_verification_check CHECK (
        (last_verified_at IS NULL) = (last_verification_result IS NULL)
        AND (last_verified_at IS NULL) = (last_verification_detail IS NULL)
    ),
    ADD CONSTRAINT registry_accounts_verify_interval_seconds_check CHECK (verify_interval_seconds > 0);

-- The worker looks for what is due.
CREATE INDEX registry_accounts_next_verification_at_idx ON registry_accounts (next_verification_at)
    WHERE next_verification_at IS NOT NULL;
CREATE INDEX registry_accounts_expires_at_idx ON registry_accounts (expires_at) WHERE expires_at IS NOT NULL;
