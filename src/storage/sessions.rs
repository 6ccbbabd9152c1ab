//! Sessions of the web console.
//!
//! A session lives for 8 hours, and ends after 30 minutes without a request. Every statement
//! ignores ended ones.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    domain::{
        identity_provider::{ClientId, ProviderConfig},
        invalid::Invalid,
        session::{Person, SessionOwner},
    },
    storage::{PgConnection, StorageError, corrupt, identity_providers},
};

/// A session, without the secret of its token.
#[derive(Debug, Clone)]
pub struct Session {
    /// Id.
    pub id: Uuid,
    /// Caller that it acts for.
    pub owner: SessionOwner,
    /// HMAC of its token.
    pub mac: Vec<u8>,
    /// Creation time.
    pub created_at: DateTime<Utc>,
    /// Time of the last request, up to a minute late.
    pub last_used_at: DateTime<Utc>,
    /// Time at which it ends, even if it is in use.
    pub expires_at: DateTime<Utc>,
    /// Address that it was created from.
    pub source_ip: Option<String>,
    /// Whether `last_used_at` is more than a minute old.
    pub is_stale: bool,
}

/// New session.
#[derive(Debug)]
pub struct NewRow<'a> {
    /// Id.
    pub id: Uuid,
    /// HMAC of its token.
    pub mac: &'a [u8],
    /// Address that it is created from.
    pub source_ip: Option<&'a str>,
}

struct SessionRow {
    id: Uuid,
    api_key_id: Option<Uuid>,
    identity_provider_id: Option<Uuid>,
    subject: Option<String>,
    claims: Option<String>,
    mac: Vec<u8>,
    created_at: DateTime<Utc>,
    last_used_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
    source_ip: Option<String>,
    is_stale: bool,
}

impl TryFrom<SessionRow> for Session {
    type Error = StorageError;

    fn try_from(row: SessionRow) -> Result<Self, StorageError> {
        let owner = match (row.api_key_id, row.identity_provider_id, row.subject, row.claims) {
            (Some(id), None, None, None) => SessionOwner::ApiKey(id),
            (None, Some(provider_id), Some(subject), Some(claims)) => {
                SessionOwner::Person(Person { provider_id, subject, claims })
            }
            _ => return Err(corrupt("sessions", row.id, "api_key_id")(Invalid::new("must have one owner"))),
        };
        Ok(Self {
            id: row.id,
            owner,
            mac: row.mac,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
            expires_at: row.expires_at,
            source_ip: row.source_ip,
            is_stale: row.is_stale,
        })
    }
}

/// Inserts a session of an API key, whose row is locked.
#[tracing::instrument(level = "debug", name = "db.sessions.insert", skip_all, fields(session.id = %new.id))]
pub async fn insert(conn: &mut PgConnection, api_key_id: Uuid, new: &NewRow<'_>) -> Result<Session, StorageError> {
    // So that concurrent sign-ins cannot deadlock when they delete the oldest sessions.
    sqlx::query_as!(
        SessionRow,
        r#"WITH key AS MATERIALIZED (
               SELECT id FROM api_keys WHERE id = $2 FOR NO KEY UPDATE
           )
           INSERT INTO sessions (id, api_key_id, mac, source_ip)
           SELECT $1, key.id, $3, $4 FROM key
           RETURNING id, api_key_id, identity_provider_id, subject, claims, mac, created_at, last_used_at,
               created_at + interval '8 hours' AS "expires_at!", source_ip, false AS "is_stale!""#,
        new.id,
        api_key_id,
        new.mac,
        new.source_ip,
    )
    .fetch_one(conn)
    .await?
    .try_into()
}

/// Inserts a session of a person, whose provider's row is locked. `None` if the provider does not exist,
/// or its issuer, CA or client are not those of `config`, which the person signed in with: a change of
/// them ends all sessions.
#[tracing::instrument(level = "debug", name = "db.sessions.insert_person", skip_all, fields(session.id = %new.id))]
pub async fn insert_person(
    conn: &mut PgConnection,
    person: &Person,
    config: &ProviderConfig,
    new: &NewRow<'_>,
) -> Result<Option<Session>, StorageError> {
    // As above, with the row of the provider: a change that ends its sessions waits, or is seen.
    sqlx::query_as!(
        SessionRow,
        r#"WITH provider AS MATERIALIZED (
               SELECT id FROM identity_providers
               WHERE id = $2 AND login_client_id = $7 AND issuer = $8 AND ca_certificate IS NOT DISTINCT FROM $9
               FOR NO KEY UPDATE
           )
           INSERT INTO sessions (id, identity_provider_id, subject, claims, mac, source_ip)
           SELECT $1, provider.id, $3, $4, $5, $6 FROM provider
           RETURNING id, api_key_id, identity_provider_id, subject, claims, mac, created_at, last_used_at,
               created_at + interval '8 hours' AS "expires_at!", source_ip, false AS "is_stale!""#,
        new.id,
        person.provider_id,
        person.subject,
        person.claims,
        new.mac,
        new.source_ip,
        config.login.as_ref().map(ClientId::as_str),
        identity_providers::issuer(config),
        identity_providers::ca_certificate(config),
    )
    .fetch_optional(conn)
    .await?
    .map(Session::try_from)
    .transpose()
}

