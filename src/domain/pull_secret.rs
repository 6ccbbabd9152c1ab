//! Pull secrets: the declaration, and the next step for one target given the state of the cluster.
//!
//! Pure: [`plan`] decides, and the reconciler acts.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{
    grants::Grants,
    invalid::{FieldError, FieldErrors, Invalid},
    names::{Name, NamespaceName, SecretName, ServiceAccountName},
    secret::SecretType,
    selector::{AccountSelection, LabelSelector, LabelSelectorDocument},
};

mod plan;

pub use plan::{ContentMac, FoundSecret, Owner, PreviewAction, Step, Wanted, Written, backoff, labels, plan};

/// Label of regcred's Secrets. Its value is the id of the pull secret.
pub const ID_LABEL: &str = "regcred.dev/pull-secret-id";
/// Annotation with the generation of the pull secret in the Secret. It fences older generations.
pub const GENERATION_ANNOTATION: &str = "regcred.dev/generation";

const TARGETS_MAX: usize = 100;
const NAMESPACES_MAX: usize = 10_000;
const SERVICE_ACCOUNTS_MAX: usize = 20;

/// A declaration as in requests, responses and the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    /// Names of the registry accounts in the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accounts: Option<Vec<String>>,
    /// Selects registry accounts by label, instead of `accounts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account_selector: Option<LabelSelectorDocument>,
    /// Name and type of the Secret.
    pub secret: SecretDocument,
    /// Clusters and namespaces.
    pub targets: Vec<TargetDocument>,
    /// `ServiceAccount`s of each namespace that the Secret is attached to.
    pub service_accounts: Vec<String>,
    /// Handling of Secrets that are no longer declared.
    pub deletion_policy: DeletionPolicy,
    /// Whether to take over an existing Secret of this name.
    pub adopt: bool,
}

/// Name and type of the Secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = PullSecretSecret)]
pub struct SecretDocument {
    /// Name of the Secret in every namespace, a DNS-1123 subdomain.
    #[schema(example = "team-a-pull")]
    pub name: String,
    /// `kubernetes.io/dockerconfigjson`, or the legacy `kubernetes.io/dockercfg`.
    #[serde(rename = "type", default = "default_type")]
    pub secret_type: String,
}

fn default_type() -> String {
    SecretType::default().as_str().to_owned()
}

/// Namespaces of a cluster, listed or selected by label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = PullSecretTarget)]
pub struct TargetDocument {
    /// Name of the cluster.
    #[schema(example = "dev")]
    pub cluster: String,
    /// Names of namespaces. Exactly one of `namespaces` and `namespaceSelector` is required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    /// Selects namespaces by label, including future ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelectorDocument>,
    /// Namespaces excluded from the selector.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_namespaces: Vec<String>,
}

/// Handling of a Secret that is no longer declared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum DeletionPolicy {
    /// Delete it, and detach it from the `ServiceAccount`s that regcred attached it to.
    #[default]
    Delete,
    /// Keep it. regcred no longer manages it.
    Retain,
}

/// A valid declaration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration {
    /// Registry accounts in the Secret.
    pub accounts: AccountSelection,
    /// Name of the Secret.
    pub secret_name: SecretName,
    /// Type of the Secret.
    pub secret_type: SecretType,
    /// Clusters and namespaces.
    pub targets: Vec<Target>,
    /// `ServiceAccount`s that the Secret is attached to.
    pub service_accounts: Vec<ServiceAccountName>,
    /// Handling of Secrets that are no longer declared.
    pub deletion_policy: DeletionPolicy,
    /// Whether to take over an existing Secret of this name.
    pub adopt: bool,
}

/// Namespaces of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The cluster.
    pub cluster: Name,
    /// The namespaces.
    pub namespaces: Namespaces,
}

/// Namespaces, listed or selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespaces {
    /// By name.
    Listed(Vec<NamespaceName>),
    /// By label.
    Selected {
        /// Label selector.
        selector: LabelSelector,
        /// Excluded namespaces.
        exclude: BTreeSet<NamespaceName>,
    },
}

