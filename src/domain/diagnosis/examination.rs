//! Examination of a pod: entries of each image, questions to registries, and the conclusion.

use std::{collections::HashMap, sync::Arc};

use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use super::{
    answer::{
        Attempt, ContainerReference, DiagnosedImage, DiagnosedSecret, Diagnosis, ManagedBy, MissingRead, NearEntry,
        PodProblem, PodProblemKind, PullSecretsFrom, RegistryAnswer, SkipReason, Verdict,
    },
    fix::{self, Kubectl, RegcredContext},
    node::Node,
    pod::{Container, Lookup, PodFacts, Subject, WaitingReason},
    registry::{Platform, PullReport},
    secret::{ReadSecret, SecretState, shown_key},
    verdict::{Judgement, judge},
};
use crate::domain::{
    matching::{Addressed, ImageReference, addressed, nearest_entries, pull_entries, slot},
    names::{SecretName, ServiceAccountName},
};

/// Maximum number of images of one diagnosis that registries are asked about.
pub(super) const IMAGES_MAX: usize = 20;
/// Maximum number of images in an answer.
pub(super) const IMAGES_SHOWN_MAX: usize = 50;
/// Maximum number of entries of an image that are examined.
pub(super) const CANDIDATES_MAX: usize = 20;
/// Maximum number of keys of a Secret in an answer.
const KEYS_SHOWN_MAX: usize = 50;

/// Entry that the kubelet tries for an image.
#[derive(Debug)]
pub struct Candidate {
    pub(super) secret: usize,
    pub(super) key: String,
    pub(super) login: Option<(String, SecretString)>,
    pub(super) skipped: Option<SkipReason>,
}

/// How the registry of an image is asked for an entry.
#[derive(Debug, Clone, Copy)]
pub enum Question<'a> {
    /// With this user and password.
    Login(&'a str, &'a SecretString),
    /// Without a login: the entry has none, and the kubelet tries it so.
    Anonymous,
}

impl Candidate {
    /// Returns how the registry of the image may be asked; `None` if it may not.
    #[must_use]
    pub fn question(&self) -> Option<Question<'_>> {
        match (self.skipped, &self.login) {
            (Some(_), _) => None,
            (None, Some((username, password))) => Some(Question::Login(username, password)),
            (None, None) => Some(Question::Anonymous),
        }
    }
}

/// Answers of the registry of one image.
#[derive(Debug, Default)]
pub struct ImageAnswers {
    /// Answer for each candidate that was asked, in their order.
    pub attempts: Vec<Option<PullReport>>,
    /// Answer without a login.
    pub anonymous: Option<PullReport>,
    /// Whether the registry is the node's own host, which was not asked.
    pub is_of_node: bool,
}

/// An image with the entries that the kubelet tries.
#[derive(Debug)]
pub(super) struct ExaminedImage {
    /// `None` if the reference is invalid or regcred does not look at it.
    pub(super) reference: Option<ImageReference>,
    /// Why the reference is invalid.
    pub(super) invalid: Option<String>,
    pub(super) containers: Vec<Container>,
    pub(super) candidates: Vec<Candidate>,
    /// Whether further entries match.
    pub(super) has_more_candidates: bool,
    pub(super) nearest: Vec<NearEntry>,
    pub(super) collisions: Vec<String>,
}

/// Examination of one pod. It holds the logins of its pull secrets.
#[derive(Debug)]
pub struct Examination {
    pub(super) pod: PodFacts,
    pub(super) from: PullSecretsFrom,
    /// Pull secrets of the `ServiceAccount`; `None` if they are unknown.
    pub(super) of_service_account: Option<Vec<SecretName>>,
    pub(super) is_service_account_missing: bool,
    pub(super) secrets: Vec<Arc<ReadSecret>>,
    /// Platforms that the images must have; empty if they are unknown.
    pub(super) platforms: Vec<Platform>,
    pub(super) images: Vec<ExaminedImage>,
    /// Names of further Secrets of the namespace.
    pub(super) reserved: Vec<SecretName>,
    /// Number of images, also of those that are not in the answer.
    image_total: usize,
    pub(super) kubectl: Kubectl,
}

