//! Examines groups: reads their pull secrets and asks their registries.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;

use super::contents::{Contents, SecretPlace};
use crate::{
    clients::cluster::{ClusterClient, ClusterError, Pace},
    domain::{
        coverage::{FoundSecret, GroupKey, Grouped, Grouping, Judged, PULL_SECRETS_MAX},
        diagnosis::{Examination, Lookup, ReadSecret, SecretValue},
        names::{NamespaceName, SecretName},
    },
    service::{ServiceError, diagnosis::RegistryQuestions},
};

/// Groups of a namespace that are examined at the same time.
const CONCURRENCY: usize = 8;
/// Concurrent groups of all namespaces whose registries are asked.
pub(super) const ASKING: usize = 8;
/// Attempts to read a Secret, and the pause between them.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// What the examination of a namespace needs.
pub(super) struct Examining<'a> {
    pub(super) client: &'a ClusterClient,
    pub(super) pace: &'a Pace,
    pub(super) grouping: &'a Grouping,
    pub(super) contents: &'a Contents,
    /// Secrets that may be read: an audit event names them.
    pub(super) announced: &'a BTreeSet<SecretPlace>,
    pub(super) questions: &'a RegistryQuestions<'a>,
    pub(super) asking: &'a Semaphore,
}

/// Groups of a namespace with their verdicts, and its pull secrets.
#[derive(Debug)]
pub(super) struct ExaminedNamespace {
    pub(super) groups: Vec<(GroupKey, Grouped, Judged)>,
    pub(super) secrets: BTreeMap<SecretName, FoundSecret>,
    pub(super) namespace: NamespaceName,
}

impl Examining<'_> {
    /// Reads the pull secrets of a namespace, and examines its groups. Their values are dropped
    /// afterwards.
    pub(super) async fn examine(
        &self,
        namespace: NamespaceName,
        groups: Vec<(GroupKey, Grouped)>,
    ) -> Result<ExaminedNamespace, ServiceError> {
        let read = groups.iter().flat_map(|(key, _)| key.pull_secrets.iter().take(PULL_SECRETS_MAX));
        let names: BTreeSet<SecretName> = read.cloned().collect();
        let mut secrets = BTreeMap::new();
        for name in names {
            let secret = self.secret((namespace.clone(), name.clone())).await?;
            secrets.insert(name, secret);
        }
        let (secrets_read, examining) = (&secrets, self);
        let examined = stream::iter(groups).map(|(key, group)| async move {
            let judged = examining.judge(&key, &group, secrets_read).await;
            (key, group, judged)
        });
        let groups = examined.buffered(CONCURRENCY).collect().await;
        let found = secrets.iter().map(|(name, secret)| (name.clone(), found(secret)));
        Ok(ExaminedNamespace { groups, secrets: found.collect(), namespace })
    }

    async fn judge(&self, key: &GroupKey, group: &Grouped, secrets: &BTreeMap<SecretName, Arc<ReadSecret>>) -> Judged {
        let (facts, of_service_account) = self.grouping.facts(key, group);
        let used = key.pull_secrets.iter().enumerate().map(|(at, name)| {
            let read = secrets.get(name).filter(|_| at < PULL_SECRETS_MAX);
            read.map_or_else(|| Arc::new(ReadSecret::of(name.clone(), Lookup::NotRead)), Arc::clone)
        });
        let used = used.collect();
        let examination = Examination::new(facts, &of_service_account, used, &Lookup::NotRead);
        // The semaphore is never closed.
        let _permit = self.asking.acquire().await.ok();
        let answers = Box::pin(self.questions.ask(&examination)).await;
        Judged::of(&examination.conclude(&answers, &[], Vec::new(), None))
    }

    /// The value of a Secret: one that regcred wrote is known.
    async fn secret(&self, place: SecretPlace) -> Result<Arc<ReadSecret>, ServiceError> {
        if let Some(known) = self.contents.values.get(&place) {
            return Ok(Arc::clone(known));
        }
        let (namespace, name) = &place;
        let value = if self.announced.contains(&place) { self.read(namespace, name).await? } else { Lookup::NotRead };
        Ok(Arc::new(ReadSecret::of(name.clone(), value)))
    }

    async fn read(&self, namespace: &NamespaceName, name: &SecretName) -> Result<Lookup<SecretValue>, ServiceError> {
        let mut attempt = 1;
        loop {
            self.pace.wait().await;
            match self.client.read_secret_value(namespace, name).await {
                Err(error) if attempt < ATTEMPTS && is_transient(&error) => {
                    tokio::time::sleep(PAUSE * attempt).await;
                    attempt += 1;
                }
                result => return Ok(result?),
            }
        }
    }
}

const fn is_transient(error: &ClusterError) -> bool {
    matches!(error, ClusterError::Unreachable { .. } | ClusterError::Timeout { .. } | ClusterError::Overloaded { .. })
}

/// What a snapshot says of a Secret.
pub(super) fn found(secret: &ReadSecret) -> FoundSecret {
    FoundSecret {
        state: secret.state(),
        secret_type: secret.secret_type(),
        keys: secret.shown_keys(),
        is_sound: secret.is_sound(),
    }
}