impl Declaration {
    /// Parses a declaration.
    ///
    /// # Errors
    ///
    /// One error per invalid field.
    pub fn parse(document: Document) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let accounts = AccountSelection::parse(&mut errors, document.accounts, document.account_selector);
        let secret_name = errors.take("secret.name", SecretName::parse(&document.secret.name));
        let secret_type = errors.take("secret.type", document.secret.secret_type.parse());
        if document.targets.is_empty() || document.targets.len() > TARGETS_MAX {
            errors.refuse("targets", "must be 1 to 100 targets");
        }
        let targets: Vec<Option<Target>> = document
            .targets
            .into_iter()
            .take(TARGETS_MAX)
            .enumerate()
            .map(|(index, target)| parse_target(&mut errors, index, target))
            .collect();
        let service_accounts = parse_list(
            &mut errors,
            "serviceAccounts",
            &document.service_accounts,
            SERVICE_ACCOUNTS_MAX,
            ServiceAccountName::parse,
        );
        errors.finish(|| {
            Some(Self {
                accounts: accounts?,
                secret_name: secret_name?,
                secret_type: secret_type?,
                targets: targets.into_iter().collect::<Option<_>>()?,
                service_accounts: service_accounts?,
                deletion_policy: document.deletion_policy,
                adopt: document.adopt,
            })
        })
    }

    /// Converts the declaration to its document form.
    #[must_use]
    pub fn document(&self) -> Document {
        let (accounts, account_selector) = match &self.accounts {
            AccountSelection::Names(names) => (Some(names.iter().map(Name::to_string).collect()), None),
            AccountSelection::Selector(selector) => (None, Some(selector.into())),
        };
        Document {
            accounts,
            account_selector,
            secret: SecretDocument {
                name: self.secret_name.to_string(),
                secret_type: self.secret_type.as_str().to_owned(),
            },
            targets: self.targets.iter().map(Target::document).collect(),
            service_accounts: self.service_accounts.iter().map(ServiceAccountName::to_string).collect(),
            deletion_policy: self.deletion_policy,
            adopt: self.adopt,
        }
    }

    /// Account selector, unless accounts are named.
    #[must_use]
    pub fn account_selector(&self) -> Option<&LabelSelector> {
        match &self.accounts {
            AccountSelection::Selector(selector) => Some(selector),
            AccountSelection::Names(_) => None,
        }
    }

    /// Clusters, each with whether namespaces are selected in it by label.
    #[must_use]
    pub fn clusters(&self) -> BTreeMap<&Name, bool> {
        let mut clusters = BTreeMap::new();
        for target in &self.targets {
            *clusters.entry(&target.cluster).or_insert(false) |=
                matches!(target.namespaces, Namespaces::Selected { .. });
        }
        clusters
    }

    /// Listed pairs of cluster and namespace.
    #[must_use]
    pub fn listed(&self) -> BTreeSet<(&Name, &NamespaceName)> {
        let mut pairs = BTreeSet::new();
        for target in &self.targets {
            if let Namespaces::Listed(namespaces) = &target.namespaces {
                pairs.extend(namespaces.iter().map(|namespace| (&target.cluster, namespace)));
            }
        }
        pairs
    }

    /// Whether a namespace of a cluster is selected by label.
    #[must_use]
    pub fn selects(&self, cluster: &str, namespace: &NamespaceName, labels: &BTreeMap<String, String>) -> bool {
        self.targets
            .iter()
            .filter(|target| target.cluster.as_str() == cluster)
            .any(|target| target.namespaces.select(namespace, labels))
    }

    /// Places in `targets` of the selectors that match none of the namespaces of a cluster.
    pub fn unmatched<'a>(
        &self,
        cluster: &str,
        namespaces: &(impl Iterator<Item = (&'a NamespaceName, &'a BTreeMap<String, String>)> + Clone),
    ) -> Vec<usize> {
        let targets = self.targets.iter().enumerate().filter(|(_, target)| target.cluster.as_str() == cluster);
        let unmatched = targets.filter(|(_, target)| {
            matches!(target.namespaces, Namespaces::Selected { .. })
                && !namespaces.clone().any(|(name, labels)| target.namespaces.select(name, labels))
        });
        unmatched.map(|(place, _)| place).collect()
    }

    /// Whether grants include all clusters and namespaces.
    ///
    /// A selector requires a grant of all namespaces: it matches future ones, and the editors of a
    /// namespace decide its labels.
    #[must_use]
    pub fn is_within(&self, grants: &Grants) -> bool {
        self.targets.iter().all(|target| {
            grants.include_cluster(target.cluster.as_str())
                && match &target.namespaces {
                    Namespaces::Listed(names) => names.iter().all(|name| grants.include_namespace(name.as_str())),
                    Namespaces::Selected { .. } => grants.include_all_namespaces(),
                }
        })
    }

    /// Whether a caller with these grants may see the pull secret: all that it names is granted.
    /// `labels_of` returns the labels of an account, or `None` if there is no such account.
    #[must_use]
    pub fn is_visible<'a>(
        &self,
        grants: &Grants,
        labels_of: impl Fn(&str) -> Option<&'a BTreeMap<String, String>>,
    ) -> bool {
        let includes =
            |name: &Name| labels_of(name.as_str()).is_some_and(|labels| grants.include_account(name.as_str(), labels));
        self.is_within(grants)
            && (grants.include_accounts_with(&BTreeMap::new())
                || match &self.accounts {
                    AccountSelection::Names(names) => names.iter().all(includes),
                    AccountSelection::Selector(selector) => {
                        grants.include_accounts_with(selector.match_labels().as_map())
                    }
                })
    }

    /// Names of the accounts that the declaration names.
    #[must_use]
    pub fn named_accounts(&self) -> &[Name] {
        match &self.accounts {
            AccountSelection::Names(names) => names,
            AccountSelection::Selector(_) => &[],
        }
    }
}

