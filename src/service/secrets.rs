//! Direct delivery of one Secret to a namespace.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::{
    clients::cluster::ClusterError,
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::Call,
        docker_config::{RenderedConfig, Warning},
        names::{Labels, Name, NamespaceName, SecretName},
        secret::{MANAGED_BY_LABEL, SecretContent, SecretManifest, SecretType},
        selector::AccountSelection,
    },
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
        clusters::Clusters,
        docker_configs::{Assembled, DockerConfigs},
    },
};

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
    /// Whether the API server only validates the Secret.
    pub dry_run: bool,
}

/// Delivered Secret, without its value.
#[derive(Debug)]
pub struct Delivered {
    /// UID of the Secret.
    pub uid: Option<String>,
    /// Version of the Secret.
    pub resource_version: Option<String>,
    /// Time of creation by the cluster's clock.
    pub creation_timestamp: Option<DateTime<Utc>>,
    /// Keys of the document.
    pub keys: Vec<String>,
    /// Differences between the accounts and what the reader will do.
    pub warnings: Vec<Warning>,
}

/// Delivers Secrets to namespaces.
#[derive(Clone)]
pub struct Secrets {
    clusters: Clusters,
    docker_configs: DockerConfigs,
    audit_writer: AuditWriter,
}

impl Secrets {
    /// Creates the service.
    #[must_use]
    pub fn new(clusters: Clusters, docker_configs: DockerConfigs, audit_writer: AuditWriter) -> Self {
        Self { clusters, docker_configs, audit_writer }
    }

    /// Creates a Secret by one POST. An existing Secret of this name is not changed.
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
        let profile = delivery.secret_type.profile();
        let resource = Resource::secret(&delivery.cluster, &delivery.namespace, &delivery.name);
        let assembled = self.docker_configs.assemble(caller, profile, &delivery.accounts).await;
        if let Err(ServiceError::Open(_)) = assembled {
            self.audit_writer.note_damage(NewEvent::of(caller, Action::Deliver, resource.clone())).await;
        }
        let Assembled { rendered: RenderedConfig { document, keys, warnings }, accounts } = assembled?;
        let mut related = vec![Resource::cluster(&delivery.cluster)];
        related.extend(accounts);
        let event = NewEvent::of(caller, Action::Deliver, resource).related(related);
        let details = Details::default().dry_run(delivery.dry_run);
        let secret = SecretManifest {
            name: &delivery.name,
            namespace: Some(&delivery.namespace),
            labels: &with_managed_by(delivery.labels),
            annotations: &BTreeMap::new(),
            resource_version: None,
            content: &SecretContent::new(delivery.secret_type, &document),
        };
        // A call to a cluster cannot be part of a transaction. So the attempt is recorded before,
        // and its outcome after.
        self.audit_writer.record(event.clone().details(details.clone()).outcome(Outcome::Attempt)).await?;
        let created = client.create_secret(&delivery.namespace, &secret, delivery.dry_run).await;
        let (outcome, details) = match &created {
            Ok(_) => (Outcome::Success, details),
            Err(error) => (Outcome::Failure, details.reason(error.slug())),
        };
        // The Secret was delivered or not, whatever happens here. The attempt is recorded.
        if let Err(error) = self.audit_writer.record(event.details(details).outcome(outcome)).await {
            tracing::error!(%error, "delivery outcome not audited");
        }
        let created = created?;
        Ok(Delivered {
            uid: created.uid,
            resource_version: created.resource_version,
            creation_timestamp: created.creation_timestamp,
            keys,
            warnings,
        })
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

fn with_managed_by(labels: Labels) -> BTreeMap<String, String> {
    let mut labels = labels.into_map();
    let (key, value) = MANAGED_BY_LABEL;
    labels.insert(key.to_owned(), value.to_owned());
    labels
}
