//! Which rights in a cluster pull secrets need: exactly those that the calls need which are made for them.
//!
//! One function for whoever prints them and whoever looks whether they are there, so that the two cannot differ.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::{
    names::{Name, NamespaceName},
    pull_secret::{Declaration, DeletionPolicy, Namespaces},
};

/// A verb on a resource of the core API group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// To place a Secret where there is none.
    CreateSecrets,
    /// To look whose a Secret is and which version it has.
    GetSecrets,
    /// To put new content into it.
    PatchSecrets,
    /// To remove one that is not declared any more.
    DeleteSecrets,
    /// To see which Secrets a `ServiceAccount` names.
    GetServiceAccounts,
    /// To put a Secret into it, or take it out.
    PatchServiceAccounts,
    /// To compare the labels of namespaces with selectors.
    ListNamespaces,
    /// To hear of new namespaces and new labels at once.
    WatchNamespaces,
    /// To begin to watch Secrets.
    ListSecrets,
    /// To hear at once that somebody edited or deleted a Secret.
    WatchSecrets,
}

impl Right {
    /// The resource, as Kubernetes names it.
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

    /// The verb, as Kubernetes names it.
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

/// What is to be known of a pull secret for the rights that it needs in a cluster.
#[derive(Debug, Clone)]
pub struct Placement<'a> {
    /// What is declared; none of one that is being deleted.
    pub declaration: Option<&'a Declaration>,
    /// The namespaces in which there is something left to do beside it.
    pub leftovers: &'a [Leftover],
}

/// A namespace in which there is more to do than the declaration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The namespace.
    pub namespace: NamespaceName,
    /// The Secret is to be removed from it.
    pub removes: bool,
    /// The Secret is to be taken out of `ServiceAccount`s.
    pub detaches: bool,
}

/// Rights, and where they are needed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// In the whole cluster.
    pub everywhere: BTreeSet<Right>,
    /// In one namespace, beside those in the whole cluster. None of these is empty.
    pub within: BTreeMap<NamespaceName, BTreeSet<Right>>,
}

impl Needs {
    /// What one pull secret needs in a cluster.
    #[must_use]
    pub fn of(cluster: &Name, placement: &Placement<'_>) -> Self {
        let mut needs = Self::default();
        if let Some(declaration) = placement.declaration {
            let place = rights_to_place(declaration);
            for target in declaration.targets.iter().filter(|target| target.cluster == *cluster) {
                match &target.namespaces {
                    Namespaces::Listed(namespaces) => {
                        for namespace in namespaces {
                            needs.add_within(namespace, &place);
                        }
                    }
                    // Nobody knows which namespaces will match.
                    Namespaces::Selected { .. } => {
                        needs.everywhere.extend(&place);
                        needs.everywhere.extend([Right::ListNamespaces, Right::WatchNamespaces]);
                    }
                }
            }
        }
        for leftover in placement.leftovers {
            let removes: &[Right] = if leftover.removes { &[Right::GetSecrets, Right::DeleteSecrets] } else { &[] };
            let detaches: &[Right] =
                if leftover.detaches { &[Right::GetServiceAccounts, Right::PatchServiceAccounts] } else { &[] };
            needs.add_within(&leftover.namespace, &removes.iter().chain(detaches).copied().collect());
        }
        needs.leave_out_what_is_everywhere();
        needs
    }

    /// What several pull secrets need together.
    #[must_use]
    pub fn of_all<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut needs = Self::default();
        for one in all {
            needs.everywhere.extend(&one.everywhere);
            for (namespace, rights) in &one.within {
                needs.add_within(namespace, rights);
            }
        }
        needs.leave_out_what_is_everywhere();
        needs
    }

    /// Adds the rights by which an edited Secret is heard of at once. The watch is one for the whole cluster.
    #[must_use]
    pub fn with_watched_secrets(mut self) -> Self {
        self.everywhere.extend([Right::ListSecrets, Right::WatchSecrets]);
        self
    }

    /// Whether nothing is needed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.everywhere.is_empty() && self.within.is_empty()
    }

    fn add_within(&mut self, namespace: &NamespaceName, rights: &BTreeSet<Right>) {
        if !rights.is_empty() {
            self.within.entry(namespace.clone()).or_default().extend(rights);
        }
    }

    fn leave_out_what_is_everywhere(&mut self) {
        self.within.retain(|_, rights| {
            rights.retain(|right| !self.everywhere.contains(right));
            !rights.is_empty()
        });
    }
}

