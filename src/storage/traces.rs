//! Table `pull_secret_traces`: traces of the changes that made the current generations of pull
//! secrets.

use std::collections::HashMap;

use uuid::Uuid;

use crate::storage::{PgConnection, StorageError};

/// Trace of a change.
#[derive(Debug)]
pub struct ChangeTrace {
    /// Generation that the change made.
    pub generation: i64,
    /// Span of the change, as a W3C `traceparent`.
    pub traceparent: String,
}

/// Records the trace of a change that made the current generation of pull secrets. Their rows must
/// be locked.
#[tracing::instrument(level = "debug", name = "db.pull_secret_traces.record", skip_all)]
pub async fn record(conn: &mut PgConnection, pull_secrets: &[Uuid], traceparent: &str) -> Result<(), StorageError> {
    sqlx::query!(
        "INSERT INTO pull_secret_traces (pull_secret_id, generation, traceparent)
         SELECT id, generation, $2 FROM pull_secrets WHERE id = ANY($1)
         ON CONFLICT (pull_secret_id)
         DO UPDATE SET generation = excluded.generation, traceparent = excluded.traceparent",
        pull_secrets,
        traceparent,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Finds the traces of pull secrets. One of an older generation is of an older change.
#[tracing::instrument(level = "debug", name = "db.pull_secret_traces.find", skip_all)]
pub async fn find(conn: &mut PgConnection, pull_secrets: &[Uuid]) -> Result<HashMap<Uuid, ChangeTrace>, StorageError> {
    let rows = sqlx::query!(
        "SELECT pull_secret_id, generation, traceparent FROM pull_secret_traces WHERE pull_secret_id = ANY($1)",
        pull_secrets,
    );
    let rows = rows.fetch_all(conn).await?.into_iter();
    let traces =
        rows.map(|row| (row.pull_secret_id, ChangeTrace { generation: row.generation, traceparent: row.traceparent }));
    Ok(traces.collect())
}
