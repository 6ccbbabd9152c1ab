//! Dry run of a declaration.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Reconciler, failure::target_error, render::Content, resync::wanted_namespaces};
use crate::{
    clients::cluster::{ClusterClient, ClusterError},
    domain::{
        names::{Name, NamespaceName},
        pull_secret::{Declaration, DeletionPolicy, LeftOut, Owner, PreviewAction, Step, Wanted, Written, plan},
        reconcile::TargetError,
    },
    service::{ServiceError, connection},
    storage::{self, pull_secrets::StoredPullSecret, targets::status::KnownTarget},
};

/// Time limit per cluster.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(20);
/// Clusters previewed concurrently.
const CLUSTERS_CONCURRENCY: usize = 8;
/// Secrets of one cluster read concurrently.
const SECRETS_CONCURRENCY: usize = 16;

/// Effect of a declaration on one target.
#[derive(Debug)]
pub struct PreviewedTarget {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace; none if the cluster as a whole cannot be previewed.
    pub namespace: Option<String>,
    /// The effect.
    pub action: PreviewAction,
    /// Reason for an unknown effect.
    pub error: Option<TargetError>,
}

impl PreviewedTarget {
    fn new(cluster: &str, namespace: &str, action: PreviewAction) -> Self {
        Self { cluster: cluster.to_owned(), namespace: Some(namespace.to_owned()), action, error: None }
    }

    fn unknown(cluster: &str, namespace: Option<&str>, error: &ServiceError) -> Self {
        Self {
            cluster: cluster.to_owned(),
            namespace: namespace.map(str::to_owned),
            action: PreviewAction::Unknown,
            error: Some(target_error(error)),
        }
    }
}

/// Inputs of a dry run, the same for all clusters.
struct Preview<'a> {
    declaration: &'a Declaration,
    /// The stored pull secret of this name.
    existing: Option<&'a StoredPullSecret>,
    /// Its targets.
    known: &'a [KnownTarget],
    content: &'a Content,
}

impl Reconciler {
    /// Determines the effect of a declaration on each target, without changes, and the selected
    /// accounts that the document leaves out. `existing` is the stored pull secret of the same name.
    ///
    /// The caller must be granted what the declaration selects: all that is left out is selected.
    ///
    /// # Errors
    ///
    /// As [`DockerConfigs::assemble`](crate::service::docker_configs::DockerConfigs::assemble): a
    /// declaration that does not render has no effect.
    pub async fn preview(
        &self,
        declaration: &Declaration,
        existing: Option<&StoredPullSecret>,
    ) -> Result<(Vec<PreviewedTarget>, Vec<LeftOut>), ServiceError> {
        let content = self.assemble(declaration).await?;
        let mut conn = connection(&self.pool).await?;
        let known = match existing {
            Some(existing) => storage::targets::status::list_known(&mut conn, existing.id).await?,
            None => Vec::new(),
        };
        let mut clusters: BTreeMap<String, Uuid> =
            known.iter().map(|target| (target.cluster.clone(), target.cluster_id)).collect();
        let names: Vec<&str> = declaration.clusters().into_keys().map(Name::as_str).collect();
        clusters.extend(storage::pull_secrets::lock_clusters(&mut conn, &names).await?);
        drop(conn);
        let preview = &Preview { declaration, existing, known: &known, content: &content };
        let previews = clusters.iter().map(|(name, &id)| async move {
            // A cluster that fails does not hide the targets of the others.
            match timeout(CLUSTER_TIMEOUT, self.preview_cluster(preview, name, id)).await {
                Ok(Ok(targets)) => Ok(targets),
                Ok(Err(error @ ServiceError::Storage(_))) => Err(error),
                Ok(Err(error)) => Ok(vec![PreviewedTarget::unknown(name, None, &error)]),
                Err(_) => {
                    let detail = format!("the cluster took more than {} s", CLUSTER_TIMEOUT.as_secs());
                    let error = ClusterError::Timeout { detail }.into();
                    Ok(vec![PreviewedTarget::unknown(name, None, &error)])
                }
            }
        });
        let previewed: Vec<_> = stream::iter(previews).buffer_unordered(CLUSTERS_CONCURRENCY).try_collect().await?;
        let mut previewed: Vec<PreviewedTarget> = previewed.into_iter().flatten().collect();
        previewed.sort_by(|one, other| (&one.cluster, &one.namespace).cmp(&(&other.cluster, &other.namespace)));
        let mut left_out: Vec<&str> = content.left_out.iter().map(|account| account.name.as_str()).collect();
        left_out.sort_unstable();
        Ok((previewed, left_out.into_iter().map(LeftOut::key_collision).collect()))
    }

