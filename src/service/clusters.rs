//! Clusters: register, find, list, change, remove and check; and their API clients.

mod check;
mod credentials;
mod tokens;

pub use credentials::{CredentialMetrics, credential_warnings};

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use secrecy::SecretString;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    clients::cluster::{
        ClusterClient, ClusterClientConfig, ClusterClients, ClusterError, admit, kubeconfig, resolve_in_cluster,
    },
    clock,
    crypto::{
        constant_time,
        sealer::{OpenError, Sealer},
    },
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity, Permission},
        cluster::{AuthType, CaCertificate, ClusterAuth, ClusterConnection, ServerUrl},
        invalid::{FieldError, Invalid},
        listing::{ListRequest, Listed, NamePart},
        names::Name,
        sealed::{SealForm, Sealed},
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::{TransactionalAudit, recorded},
        check_version, connection, idempotency, master_keys, on_conflict, pull_secrets, require_visible,
    },
    storage::{self, PgConnection, PgPool, clusters::StoredCluster, sealed::SealedColumn},
};

use self::check::Checks;

const KIND: &str = "cluster";
/// Time limit for asking a cluster for its own audiences.
const OWN_AUDIENCES_WITHIN: Duration = Duration::from_secs(5);
/// Maximum number of cached clients.
const CACHED_CLIENTS_MAX: usize = 256;
/// Connection fields of a request. `None` for an omitted field.
#[derive(Debug, Default)]
pub struct ConnectionInput {
    /// URL of the API server.
    pub server: Option<String>,
    /// PEM of the CA of the API server's certificate; `Some(None)` removes it.
    pub ca_certificate: Option<Option<String>>,
    /// Name in the API server's certificate, if not the host; `Some(None)` removes it.
    pub tls_server_name: Option<Option<String>>,
    /// Authentication to the API server.
    pub auth: Option<ClusterAuth>,
    /// Whether an `http://` URL is allowed.
    pub allow_plain_http: Option<bool>,
    /// Kubeconfig that provides server, CA and authentication.
    pub kubeconfig: Option<SecretString>,
    /// Context of the kubeconfig, if not its current one.
    pub context: Option<String>,
}

impl ConnectionInput {
    /// Whether every field is omitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.server.is_none()
            && self.ca_certificate.is_none()
            && self.tls_server_name.is_none()
            && self.auth.is_none()
            && self.allow_plain_http.is_none()
            && self.kubeconfig.is_none()
            && self.context.is_none()
    }

    /// Whether the request brings its own credential.
    fn gives_credential(&self) -> bool {
        self.auth.is_some() || self.kubeconfig.is_some()
    }

    /// JSON names of the fields that are set.
    fn fields(&self) -> Vec<&'static str> {
        let fields = [
            ("server", self.server.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("tlsServerName", self.tls_server_name.is_some()),
            ("auth", self.auth.is_some()),
            ("allowPlainHttp", self.allow_plain_http.is_some()),
            ("kubeconfig", self.kubeconfig.is_some()),
        ];
        fields.into_iter().filter(|(_, is_set)| *is_set).map(|(field, _)| field).collect()
    }

    /// Builds the connection of a new cluster.
    ///
    /// # Errors
    ///
    /// Every missing, invalid or duplicate field.
    pub fn into_connection(self) -> Result<ClusterConnection, Vec<FieldError>> {
        let allow_plain_http = self.allow_plain_http.unwrap_or_default();
        if let Some(text) = &self.kubeconfig {
            self.reject_duplicates_of_kubeconfig()?;
            let connection = kubeconfig::parse(text, self.context.as_deref(), allow_plain_http)?;
            let in_kubeconfig = |FieldError { field, detail }: FieldError| {
                let credential = if field == "auth.token" { "the token" } else { "the client certificate" };
                vec![FieldError::new("kubeconfig", format!("{credential} of its user {detail}"))]
            };
            connection.auth.require_current(clock::now()).map_err(in_kubeconfig)?;
            return Ok(connection);
        }
        if self.context.is_some() {
            return Err(vec![FieldError::new("context", "requires `kubeconfig`")]);
        }
        let Some(auth) = self.auth else {
            return Err(vec![FieldError::new("auth", "is required: provide `auth` and `server`, or a `kubeconfig`")]);
        };
        auth.require_current(clock::now()).map_err(|ended| vec![ended])?;
        ClusterConnection::new(
            self.server.as_deref(),
            self.ca_certificate.flatten().as_deref(),
            self.tls_server_name.flatten().as_deref(),
            auth,
            allow_plain_http,
        )
    }

    /// Merges the fields into a stored connection. `open` opens its credential.
    fn merge_into(
        self,
        stored: &StoredCluster,
        open: impl FnOnce() -> Result<ClusterAuth, ServiceError>,
    ) -> Result<ClusterConnection, ServiceError> {
        if self.kubeconfig.is_some() || self.context.is_some() {
            return Ok(self.into_connection()?);
        }
        let auth = match self.auth {
            Some(auth) => {
                auth.require_current(clock::now()).map_err(|ended| vec![ended])?;
                auth
            }
            None => open()?,
        };
        let in_cluster = auth.auth_type() == AuthType::InCluster;
        let stored_value = |value: &Option<String>| if in_cluster { None } else { value.clone() };
        Ok(ClusterConnection::new(
            self.server.or_else(|| stored_value(&stored.server)).as_deref(),
            self.ca_certificate.unwrap_or_else(|| stored_value(&stored.ca_certificate)).as_deref(),
            self.tls_server_name.unwrap_or_else(|| stored_value(&stored.tls_server_name)).as_deref(),
            auth,
            self.allow_plain_http.unwrap_or(stored.allow_plain_http),
        )?)
    }

    fn reject_duplicates_of_kubeconfig(&self) -> Result<(), Vec<FieldError>> {
        let given = [
            ("server", self.server.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("tlsServerName", self.tls_server_name.is_some()),
            ("auth", self.auth.is_some()),
        ];
        let duplicates: Vec<FieldError> = given
            .into_iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(field, _)| FieldError::new(field, "must be omitted: `kubeconfig` already provides it"))
            .collect();
        if duplicates.is_empty() { Ok(()) } else { Err(duplicates) }
    }
}

