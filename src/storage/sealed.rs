//! Columns with sealed values, for operations on all of them: `master-key rotate` and `list`. Also
//! the mark that binds new values to their destinations.

use std::fmt;

use uuid::Uuid;

use crate::{
    domain::{
        registry::RegistryScope,
        sealed::{
            Ca, ClusterDestination, Field, LoginDestination, MintDestination, RegistryDestination, SealForm, Sealed,
            Slot,
        },
    },
    storage::{PgConnection, StorageError, accounts, clusters, corrupt, identity_providers, mints},
};

/// Lock that transactions hold shared while they seal without knowing of the mark. Also in the
/// function `lock_sealed_values_mark`.
const MARK_LOCK: i64 = 0x7265_6763_7265_6415;
/// Rows that test a key. More than one, because an edit of a row makes its value unreadable.
const SAMPLES: i64 = 5;
/// Age of a complete binding at which unbound values are refused. Every row that was read before
/// is out of use by then: the row cache trusts a row for seconds.
const REFUSAL_DELAY_SECONDS: i32 = 30;

/// Column with sealed values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealedColumn {
    /// Passwords of registry accounts.
    AccountPassword,
    /// Tokens and private keys of clusters.
    ClusterCredential,
    /// Secrets of the sources of minted accounts.
    MintSecret,
    /// Secrets of the clients for signing in.
    LoginSecret,
}

impl SealedColumn {
    /// All columns.
    pub const ALL: [Self; 4] = [Self::AccountPassword, Self::ClusterCredential, Self::MintSecret, Self::LoginSecret];

    /// Returns the form of new values, given that of the database. No release knows one of the newer
    /// columns that does not know bound values.
    #[must_use]
    pub const fn form(self, form: SealForm) -> SealForm {
        match self {
            Self::AccountPassword | Self::ClusterCredential => form,
            Self::MintSecret | Self::LoginSecret => SealForm::Bound,
        }
    }

    const fn place(self) -> (&'static str, &'static str) {
        match self {
            Self::AccountPassword => (accounts::TABLE, "password"),
            Self::ClusterCredential => (clusters::TABLE, "credential"),
            Self::MintSecret => (mints::TABLE, "secret"),
            Self::LoginSecret => (identity_providers::TABLE, "login_secret"),
        }
    }

    fn slot(self, id: Uuid, destination: Vec<Field>) -> Slot {
        let (table, column) = self.place();
        Slot { table, column, id, destination }
    }

    /// Returns the slot of an account's password.
    #[must_use]
    pub fn account_password(id: Uuid, destination: &RegistryDestination<'_>) -> Slot {
        Self::AccountPassword.slot(id, destination.fields())
    }

    /// Returns the slot of a cluster's credential.
    #[must_use]
    pub fn cluster_credential(id: Uuid, destination: &ClusterDestination<'_>) -> Slot {
        Self::ClusterCredential.slot(id, destination.fields())
    }

    /// Returns the slot of the secret of an account's source.
    #[must_use]
    pub fn mint_secret(id: Uuid, source: &str, registry: &RegistryDestination<'_>) -> Slot {
        Self::MintSecret.slot(id, MintDestination { source, registry: *registry }.fields())
    }

    /// Returns the slot of the secret of a provider's client.
    #[must_use]
    pub fn login_secret(id: Uuid, destination: &LoginDestination<'_>) -> Slot {
        Self::LoginSecret.slot(id, destination.fields())
    }
}

impl fmt::Display for SealedColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (table, column) = self.place();
        write!(f, "{table}.{column}")
    }
}

/// Sealed value of a row.
#[derive(Debug)]
pub struct SealedRow {
    /// Primary key of the row.
    pub id: Uuid,
    /// Slot of the value, or why the row's destination does not parse.
    pub slot: Result<Slot, StorageError>,
    /// Sealed value.
    pub sealed: Sealed,
}

struct AccountRow {
    id: Uuid,
    password: Vec<u8>,
    password_key_id: String,
    registry: String,
    plain_http: bool,
    ca_digest: Option<Vec<u8>>,
}