impl Namespaces {
    /// Whether a namespace is selected by label.
    fn select(&self, namespace: &NamespaceName, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Listed(_) => false,
            Self::Selected { selector, exclude } => !exclude.contains(namespace) && selector.matches(labels),
        }
    }
}

impl Target {
    fn document(&self) -> TargetDocument {
        let cluster = self.cluster.to_string();
        match &self.namespaces {
            Namespaces::Listed(names) => TargetDocument {
                cluster,
                namespaces: Some(names.iter().map(NamespaceName::to_string).collect()),
                namespace_selector: None,
                exclude_namespaces: Vec::new(),
            },
            Namespaces::Selected { selector, exclude } => TargetDocument {
                cluster,
                namespaces: None,
                namespace_selector: Some(selector.into()),
                exclude_namespaces: exclude.iter().map(NamespaceName::to_string).collect(),
            },
        }
    }
}

fn parse_target(errors: &mut FieldErrors, index: usize, target: TargetDocument) -> Option<Target> {
    let at = format!("targets[{index}]");
    let cluster = errors.take(&format!("{at}.cluster"), Name::parse(&target.cluster));
    let namespaces = match (target.namespaces, target.namespace_selector) {
        (Some(names), None) => {
            let field = format!("{at}.namespaces");
            if names.is_empty() {
                errors.refuse(&field, "must have at least one name");
            }
            if !target.exclude_namespaces.is_empty() {
                errors.refuse(&format!("{at}.excludeNamespaces"), "requires a `namespaceSelector`");
            }
            parse_list(errors, &field, &names, NAMESPACES_MAX, NamespaceName::parse).map(Namespaces::Listed)
        }
        (None, Some(selector)) => {
            let field = format!("{at}.excludeNamespaces");
            let exclude = parse_list(errors, &field, &target.exclude_namespaces, NAMESPACES_MAX, NamespaceName::parse);
            let selector = selector.parse(errors, &format!("{at}.namespaceSelector"));
            selector
                .zip(exclude)
                .map(|(selector, exclude)| Namespaces::Selected { selector, exclude: exclude.into_iter().collect() })
        }
        _ => {
            errors.refuse(&at, "must have either `namespaces` or a `namespaceSelector`");
            None
        }
    };
    Some(Target { cluster: cluster?, namespaces: namespaces? })
}

/// Parses a list of distinct names.
fn parse_list<T: Clone + Ord>(
    errors: &mut FieldErrors,
    field: &str,
    names: &[String],
    max: usize,
    parse: impl Fn(&str) -> Result<T, Invalid>,
) -> Option<Vec<T>> {
    if names.len() > max {
        errors.refuse(field, format!("must have at most {max} items"));
        return None;
    }
    let mut seen = BTreeSet::new();
    let parsed: Vec<Option<T>> = names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let field = format!("{field}[{index}]");
            let parsed = errors.take(&field, parse(name))?;
            if !seen.insert(parsed.clone()) {
                errors.refuse(&field, "is a duplicate");
            }
            Some(parsed)
        })
        .collect();
    parsed.into_iter().collect()
}

