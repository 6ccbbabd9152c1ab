//! Dry run of a declaration.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    Reconciler,
    failure::target_error,
    render::Content,
    resync::{unmatched_targets, wanted_namespaces},
};
use crate::{
    clients::cluster::{ClusterClient, ClusterError},
    domain::{
        caller::Identity,
        docker_config::Warning,
        names::{Name, NamespaceName},
        pull_secret::{Declaration, DeletionPolicy, LeftOut, Owner, PreviewAction, Step, Wanted, Written, plan},
        reconcile::TargetError,
    },
    service::{ServiceError, connection, docker_configs::no_account, pull_secrets},
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
    /// Reason for a conflict or an unknown effect.
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

/// Effect of a declaration.
#[derive(Debug)]
pub struct Previewed {
    /// Effect on each target, by cluster and namespace.
    pub targets: Vec<PreviewedTarget>,
    /// Selected accounts that the document leaves out, by name.
    pub left_out: Vec<LeftOut>,
    /// Warnings about selectors that match nothing.
    pub warnings: Vec<Warning>,
}

/// Inputs of a dry run, the same for all clusters.
struct Preview<'a> {
    declaration: &'a Declaration,
    caller: &'a Identity,
    /// The stored pull secret of this name.
    existing: Option<&'a StoredPullSecret>,
    /// Its targets.
    known: &'a [KnownTarget],
    /// None if no account matches.
    content: Option<&'a Content>,
}

impl Reconciler {
    /// Determines the effect of a declaration, without changes. `existing` is the stored pull secret
    /// of the same name.
    ///
    /// The caller must be granted what the declaration selects: all that is left out is selected.
    ///
    /// # Errors
    ///
    /// As [`DockerConfigs::assemble`](crate::service::docker_configs::DockerConfigs::assemble): a
    /// declaration that does not render has no effect.
    pub async fn preview(
        &self,
        caller: &Identity,
        declaration: &Declaration,
        existing: Option<&StoredPullSecret>,
    ) -> Result<Previewed, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let selects_account = match declaration.account_selector() {
            Some(selector) => storage::accounts::selects_any(&mut conn, selector).await?,
            None => true,
        };
        drop(conn);
        let content = if selects_account { Some(self.assemble(declaration).await?) } else { None };
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
        let preview = &Preview { declaration, caller, existing, known: &known, content: content.as_ref() };
        let previews = clusters.iter().map(|(name, &id)| async move {
            // A cluster that fails does not hide the targets of the others.
            match timeout(CLUSTER_TIMEOUT, self.preview_cluster(preview, name, id)).await {
                Ok(Ok(previewed)) => Ok(previewed),
                Ok(Err(error @ ServiceError::Storage(_))) => Err(error),
                Ok(Err(error)) => Ok((vec![PreviewedTarget::unknown(name, None, &error)], Vec::new())),
                Err(_) => {
                    let detail = format!("the cluster took more than {} s", CLUSTER_TIMEOUT.as_secs());
                    let error = ClusterError::Timeout { detail }.into();
                    Ok((vec![PreviewedTarget::unknown(name, None, &error)], Vec::new()))
                }
            }
        });
        // In the order of the clusters' names.
        let previewed: Vec<_> = stream::iter(previews).buffered(CLUSTERS_CONCURRENCY).try_collect().await?;
        let (targets, unmatched): (Vec<_>, Vec<_>) = previewed.into_iter().unzip();
        let mut targets: Vec<PreviewedTarget> = targets.into_iter().flatten().collect();
        targets.sort_by(|one, other| (&one.cluster, &one.namespace).cmp(&(&other.cluster, &other.namespace)));
        let left_out = content.iter().flat_map(|content| &content.left_out);
        let mut left_out: Vec<&str> = left_out.map(|account| account.name.as_str()).collect();
        left_out.sort_unstable();
        let left_out = left_out.into_iter().map(LeftOut::key_collision).collect();
        let warnings = content.is_none().then(Warning::selects_no_account).into_iter();
        Ok(Previewed { targets, left_out, warnings: warnings.chain(unmatched.into_iter().flatten()).collect() })
    }

    /// Previews the targets of a cluster, and warns about selectors that match none of its
    /// namespaces.
    async fn preview_cluster(
        &self,
        preview: &Preview<'_>,
        cluster: &str,
        cluster_id: Uuid,
    ) -> Result<(Vec<PreviewedTarget>, Vec<Warning>), ServiceError> {
        let declaration = preview.declaration;
        let (_, client) = self.client(cluster_id).await?;
        let selects = declaration.clusters().into_iter().any(|(name, selects)| selects && name.as_str() == cluster);
        let namespaces = if selects { client.list_namespaces().await? } else { Vec::new() };
        let wanted: BTreeSet<NamespaceName> = wanted_namespaces(declaration, cluster, &namespaces);
        let unmatched = unmatched_targets(declaration, cluster, &namespaces).into_iter();
        let warnings = unmatched.map(|place| Warning::selects_no_namespace(place, cluster)).collect();
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
                    Ok((action, error)) => {
                        PreviewedTarget { error, ..PreviewedTarget::new(cluster, namespace.as_str(), action) }
                    }
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
        Ok((previewed, warnings))
    }

    async fn preview_target(
        &self,
        preview: &Preview<'_>,
        client: &ClusterClient,
        namespace: &NamespaceName,
        written: &Written,
    ) -> Result<(PreviewAction, Option<TargetError>), ServiceError> {
        let Preview { declaration, existing, content, .. } = *preview;
        let Some(content) = content else { return Err(no_account()) };
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
        let owner = match plan(&wanted, written, found.as_ref()) {
            Step::Create => return Ok((PreviewAction::Create, None)),
            Step::Leave => return Ok((PreviewAction::Unchanged, None)),
            Step::Apply { .. } | Step::Superseded { .. } if is_ours => return Ok((PreviewAction::Update, None)),
            Step::ConflictUnlessGone(owner) if self.pull_secret_exists(owner).await? => Some(owner),
            Step::Apply { .. } | Step::Superseded { .. } | Step::ConflictUnlessGone(_) => {
                return Ok((PreviewAction::Adopt, None));
            }
            Step::Conflict(owner) => owner,
        };
        let mut conn = connection(&self.pool).await?;
        let holder = pull_secrets::holder(&mut conn, preview.caller, owner).await?;
        Ok((PreviewAction::Conflict, Some(TargetError::conflict(&declaration.secret_name, &holder))))
    }
}
