//! Clusters: register, look up, change, remove, check, and the client for one.

use std::{net::IpAddr, sync::Arc};

use secrecy::SecretString;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    clients::cluster::{
        Check, ClusterClient, ClusterClientConfig, ClusterClients, ClusterError, LackingPullSecret, admit, kubeconfig,
    },
    crypto::sealer::{OpenError, Sealer},
    domain::{
        audit::{Action, Details, NewEvent, Resource},
        caller::{Call, Identity, Permission},
        cluster::{AuthType, CaCertificate, ClusterAuth, ClusterConnection, ServerUrl},
        invalid::{FieldError, Invalid},
        names::Name,
        rbac::RequiredRules,
        sealed::Sealed,
    },
    service::{
        ExpectedVersion, ServiceError,
        audit::TransactionalAudit,
        check_version, connection, pull_secrets,
        rbac::{self, PullSecretRules},
    },
    storage::{self, PageRequest, StorageError, clusters::StoredCluster, sealed::SealedColumn},
};

/// How many clusters' clients are kept between calls.
const CLIENTS_KEPT: usize = 256;
/// The most namespaces that a check looks at beside those that are declared.
const LEFTOVERS_MAX: usize = 10_000;
/// The most pull secrets that a check lists, and the most rights of each.
const LACKING_MAX: usize = 100;
const MISSING_MAX: usize = 50;

/// What a caller says about a connection; `None` where he says nothing.
#[derive(Debug, Default)]
pub struct ConnectionInput {
    /// URL of the API server.
    pub server: Option<String>,
    /// PEM of its CA; `Some(None)` takes it away.
    pub ca_certificate: Option<Option<String>>,
    /// Name that its certificate bears; `Some(None)` takes it away.
    pub tls_server_name: Option<Option<String>>,
    /// How to authenticate.
    pub auth: Option<ClusterAuth>,
    /// `http://` is wanted.
    pub allow_plain_http: Option<bool>,
    /// A kubeconfig in place of server, CA and authentication.
    pub kubeconfig: Option<SecretString>,
    /// Which context of it, if not its current one.
    pub context: Option<String>,
}

impl ConnectionInput {
    /// Whether the caller said anything.
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

    /// The fields that it says something of.
    fn fields(&self) -> Vec<&'static str> {
        let said = [
            ("server", self.server.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("tlsServerName", self.tls_server_name.is_some()),
            ("auth", self.auth.is_some()),
            ("allowPlainHttp", self.allow_plain_http.is_some()),
            ("kubeconfig", self.kubeconfig.is_some()),
        ];
        said.into_iter().filter(|(_, is_said)| *is_said).map(|(field, _)| field).collect()
    }

    /// Makes a connection of what was said alone.
    ///
    /// # Errors
    ///
    /// Every field that is missing, refused, or said twice.
    pub fn into_connection(self) -> Result<ClusterConnection, Vec<FieldError>> {
        let allow_plain_http = self.allow_plain_http.unwrap_or_default();
        if let Some(text) = &self.kubeconfig {
            self.refuse_beside_kubeconfig()?;
            return kubeconfig::parse(text, self.context.as_deref(), allow_plain_http);
        }
        if self.context.is_some() {
            return Err(vec![FieldError::new("context", "goes with `kubeconfig`, which is missing")]);
        }
        let Some(auth) = self.auth else {
            return Err(vec![FieldError::new("auth", "is missing: give `auth` and `server`, or a `kubeconfig`")]);
        };
        ClusterConnection::new(
            self.server.as_deref(),
            self.ca_certificate.flatten().as_deref(),
            self.tls_server_name.flatten().as_deref(),
            auth,
            allow_plain_http,
        )
    }