/// State of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum TargetState {
    /// Not reconciled since the last change, or waiting for a `ServiceAccount`.
    Pending,
    /// The cluster matches the declaration.
    Synced,
    /// The last attempt failed. It is retried.
    Failed,
    /// A Secret of another owner has the name. It is not changed.
    Conflict,
}

impl TargetState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::Pending, Self::Synced, Self::Failed, Self::Conflict];

    /// Name in the API, the database and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Synced => "synced",
            Self::Failed => "failed",
            Self::Conflict => "conflict",
        }
    }
}

impl FromStr for TargetState {
    type Err = Invalid;

    fn from_str(state: &str) -> Result<Self, Invalid> {
        let found = Self::ALL.into_iter().find(|known| known.as_str() == state);
        found.ok_or_else(|| Invalid::new("must be pending, synced, failed or conflict"))
    }
}

/// Selected account that is not in the document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = LeftOutAccount)]
pub struct LeftOut {
    /// Name of the account.
    pub account: String,
    /// Reason.
    pub reason: LeftOutReason,
}

/// Reason why a selected account is not in the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LeftOutReason {
    /// An older account has the same key.
    KeyCollision,
}

impl LeftOut {
    /// Reports an account whose key an older account has.
    #[must_use]
    pub fn key_collision(account: impl Into<String>) -> Self {
        Self { account: account.into(), reason: LeftOutReason::KeyCollision }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;

    fn document(change: impl FnOnce(&mut Value)) -> Document {
        let mut document = json!({
            "accounts": ["a", "b"],
            "secret": {"name": "pull", "type": "kubernetes.io/dockerconfigjson"},
            "targets": [
                {"cluster": "dev", "namespaces": ["default", "a-dev"]},
                {"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}, "excludeNamespaces": ["a-old"]},
                {"cluster": "prod", "namespaces": ["default"]},
            ],
            "serviceAccounts": ["default"], "deletionPolicy": "delete", "adopt": false,
        });
        change(&mut document);
        serde_json::from_value(document).unwrap()
    }

    fn declaration() -> Declaration {
        Declaration::parse(document(|_| ())).unwrap()
    }

    #[test]
    fn document_survives_parsing() {
        let read = document(|_| ());
        assert_eq!(Declaration::parse(read.clone()).unwrap().document(), read);
        let selected = document(|document| {
            document["accounts"].take();
            document["accountSelector"] = json!({"matchLabels": {"team": "a"}, "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["x", "y"]}, {"key": "old", "operator": "DoesNotExist"},
            ]});
        });
        assert_eq!(Declaration::parse(selected.clone()).unwrap().document(), selected);
    }

    #[rstest]
    #[case("/accounts", json!([]), "accounts")]
    #[case("/accounts", json!(["a", "a"]), "accounts[1]")]
    #[case("/accounts", json!(["A"]), "accounts[0]")]
    #[case("/accounts", json!(null), "accounts")]
    #[case("/secret/name", json!("A_b"), "secret.name")]
    #[case("/secret/type", json!("Opaque"), "secret.type")]
    #[case("/targets", json!([]), "targets")]
    #[case("/targets/0", json!({"cluster": "dev"}), "targets[0]")]
    #[case("/targets/0/namespaces", json!([]), "targets[0].namespaces")]
    #[case("/targets/0/namespaces/1", json!("../x"), "targets[0].namespaces[1]")]
    #[case("/targets/0/excludeNamespaces", json!(["x"]), "targets[0].excludeNamespaces")]
    #[case("/targets/1/namespaceSelector/matchLabels/team", json!("a b"), "targets[1].namespaceSelector.matchLabels")]
    #[case("/targets/2/cluster", json!("x/y"), "targets[2].cluster")]
    #[case("/serviceAccounts", json!(["default", "default"]), "serviceAccounts[1]")]
    fn invalid_fields_are_named(#[case] pointer: &str, #[case] value: Value, #[case] field: &str) {
        let changed = document(|document| {
            let (parent, member) = pointer.rsplit_once('/').unwrap();
            let parent = document.pointer_mut(parent).unwrap();
            match parent {
                Value::Array(items) => items[member.parse::<usize>().unwrap()] = value,
                parent => parent[member] = value,
            }
        });
        let fields: Vec<String> = Declaration::parse(changed).unwrap_err().into_iter().map(|e| e.field).collect();
        assert_eq!(fields, [field]);
    }

    #[test]
    fn listed_and_selected_namespaces_are_separate() {
        let declaration = declaration();
        let listed: Vec<_> = declaration.listed().into_iter().map(|(c, n)| (c.as_str(), n.as_str())).collect();
        assert_eq!(listed, [("dev", "a-dev"), ("dev", "default"), ("prod", "default")]);
        let clusters: Vec<_> = declaration.clusters().into_iter().map(|(c, selects)| (c.as_str(), selects)).collect();
        assert_eq!(clusters, [("dev", true), ("prod", false)]);
        let team_a = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
        let selects = |cluster, namespace, labels: &BTreeMap<String, String>| {
            declaration.selects(cluster, &NamespaceName::parse(namespace).unwrap(), labels)
        };
        assert!(selects("dev", "a-new", &team_a));
        assert!(!selects("dev", "a-old", &team_a));
        assert!(!selects("dev", "a-new", &BTreeMap::new()));
        assert!(!selects("prod", "a-new", &team_a));
    }

    const ID: Uuid = Uuid::from_u128(1);

    fn found(owner: Option<Uuid>, uid: &str, version: &str, generation: Option<i64>) -> FoundSecret {
        let labels = owner.map(|owner| (ID_LABEL.to_owned(), owner.to_string())).into_iter().collect();
        FoundSecret { uid: uid.to_owned(), resource_version: version.to_owned(), labels, generation }
    }

    fn planned(adopt: bool, content: &[u8], found: Option<&FoundSecret>) -> Step {
        let written = Written {
            uid: Some("u".to_owned()),
            resource_version: Some("7".to_owned()),
            content_mac: Some(b"old".to_vec()),
        };
        let content_mac = ContentMac { current: content.to_vec(), older: vec![b"older".to_vec()] };
        plan(&Wanted { id: ID, generation: 5, content_mac: &content_mac, adopt }, &written, found)
    }

    fn apply(version: &str) -> Step {
        Step::Apply { resource_version: version.to_owned() }
    }

    #[test]
    fn only_a_secret_out_of_sync_is_written() {
        assert_eq!(planned(false, b"old", None), Step::Create);
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "u", "7", Some(5)))), Step::Leave);
        // Rotated; edited; recreated with the same labels; without labels.
        assert_eq!(planned(false, b"new", Some(&found(Some(ID), "u", "7", Some(4)))), apply("7"));
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "u", "8", Some(5)))), apply("8"));
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "v", "9", Some(5)))), apply("9"));
        assert_eq!(planned(false, b"old", Some(&found(None, "u", "8", None))), apply("8"));
    }

    #[test]
    fn foreign_secret_is_left_alone_unless_adopted() {
        let other = Uuid::from_u128(2);
        for adopt in [false, true] {
            let foreign = planned(adopt, b"new", Some(&found(None, "v", "3", None)));
            assert_eq!(foreign, if adopt { apply("3") } else { Step::Conflict(None) });
            let others = planned(adopt, b"new", Some(&found(Some(other), "v", "3", Some(1))));
            assert_eq!(others, if adopt { Step::ConflictUnlessGone(other) } else { Step::Conflict(Some(other)) });
        }
    }

    #[test]
    fn newer_generation_supersedes() {
        let newer = found(Some(ID), "u", "8", Some(6));
        let superseded = Step::Superseded { by: 6, resource_version: "8".to_owned() };
        assert_eq!(planned(true, b"old", Some(&newer)), superseded);
    }

    #[test]
    fn backoff_doubles_up_to_five_minutes() {
        let seconds: Vec<u64> = [0, 1, 2, 3, 9, 10, 1000].map(|attempts| backoff(attempts).as_secs()).into();
        assert_eq!(seconds, [1, 1, 2, 4, 256, 300, 300]);
    }
}
