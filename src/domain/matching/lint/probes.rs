//! Probes consumers with images to find out how they use a key.

use super::super::{Address, ImageName, look_up, nearest::mismatch};
use crate::domain::{
    docker_config::{Consumer, Warning, WarningCode, import::redact_key, parse::Form},
    registry::RegistryScope,
};

/// Consumers to probe. A document for `DOCKER_AUTH_CONFIG` is always rendered for that consumer
/// alone.
const CONSUMERS: [Consumer; 4] = [Consumer::Kubernetes, Consumer::K8schain, Consumer::Docker, Consumer::Podman];

/// Warns about a key that consumers do not find, or use for more images than intended.
pub(super) fn lint_key(key: &str) -> Vec<Warning> {
    if let Some(warning) = lint_host_without_dot(key) {
        return vec![warning];
    }
    match meaning(key) {
        Ok((scope, image)) => {
            let finders = finders(key, &image);
            let mut warnings = Vec::from_iter(missed(key, &image, &finders));
            warnings.extend(used_for_more(key, &scope, &finders));
            warnings
        }
        Err(reason) => vec![Warning::new(WarningCode::InvalidKey, None, &redact_key(key), reason)],
    }
}

/// Warns about a host without a dot or port, such as `harbor`: the image `harbor/app` is on Docker
/// Hub (`distribution/reference`, `normalize.go`, `splitDockerDomain`).
pub(in crate::domain::matching) fn lint_host_without_dot(key: &str) -> Option<Warning> {
    let Address { host, port, .. } = Address::of(key);
    let is_plain = port.is_empty() && host != "localhost" && !host.is_empty();
    let is_part_of_a_name =
        host.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte));
    (is_plain && is_part_of_a_name).then(|| {
        let detail = format!(
            "no consumer uses this entry for any image: images named `{host}/…` are on Docker Hub, because a registry's name \
             has a dot or a port"
        );
        Warning::new(WarningCode::NeverMatches, None, &redact_key(key), detail)
    })
}

/// Scope of the key, and an image in it. A `*` becomes an arbitrary label.
fn meaning(key: &str) -> Result<(RegistryScope, ImageName), String> {
    let address = Address::of(key);
    let scope =
        RegistryScope::parse(&address.to_string().replace('*', "any")).map_err(|refusal| refusal.to_string())?;
    let image = ImageName::assume(scope.authority(), &below(scope.path(), "library/app"));
    Ok((scope, image))
}

fn below(path: Option<&str>, name: &str) -> String {
    path.map_or_else(|| name.to_owned(), |path| format!("{path}/{name}"))
}

fn finders(key: &str, image: &ImageName) -> Vec<Consumer> {
    let finds = |consumer: &Consumer| !look_up(*consumer, &[key], Form::DockerConfigJson, image).order.is_empty();
    CONSUMERS.into_iter().filter(finds).collect()
}

/// Warns if a consumer does not find the key for its own images.
fn missed(key: &str, image: &ImageName, finders: &[Consumer]) -> Option<Warning> {
    let blind: Vec<_> = CONSUMERS.into_iter().filter(|consumer| !finders.contains(consumer)).collect();
    let why = blind.first().and_then(|consumer| mismatch(*consumer, key, image));
    let why = why.map_or_else(String::new, |(_, why)| format!(": {why}"));
    let (code, detail) = if blind.is_empty() {
        return None;
    } else if finders.is_empty() {
        (WarningCode::NeverMatches, "no consumer uses this entry for any image".to_owned())
    } else {
        (WarningCode::MissedBySome, format!("not used by {}", list(&blind)))
    };
    Some(Warning::new(code, None, &redact_key(key), detail + &why))
}

/// Warns if a consumer uses the key for images outside its path.
fn used_for_more(key: &str, scope: &RegistryScope, finders: &[Consumer]) -> Option<Warning> {
    let path = scope.path()?;
    let with = |repository: String| ImageName::assume(scope.authority(), &repository);
    let (same_prefix, unrelated) = (with(format!("{path}x/app")), with("another/app".to_owned()));
    let finders_of = |image: &ImageName| {
        let mut found = self::finders(key, image);
        found.retain(|consumer| finders.contains(consumer));
        found
    };
    let for_all = finders_of(&unrelated);
    let mut for_same_prefix = finders_of(&same_prefix);
    for_same_prefix.retain(|consumer| !for_all.contains(consumer));

    let mut details = Vec::new();
    if !for_same_prefix.is_empty() {
        details.push(format!(
            "used by {} also for names with the same prefix, such as `{same_prefix}`",
            list(&for_same_prefix)
        ));
    }
    if !for_all.is_empty() {
        details.push(format!("used by {} for every image of `{}`", list(&for_all), scope.authority()));
    }
    (!details.is_empty()).then(|| Warning::new(WarningCode::MatchesMore, None, &redact_key(key), details.join("; ")))
}

fn list(consumers: &[Consumer]) -> String {
    let names: Vec<_> = consumers.iter().map(Consumer::to_string).collect();
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        _ => names.join(""),
    }
}