    /// Puts what was said over a connection that is there.
    fn merge_into(
        self,
        stored: &StoredCluster,
        open: impl FnOnce() -> Result<ClusterAuth, ServiceError>,
    ) -> Result<ClusterConnection, ServiceError> {
        if self.kubeconfig.is_some() || self.context.is_some() {
            return Ok(self.into_connection()?);
        }
        let auth = match self.auth {
            Some(auth) => auth,
            None => open()?,
        };
        let in_cluster = auth.auth_type() == AuthType::InCluster;
        let kept = |value: &Option<String>| if in_cluster { None } else { value.clone() };
        Ok(ClusterConnection::new(
            self.server.or_else(|| kept(&stored.server)).as_deref(),
            self.ca_certificate.unwrap_or_else(|| kept(&stored.ca_certificate)).as_deref(),
            self.tls_server_name.unwrap_or_else(|| kept(&stored.tls_server_name)).as_deref(),
            auth,
            self.allow_plain_http.unwrap_or(stored.allow_plain_http),
        )?)
    }

    fn refuse_beside_kubeconfig(&self) -> Result<(), Vec<FieldError>> {
        let given = [
            ("server", self.server.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("tlsServerName", self.tls_server_name.is_some()),
            ("auth", self.auth.is_some()),
        ];
        let twice: Vec<FieldError> = given
            .into_iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(field, _)| FieldError::new(field, "must not stand beside `kubeconfig`, which says it already"))
            .collect();
        if twice.is_empty() { Ok(()) } else { Err(twice) }
    }
}

/// The clusters.
#[derive(Clone)]
pub struct Clusters {
    pool: PgPool,
    sealer: Arc<Sealer>,
    clients: Arc<ClusterClients>,
    config: ClusterClientConfig,
    audit: TransactionalAudit,
}

impl Clusters {
    /// Puts the service together.
    #[must_use]
    pub fn new(pool: PgPool, sealer: Arc<Sealer>, config: ClusterClientConfig, audit: TransactionalAudit) -> Self {
        Self { pool, sealer, clients: Arc::new(ClusterClients::new(CLIENTS_KEPT)), config, audit }
    }

    /// Registers a cluster; its credential is sealed before it is stored. Nothing is sent to it.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NameTaken`] if the name is in use, [`ServiceError::NotGranted`] if it is not granted to the
    /// caller, whether it is in use or not, or if it would be regcred's own cluster and not all clusters are granted to him.
    pub async fn register(
        &self,
        caller: &Call,
        name: &Name,
        connection: &ClusterConnection,
    ) -> Result<StoredCluster, ServiceError> {
        if !caller.grants.include_cluster(name.as_str()) {
            return Err(not_granted(name, ""));
        }
        refuse_own_cluster(caller, name, &connection.auth)?;
        let id = Uuid::now_v7();
        let credential = self.seal(id, connection)?;
        let mut tx = self.pool.begin().await?;
        let inserted = storage::clusters::insert(&mut tx, id, name, connection, credential.as_ref()).await;
        let cluster = inserted.map_err(|error| match error {
            StorageError::NameTaken => ServiceError::NameTaken(name.to_string()),
            other => other.into(),
        })?;
        let event = NewEvent::of(caller, Action::ClusterCreate, Resource::cluster(name));
        self.audit.commit(tx, [event.details(Details::default().version(cluster.version))]).await?;
        Ok(cluster)
    }