/// Service for clusters.
#[derive(Clone)]
pub struct Clusters {
    pool: PgPool,
    sealer: Arc<Sealer>,
    clients: Arc<ClusterClients>,
    checks: Arc<Checks>,
    credential_metrics: Arc<CredentialMetrics>,
    config: ClusterClientConfig,
    audit: TransactionalAudit,
}

impl fmt::Debug for Clusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clusters").finish_non_exhaustive()
    }
}

impl Clusters {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>, config: ClusterClientConfig, audit: TransactionalAudit) -> Self {
        let clients = Arc::new(ClusterClients::new(CACHED_CLIENTS_MAX));
        Self { pool, sealer, clients, checks: Arc::default(), credential_metrics: Arc::default(), config, audit }
    }

    /// Metrics of credentials.
    #[must_use]
    pub fn credential_metrics(&self) -> Arc<CredentialMetrics> {
        Arc::clone(&self.credential_metrics)
    }

    /// Registers a cluster. Its credential is sealed before it is stored. The cluster is not
    /// contacted.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if the name is in use.
    pub async fn register(
        &self,
        caller: &Call,
        name: &Name,
        connection: &ClusterConnection,
    ) -> Result<StoredCluster, ServiceError> {
        let id = Uuid::now_v7();
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let form = master_keys::seal_form(&mut tx, &self.sealer).await?;
        let credential = self.seal(form, id, connection)?;
        let inserted = storage::clusters::insert(&mut tx, id, name, connection, credential.as_ref()).await;
        let cluster = inserted.map_err(on_conflict(name))?;
        let event = NewEvent::of(caller, Action::ClusterCreate, Resource::cluster(name));
        let details = Details::default().version(cluster.version);
        let details = details.changes(None, Some(&recorded::cluster(&cluster)));
        self.audit.commit(tx, [event.details(details)]).await?;
        Ok(cluster)
    }

    /// Finds a cluster.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<StoredCluster, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        visible(caller, name, storage::clusters::find(&mut conn, name).await?)
    }

    /// Lists the granted clusters whose name contains a part.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn list(
        &self,
        caller: &Identity,
        request: &ListRequest,
        name_part: Option<&NamePart>,
    ) -> Result<Listed<StoredCluster>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::clusters::list(&mut conn, &caller.grants, request, name_part).await?)
    }

    /// Changes a cluster's connection. Omitted fields keep their values; the merged connection is
    /// validated. Without a difference, nothing is changed.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Stale`] if the cluster is not at the expected version.
    /// - [`ServiceError::Invalid`] if the merged connection is not valid, or the change would send
    ///   the stored credential to another server.
    /// - [`ServiceError::Trusted`] if another server would review tokens, and the caller cannot
    ///   write identity providers.
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        input: ConnectionInput,
        expected: ExpectedVersion,
    ) -> Result<StoredCluster, ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let form = master_keys::seal_form(&mut tx, &self.sealer).await?;
        let stored = visible(caller, name, storage::clusters::lock(&mut tx, name).await?)?;
        check_version(expected, stored.version)?;
        require_auth_for_new_server(&stored, &input)?;
        let (fields, gives_credential) = (input.fields(), input.gives_credential());
        let changed = input.merge_into(&stored, || self.open(&stored))?;
        // A dry run does not compare a credential, as for passwords of accounts.
        if is_same_connection(&stored, &changed)
            && (!gives_credential || !caller.dry_run && self.has_credential(&stored, &changed))
        {
            self.audit.commit(tx, []).await?;
            return Ok(stored);
        }
        if changes_server(&stored, &changed) && !caller.may(Permission::WriteIdentityProviders) {
            let by = reviewed_providers(&mut tx, &stored).await?;
            if !by.is_empty() {
                return Err(ServiceError::Trusted { name: stored.name, by });
            }
        }
        let credential = self.seal(form, stored.id, &changed)?;
        let updated = storage::clusters::update(&mut tx, stored.id, &changed, credential.as_ref()).await?;
        let details = Details::default().fields(&fields).version(updated.version);
        let details = details.changes(Some(&recorded::cluster(&stored)), Some(&recorded::cluster(&updated)));
        let event = NewEvent::of(caller, Action::ClusterUpdate, Resource::cluster(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        if caller.dry_run {
            return Ok(updated);
        }
        self.clients.remove(stored.id);
        if let Err(error) = self.mark_targets_due(stored.id).await {
            // They also become due on their own schedule, only later.
            tracing::warn!(cluster = %name, %error, "targets of changed cluster not marked due");
        }
        Ok(updated)
    }

    /// Makes all targets in a cluster due.
    ///
    /// Runs after the change is committed: a transaction that creates targets waits for the lock on
    /// the cluster, and this update waits for locks on targets, so one transaction for both could
    /// deadlock.
    async fn mark_targets_due(&self, cluster: Uuid) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        storage::targets::due::mark_cluster_due(&mut tx, cluster).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes a cluster and its credential. Secrets in the cluster are kept.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Stale`] if the cluster is not at the expected version.
    /// - [`ServiceError::InUse`] if a pull secret targets the cluster, or the cluster reviews the
    ///   tokens of an identity provider, or issues those of a minted account.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = idempotency::begin(&self.pool, caller).await?;
        let stored = visible(caller, name, storage::clusters::lock(&mut tx, name).await?)?;
        check_version(expected, stored.version)?;
        let users = storage::pull_secrets::using_cluster(&mut tx, stored.id).await?;
        pull_secrets::ensure_unused(&mut tx, caller, KIND, name, users).await?;
        // The row lock keeps new users of the cluster waiting until this transaction ends.
        let mut by = reviewed_providers(&mut tx, &stored).await?;
        let minted = storage::mints::using_cluster(&mut tx, stored.id).await?;
        by.extend(minted.iter().map(|account| format!("registry-accounts/{}", account.name)));
        if !by.is_empty() {
            return Err(ServiceError::InUse { kind: KIND, name: stored.name, by, hidden: 0 });
        }
        storage::clusters::delete(&mut tx, stored.id).await?;
        let details = Details::default().version(stored.version).changes(Some(&recorded::cluster(&stored)), None);
        let event = NewEvent::of(caller, Action::ClusterDelete, Resource::cluster(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        if !caller.dry_run {
            self.clients.remove(stored.id);
        }
        Ok(())
    }

    /// Returns the client of a cluster. Clients and their connections are cached.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] or [`ServiceError::Hidden`].
    /// - [`ServiceError::Open`] if the credential does not open.
    /// - [`ServiceError::Cluster`] if the connection cannot be used by this process.
    pub async fn client(&self, caller: &Identity, name: &Name) -> Result<ClusterClient, ServiceError> {
        let stored = self.find(caller, name).await?;
        self.client_for(&stored).await
    }

    /// Returns the client for a `TokenReview`. No caller is known yet, so grants are not checked.
    ///
    /// # Errors
    ///
    /// As [`client`](Self::client), and [`ServiceError::Cluster`] if the token would cross the
    /// network unencrypted.
    pub async fn token_review_client(&self, id: Uuid) -> Result<ClusterClient, ServiceError> {
        let stored = self.find_by_id(id).await?;
        if !is_encrypted(&stored) {
            let detail = "tokens are not sent to a cluster over http://, where they could be read: use an https:// URL";
            return Err(ClusterError::Misconfigured { detail: detail.to_owned() }.into());
        }
        self.client_for(&stored).await
    }

    /// Returns the audiences that the API server uses for itself and that regcred's own token has.
    /// Empty if the cluster does not tell, or regcred has no token for it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Open`] if the credential does not open.
    pub(super) async fn own_audiences(&self, stored: &StoredCluster) -> Result<Vec<String>, ServiceError> {
        let (Some(token), Ok(client)) = (self.bearer(stored)?, self.token_review_client(stored.id).await) else {
            return Ok(Vec::new());
        };
        let audiences = timeout(OWN_AUDIENCES_WITHIN, client.own_audiences(&token)).await;
        Ok(audiences.ok().and_then(Result::ok).unwrap_or_default())
    }

    /// Returns the token with which regcred authenticates to a cluster, if it does so with one.
    fn bearer(&self, stored: &StoredCluster) -> Result<Option<SecretString>, ServiceError> {
        Ok(match self.open(stored)? {
            ClusterAuth::Token { token } | ClusterAuth::ServiceAccount { token, .. } => Some(token),
            ClusterAuth::InCluster => self.config.own_token(),
            ClusterAuth::ClientCertificate { .. } | ClusterAuth::None => None,
        })
    }

    /// Returns the name and the client of a cluster, for background work. Grants were checked when
    /// a caller declared the work.
    ///
    /// # Errors
    ///
    /// As [`client`](Self::client).
    pub(super) async fn client_by_id(&self, id: Uuid) -> Result<(String, ClusterClient), ServiceError> {
        let stored = self.find_by_id(id).await?;
        let client = self.client_for(&stored).await?;
        Ok((stored.name, client))
    }

    async fn find_by_id(&self, id: Uuid) -> Result<StoredCluster, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::clusters::find_by_id(&mut conn, id).await?;
        found.ok_or_else(|| ServiceError::not_found(KIND, &id))
    }

    async fn client_for(&self, stored: &StoredCluster) -> Result<ClusterClient, ServiceError> {
        let addresses = self.admit(stored).await?;
        let connect = || {
            let stored_connection = self.stored_connection(stored)?;
            let pinned = addresses.first().copied();
            let client = ClusterClient::connect_at(&stored_connection, pinned, &self.config)?;
            Ok::<_, ServiceError>(client.named(&stored.name))
        };
        let cached = self.clients.get_or_connect(stored.id, stored.revision(), connect)?;
        if cached.is_at(&addresses) {
            return Ok(cached);
        }
        // The host name resolves to other addresses now, which the guard has admitted.
        self.clients.remove(stored.id);
        self.clients.get_or_connect(stored.id, stored.revision(), connect)
    }

    /// Resolves the API server and checks its addresses, except for `inCluster`, whose address no
    /// caller chooses. Empty if the URL has an address instead of a name.
    async fn admit(&self, stored: &StoredCluster) -> Result<Vec<IpAddr>, ServiceError> {
        match (&self.config.guard, &stored.server) {
            (Some(guard), Some(server)) => Ok(admit(guard, server).await?),
            (Some(guard), None) => Ok(resolve_in_cluster(guard, &self.config).await?),
            (None, _) => Ok(Vec::new()),
        }
    }

    fn stored_connection(&self, stored: &StoredCluster) -> Result<ClusterConnection, ServiceError> {
        ClusterConnection::new(
            stored.server.as_deref(),
            stored.ca_certificate.as_deref(),
            stored.tls_server_name.as_deref(),
            self.open(stored)?,
            stored.allow_plain_http,
        )
        // The connection was valid when it was stored, but validation may be stricter in this
        // version.
        .map_err(|errors| {
            let detail = format!("the stored connection is no longer valid: {}", Invalid::from(errors));
            ClusterError::Misconfigured { detail }.into()
        })
    }

    fn seal(&self, form: SealForm, id: Uuid, connection: &ClusterConnection) -> Result<Option<Sealed>, ServiceError> {
        let slot = SealedColumn::cluster_credential(id, &connection.destination());
        Ok(connection.auth.secret().map(|secret| self.sealer.seal(form, &slot, secret)).transpose()?)
    }

    /// Whether the secret of a connection is the stored one. A stored one that does not open differs.
    fn has_credential(&self, stored: &StoredCluster, connection: &ClusterConnection) -> bool {
        let Ok(auth) = self.open(stored) else { return false };
        match (auth.secret(), connection.auth.secret()) {
            (Some(stored), Some(given)) => constant_time::is_equal(stored, given),
            (stored, given) => stored.is_none() && given.is_none(),
        }
    }

    fn open(&self, stored: &StoredCluster) -> Result<ClusterAuth, ServiceError> {
        let slot = stored.slot();
        let secret = stored.credential.as_ref().map(|sealed| self.sealer.open(&slot, sealed)).transpose()?;
        let account = stored.renewal.as_ref().map(|renewal| renewal.account.clone());
        ClusterAuth::from_parts(stored.auth_type, stored.client_certificate.clone(), secret, account)
            .map_err(|_| OpenError::Tampered { table: slot.table, id: stored.id }.into())
    }
}

