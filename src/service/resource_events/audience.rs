//! Who may see an event: the rules of the lists, as of the time of the change.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    domain::{
        grants::Grants,
        names::Name,
        pull_secret::{Declaration, Namespaces},
        resource_event::{ResourceChange, ResourceKind},
    },
    storage::resource_changes::{ChangedTarget, LabelMap},
};

/// Labels of an account that no longer exists.
static NO_LABELS: LabelMap = BTreeMap::new();

/// An event of a resource.
#[derive(Debug)]
pub struct ResourceEvent {
    /// Kind of the resource.
    pub kind: ResourceKind,
    /// What happened.
    pub change: ResourceChange,
    /// Name of the resource; of a target, that of its pull secret.
    pub name: String,
    /// Version of the same.
    pub version: i64,
    /// Generation of a pull secret.
    pub generation: i64,
    /// The target; `None` for many targets, and for other kinds.
    pub target: Option<ChangedTarget>,
    pub(super) audience: Audience,
}

/// What decides who may see an event.
#[derive(Debug, Clone)]
pub(super) enum Audience {
    /// The name of the cluster.
    Cluster,
    /// Labels of an account before and after the change.
    Account { before: Option<LabelMap>, after: Option<LabelMap> },
    /// What a pull secret names, before and after the change. `None` is unknown.
    PullSecret { before: Option<Arc<Scope>>, after: Option<Arc<Scope>> },
}

/// What a pull secret names.
#[derive(Debug)]
pub(super) struct Scope {
    declaration: Declaration,
    /// Labels of accounts, by name.
    labels: Arc<HashMap<String, LabelMap>>,
    /// Whether the declaration was replaced or deleted. Its accounts may be gone: their names
    /// decide alone.
    is_past: bool,
}

impl Scope {
    pub fn new(declaration: Declaration, labels: &Arc<HashMap<String, LabelMap>>, is_past: bool) -> Self {
        Self { declaration, labels: Arc::clone(labels), is_past }
    }

    fn is_visible(&self, grants: &Grants) -> bool {
        let missing = self.is_past.then_some(&NO_LABELS);
        self.declaration.is_visible(grants, |name| self.labels.get(name).or(missing))
    }

    /// Approximate size in bytes.
    pub fn size(&self) -> usize {
        let targets = self.declaration.targets.iter().map(|target| match &target.namespaces {
            Namespaces::Listed(names) => 64 + names.iter().map(|name| 64 + name.as_str().len()).sum::<usize>(),
            Namespaces::Selected { exclude, .. } => 4_096 + 128 * exclude.len(),
        });
        let accounts = self.declaration.named_accounts().iter().map(Name::as_str);
        let labels = accounts.map(|name| 128 + self.labels.get(name).map_or(0, size_of_labels));
        1_024 + targets.sum::<usize>() + labels.sum::<usize>()
    }
}

/// Approximate size in bytes.
fn size_of_labels(labels: &LabelMap) -> usize {
    labels.iter().map(|(key, value)| 64 + key.len() + value.len()).sum()
}

impl ResourceEvent {
    /// Returns the change as a caller with these grants sees it; `None` if it may not see the
    /// resource.
    #[must_use]
    pub fn seen_by(&self, grants: &Grants) -> Option<ResourceChange> {
        let (before, after) = self.visibility(grants);
        self.change.seen(before, after)
    }

    /// Whether the change lets a caller with these grants see other resources too, or hides them:
    /// labels of an account decide about the pull secrets that name it.
    #[must_use]
    pub fn changes_view_of(&self, grants: &Grants) -> bool {
        let (before, after) = self.visibility(grants);
        self.kind == ResourceKind::RegistryAccount && self.change == ResourceChange::Changed && before != after
    }

    /// Whether a caller with these grants may see the resource before and after the change.
    fn visibility(&self, grants: &Grants) -> (bool, bool) {
        match &self.audience {
            Audience::Cluster => {
                let is_visible = grants.include_cluster(&self.name);
                (is_visible, is_visible)
            }
            Audience::Account { before, after } => {
                let includes =
                    |labels: Option<&LabelMap>| labels.is_some_and(|labels| grants.include_account(&self.name, labels));
                (includes(before.as_ref()), includes(after.as_ref()))
            }
            Audience::PullSecret { before, after } => {
                let includes = |scope: Option<&Arc<Scope>>| match scope {
                    Some(scope) => scope.is_visible(grants),
                    None => grants.include_everything(),
                };
                (includes(before.as_ref()), includes(after.as_ref()))
            }
        }
    }