    /// Finds a cluster.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name.
    pub async fn find(&self, caller: &Identity, name: &Name) -> Result<StoredCluster, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        granted(caller, name, storage::clusters::find(&mut conn, name).await?)
    }

    /// Lists granted clusters by name.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn list(&self, caller: &Identity, page: &PageRequest) -> Result<Vec<StoredCluster>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::clusters::list(&mut conn, &caller.grants, page).await?)
    }

    /// Changes a cluster's connection: what the caller does not say stays, and the whole is checked anew.
    ///
    /// A new server needs the credential said again: otherwise whoever may change a cluster could have a
    /// credential that he cannot see sent to a server of his own.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version, [`ServiceError::Invalid`] if the changed connection breaks a rule, [`ServiceError::Trusted`] if it
    /// would be somebody else then who says whose tokens are good, [`ServiceError::NotGranted`] as for
    /// [`register`](Self::register).
    pub async fn change(
        &self,
        caller: &Call,
        name: &Name,
        input: ConnectionInput,
        expected: ExpectedVersion,
    ) -> Result<StoredCluster, ServiceError> {
        let mut tx = self.pool.begin().await?;
        let stored = granted(caller, name, storage::clusters::lock(&mut tx, name).await?)?;
        check_version(expected, stored.version)?;
        refuse_redirection(&stored, &input)?;
        let fields = input.fields();
        let changed = input.merge_into(&stored, || self.open(&stored))?;
        if is_led_elsewhere(&stored, &changed) && !caller.may(Permission::WriteIdentityProviders) {
            let by = providers_of(&mut tx, &stored).await?;
            if !by.is_empty() {
                return Err(ServiceError::Trusted { name: stored.name, by });
            }
        }
        if stored.auth_type != AuthType::InCluster {
            refuse_own_cluster(caller, name, &changed.auth)?;
        }
        let credential = self.seal(stored.id, &changed)?;
        let updated = storage::clusters::update(&mut tx, stored.id, &changed, credential.as_ref()).await?;
        let details = Details::default().fields(&fields).version(updated.version);
        let event = NewEvent::of(caller, Action::ClusterUpdate, Resource::cluster(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        self.clients.remove(stored.id);
        if let Err(error) = self.look_again(stored.id).await {
            tracing::warn!(cluster = %name, %error, "the Secrets of a cluster that was changed are looked at when they are due");
        }
        Ok(updated)
    }

    /// Has everything looked at that is to be in a cluster. Not in the transaction of a change: who makes targets there waits for that
    /// one's lock on the cluster, and this waits for targets.
    async fn look_again(&self, cluster: Uuid) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        storage::targets::due::mark_cluster_due(&mut tx, cluster).await?;
        storage::wakeups::wake_workers(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes a cluster and its credential. Secrets in it stay.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Stale`] if it is not at the
    /// expected version, [`ServiceError::InUse`] if a pull secret goes there, or an identity provider has its tokens reviewed
    /// there.
    pub async fn remove(&self, caller: &Call, name: &Name, expected: ExpectedVersion) -> Result<(), ServiceError> {
        let mut tx = self.pool.begin().await?;
        let stored = granted(caller, name, storage::clusters::lock(&mut tx, name).await?)?;
        check_version(expected, stored.version)?;
        let users = storage::pull_secrets::using_cluster(&mut tx, stored.id).await?;
        pull_secrets::refuse_used(&mut tx, caller, "cluster", name, users).await?;
        // Who would use it waits for the lock on it, and finds it gone.
        let by = providers_of(&mut tx, &stored).await?;
        if !by.is_empty() {
            return Err(ServiceError::InUse { kind: "cluster", name: stored.name, by, hidden: 0 });
        }
        storage::clusters::delete(&mut tx, stored.id).await?;
        let details = Details::default().version(stored.version);
        let event = NewEvent::of(caller, Action::ClusterDelete, Resource::cluster(name)).details(details);
        self.audit.commit(tx, [event]).await?;
        self.clients.remove(stored.id);
        Ok(())
    }

    /// Looks whether a cluster answers, which version it is, what regcred may do there, and which pull secrets need more.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ClusterError::NamespaceNotFound`] for a namespace
    /// that is not granted. A cluster that does not answer is no error but what was found.
    pub async fn check(&self, caller: &Identity, name: &Name, namespaces: &[&str]) -> Result<Check, ServiceError> {
        let is_granted = namespaces.iter().all(|namespace| caller.grants.include_namespace(namespace));
        let stored = self.find(caller, name).await?;
        let client = match self.client_for(&stored).await {
            Ok(_) | Err(ServiceError::Cluster(_)) if !is_granted => return Err(ClusterError::NamespaceNotFound.into()),
            Ok(client) => client,
            Err(ServiceError::Cluster(error)) => return Ok(Check::failed(&error)),
            Err(other) => return Err(other),
        };
        let mut check = client.check(namespaces).await;
        if check.reachable && check.problem.is_none() && caller.may(Permission::ReadPullSecrets) {
            self.add_missing_rights(caller, (stored.id, name), &client, &mut check).await?;
        }
        Ok(check)
    }

    /// Adds to a check which rights are missing for which of the pull secrets that the caller may see.
    async fn add_missing_rights(
        &self,
        caller: &Identity,
        cluster: (Uuid, &Name),
        client: &ClusterClient,
        check: &mut Check,
    ) -> Result<(), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let (needed, is_all) = rbac::required_by_visible(&mut conn, caller, cluster, LEFTOVERS_MAX).await?;
        drop(conn);
        let needs: Vec<&RequiredRules> = needed.iter().map(|one| &one.rules).collect();
        let reviewed = match client.review_needs(&needs).await {
            Ok(reviewed) => reviewed,
            Err(error) => {
                check.problem = Check::failed(&error).problem;
                return Ok(());
            }
        };
        let mut is_cut = !is_all;
        let mut lacking = Vec::new();
        for PullSecretRules { name, rules: needs } in needed {
            let (mut missing, is_all) = reviewed.missing(&needs);
            is_cut |= !is_all || missing.len() > MISSING_MAX;
            missing.truncate(MISSING_MAX);
            if !missing.is_empty() {
                lacking.push(LackingPullSecret { name: name.to_string(), missing });
            }
        }
        is_cut |= lacking.len() > LACKING_MAX;
        lacking.truncate(LACKING_MAX);
        check.pull_secrets = Some(lacking);
        check.pull_secrets_cut = Some(is_cut);
        Ok(())
    }

    /// The client for a cluster, with its connections kept between calls.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is none of that name, [`ServiceError::Open`] if its credential does
    /// not open, [`ServiceError::Cluster`] if its connection cannot be used here.
    pub async fn client(&self, caller: &Identity, name: &Name) -> Result<ClusterClient, ServiceError> {
        let stored = self.find(caller, name).await?;
        self.client_for(&stored).await
    }

    /// The client for a cluster that tokens may be shown to, on nobody's behalf: whose they are is what is to be found out.
    ///
    /// # Errors
    ///
    /// As [`client`](Self::client); and [`ServiceError::Cluster`] if a token would go over the network in the clear.
    pub async fn reviewer(&self, id: Uuid) -> Result<ClusterClient, ServiceError> {
        let stored = {
            let mut conn = connection(&self.pool).await?;
            storage::clusters::find_by_id(&mut conn, id).await?
        };
        let stored = stored.ok_or_else(|| ServiceError::NotFound { kind: "cluster", name: id.to_string() })?;
        let url = stored.server.as_deref().map(ServerUrl::parse).transpose();
        if !url.is_ok_and(|url| url.is_none_or(|url| url.is_https() || url.is_loopback())) {
            let detail = "a token is never shown to a cluster over http://, where anybody on the way could read it";
            return Err(ClusterError::Misconfigured { detail: detail.to_owned() }.into());
        }
        self.client_for(&stored).await
    }

    /// The client for the cluster of this id, and its name, for whoever works on what a caller was allowed to declare before.
    ///
    /// # Errors
    ///
    /// As [`client`](Self::client).
    pub(super) async fn client_of(&self, id: Uuid) -> Result<(String, ClusterClient), ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::clusters::find_by_id(&mut conn, id).await?;
        drop(conn);
        let stored = found.ok_or_else(|| ServiceError::NotFound { kind: "cluster", name: id.to_string() })?;
        let client = self.client_for(&stored).await?;
        Ok((stored.name, client))
    }

    async fn client_for(&self, stored: &StoredCluster) -> Result<ClusterClient, ServiceError> {
        let addresses = self.admit(stored).await?;
        let connect = || {
            let stored_connection = self.stored_connection(stored)?;
            let pinned = addresses.first().copied();
            let client = ClusterClient::connect_at(&stored_connection, pinned, &self.config)?;
            Ok::<_, ServiceError>(client.named(&stored.name))
        };
        let kept = self.clients.get_or_connect(stored.id, stored.version, connect)?;
        if kept.is_at(&addresses) {
            return Ok(kept);
        }
        // The name means something else now, and the guard admits that too.
        self.clients.remove(stored.id);
        self.clients.get_or_connect(stored.id, stored.version, connect)
    }

    /// Where a cluster that has a name may be called. Where regcred's own pod is, nobody named.
    async fn admit(&self, stored: &StoredCluster) -> Result<Vec<IpAddr>, ServiceError> {
        match (&self.config.guard, &stored.server) {
            (Some(guard), Some(server)) => Ok(admit(guard, server).await?),
            _ => Ok(Vec::new()),
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
        // Stored connections were checked when they came in; rules may have become stricter since.
        .map_err(|errors| {
            let detail = errors.iter().map(|e| format!("{} {}", e.field, e.detail)).collect::<Vec<_>>().join("; ");
            ClusterError::Misconfigured { detail: format!("the stored connection is not valid any more: {detail}") }
                .into()
        })
    }

    fn seal(&self, id: Uuid, connection: &ClusterConnection) -> Result<Option<Sealed>, ServiceError> {
        let slot = SealedColumn::ClusterCredential.slot(id);
        Ok(connection.auth.secret().map(|secret| self.sealer.seal(slot, secret)).transpose()?)
    }

    fn open(&self, stored: &StoredCluster) -> Result<ClusterAuth, ServiceError> {
        let slot = SealedColumn::ClusterCredential.slot(stored.id);
        let secret = stored.credential.as_ref().map(|sealed| self.sealer.open(slot, sealed)).transpose()?;
        ClusterAuth::from_parts(stored.auth_type, stored.client_certificate.clone(), secret)
            .map_err(|_| OpenError::Tampered { table: slot.table, id: stored.id }.into())
    }
}

