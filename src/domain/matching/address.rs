//! What a person means by a key, however it is written.

use std::fmt;

use super::ImageName;
use crate::domain::registry;

/// The parts of a key or an image, taken apart by eye: nothing is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address<'a> {
    /// The host; an IPv6 address with its brackets.
    pub(super) host: &'a str,
    /// The port, or nothing.
    pub(super) port: &'a str,
    /// The path, without slashes around it and without API root.
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

    /// The number of parts of the host.
    pub(super) fn labels(&self) -> usize {
        self.host.split('.').count()
    }

    /// The host without its first part, if two remain.
    pub(super) fn parent(&self) -> Option<&'a str> {
        let (_, parent) = self.host.split_once('.')?;
        parent.contains('.').then_some(parent)
    }

    /// Whether the image is meant: of this registry, and under the path or the path itself. A wildcard is taken to mean
    /// the image's host.
    pub(super) fn covers(&self, image: &ImageName) -> bool {
        let wanted = Address::of_image(image);
        let is_same_registry = if image.is_on_docker_hub() {
            self.is_docker_hub()
        } else {
            self.port == wanted.port && (self.host.contains('*') || self.host == wanted.host)
        };
        is_same_registry && self.has_below(wanted.path)
    }

    /// Whether another path is this one, or below it.
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
