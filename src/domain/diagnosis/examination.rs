//! Examination of a pod: entries of each image, questions to registries, and the conclusion.

use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use super::{
    answer::{
        Attempt, ContainerReference, DiagnosedImage, DiagnosedSecret, Diagnosis, ManagedBy, MissingRead, NearEntry,
        PodProblem, PodProblemKind, PullSecretsFrom, RegistryAnswer, SkipReason, Verdict,
    },
    fix::{self, RegcredContext},
    node::Node,
    pod::{Container, Lookup, PodFacts, Subject},
    registry::{Platform, PullReport},
    secret::{ReadSecret, SecretState, shown_key},
    verdict::{Judgement, judge},
};
use crate::domain::{
    matching::{Addressed, ImageReference, addressed, nearest_entries, pull_entries},
    names::{SecretName, ServiceAccountName},
    registry::RegistryScope,
};

/// Maximum number of images of one diagnosis that registries are asked about.
pub(super) const IMAGES_MAX: usize = 20;

/// Entry that the kubelet tries for an image.
#[derive(Debug)]
pub struct Candidate {
    pub(super) secret: usize,
    pub(super) key: String,
    pub(super) login: Option<(String, SecretString)>,
    pub(super) skipped: Option<SkipReason>,
}

impl Candidate {
    /// Returns the login that the registry of the image may be asked with, if any.
    #[must_use]
    pub fn question(&self) -> Option<(&str, &SecretString)> {
        let login = self.login.as_ref().filter(|_| self.skipped.is_none());
        login.map(|(username, password)| (username.as_str(), password))
    }
}

/// Answers of the registry of one image.
#[derive(Debug, Default)]
pub struct ImageAnswers {
    /// Answer for each candidate that was asked, in their order.
    pub attempts: Vec<Option<PullReport>>,
    /// Answer without a login.
    pub anonymous: Option<PullReport>,
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
        Lookup::Found(names) if is_new && pod.pull_secrets.is_empty() => (PullSecretsFrom::ServiceAccount, names),
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
        let mut images: Vec<(String, Vec<Container>)> = Vec::new();
        for container in &pod.containers {
            match images.iter_mut().find(|(image, _)| *image == container.image) {
                Some((_, containers)) => containers.push(container.clone()),
                None => images.push((container.image.clone(), vec![container.clone()])),
            }
        }
        let images = images.into_iter().map(|(image, containers)| examine(&image, containers, &secrets, &pod.subject));
        Self {
            images: images.collect(),
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

    /// Hosts of the registries of [`questions`](Self::questions).
    pub fn registry_hosts(&self) -> impl Iterator<Item = String> {
        let scopes = self.questions().filter_map(|(_, image, _)| RegistryScope::parse(image.name.registry()).ok());
        scopes.map(|scope| scope.host().to_owned())
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
        let images = images.map(|(index, ((image, answers), judgement))| {
            let fix = fix::propose(self, index, &verdicts, managed, context);
            self.diagnosed(image, answers, judgement, fix)
        });
        let images: Vec<DiagnosedImage> = images.collect();
        let problems = self.problems();
        Diagnosis {
            ok: problems.is_empty() && images.iter().all(|image| image.verdict == Verdict::Ok),
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
                fix: Some(fix::create_service_account(&self.pod.namespace, name)),
            });
        }
        if self.pod.has_invalid_reference {
            problems.push(PodProblem {
                kind: PodProblemKind::InvalidReference,
                sentence: "an entry of imagePullSecrets has no valid name: remove it".to_owned(),
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

fn examine(image: &str, containers: Vec<Container>, secrets: &[Arc<ReadSecret>], subject: &Subject) -> ExaminedImage {
    let mut examined = ExaminedImage {
        reference: None,
        invalid: None,
        containers,
        candidates: Vec::new(),
        nearest: Vec::new(),
        collisions: Vec::new(),
    };
    let reference = match ImageReference::parse(image) {
        Ok(reference) => reference,
        Err(invalid) => {
            examined.invalid = Some(invalid.to_string());
            return examined;
        }
    };
    let keys: Vec<Vec<&str>> = secrets.iter().map(|secret| secret.keys()).collect();
    let fails_pod = secrets.iter().any(|secret| secret.fails_pod);
    for place in pull_entries(&keys, &reference.name) {
        let Some(entry) = secrets.get(place.secret).and_then(|secret| secret.entries.get(place.entry)) else {
            continue;
        };
        let skipped = match (&entry.login, addressed(&entry.key, &reference.name)) {
            _ if fails_pod => Some(SkipReason::PodFails),
            (None, _) => Some(SkipReason::NoLogin),
            (_, Addressed::Elsewhere) => Some(SkipReason::OtherRegistry),
            // The request chose the host, not an object of the cluster.
            (_, Addressed::ByWildcard) if *subject == Subject::Spec => Some(SkipReason::Wildcard),
            (_, Addressed::Exactly | Addressed::ByWildcard) => None,
        };
        let (key, login) = (entry.key.clone(), entry.login.clone());
        examined.candidates.push(Candidate { secret: place.secret, key, login, skipped });
    }
    examined.collisions = collisions(&examined.candidates, secrets);
    if examined.candidates.is_empty() {
        let near = nearest_entries(&keys, &reference.name).into_iter();
        let near = near.filter_map(|(secret, key, mismatch, detail)| {
            let secret = secrets.get(secret)?.name.to_string();
            Some(NearEntry { secret, key: shown_key(&key), mismatch, detail })
        });
        examined.nearest = near.collect();
    }
    examined.reference = Some(reference);
    examined
}

/// Names the pull secrets with the same key as another one, but another login.
fn collisions(candidates: &[Candidate], secrets: &[Arc<ReadSecret>]) -> Vec<String> {
    let is_other = |one: &Candidate, other: &Candidate| match (&one.login, &other.login) {
        (Some((user, password)), Some((other_user, other_password))) => {
            user != other_user || password.expose_secret() != other_password.expose_secret()
        }
        _ => true,
    };
    let collides = |one: &Candidate| {
        candidates.iter().any(|other| one.secret != other.secret && one.key == other.key && is_other(one, other))
    };
    let colliding = candidates.iter().filter(|one| collides(one)).filter_map(|one| secrets.get(one.secret));
    let mut names: Vec<String> = Vec::new();
    for secret in colliding {
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
        keys: keys.into_iter().map(shown_key).collect(),
        problems: secret.problems.clone(),
        managed_by: managed.iter().find(|(name, _)| *name == secret.name).map(|(_, by)| by.clone()),
    }
}
