-- Whoever keeps rows in memory is told of their change by Postgres, at the commit: on the channel `regcred_changes`, as
-- `TABLE KEY`, or as `TABLE` alone where one statement changed many rows.
--
-- By triggers, so that no writer can forget it, and somebody with psql cannot either. For each statement and not for each
-- row: one notification for each of many rows makes the statement slower by a factor. New rows are not announced: what is
-- not there is not remembered. Fits the binary before this one, which does not listen.

CREATE FUNCTION announce_changes(changed_table text, keys text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF cardinality(keys) > 100 THEN
        PERFORM pg_notify('regcred_changes', changed_table);
    ELSE
        PERFORM pg_notify('regcred_changes', changed_table || ' ' || key) FROM unnest(keys) AS key;
    END IF;
END
$$;

CREATE FUNCTION announce_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('regcred_changes', TG_TABLE_NAME);
    RETURN NULL;
END
$$;

CREATE FUNCTION api_keys_announce() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM announce_changes('api_keys', ARRAY(SELECT id::text FROM old_rows));
    RETURN NULL;
END
$$;
CREATE TRIGGER api_keys_announce_update AFTER UPDATE ON api_keys
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION api_keys_announce();
CREATE TRIGGER api_keys_announce_delete AFTER DELETE ON api_keys
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION api_keys_announce();
CREATE TRIGGER api_keys_announce_truncate AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION announce_truncate();

CREATE FUNCTION registry_accounts_announce_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- What a docker config is made of. The result of a verification, say, is not.
    PERFORM announce_changes('registry_accounts', ARRAY(
        SELECT o.name FROM old_rows o LEFT JOIN new_rows n USING (id)
        WHERE (o.name, o.registry, o.username, o.password, o.password_key_id, o.email, o.labels) IS DISTINCT FROM
            (n.name, n.registry, n.username, n.password, n.password_key_id, n.email, n.labels)
    ));
    RETURN NULL;
END
$$;
CREATE FUNCTION registry_accounts_announce_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM announce_changes('registry_accounts', ARRAY(SELECT name FROM old_rows));
    RETURN NULL;
END
$$;
CREATE TRIGGER registry_accounts_announce_update AFTER UPDATE ON registry_accounts
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION registry_accounts_announce_update();
CREATE TRIGGER registry_accounts_announce_delete AFTER DELETE ON registry_accounts
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION registry_accounts_announce_delete();
CREATE TRIGGER registry_accounts_announce_truncate AFTER TRUNCATE ON registry_accounts
    FOR EACH STATEMENT EXECUTE FUNCTION announce_truncate();
