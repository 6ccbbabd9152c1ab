//! Direct delivery of one Secret to a namespace.

mod listing;

use std::{collections::BTreeMap, time::Instant};

use chrono::{DateTime, Utc};

use crate::{
    clients::cluster::{ClusterClient, ClusterError, SecretMetadata},
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::Call,
        docker_config::{RenderedConfig, Warning},
        names::{Labels, Name, NamespaceName, SecretName},
        pull_secret::ID_LABEL,
        reconcile::Holder,
        secret::{IfExists, MANAGED_BY_LABEL, SecretContent, SecretManifest, SecretType},
        selector::AccountSelection,
    },
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
        clusters::Clusters,
        connection,
        docker_configs::{Assembled, DockerConfigs},
        pull_secrets,
    },
    storage::{self, PgPool, direct_secrets::DirectSecret},
};

pub use listing::{DeliveryRecord, ListedDelivery};

/// Secret to deliver.
#[derive(Debug)]
pub struct Delivery {
    /// Cluster.
    pub cluster: Name,
    /// Namespace.
    pub namespace: NamespaceName,
    /// Name of the Secret.
    pub name: SecretName,
    /// Type of the Secret, which determines the profile of the document.
    pub secret_type: SecretType,
    /// Accounts in the document.
    pub accounts: AccountSelection,
    /// Additional labels.
    pub labels: Labels,
    /// Handling of an existing Secret.
    pub if_exists: IfExists,
}

/// Delivered Secret, without its value.
#[derive(Debug)]
pub struct Delivered {
    /// Metadata of the Secret.
    pub metadata: SecretMetadata,
    /// Whether an existing Secret was replaced.
    pub replaced: bool,
    /// Keys of the document.
    pub keys: Vec<String>,
    /// Earliest end of a minted login in it; none without one.
    pub valid_until: Option<DateTime<Utc>>,
    /// Differences between the accounts and what the reader will do.
    pub warnings: Vec<Warning>,
}

/// Delivers Secrets to namespaces.
#[derive(Clone)]
pub struct Secrets {
    pool: PgPool,
    clusters: Clusters,
    docker_configs: DockerConfigs,
    audit_writer: AuditWriter,
}

impl Secrets {
    /// Creates the service.
    #[must_use]
    pub fn new(pool: PgPool, clusters: Clusters, docker_configs: DockerConfigs, audit_writer: AuditWriter) -> Self {
        Self { pool, clusters, docker_configs, audit_writer }
    }

    /// Creates a Secret by one POST. An existing Secret of this name is replaced if the delivery says
    /// so and it was made by direct delivery. In a dry run, the API server only validates the
    /// Secret.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] for the cluster, [`ServiceError::Invalid`] for the accounts,
    /// [`ServiceError::Cluster`] if the API server refuses. A namespace that is not granted is
    /// reported as absent, without a call to the cluster.
    pub async fn deliver(&self, caller: &Call, delivery: Delivery) -> Result<Delivered, ServiceError> {
        // The cluster first: if it cannot be called, no password needs to be opened.
        let client = self.clusters.client(caller, &delivery.cluster).await?;
        if !caller.grants.include_namespace(delivery.namespace.as_str()) {
            self.refuse(caller, &delivery);
            return Err(ClusterError::NamespaceNotFound.into());
        }
        let (profile, started) = (delivery.secret_type.profile(), Instant::now());
        let resource = Resource::secret(&delivery.cluster, &delivery.namespace, &delivery.name);
        let assembled = self.docker_configs.assemble(caller, profile, &delivery.accounts).await;
        if let Err(ServiceError::Open(_)) = assembled {
            self.audit_writer.note_damage(NewEvent::of(caller, Action::Deliver, resource.clone())).await;
        }
        let Assembled { rendered: RenderedConfig { document, keys, warnings }, accounts, valid_until } = assembled?;
        let mut related = vec![Resource::cluster(&delivery.cluster)];
        related.extend(accounts.iter().map(Resource::account));
        let event = NewEvent::of(caller, Action::Deliver, resource).related(related);
        let details = Details::default().dry_run(caller.dry_run);
        let secret = SecretManifest {
            name: &delivery.name,
            namespace: Some(&delivery.namespace),
            labels: &with_managed_by(&delivery.labels),
            annotations: &BTreeMap::new(),
            resource_version: None,
            content: &SecretContent::new(delivery.secret_type, &document),
        };
        // A call to a cluster cannot be part of a transaction. So the attempt is recorded before,
        // and its outcome after.
        self.audit_writer.record(event.clone().details(details.clone()).outcome(Outcome::Attempt)).await?;
        let placed = self.place(caller, &client, &delivery, &secret).await;
        let (outcome, details) = match &placed {
            Ok((_, true)) => (Outcome::Success, details.did("replaced")),
            Ok((_, false)) => (Outcome::Success, details),
            Err(ServiceError::Cluster(error)) => (Outcome::Failure, details.reason(error.slug())),
            Err(_) => (Outcome::Failure, details.reason("internal")),
        };
        // The Secret was delivered or not, whatever happens here. The attempt is recorded.
        if let Err(error) = self.audit_writer.record(event.details(details).outcome(outcome)).await {
            tracing::error!(%error, "delivery outcome not audited");
        }
        let (metadata, replaced) = placed?;
        if !caller.dry_run {
            self.record(&delivery, &accounts, started).await;
        }
        Ok(Delivered { metadata, replaced, keys, valid_until, warnings })
    }

