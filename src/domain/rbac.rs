//! RBAC rules that pull secrets, direct delivery and tokens require in a cluster.
//!
//! `regcred cluster rbac` prints them and the cluster check reviews them, so the two cannot differ.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::{
    cluster::ServiceAccountRef,
    diagnosis::WorkloadKind,
    names::{Name, NamespaceName, SecretName, ServiceAccountName},
    pull_secret::{Declaration, DeletionPolicy, Namespaces},
};

/// One verb on one resource, restricted to one object where Kubernetes can.
///
/// A right to create cannot name an object, and a right to list names one only for requests that
/// select it by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Creates a missing Secret.
    CreateSecrets,
    /// Reads owner and version of a Secret.
    GetSecret(SecretName),
    /// Updates a Secret.
    PatchSecret(SecretName),
    /// Deletes a Secret that is no longer declared.
    DeleteSecret(SecretName),
    /// Reads the pull secrets of a `ServiceAccount`.
    GetServiceAccount(ServiceAccountName),
    /// Attaches and detaches a Secret.
    PatchServiceAccount(ServiceAccountName),
    /// Requests tokens: renews that of the cluster, or identifies a minted account.
    CreateToken(ServiceAccountName),
    /// Resyncs namespaces with selectors.
    ListNamespaces,
    /// Reports new namespaces and labels at once.
    WatchNamespaces,
    /// Starts a watch of Secrets.
    ListSecrets,
    /// Reports edited and deleted Secrets at once.
    WatchSecrets,
    /// Reads what a diagnosis of image pulls needs.
    Diagnose(Diagnosed),
    /// Lists what the coverage of a cluster needs.
    Survey(Diagnosed),
}

/// Resource that a diagnosis of image pulls reads, whatever the names of its objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Diagnosed {
    /// Pods.
    Pods,
    /// `ServiceAccount`s, for their pull secrets.
    ServiceAccounts,
    /// Secrets with their values.
    Secrets,
    /// Events of pods.
    Events,
    /// A kind of workloads.
    Workloads(WorkloadKind),
    /// Nodes, for their platforms. They belong to no namespace.
    Nodes,
}

impl Diagnosed {
    /// All resources of a namespace.
    fn in_namespace() -> impl Iterator<Item = Self> {
        let others = [Self::Pods, Self::ServiceAccounts, Self::Secrets, Self::Events];
        others.into_iter().chain(WorkloadKind::ALL.map(Self::Workloads))
    }

    /// Resources that a coverage lists, and a diagnosis does not.
    fn surveyed() -> impl Iterator<Item = Self> {
        Self::in_namespace().filter(|one| *one != Self::Events)
    }
}

