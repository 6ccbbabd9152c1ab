//! Use cases. Each owns its transaction and is independent of HTTP.

use std::time::Duration;

use crate::{
    clients::cluster::ClusterError,
    crypto::{
        api_key::CryptoError,
        sealer::{OpenError, SealError},
    },
    domain::{
        docker_config::RenderError,
        grants::Grants,
        invalid::{FieldError, Invalid},
        mint::MintError,
        names::Name,
        verification::VerificationReport,
    },
    service::{audit::AuditError, idempotency::IdempotencyError},
    storage::{PgConnection, PgPool, StorageError},
};

/// Hides positions of lists. `http` has no access to keys otherwise.
pub use crate::crypto::cursor::CursorKey;

pub mod accounts;
pub mod api_keys;
pub mod audit;
pub mod clusters;
pub mod coverage;
pub mod diagnosis;
pub mod docker_configs;
pub mod health;
pub mod idempotency;
pub mod identity_providers;
pub mod imports;
pub mod keys;
pub mod logins;
pub mod master_keys;
pub mod mints;
pub mod progress;
pub mod pull_secrets;
pub mod rbac;
pub mod reconcile;
pub mod resource_events;
pub mod row_cache;
pub mod secrets;
pub mod sessions;
pub mod summary;
pub mod tokens;
pub mod verification;

/// End of a text about a missing resource, for a caller that cannot tell it from one that is not
/// granted.
pub const OR_NOT_GRANTED: &str = ", or it is not granted to this key: see `GET /v1/me`";

/// Text about a name in a body that no granted resource has. It is the same whether the resource is
/// missing or not granted.
fn no_such(grants: &Grants, kind: &str, name: &str) -> String {
    let or_not_granted = if grants.include_everything() { "" } else { OR_NOT_GRANTED };
    format!("there is no {kind} named `{name}`{or_not_granted}")
}

/// Failure of a use case.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Fields of the request are invalid.
    #[error("the request contains invalid fields")]
    Invalid(Vec<FieldError>),
    /// The resource does not exist.
    #[error("{kind} `{name}` not found")]
    NotFound {
        /// Kind of the resource.
        kind: &'static str,
        /// Name of the resource.
        name: String,
    },
    /// The resource exists, but is not granted to the caller. The response is the same as for
    /// [`Self::NotFound`]; the audit event differs.
    #[error("{kind} `{name}` not found")]
    Hidden {
        /// Kind of the resource.
        kind: &'static str,
        /// Name of the resource.
        name: String,
    },
    /// Accounts, or other resources that a body names, do not exist or are not granted to the
    /// caller.
    #[error("the request contains invalid fields")]
    UnknownAccounts {
        /// Fields that name the accounts.
        errors: Vec<FieldError>,
        /// Names of the accounts.
        names: Vec<Name>,
    },
    /// The request was not performed, because its audit event could not be written.
    #[error("the request was not performed because its audit event could not be written: retry later")]
    Audit(#[source] AuditError),
    /// The caller's role allows the operation, but the caller's grants do not include the resource.
    #[error("your grants do not include the {kind} `{name}`{qualifier}: ask an admin for a grant")]
    NotGranted {
        /// Kind of the resource.
        kind: &'static str,
        /// Name of the resource.
        name: String,
        /// Further property that grants depend on; empty, or starting with a space.
        qualifier: &'static str,
    },
    /// The caller's grants do not include labels that it would add or change.
    #[error("your grants do not include labels of the registry account `{name}`")]
    LabelsNotGranted {
        /// Name of the account.
        name: String,
        /// The labels, as fields.
        errors: Vec<FieldError>,
    },
    /// Without this key no other one could create keys.
    #[error("this is the last admin key, or the last one without expiry: create another admin key first")]
    LastAdmin,
    /// Other resources use the resource.
    #[error("the {kind} `{name}` is used by {}: change or delete {} first", used_by(.by, *.hidden), if .by.len() + .hidden == 1 { "it" } else { "them" })]
    InUse {
        /// Kind of the resource.
        kind: &'static str,
        /// Name of the resource.
        name: String,
        /// Paths of visible users of the resource, without `/v1/`.
        by: Vec<String>,
        /// Number of users that are hidden from the caller.
        hidden: usize,
    },
    /// The caller has reached the limit of event streams per caller.
    #[error("you have {most} event streams open, which is the maximum: close one first")]
    TooManyStreams {
        /// Limit per caller.
        most: usize,
    },
    /// The process has reached its limit of event streams.
    #[error("this process has reached its limit of event streams: retry later, or use `Prefer: wait`")]
    StreamsExhausted,
    /// Callers request more access reviews of a cluster than its API server shall bear.
    #[error("too many access reviews of this cluster were requested: retry later, with fewer namespaces")]
    ReviewsExhausted {
        /// Time after which the request fits the limit.
        retry_after: Duration,
    },
    /// The pull secret is being deleted.
    #[error("the pull secret `{0}` is being deleted: wait until its Secrets are removed")]
    Deleting(String),
    /// Another resource of the kind has the name.
    #[error("the name `{0}` is already in use: choose another name")]
    NameTaken(String),
    /// A request with an idempotency key was not performed.
    #[error(transparent)]
    Idempotency(#[from] IdempotencyError),
    /// Another identity provider accepts the same tokens.
    #[error("another identity provider already uses this audience: choose another audience")]
    AudienceTaken,
    /// Identity providers trust token reviews of the cluster, and the caller may not change them.
    #[error(
        "the cluster `{name}` reviews tokens for {}: changing its server requires the permission to change identity \
         providers",
        .by.join(", ")
    )]
    Trusted {
        /// Name of the cluster.
        name: String,
        /// Paths of the identity providers, without `/v1/`.
        by: Vec<String>,
    },
    /// The resource was changed since the caller read it.
    #[error("the resource is at version {current}, which `If-Match` does not name: read it again and retry")]
    Stale {
        /// Stored version.
        current: i64,
    },
    /// A resource of the name exists, although the caller requires that none does.
    #[error("`{name}` exists, which `If-None-Match: *` does not allow: nothing was changed. Read it and decide again")]
    Exists {
        /// Name of the resource.
        name: String,
    },
    /// The accounts cannot be rendered as a docker config.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The API server refused the call or is unreachable.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The login is not valid, and the caller required a valid one.
    #[error("nothing was stored because the login was not verified ({}): {}", .0.result, .0.detail)]
    VerificationFailed(VerificationReport),
    /// The provider of a minted account issued no login.
    #[error("no login was minted ({}): {}", .0.reason, .0.detail)]
    Mint(MintError),
    /// The mint did not end within the time limit of requests.
    #[error("no login was minted within 20 s: {}", .0.detail)]
    MintTimeout(MintError),
    /// The account has no source.
    #[error("the login of the registry account `{0}` is not minted: set `source` first")]
    NotMinted(String),
    /// Postgres returned an error or is unreachable.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A stored secret did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A secret was not sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A key was not generated or verified.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// A blocking task panicked or was cancelled.
    #[error("a blocking task ended early")]
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
    fn not_found(kind: &'static str, name: &(impl ToString + ?Sized)) -> Self {
        Self::NotFound { kind, name: name.to_string() }
    }

    /// Creates the error of one invalid field.
    fn field(field: &str, detail: impl Into<Invalid>) -> Self {
        Self::Invalid(vec![FieldError::new(field, detail.into())])
    }
}

