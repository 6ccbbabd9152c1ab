-- Changes of resources, for event streams (`GET /v1/events`).
--
-- Triggers record what each statement changed, in its transaction. A process with open streams reads the rows that
-- committed since its last read, which a snapshot tells exactly: see src/storage/resource_changes.rs.
--
-- Without NOTIFY: a transaction that notifies holds a lock on all other notifying ones until its commit is on disk.
-- A fan-out records results in many small transactions, which would commit one after the other.
--
-- The previous binary keeps working. The functions run with the rights of their owner, so that a service role without
-- rights on the new table can still change resources, and a trigger deletes what no reader needs any more.

CREATE TABLE resource_changes (
    transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    -- Order of the changes of a resource: a later writer waits for the lock on its row.
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    kind text NOT NULL,
    change text NOT NULL,
    -- Of a target: its pull secret. The same holds for the next three columns.
    resource_id uuid NOT NULL,
    name text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    generation bigint,
    -- Who may see a change depends on labels and declarations. A declaration is kept only if it is replaced or deleted.
    labels_before jsonb,
    labels jsonb,
    declaration_before jsonb,
    -- Cluster, namespace and state of each target; null if there are more than 100.
    targets jsonb,
    CONSTRAINT resource_changes_pkey PRIMARY KEY (transaction_id, id),
    CONSTRAINT resource_changes_kind_check CHECK (kind IN ('registryAccount', 'pullSecret', 'target', 'cluster')),
    CONSTRAINT resource_changes_change_check CHECK (change IN ('created', 'changed', 'deleted'))
);
CREATE INDEX resource_changes_recorded_at_idx ON resource_changes (recorded_at);

-- Deletes rows after five minutes; a reader that is older begins anew. One insert in 50 does so: a thousand rows are
-- more than the inserts between two deletions add on average.
CREATE FUNCTION resource_changes_expire() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF random() < 0.02 THEN
        -- By place: with another key, Postgres would read the whole table.
        DELETE FROM resource_changes WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM resource_changes WHERE recorded_at < now() - interval '5 minutes'
            ORDER BY recorded_at LIMIT 1000 FOR UPDATE SKIP LOCKED
        ));
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER resource_changes_expire AFTER INSERT ON resource_changes
    FOR EACH STATEMENT EXECUTE FUNCTION resource_changes_expire();

CREATE FUNCTION registry_accounts_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version, labels)
            SELECT 'registryAccount', 'created', id, name, version, labels FROM new_rows;
        WHEN 'UPDATE' THEN
            -- Not after a re-sealing: the resource is the same.
            INSERT INTO resource_changes (kind, change, resource_id, name, version, labels_before, labels)
            SELECT 'registryAccount', 'changed', id, n.name, n.version, o.labels, n.labels
            FROM new_rows n JOIN old_rows o USING (id)
            WHERE (o.version, o.last_verification_result, o.last_verification_detail)
                IS DISTINCT FROM (n.version, n.last_verification_result, n.last_verification_detail);
        ELSE
            INSERT INTO resource_changes (kind, change, resource_id, name, version, labels_before)
            SELECT 'registryAccount', 'deleted', id, name, version, labels FROM old_rows;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER registry_accounts_record_insert AFTER INSERT ON registry_accounts
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION registry_accounts_record_change();
CREATE TRIGGER registry_accounts_record_update AFTER UPDATE ON registry_accounts
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION registry_accounts_record_change();
CREATE TRIGGER registry_accounts_record_delete AFTER DELETE ON registry_accounts
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION registry_accounts_record_change();

CREATE FUNCTION clusters_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version)
            SELECT 'cluster', 'created', id, name, version FROM new_rows;
        WHEN 'UPDATE' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version)
            SELECT 'cluster', 'changed', id, n.name, n.version
            FROM new_rows n JOIN old_rows o USING (id) WHERE o.version <> n.version;
        ELSE
            INSERT INTO resource_changes (kind, change, resource_id, name, version)
            SELECT 'cluster', 'deleted', id, name, version FROM old_rows;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER clusters_record_insert AFTER INSERT ON clusters
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION clusters_record_change();
CREATE TRIGGER clusters_record_update AFTER UPDATE ON clusters
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION clusters_record_change();
CREATE TRIGGER clusters_record_delete AFTER DELETE ON clusters
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION clusters_record_change();