/// Returns the names of the pull secrets that the kubelet uses, in order.
///
/// The API server copies the list of the `ServiceAccount` to a new pod without pull secrets
/// (`plugin/pkg/admission/serviceaccount`). A pod that exists has its final list.
#[must_use]
pub fn pull_secret_names(
    pod: &PodFacts,
    service_account: &Lookup<Vec<SecretName>>,
) -> (PullSecretsFrom, Vec<SecretName>) {
    let is_new = !matches!(pod.subject, Subject::Pod { .. });
    let (from, names) = match service_account {
        Lookup::Found(names) if is_new && !pod.has_own_list() => (PullSecretsFrom::ServiceAccount, names),
        _ => (PullSecretsFrom::Pod, &pod.pull_secrets),
    };
    let mut unique: Vec<SecretName> = Vec::new();
    for name in names {
        if !unique.contains(name) {
            unique.push(name.clone());
        }
    }
    (if unique.is_empty() { PullSecretsFrom::None } else { from }, unique)
}

impl Examination {
    /// Finds the entries of each image in the pull secrets of [`pull_secret_names`].
    #[must_use]
    pub fn new(
        pod: PodFacts,
        service_account: &Lookup<Vec<SecretName>>,
        secrets: Vec<Arc<ReadSecret>>,
        nodes: &Lookup<Vec<Node>>,
    ) -> Self {
        let (from, _) = pull_secret_names(&pod, service_account);
        let of_service_account = match service_account {
            Lookup::Found(names) => Some(names.clone()),
            Lookup::Missing | Lookup::Forbidden | Lookup::NotRead => None,
        };
        let mut images = images_of(&pod.containers);
        let image_total = images.len();
        images.truncate(IMAGES_SHOWN_MAX);
        let images = images.into_iter().enumerate().map(|(index, (image, containers))| {
            let mut examined = ExaminedImage::new(image, containers);
            if index < IMAGES_MAX {
                examined.find_entries(&secrets, &pod.subject);
            }
            examined
        });
        Self {
            images: images.collect(),
            reserved: Vec::new(),
            image_total,
            kubectl: Kubectl::default(),
            from,
            of_service_account,
            is_service_account_missing: matches!(service_account, Lookup::Missing),
            platforms: pod.nodes.platforms(nodes),
            secrets,
            pod,
        }
    }

    /// Returns the images that registries are to be asked about: each with its index, and the
    /// entries that the kubelet tries in this order until one works.
    pub fn questions(&self) -> impl Iterator<Item = (usize, &ImageReference, &[Candidate])> {
        // A pull secret that makes every pull fail needs no registry.
        let most = if self.failing_secret().is_some() { 0 } else { IMAGES_MAX };
        let images = self.images.iter().enumerate().take(most);
        images.filter_map(|(index, image)| Some((index, image.reference.as_ref()?, image.candidates.as_slice())))
    }

    /// Has the fixes call `kubectl` so.
    #[must_use]
    pub fn with_kubectl(self, kubectl: Kubectl) -> Self {
        Self { kubectl, ..self }
    }

    /// Number of images.
    #[must_use]
    pub fn image_count(&self) -> usize {
        self.images.len()
    }

    /// Whether it is known on which platforms the pod can run.
    #[must_use]
    pub const fn wants_platforms(&self) -> bool {
        !self.platforms.is_empty()
    }

    /// Returns the images for which a fix may create a Secret: each with its index.
    #[must_use]
    pub fn lacking(&self, answers: &[ImageAnswers]) -> Vec<(usize, &ImageReference)> {
        let none = ImageAnswers::default();
        let images =
            self.images.iter().enumerate().filter_map(|(index, image)| Some((index, image.reference.as_ref()?)));
        let is_lacking = |index: usize| {
            let Judgement { verdict, .. } = judge(self, index, answers.get(index).unwrap_or(&none));
            fix::needs_secret(verdict)
        };
        images.filter(|(index, _)| is_lacking(*index)).collect()
    }