impl Rule {
    /// Plural name of the resource.
    #[must_use]
    pub const fn resource(&self) -> &'static str {
        match self {
            Self::CreateSecrets
            | Self::GetSecret(_)
            | Self::PatchSecret(_)
            | Self::DeleteSecret(_)
            | Self::ListSecrets
            | Self::WatchSecrets => "secrets",
            Self::GetServiceAccount(_) | Self::PatchServiceAccount(_) => "serviceaccounts",
            Self::CreateToken(_) => "serviceaccounts/token",
            Self::ListNamespaces | Self::WatchNamespaces => "namespaces",
            Self::Diagnose(diagnosed) | Self::Survey(diagnosed) => match diagnosed {
                Diagnosed::Pods => "pods",
                Diagnosed::ServiceAccounts => "serviceaccounts",
                Diagnosed::Secrets => "secrets",
                Diagnosed::Events => "events",
                Diagnosed::Workloads(kind) => kind.plural(),
                Diagnosed::Nodes => "nodes",
            },
        }
    }

    /// API group of the resource; empty for the core group.
    #[must_use]
    pub const fn api_group(&self) -> &'static str {
        match self {
            Self::Diagnose(Diagnosed::Workloads(kind)) | Self::Survey(Diagnosed::Workloads(kind)) => kind.group(),
            _ => "",
        }
    }

    /// Verb.
    #[must_use]
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::CreateSecrets | Self::CreateToken(_) => "create",
            Self::GetSecret(_)
            | Self::GetServiceAccount(_)
            | Self::Diagnose(
                Diagnosed::Pods | Diagnosed::ServiceAccounts | Diagnosed::Secrets | Diagnosed::Workloads(_),
            ) => "get",
            Self::PatchSecret(_) | Self::PatchServiceAccount(_) => "patch",
            Self::DeleteSecret(_) => "delete",
            Self::Diagnose(Diagnosed::Events | Diagnosed::Nodes)
            | Self::Survey(_)
            | Self::ListNamespaces
            | Self::ListSecrets => "list",
            Self::WatchNamespaces | Self::WatchSecrets => "watch",
        }
    }

    /// Name of the object; none for all objects.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::GetSecret(name) | Self::PatchSecret(name) | Self::DeleteSecret(name) => Some(name.as_str()),
            Self::GetServiceAccount(name) | Self::PatchServiceAccount(name) | Self::CreateToken(name) => {
                Some(name.as_str())
            }
            Self::CreateSecrets
            | Self::ListNamespaces
            | Self::WatchNamespaces
            | Self::ListSecrets
            | Self::WatchSecrets
            | Self::Diagnose(_)
            | Self::Survey(_) => None,
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
    /// `ServiceAccount`s that the Secret is to be detached from.
    pub detaches: Vec<ServiceAccountName>,
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
    /// Rules that the pull secret with the Secret `secret` requires in a cluster. `declaration` is
    /// `None` while it is being deleted.
    #[must_use]
    pub fn of(cluster: &Name, secret: &SecretName, declaration: Option<&Declaration>, cleanups: &[Cleanup]) -> Self {
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
                        rules.cluster.extend(apply.iter().cloned());
                        rules.cluster.extend([Rule::ListNamespaces, Rule::WatchNamespaces]);
                    }
                }
            }
        }
        for cleanup in cleanups {
            let mut of_cleanup: BTreeSet<Rule> = cleanup.detaches.iter().flat_map(rules_to_attach).collect();
            if cleanup.removes {
                of_cleanup.extend([Rule::GetSecret(secret.clone()), Rule::DeleteSecret(secret.clone())]);
            }
            rules.add_to_namespace(&cleanup.namespace, &of_cleanup);
        }
        rules.drop_redundant();
        rules
    }

    /// Rules to create a Secret by direct delivery, and to replace it.
    #[must_use]
    pub fn of_direct(namespace: &NamespaceName, secret: &SecretName) -> Self {
        let mut rules = Self::default();
        let of_secret = [Rule::CreateSecrets, Rule::GetSecret(secret.clone()), Rule::PatchSecret(secret.clone())];
        rules.add_to_namespace(namespace, &of_secret.into());
        rules
    }

    /// Rules to diagnose image pulls in a namespace, or in all, and for its coverage.
    #[must_use]
    pub fn of_diagnosis(namespace: Option<&NamespaceName>) -> Self {
        let mut rules = Self::default();
        let diagnose = Diagnosed::in_namespace().map(Rule::Diagnose);
        let all: BTreeSet<Rule> = diagnose.chain(Diagnosed::surveyed().map(Rule::Survey)).collect();
        match namespace {
            Some(namespace) => rules.add_to_namespace(namespace, &all),
            None => rules.cluster = all,
        }
        rules.cluster.insert(Rule::Diagnose(Diagnosed::Nodes));
        rules
    }

    /// Rules to request tokens of a `ServiceAccount`: for the renewal of a cluster's token, or for a
    /// minted account.
    #[must_use]
    pub fn of_tokens(account: &ServiceAccountRef) -> Self {
        let mut rules = Self::default();
        rules.add_to_namespace(&account.namespace, &[Rule::CreateToken(account.name.clone())].into());
        rules
    }

    /// Rules that several pull secrets require together.
    #[must_use]
    pub fn union<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut rules = Self::default();
        for one in all {
            rules.cluster.extend(one.cluster.iter().cloned());
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
            self.namespaces.entry(namespace.clone()).or_default().extend(rules.iter().cloned());
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
    let secret = &declaration.secret_name;
    let mut rules: BTreeSet<Rule> = declaration.service_accounts.iter().flat_map(rules_to_attach).collect();
    rules.extend([Rule::CreateSecrets, Rule::GetSecret(secret.clone()), Rule::PatchSecret(secret.clone())]);
    if declaration.deletion_policy == DeletionPolicy::Delete {
        rules.insert(Rule::DeleteSecret(secret.clone()));
    }
    rules
}