/// Whether calls to a cluster are encrypted, or do not leave the host.
fn is_encrypted(stored: &StoredCluster) -> bool {
    let url = stored.server.as_deref().map(ServerUrl::parse).transpose();
    url.is_ok_and(|url| url.is_none_or(|url| url.is_https() || url.is_loopback()))
}

/// Whether a connection equals the stored one, apart from its secret.
fn is_same_connection(stored: &StoredCluster, changed: &ClusterConnection) -> bool {
    !changes_server(stored, changed)
        && stored.allow_plain_http == changed.allow_plain_http
        && stored.auth_type == changed.auth.auth_type()
        && stored.client_certificate.as_deref() == changed.auth.certificate()
}

/// Returns the paths of the identity providers whose tokens the cluster reviews.
async fn reviewed_providers(conn: &mut PgConnection, stored: &StoredCluster) -> Result<Vec<String>, ServiceError> {
    let names = storage::identity_providers::names_by_cluster(conn, stored.id).await?;
    Ok(names.into_iter().map(|name| format!("identity-providers/{name}")).collect())
}

/// Whether another server could answer after the change. A new credential alone does not change the
/// server.
fn changes_server(stored: &StoredCluster, changed: &ClusterConnection) -> bool {
    stored.server.as_deref() != changed.server.as_ref().map(ServerUrl::as_str)
        || stored.ca_certificate.as_deref() != changed.ca_certificate.as_ref().map(CaCertificate::as_pem)
        || stored.tls_server_name != changed.tls_server_name
}