    /// Keeps new Secrets from having this name: a Secret of the namespace has it.
    pub fn reserve(&mut self, name: SecretName) {
        self.reserved.push(name);
    }

    /// Name of the Secret that a fix for an image would create.
    #[must_use]
    pub fn new_secret(&self, index: usize) -> Option<String> {
        let image = self.images.get(index)?.reference.as_ref()?;
        Some(fix::new_secret_name(self, &image.name))
    }

    /// Names of the Secrets with the label of a pull secret of regcred, with its id.
    pub fn managed(&self) -> impl Iterator<Item = (&SecretName, Uuid)> {
        self.secrets.iter().filter_map(|secret| Some((&secret.name, secret.pull_secret_id?)))
    }

    /// Resource version of a Secret.
    #[must_use]
    pub fn version_of(&self, name: &SecretName) -> Option<&str> {
        self.secrets.iter().find(|secret| secret.name == *name)?.resource_version.as_deref()
    }

    /// Names of the Secrets that do not exist.
    pub fn missing(&self) -> impl Iterator<Item = &SecretName> {
        self.secrets.iter().filter(|secret| secret.state == SecretState::Missing).map(|secret| &secret.name)
    }

    /// Judges the answers of the registries, one for each image.
    ///
    /// `managed` has the pull secret of each Secret of [`managed`](Self::managed), and `context` what
    /// regcred could deliver.
    #[must_use]
    pub fn conclude(
        &self,
        answers: &[ImageAnswers],
        managed: &[(SecretName, ManagedBy)],
        missing_rights: Vec<MissingRead>,
        context: Option<&RegcredContext>,
    ) -> Diagnosis {
        let none = ImageAnswers::default();
        let answers: Vec<&ImageAnswers> =
            (0..self.images.len()).map(|index| answers.get(index).unwrap_or(&none)).collect();
        let judgements: Vec<Judgement> =
            answers.iter().enumerate().map(|(index, answers)| judge(self, index, answers)).collect();
        let verdicts: Vec<Verdict> = judgements.iter().map(|judgement| judgement.verdict).collect();
        let images = self.images.iter().zip(answers).zip(judgements).enumerate();
        let mut proposed: Vec<fix::Fix> = Vec::new();
        let images = images.map(|(index, ((image, answers), judgement))| {
            let fix = fix::propose(self, (index, &verdicts), &proposed, managed, context);
            proposed.extend(fix.clone());
            self.diagnosed(image, answers, judgement, fix)
        });
        let images: Vec<DiagnosedImage> = images.collect();
        let problems = self.problems();
        Diagnosis {
            ok: problems.iter().all(|problem| problem.kind.is_note())
                && images.iter().all(|image| image.verdict == Verdict::Ok),
            pull_secrets_from: self.from,
            service_account: self.pod.service_account.to_string(),
            pull_secrets: self.secrets.iter().map(|secret| diagnosed_secret(secret, managed)).collect(),
            images,
            problems,
            missing_rights,
        }
    }

    fn problems(&self) -> Vec<PodProblem> {
        let mut problems = Vec::new();
        let ServiceAccountContext { name, is_missing } = self.service_account();
        if is_missing {
            problems.push(PodProblem {
                kind: PodProblemKind::ServiceAccountMissing,
                sentence: format!("the ServiceAccount {name} does not exist, so the API server creates no pod with it"),
                fix: Some(fix::create_service_account(&self.kubectl, &self.pod.namespace, name)),
            });
        }
        if self.pod.has_invalid_reference {
            problems.push(PodProblem {
                kind: PodProblemKind::InvalidReference,
                sentence: "an entry of imagePullSecrets has no valid name, so the kubelet ignores it: remove it"
                    .to_owned(),
                fix: None,
            });
        }
        if self.image_total > self.images.len() {
            problems.push(PodProblem {
                kind: PodProblemKind::TooManyImages,
                sentence: format!("the pod has {} images, of which {IMAGES_SHOWN_MAX} are shown", self.image_total),
                fix: None,
            });
        }
        problems
    }