/// Rules to attach a Secret to a `ServiceAccount`, and to detach it.
fn rules_to_attach(account: &ServiceAccountName) -> [Rule; 2] {
    [Rule::GetServiceAccount(account.clone()), Rule::PatchServiceAccount(account.clone())]
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
        let cluster = Name::parse("dev").unwrap();
        RequiredRules::of(&cluster, &declaration.secret_name, Some(declaration), cleanups)
    }

    fn words(rules: &BTreeSet<Rule>) -> Vec<String> {
        let name = |rule: &Rule| rule.name().map(|name| format!(" {name}")).unwrap_or_default();
        rules.iter().map(|rule| format!("{} {}{}", rule.verb(), rule.resource(), name(rule))).collect()
    }

    /// `NAMESPACE: verb resource name, …` per scope. `*` is the cluster.
    fn lines(rules: &RequiredRules) -> Vec<String> {
        let cluster = (!rules.cluster.is_empty()).then(|| format!("*: {}", words(&rules.cluster).join(", ")));
        let namespaces = rules.namespaces.iter().map(|(name, rules)| format!("{name}: {}", words(rules).join(", ")));
        cluster.into_iter().chain(namespaces).collect()
    }

    const APPLY: &str = "create secrets, get secrets pull, patch secrets pull";
    const ATTACH: &str = "get serviceaccounts default, patch serviceaccounts default";

    #[test]
    fn listed_namespaces_require_roles_only() {
        let retain = declaration(json!({}));
        assert_eq!(lines(&required(&retain, &[])), [format!("a: {APPLY}"), format!("b: {APPLY}")]);
        let delete = declaration(json!({"deletionPolicy": "delete", "serviceAccounts": ["default"],
            "targets": [{"cluster": "dev", "namespaces": ["a"]}, {"cluster": "prod", "namespaces": ["p"]}]}));
        assert_eq!(lines(&required(&delete, &[])), [format!("a: {APPLY}, delete secrets pull, {ATTACH}")]);
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
        let cleanup = |namespace: &str, removes, detaches: &[&str]| Cleanup {
            namespace: NamespaceName::parse(namespace).unwrap(),
            removes,
            detaches: detaches.iter().map(|name| ServiceAccountName::parse(name).unwrap()).collect(),
        };
        let cleanups =
            [cleanup("a", false, &["default"]), cleanup("old", true, &[]), cleanup("older", true, &["default"])];
        let retain = declaration(json!({}));
        let expected = [
            format!("a: {APPLY}, {ATTACH}"),
            format!("b: {APPLY}"),
            "old: get secrets pull, delete secrets pull".to_owned(),
            format!("older: get secrets pull, delete secrets pull, {ATTACH}"),
        ];
        assert_eq!(lines(&required(&retain, &cleanups)), expected);
        let cluster = Name::parse("dev").unwrap();
        let deleted = RequiredRules::of(&cluster, &retain.secret_name, None, &cleanups[1..2]);
        assert_eq!(lines(&deleted), expected[2..3]);
        assert!(RequiredRules::of(&cluster, &retain.secret_name, None, &[]).is_empty());
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
            "a: delete secrets pull".to_owned(),
            "b: delete secrets pull".to_owned(),
        ];
        assert_eq!(lines(&RequiredRules::union(&all)), expected);
        // A rule for one Secret does not cover another.
        let other =
            declaration(json!({"secret": {"name": "other"}, "targets": [{"cluster": "dev", "namespaces": ["c"]}]}));
        let expected = [
            "*: create secrets, get secrets pull, patch secrets pull, list namespaces, watch namespaces",
            "c: get secrets other, patch secrets other",
        ];
        assert_eq!(lines(&RequiredRules::union(&[required(&selects, &[]), required(&other, &[])])), expected);
        let watched = RequiredRules::union(&all[1..2]).with_watched_secrets();
        assert_eq!(lines(&watched)[0], "*: list secrets, watch secrets");
        assert_eq!(watched.namespaces, all[1].namespaces);
    }
}
