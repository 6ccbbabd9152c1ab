//! Names the pull secrets that hold the Secrets of conflicts, as far as a caller may see them.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use super::visible;
use crate::{
    domain::{
        caller::Identity,
        names::Name,
        pull_secret::TargetState,
        reconcile::{Holder, TargetError},
    },
    service::ServiceError,
    storage::{
        self, PgConnection,
        pull_secrets::StoredPullSecret,
        targets::{holders::Contested, listing::ShownTarget},
    },
};

/// Returns the holder of a Secret, by the pull secret that its label names.
pub(in crate::service) async fn holder(
    conn: &mut PgConnection,
    caller: &Identity,
    label: Option<Uuid>,
) -> Result<Holder, ServiceError> {
    let Some(id) = label else { return Ok(Holder::Foreign) };
    let found = storage::pull_secrets::find_many(conn, &[id]).await?;
    if found.is_empty() {
        return Ok(Holder::Foreign);
    }
    let name = visible(conn, caller, found).await?.pop().map(|holder| holder.name);
    Ok(Holder::PullSecret(name))
}

/// Names the visible pull secrets that hold the Secrets of targets in conflict.
///
/// The worker records no name: whether a reader may know it depends on the reader.
pub(super) async fn name_holders(
    conn: &mut PgConnection,
    caller: &Identity,
    targets: &mut [ShownTarget],
) -> Result<(), ServiceError> {
    let conflicts = targets.iter().filter(|target| is_conflict(target));
    let names: BTreeSet<Name> = conflicts.filter_map(|target| Name::parse(&target.pull_secret).ok()).collect();
    for name in names {
        if let Some(stored) = storage::pull_secrets::find(conn, &name).await? {
            name_holders_of(conn, caller, &stored, targets).await?;
        }
    }
    Ok(())
}

async fn name_holders_of(
    conn: &mut PgConnection,
    caller: &Identity,
    stored: &StoredPullSecret,
    targets: &mut [ShownTarget],
) -> Result<(), ServiceError> {
    let is_of = |target: &&mut ShownTarget| is_conflict(target) && target.pull_secret == stored.name.as_str();
    let mut conflicts: Vec<&mut ShownTarget> = targets.iter_mut().filter(is_of).collect();
    let secret = &stored.declaration.secret_name;
    let keys = conflicts.iter().map(|target| (target.cluster.as_str(), target.namespace.as_str()));
    let held = storage::targets::holders::list(conn, stored.id, secret, keys).await?;
    let ids: Vec<Uuid> = held.iter().map(|one| one.holder).collect();
    let holders = storage::pull_secrets::find_many(conn, &ids).await?;
    let holders = visible(conn, caller, holders).await?;
    let names: HashMap<Uuid, _> = holders.into_iter().map(|holder| (holder.id, holder.name)).collect();
    for Contested { cluster, namespace, holder } in held {
        let Some(name) = names.get(&holder) else { continue };
        for target in conflicts.iter_mut().filter(|one| one.cluster == cluster && one.namespace == namespace) {
            let conflict = TargetError::conflict(secret, &Holder::PullSecret(Some(name.clone())));
            target.last_error_detail = Some(conflict.detail);
        }
    }
    Ok(())
}

fn is_conflict(target: &ShownTarget) -> bool {
    target.state == TargetState::Conflict.as_str()
}
