//! Identity providers: create, find, list, change and remove.

use std::{iter, sync::Arc};

use uuid::Uuid;

use crate::{
    crypto::sealer::Sealer,
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity},
        identity_provider::{
            AuthMethod, LoginClient, ProviderConfig, ProviderDocument, RuleDocument, api_server_audience,
        },
        invalid::Invalid,
        listing::{ListRequest, Listed, NamePart},
        names::Name,
        sealed::SealForm,
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::{TransactionalAudit, recorded},
        check_version,
        clusters::Clusters,
        connection, idempotency, on_conflict, sessions,
    },
    storage::{
        self, PgConnection, PgPool,
        identity_providers::{StoredProvider, login_slot},
        sealed::SealedColumn,
    },
};

const KIND: &str = "identity provider";

/// Change of a provider. `None` keeps the field. The type cannot change.
#[derive(Debug, Clone, Default)]
pub struct ProviderChange {
    /// New issuer.
    pub issuer: Option<String>,
    /// New CA; `Some(None)` removes it.
    pub ca_certificate: Option<Option<String>>,
    /// New cluster.
    pub cluster: Option<String>,
    /// New audience.
    pub audience: Option<String>,
    /// Whether tokens with further audiences are accepted.
    pub allow_multiple_audiences: Option<bool>,
    /// New types of tokens for other purposes that are accepted.
    pub token_types: Option<Vec<String>>,
    /// New rules; replace all previous ones.
    pub rules: Option<Vec<RuleDocument>>,
    /// New client for signing in; `Some(None)` removes it.
    pub login: Option<Option<LoginClient>>,
}

impl ProviderChange {
    /// JSON names of the fields that the change sets.
    fn fields(&self) -> Vec<&'static str> {
        let fields = [
            ("issuer", self.issuer.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("cluster", self.cluster.is_some()),
            ("audience", self.audience.is_some()),
            ("allowMultipleAudiences", self.allow_multiple_audiences.is_some()),
            ("tokenTypes", self.token_types.is_some()),
            ("rules", self.rules.is_some()),
            ("login", self.login.is_some()),
        ];
        fields.into_iter().filter(|(_, is_set)| *is_set).map(|(field, _)| field).collect()
    }

    /// Merges the change into the stored configuration. The result needs to be validated.
    fn merge_into(self, stored: &ProviderConfig) -> ProviderDocument {
        let (issuer, ca_certificate, cluster) = match &stored.auth_method {
            AuthMethod::Oidc { issuer, ca_certificate } => {
                (Some(issuer.to_string()), ca_certificate.as_ref().map(|ca| ca.as_pem().to_owned()), None)
            }
            AuthMethod::TokenReview { cluster } => (None, None, Some(cluster.to_string())),
        };
        ProviderDocument {
            provider_type: stored.auth_method.provider_type(),
            issuer: self.issuer.or(issuer),
            ca_certificate: self.ca_certificate.unwrap_or(ca_certificate),
            cluster: self.cluster.or(cluster),
            audience: self.audience.unwrap_or_else(|| stored.audience.as_str().to_owned()),
            allow_multiple_audiences: self.allow_multiple_audiences.unwrap_or(stored.allow_multiple_audiences),
            token_types: self.token_types.unwrap_or_else(|| stored.token_types.clone()),
            rules: self.rules.unwrap_or_else(|| stored.rules.iter().map(RuleDocument::from).collect()),
            login: match self.login {
                Some(client) => client.map(|client| client.client_id.to_string()),
                None => stored.login.as_ref().map(ToString::to_string),
            },
        }
    }
}

/// Service for identity providers.
///
/// It checks no grants: only callers with grants of everything may use it
/// ([`Permission::needs_all_grants`](crate::domain::caller::Permission::needs_all_grants),
/// [`Role::takes_grants`](crate::domain::caller::Role::takes_grants)).
#[derive(Clone)]
pub struct IdentityProviders {
    pool: PgPool,
    clusters: Clusters,
    sealer: Arc<Sealer>,
    audit: TransactionalAudit,
}

