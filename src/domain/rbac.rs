//! RBAC rules that pull secrets require in a cluster.
//!
//! `regcred cluster rbac` prints them and the cluster check reviews them, so the two cannot differ.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::{
    names::{Name, NamespaceName},
    pull_secret::{Declaration, DeletionPolicy, Namespaces},
};

/// One verb on one resource of the core API group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Creates a missing Secret.
    CreateSecrets,
    /// Reads owner and version of a Secret.
    GetSecrets,
    /// Updates a Secret.
    PatchSecrets,
    /// Deletes a Secret that is no longer declared.
    DeleteSecrets,
    /// Reads the pull secrets of a `ServiceAccount`.
    GetServiceAccounts,
    /// Attaches and detaches a Secret.
    PatchServiceAccounts,
    /// Resyncs namespaces with selectors.
    ListNamespaces,
    /// Reports new namespaces and labels at once.
    WatchNamespaces,
    /// Starts a watch of Secrets.
    ListSecrets,
    /// Reports edited and deleted Secrets at once.
    WatchSecrets,
}

impl Rule {
    /// Plural name of the resource.
    #[must_use]
    pub const fn resource(self) -> &'static str {
        match self {
            Self::CreateSecrets
            | Self::GetSecrets
            | Self::PatchSecrets
            | Self::DeleteSecrets
            | Self::ListSecrets
            | Self::WatchSecrets => "secrets",
            Self::GetServiceAccounts | Self::PatchServiceAccounts => "serviceaccounts",
            Self::ListNamespaces | Self::WatchNamespaces => "namespaces",
        }
    }

    /// Verb.
    #[must_use]
    pub const fn verb(self) -> &'static str {
        match self {
            Self::CreateSecrets => "create",
            Self::GetSecrets | Self::GetServiceAccounts => "get",
            Self::PatchSecrets | Self::PatchServiceAccounts => "patch",
            Self::DeleteSecrets => "delete",
            Self::ListNamespaces | Self::ListSecrets => "list",
            Self::WatchNamespaces | Self::WatchSecrets => "watch",
        }
    }
}

/// A namespace with work beyond the declaration of a pull secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cleanup {
    /// The namespace.
    pub namespace: NamespaceName,
    /// The Secret is to be removed.
    pub removes: bool,
    /// The Secret is to be detached from `ServiceAccount`s.
    pub detaches: bool,
}

/// Rules by scope.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequiredRules {
    /// Rules of a `ClusterRole`.
    pub cluster: BTreeSet<Rule>,
    /// Rules of a Role, by namespace, without those of the `ClusterRole`. No set is empty.
    pub namespaces: BTreeMap<NamespaceName, BTreeSet<Rule>>,
}

impl RequiredRules {
    /// Rules that one pull secret requires in a cluster. `declaration` is `None` while it is being
    /// deleted.
    #[must_use]
    pub fn of(cluster: &Name, declaration: Option<&Declaration>, cleanups: &[Cleanup]) -> Self {
        let mut rules = Self::default();
        if let Some(declaration) = declaration {
            let apply = rules_to_apply(declaration);
            for target in declaration.targets.iter().filter(|target| target.cluster == *cluster) {
                match &target.namespaces {
                    Namespaces::Listed(namespaces) => {
                        for namespace in namespaces {
                            rules.add_to_namespace(namespace, &apply);
                        }
                    }
                    // The namespaces that will match are unknown.
                    Namespaces::Selected { .. } => {
                        rules.cluster.extend(&apply);
                        rules.cluster.extend([Rule::ListNamespaces, Rule::WatchNamespaces]);
                    }
                }
            }
        }
        for cleanup in cleanups {
            let removes: &[Rule] = if cleanup.removes { &[Rule::GetSecrets, Rule::DeleteSecrets] } else { &[] };
            let detaches: &[Rule] =
                if cleanup.detaches { &[Rule::GetServiceAccounts, Rule::PatchServiceAccounts] } else { &[] };
            rules.add_to_namespace(&cleanup.namespace, &removes.iter().chain(detaches).copied().collect());
        }
        rules.drop_redundant();
        rules
    }

    /// Rules that several pull secrets require together.
    #[must_use]
    pub fn union<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut rules = Self::default();
        for one in all {
            rules.cluster.extend(&one.cluster);
            for (namespace, of_namespace) in &one.namespaces {
                rules.add_to_namespace(namespace, of_namespace);
            }
        }
        rules.drop_redundant();
        rules
    }

    /// Adds the rules for the watch of Secrets, which is cluster-wide.
    #[must_use]
    pub fn with_watched_secrets(mut self) -> Self {
        self.cluster.extend([Rule::ListSecrets, Rule::WatchSecrets]);
        self
    }

    /// Whether no rule is required.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cluster.is_empty() && self.namespaces.is_empty()
    }

    fn add_to_namespace(&mut self, namespace: &NamespaceName, rules: &BTreeSet<Rule>) {
        if !rules.is_empty() {
            self.namespaces.entry(namespace.clone()).or_default().extend(rules);
        }
    }

    /// Drops the rules of namespaces that the `ClusterRole` grants.
    fn drop_redundant(&mut self) {
        self.namespaces.retain(|_, rules| {
            rules.retain(|rule| !self.cluster.contains(rule));
            !rules.is_empty()
        });
    }
}

