//! Table `pull_secrets`: declarations, their generations, and the accounts they name
//! (`pull_secret_accounts`).

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Row as _, types::Json};
use uuid::Uuid;

use crate::{
    domain::{
        invalid::{FieldErrors, Invalid},
        names::{Name, NamespaceName, ServiceAccountName},
        pull_secret::{Declaration, Document},
        registry::RegistryScope,
        selector::{LabelSelector, LabelSelectorDocument},
    },
    storage::{PgConnection, StorageError, accounts, corrupt, lists::Sql, on_name_taken, targets, wakeups},
};

pub mod listing;

const TABLE: &str = "pull_secrets";

/// Advisory lock between changes of accounts (shared) and declarations of account selectors
/// (exclusive). Without it, either could miss the other.
const SELECTORS_LOCK: i64 = 0x7265_6763_7265_6405;

/// A stored pull secret.
#[derive(Debug, Clone)]
pub struct StoredPullSecret {
    /// Immutable identifier, a label of its Secrets.
    pub id: Uuid,
    /// Unique name.
    pub name: Name,
    /// The declaration.
    pub declaration: Declaration,
    /// Grows with each change of the declaration.
    pub version: i64,
    /// Grows with each change that its Secrets must follow.
    pub generation: i64,
    /// Time of the deletion. The row remains until the last target is gone.
    pub deleted_at: Option<DateTime<Utc>>,
    /// Time of creation.
    pub created_at: DateTime<Utc>,
    /// Time of the last change of the declaration.
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

pub(super) fn parse_declaration(stored: Value) -> Result<Declaration, Invalid> {
    let document: Document = serde_json::from_value(stored).map_err(|_| Invalid::new("is not a declaration"))?;
    Declaration::parse(document).map_err(|errors| {
        let first = errors.into_iter().next().map(|error| format!("{}: {}", error.field, error.detail));
        Invalid::new(first.unwrap_or_default())
    })
}

/// Inserts a pull secret without targets.
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

/// Replaces the declaration and increments version and generation.
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

/// Finds a pull secret by name and locks it until the transaction ends.
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

/// Lists the pull secrets by name that are declared to be attached to a `ServiceAccount`: at most
/// `limit`. Reads the declarations for the cluster.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.attached_to", skip_all)]
pub async fn attached_to(
    conn: &mut PgConnection,
    cluster_id: Uuid,
    namespace: &NamespaceName,
    service_account: &ServiceAccountName,
    limit: i64,
) -> Result<Vec<StoredPullSecret>, StorageError> {
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT id, name, declaration AS "declaration: _", version, generation, deleted_at, created_at, updated_at
           FROM pull_secret_clusters AS used
           JOIN pull_secrets ON id = used.pull_secret_id
           CROSS JOIN LATERAL (
               SELECT FROM pull_secret_targets AS target
               WHERE target.pull_secret_id = used.pull_secret_id AND target.cluster_id = $1 AND target.namespace = $2
                   AND wanted
               LIMIT 1
           ) AS wanted
           WHERE used.cluster_id = $1 AND declaration -> 'serviceAccounts' ? $3
           ORDER BY name LIMIT $4"#,
        cluster_id,
        namespace.as_str(),
        service_account.as_str(),
        limit,
    );
    rows.fetch_all(conn).await?.into_iter().map(StoredPullSecret::try_from).collect()
}

/// Returns the ids of the pull secrets that place one of these Secrets in a namespace of a cluster.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.ids_placing", skip_all)]
pub async fn ids_placing(
    conn: &mut PgConnection,
    cluster_id: Uuid,
    namespace: &NamespaceName,
    secrets: &[&str],
) -> Result<Vec<Uuid>, StorageError> {
    let secrets: Vec<String> = secrets.iter().map(|name| (*name).to_owned()).collect();
    let mut sql =
        Sql::new("SELECT id FROM pull_secret_clusters AS used JOIN pull_secrets ON id = used.pull_secret_id ");
    sql.push("CROSS JOIN LATERAL (SELECT FROM pull_secret_targets AS target ");
    sql.push("WHERE target.pull_secret_id = used.pull_secret_id AND target.cluster_id = ").push_bind(cluster_id);
    sql.push(" AND target.namespace = ").push_bind(namespace.to_string()).push(" AND wanted LIMIT 1) AS wanted ");
    sql.push("WHERE used.cluster_id = ").push_bind(cluster_id).push(" AND deleted_at IS NULL ");
    sql.push("AND declaration -> 'secret' ->> 'name' = ANY(").push_bind(secrets).push(") ORDER BY name");
    let rows = sql.build().persistent(false).fetch_all(conn).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// Reads the versions of pull secrets. A cached row of the same version is current.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.versions", skip_all)]
pub async fn versions(conn: &mut PgConnection, ids: &[Uuid]) -> Result<BTreeMap<Uuid, i64>, StorageError> {
    let rows = sqlx::query!("SELECT id, version FROM pull_secrets WHERE id = ANY($1)", ids).fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.id, row.version)).collect())
}

/// Finds pull secrets by id, in any order. A row that does not parse is logged and left out.
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
    let is_damaged = |error: &StorageError| tracing::error!(%error, "pull secret skipped");
    Ok(rows.into_iter().filter_map(|row| StoredPullSecret::try_from(row).inspect_err(is_damaged).ok()).collect())
}

/// Whether a pull secret exists.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.exists", skip_all)]
pub async fn exists(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    let exists = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM pull_secrets WHERE id = $1) AS "exists!""#, id);
    Ok(exists.fetch_one(conn).await?)
}

