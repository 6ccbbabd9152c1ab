//! Path of a scope: the name of a repository, or its first components.
//!
//! Uses the grammar of the OCI distribution specification (`spec.md`, "Pulling manifests",
//! `<name>`):
//! `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*`.

use crate::domain::invalid::Invalid;

/// Checks a path. Removes parts without meaning: one trailing slash, and leading API roots `v1` and
/// `v2`.
pub(super) fn parse(path: &str) -> Result<String, Invalid> {
    let mut path = path.strip_suffix('/').unwrap_or(path);
    while let Some(rest) = without_api_root(path) {
        path = rest;
    }
    if path.is_empty() {
        return Ok(String::new());
    }
    check(path)?;
    Ok(path.to_owned())
}

/// Checks the name of a repository, or its first components.
pub(super) fn check(path: &str) -> Result<(), Invalid> {
    if path.len() > 255 {
        return Err(Invalid::new("a path has at most 255 characters"));
    }
    path.split('/').try_for_each(check_component)
}

fn without_api_root(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("v1").or_else(|| path.strip_prefix("v2"))?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

fn check_component(component: &str) -> Result<(), Invalid> {
    let refused = if component.is_empty() {
        "a path must not have an empty part: look for a double slash"
    } else if component.contains('@') {
        "a digest (`@`) does not belong in a registry: an account is for a repository or a group of them"
    } else if component.contains(':') {
        "a tag (`:`) does not belong in a registry: an account is for a repository or a group of them"
    } else if !component.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b)) {
        "a path consists of lower case letters, digits, dots, underscores and hyphens, as in a repository's name"
    } else if !is_well_separated(component) {
        "in a path, letters and digits are separated by one dot, one or two underscores, or hyphens, and are at both ends"
    } else {
        return Ok(());
    };
    Err(Invalid::new(refused))
}

fn is_well_separated(component: &str) -> bool {
    let is_separator = |c: char| !c.is_ascii_alphanumeric();
    !component.starts_with(is_separator)
        && !component.ends_with(is_separator)
        && component
            .split(|c| !is_separator(c))
            .all(|separator| matches!(separator, "" | "." | "_" | "__") || only_hyphens(separator))
}

fn only_hyphens(separator: &str) -> bool {
    separator.bytes().all(|b| b == b'-')
}
