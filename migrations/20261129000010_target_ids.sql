-- Targets get an id, so that statements find the rows they name by one narrow key.
--
-- Without it, a named target was looked up by pull secret, cluster and namespace. Postgres then had two
-- indexes to choose from, and with statistics older than a new cluster it read all of the cluster's targets
-- for each one. An identity column keeps index entries at eight bytes and in order of insertion.
--
-- The previous binary keeps working: the identity fills the id, and `ON CONFLICT` infers the unique
-- constraint from its set of columns, whatever their order.

-- A claim changes no indexed column. Free space on the page lets Postgres write its row version there (HOT),
-- without new index entries. The rewrite below applies the fill factor to existing rows.
ALTER TABLE pull_secret_targets SET (fillfactor = 60);
ALTER TABLE pull_secret_targets ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY;

-- The namespace precedes the cluster: a Secret reported by a watch is found by pull secret and namespace, for
-- which no other index qualifies.
ALTER TABLE pull_secret_targets
    DROP CONSTRAINT pull_secret_targets_pkey,
    ADD CONSTRAINT pull_secret_targets_pkey PRIMARY KEY (id),
    ADD CONSTRAINT pull_secret_targets_pull_secret_id_namespace_cluster_id_key
        UNIQUE (pull_secret_id, namespace, cluster_id);
