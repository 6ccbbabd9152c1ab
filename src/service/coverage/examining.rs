//! Examines groups: reads their pull secrets and asks their registries.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::Semaphore;

use super::{
    contents::{Contents, SecretPlace},
    memory::{SECRET_MAX, ValueMemory},
};
use crate::{
    clients::cluster::{ClusterClient, Pace},
    domain::{
        coverage::{FoundSecret, GroupKey, Grouped, Grouping, Judged, PULL_SECRETS_MAX},
        diagnosis::{Examination, Lookup, ReadSecret, SecretValue},
        names::{NamespaceName, SecretName},
    },
    service::{ServiceError, diagnosis::RegistryQuestions, spawn_blocking},
};

/// Groups of a namespace that are examined at the same time.
const CONCURRENCY: usize = 8;
/// Concurrent groups of all namespaces whose registries are asked.
pub(super) const ASKING: usize = 8;
/// Bytes of values of the Secrets of a namespace that are in memory at the same time.
pub(super) const VALUES_MAX: usize = 4 * 1024 * 1024;
/// Keys of a Secret that a snapshot shows. One with further keys is not adoptable.
const KEYS_MAX: usize = 50;
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
    pub(super) values: &'a ValueMemory,
}

/// Groups of a namespace with their verdicts, and its pull secrets.
#[derive(Debug)]
pub(super) struct ExaminedNamespace {
    pub(super) groups: Vec<(GroupKey, Grouped, Judged)>,
    pub(super) secrets: BTreeMap<SecretName, FoundSecret>,
    pub(super) namespace: NamespaceName,
    /// Number of Secrets that were not read because of the length of the others.
    pub(super) left_out: u32,
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
        let places: Vec<SecretPlace> = names.into_iter().map(|name| (namespace.clone(), name)).collect();
        let is_read = |place: &SecretPlace| !self.contents.values.contains_key(place) && self.announced.contains(place);
        let longest = places.iter().filter(|place| is_read(place)).count().saturating_mul(SECRET_MAX);
        // Held until the values are dropped.
        let mut room = self.values.reserve(longest.min(VALUES_MAX + SECRET_MAX)).await;
        let mut secrets = BTreeMap::new();
        let (mut length, mut left_out) = (0, 0);
        for place in places {
            if is_read(&place) && length >= VALUES_MAX {
                left_out += 1;
                secrets.insert(place.1.clone(), Arc::new(ReadSecret::of(place.1, Lookup::NotRead)));
                continue;
            }
            let (secret, length_of_value) = self.secret(&place).await?;
            length += length_of_value;
            secrets.insert(place.1, secret);
        }
        room.shrink_to(length);
        let (secrets_read, examining) = (&secrets, self);
        let examined = stream::iter(groups).map(|(key, group)| async move {
            let judged = examining.judge(&key, &group, secrets_read).await?;
            Ok::<_, ServiceError>((key, group, judged))
        });
        let groups: Vec<_> = examined.buffered(CONCURRENCY).try_collect().await?;
        let found = secrets.iter().map(|(name, secret)| (name.clone(), found(secret)));
        Ok(ExaminedNamespace { groups, secrets: found.collect(), namespace, left_out })
    }

    async fn judge(
        &self,
        key: &GroupKey,
        group: &Grouped,
        secrets: &BTreeMap<SecretName, Arc<ReadSecret>>,
    ) -> Result<Judged, ServiceError> {
        let (facts, of_service_account) = self.grouping.facts(key, group);
        let used = key.pull_secrets.iter().enumerate().map(|(at, name)| {
            let read = secrets.get(name).filter(|_| at < PULL_SECRETS_MAX);
            read.map_or_else(|| Arc::new(ReadSecret::of(name.clone(), Lookup::NotRead)), Arc::clone)
        });
        let used: Vec<_> = used.collect();
        let examine = move || Ok(Examination::new(facts, &of_service_account, used, &Lookup::NotRead));
        let examination = spawn_blocking(examine).await?;
        // The semaphore is never closed.
        let _permit = self.asking.acquire().await.ok();
        let answers = Box::pin(self.questions.ask(&examination)).await;
        Ok(Judged::of(&examination.conclude(&answers, &[], Vec::new(), None)))
    }

    /// The value of a Secret, and its length: one that regcred wrote is known.
    async fn secret(&self, place: &SecretPlace) -> Result<(Arc<ReadSecret>, usize), ServiceError> {
        if let Some(known) = self.contents.values.get(place) {
            return Ok((Arc::clone(known), 0));
        }
        let (namespace, name) = place;
        let value = if self.announced.contains(place) { self.read(namespace, name).await? } else { Lookup::NotRead };
        let length = if let Lookup::Found(value) = &value { value.length() } else { 0 };
        let name = name.clone();
        let secret = spawn_blocking(move || Ok(Arc::new(ReadSecret::of(name, value)))).await?;
        Ok((secret, length))
    }

    async fn read(&self, namespace: &NamespaceName, name: &SecretName) -> Result<Lookup<SecretValue>, ServiceError> {
        let mut attempt = 1;
        loop {
            self.pace.wait().await;
            match self.client.read_secret_value(namespace, name).await {
                Err(error) if attempt < ATTEMPTS && error.is_transient() => {
                    tokio::time::sleep(PAUSE * attempt).await;
                    attempt += 1;
                }
                result => return Ok(result?),
            }
        }
    }
}

/// What a snapshot says of a Secret.
pub(super) fn found(secret: &ReadSecret) -> FoundSecret {
    let mut keys = secret.shown_keys();
    let has_all_keys = keys.len() <= KEYS_MAX;
    keys.truncate(KEYS_MAX);
    FoundSecret {
        state: secret.state(),
        secret_type: secret.secret_type(),
        keys,
        is_sound: has_all_keys && secret.is_sound(),
    }
}
