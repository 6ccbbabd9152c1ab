//! Groups of equal pulls.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    sync::Arc,
};

use super::{
    snapshot::{Example, MissingPart},
    user::{PullPolicy, UserKind},
};
use crate::domain::{
    diagnosis::{
        Container, ContainerKind, Controller, Lookup, NodeChoice, PodFacts, PullSecretsFrom, Subject, WorkloadKind,
        pull_secret_names,
    },
    matching::{ImageName, ImageReference},
    names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
};

/// Pull secrets of a pod that are read. A list keeps one more, which is not: its group is unknown
/// unless another one works.
pub const PULL_SECRETS_MAX: usize = 20;
/// Containers of a pod or template that are examined.
pub const CONTAINERS_MAX: usize = 100;
/// Workloads of a cluster, and pods without one.
const USERS_MAX: usize = 500_000;
/// Groups of one namespace.
const GROUPS_OF_NAMESPACE_MAX: u32 = 1_000;
/// Groups of a cluster.
const GROUPS_MAX: usize = 50_000;
/// Maximum number of tags and digests that a group keeps.
const VERSIONS_MAX: usize = 16;
/// Maximum number of tags and digests of a group that its registry is asked about.
pub(super) const ASKED_MAX: usize = 3;

/// Image of a container.
#[derive(Debug, Clone)]
pub struct ObservedImage {
    /// Reference.
    pub image: String,
    /// Pull policy.
    pub policy: PullPolicy,
}

/// Origin of an observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Template of a workload. Its pods get the pull secrets of their `ServiceAccount` if it has
    /// none.
    Template(WorkloadKind),
    /// Pod without a controller.
    Pod,
    /// Pod of a workload that is observed by its template.
    PodOfTemplate,
    /// Pod of another controller, by kind and name.
    PodOfOther(String),
}

/// A template or pod, as read from the cluster.
#[derive(Debug)]
pub struct Observed {
    /// Origin.
    pub source: Source,
    /// Name of the workload or pod.
    pub name: PodName,
    /// Namespace.
    pub namespace: NamespaceName,
    /// `ServiceAccount`.
    pub service_account: ServiceAccountName,
    /// Its own pull secrets, in order.
    pub pull_secrets: Vec<SecretName>,
    /// Images of its containers.
    pub images: Vec<ObservedImage>,
    /// Number of further containers.
    pub containers_left_out: u32,
}

/// What pulls have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupKey {
    /// Namespace.
    pub namespace: NamespaceName,
    /// `ServiceAccount`.
    pub service_account: ServiceAccountName,
    /// Pull secrets that the kubelet uses, in its order.
    pub pull_secrets: Arc<[SecretName]>,
    /// Registry and repository; none for invalid references.
    pub repository: Option<(String, String)>,
}

/// A group.
#[derive(Debug)]
pub struct Grouped {
    /// Name of a workload or pod in it.
    sample: PodName,
    /// Origin of the pull secrets: the `ServiceAccount` if a template gets them from it.
    pub from: PullSecretsFrom,
    /// Number of users by kind.
    pub users_by_kind: BTreeMap<UserKind, u32>,
    /// Users, each once, by their numbers in [`Grouping::users`].
    pub users: Vec<u32>,
    /// Number of pods.
    pub pods: u32,
    /// Complete references, with the number of their containers.
    pub references: BTreeMap<String, u32>,
    /// Pull policies.
    pub policies: BTreeSet<PullPolicy>,
    /// Name of one of the users.
    pub example: Option<Example>,
}

/// Object whose pods use images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Kind.
    pub kind: UserKind,
    /// Number of its namespace.
    pub namespace: u32,
}

/// Pull secrets of `ServiceAccount`s.
pub type ServiceAccounts = HashMap<(NamespaceName, ServiceAccountName), Vec<SecretName>>;

/// Collects observations in groups.
#[derive(Debug, Default)]
pub struct Grouping {
    service_accounts: ServiceAccounts,
    /// Whether all `ServiceAccount`s were read: one that is unknown does not exist.
    knows_service_accounts: bool,
    namespaces: HashMap<NamespaceName, u32>,
    others: HashSet<(NamespaceName, String)>,
    users: Vec<User>,
    pods: u32,
    groups: HashMap<GroupKey, Grouped>,
    groups_by_namespace: HashMap<NamespaceName, u32>,
    left_out: LeftOut,
}

/// What a limit left out.
#[derive(Debug, Default)]
struct LeftOut {
    /// Pods and workloads.
    objects: u32,
    /// Containers.
    containers: u32,
    /// Pods and templates with pull secrets that are not read.
    lists: u32,
    /// Images of pods and templates for which there is no group.
    images: u32,
}

impl Grouping {
    /// Begins with the `ServiceAccount`s that could be read.
    #[must_use]
    pub fn new(service_accounts: ServiceAccounts, knows_service_accounts: bool) -> Self {
        Self { service_accounts, knows_service_accounts, ..Self::default() }
    }