impl IdentityProviders {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, clusters: Clusters, sealer: Arc<Sealer>, audit: TransactionalAudit) -> Self {
        Self { pool, clusters, sealer, audit }
    }

    /// Creates a provider. `login` is the client of the configuration. An issuer is not contacted; a cluster is asked for its own audiences.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NameTaken`] if the name is in use.
    /// - [`ServiceError::AudienceTaken`] if another provider would accept the same tokens.
    /// - [`ServiceError::Invalid`] if the cluster does not exist, or the audience is its own.
    pub async fn create(
        &self,
        caller: &Call,
        name: &Name,
        config: &ProviderConfig,
        login: Option<&LoginClient>,
    ) -> Result<StoredProvider, ServiceError> {
        self.reject_audience_of_cluster(config).await?;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let cluster_id = lock_review_cluster(&mut tx, config).await?;
        let id = Uuid::now_v7();
        let inserted = storage::identity_providers::insert(&mut tx, id, name, config, cluster_id).await;
        inserted.map_err(on_conflict(name))?;
        if login.is_some() {
            self.store_login(&mut tx, id, config, login).await?;
        }
        let created = storage::identity_providers::find(&mut tx, name)
            .await?
            .ok_or_else(|| ServiceError::not_found(KIND, name))?;
        let event = NewEvent::of(caller, Action::ProviderCreate, Resource::identity_provider(name));
        let details = Details::default().version(created.version);
        let details = details.changes(None, Some(&recorded::provider(&created.config)));
        self.audit.commit(tx, [event.details(details)]).await?;
        Ok(created)
    }

    /// Finds a provider.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`].
    pub async fn find(&self, _caller: &Identity, name: &Name) -> Result<StoredProvider, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        storage::identity_providers::find(&mut conn, name).await?.ok_or_else(|| ServiceError::not_found(KIND, name))
    }

    /// Lists the providers whose name contains a part.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(
        &self,
        _caller: &Identity,
        request: &ListRequest,
        name_part: Option<&NamePart>,
    ) -> Result<Listed<StoredProvider>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::identity_providers::list(&mut conn, request, name_part).await?)
    }

    /// Changes a provider. The change applies to the next request. Without a difference, nothing is
    /// changed.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`].
    /// - [`ServiceError::Stale`] if the provider is not at the expected version.
    /// - [`ServiceError::AudienceTaken`] if another provider would accept the same tokens.
    /// - [`ServiceError::Invalid`] if the changed configuration is not valid.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        change: ProviderChange,
        expected: ExpectedVersion,
    ) -> Result<StoredProvider, ServiceError> {
        let fields = change.fields();
        // Before the transaction, which must not wait for a cluster. If the provider changes in
        // between, the check of each token still holds.
        let stored = self.find(caller, name).await?;
        check_version(expected, stored.version)?;
        self.reject_audience_of_cluster(&ProviderConfig::parse(change.clone().merge_into(&stored.config))?).await?;
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let stored = storage::identity_providers::lock(&mut tx, name)
            .await?
            .ok_or_else(|| ServiceError::not_found(KIND, name))?;
        check_version(expected, stored.version)?;
        let login = change.login.clone();
        let config = ProviderConfig::parse(change.merge_into(&stored.config))?;
        require_secret_for_new_issuer(&stored.config, &config, login.is_some())?;
        // A secret is not compared: an answer would tell whether it is the stored one.
        let is_same_login = login.as_ref().is_none_or(Option::is_none);
        if config == stored.config && is_same_login {
            self.audit.commit(tx, []).await?;
            return Ok(stored);
        }
        let cluster_id = lock_review_cluster(&mut tx, &config).await?;
        let updated = storage::identity_providers::update(&mut tx, stored.id, &config, cluster_id).await;
        updated.map_err(on_conflict(name))?;
        if let Some(login) = &login {
            self.store_login(&mut tx, stored.id, &config, login.as_ref()).await?;
        }
        let ended = if login_slot(stored.id, &stored.config) == login_slot(stored.id, &config) {
            Vec::new()
        } else {
            storage::sessions::delete_of_provider(&mut tx, stored.id).await?
        };
        let changed = storage::identity_providers::find(&mut tx, name)
            .await?
            .ok_or_else(|| ServiceError::not_found(KIND, name))?;
        let event = NewEvent::of(caller, Action::ProviderUpdate, Resource::identity_provider(name));
        let details = Details::default().fields(&fields).version(changed.version);
        let (before, after) = (recorded::provider(&stored.config), recorded::provider(&changed.config));
        let details = details.changes(Some(&before), Some(&after));
        self.audit.commit(tx, with_ended(caller, event.details(details), ended)).await?;
        Ok(changed)
    }

    /// Removes a provider. Every replica rejects its tokens from the next request on.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`].
    /// - [`ServiceError::Stale`] if the provider is not at the expected version.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let stored = storage::identity_providers::lock(&mut tx, name)
            .await?
            .ok_or_else(|| ServiceError::not_found(KIND, name))?;
        check_version(expected, stored.version)?;
        let ended = storage::sessions::delete_of_provider(&mut tx, stored.id).await?;
        storage::identity_providers::delete(&mut tx, stored.id).await?;
        let event = NewEvent::of(caller, Action::ProviderDelete, Resource::identity_provider(name));
        let details = Details::default().version(stored.version);
        let details = details.changes(Some(&recorded::provider(&stored.config)), None);
        self.audit.commit(tx, with_ended(caller, event.details(details), ended)).await?;
        Ok(())
    }

    /// Seals and stores the secret of a client, or removes it.
    async fn store_login(
        &self,
        conn: &mut PgConnection,
        id: Uuid,
        config: &ProviderConfig,
        login: Option<&LoginClient>,
    ) -> Result<(), ServiceError> {
        let sealed = match (login, login_slot(id, config)) {
            (Some(client), Some(slot)) => {
                let form = SealedColumn::LoginSecret.form(SealForm::Bound);
                Some(self.sealer.seal(form, &slot, &client.client_secret)?)
            }
            _ => None,
        };
        let login = config.login.as_ref().zip(sealed.as_ref());
        Ok(storage::identity_providers::set_login(conn, id, login).await?)
    }

    /// Rejects an audience that the API server of the reviewing cluster uses for itself: the
    /// default token of every pod would be accepted. A cluster that does not answer is not asked
    /// again, since each token is checked as well.
    async fn reject_audience_of_cluster(&self, config: &ProviderConfig) -> Result<(), ServiceError> {
        let AuthMethod::TokenReview { cluster } = &config.auth_method else { return Ok(()) };
        let mut conn = connection(&self.pool).await?;
        let Some(cluster) = storage::clusters::find(&mut conn, cluster).await? else { return Ok(()) };
        drop(conn);
        let audience = &config.audience;
        let is_server = cluster.server.as_deref().is_some_and(|server| audience.is_server(server));
        if is_server || self.clusters.own_audiences(&cluster).await?.iter().any(|own| own == audience.as_str()) {
            return Err(ServiceError::field("audience", api_server_audience()));
        }
        Ok(())
    }
}