/// Paths of the identity providers that believe a cluster.
async fn providers_of(conn: &mut PgConnection, stored: &StoredCluster) -> Result<Vec<String>, ServiceError> {
    let names = storage::identity_providers::names_by_cluster(conn, stored.id).await?;
    Ok(names.into_iter().map(|name| format!("identity-providers/{name}")).collect())
}

fn not_granted(name: &Name, as_it_is: &'static str) -> ServiceError {
    ServiceError::NotGranted { kind: "cluster", name: name.to_string(), as_it_is }
}

/// Refuses to show regcred's own `ServiceAccount` on the word of somebody to whom a few names are granted: what it may do has
/// nothing to do with these.
fn refuse_own_cluster(caller: &Identity, name: &Name, auth: &ClusterAuth) -> Result<(), ServiceError> {
    if auth.auth_type() == AuthType::InCluster && !caller.grants.include_all_clusters() {
        return Err(not_granted(name, " with `inCluster`, which needs a grant of all clusters"));
    }
    Ok(())
}

/// Whether somebody else could answer in place of the cluster then. With another credential it is the same one that answers.
fn is_led_elsewhere(stored: &StoredCluster, changed: &ClusterConnection) -> bool {
    stored.server.as_deref() != changed.server.as_ref().map(ServerUrl::as_str)
        || stored.ca_certificate.as_deref() != changed.ca_certificate.as_ref().map(CaCertificate::as_pem)
        || stored.tls_server_name != changed.tls_server_name
}

