//! Column `pull_secrets.left_out`: selected accounts that are not in the document, because another
//! one has their key.

use std::collections::{BTreeMap, HashMap};

use sqlx::types::Json;
use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// An account that was left out.
#[derive(Debug)]
pub struct LeftOutAccount {
    /// Name of the account.
    pub name: String,
    /// Labels of the account.
    pub labels: BTreeMap<String, String>,
}

/// Records the accounts that the document of a generation leaves out, in order of their ids. Does
/// nothing if the pull secret has another generation by now.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.record_left_out", skip_all, fields(pull_secret.id = %id))]
pub async fn record(conn: &mut PgConnection, id: Uuid, generation: i64, accounts: &[Uuid]) -> Result<(), StorageError> {
    sqlx::query!(
        "UPDATE pull_secrets SET left_out = $3 WHERE id = $1 AND generation = $2 AND left_out <> $3",
        id,
        generation,
        accounts,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lists the accounts that the documents of pull secrets leave out, by name.
#[tracing::instrument(level = "debug", name = "db.pull_secrets.list_left_out", skip_all)]
pub async fn list(
    conn: &mut PgConnection,
    pull_secrets: &[Uuid],
) -> Result<HashMap<Uuid, Vec<LeftOutAccount>>, StorageError> {
    // Without a selector the column is not maintained.
    let rows = sqlx::query!(
        r#"SELECT pull_secrets.id, account.name, account.labels AS "labels: Json<BTreeMap<String, String>>"
           FROM pull_secrets JOIN registry_accounts AS account ON account.id = ANY (pull_secrets.left_out)
           WHERE pull_secrets.id = ANY ($1) AND pull_secrets.account_selector IS NOT NULL
           ORDER BY account.name"#,
        pull_secrets,
    )
    .fetch_all(conn)
    .await?;
    let mut left_out: HashMap<Uuid, Vec<LeftOutAccount>> = HashMap::new();
    for row in rows {
        left_out.entry(row.id).or_default().push(LeftOutAccount { name: row.name, labels: row.labels.0 });
    }
    Ok(left_out)
}
