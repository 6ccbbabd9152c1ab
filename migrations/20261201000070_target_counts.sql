-- Number of wanted targets of each pull secret, so that the status of a pull secret reads only its targets that are
-- not synced.
--
-- A page of pull secrets counted all targets of its pull secrets: 60 ms at 100,000 targets.
--
-- Triggers keep the numbers, so the previous binary keeps working. Targets become wanted and unwanted in transactions
-- that lock the pull secret; results of reconciliation change nothing here.

-- No transaction changes targets between the first count and the new triggers.
LOCK TABLE pull_secret_targets IN SHARE ROW EXCLUSIVE MODE;

CREATE TABLE pull_secret_target_counts (
    pull_secret_id uuid NOT NULL,
    wanted bigint NOT NULL,
    CONSTRAINT pull_secret_target_counts_pkey PRIMARY KEY (pull_secret_id),
    CONSTRAINT pull_secret_target_counts_pull_secret_id_fkey FOREIGN KEY (pull_secret_id)
        REFERENCES pull_secrets (id) ON DELETE CASCADE
);
INSERT INTO pull_secret_target_counts (pull_secret_id, wanted)
SELECT pull_secret_id, count(*) FROM pull_secret_targets WHERE wanted GROUP BY pull_secret_id;

-- As before, and with the counts.
CREATE OR REPLACE FUNCTION pull_secret_targets_record_change() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            WITH changed AS MATERIALIZED (
                SELECT n.pull_secret_id, count(*) FILTER (WHERE n.wanted) AS added,
                    CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                        'cluster', clusters.name, 'namespace', n.namespace, 'state', n.state, 'removing', NOT n.wanted
                    )) END AS targets
                FROM new_rows n JOIN clusters ON clusters.id = n.cluster_id GROUP BY n.pull_secret_id
            ), counted AS (
                INSERT INTO pull_secret_target_counts AS stored (pull_secret_id, wanted)
                SELECT pull_secret_id, added FROM changed
                ON CONFLICT (pull_secret_id) DO UPDATE SET wanted = stored.wanted + excluded.wanted
            )
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'created', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
        WHEN 'UPDATE' THEN
            WITH changed AS MATERIALIZED (
                SELECT n.pull_secret_id, sum(n.wanted::integer - o.wanted::integer) AS added,
                    CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                        'cluster', clusters.name, 'namespace', n.namespace, 'state', n.state, 'removing', NOT n.wanted
                    )) END AS targets
                FROM new_rows n JOIN old_rows o USING (id) JOIN clusters ON clusters.id = n.cluster_id
                WHERE (o.state, o.wanted, o.last_error_type, o.applied_generation)
                    IS DISTINCT FROM (n.state, n.wanted, n.last_error_type, n.applied_generation)
                GROUP BY n.pull_secret_id
            ), counted AS (
                UPDATE pull_secret_target_counts AS stored SET wanted = stored.wanted + changed.added
                FROM changed WHERE stored.pull_secret_id = changed.pull_secret_id AND changed.added <> 0
            )
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'changed', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
        ELSE
            WITH changed AS MATERIALIZED (
                SELECT o.pull_secret_id, count(*) FILTER (WHERE o.wanted) AS removed,
                    CASE WHEN count(*) <= 100 THEN jsonb_agg(jsonb_build_object(
                        'cluster', clusters.name, 'namespace', o.namespace, 'state', o.state, 'removing', NOT o.wanted
                    )) END AS targets
                FROM old_rows o JOIN clusters ON clusters.id = o.cluster_id GROUP BY o.pull_secret_id
            ), counted AS (
                UPDATE pull_secret_target_counts AS stored SET wanted = stored.wanted - changed.removed
                FROM changed WHERE stored.pull_secret_id = changed.pull_secret_id AND changed.removed <> 0
            )
            INSERT INTO resource_changes (kind, change, resource_id, name, version, generation, targets)
            SELECT 'target', 'deleted', pull_secrets.id, pull_secrets.name, version, generation, changed.targets
            FROM changed JOIN pull_secrets ON pull_secrets.id = changed.pull_secret_id;
    END CASE;
    RETURN NULL;
END
$$;
