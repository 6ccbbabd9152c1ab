//! What readers do with a key, found out by asking them.

use super::super::{Address, ImageName, look_up, nearest::mismatch};
use crate::domain::{
    docker_config::{Consumer, Warning, WarningCode, import::shown, parse::Form},
    registry::RegistryScope,
};

/// The readers that are asked. A document for `DOCKER_AUTH_CONFIG` is made for it alone.
const ASKED: [Consumer; 4] = [Consumer::Kubernetes, Consumer::K8schain, Consumer::Docker, Consumer::Podman];

/// Warns about a key that readers do not find, or use for more than it says.
pub(super) fn lint_key(key: &str) -> Vec<Warning> {
    match meaning(key) {
        Ok((scope, image)) => {
            let finders = finders(key, &image);
            let mut warnings = Vec::from_iter(missed(key, &image, &finders));
            warnings.extend(used_for_more(key, &scope, &finders));
            warnings
        }
        Err(reason) => vec![Warning::new(WarningCode::InvalidKey, None, &shown(key), reason)],
    }
}

/// What the key is meant for, and an image of it. A `*` is taken for some part of a host.
fn meaning(key: &str) -> Result<(RegistryScope, ImageName), String> {
    let meant = Address::of(key);
    let scope = RegistryScope::parse(&meant.to_string().replace('*', "any")).map_err(|refusal| refusal.to_string())?;
    let image = ImageName::assume(scope.authority(), &below(scope.path(), "library/app"));
    Ok((scope, image))
}

fn below(path: Option<&str>, name: &str) -> String {
    path.map_or_else(|| name.to_owned(), |path| format!("{path}/{name}"))
}

fn finders(key: &str, image: &ImageName) -> Vec<Consumer> {
    let finds = |consumer: &Consumer| !look_up(*consumer, &[key], Form::DockerConfigJson, image).order.is_empty();
    ASKED.into_iter().filter(finds).collect()
}

/// Warns if some reader does not find the key for what it is meant for.
fn missed(key: &str, image: &ImageName, finders: &[Consumer]) -> Option<Warning> {
    let blind: Vec<_> = ASKED.into_iter().filter(|consumer| !finders.contains(consumer)).collect();
    let why = blind.first().and_then(|consumer| mismatch(*consumer, key, image));
    let why = why.map_or_else(String::new, |(_, why)| format!(": {why}"));
    let (code, who) = if blind.is_empty() {
        return None;
    } else if finders.is_empty() {
        (WarningCode::NeverMatches, "no reader uses this entry for any image".to_owned())
    } else {
        (WarningCode::MissedBySome, format!("not used by {}", list(&blind)))
    };
    Some(Warning::new(code, None, &shown(key), who + &why))
}

/// Warns if some reader uses the key for images that are not under its path.
fn used_for_more(key: &str, scope: &RegistryScope, finders: &[Consumer]) -> Option<Warning> {
    let path = scope.path()?;
    let with = |repository: String| ImageName::assume(scope.authority(), &repository);
    let (alike, stranger) = (with(format!("{path}x/app")), with("another/app".to_owned()));
    let asked = |image: &ImageName| {
        let mut found = self::finders(key, image);
        found.retain(|consumer| finders.contains(consumer));
        found
    };
    let for_all = asked(&stranger);
    let mut for_alike = asked(&alike);
    for_alike.retain(|consumer| !for_all.contains(consumer));

    let mut said = Vec::new();
    if !for_alike.is_empty() {
        said.push(format!("used by {} also for names that begin alike, such as `{alike}`", list(&for_alike)));
    }
    if !for_all.is_empty() {
        said.push(format!("used by {} for every image of `{}`", list(&for_all), scope.authority()));
    }
    (!said.is_empty()).then(|| Warning::new(WarningCode::MatchesMore, None, &shown(key), said.join("; ")))
}

fn list(consumers: &[Consumer]) -> String {
    let names: Vec<_> = consumers.iter().map(Consumer::to_string).collect();
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        _ => names.join(""),
    }
}
