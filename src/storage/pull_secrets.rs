//! Pull secrets as they are declared, what they use, and how their generations grow. Their targets are in [`super::targets`].

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool, types::Json};
use uuid::Uuid;

use crate::{
    domain::{
        invalid::{FieldErrors, Invalid},
        names::Name,
        pull_secret::{Declaration, Document},
        selector::{LabelSelector, LabelSelectorDocument},
    },
    storage::{PageRequest, StorageError, corrupt, notifications::Notifications, on_name_taken},
};

const TABLE: &str = "pull_secrets";

/// What is notified when there is something to do.
const CHANNEL: &str = "regcred_pull_secrets";
/// What `pg_stat_activity` shows of a connection that hears of it.
const WAKES_APPLICATION: &str = "regcred wakes";
/// What is notified when something was done, with the ids of the pull secrets.
const PROGRESS_CHANNEL: &str = "regcred_pull_secret_progress";
/// What `pg_stat_activity` shows of a connection that hears of it.
const PROGRESS_APPLICATION: &str = "regcred progress";
/// So many ids fit into a notification.
const PROGRESS_IDS_MAX: usize = 200;

/// Taken shared by whoever changes accounts, and exclusively by whoever declares a selector of accounts, so that neither
/// misses the other.
const SELECTORS_LOCK: i64 = 0x7265_6763_7265_6405;

/// A pull secret as it is stored.
#[derive(Debug, Clone)]
pub struct StoredPullSecret {
    /// Its identity, which its Secrets bear as a label.
    pub id: Uuid,
    /// Unique name.
    pub name: Name,
    /// What is declared.
    pub declaration: Declaration,
    /// Grows with every change of the declaration.
    pub version: i64,
    /// Grows with everything that the Secrets must follow.
    pub generation: i64,
    /// It goes once its last target has gone.
    pub deleted_at: Option<DateTime<Utc>>,
    /// Database time of the creation.
    pub created_at: DateTime<Utc>,
    /// Database time of the last change of the declaration.
    pub updated_at: DateTime<Utc>,
}

struct Row {
    id: Uuid,
    name: String,
    declaration: Json<Value>,
    version: i64,
    generation: i64,
    deleted_at: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

impl TryFrom<Row> for StoredPullSecret {
    type Error = StorageError;

    fn try_from(row: Row) -> Result<Self, StorageError> {
        Ok(Self {
            id: row.id,
            name: Name::parse(&row.name).map_err(corrupt(TABLE, row.id, "name"))?,
            declaration: parse_declaration(row.declaration.0).map_err(corrupt(TABLE, row.id, "declaration"))?,
            version: row.version,
            generation: row.generation,
            deleted_at: row.deleted_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
    }
}

fn parse_declaration(stored: Value) -> Result<Declaration, Invalid> {
    let document: Document = serde_json::from_value(stored).map_err(|_| Invalid::new("is no declaration"))?;
    Declaration::parse(document).map_err(|errors| {
        let first = errors.into_iter().next().map(|error| format!("{}: {}", error.field, error.detail));
        Invalid::new(first.unwrap_or_default())
    })
}

/// Inserts a pull secret, without its targets.
///
/// # Errors
///
/// [`StorageError::NameTaken`] if the name is in use.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.insert", skip_all, fields(pull_secret.id = %id))]
pub async fn insert(
    conn: &mut PgConnection,
    id: Uuid,
    name: &Name,
    declaration: &Declaration,
) -> Result<StoredPullSecret, StorageError> {
    let document = declaration.document();
    sqlx::query_as!(
        Row,
        r#"INSERT INTO pull_secrets (id, name, declaration, account_selector) VALUES ($1, $2, $3, $4)
           RETURNING id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at,
               updated_at"#,
        id,
        name.as_str(),
        Json(&document) as _,
        document.account_selector.as_ref().map(Json) as _,
    )
    .fetch_one(conn)
    .await
    .map_err(on_name_taken("pull_secrets_name_key"))?
    .try_into()
}

/// Stores another declaration, and raises version and generation.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.update", skip_all, fields(pull_secret.id = %id))]
pub async fn update(
    conn: &mut PgConnection,
    id: Uuid,
    declaration: &Declaration,
) -> Result<StoredPullSecret, StorageError> {
    let document = declaration.document();
    sqlx::query_as!(
        Row,
        r#"UPDATE pull_secrets
           SET declaration = $2, account_selector = $3, version = version + 1, generation = generation + 1,
               updated_at = now()
           WHERE id = $1
           RETURNING id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at,
               updated_at"#,
        id,
        Json(&document) as _,
        document.account_selector.as_ref().map(Json) as _,
    )
    .fetch_one(conn)
    .await?
    .try_into()
}

/// Finds a pull secret by name.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or the row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find", skip_all)]
pub async fn find(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets WHERE name = $1"#,
        name.as_str(),
    )
    .fetch_optional(conn)
    .await?
    .map(StoredPullSecret::try_from)
    .transpose()
}

/// Finds a pull secret by name and keeps others from changing it until the transaction ends.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or the row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.lock", skip_all)]
pub async fn lock(conn: &mut PgConnection, name: &Name) -> Result<Option<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets WHERE name = $1 FOR UPDATE"#,
        name.as_str(),
    )
    .fetch_optional(conn)
    .await?
    .map(StoredPullSecret::try_from)
    .transpose()
}

