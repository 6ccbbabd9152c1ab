-- `regcred audit prune` deletes old events. docs/AUDIT.md explains what verification still proves.

-- Deletes pass for the owner of the table in a transaction that says so, which guards against mistakes. It is no barrier
-- against the owner, who could drop the trigger, nor is one needed: `regcred audit verify` finds events that are missing
-- without a sealed prune. The role of the service has no right to delete.
CREATE OR REPLACE FUNCTION audit_events_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'audit_events'
        AND current_setting('regcred.audit_prune', true) = 'on'
        AND pg_has_role(current_user, (SELECT relowner FROM pg_catalog.pg_class WHERE oid = TG_RELID), 'USAGE')
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% of % is not allowed: audit events are kept', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
