//! The dry run: what a declaration would do, target by target.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Content, Reconciler, explain};
use crate::{
    clients::cluster::ClusterError,
    domain::{
        names::{Name, NamespaceName},
        pull_secret::{Declaration, DeletionPolicy, Owner, PreviewAction, Step, Wanted, Written, plan},
    },
    service::{ServiceError, connection},
    storage::{self, pull_secrets::StoredPullSecret},
};

/// How long a dry run looks through one cluster.
const PREVIEW_TIME: Duration = Duration::from_secs(20);
/// How many clusters it looks through at a time.
const PREVIEW_CLUSTERS: usize = 8;
/// How many Secrets of a cluster it looks at at a time.
const PREVIEW_CONCURRENCY: usize = 16;

/// What would become of a target.
#[derive(Debug)]
pub struct PreviewedTarget {
    /// Name of the cluster.
    pub cluster: String,
    /// The namespace; none where the cluster as a whole could not be looked at.
    pub namespace: Option<String>,
    /// What would be done.
    pub action: PreviewAction,
    /// Why it cannot be told: a slug, and a sentence.
    pub error: Option<(&'static str, String)>,
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
            error: Some(explain(error)),
        }
    }
}

impl Reconciler {
    /// Says what a declaration would do, target by target, and does nothing. `existing` is what is stored under its name.
    ///
    /// # Errors
    ///
    /// As [`DockerConfigs::assemble`]: a declaration that cannot be rendered would not do anything.
    pub async fn preview(
        &self,
        declaration: &Declaration,
        existing: Option<&StoredPullSecret>,
    ) -> Result<Vec<PreviewedTarget>, ServiceError> {
        let content = self.assemble(declaration).await?;
        let mut conn = connection(&self.pool).await?;
        let known = match existing {
            Some(existing) => storage::targets::known(&mut conn, existing.id).await?,
            None => Vec::new(),
        };
        let mut clusters: BTreeMap<String, Uuid> =
            known.iter().map(|target| (target.cluster.clone(), target.cluster_id)).collect();
        let names: Vec<&str> = declaration.clusters().into_keys().map(Name::as_str).collect();
        clusters.extend(storage::pull_secrets::find_clusters(&mut conn, &names).await?);
        drop(conn);
        let looks = clusters.iter().map(|(name, &id)| {
            let (content, known) = (&content, known.iter().filter(move |target| target.cluster_id == id));
            let known = known.map(|target| (target.namespace.as_str(), &target.written)).collect();
            async move {
                let looked = self.preview_cluster(declaration, existing, (name, id), &known, content);
                // A cluster that cannot be asked keeps nothing back of what is known of the others.
                match timeout(PREVIEW_TIME, looked).await {
                    Ok(Ok(targets)) => Ok(targets),
                    Ok(Err(error @ ServiceError::Storage(_))) => Err(error),
                    Ok(Err(error)) => Ok(vec![PreviewedTarget::unknown(name, None, &error)]),
                    Err(_) => {
                        let detail = format!("the cluster was not looked through within {} s", PREVIEW_TIME.as_secs());
                        let error = ClusterError::Timeout { detail }.into();
                        Ok(vec![PreviewedTarget::unknown(name, None, &error)])
                    }
                }
            }
        });
        // Unordered: a cluster that hangs keeps one of the places, and nobody else waiting.
        let previewed: Vec<_> = stream::iter(looks).buffer_unordered(PREVIEW_CLUSTERS).try_collect().await?;
        let mut previewed: Vec<PreviewedTarget> = previewed.into_iter().flatten().collect();
        previewed.sort_by(|one, other| (&one.cluster, &one.namespace).cmp(&(&other.cluster, &other.namespace)));
        Ok(previewed)
    }

    async fn preview_cluster(
        &self,
        declaration: &Declaration,
        existing: Option<&StoredPullSecret>,
        (cluster, cluster_id): (&str, Uuid),
        known: &BTreeMap<&str, &Written>,
        content: &Content,
    ) -> Result<Vec<PreviewedTarget>, ServiceError> {
        let (_, client) = self.client(cluster_id).await?;
        let listed = declaration.listed().into_iter().filter(|(name, _)| name.as_str() == cluster);
        let mut meant: BTreeSet<NamespaceName> = listed.map(|(_, namespace)| namespace.clone()).collect();
        if declaration.clusters().into_iter().any(|(name, selects)| selects && name.as_str() == cluster) {
            let namespaces = client.list_namespaces().await?.into_iter();
            let selected = namespaces.filter(|namespace| {
                !namespace.terminating && declaration.selects(cluster, &namespace.name, &namespace.labels)
            });
            meant.extend(selected.map(|namespace| namespace.name));
        }
        let unwritten = Written::default();
        let looks = meant.iter().map(|namespace| {
            let (client, unwritten) = (&client, &unwritten);
            async move {
                let found = client.get_secret(namespace, &declaration.secret_name).await;
                let found = match found {
                    Ok(found) => found,
                    Err(error) => return PreviewedTarget::unknown(cluster, Some(namespace.as_str()), &error.into()),
                };
                let written = known.get(namespace.as_str()).copied().unwrap_or(unwritten);
                let wanted = Wanted {
                    id: existing.map_or(Uuid::nil(), |existing| existing.id),
                    generation: i64::MAX,
                    content_mac: &content.mac,
                    adopt: declaration.adopt,
                };
                let is_ours = found.as_ref().is_some_and(|found| found.owner(wanted.id, written) == Owner::Us);
                let is_other_type =
                    existing.is_some_and(|existing| existing.declaration.secret_type != declaration.secret_type);
                if is_ours && is_other_type {
                    let error = ServiceError::Cluster(ClusterError::TypeFixed);
                    return PreviewedTarget::unknown(cluster, Some(namespace.as_str()), &error);
                }
                let action = match plan(&wanted, written, found.as_ref()) {
                    Step::Create => PreviewAction::Create,
                    Step::Leave => PreviewAction::Unchanged,
                    Step::Apply { .. } | Step::Superseded { .. } if is_ours => PreviewAction::Update,
                    Step::Apply { .. } | Step::Superseded { .. } => PreviewAction::Adopt,
                    Step::ConflictUnlessGone(owner) => match self.is_there(owner).await {
                        Ok(false) => PreviewAction::Adopt,
                        Ok(true) => PreviewAction::Conflict,
                        Err(error) => return PreviewedTarget::unknown(cluster, Some(namespace.as_str()), &error),
                    },
                    Step::Conflict => PreviewAction::Conflict,
                };
                PreviewedTarget::new(cluster, namespace.as_str(), action)
            }
        });
        let mut previewed: Vec<PreviewedTarget> = stream::iter(looks).buffered(PREVIEW_CONCURRENCY).collect().await;
        let lost = match declaration.deletion_policy {
            DeletionPolicy::Delete => PreviewAction::Remove,
            DeletionPolicy::Retain => PreviewAction::Forget,
        };
        let given_up = known.keys().filter(|namespace| !meant.iter().any(|name| name.as_str() == **namespace));
        previewed.extend(given_up.map(|namespace| PreviewedTarget::new(cluster, namespace, lost)));
        Ok(previewed)
    }
}