fn not_found(name: &Name) -> ServiceError {
    ServiceError::NotFound { kind: "cluster", name: name.to_string() }
}

/// The cluster, if it is there for this caller.
fn granted(caller: &Identity, name: &Name, found: Option<StoredCluster>) -> Result<StoredCluster, ServiceError> {
    let cluster = found.ok_or_else(|| not_found(name))?;
    if caller.grants.include_cluster(&cluster.name) {
        Ok(cluster)
    } else {
        Err(ServiceError::Hidden { kind: "cluster", name: name.to_string() })
    }
}

/// Refuses to send a stored credential to another server, or past another trust anchor, than it was given for.
fn refuse_redirection(stored: &StoredCluster, input: &ConnectionInput) -> Result<(), ServiceError> {
    let keeps_credential = stored.credential.is_some() && input.auth.is_none() && input.kubeconfig.is_none();
    if !keeps_credential {
        return Ok(());
    }
    let moved = [
        ("server", input.server.is_some() && input.server != stored.server),
        ("caCertificate", input.ca_certificate.as_ref().is_some_and(|ca| *ca != stored.ca_certificate)),
        ("tlsServerName", input.tls_server_name.as_ref().is_some_and(|name| *name != stored.tls_server_name)),
    ];
    match moved.into_iter().find(|(_, is_moved)| *is_moved) {
        Some((field, _)) => Err(ServiceError::field(
            field,
            Invalid::new("cannot be changed without `auth`: the stored credential is not sent anywhere else"),
        )),
        None => Ok(()),
    }
}