    /// Approximate size in bytes, without the scopes.
    pub(super) fn size(&self) -> usize {
        let labels = match &self.audience {
            Audience::Account { before, after } => [before, after].into_iter().flatten().map(size_of_labels).sum(),
            Audience::Cluster | Audience::PullSecret { .. } => 0,
        };
        let target = self.target.as_ref().map_or(0, |target| target.cluster.len() + target.namespace.len());
        512 + self.name.len() + target + labels
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::{caller::Role, grants::GrantsDocument};

    fn grants(document: Value) -> Grants {
        let document: GrantsDocument = serde_json::from_value(document).unwrap();
        Grants::parse(Role::Viewer, document).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> LabelMap {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn event(kind: ResourceKind, change: ResourceChange, audience: Audience) -> ResourceEvent {
        ResourceEvent { kind, change, name: "team-a".to_owned(), version: 1, generation: 1, target: None, audience }
    }

    fn scope(accounts: &[(&str, &LabelMap)], is_past: bool) -> Arc<Scope> {
        let document = json!({
            "accounts": ["dev"], "secret": {"name": "s", "type": "kubernetes.io/dockerconfigjson"},
            "targets": [{"cluster": "c", "namespaces": ["n"]}], "serviceAccounts": [], "deletionPolicy": "delete",
            "adopt": false,
        });
        let declaration = Declaration::parse(serde_json::from_value(document).unwrap()).unwrap();
        let labels = accounts.iter().map(|(name, labels)| ((*name).to_owned(), (*labels).clone())).collect();
        Arc::new(Scope::new(declaration, &Arc::new(labels), is_past))
    }

    #[test]
    fn label_change_of_an_account_changes_the_view_of_label_grants_only() {
        let audience =
            Audience::Account { before: Some(labels(&[("team", "b")])), after: Some(labels(&[("team", "a")])) };
        let event = event(ResourceKind::RegistryAccount, ResourceChange::Changed, audience);
        let seen = |document: Value| {
            let grants = grants(document);
            (event.seen_by(&grants), event.changes_view_of(&grants))
        };
        let by_label =
            |value: &str| json!({"accounts": [{"matchLabels": {"team": value}}], "clusters": [], "namespaces": []});
        assert_eq!(seen(by_label("a")), (Some(ResourceChange::Created), true));
        assert_eq!(seen(by_label("b")), (Some(ResourceChange::Deleted), true));
        assert_eq!(seen(by_label("c")), (None, false));
        let by_name = json!({"accounts": ["team-*"], "clusters": [], "namespaces": []});
        assert_eq!(seen(by_name), (Some(ResourceChange::Changed), false));
    }

    #[test]
    fn pull_secret_is_visible_if_all_that_it_names_is_granted() {
        let (team, other) = (labels(&[("team", "a")]), labels(&[("team", "b")]));
        let sees = |accounts: &[(&str, &LabelMap)], is_past, document: Value| {
            let scope = scope(accounts, is_past);
            let audience = Audience::PullSecret { before: Some(Arc::clone(&scope)), after: Some(scope) };
            event(ResourceKind::Target, ResourceChange::Changed, audience).seen_by(&grants(document)).is_some()
        };
        let by_label = json!({"accounts": [{"matchLabels": {"team": "a"}}], "clusters": ["c"], "namespaces": ["n"]});
        assert!(sees(&[("dev", &team)], false, by_label.clone()));
        assert!(!sees(&[("dev", &other)], false, by_label.clone()));
        assert!(!sees(&[], true, by_label), "the labels of a deleted account are unknown");
        let by_name = json!({"accounts": ["dev"], "clusters": ["c"], "namespaces": ["n"]});
        assert!(sees(&[("dev", &other)], false, by_name.clone()));
        assert!(!sees(&[], false, by_name.clone()) && sees(&[], true, by_name));
        assert!(!sees(&[("dev", &team)], false, json!({"accounts": ["*"], "clusters": ["c"], "namespaces": ["m"]})));
        assert!(!sees(&[("dev", &team)], false, json!({"accounts": ["*"], "clusters": ["d"], "namespaces": ["*"]})));
    }

    #[test]
    fn unknown_scope_is_visible_with_all_grants_only() {
        let event = event(
            ResourceKind::PullSecret,
            ResourceChange::Changed,
            Audience::PullSecret { before: None, after: None },
        );
        assert!(event.seen_by(&Grants::everything()).is_some());
        let grants = grants(json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["n"]}));
        assert!(event.seen_by(&grants).is_none());
    }
}
