//! Warnings about a document as a whole.

use std::collections::BTreeMap;

use super::{
    super::{docker, kubelet, podman},
    entries::lint_entry,
};
use crate::domain::{
    docker_config::{
        Consumer, Warning, WarningCode,
        import::shown,
        parse::{Config, Form},
    },
    registry::{DOCKER_HUB, is_docker_hub},
};

/// Warns about everything in a document that does not do what it looks like.
#[must_use]
pub fn lint_config(config: &Config) -> Vec<Warning> {
    let mut warnings = lint_document(config);
    warnings.extend(rivals(config));
    warnings.extend(config.entries.iter().flat_map(lint_entry));
    warnings
}

/// Warns about what concerns no entry in particular.
pub(in crate::domain::matching) fn lint_document(config: &Config) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if config.store.is_some() || !config.helpers.is_empty() {
        warnings.push(Warning::of_all(
            WarningCode::HelperFirst,
            "`credsStore` and `credHelpers` name programs that hold credentials: image pull secrets know none, and the \
             docker CLI and podman need them on the same machine",
        ));
    }
    warnings.extend(wrong_type(config));
    warnings
}

/// The kubelet reads each key only from the Secret's type that belongs to it
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

/// Warns about keys among which a reader picks one by chance.
fn rivals(config: &Config) -> Vec<Warning> {
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

    // The docker CLI looks for Docker Hub under one key only, and not for its host; podman prefers its name in image
    // references.
    let docker = undecided(docker, |host| if is_docker_hub(host) { None } else { Some(host) });
    let podman = undecided(podman, |host| Some(if host == "index.docker.io" { DOCKER_HUB } else { host }));
    let k8schain = k8schain.into_values().collect();
    [(Consumer::K8schain, k8schain), (Consumer::Docker, docker), (Consumer::Podman, podman)]
        .into_iter()
        .flat_map(|(consumer, groups): (_, Vec<_>)| {
            groups.into_iter().filter_map(move |keys| ambiguous(consumer, &keys))
        })
        .collect()
}

/// The groups in which no key is the exact one, which would be preferred.
fn undecided(groups: BTreeMap<String, Vec<&str>>, exact: impl Fn(&str) -> Option<&str>) -> Vec<Vec<&str>> {
    let undecided = groups.into_iter().filter(|(host, keys)| exact(host).is_some_and(|exact| !keys.contains(&exact)));
    undecided.map(|(_, keys)| keys).collect()
}

fn ambiguous(consumer: Consumer, keys: &[&str]) -> Option<Warning> {
    let (first, others) = keys.split_first()?;
    (!others.is_empty()).then(|| {
        let others: Vec<_> = others.iter().map(|key| format!("`{}`", shown(key))).collect();
        let detail = format!("{consumer} picks this entry or {} by chance", others.join(" or "));
        Warning::new(WarningCode::Ambiguous, None, &shown(first), detail)
    })
}
