-- Coverage of clusters: the newest run of each cluster, and its last two snapshots.
--
-- The previous binary does not know these tables. It removes a cluster with its rows.

CREATE TABLE coverage_runs (
    cluster_id uuid NOT NULL,
    -- Changes with each requested run.
    run_id uuid NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    -- Caller that requested the run: the actor of its audit events.
    actor_type text NOT NULL,
    actor_id uuid,
    actor_name text NOT NULL,
    request_id uuid NOT NULL,
    requested_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    -- Progress of the run: a fixed word, and how much of it is done.
    stage text,
    done bigint NOT NULL DEFAULT 0,
    total bigint,
    error_type text,
    error_detail text,
    -- Number of processes that began the run. One that died is replaced.
    attempts integer NOT NULL DEFAULT 0,
    -- A process that holds the lease carries the run out. A result is stored only under the token of its claim, and a new
    -- request raises the token.
    lease_until timestamptz,
    lease_token bigint NOT NULL DEFAULT 0,
    CONSTRAINT coverage_runs_pkey PRIMARY KEY (cluster_id),
    CONSTRAINT coverage_runs_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE CASCADE,
    CONSTRAINT coverage_runs_state_check CHECK (state IN ('pending', 'running', 'succeeded', 'failed')),
    CONSTRAINT coverage_runs_error_check CHECK ((error_type IS NULL) = (error_detail IS NULL))
);
CREATE INDEX coverage_runs_requested_at_idx ON coverage_runs (requested_at) WHERE state IN ('pending', 'running');

CREATE TABLE coverage_snapshots (
    -- UUIDv7: the newest snapshot of a cluster has the largest id.
    id uuid NOT NULL,
    cluster_id uuid NOT NULL,
    taken_at timestamptz NOT NULL DEFAULT now(),
    -- Time of the snapshot that it was compared with.
    compared_with timestamptz,
    -- Document of the API, as src/domain/coverage/snapshot.rs reads it.
    summary jsonb NOT NULL,
    -- Differences to the snapshot before: number of groups.
    added bigint NOT NULL DEFAULT 0,
    removed bigint NOT NULL DEFAULT 0,
    broken bigint NOT NULL DEFAULT 0,
    fixed bigint NOT NULL DEFAULT 0,
    CONSTRAINT coverage_snapshots_pkey PRIMARY KEY (id),
    CONSTRAINT coverage_snapshots_cluster_id_fkey FOREIGN KEY (cluster_id) REFERENCES clusters (id) ON DELETE CASCADE
);
CREATE INDEX coverage_snapshots_cluster_id_idx ON coverage_snapshots (cluster_id, id);

CREATE TABLE coverage_groups (
    snapshot_id uuid NOT NULL,
    number bigint NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    -- What tells groups of a namespace apart: ServiceAccount, pull secrets and repository.
    identity text COLLATE "C" NOT NULL,
    verdict text NOT NULL,
    -- Verdict in the snapshot before; NULL for a new group.
    previous_verdict text,
    account text COLLATE "C",
    document jsonb NOT NULL,
    CONSTRAINT coverage_groups_pkey PRIMARY KEY (snapshot_id, number),
    CONSTRAINT coverage_groups_snapshot_id_fkey FOREIGN KEY (snapshot_id) REFERENCES coverage_snapshots (id) ON DELETE CASCADE
);
CREATE INDEX coverage_groups_identity_idx ON coverage_groups (snapshot_id, namespace, identity);
CREATE INDEX coverage_groups_verdict_idx ON coverage_groups (snapshot_id, verdict, number);

CREATE TABLE coverage_secrets (
    snapshot_id uuid NOT NULL,
    number bigint NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    is_unused boolean NOT NULL,
    is_adoptable boolean NOT NULL,
    document jsonb NOT NULL,
    CONSTRAINT coverage_secrets_pkey PRIMARY KEY (snapshot_id, number),
    CONSTRAINT coverage_secrets_snapshot_id_fkey FOREIGN KEY (snapshot_id)
        REFERENCES coverage_snapshots (id) ON DELETE CASCADE
);

-- Workloads that use a registry account or a pull secret.
CREATE TABLE coverage_usage (
    snapshot_id uuid NOT NULL,
    kind text NOT NULL,
    resource_id uuid NOT NULL,
    workloads bigint NOT NULL,
    namespaces bigint NOT NULL,
    CONSTRAINT coverage_usage_pkey PRIMARY KEY (snapshot_id, kind, resource_id),
    CONSTRAINT coverage_usage_snapshot_id_fkey FOREIGN KEY (snapshot_id)
        REFERENCES coverage_snapshots (id) ON DELETE CASCADE,
    CONSTRAINT coverage_usage_kind_check CHECK (kind IN ('account', 'pullSecret'))
);
CREATE INDEX coverage_usage_resource_id_idx ON coverage_usage (resource_id);