    /// Adds a template or a pod.
    pub fn add(&mut self, observed: Observed) {
        if self.users.len() >= USERS_MAX {
            self.left_out.objects = self.left_out.objects.saturating_add(1);
            return;
        }
        let user = self.user_of(&observed);
        let is_pod = !matches!(observed.source, Source::Template(_));
        if is_pod {
            self.pods += 1;
        }
        let example = user.and_then(|_| Example::of(&observed.source, &observed.name));
        self.left_out.containers = self.left_out.containers.saturating_add(observed.containers_left_out);
        let (key, from, images, name) = self.key_of(observed, is_pod);
        self.left_out.lists += u32::from(key.pull_secrets.len() > PULL_SECRETS_MAX);
        for (repository, references) in group_images(&images) {
            let key = GroupKey { repository, ..key.clone() };
            if !self.has_room_for(&key) {
                self.left_out.images += 1;
                continue;
            }
            let group = self.groups.entry(key).or_insert_with(|| Grouped::new(name.clone(), from));
            if from == PullSecretsFrom::ServiceAccount {
                group.from = from;
            }
            group.pods += u32::from(is_pod);
            for image in references {
                group.policies.insert(image.policy);
                group.add_reference(&image.image);
            }
            if let Some((number, kind)) = user {
                group.users.push(number);
                *group.users_by_kind.entry(kind).or_default() += 1;
            }
            if group.example.is_none() {
                group.example.clone_from(&example);
            }
        }
    }

    /// Counts a new group of a namespace. Returns whether it is within the limits.
    fn has_room_for(&mut self, key: &GroupKey) -> bool {
        if self.groups.contains_key(key) {
            return true;
        }
        let of_namespace = self.groups_by_namespace.entry(key.namespace.clone()).or_default();
        if *of_namespace >= GROUPS_OF_NAMESPACE_MAX || self.groups.len() >= GROUPS_MAX {
            return false;
        }
        *of_namespace += 1;
        true
    }

    /// What limits left out.
    #[must_use]
    pub fn missing(&self) -> Vec<MissingPart> {
        let LeftOut { objects, containers, lists, images } = self.left_out;
        let parts = [
            ("workloads", format!("of a cluster, {USERS_MAX} are examined"), objects),
            ("containers", format!("of a pod, {CONTAINERS_MAX} containers are examined"), containers),
            (
                "imagePullSecrets",
                format!("of a list, {PULL_SECRETS_MAX} are read; these pods and workloads may use further ones"),
                lists,
            ),
            (
                "groups",
                format!("of a namespace, {GROUPS_OF_NAMESPACE_MAX} are examined, and {GROUPS_MAX} of a cluster"),
                images,
            ),
        ];
        let reached = parts.into_iter().filter(|(_, _, count)| *count > 0);
        reached.map(|(resource, effect, count)| MissingPart::of_limit(resource, effect, count)).collect()
    }

    /// Registers the user of an observation; none if another observation has it.
    fn user_of(&mut self, observed: &Observed) -> Option<(u32, UserKind)> {
        let kind = match &observed.source {
            Source::Template(kind) => UserKind::from(*kind),
            Source::Pod => UserKind::Pod,
            Source::PodOfTemplate => return None,
            Source::PodOfOther(controller) => {
                if !self.others.insert((observed.namespace.clone(), controller.clone())) {
                    return None;
                }
                UserKind::Other
            }
        };
        let next = number(self.namespaces.len());
        let namespace = *self.namespaces.entry(observed.namespace.clone()).or_insert(next);
        let user = number(self.users.len());
        self.users.push(User { kind, namespace });
        Some((user, kind))
    }

    /// Key of an observation, without a repository; the origin of its pull secrets, its images and its
    /// name.
    fn key_of(&self, observed: Observed, is_pod: bool) -> (GroupKey, PullSecretsFrom, Vec<ObservedImage>, PodName) {
        let Observed { namespace, service_account, pull_secrets, images, name, .. } = observed;
        let place = (namespace, service_account);
        let of_service_account = self.lookup(&place);
        let (namespace, service_account) = place;
        let facts = pod_facts(subject(is_pod, name.clone()), (namespace, service_account), pull_secrets, Vec::new());
        let (from, pull_secrets) = pull_secret_names(&facts, &of_service_account);
        let PodFacts { namespace, service_account, .. } = facts;
        let pull_secrets = Arc::from(pull_secrets);
        (GroupKey { namespace, service_account, pull_secrets, repository: None }, from, images, name)
    }

    fn lookup(&self, place: &(NamespaceName, ServiceAccountName)) -> Lookup<Vec<SecretName>> {
        match self.service_accounts.get(place) {
            Some(names) => Lookup::Found(names.clone()),
            None if self.knows_service_accounts => Lookup::Missing,
            None => Lookup::Forbidden,
        }
    }