impl From<AccountRow> for SealedRow {
    fn from(row: AccountRow) -> Self {
        let registry = RegistryScope::parse(&row.registry).map_err(corrupt(accounts::TABLE, row.id, "registry"));
        let ca = row.ca_digest.and_then(|digest| digest.try_into().ok()).map(Ca::Digest);
        let slot = registry.map(|registry| {
            let destination = RegistryDestination { authority: registry.authority(), plain_http: row.plain_http, ca };
            SealedColumn::account_password(row.id, &destination)
        });
        Self { id: row.id, slot, sealed: Sealed { key_id: row.password_key_id, bytes: row.password } }
    }
}

struct ClusterRow {
    id: Uuid,
    credential: Vec<u8>,
    credential_key_id: String,
    server: Option<String>,
    ca_digest: Option<Vec<u8>>,
    tls_server_name: Option<String>,
}

impl From<ClusterRow> for SealedRow {
    fn from(row: ClusterRow) -> Self {
        let destination = ClusterDestination {
            server: row.server.as_deref(),
            ca: row.ca_digest.and_then(|digest| digest.try_into().ok()).map(Ca::Digest),
            tls_server_name: row.tls_server_name.as_deref(),
        };
        let slot = SealedColumn::cluster_credential(row.id, &destination);
        Self { id: row.id, slot: Ok(slot), sealed: Sealed { key_id: row.credential_key_id, bytes: row.credential } }
    }
}

struct MintRow {
    account_id: Uuid,
    secret: Vec<u8>,
    secret_key_id: String,
    source: String,
    registry: String,
    plain_http: bool,
    ca_digest: Option<Vec<u8>>,
}

impl From<MintRow> for SealedRow {
    fn from(row: MintRow) -> Self {
        let id = row.account_id;
        let registry = RegistryScope::parse(&row.registry).map_err(corrupt(accounts::TABLE, id, "registry"));
        let ca = row.ca_digest.and_then(|digest| digest.try_into().ok()).map(Ca::Digest);
        let slot = registry.map(|registry| {
            let destination = RegistryDestination { authority: registry.authority(), plain_http: row.plain_http, ca };
            SealedColumn::mint_secret(id, &row.source, &destination)
        });
        Self { id, slot, sealed: Sealed { key_id: row.secret_key_id, bytes: row.secret } }
    }
}

struct LoginRow {
    id: Uuid,
    login_secret: Vec<u8>,
    login_secret_key_id: String,
    issuer: String,
    client_id: String,
    ca_digest: Option<Vec<u8>>,
}

impl From<LoginRow> for SealedRow {
    fn from(row: LoginRow) -> Self {
        let ca = row.ca_digest.and_then(|digest| digest.try_into().ok()).map(Ca::Digest);
        let destination = LoginDestination { issuer: &row.issuer, ca, client_id: &row.client_id };
        let slot = SealedColumn::login_secret(row.id, &destination);
        Self { id: row.id, slot: Ok(slot), sealed: Sealed { key_id: row.login_secret_key_id, bytes: row.login_secret } }
    }
}

/// Locks the next rows, ordered by id, whose stored key id is not `key_id`.
pub async fn lock_sealed_otherwise(
    conn: &mut PgConnection,
    column: SealedColumn,
    key_id: &str,
    after: Uuid,
    limit: i64,
) -> Result<Vec<SealedRow>, StorageError> {
    Ok(match column {
        SealedColumn::AccountPassword => sqlx::query_as!(
            AccountRow,
            "SELECT id, password, password_key_id, registry, plain_http,
                 sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest
             FROM registry_accounts
             WHERE password_key_id <> $1 AND id > $2 ORDER BY id LIMIT $3 FOR UPDATE",
            key_id,
            after,
            limit,
        )
        .fetch_all(conn)
        .await?
        .into_iter()
        .map(SealedRow::from)
        .collect(),
        SealedColumn::ClusterCredential => sqlx::query_as!(
            ClusterRow,
            r#"SELECT id, credential AS "credential!", credential_key_id AS "credential_key_id!", server,
                   sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest, tls_server_name
               FROM clusters
               WHERE credential_key_id <> $1 AND id > $2 ORDER BY id LIMIT $3 FOR UPDATE"#,
            key_id,
            after,
            limit,
        )
        .fetch_all(conn)
        .await?
        .into_iter()
        .map(SealedRow::from)
        .collect(),
        SealedColumn::MintSecret => sqlx::query_as!(
            MintRow,
            "SELECT account_id, secret, secret_key_id, source, registry, plain_http,
                 sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest
             FROM account_mints JOIN registry_accounts ON id = account_id
             WHERE secret_key_id <> $1 AND account_id > $2 ORDER BY account_id LIMIT $3 FOR UPDATE OF account_mints",
            key_id,
            after,
            limit,
        )
        .fetch_all(conn)
        .await?
        .into_iter()
        .map(SealedRow::from)
        .collect(),
        SealedColumn::LoginSecret => lock_logins(conn, key_id, after, limit).await?,
    })
}