fn visible(caller: &Identity, name: &Name, found: Option<StoredCluster>) -> Result<StoredCluster, ServiceError> {
    require_visible(KIND, name, found, |cluster| caller.grants.include_cluster(&cluster.name))
}

/// Rejects a change that would send the stored credential to another server, or trust another CA
/// with it.
///
/// Otherwise a caller that can change a cluster, but not read its credential, could receive it at a
/// server of its own.
fn require_auth_for_new_server(stored: &StoredCluster, input: &ConnectionInput) -> Result<(), ServiceError> {
    let keeps_credential = stored.credential.is_some() && !input.gives_credential();
    if !keeps_credential {
        return Ok(());
    }
    let changes = [
        ("server", input.server.is_some() && input.server != stored.server),
        ("caCertificate", input.ca_certificate.as_ref().is_some_and(|ca| *ca != stored.ca_certificate)),
        ("tlsServerName", input.tls_server_name.as_ref().is_some_and(|name| *name != stored.tls_server_name)),
    ];
    match changes.into_iter().find(|(_, is_changed)| *is_changed) {
        Some((field, _)) => Err(ServiceError::field(
            field,
            Invalid::new(
                "requires `auth` in the same request: the stored credential is only sent to the server that it was set for",
            ),
        )),
        None => Ok(()),
    }
}