/// Lists at most ten names.
fn used_by(names: &[String], hidden: usize) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN) + hidden;
    match (shown.is_empty(), more) {
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} and {more} more", shown.join(", ")),
        (true, 1) => "a resource that you may not see".to_owned(),
        (true, more) => format!("{more} resources that you may not see"),
    }
}

/// Version of a resource that the caller expects, from `If-Match`; `None` accepts any.
pub type ExpectedVersion = Option<i64>;

fn check_version(expected: ExpectedVersion, current: i64) -> Result<(), ServiceError> {
    match expected {
        Some(expected) if expected != current => Err(ServiceError::Stale { current }),
        _ => Ok(()),
    }
}

/// Returns a found resource that the caller may see.
///
/// # Errors
///
/// [`ServiceError::NotFound`], or [`ServiceError::Hidden`] if the grants do not include the resource.
fn require_visible<T>(
    kind: &'static str,
    name: &Name,
    found: Option<T>,
    is_granted: impl FnOnce(&T) -> bool,
) -> Result<T, ServiceError> {
    let resource = found.ok_or_else(|| ServiceError::not_found(kind, name))?;
    if is_granted(&resource) { Ok(resource) } else { Err(ServiceError::Hidden { kind, name: name.to_string() }) }
}

/// Maps violated unique constraints of a write to the errors of the API.
fn on_conflict(name: &Name) -> impl FnOnce(StorageError) -> ServiceError {
    move |error| match error {
        StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
        StorageError::AudienceTaken => ServiceError::AudienceTaken,
        other => other.into(),
    }
}

/// Runs CPU-bound work, such as parsing a hostile document, off the request threads.
async fn spawn_blocking<T, F>(work: F) -> Result<T, ServiceError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, ServiceError> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await?
}

async fn connection(pool: &PgPool) -> Result<PgConnection, StorageError> {
    Ok(pool.acquire().await?)
}
