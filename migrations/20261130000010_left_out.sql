-- Accounts that the selector of a pull secret matches and that its document leaves out, because an account with a lower id
-- has the same key. Ids in ascending order, recorded with the rendering of a generation. No foreign key: a deleted account
-- changes the generation, and the next rendering records the list anew.
ALTER TABLE pull_secrets ADD COLUMN left_out uuid[] NOT NULL DEFAULT '{}';