/// The event of a change, and those of the sessions that it ended.
fn with_ended(caller: &Call, change: NewEvent, ended: Vec<Uuid>) -> Vec<NewEvent> {
    let ended = ended.into_iter().map(|id| sessions::ended_by(caller, id, "identity-provider-changed"));
    iter::once(change).chain(ended).collect()
}

/// Requires the secret of the client again if it would be sent elsewhere: otherwise a writer would
/// redirect a secret that it cannot read.
fn require_secret_for_new_issuer(
    before: &ProviderConfig,
    after: &ProviderConfig,
    has_login: bool,
) -> Result<(), ServiceError> {
    if has_login || after.login.is_none() || before.auth_method == after.auth_method {
        return Ok(());
    }
    let detail = "must be sent again with a new issuer or CA: its secret is sent there";
    Err(ServiceError::field("login", Invalid::new(detail)))
}

/// Locks the cluster that reviews the provider's tokens and returns its id.
async fn lock_review_cluster(conn: &mut PgConnection, config: &ProviderConfig) -> Result<Option<Uuid>, ServiceError> {
    let AuthMethod::TokenReview { cluster } = &config.auth_method else { return Ok(None) };
    // The lock keeps the cluster from being removed, or moved to another server, before the
    // provider is stored.
    let found = storage::clusters::lock(conn, cluster).await?;
    let missing = || {
        ServiceError::field(
            "cluster",
            Invalid::new(format!("there is no cluster named `{cluster}`: register it first")),
        )
    };
    found.map(|cluster| Some(cluster.id)).ok_or_else(missing)
}
