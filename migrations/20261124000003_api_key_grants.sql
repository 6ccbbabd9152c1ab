-- Grants of API keys, and names in the order of their bytes.
--
-- Both fit the binary before this one: it writes keys without grants, which then have those that their role has where
-- none are given, and it compares names for equality and order alone.

-- {"accounts": ["martin-*", {"matchLabels": {"team": "a"}}], "clusters": ["dev"], "namespaces": ["a-*"]}
ALTER TABLE api_keys ADD COLUMN grants jsonb NOT NULL DEFAULT '{}';
ALTER TABLE api_keys ADD CONSTRAINT api_keys_grants_check CHECK (jsonb_typeof(grants) = 'object');

-- A grant of names is a range of the index, which it can only be in byte order; and pages are then the same whatever
-- the database's collation is.
ALTER TABLE registry_accounts ALTER COLUMN name TYPE text COLLATE "C";
ALTER TABLE clusters ALTER COLUMN name TYPE text COLLATE "C";
