-- Seals of the audit log. docs/AUDIT.md explains the scheme.

-- Key of the event's HMAC. NULL marks an event of a chain (audit_chains), which a release before this one wrote. Such a
-- release may still run beside this one, so its columns keep their constraints: an event of this release has its process
-- in chain_id, its place among the events of that process in sequence, and an empty previous_hash.
ALTER TABLE audit_events ADD COLUMN key_id text;

-- Batches that no seal binds yet: one row for each statement that inserts events. A batch without events accounts for a
-- number under which nothing was committed.
CREATE TABLE audit_unsealed (
    -- UUIDv7: the order in which sealers take batches.
    id uuid NOT NULL,
    key_id text NOT NULL,
    process_id uuid NOT NULL,
    -- 1, 2, 3, … for each process.
    sequence bigint NOT NULL,
    -- Every number of the process up to this one was committed or is accounted for. Equal to sequence: the process stopped.
    settled_through bigint NOT NULL,
    event_ids uuid[] NOT NULL,
    -- HMACs of the events, in the order of event_ids.
    hashes bytea[] NOT NULL,
    -- HMAC over the columns above.
    mac bytea NOT NULL,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT audit_unsealed_pkey PRIMARY KEY (id)
    -- Each row lives for a second: vacuum by number of rows.
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- One chain of seals over all processes. Insert-only.
CREATE TABLE audit_seals (
    -- 1, 2, 3, … The primary key decides between sealers that run at the same time.
    number bigint NOT NULL,
    sealed_at timestamptz NOT NULL,
    key_id text NOT NULL,
    -- The batches: four arrays of the same length. event_counts divides event_ids among them.
    process_ids uuid[] NOT NULL,
    sequences bigint[] NOT NULL,
    settled_through bigint[] NOT NULL,
    event_counts integer[] NOT NULL,
    event_ids uuid[] NOT NULL,
    -- Events in all seals up to this one.
    events bigint NOT NULL,
    -- SHA-256 over the HMACs of the events.
    digest bytea NOT NULL,
    -- Hash of the seal before.
    previous_hash bytea NOT NULL,
    -- Last seal that the sealing process had seen. It exposes a rollback of seals under a running process.
    seen_number bigint,
    seen_hash bytea,
    -- Reserved for retention: events of the seals up to this number may be gone.
    pruned_through bigint,
    -- HMAC over the columns above.
    hash bytea NOT NULL,
    CONSTRAINT audit_seals_pkey PRIMARY KEY (number),
    CONSTRAINT audit_seals_seen_check CHECK ((seen_number IS NULL) = (seen_hash IS NULL))
);

CREATE TRIGGER audit_seals_are_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_are_kept();
-- Sealing deletes batches.
CREATE TRIGGER audit_unsealed_is_kept BEFORE UPDATE OR TRUNCATE ON audit_unsealed
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_are_kept();