/// What is needed in a namespace that a declaration means.
fn rights_to_place(declaration: &Declaration) -> BTreeSet<Right> {
    let mut rights = BTreeSet::from([Right::CreateSecrets, Right::GetSecrets, Right::PatchSecrets]);
    if declaration.deletion_policy == DeletionPolicy::Delete {
        rights.insert(Right::DeleteSecrets);
    }
    if !declaration.service_accounts.is_empty() {
        rights.extend([Right::GetServiceAccounts, Right::PatchServiceAccounts]);
    }
    rights
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn declaration(change: Value) -> Declaration {
        let mut document = json!({
            "accounts": ["martin"], "secret": {"name": "pull"}, "serviceAccounts": [], "deletionPolicy": "retain",
            "adopt": false, "targets": [{"cluster": "dev", "namespaces": ["a", "b"]}],
        });
        let Value::Object(change) = change else { panic!("an object") };
        document.as_object_mut().unwrap().extend(change);
        Declaration::parse(serde_json::from_value(document).unwrap()).unwrap()
    }

    fn needs(declaration: &Declaration, leftovers: &[Leftover]) -> Needs {
        let cluster = Name::parse("dev").unwrap();
        Needs::of(&cluster, &Placement { declaration: Some(declaration), leftovers })
    }

    fn words(rights: &BTreeSet<Right>) -> Vec<String> {
        rights.iter().map(|right| format!("{} {}", right.verb(), right.resource())).collect()
    }

    /// `NAMESPACE: verb resource, …` of each, and the whole cluster as `*`.
    fn lines(needs: &Needs) -> Vec<String> {
        let everywhere = (!needs.everywhere.is_empty()).then(|| format!("*: {}", words(&needs.everywhere).join(", ")));
        let within = needs.within.iter().map(|(name, rights)| format!("{name}: {}", words(rights).join(", ")));
        everywhere.into_iter().chain(within).collect()
    }

    const PLACE: &str = "create secrets, get secrets, patch secrets";
    const ATTACH: &str = "get serviceaccounts, patch serviceaccounts";

    #[test]
    fn named_namespaces_need_rights_in_themselves_alone() {
        let retain = declaration(json!({}));
        assert_eq!(lines(&needs(&retain, &[])), [format!("a: {PLACE}"), format!("b: {PLACE}")]);
        let delete = declaration(json!({"deletionPolicy": "delete", "serviceAccounts": ["default"],
            "targets": [{"cluster": "dev", "namespaces": ["a"]}, {"cluster": "prod", "namespaces": ["p"]}]}));
        assert_eq!(lines(&needs(&delete, &[])), [format!("a: {PLACE}, delete secrets, {ATTACH}")]);
    }

    #[test]
    fn a_selector_needs_rights_everywhere_and_sees_namespaces() {
        let selects = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["a"]},
            {"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}},
            {"cluster": "prod", "namespaces": ["p"]}]}));
        assert_eq!(lines(&needs(&selects, &[])), [format!("*: {PLACE}, list namespaces, watch namespaces")]);
        let elsewhere = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["a"]},
            {"cluster": "prod", "namespaceSelector": {"matchLabels": {"team": "a"}}}]}));
        assert_eq!(lines(&needs(&elsewhere, &[])), [format!("a: {PLACE}")]);
    }

    #[test]
    fn what_is_left_of_earlier_declarations_needs_its_rights() {
        let left = |namespace: &str, removes, detaches| Leftover {
            namespace: NamespaceName::parse(namespace).unwrap(),
            removes,
            detaches,
        };
        let leftovers = [left("a", false, true), left("old", true, false), left("older", true, true)];
        let retain = declaration(json!({}));
        let expected = [
            format!("a: {PLACE}, {ATTACH}"),
            format!("b: {PLACE}"),
            "old: get secrets, delete secrets".to_owned(),
            format!("older: get secrets, delete secrets, {ATTACH}"),
        ];
        assert_eq!(lines(&needs(&retain, &leftovers)), expected);
        let cluster = Name::parse("dev").unwrap();
        let deleted = Needs::of(&cluster, &Placement { declaration: None, leftovers: &leftovers[1..2] });
        assert_eq!(lines(&deleted), expected[2..3]);
        assert!(Needs::of(&cluster, &Placement { declaration: None, leftovers: &[] }).is_empty());
    }

    #[test]
    fn together_they_need_what_each_needs_and_nothing_twice() {
        let selects =
            declaration(json!({"targets": [{"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}}]}));
        let named = declaration(json!({"deletionPolicy": "delete"}));
        let alone = declaration(json!({"targets": [{"cluster": "dev", "namespaces": ["c"]}]}));
        let all = [needs(&selects, &[]), needs(&named, &[]), needs(&alone, &[])];
        let expected = [
            format!("*: {PLACE}, list namespaces, watch namespaces"),
            "a: delete secrets".to_owned(),
            "b: delete secrets".to_owned(),
        ];
        assert_eq!(lines(&Needs::of_all(&all)), expected);
        let watched = Needs::of_all(&all[1..2]).with_watched_secrets();
        assert_eq!(lines(&watched)[0], "*: list secrets, watch secrets");
        assert_eq!(watched.within, all[1].within);
    }
}
