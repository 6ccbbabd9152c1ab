-- Tokens that a provider accepts although they are refused by default.
--
-- The previous binary ignores these columns and keeps their defaults: it accepts such tokens of every provider.

ALTER TABLE identity_providers
    -- Tokens with further audiences than that of the provider.
    ADD COLUMN allow_multiple_audiences boolean NOT NULL DEFAULT false,
    -- Values of `typ` for other purposes than access, such as `secevent+jwt`.
    ADD COLUMN token_types text[] NOT NULL DEFAULT '{}';