CREATE FUNCTION pull_secrets_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation)
            SELECT 'pullSecret', 'created', id, name, version, generation FROM new_rows;
        WHEN 'UPDATE' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, declaration_before)
            SELECT 'pullSecret', 'changed', id, n.name, n.version, n.generation,
                CASE WHEN o.version <> n.version AND o.declaration <> n.declaration THEN o.declaration END
            FROM new_rows n JOIN old_rows o USING (id)
            WHERE (o.version, o.generation, o.deleted_at, o.left_out)
                IS DISTINCT FROM (n.version, n.generation, n.deleted_at, n.left_out);
        ELSE
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, declaration_before)
            SELECT 'pullSecret', 'deleted', id, name, version, generation, declaration FROM old_rows;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER pull_secrets_record_insert AFTER INSERT ON pull_secrets
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pull_secrets_record_change();
CREATE TRIGGER pull_secrets_record_update AFTER UPDATE ON pull_secrets
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION pull_secrets_record_change();
CREATE TRIGGER pull_secrets_record_delete AFTER DELETE ON pull_secrets
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pull_secrets_record_change();

-- A resync changes the observed generation of a pull secret.
CREATE FUNCTION pull_secret_clusters_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    INSERT INTO resource_changes (kind, change, resource_id, name, version, generation)
    SELECT 'pullSecret', 'changed', id, name, version, generation FROM pull_secrets WHERE id IN (
        SELECT n.pull_secret_id FROM new_rows n JOIN old_rows o USING (pull_secret_id, cluster_id)
        WHERE n.compared_version <> o.compared_version
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER pull_secret_clusters_record_update AFTER UPDATE ON pull_secret_clusters
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION pull_secret_clusters_record_change();

-- One row for each pull secret of a statement, however many of its targets the statement changed. Claims change nothing
-- that is recorded.
CREATE FUNCTION pull_secret_targets_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'created', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM (
                SELECT n.pull_secret_id, CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                    'cluster', clusters.name, 'namespace', n.namespace, 'state', n.state, 'removing', NOT n.wanted
                )) END AS targets
                FROM new_rows n JOIN clusters ON clusters.id = n.cluster_id GROUP BY n.pull_secret_id
            ) AS changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
        WHEN 'UPDATE' THEN
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'changed', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM (
                SELECT n.pull_secret_id, CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                    'cluster', clusters.name, 'namespace', n.namespace, 'state', n.state, 'removing', NOT n.wanted
                )) END AS targets
                FROM new_rows n JOIN old_rows o USING (id) JOIN clusters ON clusters.id = n.cluster_id
                WHERE (o.state, o.wanted, o.last_error_type, o.applied_generation)
                    IS DISTINCT FROM (n.state, n.wanted, n.last_error_type, n.applied_generation)
                GROUP BY n.pull_secret_id
            ) AS changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
        ELSE
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'deleted', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM (
                SELECT o.pull_secret_id, CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                    'cluster', clusters.name, 'namespace', o.namespace, 'state', o.state, 'removing', NOT o.wanted
                )) END AS targets
                FROM old_rows o JOIN clusters ON clusters.id = o.cluster_id GROUP BY o.pull_secret_id
            ) AS changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER pull_secret_targets_record_insert AFTER INSERT ON pull_secret_targets
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pull_secret_targets_record_change();
CREATE TRIGGER pull_secret_targets_record_update AFTER UPDATE ON pull_secret_targets
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION pull_secret_targets_record_change();
CREATE TRIGGER pull_secret_targets_record_delete AFTER DELETE ON pull_secret_targets
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pull_secret_targets_record_change();