    async fn preview_cluster(
        &self,
        preview: &Preview<'_>,
        cluster: &str,
        cluster_id: Uuid,
    ) -> Result<Vec<PreviewedTarget>, ServiceError> {
        let declaration = preview.declaration;
        let (_, client) = self.client(cluster_id).await?;
        let selects = declaration.clusters().into_iter().any(|(name, selects)| selects && name.as_str() == cluster);
        let namespaces = if selects { client.list_namespaces().await? } else { Vec::new() };
        let wanted: BTreeSet<NamespaceName> = wanted_namespaces(declaration, cluster, &namespaces);
        let known: BTreeMap<&str, &Written> = preview
            .known
            .iter()
            .filter(|target| target.cluster_id == cluster_id)
            .map(|target| (target.namespace.as_str(), &target.written))
            .collect();
        let unwritten = Written::default();
        let previews = wanted.iter().map(|namespace| {
            let written = known.get(namespace.as_str()).copied().unwrap_or(&unwritten);
            let client = &client;
            async move {
                match self.preview_target(preview, client, namespace, written).await {
                    Ok(action) => PreviewedTarget::new(cluster, namespace.as_str(), action),
                    Err(error) => PreviewedTarget::unknown(cluster, Some(namespace.as_str()), &error),
                }
            }
        });
        let mut previewed: Vec<PreviewedTarget> = stream::iter(previews).buffered(SECRETS_CONCURRENCY).collect().await;
        let unwanted = match declaration.deletion_policy {
            DeletionPolicy::Delete => PreviewAction::Remove,
            DeletionPolicy::Retain => PreviewAction::Forget,
        };
        let dropped = known.keys().filter(|namespace| !wanted.iter().any(|name| name.as_str() == **namespace));
        previewed.extend(dropped.map(|namespace| PreviewedTarget::new(cluster, namespace, unwanted)));
        Ok(previewed)
    }

    async fn preview_target(
        &self,
        preview: &Preview<'_>,
        client: &ClusterClient,
        namespace: &NamespaceName,
        written: &Written,
    ) -> Result<PreviewAction, ServiceError> {
        let Preview { declaration, existing, content, .. } = *preview;
        let found = client.get_secret(namespace, &declaration.secret_name).await?;
        let wanted = Wanted {
            id: existing.map_or(Uuid::nil(), |existing| existing.id),
            generation: i64::MAX,
            content_mac: &content.mac,
            adopt: declaration.adopt,
        };
        let is_ours = found.as_ref().is_some_and(|found| found.owner(wanted.id, written) == Owner::Us);
        let type_changes = existing.is_some_and(|one| one.declaration.secret_type != declaration.secret_type);
        if is_ours && type_changes {
            return Err(ClusterError::TypeFixed.into());
        }
        Ok(match plan(&wanted, written, found.as_ref()) {
            Step::Create => PreviewAction::Create,
            Step::Leave => PreviewAction::Unchanged,
            Step::Apply { .. } | Step::Superseded { .. } if is_ours => PreviewAction::Update,
            Step::ConflictUnlessGone(owner) if self.pull_secret_exists(owner).await? => PreviewAction::Conflict,
            Step::Apply { .. } | Step::Superseded { .. } | Step::ConflictUnlessGone(_) => PreviewAction::Adopt,
            Step::Conflict => PreviewAction::Conflict,
        })
    }
}
