//! Finds the pull secrets that hold Secrets which others declare, too.

use uuid::Uuid;

use crate::{
    domain::names::SecretName,
    storage::{PgConnection, StorageError},
};

/// A Secret that several pull secrets declare.
#[derive(Debug)]
pub struct Contested {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// Pull secret that wrote the Secret.
    pub holder: Uuid,
}

/// Lists the pull secrets other than `id` that wrote a Secret of this name in these namespaces, each
/// given with its cluster.
#[tracing::instrument(level = "debug", name = "db.pull_secret_targets.list_holders", skip_all, fields(pull_secret.id = %id))]
pub async fn list<'a>(
    conn: &mut PgConnection,
    id: Uuid,
    secret: &SecretName,
    keys: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Vec<Contested>, StorageError> {
    let (clusters, namespaces): (Vec<&str>, Vec<&str>) = keys.unzip();
    let rows = sqlx::query_as!(
        Contested,
        r#"SELECT clusters.name AS cluster, target.namespace, target.pull_secret_id AS holder
           FROM pull_secrets
           JOIN pull_secret_targets AS target ON target.pull_secret_id = pull_secrets.id
           JOIN clusters ON clusters.id = target.cluster_id
           WHERE pull_secrets.id <> $1 AND pull_secrets.declaration -> 'secret' ->> 'name' = $2
               AND target.uid IS NOT NULL
               AND (clusters.name, target.namespace) IN (SELECT * FROM unnest($3::text[], $4::text[]))"#,
        id,
        secret.as_str(),
        &clusters as _,
        &namespaces as _,
    );
    Ok(rows.fetch_all(conn).await?)
}
