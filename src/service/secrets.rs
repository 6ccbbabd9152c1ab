//! The direct road: one Secret, now.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::{
    clients::cluster::{ClusterError, NewSecret},
    domain::{
        audit::{Action, Details, NewEvent, Outcome, Resource},
        caller::Call,
        docker_config::{RenderedConfig, Warning},
        names::{Labels, Name, NamespaceName, SecretName},
        secret::{MANAGED_BY_LABEL, SecretType},
        selector::AccountSelection,
    },
    service::{
        ServiceError,
        audit::{refusals::Refusal, writer::AuditWriter},
        clusters::Clusters,
        docker_configs::{Assembled, DockerConfigs},
    },
};

/// What to place where.
#[derive(Debug)]
pub struct Delivery {
    /// The cluster.
    pub cluster: Name,
    /// The namespace.
    pub namespace: NamespaceName,
    /// Name of the Secret.
    pub name: SecretName,
    /// Type of the Secret, which decides the form of the document.
    pub secret_type: SecretType,
    /// The accounts that go into it.
    pub accounts: AccountSelection,
    /// Further labels of the Secret.
    pub labels: Labels,
    /// The API server checks everything and stores nothing.
    pub dry_run: bool,
}

/// A Secret that is there now; nothing of its value.
#[derive(Debug)]
pub struct Delivered {
    /// Identity of the Secret.
    pub uid: Option<String>,
    /// Version of the Secret.
    pub resource_version: Option<String>,
    /// When it was created, by the cluster's clock.
    pub creation_timestamp: Option<DateTime<Utc>>,
    /// The keys of its document.
    pub keys: Vec<String>,
    /// What its reader will do otherwise than the accounts say.
    pub warnings: Vec<Warning>,
}

/// Places Secrets in namespaces.
#[derive(Clone)]
pub struct Secrets {
    clusters: Clusters,
    docker_configs: DockerConfigs,
    audit_writer: AuditWriter,
}

impl Secrets {
    /// Puts the service together.
    #[must_use]
    pub fn new(clusters: Clusters, docker_configs: DockerConfigs, audit_writer: AuditWriter) -> Self {
        Self { clusters, docker_configs, audit_writer }
    }

    /// Creates one Secret by one POST, which is never repeated: a Secret of that name that is there stays as
    /// it is.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] for the cluster, [`ServiceError::Invalid`] for the accounts,
    /// [`ServiceError::Cluster`] for whatever the API server says. For the caller, a namespace that is not granted
    /// is one that the cluster does not have; it is not looked for.
    pub async fn deliver(&self, caller: &Call, delivery: Delivery) -> Result<Delivered, ServiceError> {
        // The cluster first: what it cannot take need not be opened.
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
        let secret = NewSecret {
            namespace: delivery.namespace.to_string(),
            name: delivery.name.to_string(),
            secret_type: delivery.secret_type.as_str().to_owned(),
            data_key: delivery.secret_type.data_key().to_owned(),
            document,
            labels: with_managed_by(delivery.labels),
            annotations: BTreeMap::new(),
        };
        // It cannot be in one transaction with what a cluster does: so what is about to be done is durable before, and how
        // it went follows.
        self.audit_writer.record(event.clone().details(details.clone()).outcome(Outcome::Attempt)).await?;
        let created = client.create_secret(&secret, delivery.dry_run).await;
        let (outcome, details) = match &created {
            Ok(_) => (Outcome::Success, details),
            Err(error) => (Outcome::Failure, details.reason(error.slug())),
        };
        // What was done is answered as it was: that it was asked for is on record.
        if let Err(error) = self.audit_writer.record(event.details(details).outcome(outcome)).await {
            tracing::error!(%error, "how a delivery went is not in the audit record; that it was asked for is");
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