    /// A pod with the images of a group that most containers have, up to a maximum, and the pull
    /// secrets of its `ServiceAccount`: what the examination of the group needs.
    #[must_use]
    pub fn facts(&self, key: &GroupKey, group: &Grouped) -> (PodFacts, Lookup<Vec<SecretName>>) {
        let of_service_account = self.lookup(&(key.namespace.clone(), key.service_account.clone()));
        // Only a pod that exists has no pull secrets although its ServiceAccount has some.
        let has_list = matches!(&of_service_account, Lookup::Found(names) if !names.is_empty());
        let is_pod = key.pull_secrets.is_empty() && has_list;
        let mut references: Vec<(&String, &u32)> = group.references.iter().collect();
        references.sort_by_key(|(_, count)| Reverse(**count));
        let containers = references.into_iter().take(ASKED_MAX).enumerate().filter_map(|(index, (image, _))| {
            let name = Name::parse(&format!("image-{index}")).ok()?;
            Some(Container {
                name,
                kind: ContainerKind::Container,
                image: image.clone(),
                waiting: None,
                event: None,
                has_started: false,
            })
        });
        let place = (key.namespace.clone(), key.service_account.clone());
        let subject = subject(is_pod, group.sample.clone());
        (pod_facts(subject, place, key.pull_secrets.to_vec(), containers.collect()), of_service_account)
    }

    /// Takes the groups, by namespace.
    pub fn take_groups(&mut self) -> BTreeMap<NamespaceName, Vec<(GroupKey, Grouped)>> {
        let mut by_namespace: BTreeMap<NamespaceName, Vec<(GroupKey, Grouped)>> = BTreeMap::new();
        for (key, group) in mem::take(&mut self.groups) {
            by_namespace.entry(key.namespace.clone()).or_default().push((key, group));
        }
        for groups in by_namespace.values_mut() {
            groups.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        }
        by_namespace
    }

    /// Pull secrets that groups use, and that are read.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<(NamespaceName, SecretName)> {
        let of_key = |key: &GroupKey| {
            let names = key.pull_secrets.iter().take(PULL_SECRETS_MAX);
            names.map(|name| (key.namespace.clone(), name.clone())).collect::<Vec<_>>()
        };
        self.groups.keys().flat_map(of_key).collect()
    }

    /// Number of `ServiceAccount`s that list each pull secret.
    #[must_use]
    pub fn attachments(&self) -> BTreeMap<(NamespaceName, SecretName), u32> {
        let mut attachments = BTreeMap::new();
        for ((namespace, _), names) in &self.service_accounts {
            for name in names {
                *attachments.entry((namespace.clone(), name.clone())).or_default() += 1;
            }
        }
        attachments
    }

    /// Users, in the order of their numbers.
    #[must_use]
    pub fn users(&self) -> &[User] {
        &self.users
    }

    /// Number of pods.
    #[must_use]
    pub const fn pods(&self) -> u32 {
        self.pods
    }

    /// Number of namespaces with a user.
    #[must_use]
    pub fn namespaces(&self) -> u32 {
        number(self.namespaces.len())
    }
}

/// Images by repository.
fn group_images(images: &[ObservedImage]) -> BTreeMap<Option<(String, String)>, Vec<&ObservedImage>> {
    let mut by_repository: BTreeMap<_, Vec<&ObservedImage>> = BTreeMap::new();
    for image in images {
        let name = ImageName::parse(&image.image).ok();
        let repository = name.map(|name| (name.registry().to_owned(), name.repository().to_owned()));
        by_repository.entry(repository).or_default().push(image);
    }
    by_repository
}

fn subject(is_pod: bool, name: PodName) -> Subject {
    if is_pod {
        Subject::Pod { name, controller: Some(Controller { workload: None, has_own_list: None }) }
    } else {
        Subject::Workload { kind: WorkloadKind::Deployment, name }
    }
}

fn pod_facts(
    subject: Subject,
    (namespace, service_account): (NamespaceName, ServiceAccountName),
    pull_secrets: Vec<SecretName>,
    containers: Vec<Container>,
) -> PodFacts {
    PodFacts {
        subject,
        namespace,
        uid: None,
        containers,
        pull_secrets,
        has_invalid_reference: false,
        service_account,
        nodes: NodeChoice::default(),
    }
}

impl Grouped {
    fn new(sample: PodName, from: PullSecretsFrom) -> Self {
        Self {
            sample,
            from,
            users_by_kind: BTreeMap::new(),
            users: Vec::new(),
            pods: 0,
            references: BTreeMap::new(),
            policies: BTreeSet::new(),
            example: None,
        }
    }

    fn add_reference(&mut self, image: &str) {
        let reference = ImageReference::parse(image).map_or_else(|_| image.to_owned(), |one| one.to_string());
        if self.references.len() < VERSIONS_MAX || self.references.contains_key(&reference) {
            *self.references.entry(reference).or_default() += 1;
        }
    }
}

/// Counts are far below the maximum.
pub(super) fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
