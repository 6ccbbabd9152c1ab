//! Columns with sealed values, for operations on all of them: `master-key rotate` and `list`.

use std::fmt;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    domain::sealed::{Sealed, Slot},
    storage::{StorageError, accounts, clusters},
};

/// Column with sealed values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealedColumn {
    /// Passwords of registry accounts.
    AccountPassword,
    /// Tokens and private keys of clusters.
    ClusterCredential,
}

impl SealedColumn {
    /// All columns.
    pub const ALL: [Self; 2] = [Self::AccountPassword, Self::ClusterCredential];

    /// Returns the slot of this column in a row.
    #[must_use]
    pub const fn slot(self, id: Uuid) -> Slot {
        let (table, column) = match self {
            Self::AccountPassword => (accounts::TABLE, "password"),
            Self::ClusterCredential => (clusters::TABLE, "credential"),
        };
        Slot { table, column, id }
    }
}

impl fmt::Display for SealedColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slot = self.slot(Uuid::nil());
        write!(f, "{}.{}", slot.table, slot.column)
    }
}

/// Sealed value with the id of its row.
#[derive(Debug)]
pub struct SealedRow {
    /// Primary key of the row.
    pub id: Uuid,
    /// Sealed value.
    pub sealed: Sealed,
}

/// Locks the next rows, ordered by id, that were not sealed with `key_id`.
pub async fn lock_sealed_by_other_keys(
    conn: &mut PgConnection,
    column: SealedColumn,
    key_id: &str,
    after: Uuid,
    limit: i64,
) -> Result<Vec<SealedRow>, StorageError> {
    let rows = match column {
        SealedColumn::AccountPassword => sqlx::query!(
            "SELECT id, password, password_key_id FROM registry_accounts
             WHERE password_key_id <> $1 AND id > $2 ORDER BY id LIMIT $3 FOR UPDATE",
            key_id,
            after,
            limit,
        )
        .fetch_all(conn)
        .await?
        .into_iter()
        .map(|row| (row.id, row.password_key_id, row.password))
        .collect::<Vec<_>>(),
        SealedColumn::ClusterCredential => sqlx::query!(
            r#"SELECT id, credential AS "credential!", credential_key_id AS "credential_key_id!" FROM clusters
             WHERE credential_key_id <> $1 AND id > $2 ORDER BY id LIMIT $3 FOR UPDATE"#,
            key_id,
            after,
            limit,
        )
        .fetch_all(conn)
        .await?
        .into_iter()
        .map(|row| (row.id, row.credential_key_id, row.credential))
        .collect(),
    };
    Ok(rows.into_iter().map(|(id, key_id, bytes)| SealedRow { id, sealed: Sealed { key_id, bytes } }).collect())
}

/// Replaces sealed values in one statement. Keeps the versions of the rows, because nothing changes
/// for callers.
pub async fn replace(
    conn: &mut PgConnection,
    column: SealedColumn,
    key_id: &str,
    ids: &[Uuid],
    values: &[Vec<u8>],
) -> Result<(), StorageError> {
    match column {
        SealedColumn::AccountPassword => {
            sqlx::query!(
                "UPDATE registry_accounts SET password = new.value, password_key_id = $1
                 FROM unnest($2::uuid[], $3::bytea[]) AS new (id, value)
                 WHERE registry_accounts.id = new.id",
                key_id,
                ids,
                values,
            )
            .execute(conn)
            .await?
        }
        SealedColumn::ClusterCredential => {
            sqlx::query!(
                "UPDATE clusters SET credential = new.value, credential_key_id = $1
                 FROM unnest($2::uuid[], $3::bytea[]) AS new (id, value)
                 WHERE clusters.id = new.id",
                key_id,
                ids,
                values,
            )
            .execute(conn)
            .await?
        }
    };
    Ok(())
}

/// Rows of a column that were sealed with one master key.
#[derive(Debug)]
pub struct KeyUse {
    /// Column of the rows.
    pub column: SealedColumn,
    /// Number of rows.
    pub rows: i64,
    /// One of the rows, to test the key.
    pub sample: SealedRow,
}

/// Returns the use of each master key by column.
pub async fn key_uses(conn: &mut PgConnection) -> Result<Vec<KeyUse>, StorageError> {
    let accounts = sqlx::query!(
        r#"SELECT DISTINCT ON (password_key_id) id, password, password_key_id,
               count(*) OVER (PARTITION BY password_key_id) AS "rows!"
           FROM registry_accounts"#,
    )
    .fetch_all(&mut *conn)
    .await?;
    let clusters = sqlx::query!(
        r#"SELECT DISTINCT ON (credential_key_id) id, credential AS "credential!",
               credential_key_id AS "credential_key_id!",
               count(*) OVER (PARTITION BY credential_key_id) AS "rows!"
           FROM clusters WHERE credential IS NOT NULL"#,
    )
    .fetch_all(conn)
    .await?;
    let key_use = |column, rows, id, key_id, bytes| KeyUse {
        column,
        rows,
        sample: SealedRow { id, sealed: Sealed { key_id, bytes } },
    };
    let accounts = accounts
        .into_iter()
        .map(|r| key_use(SealedColumn::AccountPassword, r.rows, r.id, r.password_key_id, r.password));
    let clusters = clusters
        .into_iter()
        .map(|r| key_use(SealedColumn::ClusterCredential, r.rows, r.id, r.credential_key_id, r.credential));
    Ok(accounts.chain(clusters).collect())
}
