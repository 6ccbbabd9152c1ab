//! Combines judged groups to the content of a snapshot.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use uuid::Uuid;

use super::{
    grouping::{GroupKey, Grouped, Grouping, User, number},
    judged::{Judged, MatchedEntry, badness},
    snapshot::{
        Credential, FailsAt, FailureCount, Group, MissingPart, PullSecretUse, SecretCounts, SecretOwner, Summary,
        UserCount, VerdictCount,
    },
    user::{PullPolicy, UserKind},
};
use crate::domain::{
    diagnosis::{SecretState, Verdict},
    matching::ImageReference,
    names::{NamespaceName, SecretName},
    secret::SecretType,
};

/// A registry account whose login is in a Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownAccount {
    /// Id.
    pub id: Uuid,
    /// Name.
    pub name: String,
}

/// What regcred knows of a Secret that it wrote.
#[derive(Debug, Clone)]
pub struct KnownSecret {
    /// Pull secret, with its name; none for a direct delivery.
    pub pull_secret: Option<(Uuid, String)>,
    /// Accounts by key.
    pub accounts: HashMap<String, KnownAccount>,
}

/// A pull secret that exists, or is used.
#[derive(Debug, Clone)]
pub struct FoundSecret {
    /// Whether it could be read.
    pub state: SecretState,
    /// Its type.
    pub secret_type: Option<SecretType>,
    /// Keys of its entries.
    pub keys: Vec<String>,
    /// Whether each entry has a login, and nothing is wrong.
    pub is_sound: bool,
}

/// Facts of a cluster beside its groups.
#[derive(Debug, Default)]
pub struct SurveyFacts {
    /// Whether a node verifies logins for images that it has.
    pub verifies_cached_images: Option<bool>,
    /// What could not be read.
    pub missing: Vec<MissingPart>,
    /// Calls to the API server.
    pub calls: u32,
    /// Duration of the run in seconds.
    pub seconds: u32,
}

/// Number of users of an account or a pull secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The account or pull secret.
    pub id: Uuid,
    /// Workloads.
    pub workloads: u32,
    /// Namespaces.
    pub namespaces: u32,
}

/// Users of a resource, each once.
#[derive(Debug, Default)]
pub struct Uses(HashMap<Uuid, HashSet<u32>>);

impl Uses {
    fn add(&mut self, id: Uuid, users: &[u32]) {
        self.0.entry(id).or_default().extend(users);
    }

    /// Counts the users, by id.
    fn counted(&self, users: &[User]) -> Vec<Usage> {
        let namespace =
            |user: &u32| usize::try_from(*user).ok().and_then(|at| users.get(at)).map(|user| user.namespace);
        let mut counted: Vec<Usage> = self
            .0
            .iter()
            .map(|(id, of_id)| {
                let namespaces: HashSet<u32> = of_id.iter().filter_map(namespace).collect();
                Usage { id: *id, workloads: number(of_id.len()), namespaces: number(namespaces.len()) }
            })
            .collect();
        counted.sort_unstable_by_key(|usage| usage.id);
        counted
    }
}

/// Users of a Secret.
#[derive(Debug, Default)]
struct SecretUsers {
    users: HashSet<u32>,
    pods: u32,
}

/// Combines the groups of a cluster.
#[derive(Debug, Default)]
pub struct Survey {
    /// Secrets that regcred wrote.
    known: HashMap<(NamespaceName, SecretName), Arc<KnownSecret>>,
    verifies_cached_images: Option<bool>,
    /// Worst verdict of each user.
    worst: HashMap<u32, Verdict>,
    accounts: Uses,
    pull_secrets: Uses,
    secrets: BTreeMap<(NamespaceName, SecretName), SecretUsers>,
    /// Groups, in the order in which they were added.
    pub groups: Vec<Group>,
}

impl Survey {
    /// Begins with the Secrets that regcred wrote.
    #[must_use]
    pub fn new(
        known: HashMap<(NamespaceName, SecretName), Arc<KnownSecret>>,
        verifies_cached_images: Option<bool>,
    ) -> Self {
        Self { known, verifies_cached_images, ..Self::default() }
    }