/// Rules to apply the Secret in a declared namespace.
fn rules_to_apply(declaration: &Declaration) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::from([Rule::CreateSecrets, Rule::GetSecrets, Rule::PatchSecrets]);
    if declaration.deletion_policy == DeletionPolicy::Delete {
        rules.insert(Rule::DeleteSecrets);
    }
    if !declaration.service_accounts.is_empty() {
        rules.extend([Rule::GetServiceAccounts, Rule::PatchServiceAccounts]);
    }
    rules
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn declaration(change: Value) -> Declaration {
        let mut document = json!({
            "accounts": ["team-a"], "secret": {"name": "pull"}, "serviceAccounts": [], "deletionPolicy": "retain",
            "adopt": false, "targets": [{"cluster": "dev", "namespaces": ["a", "b"]}],
        });
        let Value::Object(change) = change else { panic!("an object") };
        document.as_object_mut().unwrap().extend(change);
        Declaration::parse(serde_json::from_value(document).unwrap()).unwrap()
    }

    fn required(declaration: &Declaration, cleanups: &[Cleanup]) -> RequiredRules {
        RequiredRules::of(&Name::parse("dev").unwrap(), Some(declaration), cleanups)
    }

    fn words(rules: &BTreeSet<Rule>) -> Vec<String> {
        rules.iter().map(|rule| format!("{} {}", rule.verb(), rule.resource())).collect()
    }

    /// `NAMESPACE: verb resource, …` per scope. `*` is the cluster.
    fn lines(rules: &RequiredRules) -> Vec<String> {
        let cluster = (!rules.cluster.is_empty()).then(|| format!("*: {}", words(&rules.cluster).join(", ")));
        let namespaces = rules.namespaces.iter().map(|(name, rules)| format!("{name}: {}", words(rules).join(", ")));
        cluster.into_iter().chain(namespaces).collect()
    }

    const APPLY: &str = "create secrets, get secrets, patch secrets";
    const ATTACH: &str = "get serviceaccounts, patch serviceaccounts";

    #[test]
    fn listed_namespaces_require_roles_only() {
        let retain = declaration(json!({}));
        assert_eq!(lines(&required(&retain, &[])), [format!("a: {APPLY}"), format!("b: {APPLY}")]);
        let delete = declaration(json!({"deletionPolicy": "delete", "serviceAccounts": ["default"],
            "targets": [{"cluster": "dev", "namespaces": ["a"]}, {"cluster": "prod", "namespaces": ["p"]}]}));
        assert_eq!(lines(&required(&delete, &[])), [format!("a: {APPLY}, delete secrets, {ATTACH}")]);
    }

    #[test]
    fn namespace_selector_requires_cluster_role() {
        let selects = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["a"]},
            {"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}},
            {"cluster": "prod", "namespaces": ["p"]}]}));
        assert_eq!(lines(&required(&selects, &[])), [format!("*: {APPLY}, list namespaces, watch namespaces")]);
        let elsewhere = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["a"]},
            {"cluster": "prod", "namespaceSelector": {"matchLabels": {"team": "a"}}}]}));
        assert_eq!(lines(&required(&elsewhere, &[])), [format!("a: {APPLY}")]);
    }

    #[test]
    fn cleanup_of_earlier_declarations_requires_its_rules() {
        let cleanup = |namespace: &str, removes, detaches| Cleanup {
            namespace: NamespaceName::parse(namespace).unwrap(),
            removes,
            detaches,
        };
        let cleanups = [cleanup("a", false, true), cleanup("old", true, false), cleanup("older", true, true)];
        let retain = declaration(json!({}));
        let expected = [
            format!("a: {APPLY}, {ATTACH}"),
            format!("b: {APPLY}"),
            "old: get secrets, delete secrets".to_owned(),
            format!("older: get secrets, delete secrets, {ATTACH}"),
        ];
        assert_eq!(lines(&required(&retain, &cleanups)), expected);
        let cluster = Name::parse("dev").unwrap();
        let deleted = RequiredRules::of(&cluster, None, &cleanups[1..2]);
        assert_eq!(lines(&deleted), expected[2..3]);
        assert!(RequiredRules::of(&cluster, None, &[]).is_empty());
    }

    #[test]
    fn union_holds_no_redundant_rule() {
        let selects =
            declaration(json!({"targets": [{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}}]}));
        let named = declaration(json!({"deletionPolicy": "delete"}));
        let alone = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["c"]}]}));
        let all = [required(&selects, &[]), required(&named, &[]), required(&alone, &[])];
        let expected = [
            format!("*: {APPLY}, list namespaces, watch namespaces"),
            "a: delete secrets".to_owned(),
            "b: delete secrets".to_owned(),
        ];
        assert_eq!(lines(&RequiredRules::union(&all)), expected);
        let watched = RequiredRules::union(&all[1..2]).with_watched_secrets();
        assert_eq!(lines(&watched)[0], "*: list secrets, watch secrets");
        assert_eq!(watched.namespaces, all[1].namespaces);
    }
}