/// Marks a pull secret as deleted. [`delete_empty`] deletes the row.
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
    sqlx::query!("UPDATE pull_secret_clusters SET selects = false WHERE pull_secret_id = $1", id).execute(conn).await?;
    Ok(())
}

/// Deletes the row of a deleted pull secret if no target is left.
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

/// Deletes the rows of all deleted pull secrets without targets. They remain if a process ends
/// before its [`delete_empty`].
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

/// A registry account named by a declaration.
#[derive(Debug)]
pub struct NamedAccount {
    /// Immutable identifier.
    pub id: Uuid,
    /// Unique name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// Finds accounts by name, each with its registry scope, and locks them against deletion until the
/// transaction ends.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.lock_accounts", skip_all)]
pub async fn lock_accounts(
    conn: &mut PgConnection,
    names: &[&str],
) -> Result<Vec<(NamedAccount, RegistryScope)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, name, labels AS "labels: Json<BTreeMap<String, String>>", registry FROM registry_accounts
           WHERE name = ANY($1::text[]) ORDER BY name FOR KEY SHARE"#,
        names as _,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter()
        .map(|row| {
            let scope = RegistryScope::parse(&row.registry).map_err(corrupt(accounts::TABLE, row.id, "registry"))?;
            Ok((NamedAccount { id: row.id, name: row.name, labels: row.labels.0 }, scope))
        })
        .collect()
}

/// Finds accounts by name.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.find_accounts", skip_all)]
pub async fn find_accounts(conn: &mut PgConnection, names: &[&str]) -> Result<Vec<NamedAccount>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, name, labels AS "labels: Json<BTreeMap<String, String>>" FROM registry_accounts
           WHERE name = ANY($1::text[])"#,
        names as _,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| NamedAccount { id: row.id, name: row.name, labels: row.labels.0 }).collect())
}

/// Finds clusters by name and locks them against deletion until the transaction ends.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.lock_clusters", skip_all)]
pub async fn lock_clusters(conn: &mut PgConnection, names: &[&str]) -> Result<BTreeMap<String, Uuid>, StorageError> {
    let rows = sqlx::query!(
        "SELECT id, name FROM clusters WHERE name = ANY($1::text[]) ORDER BY name FOR KEY SHARE",
        names as _
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.name, row.id)).collect())
}

/// Replaces the accounts that a declaration names.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.replace_accounts", skip_all, fields(pull_secret.id = %id))]
pub async fn replace_accounts(conn: &mut PgConnection, id: Uuid, accounts: &[Uuid]) -> Result<(), StorageError> {
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

/// Takes the selectors lock exclusively. Required before an account selector is stored.
pub async fn lock_selectors(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", SELECTORS_LOCK).execute(conn).await?;
    Ok(())
}

/// Takes the selectors lock shared. Required before an account is changed.
pub async fn lock_selectors_shared(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock_shared($1)", SELECTORS_LOCK).execute(conn).await?;
    Ok(())
}

/// Lists the pull secrets that name an account, by name.
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

/// Lists the pull secrets with a target in a cluster, including targets to remove, by name.
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

/// Lists the account selectors whose `matchLabels` are contained in one of these label sets.
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
            let damaged = || corrupt(TABLE, row.id, "account_selector")(Invalid::new("is not a label selector"));
            Ok((row.id, selector.ok_or_else(damaged)?))
        })
        .collect()
}

/// Lists the ids of pull secrets that name one of these accounts.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.ids_naming", skip_all)]
pub async fn ids_naming(conn: &mut PgConnection, accounts: &[Uuid]) -> Result<Vec<Uuid>, StorageError> {
    let ids = sqlx::query_scalar!(
        "SELECT DISTINCT pull_secret_id FROM pull_secret_accounts WHERE account_id = ANY($1)",
        accounts,
    );
    Ok(ids.fetch_all(conn).await?)
}

/// Counts the pull secrets that name each of these accounts. Accounts that none names are absent.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.count_naming", skip_all)]
pub async fn count_naming(conn: &mut PgConnection, accounts: &[Uuid]) -> Result<HashMap<Uuid, u64>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT account_id, count(*) AS "count!" FROM pull_secret_accounts
           WHERE account_id = ANY($1) GROUP BY account_id"#,
        accounts,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(|row| (row.account_id, row.count.unsigned_abs())).collect())
}

/// Increments the generation of pull secrets, makes their targets due, and wakes the workers.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.bump_generation", skip_all)]
pub async fn bump_generation(conn: &mut PgConnection, ids: &[Uuid]) -> Result<(), StorageError> {
    if ids.is_empty() {
        return Ok(());
    }
    // The fixed order prevents deadlocks.
    sqlx::query!("SELECT id FROM pull_secrets WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE", ids)
        .fetch_all(&mut *conn)
        .await?;
    sqlx::query!("UPDATE pull_secrets SET generation = generation + 1 WHERE id = ANY($1)", ids)
        .execute(&mut *conn)
        .await?;
    targets::due::bump_generation(&mut *conn, ids).await?;
    wakeups::wake_workers(conn).await
}

/// Locks a pull secret by id if it is at `version` and returns its generation.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.lock_version", skip_all, fields(pull_secret.id = %id))]
pub async fn lock_version(conn: &mut PgConnection, id: Uuid, version: i64) -> Result<Option<i64>, StorageError> {
    let generation = sqlx::query_scalar!(
        "SELECT generation FROM pull_secrets WHERE id = $1 AND version = $2 AND deleted_at IS NULL FOR NO KEY UPDATE",
        id,
        version,
    );
    Ok(generation.fetch_optional(conn).await?)
}