    /// The `ServiceAccount`. It does not matter to a pod that exists.
    fn service_account(&self) -> ServiceAccountContext<'_> {
        let is_new = !matches!(self.pod.subject, Subject::Pod { .. });
        ServiceAccountContext { name: &self.pod.service_account, is_missing: is_new && self.is_service_account_missing }
    }

    /// Whether the pod would get a list of its `ServiceAccount` that could not be read.
    pub(super) fn is_list_unknown(&self) -> bool {
        let is_new = !matches!(self.pod.subject, Subject::Pod { .. });
        let is_unread = self.of_service_account.is_none() && !self.is_service_account_missing;
        is_new && is_unread && !self.pod.has_own_list()
    }

    /// Whether a pull secret makes every pull of the pod fail.
    pub(super) fn failing_secret(&self) -> Option<&ReadSecret> {
        self.secrets.iter().find(|secret| secret.fails_pod).map(Arc::as_ref)
    }

    fn diagnosed(
        &self,
        image: &ExaminedImage,
        answers: &ImageAnswers,
        Judgement { verdict, sentence }: Judgement,
        fix: Option<fix::Fix>,
    ) -> DiagnosedImage {
        let works_at = answers.attempts.iter().position(|one| one.as_ref().is_some_and(PullReport::pulls));
        let attempts = image.candidates.iter().enumerate().map(|(index, candidate)| {
            let answer = answers.attempts.get(index).and_then(Option::as_ref);
            let unasked = || match works_at {
                Some(works_at) if works_at < index => SkipReason::EarlierWorks,
                _ => SkipReason::Limit,
            };
            Attempt {
                secret: self.secrets.get(candidate.secret).map(|one| one.name.to_string()).unwrap_or_default(),
                key: shown_key(&candidate.key),
                answer: answer.map(RegistryAnswer::from),
                skipped: answer.is_none().then(|| candidate.skipped.unwrap_or_else(unasked)),
            }
        });
        let all = answers.attempts.iter().flatten().chain(&answers.anonymous);
        let platforms = all.flat_map(|report| &report.platforms);
        let mut platforms: Vec<String> = platforms.map(ToString::to_string).collect();
        platforms.sort_unstable();
        platforms.dedup();
        DiagnosedImage {
            image: image.reference.as_ref().map(ToString::to_string),
            containers: image
                .containers
                .iter()
                .map(|one| ContainerReference { name: one.name.to_string(), kind: one.kind })
                .collect(),
            verdict,
            sentence,
            fix,
            attempts: attempts.collect(),
            anonymous: answers.anonymous.as_ref().map(RegistryAnswer::from),
            nearest: image.nearest.clone(),
            collisions: image.collisions.clone(),
            platforms,
            waiting: image.containers.iter().find_map(|container| container.waiting),
            event: image.containers.iter().filter_map(|container| container.event).max(),
        }
    }
}

struct ServiceAccountContext<'a> {
    name: &'a ServiceAccountName,
    is_missing: bool,
}

/// Containers of each image, in the order of the pod.
fn images_of(containers: &[Container]) -> Vec<(&str, Vec<Container>)> {
    let mut images: Vec<(&str, Vec<Container>)> = Vec::new();
    let mut places: HashMap<&str, usize> = HashMap::new();
    for container in containers {
        let place = *places.entry(&container.image).or_insert_with(|| {
            images.push((&container.image, Vec::new()));
            images.len() - 1
        });
        if let Some((_, of_image)) = images.get_mut(place) {
            of_image.push(container.clone());
        }
    }
    images
}

impl ExaminedImage {
    /// Parses the reference. No entry is known yet.
    fn new(image: &str, containers: Vec<Container>) -> Self {
        let (reference, invalid) = match ImageReference::parse(image) {
            Ok(reference) => (Some(reference), None),
            Err(invalid) => (None, Some(invalid.to_string())),
        };
        Self {
            reference,
            invalid,
            containers,
            candidates: Vec::new(),
            has_more_candidates: false,
            nearest: Vec::new(),
            collisions: Vec::new(),
        }
    }

