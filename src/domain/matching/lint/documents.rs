//! Warnings about a complete document.

use std::collections::BTreeMap;

use super::{
    super::{docker, kubelet, podman},
    entries::lint_entry,
};
use crate::domain::{
    docker_config::{
        Consumer, Warning, WarningCode,
        import::redact_key,
        parse::{Config, Form},
    },
    registry::{DOCKER_HUB, is_docker_hub},
};

/// Warns about everything in a document that behaves differently from its appearance.
#[must_use]
pub fn lint_config(config: &Config) -> Vec<Warning> {
    let mut warnings = lint_document(config);
    warnings.extend(ambiguous_keys(config));
    warnings.extend(config.entries.iter().flat_map(lint_entry));
    warnings
}

/// Warns about the document, apart from its entries.
pub(in crate::domain::matching) fn lint_document(config: &Config) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if config.store.is_some() || !config.helpers.is_empty() {
        warnings.push(Warning::of_all(
            WarningCode::HelperFirst,
            "`credsStore` and `credHelpers` name programs that store credentials: image pull secrets do not support them, and the \
             docker CLI and podman need them on the same machine",
        ));
    }
    warnings.extend(wrong_type(config));
    warnings
}

/// The kubelet reads each data key only from the matching Secret type
/// (`pkg/credentialprovider/secrets/secrets.go`).
fn wrong_type(config: &Config) -> Option<Warning> {
    let expected = match config.form {
        Form::DockerConfigJson => "kubernetes.io/dockerconfigjson",
        Form::Dockercfg => "kubernetes.io/dockercfg",
    };
    let found = config.secret_type.as_deref()?;
    (found != expected).then(|| {
        let detail = format!("the kubelet ignores this Secret: its type is not `{expected}`");
        Warning::of_all(WarningCode::WrongSecretType, detail)
    })
}

/// Warns about keys among which a consumer chooses at random.
fn ambiguous_keys(config: &Config) -> Vec<Warning> {
    let by = |place: &dyn Fn(&str) -> Option<String>| {
        let mut groups = BTreeMap::<String, Vec<&str>>::new();
        for entry in &config.entries {
            if let Some(place) = place(&entry.key) {
                groups.entry(place).or_default().push(&entry.key);
            }
        }
        groups
    };
    let k8schain = by(&kubelet::slot);
    let docker = by(&|key| Some(docker::host_of(key)));
    let podman = by(&|key| Some(podman::host_of(key, config.form).to_owned()));

    // The docker CLI looks up Docker Hub under a single key, not by host. podman prefers the name
    // used in image references.
    let docker = without_exact_key(docker, |host| if is_docker_hub(host) { None } else { Some(host) });
    let podman = without_exact_key(podman, |host| Some(if host == "index.docker.io" { DOCKER_HUB } else { host }));
    let k8schain = k8schain.into_values().collect();
    [(Consumer::K8schain, k8schain), (Consumer::Docker, docker), (Consumer::Podman, podman)]
        .into_iter()
        .flat_map(|(consumer, groups): (_, Vec<_>)| {
            groups.into_iter().filter_map(move |keys| ambiguous(consumer, &keys))
        })
        .collect()
}

/// Groups without the exact key, which would be preferred.
fn without_exact_key(groups: BTreeMap<String, Vec<&str>>, exact: impl Fn(&str) -> Option<&str>) -> Vec<Vec<&str>> {
    let remaining = groups.into_iter().filter(|(host, keys)| exact(host).is_some_and(|exact| !keys.contains(&exact)));
    remaining.map(|(_, keys)| keys).collect()
}

fn ambiguous(consumer: Consumer, keys: &[&str]) -> Option<Warning> {
    let (first, others) = keys.split_first()?;
    (!others.is_empty()).then(|| {
        let others: Vec<_> = others.iter().map(|key| format!("`{}`", redact_key(key))).collect();
        let detail = format!("{consumer} picks this entry or {} at random", others.join(" or "));
        Warning::new(WarningCode::Ambiguous, None, &redact_key(first), detail)
    })
}
