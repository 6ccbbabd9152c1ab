-- Pepper of the HMAC of each API key. NULL for a pepper without an id, as every one was before this release.
ALTER TABLE api_keys ADD COLUMN pepper_id text;
