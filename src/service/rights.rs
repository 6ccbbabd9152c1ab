//! The rights that pull secrets need in a cluster: for whoever gives them, and for whoever looks whether they are there.

use std::collections::BTreeMap;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    domain::{
        caller::Identity,
        names::Name,
        rights::{Leftover, Needs, Placement},
    },
    service::{ServiceError, connection, pull_secrets},
    storage::{self, pull_secrets::StoredPullSecret},
};

/// A pull secret and the rights that it needs in a cluster.
#[derive(Debug)]
pub struct Needed {
    /// Its name.
    pub name: Name,
    /// The rights.
    pub needs: Needs,
}

/// What the pull secrets need that go to a cluster, by name, for whoever has the database.
///
/// # Errors
///
/// [`ServiceError::NotFound`] if there is no cluster of that name.
pub async fn needed_in(pool: &PgPool, cluster: &Name) -> Result<Vec<Needed>, ServiceError> {
    let mut conn = connection(pool).await?;
    let stored = storage::clusters::find(&mut conn, cluster).await?;
    let stored = stored.ok_or_else(|| ServiceError::NotFound { kind: "cluster", name: cluster.to_string() })?;
    let users = storage::pull_secrets::using_cluster(&mut conn, stored.id).await?;
    let leftovers = storage::targets::leftovers(&mut conn, stored.id, None).await?;
    Ok(all_needed(cluster, &users, &leftovers))
}

/// As [`needed_in`], of those pull secrets that a caller may see; and whether that is all of it, of which there is a bound.
pub(super) async fn needed_by_visible(
    conn: &mut PgConnection,
    caller: &Identity,
    (id, cluster): (Uuid, &Name),
    leftovers_max: usize,
) -> Result<(Vec<Needed>, bool), ServiceError> {
    let users = storage::pull_secrets::using_cluster(conn, id).await?;
    let users = pull_secrets::visible(conn, caller, users).await?;
    if users.is_empty() {
        return Ok((Vec::new(), true));
    }
    let limit = i64::try_from(leftovers_max).unwrap_or(i64::MAX);
    let leftovers = storage::targets::leftovers(conn, id, Some(limit)).await?;
    let is_all = leftovers.values().map(Vec::len).sum::<usize>() < leftovers_max;
    Ok((all_needed(cluster, &users, &leftovers), is_all))
}

fn all_needed(cluster: &Name, users: &[StoredPullSecret], leftovers: &BTreeMap<Uuid, Vec<Leftover>>) -> Vec<Needed> {
    let needed = users.iter().map(|user| {
        let placement = Placement {
            declaration: user.deleted_at.is_none().then_some(&user.declaration),
            leftovers: leftovers.get(&user.id).map_or(&[][..], Vec::as_slice),
        };
        Needed { name: user.name.clone(), needs: Needs::of(cluster, &placement) }
    });
    needed.filter(|one| !one.needs.is_empty()).collect()
}
