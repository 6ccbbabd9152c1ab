//! Identity providers: create, look up, change, remove.

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        identity_provider::{ProviderConfig, ProviderDocument, RuleDocument, Voucher},
        invalid::Invalid,
        names::Name,
    },
    service::{ExpectedVersion, ServiceError, audit::TransactionalAudit, check_version, connection},
    storage::{self, PageRequest, StorageError, identity_providers::StoredProvider},
};

/// What a caller says about a provider; `None` where he says nothing. The type is for good.
#[derive(Debug, Default)]
pub struct ProviderChange {
    /// Another issuer.
    pub issuer: Option<String>,
    /// Another CA; `Some(None)` takes it away.
    pub ca_certificate: Option<Option<String>>,
    /// Another cluster.
    pub cluster: Option<String>,
    /// Another audience.
    pub audience: Option<String>,
    /// Other rules, all of them.
    pub rules: Option<Vec<RuleDocument>>,
}

impl ProviderChange {
    /// The fields that were said.
    fn fields(&self) -> Vec<&'static str> {
        let said = [
            ("issuer", self.issuer.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("cluster", self.cluster.is_some()),
            ("audience", self.audience.is_some()),
            ("rules", self.rules.is_some()),
        ];
        said.into_iter().filter(|(_, is_said)| *is_said).map(|(field, _)| field).collect()
    }

    /// Puts what was said over what is there. The whole is checked anew.
    fn merge_into(self, stored: &ProviderConfig) -> ProviderDocument {
        let (issuer, ca_certificate, cluster) = match &stored.voucher {
            Voucher::Oidc { issuer, ca_certificate } => {
                (Some(issuer.to_string()), ca_certificate.as_ref().map(|ca| ca.as_pem().to_owned()), None)
            }
            Voucher::TokenReview { cluster } => (None, None, Some(cluster.to_string())),
        };
        ProviderDocument {
            provider_type: stored.voucher.provider_type(),
            issuer: self.issuer.or(issuer),
            ca_certificate: self.ca_certificate.unwrap_or(ca_certificate),
            cluster: self.cluster.or(cluster),
            audience: self.audience.unwrap_or_else(|| stored.audience.as_str().to_owned()),
            rules: self.rules.unwrap_or_else(|| stored.rules.iter().map(RuleDocument::from).collect()),
        }
    }
}

/// The identity providers, for callers. Who may work with them reaches everything:
/// [`Role::takes_grants`](crate::domain::caller::Role::takes_grants).
#[derive(Debug, Clone)]
pub struct IdentityProviders {
    pool: PgPool,
    audit: TransactionalAudit,
}

impl IdentityProviders {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, audit: TransactionalAudit) -> Self {
        Self { pool, audit }
    }

    /// Starts to trust a provider. Nothing is sent to it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if the name is in use, [`ServiceError::AudienceTaken`] if the same tokens would be meant by
    /// another provider, [`ServiceError::Invalid`] if there is no such cluster.
    pub async fn create(
        &self,
        caller: &Call,
        name: &Name,
        config: &ProviderConfig,
    ) -> Result<StoredProvider, ServiceError> {
        let mut tx = self.pool.begin().await?;
        let cluster_id = reviewer(&mut tx, config).await?;
        let inserted = storage::identity_providers::insert(&mut tx, Uuid::now_v7(), name, config, cluster_id).await;
        inserted.map_err(|error| taken(name, error))?;
        let created = storage::identity_providers::find(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        let event = NewEvent::of(caller, Action::ProviderCreate, Resource::identity_provider(name));
        self.audit.commit(tx, [event.details(Details::default().version(created.version))]).await?;
        Ok(created)
    }

    /// Finds a provider.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn find(&self, _caller: &Identity, name: &Name) -> Result<StoredProvider, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        storage::identity_providers::find(&mut conn, name).await?.ok_or_else(|| not_found(name))
    }

    /// Lists providers by name.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(&self, _caller: &Identity, page: &PageRequest) -> Result<Vec<StoredProvider>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::identity_providers::list(&mut conn, page).await?)
    }

    /// Changes a provider. It counts for the next request.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the expected version,
    /// [`ServiceError::Invalid`] if the whole breaks a rule then.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        change: ProviderChange,
        expected: ExpectedVersion,
    ) -> Result<StoredProvider, ServiceError> {
        let fields = change.fields();
        let mut tx = self.pool.begin().await?;
        let stored = storage::identity_providers::lock(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        check_version(expected, stored.version)?;
        let config = ProviderConfig::parse(change.merge_into(&stored.config))?;
        let cluster_id = reviewer(&mut tx, &config).await?;
        let updated = storage::identity_providers::update(&mut tx, stored.id, &config, cluster_id).await;
        updated.map_err(|error| taken(name, error))?;
        let changed = storage::identity_providers::find(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        let event = NewEvent::of(caller, Action::ProviderUpdate, Resource::identity_provider(name));
        let details = Details::default().fields(&fields).version(changed.version);
        self.audit.commit(tx, [event.details(details)]).await?;
        Ok(changed)
    }

    /// Ends the trust in a provider: the next request with one of its tokens is refused, in every replica.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the expected version.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        let stored = storage::identity_providers::lock(&mut tx, name).await?.ok_or_else(|| not_found(name))?;
        check_version(expected, stored.version)?;
        storage::identity_providers::delete(&mut tx, stored.id).await?;
        let event = NewEvent::of(caller, Action::ProviderDelete, Resource::identity_provider(name));
        self.audit.commit(tx, [event.details(Details::default().version(stored.version))]).await?;
        Ok(())
    }
}

/// The cluster that reviews the tokens, which has to be there.
async fn reviewer(conn: &mut PgConnection, config: &ProviderConfig) -> Result<Option<Uuid>, ServiceError> {
    let Voucher::TokenReview { cluster } = &config.voucher else { return Ok(None) };
    // Locked, so that it is not deleted or led elsewhere meanwhile.
    let found = storage::clusters::lock(conn, cluster).await?;
    let missing = || ServiceError::field("cluster", Invalid::new(format!("there is no cluster named `{cluster}`")));
    found.map(|cluster| Some(cluster.id)).ok_or_else(missing)
}

fn taken(name: &Name, error: StorageError) -> ServiceError {
    match error {
        StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
        StorageError::AudienceTaken => ServiceError::AudienceTaken,
        other => other.into(),
    }
}

fn not_found(name: &Name) -> ServiceError {
    ServiceError::NotFound { kind: "identity provider", name: name.to_string() }
}