    /// Creates the Secret, or replaces one of direct delivery at the version that was read. Returns
    /// whether it was replaced.
    async fn place(
        &self,
        caller: &Call,
        client: &ClusterClient,
        delivery: &Delivery,
        secret: &SecretManifest<'_>,
    ) -> Result<(SecretMetadata, bool), ServiceError> {
        let namespace = &delivery.namespace;
        match client.create_secret(namespace, secret, caller.dry_run).await {
            Ok(created) => return Ok((created, false)),
            Err(ClusterError::SecretExists) if delivery.if_exists == IfExists::Replace => {}
            Err(error) => return Err(error.into()),
        }
        // Deleted meanwhile.
        let found = client.get_secret(namespace, &delivery.name).await?.ok_or(ClusterError::Changed)?;
        if !found.is_direct() {
            let label = found.labels.get(ID_LABEL).and_then(|label| label.parse().ok());
            let mut conn = connection(&self.pool).await?;
            let holder = pull_secrets::holder(&mut conn, caller, label).await?;
            return Err(ClusterError::SecretKept { detail: kept(&delivery.name, &holder) }.into());
        }
        let replaced = client.apply_secret(namespace, secret, &found.resource_version, caller.dry_run).await?;
        Ok((replaced, true))
    }

    /// Records which accounts the Secret contains. The Secret is delivered, so a failure is logged
    /// only: the accounts then do not name the Secret.
    async fn record(&self, delivery: &Delivery, accounts: &[Name], started: Instant) {
        let Delivery { cluster, namespace, name, .. } = delivery;
        let names: Vec<&str> = accounts.iter().map(Name::as_str).collect();
        let secret = DirectSecret { cluster, namespace, name };
        let recorded = async {
            let mut conn = connection(&self.pool).await?;
            storage::direct_secrets::record(&mut conn, secret, &names, started.elapsed().as_secs_f64()).await
        };
        if let Err(error) = recorded.await {
            tracing::error!(%error, %cluster, %namespace, secret = %name, "direct delivery not recorded");
        }
    }

    fn refuse(&self, caller: &Call, delivery: &Delivery) {
        self.audit_writer.refuse(Refusal {
            actor: caller.actor.clone(),
            action: Action::Deliver,
            resources: vec![Resource::secret(&delivery.cluster, &delivery.namespace, &delivery.name)],
            reason: "not-granted",
            request_id: Some(caller.request_id),
            source: caller.source,
        });
    }
}

/// Explains why a Secret is not replaced.
fn kept(secret: &SecretName, holder: &Holder) -> String {
    match holder {
        Holder::Foreign => format!(
            "the Secret {secret} exists and was not made by direct delivery, so it is not replaced: choose another \
             name, or delete it"
        ),
        Holder::PullSecret(Some(name)) => format!(
            "the Secret {secret} belongs to the pull secret `{name}`, so it is not replaced: change that pull secret, \
             or choose another name"
        ),
        Holder::PullSecret(None) => {
            format!("the Secret {secret} belongs to a pull secret, so it is not replaced: choose another name")
        }
    }
}

fn with_managed_by(labels: &Labels) -> BTreeMap<String, String> {
    let mut labels = labels.as_map().clone();
    let (key, value) = MANAGED_BY_LABEL;
    labels.insert(key.to_owned(), value.to_owned());
    labels
}
