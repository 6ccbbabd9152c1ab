-- The audit record: who did what, when, with what result; never a value. docs/AUDIT.md says what it proves.

-- One row for each writer of events: what its chain is at now. Only here is anything changed, and only by its writer.
CREATE TABLE audit_chains (
    id uuid NOT NULL,
    -- 1, 2, 3, … over all processes, so that a chain that is gone leaves a gap.
    number bigint NOT NULL,
    opened_at timestamptz NOT NULL,
    -- The chain that this one goes on for, where its writer found that one changed behind its back, and how long it was.
    continues_id uuid,
    continues_sequence bigint,
    -- HMAC over the columns above and the opening of the chain before: what the first event is linked to.
    opening bytea NOT NULL,
    -- Which key its HMACs are made with.
    key_id text NOT NULL,
    -- How many events there are, the hash of the last one, and an HMAC over both.
    sequence bigint NOT NULL,
    hash bytea NOT NULL,
    seal bytea NOT NULL,
    CONSTRAINT audit_chains_pkey PRIMARY KEY (id),
    CONSTRAINT audit_chains_number_key UNIQUE (number),
    CONSTRAINT audit_chains_continues_check CHECK ((continues_id IS NULL) = (continues_sequence IS NULL))
    -- Its rows change with each batch of events: room for the next version beside the one before.
) WITH (fillfactor = 20);

-- No foreign key to audit_chains: it would cost a look-up and a lock for each event, and `audit verify` finds an event
-- without a chain.
CREATE TABLE audit_events (
    chain_id uuid NOT NULL,
    sequence bigint NOT NULL,
    -- UUIDv7, and so in the order of time: pages and times are ranges of it.
    id uuid NOT NULL,
    at timestamptz NOT NULL,
    actor_type text NOT NULL,
    actor_id uuid,
    actor_name text,
    action text NOT NULL,
    resource text,
    -- What else it was about, as the accounts of a document.
    related text[],
    outcome text NOT NULL,
    request_id uuid,
    source_ip text,
    -- Not jsonb: the hash is over the text.
    details json NOT NULL,
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT audit_events_pkey PRIMARY KEY (chain_id, sequence),
    CONSTRAINT audit_events_id_key UNIQUE (id)
);
CREATE INDEX audit_events_resource_idx ON audit_events (resource, id);
CREATE INDEX audit_events_related_idx ON audit_events USING gin (related) WHERE related IS NOT NULL;
CREATE INDEX audit_events_actor_name_idx ON audit_events (actor_name, id);
CREATE INDEX audit_events_action_idx ON audit_events (action, id);
CREATE INDEX audit_events_refused_idx ON audit_events (outcome, id) WHERE outcome <> 'success';

-- An event is there for good. The owner of the table could take this away again, and a superuser passes: that the service
-- runs as neither is the better half (`regcred migrate --grant-to`), and that `audit verify` notices is the rest.
CREATE FUNCTION audit_events_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% of % is not allowed: audit events are kept', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_events_are_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_are_kept();
CREATE TRIGGER audit_chains_are_kept BEFORE DELETE OR TRUNCATE ON audit_chains
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_are_kept();
