//! Explains which entries each consumer uses for an image.

use std::collections::HashSet;

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Address, Found, ImageName, docker, lint, look_up,
    nearest::{Candidate, Nearest, nearest},
    refusal::refusal,
    verdict::{UsedEntry, Verdict, conclude},
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
    /// Pull secrets whose accounts were explained, if the request asked for such.
    pub pull_secrets: Vec<String>,
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
    /// What it does for the image.
    pub verdict: Verdict,
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
    explain_secrets(&[accounts.to_vec()], image)
}

/// Explains each consumer's lookup among the accounts of several Secrets, which it reads together.
///
/// A key may occur in several of them.
#[must_use]
pub fn explain_secrets(secrets: &[Vec<ScopedAccount<'_>>], image: &ImageName) -> Explanation {
    let mut warnings = Vec::new();
    let accounts = || secrets.iter().flatten();
    let mistaken = accounts().find_map(|account| mistaken_host(account.scope.as_str(), image));
    let consumers = Consumers::each(|consumer| {
        let candidates = secrets.iter().map(|accounts| entries(consumer, accounts)).collect::<Result<Vec<_>, _>>();
        match candidates.map(|candidates| candidates.concat()) {
            Ok(candidates) => {
                let found = search(consumer, &candidates, Form::DockerConfigJson, image);
                warnings.extend(used_for_more(consumer, &candidates, &found, image));
                let used = used_entries(&candidates, &found, image);
                conclude(consumer, look_up_result(consumer, &candidates, found, image), &used, mistaken, image)
            }
            Err(refusal) => conclude(consumer, LookUp::impossible(refusal.to_string()), &[], mistaken, image),
        }
    });
    let names = accounts().map(|account| (account.scope.as_str(), Some(account.name)));
    warnings.extend(names.filter_map(|(key, account)| mistaken_for_registry(key, account, image)));
    Explanation { image: image.to_string(), consumers, warnings, pull_secrets: Vec::new() }
}

/// Explains each consumer's lookup in this document.
#[must_use]
pub fn explain_config(config: &Config, image: &ImageName) -> Explanation {
    let candidates: Vec<_> = config.entries.iter().map(|entry| Candidate::of_key(&entry.key)).collect();
    let mut warnings = Vec::new();
    let mut involved = HashSet::new();
    let mistaken = config.entries.iter().find_map(|entry| mistaken_host(&entry.key, image));
    let consumers = Consumers::each(|consumer| {
        if let Some(refusal) = refusal(consumer, config) {
            return conclude(consumer, LookUp::impossible(refusal.of(consumer)), &[], mistaken, image);
        }
        if let Some(name) = helper(consumer, config, image) {
            return conclude(consumer, LookUp::with_helper(name), &[], mistaken, image);
        }
        let found = search(consumer, &candidates, config.form, image);
        involved.extend(found.order.iter().copied());
        warnings.extend(used_for_more(consumer, &candidates, &found, image));
        let (problem, used) = (unusable(consumer, config, &found), used_entries(&candidates, &found, image));
        let look_up = LookUp { problem, ..look_up_result(consumer, &candidates, found, image) };
        conclude(consumer, look_up, &used, mistaken, image)
    });
    warnings.extend(lint::lint_document(config));
    warnings.extend(config.entries.iter().filter_map(|entry| mistaken_for_registry(&entry.key, None, image)));
    let involved = involved.into_iter().filter_map(|at| config.entries.get(at));
    warnings.extend(involved.flat_map(lint::lint_entry));
    Explanation { image: image.to_string(), consumers, warnings, pull_secrets: Vec::new() }
}

/// Warns about a key that looks like the first part of the image's name, but names no registry.
fn mistaken_for_registry(key: &str, account: Option<&str>, image: &ImageName) -> Option<Warning> {
    mistaken_host(key, image)?;
    let warning = lint::lint_host_without_dot(key)?;
    Some(Warning { account: account.map(str::to_owned), ..warning })
}

/// Host of a key that looks like the first part of the image's name, but names no registry.
fn mistaken_host<'a>(key: &'a str, image: &ImageName) -> Option<&'a str> {
    let host = Address::of(key).host;
    let is_first_part = image.is_on_docker_hub() && image.repository().split('/').next() == Some(host);
    (is_first_part && lint::lint_host_without_dot(key).is_some()).then_some(host)
}

/// Entries of a lookup, each with whether it is for the image.
fn used_entries<'a>(candidates: &[Candidate<'a>], found: &Found, image: &ImageName) -> Vec<UsedEntry<'a>> {
    let used = found.order.iter().filter_map(|at| candidates.get(*at));
    used.map(|candidate| UsedEntry { scope: candidate.scope, is_intended: candidate.scope.covers(image) }).collect()
}

/// Accounts with their keys in a document for this consumer.
pub(super) fn entries<'a>(
    consumer: Consumer,
    accounts: &[ScopedAccount<'a>],
) -> Result<Vec<Candidate<'a>>, RenderError> {
    let entries = claim_keys(consumer.profile(), accounts)?.into_iter();
    Ok(entries.map(|(key, account)| Candidate::of_account(key, *account)).collect())
}

pub(super) fn search(consumer: Consumer, candidates: &[Candidate<'_>], form: Form, image: &ImageName) -> Found {
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