/// Lists pull secrets in the order of their names.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or a row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.list", skip_all)]
pub async fn list(conn: &mut PgConnection, page: &PageRequest) -> Result<Vec<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets WHERE ($1::text IS NULL OR name > $1) ORDER BY name LIMIT $2"#,
        page.after,
        page.limit,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredPullSecret::try_from)
    .collect()
}

/// The versions of these pull secrets: what was read before at the same version is still right.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.versions", skip_all)]
pub async fn versions(conn: &mut PgConnection, ids: &[Uuid]) -> Result<BTreeMap<Uuid, i64>, StorageError> {
    let rows = sqlx::query!("SELECT id, version FROM pull_secrets WHERE id = ANY($1)", ids).fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.id, row.version)).collect())
}

/// Finds pull secrets by id, in no particular order. One whose row is damaged, or of a newer version of regcred, is left out and logged:
/// it keeps no other one from being worked on.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find_many", skip_all)]
pub async fn find_many(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<StoredPullSecret>, StorageError> {
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets WHERE id = ANY($1)"#,
        ids,
    )
    .fetch_all(conn)
    .await?;
    let is_damaged = |error: &StorageError| tracing::error!(%error, "a pull secret cannot be worked on");
    Ok(rows.into_iter().filter_map(|row| StoredPullSecret::try_from(row).inspect_err(is_damaged).ok()).collect())
}

/// Whether there is a pull secret of this id.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.exists", skip_all)]
pub async fn exists(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    let exists = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM pull_secrets WHERE id = $1) AS "exists!""#, id);
    Ok(exists.fetch_one(conn).await?)
}

/// Says that a pull secret is to go, once its targets have gone.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.retire", skip_all, fields(pull_secret.id = %id))]
pub async fn retire(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secrets
         SET deleted_at = coalesce(deleted_at, now()), version = version + 1, generation = generation + 1,
             updated_at = now(), account_selector = NULL
         WHERE id = $1",
        id,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!("DELETE FROM pull_secret_accounts WHERE pull_secret_id = $1", id).execute(&mut *conn).await?;
    // Nothing is selected any more.
    sqlx::query!("UPDATE pull_secret_clusters SET selects = false WHERE pull_secret_id = $1", id).execute(conn).await?;
    Ok(())
}

/// Deletes a pull secret that is to go, if it has no target any more.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.delete_empty", skip_all, fields(pull_secret.id = %id))]
pub async fn delete_empty(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    let deleted = sqlx::query!(
        "DELETE FROM pull_secrets WHERE id = $1 AND deleted_at IS NOT NULL
             AND NOT EXISTS (SELECT FROM pull_secret_targets WHERE pull_secret_id = $1)",
        id,
    )
    .execute(conn)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Deletes all pull secrets that are to go and have no target any more: a process that ended between the last target and
/// [`delete_empty`] left them.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.delete_all_empty", skip_all)]
pub async fn delete_all_empty(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!(
        "DELETE FROM pull_secrets WHERE deleted_at IS NOT NULL
             AND NOT EXISTS (SELECT FROM pull_secret_targets WHERE pull_secret_id = pull_secrets.id)"
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// An account that a declaration names.
#[derive(Debug)]
pub struct NamedAccount {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Finds accounts by name, and keeps others from deleting them until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find_accounts", skip_all)]
pub async fn find_accounts(conn: &mut PgConnection, names: &[&str]) -> Result<Vec<NamedAccount>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, name, labels AS "labels: Json<BTreeMap<String, String>>" FROM registry_accounts
           WHERE name = ANY($1::text[]) ORDER BY name FOR KEY SHARE"#,
        names as _,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| NamedAccount { id: row.id, name: row.name, labels: row.labels.0 }).collect())
}

/// Finds accounts by name, to see whether they are granted.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.look_at_accounts", skip_all)]
pub async fn look_at_accounts(conn: &mut PgConnection, names: &[&str]) -> Result<Vec<NamedAccount>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, name, labels AS "labels: Json<BTreeMap<String, String>>" FROM registry_accounts
           WHERE name = ANY($1::text[])"#,
        names as _,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| NamedAccount { id: row.id, name: row.name, labels: row.labels.0 }).collect())
}

