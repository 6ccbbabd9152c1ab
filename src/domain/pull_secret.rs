//! Pull secrets: what somebody declares, and what is to be done for one target, given what the cluster has.
//!
//! Nothing here acts. The worker brings what it found, and is told the next step.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::{
    grants::Grants,
    invalid::{FieldError, FieldErrors, Invalid},
    names::{Name, NamespaceName, SecretName, ServiceAccountName},
    secret::{MANAGED_BY_LABEL, SecretType},
    selector::{AccountSelection, LabelSelector, LabelSelectorDocument},
};

/// The label by which regcred knows its Secrets again; its value is the id of the pull secret.
pub const ID_LABEL: &str = "regcred.dev/pull-secret-id";
/// The annotation that says which generation of the pull secret is in the Secret, so that no older one follows.
pub const GENERATION_ANNOTATION: &str = "regcred.dev/generation";

const TARGETS_MAX: usize = 100;
const NAMESPACES_MAX: usize = 10_000;
const SERVICE_ACCOUNTS_MAX: usize = 20;

/// A declaration as it stands in requests, answers and the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    /// Names of the accounts that go into the Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accounts: Option<Vec<String>>,
    /// All accounts with such labels, in place of `accounts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account_selector: Option<LabelSelectorDocument>,
    /// The Secret.
    pub secret: SecretDocument,
    /// Where it goes.
    pub targets: Vec<TargetDocument>,
    /// The `ServiceAccount`s of each namespace whose pods shall use it.
    pub service_accounts: Vec<String>,
    /// What becomes of Secrets that are not declared any more.
    pub deletion_policy: DeletionPolicy,
    /// A Secret of this name that somebody else made is taken over.
    pub adopt: bool,
}

/// Name and type of the Secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = PullSecretSecret)]
pub struct SecretDocument {
    /// Name of the Secret, a DNS-1123 subdomain, the same in every namespace.
    #[schema(example = "team-a-pull")]
    pub name: String,
    /// `kubernetes.io/dockerconfigjson`, or the legacy `kubernetes.io/dockercfg`.
    #[serde(rename = "type", default = "default_type")]
    pub secret_type: String,
}

fn default_type() -> String {
    SecretType::default().as_str().to_owned()
}

/// Namespaces of a cluster: named, or selected by their labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = PullSecretTarget)]
pub struct TargetDocument {
    /// Name of the cluster.
    #[schema(example = "dev")]
    pub cluster: String,
    /// These namespaces. Either this or `namespaceSelector` must be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    /// All namespaces with such labels, those that are made later too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelectorDocument>,
    /// Namespaces that are not meant, whatever their labels are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_namespaces: Vec<String>,
}

/// What becomes of a Secret that is not declared any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum DeletionPolicy {
    /// It is deleted, and taken out of the `ServiceAccount`s that regcred put it into.
    #[default]
    Delete,
    /// It stays as it is, and regcred forgets it.
    Retain,
}

/// A declaration that keeps all rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration {
    /// The accounts that go into the Secret.
    pub accounts: AccountSelection,
    /// Name of the Secret.
    pub secret_name: SecretName,
    /// Its type.
    pub secret_type: SecretType,
    /// Where it goes.
    pub targets: Vec<Target>,
    /// The `ServiceAccount`s that it is attached to.
    pub service_accounts: Vec<ServiceAccountName>,
    /// What becomes of Secrets that are not declared any more.
    pub deletion_policy: DeletionPolicy,
    /// A Secret of this name that somebody else made is taken over.
    pub adopt: bool,
}

/// Some namespaces of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The cluster.
    pub cluster: Name,
    /// The namespaces.
    pub namespaces: Namespaces,
}

/// Which namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespaces {
    /// These.
    Listed(Vec<NamespaceName>),
    /// All with such labels.
    Selected {
        /// The labels.
        selector: LabelSelector,
        /// And not these.
        exclude: BTreeSet<NamespaceName>,
    },
}

impl Declaration {
    /// Parses a declaration.
    ///
    /// # Errors
    ///
    /// Every field that is refused.
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

    /// The declaration as it is stored and answered.
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

    /// The selector of the accounts, if they are not named.
    #[must_use]
    pub fn account_selector(&self) -> Option<&LabelSelector> {
        match &self.accounts {
            AccountSelection::Selector(selector) => Some(selector),
            AccountSelection::Names(_) => None,
        }
    }

    /// The clusters that are meant, and whether namespaces are selected by label there.
    #[must_use]
    pub fn clusters(&self) -> BTreeMap<&Name, bool> {
        let mut clusters = BTreeMap::new();
        for target in &self.targets {
            *clusters.entry(&target.cluster).or_insert(false) |=
                matches!(target.namespaces, Namespaces::Selected { .. });
        }
        clusters
    }

