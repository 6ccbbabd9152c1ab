//! Lists of pull secrets and of their targets.

use uuid::Uuid;

use super::{PullSecrets, ShownPullSecret, granted, granted_left_out, holders, visible};
use crate::{
    domain::{
        caller::Identity,
        invalid::{FieldErrors, Invalid},
        listing::{ListRequest, Listed, NamePart, Next, Position, PullSecretState},
        names::{Name, NamespaceName},
        pull_secret::TargetState,
    },
    service::{ServiceError, connection},
    storage::{
        self, PageRequest, PgConnection,
        lists::HIDDEN_MAX,
        pull_secrets::listing::PullSecretFilter,
        targets::listing::{Scope, ShownTarget, TargetFilter, TargetPosition},
    },
};

/// Pull secrets of which a page of targets is read in one statement.
const CHUNK: usize = 50;

/// Filter of a list of pull secrets, by names.
#[derive(Debug, Default)]
pub struct PullSecretQuery {
    /// Part of the name.
    pub name_part: Option<NamePart>,
    /// States, of which one must apply. Empty for any.
    pub states: Vec<PullSecretState>,
    /// Cluster that the declaration targets.
    pub cluster: Option<Name>,
    /// Namespace of a target.
    pub namespace: Option<NamespaceName>,
    /// Account that the declaration names or selects.
    pub account: Option<Name>,
}

/// Filter of a list of targets, by names.
#[derive(Debug, Default)]
pub struct TargetQuery {
    /// States, of which one must apply. Empty for any.
    pub states: Vec<TargetState>,
    /// Cluster.
    pub cluster: Option<Name>,
    /// Namespace.
    pub namespace: Option<NamespaceName>,
    /// Account that the pull secret names or selects.
    pub account: Option<Name>,
    /// Pull secret.
    pub pull_secret: Option<Name>,
}

impl PullSecrets {
    /// Lists the pull secrets that match `query` and whose accounts, clusters and namespaces are
    /// all granted. Reads a bounded number of rows that do not, so a page may be short.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] if a cluster or account is unknown or not granted.
    pub async fn list(
        &self,
        caller: &Identity,
        request: &ListRequest,
        query: PullSecretQuery,
    ) -> Result<Listed<ShownPullSecret>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let mut errors = FieldErrors::default();
        let cluster = find_cluster(&mut conn, caller, &mut errors, query.cluster.as_ref()).await?;
        let ids = using_account(&mut conn, caller, &mut errors, query.account.as_ref()).await?;
        let filter = errors.finish(|| {
            let namespace = query.namespace.as_ref().map(NamespaceName::to_string);
            Some(PullSecretFilter { name_part: query.name_part, states: query.states, cluster, namespace, ids })
        })?;
        let page = storage::pull_secrets::listing::list(&mut conn, &caller.grants, request, &filter).await?;
        // Decides as for a single pull secret, should the query ever include more.
        let found = visible(&mut conn, caller, page.items).await?;
        let ids: Vec<Uuid> = found.iter().map(|stored| stored.id).collect();
        let counts = storage::targets::status::count(&mut conn, &ids).await?;
        let mut left_out = granted_left_out(&mut conn, caller, &ids).await?;
        let mut unmatched = storage::unmatched::list(&mut conn, &ids).await?;
        let mut items = Vec::with_capacity(found.len());
        for (stored, counts) in found.into_iter().zip(counts) {
            let selects = stored.declaration.clusters().into_values().any(|selects| selects);
            let resyncs = if selects { storage::resyncs::list(&mut conn, stored.id).await? } else { Vec::new() };
            let left_out = left_out.remove(&stored.id).unwrap_or_default();
            let unmatched = unmatched.remove(&stored.id).unwrap_or_default();
            items.push(ShownPullSecret { stored, counts, resyncs, left_out, unmatched, usage: None });
        }
        Ok(Listed { items, next: page.next })
    }

    /// Lists the targets of a pull secret by cluster and namespace.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] if it does not exist.
    /// - [`ServiceError::Invalid`] if the cluster is unknown or not granted.
    pub async fn targets(
        &self,
        caller: &Identity,
        name: &Name,
        query: &TargetQuery,
        page: &PageRequest,
    ) -> Result<Vec<ShownTarget>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let stored = granted(&mut conn, caller, name).await?;
        let mut errors = FieldErrors::default();
        let filter = target_filter(&mut conn, caller, &mut errors, query).await?;
        let filter = errors.finish(|| Some(filter))?;
        let mut targets = storage::targets::listing::list_of(&mut conn, stored.id, &filter, page).await?;
        holders::name_holders(&mut conn, caller, &mut targets).await?;
        Ok(targets)
    }

    /// Lists the targets of all pull secrets that the caller may see, by pull secret, namespace and
    /// cluster.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Invalid`] if a cluster, account or pull secret is unknown or not granted.
    pub async fn all_targets(
        &self,
        caller: &Identity,
        request: &ListRequest,
        query: &TargetQuery,
    ) -> Result<Listed<ShownTarget>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let mut errors = FieldErrors::default();
        let filter = target_filter(&mut conn, caller, &mut errors, query).await?;
        let mut ids = using_account(&mut conn, caller, &mut errors, query.account.as_ref()).await?;
        if let Some(name) = &query.pull_secret {
            let found = storage::pull_secrets::find(&mut conn, name).await?;
            match visible(&mut conn, caller, found.into_iter().collect()).await?.pop() {
                Some(found) => {
                    ids =
                        Some(ids.unwrap_or_else(|| vec![found.id]).into_iter().filter(|id| *id == found.id).collect());
                }
                None => errors.refuse("pullSecret", format!("there is no pull secret named `{name}`")),
            }
        }
        let filter = errors.finish(|| Some(filter))?;
        let after = request.after.as_ref().and_then(|position| position.key.parse::<TargetPosition>().ok());
        let (after, limit) = (after.as_ref(), request.limit);
        let mut listed = if ids.is_none() && caller.grants.include_everything() {
            storage::targets::listing::list(&mut conn, Scope::All, &filter, after, limit).await?
        } else {
            targets_of_some(&mut conn, caller, ids.as_deref(), &filter, (after, limit)).await?
        };
        holders::name_holders(&mut conn, caller, &mut listed.items).await?;
        Ok(listed)
    }
}

