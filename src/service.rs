//! Use cases: each is one transaction, and knows nothing of HTTP.

use sqlx::{PgPool, Postgres, pool::PoolConnection};

use crate::{
    clients::cluster::ClusterError,
    crypto::{
        api_key::CryptoError,
        sealer::{OpenError, SealError},
    },
    domain::{
        docker_config::RenderError,
        invalid::{FieldError, Invalid},
        names::Name,
        verification::Finding,
    },
    service::audit::AuditError,
    storage::StorageError,
};

pub mod accounts;
pub mod api_keys;
pub mod audit;
pub mod clusters;
pub mod docker_configs;
pub mod health;
pub mod identity_providers;
pub mod imports;
pub mod master_keys;
pub mod progress;
pub mod pull_secrets;
pub mod rbac;
pub mod reconcile;
pub mod row_cache;
pub mod secrets;
pub mod tokens;
pub mod verification;

/// Everything that a use case may fail with.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// These fields of the request were refused.
    #[error("the request is not valid")]
    Invalid(Vec<FieldError>),
    /// There is no such resource.
    #[error("there is no {kind} named `{name}`")]
    NotFound {
        /// What was looked for.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// There is such a resource, and for this caller there is none: he reads the same as for [`Self::NotFound`], and the
    /// audit record something else.
    #[error("there is no {kind} named `{name}`")]
    Hidden {
        /// What was looked for.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// These accounts are not there, or not for this caller.
    #[error("the request is not valid")]
    UnknownAccounts {
        /// Where they stand in the request.
        errors: Vec<FieldError>,
        /// Their names.
        names: Vec<Name>,
    },
    /// What was asked for is not done, since it cannot be recorded.
    #[error("nothing was done, since it could not be recorded in the audit record")]
    Audit(#[source] AuditError),
    /// The caller's role includes this, and his grants do not include the name.
    #[error("your grants do not include a {kind} named `{name}`{as_it_is}")]
    NotGranted {
        /// What it would be.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What of it beside its name matters to grants; empty, or with a space before it.
        as_it_is: &'static str,
    },
    /// Nobody could make API keys any more.
    #[error("this is the last admin's key, or the last one that does not expire; make another one first")]
    LastAdmin,
    /// Something uses it.
    #[error("the {kind} `{name}` is used by {}; change or delete {} first", used_by(.by, *.hidden), if .by.len() + .hidden == 1 { "it" } else { "them" })]
    InUse {
        /// What it is.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Paths of what uses it, without `/v1/`, as far as the caller may see them.
        by: Vec<String>,
        /// How many more there are.
        hidden: usize,
    },
    /// The caller has as many streams of events as one may.
    #[error("you have {most} streams of events open, which is as many as one may: end one of them")]
    TooManyStreams {
        /// How many one may have.
        most: usize,
    },
    /// This process has as many streams of events as it takes.
    #[error("this process has as many streams of events as it takes: try again later, or ask with `Prefer: wait`")]
    StreamsExhausted,
    /// The pull secret is on its way out.
    #[error("the pull secret `{0}` is being deleted: its Secrets are being removed, and then the name is free")]
    Deleting(String),
    /// Another resource of that kind has the name.
    #[error("the name `{0}` is in use")]
    NameTaken(String),
    /// Another identity provider is meant by the same tokens.
    #[error("another identity provider has this audience: one token would be meant for both")]
    AudienceTaken,
    /// A cluster that tokens are believed to, and that somebody would lead elsewhere who may not decide on tokens.
    #[error(
        "the cluster `{name}` says whose tokens are good for {}: only who may change these may lead it to another server",
        .by.join(", ")
    )]
    Trusted {
        /// Name of the cluster.
        name: String,
        /// Paths of what believes it, without `/v1/`.
        by: Vec<String>,
    },
    /// The resource was changed since the caller read it.
    #[error("the resource is at version {current}, not at the one that `If-Match` names")]
    Stale {
        /// The version that is stored.
        current: i64,
    },
    /// No docker config can be made of these accounts.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The API server refused, or could not be reached.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The login did not prove to work, and the caller wants nothing stored that does not.
    #[error("nothing was stored, since the login was not verified ({}): {}", .0.result, .0.detail)]
    VerificationFailed(Finding),
    /// Postgres refused, or could not be reached.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A stored secret did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A secret could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A key could not be made or checked.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// Work beside the requests did not come to its end.
    #[error("a task ended early")]
    Task(#[from] tokio::task::JoinError),
}

impl From<Vec<FieldError>> for ServiceError {
    fn from(errors: Vec<FieldError>) -> Self {
        Self::Invalid(errors)
    }
}

impl From<sqlx::Error> for ServiceError {
    fn from(error: sqlx::Error) -> Self {
        Self::Storage(error.into())
    }
}

impl ServiceError {
    /// One refused field.
    fn field(field: &str, detail: impl Into<Invalid>) -> Self {
        Self::Invalid(vec![FieldError::new(field, detail.into())])
    }
}

/// Names at most ten of them.
fn used_by(names: &[String], hidden: usize) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN) + hidden;
    match (shown.is_empty(), more) {
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} and {more} more", shown.join(", ")),
        (true, 1) => "something that you may not see".to_owned(),
        (true, more) => format!("{more} things that you may not see"),
    }
}

/// What the caller believes the version of a resource to be; `None` where he does not care.
pub type ExpectedVersion = Option<i64>;

fn check_version(expected: ExpectedVersion, current: i64) -> Result<(), ServiceError> {
    match expected {
        Some(expected) if expected != current => Err(ServiceError::Stale { current }),
        _ => Ok(()),
    }
}

/// Does what may take a processor for long, such as reading a document that somebody made to be hard to read, while other
/// requests are served.
async fn spawn_blocking<T, F>(work: F) -> Result<T, ServiceError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, ServiceError> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await?
}

async fn connection(pool: &PgPool) -> Result<PoolConnection<Postgres>, StorageError> {
    Ok(pool.acquire().await?)
}
