//! What each reader does for one image.

use std::collections::HashSet;

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Found, ImageName, docker, lint, look_up,
    nearest::{Candidate, Nearest, nearest},
    refusal::refusal,
};
use crate::domain::docker_config::{
    Consumer, RenderError, ScopedAccount, Warning, WarningCode, claim_keys,
    import::shown,
    parse::{Config, Form},
    reading::{Reading, read},
};

/// Which entries each reader uses for an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The image in full, without tag and digest.
    pub image: String,
    /// What each reader does.
    pub consumers: Consumers,
    /// What is not as it looks with the entries that are used, or nearly used.
    pub warnings: Vec<Warning>,
}

/// What each reader does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Consumers {
    /// The kubelet, from an image pull secret. It tries all keys, one after another.
    pub kubernetes: LookUp,
    /// Controllers that read image pull secrets through go-containerregistry.
    pub k8schain: LookUp,
    /// The docker CLI, from its file.
    pub docker: LookUp,
    /// The docker CLI, from the variable `DOCKER_AUTH_CONFIG`.
    pub docker_auth_config: LookUp,
    /// podman, skopeo and buildah.
    pub podman: LookUp,
}

/// What one reader does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LookUp {
    /// The keys of the entries that it uses, in the order in which it tries them.
    pub keys: Vec<String>,
    /// The accounts that these entries come from, in the same order.
    pub accounts: Vec<String>,
    /// Whether it uses only one of them, and chance decides which.
    pub ambiguous: bool,
    /// The helper program `docker-credential-…` that it asks instead of looking at the entries.
    pub helper: Option<String>,
    /// Why it cannot log in with what it finds, or does not read the document at all.
    pub problem: Option<String>,
    /// Where nothing is found: the nearest entries, and why they are not used.
    pub nearest: Vec<Nearest>,
}

impl Consumers {
    fn each(mut ask: impl FnMut(Consumer) -> LookUp) -> Self {
        Self {
            kubernetes: ask(Consumer::Kubernetes),
            k8schain: ask(Consumer::K8schain),
            docker: ask(Consumer::Docker),
            docker_auth_config: ask(Consumer::DockerAuthConfig),
            podman: ask(Consumer::Podman),
        }
    }

    /// What one reader does.
    #[must_use]
    pub fn get(&self, consumer: Consumer) -> &LookUp {
        match consumer {
            Consumer::Kubernetes => &self.kubernetes,
            Consumer::K8schain => &self.k8schain,
            Consumer::Docker => &self.docker,
            Consumer::DockerAuthConfig => &self.docker_auth_config,
            Consumer::Podman => &self.podman,
        }
    }
}

impl LookUp {
    fn impossible(problem: String) -> Self {
        Self { problem: Some(problem), ..Self::default() }
    }

    fn with_helper(name: &str) -> Self {
        Self { helper: Some(name.to_owned()), ..Self::default() }
    }
}

/// Says what each reader does for the image with these accounts, rendered for it.
///
/// A reader for which they cannot be rendered together has that as its `problem`.
#[must_use]
pub fn explain_accounts(accounts: &[ScopedAccount<'_>], image: &ImageName) -> Explanation {
    let mut warnings = Vec::new();
    let consumers = Consumers::each(|consumer| match entries(consumer, accounts) {
        Ok(candidates) => {
            let found = search(consumer, &candidates, Form::DockerConfigJson, image);
            warnings.extend(used_for_more(consumer, &candidates, &found, image));
            answer(consumer, &candidates, found, image)
        }
        Err(refusal) => LookUp::impossible(refusal.to_string()),
    });
    Explanation { image: image.to_string(), consumers, warnings }
}

/// Says what each reader does for the image with this document.
#[must_use]
pub fn explain_config(config: &Config, image: &ImageName) -> Explanation {
    let candidates: Vec<_> = config.entries.iter().map(|entry| Candidate::of_key(&entry.key)).collect();
    let mut warnings = Vec::new();
    let mut involved = HashSet::new();
    let consumers = Consumers::each(|consumer| {
        if let Some(refusal) = refusal(consumer, config) {
            return LookUp::impossible(refusal.of(consumer));
        }
        if let Some(name) = helper(consumer, config, image) {
            return LookUp::with_helper(name);
        }
        let found = search(consumer, &candidates, config.form, image);
        involved.extend(found.order.iter().copied());
        warnings.extend(used_for_more(consumer, &candidates, &found, image));
        LookUp { problem: unusable(consumer, config, &found), ..answer(consumer, &candidates, found, image) }
    });
    warnings.extend(lint::lint_document(config));
    let involved = involved.into_iter().filter_map(|at| config.entries.get(at));
    warnings.extend(involved.flat_map(lint::lint_entry));
    Explanation { image: image.to_string(), consumers, warnings }
}

/// The accounts under the keys that they have in a document for this reader.
fn entries<'a>(consumer: Consumer, accounts: &[ScopedAccount<'a>]) -> Result<Vec<Candidate<'a>>, RenderError> {
    let entries = claim_keys(consumer.profile(), accounts)?.into_iter();
    Ok(entries.map(|(key, account)| Candidate::of_account(key, *account)).collect())
}