    /// The pairs of cluster and namespace that are named.
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

    /// Whether a namespace of a cluster is selected by its labels.
    #[must_use]
    pub fn selects(&self, cluster: &str, namespace: &NamespaceName, labels: &BTreeMap<String, String>) -> bool {
        self.targets.iter().filter(|target| target.cluster.as_str() == cluster).any(|target| match &target.namespaces {
            Namespaces::Listed(_) => false,
            Namespaces::Selected { selector, exclude } => !exclude.contains(namespace) && selector.matches(labels),
        })
    }

    /// Whether somebody with these grants reaches all clusters and namespaces of it. Who selects by label reaches namespaces
    /// that nobody has made yet, and the labels of a namespace belong to whoever may edit it: that needs a grant of all.
    #[must_use]
    pub fn places_within(&self, grants: &Grants) -> bool {
        self.targets.iter().all(|target| {
            grants.include_cluster(target.cluster.as_str())
                && match &target.namespaces {
                    Namespaces::Listed(names) => names.iter().all(|name| grants.include_namespace(name.as_str())),
                    Namespaces::Selected { .. } => grants.include_all_namespaces(),
                }
        })
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
                errors.refuse(&field, "must name at least one namespace");
            }
            if !target.exclude_namespaces.is_empty() {
                errors.refuse(&format!("{at}.excludeNamespaces"), "belongs to a `namespaceSelector`");
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

/// Parses a list of names, none of them twice.
fn parse_list<T: Clone + Ord>(
    errors: &mut FieldErrors,
    field: &str,
    names: &[String],
    max: usize,
    parse: impl Fn(&str) -> Result<T, Invalid>,
) -> Option<Vec<T>> {
    if names.len() > max {
        errors.refuse(field, format!("must be at most {max}"));
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
                errors.refuse(&field, "is there twice");
            }
            Some(parsed)
        })
        .collect();
    parsed.into_iter().collect()
}

/// How a target is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum TargetState {
    /// The cluster was not brought up to date yet, or something that is needed does not exist yet.
    Pending,
    /// The cluster has what was declared.
    Synced,
    /// The last try failed; it is tried again.
    Failed,
    /// Somebody else's Secret has the name, and is left alone.
    Conflict,
}

impl TargetState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::Pending, Self::Synced, Self::Failed, Self::Conflict];

    /// The name in the API, in the database and in metrics.
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

/// A Secret as a cluster has it, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSecret {
    /// Identity of the object.
    pub uid: String,
    /// Version of the object.
    pub resource_version: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The generation that regcred wrote on it.
    pub generation: Option<i64>,
}

/// What regcred wrote into a cluster last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// Identity of the Secret.
    pub uid: Option<String>,
    /// Version of the Secret.
    pub resource_version: Option<String>,
    /// Keyed hash of what was written.
    pub content_mac: Option<Vec<u8>>,
}

/// The labels of a pull secret's Secrets.
#[must_use]
pub fn labels(id: Uuid) -> BTreeMap<String, String> {
    let (key, value) = MANAGED_BY_LABEL;
    BTreeMap::from([(key.to_owned(), value.to_owned()), (ID_LABEL.to_owned(), id.to_string())])
}

/// Whose a Secret is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This pull secret's, by its label, or because regcred made this very object.
    Us,
    /// Another pull secret's, by its label.
    Other(Uuid),
    /// Somebody's who is not regcred.
    Stranger,
}

impl FoundSecret {
    /// Whose it is.
    #[must_use]
    pub fn owner(&self, id: Uuid, written: &Written) -> Owner {
        if written.uid.as_deref() == Some(&self.uid) {
            return Owner::Us;
        }
        match self.labels.get(ID_LABEL).map(|label| label.parse::<Uuid>()) {
            Some(Ok(owner)) if owner == id => Owner::Us,
            Some(Ok(other)) => Owner::Other(other),
            Some(Err(_)) | None => Owner::Stranger,
        }
    }
}

/// What a Secret shall be.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The pull secret.
    pub id: Uuid,
    /// Its generation.
    pub generation: i64,
    /// Keyed hash of what is to be written.
    pub content_mac: &'a [u8],
    /// A Secret of somebody else is taken over.
    pub adopt: bool,
}