/// Finds clusters by name, and keeps others from deleting them until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find_clusters", skip_all)]
pub async fn find_clusters(conn: &mut PgConnection, names: &[&str]) -> Result<BTreeMap<String, Uuid>, StorageError> {
    let rows = sqlx::query!(
        "SELECT id, name FROM clusters WHERE name = ANY($1::text[]) ORDER BY name FOR KEY SHARE",
        names as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.name, row.id)).collect())
}

/// Stores which accounts a declaration names.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.set_accounts", skip_all, fields(pull_secret.id = %id))]
pub async fn set_accounts(conn: &mut PgConnection, id: Uuid, accounts: &[Uuid]) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM pull_secret_accounts WHERE pull_secret_id = $1", id).execute(&mut *conn).await?;
    sqlx::query!(
        "INSERT INTO pull_secret_accounts (pull_secret_id, account_id) SELECT $1, unnest($2::uuid[])",
        id,
        accounts,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Stores which clusters a declaration names, and has the namespaces of those looked at in which it selects by label.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.set_clusters", skip_all, fields(pull_secret.id = %id))]
pub async fn set_clusters(
    conn: &mut PgConnection,
    id: Uuid,
    clusters: &[Uuid],
    selects: &[bool],
) -> Result<(), StorageError> {
    sqlx::query!("DELETE FROM pull_secret_clusters WHERE pull_secret_id = $1 AND cluster_id <> ALL($2)", id, clusters)
        .execute(&mut *conn)
        .await?;
    sqlx::query!(
        "INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
         SELECT $1, one.id, one.selects FROM unnest($2::uuid[], $3::boolean[]) AS one (id, selects)
         ON CONFLICT (pull_secret_id, cluster_id) DO UPDATE SET selects = excluded.selects",
        id,
        clusters,
        selects,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "INSERT INTO cluster_comparisons (cluster_id)
         SELECT cluster_id FROM pull_secret_clusters WHERE pull_secret_id = $1 AND selects ORDER BY cluster_id
         ON CONFLICT (cluster_id) DO UPDATE SET next_at = now()",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Waits for those who change accounts, and lets them wait: called before a selector of accounts is stored.
pub async fn lock_selectors(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", SELECTORS_LOCK).execute(conn).await?;
    Ok(())
}

/// Waits for those who store selectors of accounts: called before an account is changed whose labels select it.
pub async fn lock_selectors_shared(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock_shared($1)", SELECTORS_LOCK).execute(conn).await?;
    Ok(())
}

/// The pull secrets that name an account, by name.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or a row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.naming_account", skip_all)]
pub async fn naming_account(conn: &mut PgConnection, account: Uuid) -> Result<Vec<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets
           WHERE id IN (SELECT pull_secret_id FROM pull_secret_accounts WHERE account_id = $1) ORDER BY name"#,
        account,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredPullSecret::try_from)
    .collect()
}

/// The pull secrets that go to a cluster, or are still to be removed there, by name.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or a row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.using_cluster", skip_all)]
pub async fn using_cluster(conn: &mut PgConnection, cluster: Uuid) -> Result<Vec<StoredPullSecret>, StorageError> {
    sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secrets
           WHERE id IN (
               SELECT pull_secret_id FROM pull_secret_clusters WHERE cluster_id = $1
               UNION SELECT pull_secret_id FROM pull_secret_targets WHERE cluster_id = $1
           ) ORDER BY name"#,
        cluster,
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(StoredPullSecret::try_from)
    .collect()
}

/// The pull secrets that select accounts by label, with their selectors: those whose `matchLabels` fit one of these sets of labels.
///
/// # Errors
///
/// [`StorageError`] if Postgres cannot be asked or a row is damaged.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.selecting", skip_all)]
pub async fn selecting(
    conn: &mut PgConnection,
    labels: &[&BTreeMap<String, String>],
) -> Result<Vec<(Uuid, LabelSelector)>, StorageError> {
    let labels: Vec<Json<&BTreeMap<String, String>>> = labels.iter().map(|one| Json(*one)).collect();
    let rows = sqlx::query!(
        r#"SELECT id, account_selector AS "selector!: Json<LabelSelectorDocument>" FROM pull_secrets
           WHERE account_selector IS NOT NULL AND account_selector -> 'matchLabels' <@ ANY($1::jsonb[])"#,
        &labels as _,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let mut errors = FieldErrors::default();
            let selector = row.selector.0.parse(&mut errors, "selector");
            let damaged = || corrupt(TABLE, row.id, "account_selector")(Invalid::new("is no label selector"));
            Ok((row.id, selector.ok_or_else(damaged)?))
        })
        .collect()
}

