-- The accounts of a registry, for docker configs of an image; and the shape of passwords, which are sealed.
--
-- A release before this one does not write the new column. What it says of a password that such a release stored can be
-- outdated until the password changes again. Only a warning depends on it.

-- A grant of names is a range of this index.
CREATE INDEX registry_accounts_registry_idx ON registry_accounts (registry, name);
ALTER TABLE registry_accounts ADD COLUMN password_ends_with_whitespace boolean NOT NULL DEFAULT false;
