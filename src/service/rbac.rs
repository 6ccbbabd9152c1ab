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
    storage::{self, PgConnection, PgPool, mints::WebIdentityUser, pull_secrets::StoredPullSecret},
};

/// Rules that a pull secret or a minted account requires in a cluster.
#[derive(Debug)]
pub struct NamedRules {
    /// Name of the pull secret or the account.
    pub name: Name,
    /// The rules.
    pub rules: RequiredRules,
}

/// Rules that regcred requires in a cluster.
#[derive(Debug)]
pub struct ClusterRules {
    /// Rules of each pull secret, by name.
    pub pull_secrets: Vec<NamedRules>,
    /// Rules of each minted account whose identity is a `ServiceAccount` of the cluster, by name.
    pub accounts: Vec<NamedRules>,
    /// `ServiceAccount` whose tokens regcred renews.
    pub renewed: Option<ServiceAccountRef>,
}

/// Lists the rules that all pull secrets, all minted accounts and the renewal of the token require in
/// a cluster. For operators: grants are not checked.
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
    let accounts = storage::mints::using_cluster(&mut conn, stored.id).await?;
    let accounts = accounts.into_iter().filter_map(rules_of_account).collect();
    Ok(ClusterRules { pull_secrets, accounts, renewed: stored.renewal.map(|renewal| renewal.account) })
}

/// Lists the rules that the visible minted accounts of a caller require in a cluster, by name. Reads
/// at most `accounts_max` accounts and returns whether these are all, and readable.
pub(super) async fn required_by_visible_accounts(
    conn: &mut PgConnection,
    caller: &Identity,
    cluster: Uuid,
    accounts_max: usize,
) -> Result<(Vec<NamedRules>, bool), ServiceError> {
    let limit = i64::try_from(accounts_max).unwrap_or(i64::MAX).saturating_add(1);
    let mut accounts = storage::mints::granted_using_cluster(conn, cluster, &caller.grants, limit).await?;
    let are_all = accounts.len() <= accounts_max;
    accounts.truncate(accounts_max);
    let read = accounts.len();
    let rules: Vec<NamedRules> = accounts.into_iter().filter_map(rules_of_account).collect();
    let is_complete = are_all && rules.len() == read;
    Ok((rules, is_complete))
}

/// Returns `None` if the source is one of another release that this one cannot read.
fn rules_of_account(WebIdentityUser { name, service_account }: WebIdentityUser) -> Option<NamedRules> {
    Some(NamedRules { name, rules: RequiredRules::of_tokens(&service_account?) })
}

/// Lists the rules that the visible pull secrets of a caller require in a cluster, by name. Reads
/// at most `cleanups_max` cleanups and returns whether these are all.
pub(super) async fn required_by_visible(
    conn: &mut PgConnection,
    caller: &Identity,
    (id, cluster): (Uuid, &Name),
    cleanups_max: usize,
) -> Result<(Vec<NamedRules>, bool), ServiceError> {
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

fn rules_of(cluster: &Name, users: &[StoredPullSecret], cleanups: &BTreeMap<Uuid, Vec<Cleanup>>) -> Vec<NamedRules> {
    let required = users.iter().map(|user| {
        let secret = &user.declaration.secret_name;
        let declaration = user.deleted_at.is_none().then_some(&user.declaration);
        let cleanups = cleanups.get(&user.id).map_or(&[][..], Vec::as_slice);
        NamedRules { name: user.name.clone(), rules: RequiredRules::of(cluster, secret, declaration, cleanups) }
    });
    required.filter(|one| !one.rules.is_empty()).collect()
}