    /// Adds a group with its verdict.
    pub fn add(&mut self, key: &GroupKey, group: &Grouped, judged: &Judged) {
        for user in &group.users {
            let worst = self.worst.entry(*user).or_insert(Verdict::Ok);
            if badness(judged.verdict) > badness(*worst) {
                *worst = judged.verdict;
            }
        }
        for name in &*key.pull_secrets {
            let place = (key.namespace.clone(), name.clone());
            if let Some((id, _)) = self.known.get(&place).and_then(|known| known.pull_secret.as_ref()) {
                self.pull_secrets.add(*id, &group.users);
            }
            let used = self.secrets.entry(place).or_default();
            used.users.extend(&group.users);
            used.pods = used.pods.saturating_add(group.pods);
        }
        let mut accounts = BTreeSet::new();
        for entry in &judged.entries {
            accounts.extend(self.account_of(key, entry).map(|account| account.id));
        }
        for account in accounts {
            self.accounts.add(account, &group.users);
        }
        let shown = self.shown(key, group, judged);
        self.groups.push(shown);
    }

    fn known_secret(&self, key: &GroupKey, entry: &MatchedEntry) -> Option<&KnownSecret> {
        self.known.get(&(key.namespace.clone(), SecretName::parse(&entry.secret).ok()?)).map(Arc::as_ref)
    }

    fn account_of(&self, key: &GroupKey, entry: &MatchedEntry) -> Option<&KnownAccount> {
        self.known_secret(key, entry)?.accounts.get(&entry.key)
    }

    fn shown(&self, key: &GroupKey, group: &Grouped, judged: &Judged) -> Group {
        let entry = judged.entries.iter().find(|entry| entry.works).or_else(|| judged.entries.first());
        let credential = entry.map(|entry| Credential {
            secret: entry.secret.clone(),
            key: entry.key.clone(),
            works: entry.works,
            account: self.account_of(key, entry).map(|account| account.name.clone()),
            pull_secret: self.known_secret(key, entry).and_then(|known| Some(known.pull_secret.as_ref()?.1.clone())),
        });
        let repository = key.repository.as_ref().map(|(registry, repository)| format!("{registry}/{repository}"));
        // An invalid reference may be any text.
        let versions = group
            .references
            .keys()
            .filter_map(|reference| Some(ImageReference::parse(reference).ok()?.version().to_owned()));
        Group {
            namespace: key.namespace.to_string(),
            service_account: key.service_account.to_string(),
            pull_secrets: key.pull_secrets.iter().map(ToString::to_string).collect(),
            pull_secrets_from: group.from,
            versions: if repository.is_some() { versions.collect() } else { Vec::new() },
            repository,
            workloads: group
                .users_by_kind
                .iter()
                .map(|(kind, count)| UserCount { kind: *kind, count: *count })
                .collect(),
            pods: group.pods,
            example: group.example.clone(),
            verdict: judged.verdict,
            sentence: judged.sentence.clone(),
            credential,
            fails_at: self.fails_at(group, judged.verdict),
            previous_verdict: None,
        }
    }

    fn fails_at(&self, group: &Grouped, verdict: Verdict) -> Vec<FailsAt> {
        if matches!(verdict, Verdict::Ok | Verdict::Unknown) {
            return Vec::new();
        }
        let has = |policy: PullPolicy| group.policies.contains(&policy);
        let fails = |at: &FailsAt| match at {
            FailsAt::NewNode => has(PullPolicy::IfNotPresent) || has(PullPolicy::Always),
            FailsAt::Restart => has(PullPolicy::Always),
            FailsAt::CachedImage => self.verifies_cached_images == Some(true) && verdict.is_about_login(),
        };
        FailsAt::ALL.into_iter().filter(fails).collect()
    }