fn search(consumer: Consumer, candidates: &[Candidate<'_>], form: Form, image: &ImageName) -> Found {
    let keys: Vec<_> = candidates.iter().map(|candidate| candidate.key).collect();
    look_up(consumer, &keys, form, image)
}

fn answer(consumer: Consumer, candidates: &[Candidate<'_>], found: Found, image: &ImageName) -> LookUp {
    if found.order.is_empty() {
        return LookUp { nearest: nearest(consumer, candidates, image), ..LookUp::default() };
    }
    let used: Vec<_> = found.order.into_iter().filter_map(|at| candidates.get(at)).collect();
    LookUp {
        keys: used.iter().map(|candidate| shown(candidate.key).into_owned()).collect(),
        accounts: used.iter().filter_map(|candidate| candidate.account).map(str::to_owned).collect(),
        ambiguous: found.is_ambiguous,
        ..LookUp::default()
    }
}

/// A helper program comes before the entries (`cli/config/configfile/file.go`, `GetCredentialsStore`;
/// `containers/image`, `pkg/docker/config/config.go`, `findCredentialsInFile`). podman does not know the store for all
/// registries; image pull secrets know no helpers.
fn helper<'a>(consumer: Consumer, config: &'a Config, image: &ImageName) -> Option<&'a str> {
    let (registry, store) = match consumer {
        Consumer::Docker => (docker::server_address(image), config.store.as_deref()),
        Consumer::Podman => (image.registry(), None),
        Consumer::Kubernetes | Consumer::K8schain | Consumer::DockerAuthConfig => return None,
    };
    let helper = config.helpers.iter().find(|helper| helper.registry == registry);
    helper.map(|helper| helper.name.as_str()).or(store)
}

/// Why nothing of what was found can be used.
fn unusable(consumer: Consumer, config: &Config, found: &Found) -> Option<String> {
    let mut problem = None;
    for entry in found.order.iter().filter_map(|at| config.entries.get(*at)) {
        match read(consumer, entry) {
            Reading::Login | Reading::Token => return None,
            Reading::Nothing(why) | Reading::Fails(why) | Reading::FailsAll(why) => {
                let key = shown(&entry.key);
                problem.get_or_insert_with(|| format!("{consumer} cannot log in with the entry `{key}`: {why}"));
            }
        }
    }
    problem
}

/// Entries that are used for this image, though they are meant for others. k8schain does as the kubelet does, and the
/// docker CLI with `DOCKER_AUTH_CONFIG` as the docker CLI.
fn used_for_more(consumer: Consumer, candidates: &[Candidate<'_>], found: &Found, image: &ImageName) -> Vec<Warning> {
    if matches!(consumer, Consumer::K8schain | Consumer::DockerAuthConfig) {
        return Vec::new();
    }
    let used = found.order.iter().filter_map(|at| candidates.get(*at));
    let unmeant = used.filter(|candidate| !candidate.meant.covers(image));
    unmeant
        .map(|candidate| {
            let key = shown(candidate.key);
            let detail =
                format!("{consumer} sends this password for `{image}` too, though it is for `{}`", candidate.meant);
            Warning::new(WarningCode::MatchesMore, candidate.account, &key, detail)
        })
        .collect()
}