async fn lock_logins(
    conn: &mut PgConnection,
    key_id: &str,
    after: Uuid,
    limit: i64,
) -> Result<Vec<SealedRow>, StorageError> {
    let rows = sqlx::query_as!(
        LoginRow,
        r#"SELECT id, login_secret AS "login_secret!", login_secret_key_id AS "login_secret_key_id!",
               issuer AS "issuer!", login_client_id AS "client_id!",
               sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest
           FROM identity_providers
           WHERE login_secret_key_id <> $1 AND id > $2 ORDER BY id LIMIT $3 FOR UPDATE"#,
        key_id,
        after,
        limit,
    );
    Ok(rows.fetch_all(conn).await?.into_iter().map(SealedRow::from).collect())
}

/// Replaces sealed values in one statement. Keeps the versions of the rows, because nothing changes
/// for callers.
pub async fn replace(
    conn: &mut PgConnection,
    column: SealedColumn,
    ids: &[Uuid],
    values: &[Sealed],
) -> Result<(), StorageError> {
    let key_ids: Vec<&str> = values.iter().map(|sealed| sealed.key_id.as_str()).collect();
    let values: Vec<&[u8]> = values.iter().map(|sealed| sealed.bytes.as_slice()).collect();
    match column {
        SealedColumn::AccountPassword => {
            sqlx::query!(
                "UPDATE registry_accounts SET password = new.value, password_key_id = new.key_id
                 FROM unnest($1::uuid[], $2::bytea[], $3::text[]) AS new (id, value, key_id)
                 WHERE registry_accounts.id = new.id",
                ids,
                &values as &[&[u8]],
                &key_ids as &[&str],
            )
            .execute(conn)
            .await?
        }
        SealedColumn::ClusterCredential => {
            sqlx::query!(
                "UPDATE clusters SET credential = new.value, credential_key_id = new.key_id
                 FROM unnest($1::uuid[], $2::bytea[], $3::text[]) AS new (id, value, key_id)
                 WHERE clusters.id = new.id",
                ids,
                &values as &[&[u8]],
                &key_ids as &[&str],
            )
            .execute(conn)
            .await?
        }
        SealedColumn::MintSecret => {
            sqlx::query!(
                "UPDATE account_mints SET secret = new.value, secret_key_id = new.key_id
                 FROM unnest($1::uuid[], $2::bytea[], $3::text[]) AS new (id, value, key_id)
                 WHERE account_id = new.id",
                ids,
                &values as &[&[u8]],
                &key_ids as &[&str],
            )
            .execute(conn)
            .await?
        }
        SealedColumn::LoginSecret => {
            sqlx::query!(
                "UPDATE identity_providers SET login_secret = new.value, login_secret_key_id = new.key_id
                 FROM unnest($1::uuid[], $2::bytea[], $3::text[]) AS new (id, value, key_id)
                 WHERE identity_providers.id = new.id",
                ids,
                &values as &[&[u8]],
                &key_ids as &[&str],
            )
            .execute(conn)
            .await?
        }
    };
    Ok(())
}

/// Rows of a column with the same stored key id.
#[derive(Debug)]
pub struct KeyUse {
    /// Column of the rows.
    pub column: SealedColumn,
    /// Number of rows.
    pub rows: i64,
    /// Some of the rows, to test the key.
    pub samples: Vec<SealedRow>,
}

impl KeyUse {
    /// Returns the id of the master key and the form of the values.
    #[must_use]
    pub fn key(&self) -> (&str, SealForm) {
        SealForm::split(self.samples.first().map_or("", |sample| &sample.sealed.key_id))
    }
}