/// Those of these pull secrets that name one of these accounts.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.ids_naming", skip_all)]
pub async fn ids_naming(conn: &mut PgConnection, accounts: &[Uuid]) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "SELECT DISTINCT pull_secret_id FROM pull_secret_accounts WHERE account_id = ANY($1)",
        accounts,
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Raises the generation of pull secrets and of all their targets, which are due with that; and wakes the workers.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.raise", skip_all)]
pub async fn bump_generation(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), StorageError> {
    if ids.is_empty() {
        return Ok(());
    }
    // In one order, so that two who raise do not wait for each other in a circle.
    sqlx::query!("SELECT id FROM pull_secrets WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE", ids)
        .fetch_all(&mut *conn)
        .await?;
    sqlx::query!("UPDATE pull_secrets SET generation = generation + 1 WHERE id = ANY($1)", ids)
        .execute(&mut *conn)
        .await?;
    super::targets::lock(&mut *conn, ids).await?;
    sqlx::query!(
        "UPDATE pull_secret_targets AS target
         SET generation = pull_secrets.generation, state = 'pending', attempts = 0, next_attempt_at = now(),
             pending_since = coalesce(pending_since, now())
         FROM pull_secrets
         WHERE pull_secrets.id = target.pull_secret_id AND pull_secrets.id = ANY($1)",
        ids,
    )
    .execute(&mut *conn)
    .await?;
    notify(conn).await
}

/// Wakes the workers of all replicas when the transaction commits: once, however often it is said in one.
pub async fn notify(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_notify($1, '')", CHANNEL).execute(conn).await?;
    Ok(())
}

/// A connection of its own on which [`notify`] is heard.
pub struct Wakes(Notifications);

impl Wakes {
    /// Connects beside `pool`, with its options, and begins to listen.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if Postgres cannot be reached within `timeout`, or refuses.
    pub async fn listen(pool: &PgPool, timeout: Duration) -> Result<Self, StorageError> {
        Ok(Self(Notifications::listen(pool, WAKES_APPLICATION, &[CHANNEL], timeout).await?))
    }

    /// Waits for the next wake, `patience` at most; whether there was one.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost, and with it perhaps a wake.
    pub async fn next(&mut self, patience: Duration) -> Result<bool, StorageError> {
        let woken = self.0.next(patience).await?.is_some();
        // One is enough for all that came meanwhile.
        while self.0.next_arrived().is_some() {}
        Ok(woken)
    }
}

/// Tells whoever listens which pull secrets got on: one notification for all of them.
pub async fn announce_progress(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), StorageError> {
    let ids: Vec<String> = ids.iter().map(Uuid::to_string).collect();
    let payload = if ids.len() > PROGRESS_IDS_MAX { String::new() } else { ids.join(",") };
    sqlx::query!("SELECT pg_notify($1, $2)", PROGRESS_CHANNEL, payload).execute(conn).await?;
    Ok(())
}

/// Which pull secrets got on, or are about to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// These.
    Of(Vec<Uuid>),
    /// Any of them.
    OfAny,
}

impl Progress {
    fn parse(payload: &str) -> Self {
        payload.split(',').map(Uuid::parse_str).collect::<Result<_, _>>().map_or(Self::OfAny, Self::Of)
    }
}

/// A connection of its own on which [`announce_progress`] and [`notify`] are heard.
pub struct ProgressListener(Notifications);

impl ProgressListener {
    /// Connects beside `pool`, with its options, and begins to listen.
    ///
    /// # Errors
    ///
    /// [`StorageError`] if Postgres cannot be reached within `timeout`, or refuses.
    pub async fn connect(pool: &PgPool, timeout: Duration) -> Result<Self, StorageError> {
        let channels = [CHANNEL, PROGRESS_CHANNEL];
        Ok(Self(Notifications::listen(pool, PROGRESS_APPLICATION, &channels, timeout).await?))
    }

    /// Waits for news, `patience` at most; `None` if there was none.
    ///
    /// # Errors
    ///
    /// [`StorageError::Unavailable`] if the connection is lost, and with it perhaps some news.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Progress>, StorageError> {
        Ok(self.0.next(patience).await?.as_deref().map(Progress::parse))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_that_is_not_understood_is_anybodys() {
        let (one, two) = (Uuid::now_v7(), Uuid::now_v7());
        assert_eq!(Progress::parse(&format!("{one},{two}")), Progress::Of(vec![one, two]));
        for payload in ["", "x", ",", &format!("{one},")] {
            assert_eq!(Progress::parse(payload), Progress::OfAny, "{payload}");
        }
    }
}
