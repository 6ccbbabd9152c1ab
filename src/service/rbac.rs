//! RBAC rules that regcred requires in a cluster.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    domain::{
        caller::Identity,
        cluster::ServiceAccountRef,
        names::Name,
        rbac::{Cleanup, RequiredRules},
    },
    service::{ServiceError, connection, pull_secrets},
    storage::{self, PgConnection, PgPool, pull_secrets::StoredPullSecret},
};

/// Rules that a pull secret requires in a cluster.
#[derive(Debug)]
pub struct PullSecretRules {
    /// Name of the pull secret.
    pub name: Name,
    /// The rules.
    pub rules: RequiredRules,
}

/// Rules that regcred requires in a cluster.
#[derive(Debug)]
pub struct ClusterRules {
    /// Rules of each pull secret, by name.
    pub pull_secrets: Vec<PullSecretRules>,
    /// `ServiceAccount` whose tokens regcred renews.
    pub renewed: Option<ServiceAccountRef>,
}

/// Lists the rules that all pull secrets and the renewal of the token require in a cluster. For
/// operators: grants are not checked.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if the cluster does not exist.
pub async fn required(pool: &PgPool, cluster: &Name) -> Result<ClusterRules, ServiceError> {
    let mut conn = connection(pool).await?;
    let stored = storage::clusters::find(&mut conn, cluster).await?;
    let stored = stored.ok_or_else(|| ServiceError::NotFound { kind: "cluster", name: cluster.to_string() })?;
    let users = storage::pull_secrets::using_cluster(&mut conn, stored.id).await?;
    let cleanups = storage::targets::status::cleanups(&mut conn, stored.id, None).await?;
    let pull_secrets = rules_of(cluster, &users, &cleanups);
    Ok(ClusterRules { pull_secrets, renewed: stored.renewal.map(|renewal| renewal.account) })
}

/// Lists the rules that the visible pull secrets of a caller require in a cluster, by name. Reads
/// at most `cleanups_max` cleanups and returns whether these are all.
pub(super) async fn required_by_visible(
    conn: &mut PgConnection,
    caller: &Identity,
    (id, cluster): (Uuid, &Name),
    cleanups_max: usize,
) -> Result<(Vec<PullSecretRules>, bool), ServiceError> {
    let users = storage::pull_secrets::using_cluster(conn, id).await?;
    let users = pull_secrets::visible(conn, caller, users).await?;
    if users.is_empty() {
        return Ok((Vec::new(), true));
    }
    let limit = i64::try_from(cleanups_max).unwrap_or(i64::MAX);
    let cleanups = storage::targets::status::cleanups(conn, id, Some(limit)).await?;
    let is_complete = cleanups.values().map(Vec::len).sum::<usize>() < cleanups_max;
    Ok((rules_of(cluster, &users, &cleanups), is_complete))
}

fn rules_of(
    cluster: &Name,
    users: &[StoredPullSecret],
    cleanups: &BTreeMap<Uuid, Vec<Cleanup>>,
) -> Vec<PullSecretRules> {
    let required = users.iter().map(|user| {
        let secret = &user.declaration.secret_name;
        let declaration = user.deleted_at.is_none().then_some(&user.declaration);
        let cleanups = cleanups.get(&user.id).map_or(&[][..], Vec::as_slice);
        PullSecretRules { name: user.name.clone(), rules: RequiredRules::of(cluster, secret, declaration, cleanups) }
    });
    required.filter(|one| !one.rules.is_empty()).collect()
}
