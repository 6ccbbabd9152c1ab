//! Intended meaning of a key, independent of its spelling.

use std::fmt;

use super::ImageName;
use crate::domain::registry;

/// Parts of a key or an image. Splitting never fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address<'a> {
    /// Host. An IPv6 address keeps its brackets.
    pub(super) host: &'a str,
    /// Port, or empty.
    pub(super) port: &'a str,
    /// Path without surrounding slashes and API root.
    pub(super) path: &'a str,
}

impl<'a> Address<'a> {
    pub(super) fn of(key: &'a str) -> Self {
        let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = host_and_port(authority.rsplit('@').next().unwrap_or_default());
        let path = without_api_root(path.trim_matches('/'));
        Self { host, port, path }
    }

    pub(super) fn of_image(image: &'a ImageName) -> Self {
        let (host, port) = host_and_port(image.registry());
        let path = image.repository();
        Self { host, port, path }
    }

    pub(super) fn is_docker_hub(&self) -> bool {
        registry::is_docker_hub(&self.host.to_ascii_lowercase()) && matches!(self.port, "" | "443")
    }

    /// Number of labels of the host.
    pub(super) fn labels(&self) -> usize {
        self.host.split('.').count()
    }

    /// Host without its first label, if two or more remain.
    pub(super) fn parent(&self) -> Option<&'a str> {
        let (_, parent) = self.host.split_once('.')?;
        parent.contains('.').then_some(parent)
    }

    /// Whether the key covers the image: same registry, and a path equal to or below its own. A
    /// wildcard counts as the image's host.
    pub(super) fn covers(&self, image: &ImageName) -> bool {
        let wanted = Address::of_image(image);
        let is_same_registry = if image.is_on_docker_hub() {
            self.is_docker_hub()
        } else {
            self.port == wanted.port && (self.host.contains('*') || self.host == wanted.host)
        };
        is_same_registry && self.has_below(wanted.path)
    }

    /// Whether a path is equal to or below this one.
    pub(super) fn has_below(&self, path: &str) -> bool {
        let rest = path.strip_prefix(self.path);
        rest.is_some_and(|rest| self.path.is_empty() || rest.is_empty() || rest.starts_with('/'))
    }
}

impl fmt::Display for Address<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.host)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        if !self.path.is_empty() {
            write!(f, "/{}", self.path)?;
        }
        Ok(())
    }
}

fn host_and_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, ""),
    }
}

fn without_api_root(path: &str) -> &str {
    match path.split_once('/').unwrap_or((path, "")) {
        ("v1" | "v2", rest) => rest,
        _ => path,
    }
}
