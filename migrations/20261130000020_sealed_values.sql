-- Sealed values that are bound to their destination.
--
-- The form of a value is a suffix of its key id (`k-1+bound`), so the tables with sealed columns do not change. A release
-- before this one seals unbound values and does not open bound ones: `regcred master-key rotate --bind` comes after the
-- last of its processes has stopped.

-- One row at most: since when new values are sealed bound, and since when all values are.
CREATE TABLE sealed_values_binding (
    id boolean NOT NULL DEFAULT true,
    marked_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,
    CONSTRAINT sealed_values_binding_pkey PRIMARY KEY (id),
    CONSTRAINT sealed_values_binding_id_check CHECK (id)
);

-- Called first in a transaction that seals, while the process does not know of the mark. The lock lets the command that
-- sets the mark wait for transactions that did not see it. A function, because its second statement sees what was
-- committed while the first one waited, in one round trip.
CREATE FUNCTION lock_sealed_values_mark() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(8243108369790231573);
    RETURN EXISTS (SELECT FROM sealed_values_binding);
END
$$;

-- Without the mark, a restarted process would open unbound values again. The owner of the table could remove the trigger,
-- and a superuser passes.
CREATE FUNCTION sealed_values_binding_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF OLD.completed_at IS NULL THEN
            RETURN NEW;
        END IF;
    END IF;
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        IF TG_OP = 'UPDATE' THEN
            RETURN NEW;
        ELSIF TG_OP = 'DELETE' THEN
            RETURN OLD;
        END IF;
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% of % is not allowed: sealed values stay bound', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER sealed_values_binding_is_kept BEFORE UPDATE OR DELETE ON sealed_values_binding
    FOR EACH ROW EXECUTE FUNCTION sealed_values_binding_is_kept();
CREATE TRIGGER sealed_values_binding_is_not_truncated BEFORE TRUNCATE ON sealed_values_binding
    FOR EACH STATEMENT EXECUTE FUNCTION sealed_values_binding_is_kept();