/// Lists the targets of the pull secrets that the caller may see, or of those among `ids`.
///
/// Reads at most [`HIDDEN_MAX`] pull secrets, and no target of a hidden one.
async fn targets_of_some(
    conn: &mut PgConnection,
    caller: &Identity,
    ids: Option<&[Uuid]>,
    filter: &TargetFilter,
    (after, limit): (Option<&TargetPosition>, usize),
) -> Result<Listed<ShownTarget>, ServiceError> {
    let from = after.map_or(Uuid::nil(), |after| after.pull_secret_id);
    let mut window = storage::pull_secrets::listing::list_ids(conn, &caller.grants, (from, HIDDEN_MAX), ids).await?;
    let found = storage::pull_secrets::find_many(conn, &window.items).await?;
    let mut seen: Vec<Uuid> = visible(conn, caller, found).await?.into_iter().map(|stored| stored.id).collect();
    seen.retain(|id| after.is_none_or(|after| after.target.is_some() || *id != after.pull_secret_id));
    seen.sort_unstable();
    let mut items = Vec::new();
    for chunk in seen.chunks(CHUNK) {
        let rest = limit - items.len();
        let page = storage::targets::listing::list(conn, Scope::PullSecrets(chunk), filter, after, rest).await?;
        items.extend(page.items);
        if page.next.is_some() {
            return Ok(Listed { items, next: page.next });
        }
        if items.len() == limit {
            // Whether more follow is known with the next chunk.
            let position = chunk.last().map(|id| TargetPosition { pull_secret_id: *id, target: None }.to_string());
            let is_last = window.next.is_none() && chunk.last() == seen.last();
            let next = position.filter(|_| !is_last).map(|position| Next::Row(Position::unique(position)));
            return Ok(Listed { items, next });
        }
    }
    let end = window.next.take().map(|(Next::Item(position) | Next::Row(position))| Next::Row(position));
    Ok(Listed { items, next: end })
}

async fn target_filter(
    conn: &mut PgConnection,
    caller: &Identity,
    errors: &mut FieldErrors,
    query: &TargetQuery,
) -> Result<TargetFilter, ServiceError> {
    let cluster = find_cluster(conn, caller, errors, query.cluster.as_ref()).await?;
    let mut states = query.states.clone();
    states.sort_unstable_by_key(|state| state.as_str());
    states.dedup();
    Ok(TargetFilter { states, cluster, namespace: query.namespace.clone() })
}

/// Finds the id of a granted cluster. A filter by a name that does not exist would look like a list
/// without problems, so it is refused.
async fn find_cluster(
    conn: &mut PgConnection,
    caller: &Identity,
    errors: &mut FieldErrors,
    name: Option<&Name>,
) -> Result<Option<Uuid>, ServiceError> {
    let Some(name) = name else { return Ok(None) };
    let found = storage::clusters::find(conn, name).await?;
    let found = found.filter(|cluster| caller.grants.include_cluster(&cluster.name)).map(|cluster| cluster.id);
    let unknown = || Invalid::new(format!("there is no cluster named `{name}`"));
    Ok(errors.take("cluster", found.ok_or_else(unknown)))
}

/// Lists the ids of the pull secrets that name or select a granted account, in no order.
async fn using_account(
    conn: &mut PgConnection,
    caller: &Identity,
    errors: &mut FieldErrors,
    name: Option<&Name>,
) -> Result<Option<Vec<Uuid>>, ServiceError> {
    let Some(name) = name else { return Ok(None) };
    let found = storage::accounts::find(conn, name).await?;
    let found = found.filter(|account| caller.grants.include_account(account.name.as_str(), account.labels.as_map()));
    let unknown = || Invalid::new(format!("there is no registry account named `{name}`"));
    let Some(account) = errors.take("account", found.ok_or_else(unknown)) else { return Ok(None) };
    let mut ids = storage::pull_secrets::ids_naming(conn, &[account.id]).await?;
    let selecting = storage::pull_secrets::selecting(conn, &[account.labels.as_map()]).await?.into_iter();
    ids.extend(selecting.filter(|(_, selector)| selector.matches(account.labels.as_map())).map(|(id, _)| id));
    Ok(Some(ids))
}
