//! Explains which entries each consumer uses for an image.

use std::collections::HashSet;

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Address, Found, ImageName, docker, lint, look_up,
    nearest::{Candidate, Nearest, nearest},
    refusal::refusal,
};
use crate::domain::docker_config::{
    Consumer, RenderError, ScopedAccount, Warning, WarningCode, claim_keys,
    import::redact_key,
    parse::{Config, Form},
    reading::{Reading, read},
};

/// Entries that each consumer uses for an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Full image name without tag and digest.
    pub image: String,
    /// Result of each consumer.
    pub consumers: Consumers,
    /// Warnings about entries that are used, or nearly used.
    pub warnings: Vec<Warning>,
}

/// Result of each consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Consumers {
    /// The kubelet, from an image pull secret. It tries all keys in order.
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

/// Result of one consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LookUp {
    /// Keys of the entries that it uses, in the order of attempts.
    pub keys: Vec<String>,
    /// Accounts of these entries, in the same order.
    pub accounts: Vec<String>,
    /// Whether the choice is random: among all of them, of which only one is used, or for
    /// `kubernetes` the order of those that name the same registry and path.
    pub ambiguous: bool,
    /// Helper program `docker-credential-…` that it asks instead of reading entries.
    pub helper: Option<String>,
    /// Reason why it cannot log in with the entries, or cannot read the document.
    pub problem: Option<String>,
    /// If nothing matches: the nearest entries with the reasons.
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

    /// Result of one consumer.
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

/// Explains each consumer's lookup among these accounts, rendered for that consumer.
///
/// If the accounts cannot be rendered together for a consumer, its `problem` says so.
#[must_use]
pub fn explain_accounts(accounts: &[ScopedAccount<'_>], image: &ImageName) -> Explanation {
    let mut warnings = Vec::new();
    let consumers = Consumers::each(|consumer| match entries(consumer, accounts) {
        Ok(candidates) => {
            let found = search(consumer, &candidates, Form::DockerConfigJson, image);
            warnings.extend(used_for_more(consumer, &candidates, &found, image));
            look_up_result(consumer, &candidates, found, image)
        }
        Err(refusal) => LookUp::impossible(refusal.to_string()),
    });
    let names = accounts.iter().map(|account| (account.scope.as_str(), Some(account.name)));
    warnings.extend(names.filter_map(|(key, account)| mistaken_for_registry(key, account, image)));
    Explanation { image: image.to_string(), consumers, warnings }
}

/// Explains each consumer's lookup in this document.
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
        LookUp { problem: unusable(consumer, config, &found), ..look_up_result(consumer, &candidates, found, image) }
    });
    warnings.extend(lint::lint_document(config));
    warnings.extend(config.entries.iter().filter_map(|entry| mistaken_for_registry(&entry.key, None, image)));
    let involved = involved.into_iter().filter_map(|at| config.entries.get(at));
    warnings.extend(involved.flat_map(lint::lint_entry));
    Explanation { image: image.to_string(), consumers, warnings }
}

/// Warns about a key that looks like the first part of the image's name, but names no registry.
fn mistaken_for_registry(key: &str, account: Option<&str>, image: &ImageName) -> Option<Warning> {
    let is_first_part = image.is_on_docker_hub() && image.repository().split('/').next() == Some(Address::of(key).host);
    let warning = lint::lint_host_without_dot(key).filter(|_| is_first_part)?;
    Some(Warning { account: account.map(str::to_owned), ..warning })
}

/// Accounts with their keys in a document for this consumer.
fn entries<'a>(consumer: Consumer, accounts: &[ScopedAccount<'a>]) -> Result<Vec<Candidate<'a>>, RenderError> {
    let entries = claim_keys(consumer.profile(), accounts)?.into_iter();
    Ok(entries.map(|(key, account)| Candidate::of_account(key, *account)).collect())
}

fn search(consumer: Consumer, candidates: &[Candidate<'_>], form: Form, image: &ImageName) -> Found {
    let keys: Vec<_> = candidates.iter().map(|candidate| candidate.key).collect();
    look_up(consumer, &keys, form, image)
}

fn look_up_result(consumer: Consumer, candidates: &[Candidate<'_>], found: Found, image: &ImageName) -> LookUp {
    if found.order.is_empty() {
        return LookUp { nearest: nearest(consumer, candidates, image), ..LookUp::default() };
    }
    let used: Vec<_> = found.order.into_iter().filter_map(|at| candidates.get(at)).collect();
    LookUp {
        keys: used.iter().map(|candidate| redact_key(candidate.key).into_owned()).collect(),
        accounts: used.iter().filter_map(|candidate| candidate.account).map(str::to_owned).collect(),
        ambiguous: found.is_ambiguous,
        ..LookUp::default()
    }
}

/// Helper program that the consumer asks instead of reading entries
/// (`cli/config/configfile/file.go`, `GetCredentialsStore`; `containers/image`,
/// `pkg/docker/config/config.go`, `findCredentialsInFile`).
///
/// podman does not support `credsStore`; image pull secrets do not support helpers.
fn helper<'a>(consumer: Consumer, config: &'a Config, image: &ImageName) -> Option<&'a str> {
    let (registry, store) = match consumer {
        Consumer::Docker => (docker::server_address(image), config.store.as_deref()),
        Consumer::Podman => (image.registry(), None),
        Consumer::Kubernetes | Consumer::K8schain | Consumer::DockerAuthConfig => return None,
    };
    let helper = config.helpers.iter().find(|helper| helper.registry == registry);
    helper.map(|helper| helper.name.as_str()).or(store)
}

/// Reason if none of the matching entries can be used.
fn unusable(consumer: Consumer, config: &Config, found: &Found) -> Option<String> {
    let mut problem = None;
    for entry in found.order.iter().filter_map(|at| config.entries.get(*at)) {
        match read(consumer, entry) {
            Reading::Login | Reading::Token => return None,
            Reading::Nothing(why) | Reading::Fails(why) | Reading::FailsAll(why) => {
                let key = redact_key(&entry.key);
                problem.get_or_insert_with(|| format!("{consumer} cannot log in with the entry `{key}`: {why}"));
            }
        }
    }
    problem
}

/// Warns about entries that match this image but are intended for others.
///
/// k8schain behaves like the kubelet, and `DOCKER_AUTH_CONFIG` like the docker CLI's file.
fn used_for_more(consumer: Consumer, candidates: &[Candidate<'_>], found: &Found, image: &ImageName) -> Vec<Warning> {
    if matches!(consumer, Consumer::K8schain | Consumer::DockerAuthConfig) {
        return Vec::new();
    }
    let used = found.order.iter().filter_map(|at| candidates.get(*at));
    let unintended = used.filter(|candidate| !candidate.scope.covers(image));
    unintended
        .map(|candidate| {
            let key = redact_key(candidate.key);
            let detail =
                format!("{consumer} also sends this password for `{image}`, although it is for `{}`", candidate.scope);
            Warning::new(WarningCode::MatchesMore, candidate.account, &key, detail)
        })
        .collect()
}