    /// Finds the entries that the kubelet tries, or else those that come closest.
    fn find_entries(&mut self, secrets: &[Arc<ReadSecret>], subject: &Subject) {
        let Some(reference) = &self.reference else { return };
        let keys: Vec<Vec<&str>> = secrets.iter().map(|secret| secret.keys()).collect();
        let fails_pod = secrets.iter().any(|secret| secret.fails_pod);
        let places = pull_entries(&keys, &reference.name);
        self.has_more_candidates = places.len() > CANDIDATES_MAX;
        for place in places.into_iter().take(CANDIDATES_MAX) {
            let Some(entry) = secrets.get(place.secret).and_then(|secret| secret.entries.get(place.entry)) else {
                continue;
            };
            let skipped = match (&entry.login, addressed(&entry.key, &reference.name)) {
                _ if fails_pod => Some(SkipReason::PodFails),
                (None, _) if entry.is_anonymous => None,
                (None, _) => Some(SkipReason::NoLogin),
                (_, Addressed::Elsewhere) => Some(SkipReason::OtherRegistry),
                // The request chose the host, not an object of the cluster.
                (_, Addressed::ByWildcard) if *subject == Subject::Spec => Some(SkipReason::Wildcard),
                (_, Addressed::Exactly | Addressed::ByWildcard) => None,
            };
            let (key, login) = (entry.key.clone(), entry.login.clone());
            self.candidates.push(Candidate { secret: place.secret, key, login, skipped });
        }
        self.collisions = collisions(&self.candidates, secrets);
        if self.candidates.is_empty() {
            // The details repeat parts of keys.
            let shown: Vec<Vec<String>> =
                keys.iter().map(|keys| keys.iter().map(|key| shown_key(key)).collect()).collect();
            let near = nearest_entries(&shown, &reference.name).into_iter();
            let near = near.filter_map(|(secret, key, mismatch, detail)| {
                let secret = secrets.get(secret)?.name.to_string();
                Some(NearEntry { secret, key, mismatch, detail })
            });
            self.nearest = near.collect();
        }
    }

    /// Whether a container with it has run.
    pub(super) fn has_started(&self) -> bool {
        self.containers.iter().any(|container| container.has_started)
    }

    /// Whether the kubelet reports a failed pull.
    pub(super) fn has_failed(&self) -> bool {
        self.containers.iter().any(|container| {
            let is_pull = |waiting| matches!(waiting, WaitingReason::ErrImagePull | WaitingReason::ImagePullBackOff);
            container.waiting.is_some_and(is_pull)
        })
    }
}

/// Names the pull secrets with an entry for the same images as that of another one, but with another
/// login.
fn collisions(candidates: &[Candidate], secrets: &[Arc<ReadSecret>]) -> Vec<String> {
    let is_other = |one: &Candidate, other: &Candidate| match (&one.login, &other.login) {
        (Some((user, password)), Some((other_user, other_password))) => {
            user != other_user || password.expose_secret() != other_password.expose_secret()
        }
        _ => true,
    };
    let slots: Vec<Option<String>> = candidates.iter().map(|one| slot(&one.key)).collect();
    let slotted = || candidates.iter().zip(&slots);
    let collides = |one: &Candidate, slot: &Option<String>| {
        slotted().any(|(other, other_slot)| one.secret != other.secret && slot == other_slot && is_other(one, other))
    };
    let colliding = slotted().filter(|(one, slot)| collides(one, slot));
    let mut names: Vec<String> = Vec::new();
    for secret in colliding.filter_map(|(one, _)| secrets.get(one.secret)) {
        if !names.iter().any(|name| name == secret.name.as_str()) {
            names.push(secret.name.to_string());
        }
    }
    names
}

fn diagnosed_secret(secret: &ReadSecret, managed: &[(SecretName, ManagedBy)]) -> DiagnosedSecret {
    let keys = if secret.state == SecretState::Found { secret.keys() } else { Vec::new() };
    DiagnosedSecret {
        name: secret.name.to_string(),
        state: secret.state,
        keys: keys.into_iter().take(KEYS_SHOWN_MAX).map(shown_key).collect(),
        problems: secret.problems.clone(),
        managed_by: managed.iter().find(|(name, _)| *name == secret.name).map(|(_, by)| by.clone()),
    }
}