    /// Pull secrets that exist or are used, with their users.
    ///
    /// `found` has those of which something is known, and `attachments` the number of
    /// `ServiceAccount`s that list each.
    #[must_use]
    pub fn pull_secrets(
        &self,
        found: &BTreeMap<(NamespaceName, SecretName), FoundSecret>,
        attachments: &BTreeMap<(NamespaceName, SecretName), u32>,
    ) -> Vec<PullSecretUse> {
        let places: BTreeSet<_> = found.keys().chain(self.secrets.keys()).collect();
        let shown = places.into_iter().map(|place| {
            let (used, found, known) = (self.secrets.get(place), found.get(place), self.known.get(place));
            let owner = match known.map(Arc::as_ref) {
                Some(KnownSecret { pull_secret: Some(_), .. }) => SecretOwner::PullSecret,
                Some(_) => SecretOwner::Direct,
                None => SecretOwner::Foreign,
            };
            let is_sound = found.is_some_and(|found| found.is_sound);
            PullSecretUse {
                namespace: place.0.to_string(),
                name: place.1.to_string(),
                state: found.map_or(SecretState::NotRead, |found| found.state),
                secret_type: found.and_then(|found| Some(found.secret_type?.as_str().to_owned())),
                owner,
                pull_secret: known.and_then(|known| Some(known.pull_secret.as_ref()?.1.clone())),
                workloads: used.map_or(0, |used| number(used.users.len())),
                pods: used.map_or(0, |used| used.pods),
                service_accounts: attachments.get(place).copied().unwrap_or_default(),
                keys: found.map(|found| found.keys.clone()).unwrap_or_default(),
                adoptable: owner == SecretOwner::Foreign && is_sound,
                adoption: None,
            }
        });
        shown.collect()
    }

    /// Users of each account, by id.
    #[must_use]
    pub fn accounts(&self, grouping: &Grouping) -> Vec<Usage> {
        self.accounts.counted(grouping.users())
    }

    /// Users of each pull secret of regcred, by id.
    #[must_use]
    pub fn users_of_pull_secrets(&self, grouping: &Grouping) -> Vec<Usage> {
        self.pull_secrets.counted(grouping.users())
    }

    /// Summary of the groups and of these pull secrets.
    #[must_use]
    pub fn summary(&self, grouping: &Grouping, pull_secrets: &[PullSecretUse], facts: SurveyFacts) -> Summary {
        let mut verdicts: BTreeMap<(UserKind, Verdict), u32> = BTreeMap::new();
        for (at, user) in grouping.users().iter().enumerate() {
            let verdict = self.worst.get(&number(at)).copied().unwrap_or(Verdict::Unknown);
            *verdicts.entry((user.kind, verdict)).or_default() += 1;
        }
        let failures = FailsAt::ALL.map(|fails_at| {
            let groups = self.groups.iter().filter(|group| group.fails_at.contains(&fails_at)).count();
            FailureCount { fails_at, groups: number(groups) }
        });
        Summary {
            groups: number(self.groups.len()),
            groups_ok: number(self.groups.iter().filter(|group| group.verdict == Verdict::Ok).count()),
            workloads: number(grouping.users().len()),
            pods: grouping.pods(),
            namespaces: grouping.namespaces(),
            verdicts: verdicts
                .into_iter()
                .map(|((kind, verdict), count)| VerdictCount { kind, verdict, count })
                .collect(),
            failures: failures.into(),
            pull_secrets: counts(pull_secrets),
            verifies_cached_images: facts.verifies_cached_images,
            missing: facts.missing,
            calls: facts.calls,
            seconds: facts.seconds,
        }
    }
}

fn counts(pull_secrets: &[PullSecretUse]) -> SecretCounts {
    let count =
        |is_counted: fn(&PullSecretUse) -> bool| number(pull_secrets.iter().filter(|one| is_counted(one)).count());
    SecretCounts {
        total: number(pull_secrets.len()),
        of_pull_secrets: count(|one| one.owner == SecretOwner::PullSecret),
        direct: count(|one| one.owner == SecretOwner::Direct),
        foreign: count(|one| one.owner == SecretOwner::Foreign && one.state != SecretState::Missing),
        unused: count(PullSecretUse::is_unused),
        missing: count(|one| one.state == SecretState::Missing),
        adoptable: count(|one| one.adoptable),
    }
}