/// The next thing to do for a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the Secret.
    Create,
    /// Bring it up to date, if it still is at this version.
    Apply {
        /// The version.
        resource_version: String,
    },
    /// It is as it shall be.
    Leave,
    /// It is somebody else's.
    Conflict,
    /// It is another pull secret's: to be taken over only if there is none of that id any more.
    ConflictUnlessGone(Uuid),
    /// It has a newer generation already: whoever asks is late, or the number is not of this database.
    Superseded {
        /// The generation that it has.
        by: i64,
        /// The version that it has.
        resource_version: String,
    },
}

/// What to do for a target, given the Secret that the cluster has.
#[must_use]
pub fn plan(wanted: &Wanted<'_>, written: &Written, found: Option<&FoundSecret>) -> Step {
    let Some(found) = found else { return Step::Create };
    let apply = || Step::Apply { resource_version: found.resource_version.clone() };
    match found.owner(wanted.id, written) {
        Owner::Us => {}
        Owner::Other(other) if wanted.adopt => return Step::ConflictUnlessGone(other),
        Owner::Stranger if wanted.adopt => return apply(),
        Owner::Other(_) | Owner::Stranger => return Step::Conflict,
    }
    match found.generation {
        Some(by) if by > wanted.generation => Step::Superseded { by, resource_version: found.resource_version.clone() },
        _ if is_unchanged(wanted, written, found) => Step::Leave,
        _ => apply(),
    }
}

/// It is the very object and version that was written, and what was written is what is wanted.
fn is_unchanged(wanted: &Wanted<'_>, written: &Written, found: &FoundSecret) -> bool {
    written.uid.as_deref() == Some(&found.uid)
        && written.resource_version.as_deref() == Some(&found.resource_version)
        && written.content_mac.as_deref() == Some(wanted.content_mac)
}

/// What a dry run says of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PreviewAction {
    /// The Secret would be made.
    Create,
    /// The Secret would be written.
    Update,
    /// The Secret is as it shall be.
    Unchanged,
    /// Somebody else's Secret would be taken over.
    Adopt,
    /// Somebody else's Secret has the name, and would stay as it is.
    Conflict,
    /// The Secret would be removed.
    Remove,
    /// The Secret would stay, and regcred would forget it.
    Forget,
    /// It cannot be told.
    Unknown,
}

/// How long to wait after so many tries that failed: from a second to five minutes, doubling. The caller adds jitter.
#[must_use]
pub fn backoff(attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(0).min(9);
    Duration::from_secs(1 << doublings).min(Duration::from_mins(5))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

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
    fn a_declaration_is_written_as_it_was_read() {
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
    fn what_breaks_a_rule_is_named(#[case] pointer: &str, #[case] value: Value, #[case] field: &str) {
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
    fn listed_and_selected_namespaces_are_told_apart() {
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
        plan(&Wanted { id: ID, generation: 5, content_mac: content, adopt }, &written, found)
    }

    fn apply(version: &str) -> Step {
        Step::Apply { resource_version: version.to_owned() }
    }

    #[test]
    fn only_what_is_not_as_it_shall_be_is_written() {
        assert_eq!(planned(false, b"old", None), Step::Create);
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "u", "7", Some(5)))), Step::Leave);
        // Rotated; edited by somebody; made anew by somebody who copied the labels; labels taken away.
        assert_eq!(planned(false, b"new", Some(&found(Some(ID), "u", "7", Some(4)))), apply("7"));
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "u", "8", Some(5)))), apply("8"));
        assert_eq!(planned(false, b"old", Some(&found(Some(ID), "v", "9", Some(5)))), apply("9"));
        assert_eq!(planned(false, b"old", Some(&found(None, "u", "8", None))), apply("8"));
    }

    #[test]
    fn what_is_not_ours_is_left_alone_unless_it_shall_be_adopted() {
        let other = Uuid::from_u128(2);
        for adopt in [false, true] {
            let stranger = planned(adopt, b"new", Some(&found(None, "v", "3", None)));
            assert_eq!(stranger, if adopt { apply("3") } else { Step::Conflict });
            let others = planned(adopt, b"new", Some(&found(Some(other), "v", "3", Some(1))));
            assert_eq!(others, if adopt { Step::ConflictUnlessGone(other) } else { Step::Conflict });
        }
    }

    #[test]
    fn no_older_generation_follows_a_newer_one() {
        let newer = found(Some(ID), "u", "8", Some(6));
        let superseded = Step::Superseded { by: 6, resource_version: "8".to_owned() };
        assert_eq!(planned(true, b"old", Some(&newer)), superseded);
    }

    #[test]
    fn waiting_grows_and_has_an_end() {
        let seconds: Vec<u64> = [0, 1, 2, 3, 9, 10, 1000].map(|attempts| backoff(attempts).as_secs()).into();
        assert_eq!(seconds, [1, 1, 2, 4, 256, 300, 300]);
    }
}