/// Finds a session that has not ended.
#[tracing::instrument(level = "debug", name = "db.sessions.find", skip_all)]
pub async fn find(conn: &mut PgConnection, id: Uuid) -> Result<Option<Session>, StorageError> {
    sqlx::query_as!(
        SessionRow,
        r#"SELECT id, api_key_id, identity_provider_id, subject, claims, mac, created_at, last_used_at,
               created_at + interval '8 hours' AS "expires_at!", source_ip,
               last_used_at < now() - interval '1 minute' AS "is_stale!"
           FROM sessions
           WHERE id = $1 AND created_at > now() - interval '8 hours' AND last_used_at > now() - interval '30 minutes'"#,
        id,
    )
    .fetch_optional(conn)
    .await?
    .map(Session::try_from)
    .transpose()
}

/// Lists the sessions of an owner that have not ended, newest first.
#[tracing::instrument(level = "debug", name = "db.sessions.list", skip_all)]
pub async fn list(conn: &mut PgConnection, owner: &SessionOwner, limit: i64) -> Result<Vec<Session>, StorageError> {
    let (api_key_id, provider_id, subject) = keys(owner);
    let found = sqlx::query_as!(
        SessionRow,
        r#"SELECT id, api_key_id, identity_provider_id, subject, claims, mac, created_at, last_used_at,
               created_at + interval '8 hours' AS "expires_at!", source_ip,
               last_used_at < now() - interval '1 minute' AS "is_stale!"
           FROM sessions
           WHERE (api_key_id = $1 OR (identity_provider_id = $2 AND subject = $3))
               AND created_at > now() - interval '8 hours' AND last_used_at > now() - interval '30 minutes'
           ORDER BY created_at DESC, id DESC LIMIT $4"#,
        api_key_id,
        provider_id,
        subject,
        limit,
    );
    found.fetch_all(conn).await?.into_iter().map(Session::try_from).collect()
}

/// A session with the name of its API key or identity provider.
#[derive(Debug)]
pub struct NamedSession {
    /// The session.
    pub session: Session,
    /// Name of the API key or of the identity provider.
    pub name: String,
}

/// Lists the newest sessions of all owners that have not ended.
#[tracing::instrument(level = "debug", name = "db.sessions.list_all", skip_all)]
pub async fn list_all(conn: &mut PgConnection, limit: i64) -> Result<Vec<NamedSession>, StorageError> {
    let found = sqlx::query!(
        r#"SELECT s.id, s.api_key_id, s.identity_provider_id, s.subject, s.claims, s.mac, s.created_at, s.last_used_at,
               s.created_at + interval '8 hours' AS "expires_at!", s.source_ip,
               s.last_used_at < now() - interval '1 minute' AS "is_stale!", coalesce(k.name, p.name) AS "name!"
           FROM sessions s
               LEFT JOIN api_keys k ON k.id = s.api_key_id
               LEFT JOIN identity_providers p ON p.id = s.identity_provider_id
           WHERE s.created_at > now() - interval '8 hours' AND s.last_used_at > now() - interval '30 minutes'
           ORDER BY s.created_at DESC, s.id DESC LIMIT $1"#,
        limit,
    );
    let named = found.fetch_all(conn).await?.into_iter().map(|r| {
        let row = SessionRow {
            id: r.id,
            api_key_id: r.api_key_id,
            identity_provider_id: r.identity_provider_id,
            subject: r.subject,
            claims: r.claims,
            mac: r.mac,
            created_at: r.created_at,
            last_used_at: r.last_used_at,
            expires_at: r.expires_at,
            source_ip: r.source_ip,
            is_stale: r.is_stale,
        };
        Ok(NamedSession { session: row.try_into()?, name: r.name })
    });
    named.collect()
}

/// Columns that identify an owner.
fn keys(owner: &SessionOwner) -> (Option<Uuid>, Option<Uuid>, Option<&str>) {
    let person = owner.person();
    (owner.api_key_id(), person.map(|person| person.provider_id), person.map(|person| person.subject.as_str()))
}