/// Groups samples, which are ordered by key id.
fn group(column: SealedColumn, samples: impl IntoIterator<Item = (i64, SealedRow)>) -> Vec<KeyUse> {
    let mut uses: Vec<KeyUse> = Vec::new();
    for (rows, sample) in samples {
        match uses.last_mut() {
            Some(last) if last.samples.iter().all(|other| other.sealed.key_id == sample.sealed.key_id) => {
                last.samples.push(sample);
            }
            _ => uses.push(KeyUse { column, rows, samples: vec![sample] }),
        }
    }
    uses
}

/// Returns the use of each master key and form, by column.
pub async fn key_uses(conn: &mut PgConnection) -> Result<Vec<KeyUse>, StorageError> {
    let accounts = sqlx::query!(
        r#"SELECT id, password, password_key_id, registry, plain_http,
               sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest, rows AS "rows!"
           FROM (
               SELECT *, count(*) OVER (PARTITION BY password_key_id) AS rows,
                   row_number() OVER (PARTITION BY password_key_id) AS place
               FROM registry_accounts
           ) AS one
           WHERE place <= $1 ORDER BY password_key_id"#,
        SAMPLES,
    )
    .fetch_all(&mut *conn)
    .await?;
    let clusters = sqlx::query!(
        r#"SELECT id, credential AS "credential!", credential_key_id AS "credential_key_id!", server,
               sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest, tls_server_name, rows AS "rows!"
           FROM (
               SELECT *, count(*) OVER (PARTITION BY credential_key_id) AS rows,
                   row_number() OVER (PARTITION BY credential_key_id) AS place
               FROM clusters WHERE credential IS NOT NULL
           ) AS one
           WHERE place <= $1 ORDER BY credential_key_id"#,
        SAMPLES,
    )
    .fetch_all(&mut *conn)
    .await?;
    let mints = mint_samples(conn).await?;
    let logins = login_samples(conn).await?;
    let accounts = accounts.into_iter().map(|r| {
        let row = AccountRow {
            id: r.id,
            password: r.password,
            password_key_id: r.password_key_id,
            registry: r.registry,
            plain_http: r.plain_http,
            ca_digest: r.ca_digest,
        };
        (r.rows, row.into())
    });
    let clusters = clusters.into_iter().map(|r| {
        let row = ClusterRow {
            id: r.id,
            credential: r.credential,
            credential_key_id: r.credential_key_id,
            server: r.server,
            ca_digest: r.ca_digest,
            tls_server_name: r.tls_server_name,
        };
        (r.rows, row.into())
    });
    let mut uses = group(SealedColumn::AccountPassword, accounts);
    uses.extend(group(SealedColumn::ClusterCredential, clusters));
    uses.extend(group(SealedColumn::MintSecret, mints));
    uses.extend(group(SealedColumn::LoginSecret, logins));
    Ok(uses)
}

/// Samples of each key's secrets of minted accounts, each with the number of rows of the key.
async fn mint_samples(conn: &mut PgConnection) -> Result<Vec<(i64, SealedRow)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT account_id, secret, secret_key_id, source, registry, plain_http,
               sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest, rows AS "rows!"
           FROM (
               SELECT *, count(*) OVER (PARTITION BY secret_key_id) AS rows,
                   row_number() OVER (PARTITION BY secret_key_id) AS place
               FROM account_mints
           ) AS one JOIN registry_accounts ON id = account_id
           WHERE place <= $1 ORDER BY secret_key_id"#,
        SAMPLES,
    );
    let samples = rows.fetch_all(conn).await?.into_iter().map(|r| {
        let row = MintRow {
            account_id: r.account_id,
            secret: r.secret,
            secret_key_id: r.secret_key_id,
            source: r.source,
            registry: r.registry,
            plain_http: r.plain_http,
            ca_digest: r.ca_digest,
        };
        (r.rows, row.into())
    });
    Ok(samples.collect())
}

