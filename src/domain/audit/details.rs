//! Further facts of events.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::json;

use crate::domain::{
    audit::{
        Resource,
        changes::{self, RecordedFields},
    },
    caller::Role,
    docker_config::Profile,
    matching::MatchTarget,
    names::{Name, NamespaceName},
};

/// Further facts of an event: names, numbers, fixed words, and the old and new values of recorded
/// fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details(BTreeMap<&'static str, serde_json::Value>);

/// Detail of a prune: the last seal whose events it deletes.
pub(super) const THROUGH_SEAL: &str = "throughSeal";

impl Details {
    pub(super) fn with(mut self, key: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.0.insert(key, value.into());
        self
    }

    /// Adds the names of the changed fields.
    #[must_use]
    pub fn fields(self, fields: &[&'static str]) -> Self {
        self.with("fields", fields)
    }

    /// Adds the recorded fields that differ, with old and new value. Without a resource, all fields
    /// are absent.
    #[must_use]
    pub fn changes(self, old: Option<&RecordedFields>, new: Option<&RecordedFields>) -> Self {
        let changes = changes::between(old, new);
        if changes.is_empty() { self } else { self.with("changes", changes) }
    }

    /// Adds the new version of the resource.
    #[must_use]
    pub fn version(self, version: i64) -> Self {
        self.with("version", version)
    }

    /// Adds the name of an API key, whose resource is an id.
    #[must_use]
    pub fn name(self, name: &Name) -> Self {
        self.with("name", name.as_str())
    }

    /// Adds the role of an API key.
    #[must_use]
    pub fn role(self, role: Role) -> Self {
        self.with("role", role.as_str())
    }

    /// Adds the profile of a rendered document.
    #[must_use]
    pub fn profile(self, profile: Profile) -> Self {
        self.with("profile", profile.as_str())
    }

    /// Adds the image, without tag and digest, or the registry that accounts were wanted for.
    #[must_use]
    pub fn matched(self, target: &MatchTarget) -> Self {
        let field = match target {
            MatchTarget::Image(_) => "image",
            MatchTarget::Registry(_) => "registry",
        };
        self.with(field, target.to_string())
    }

    /// Marks a dry run.
    #[must_use]
    pub fn dry_run(self, dry_run: bool) -> Self {
        if dry_run { self.with("dryRun", true) } else { self }
    }

    /// Marks a change by an import.
    #[must_use]
    pub fn by_import(self) -> Self {
        self.with("via", "import")
    }

    /// Adds the number of a mint.
    #[must_use]
    pub fn serial(self, serial: i64) -> Self {
        self.with("serial", serial)
    }

    /// Adds the slug of the reason for a refusal or a failure.
    #[must_use]
    pub fn reason(self, slug: &'static str) -> Self {
        self.with("reason", slug)
    }

    /// Adds cluster and namespace.
    #[must_use]
    pub fn target(self, cluster: &Name, namespace: &NamespaceName) -> Self {
        self.with("cluster", cluster.as_str()).with("namespace", namespace.as_str())
    }

    /// Adds the generation of a pull secret.
    #[must_use]
    pub fn generation(self, generation: i64) -> Self {
        self.with("generation", generation)
    }

    /// Adds the operation that was performed, a fixed word.
    #[must_use]
    pub fn did(self, did: &'static str) -> Self {
        self.with("did", did)
    }

    /// Adds the resources of several refusals, those of each together, with their counts.
    #[must_use]
    pub fn refused<'a>(self, targets: impl Iterator<Item = (&'a [Resource], u64)>) -> Self {
        let target = |(resources, count): (&[Resource], u64)| {
            let mut names = resources.iter().map(Resource::as_str);
            json!({"resource": names.next(), "related": names.collect::<Vec<_>>(), "count": count})
        };
        self.with("refused", targets.map(target).collect::<Vec<_>>())
    }

    /// Adds what a prune deletes: the events in all seals up to one, which were sealed before a time.
    #[must_use]
    pub fn prune(self, before: DateTime<Utc>, through_seal: i64) -> Self {
        self.with("before", before.to_rfc3339_opts(SecondsFormat::AutoSi, true)).with(THROUGH_SEAL, through_seal)
    }

    /// Adds a count.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        self.with("count", count)
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_else(|_| "{}".to_owned())
    }
}