/// Notes a request of a session.
#[tracing::instrument(level = "debug", name = "db.sessions.touch", skip_all, fields(session.id = %id))]
pub async fn touch(conn: &mut PgConnection, id: Uuid) -> Result<(), StorageError> {
    // Again only if it is stale: of concurrent requests, one writes.
    sqlx::query!(
        "UPDATE sessions SET last_used_at = now() WHERE id = $1 AND last_used_at < now() - interval '1 minute'",
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Deletes a session of an owner. Returns `false` if there is none.
#[tracing::instrument(level = "debug", name = "db.sessions.delete", skip_all, fields(session.id = %id))]
pub async fn delete(conn: &mut PgConnection, id: Uuid, owner: &SessionOwner) -> Result<bool, StorageError> {
    let (api_key_id, provider_id, subject) = keys(owner);
    let deleted = sqlx::query!(
        "DELETE FROM sessions
         WHERE id = $1 AND (api_key_id = $2 OR (identity_provider_id = $3 AND subject = $4))",
        id,
        api_key_id,
        provider_id,
        subject,
    );
    Ok(deleted.execute(conn).await?.rows_affected() > 0)
}

/// Deletes a session of any owner. Returns `false` if there is none.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_any", skip_all, fields(session.id = %id))]
pub async fn delete_any(conn: &mut PgConnection, id: Uuid) -> Result<bool, StorageError> {
    Ok(sqlx::query!("DELETE FROM sessions WHERE id = $1", id).execute(conn).await?.rows_affected() > 0)
}

/// Deletes all sessions of an owner and returns their ids.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_all", skip_all)]
pub async fn delete_all(conn: &mut PgConnection, owner: &SessionOwner) -> Result<Vec<Uuid>, StorageError> {
    let (api_key_id, provider_id, subject) = keys(owner);
    let deleted = sqlx::query_scalar!(
        "DELETE FROM sessions WHERE api_key_id = $1 OR (identity_provider_id = $2 AND subject = $3) RETURNING id",
        api_key_id,
        provider_id,
        subject,
    );
    Ok(deleted.fetch_all(conn).await?)
}

/// Deletes the oldest sessions of the owner of a new one, so that `kept` stay with it. Returns the ids
/// of those that had not ended. The row of the owner must be locked.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_excess", skip_all, fields(session.id = %new))]
pub async fn delete_excess(
    conn: &mut PgConnection,
    new: Uuid,
    owner: &SessionOwner,
    kept: i64,
) -> Result<Vec<Uuid>, StorageError> {
    let (api_key_id, provider_id, subject) = keys(owner);
    // A sign-in that waited for the lock is not the newest one, and stays all the same.
    let deleted = sqlx::query_scalar!(
        "WITH excess AS (
             DELETE FROM sessions WHERE id IN (
                 SELECT id FROM sessions
                 WHERE id <> $1 AND (api_key_id = $2 OR (identity_provider_id = $3 AND subject = $4))
                 ORDER BY created_at DESC, id DESC OFFSET $5
             )
             RETURNING id, created_at, last_used_at
         )
         SELECT id FROM excess
         WHERE created_at > now() - interval '8 hours' AND last_used_at > now() - interval '30 minutes'",
        new,
        api_key_id,
        provider_id,
        subject,
        kept - 1,
    );
    Ok(deleted.fetch_all(conn).await?)
}

/// Deletes the sessions of all people who signed in through a provider. Returns the ids of those that
/// had not ended.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_of_provider", skip_all)]
pub async fn delete_of_provider(conn: &mut PgConnection, provider_id: Uuid) -> Result<Vec<Uuid>, StorageError> {
    let deleted = sqlx::query_scalar!(
        "WITH deleted AS (
             DELETE FROM sessions WHERE identity_provider_id = $1 RETURNING id, created_at, last_used_at
         )
         SELECT id FROM deleted
         WHERE created_at > now() - interval '8 hours' AND last_used_at > now() - interval '30 minutes'",
        provider_id,
    );
    Ok(deleted.fetch_all(conn).await?)
}

/// Deletes at most `limit` sessions that have ended by their age. Skips locked ones.
#[tracing::instrument(level = "debug", name = "db.sessions.delete_ended", skip_all)]
pub async fn delete_ended(conn: &mut PgConnection, limit: i64) -> Result<(), StorageError> {
    sqlx::query!(
        "DELETE FROM sessions WHERE id IN (
             SELECT id FROM sessions WHERE created_at <= now() - interval '8 hours'
             ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        limit,
    )
    .execute(conn)
    .await?;
    Ok(())
}