/// Samples of each key's secrets of clients for signing in, each with the number of rows of the key.
async fn login_samples(conn: &mut PgConnection) -> Result<Vec<(i64, SealedRow)>, StorageError> {
    let rows = sqlx::query!(
        r#"SELECT id, login_secret AS "login_secret!", login_secret_key_id AS "login_secret_key_id!",
               issuer AS "issuer!", login_client_id AS "client_id!",
               sha256(convert_to(ca_certificate, 'UTF8')) AS ca_digest, rows AS "rows!"
           FROM (
               SELECT *, count(*) OVER (PARTITION BY login_secret_key_id) AS rows,
                   row_number() OVER (PARTITION BY login_secret_key_id) AS place
               FROM identity_providers WHERE login_secret IS NOT NULL
           ) AS one
           WHERE place <= $1 ORDER BY login_secret_key_id"#,
        SAMPLES,
    );
    let samples = rows.fetch_all(conn).await?.into_iter().map(|r| {
        let row = LoginRow {
            id: r.id,
            login_secret: r.login_secret,
            login_secret_key_id: r.login_secret_key_id,
            issuer: r.issuer,
            client_id: r.client_id,
            ca_digest: r.ca_digest,
        };
        (r.rows, row.into())
    });
    Ok(samples.collect())
}

/// Counts the values that are not bound to their destinations.
#[tracing::instrument(level = "debug", name = "db.sealed_values.count_unbound", skip_all)]
pub async fn count_unbound(conn: &mut PgConnection) -> Result<i64, StorageError> {
    Ok(sqlx::query_scalar!(
        r#"SELECT (SELECT count(*) FROM registry_accounts WHERE password_key_id NOT LIKE '%+bound')
               + (SELECT count(*) FROM clusters WHERE credential_key_id NOT LIKE '%+bound')
               + (SELECT count(*) FROM account_mints WHERE secret_key_id NOT LIKE '%+bound')
               + (SELECT count(*) FROM identity_providers WHERE login_secret_key_id NOT LIKE '%+bound') AS "count!""#
    )
    .fetch_one(conn)
    .await?)
}

/// State of the binding of sealed values to their destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Binding {
    /// New values are sealed unbound.
    Unmarked,
    /// New values are sealed bound.
    Marked,
    /// All values have been bound.
    Complete,
    /// All values have been bound for longer than a process uses a row that it read.
    Settled,
}

/// Returns the state of the binding.
#[tracing::instrument(level = "debug", name = "db.sealed_values.find_binding", skip_all)]
pub async fn find_binding(conn: &mut PgConnection) -> Result<Binding, StorageError> {
    let row = sqlx::query!(
        r#"SELECT completed_at IS NOT NULL AS "is_complete!",
               coalesce(completed_at < now() - $1::integer * interval '1 second', false) AS "is_settled!"
           FROM sealed_values_binding"#,
        REFUSAL_DELAY_SECONDS,
    )
    .fetch_optional(conn)
    .await?;
    Ok(match row {
        None => Binding::Unmarked,
        Some(row) if row.is_settled => Binding::Settled,
        Some(row) if row.is_complete => Binding::Complete,
        Some(_) => Binding::Marked,
    })
}

/// Whether new values are to be sealed bound. Must precede all other locks of the transaction that
/// seals: [`mark_bound`] waits for it, and others wait for that.
#[tracing::instrument(level = "debug", name = "db.sealed_values.lock_mark", skip_all)]
pub async fn lock_mark(conn: &mut PgConnection) -> Result<bool, StorageError> {
    Ok(sqlx::query_scalar!(r#"SELECT lock_sealed_values_mark() AS "is_marked!""#).fetch_one(conn).await?)
}

/// Marks the database: every transaction that seals after this one commits sees it.
#[tracing::instrument(name = "db.sealed_values.mark_bound", skip_all)]
pub async fn mark_bound(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", MARK_LOCK).execute(&mut *conn).await?;
    sqlx::query!("INSERT INTO sealed_values_binding DEFAULT VALUES ON CONFLICT DO NOTHING").execute(conn).await?;
    Ok(())
}

/// Notes that all values have been bound.
#[tracing::instrument(name = "db.sealed_values.complete_binding", skip_all)]
pub async fn complete_binding(conn: &mut PgConnection) -> Result<(), StorageError> {
    sqlx::query!("UPDATE sealed_values_binding SET completed_at = now() WHERE completed_at IS NULL")
        .execute(conn)
        .await?;
    Ok(())
}
