//! Grants: the accounts, clusters and namespaces that a caller can access.
//!
//! A resource that is not granted behaves as if it did not exist.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{
    caller::Role,
    invalid::{FieldError, FieldErrors, Invalid},
    names::{Labels, Name},
    unique,
};

/// Maximum number of rules per kind of resource.
const RULES_MAX: usize = 100;

/// Exact name, or a prefix followed by `*` (`team-a-*`). `*` alone matches every name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// Matches one name.
    Exact(Name),
    /// Matches every name with the prefix.
    Prefix(String),
}

impl NamePattern {
    /// Parses a pattern.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if no valid name can match.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let Some(prefix) = text.strip_suffix('*') else { return Name::parse(text).map(Self::Exact) };
        // A prefix is valid if some name starts with it.
        match Name::parse(&format!("{prefix}0")) {
            Ok(_) => Ok(Self::Prefix(prefix.to_owned())),
            Err(_) => Err(Invalid::new("must be a name, or a prefix of one followed by `*`")),
        }
    }

    /// Whether the pattern matches `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => exact.as_str() == name,
            Self::Prefix(prefix) => name.starts_with(prefix),
        }
    }

    fn is_everything(&self) -> bool {
        matches!(self, Self::Prefix(prefix) if prefix.is_empty())
    }

    /// Returns the half-open range of names, in byte order, that the pattern matches.
    ///
    /// Names consist of `-`, digits and lower-case letters: `!` sorts before all of these and `~`
    /// after.
    #[must_use]
    pub fn range(&self) -> (String, String) {
        match self {
            Self::Exact(name) => (name.to_string(), format!("{name}!")),
            Self::Prefix(prefix) => (prefix.clone(), format!("{prefix}~")),
        }
    }
}

impl std::fmt::Display for NamePattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(name) => write!(f, "{name}"),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
        }
    }
}

/// Rule that grants accounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountRule {
    /// Accounts whose name matches.
    Names(NamePattern),
    /// Accounts with all of these labels. Never empty.
    Labels(Labels),
}

impl std::fmt::Display for AccountRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Names(pattern) => write!(f, "{pattern}"),
            Self::Labels(labels) => {
                let pairs = labels.as_map().iter().map(|(key, value)| format!("{key}={value}"));
                write!(f, "{{{}}}", pairs.collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Half-open ranges of names in byte order, as two columns for SQL's `unnest`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Inclusive lower bounds.
    pub low: Vec<String>,
    /// Exclusive upper bounds.
    pub high: Vec<String>,
}

impl Ranges {
    /// Restricts the ranges to names after `name`.
    #[must_use]
    pub fn after(self, name: Option<&str>) -> Self {
        let Some(name) = name else { return self };
        let first = format!("{name}!");
        let rest = self.low.into_iter().zip(self.high).map(|(low, high)| (low.max(first.clone()), high));
        let (low, high) = rest.filter(|(low, high)| low < high).unzip();
        Self { low, high }
    }
}

impl<'a> FromIterator<&'a NamePattern> for Ranges {
    fn from_iter<I: IntoIterator<Item = &'a NamePattern>>(patterns: I) -> Self {
        let (low, high) = patterns.into_iter().map(NamePattern::range).unzip();
        Self { low, high }
    }
}

/// Resources that a caller can access. A resource that no rule matches is not granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grants {
    /// Rules for registry accounts.
    pub accounts: Vec<AccountRule>,
    /// Rules for clusters.
    pub clusters: Vec<NamePattern>,
    /// Rules for namespaces, the same in every granted cluster.
    pub namespaces: Vec<NamePattern>,
}

impl Grants {
    /// Grants of every resource. Background work uses them: the grants were enforced when the
    /// caller declared the work.
    #[must_use]
    pub fn everything() -> Self {
        let all = || NamePattern::Prefix(String::new());
        Self { accounts: vec![AccountRule::Names(all())], clusters: vec![all()], namespaces: vec![all()] }
    }

    /// Whether the grants include every resource, including future ones.
    #[must_use]
    pub fn include_everything(&self) -> bool {
        self.include_accounts_with(&BTreeMap::new()) && self.include_all_clusters() && self.include_all_namespaces()
    }

    /// Whether the grants include every account with these labels, regardless of its name.
    #[must_use]
    pub fn include_accounts_with(&self, labels: &BTreeMap<String, String>) -> bool {
        self.accounts.iter().any(|rule| match rule {
            AccountRule::Names(pattern) => pattern.is_everything(),
            AccountRule::Labels(required) => contains_all(labels, required.as_map()),
        })
    }

    /// Whether the grants include every namespace, including future ones.
    #[must_use]
    pub fn include_all_namespaces(&self) -> bool {
        self.namespaces.iter().any(NamePattern::is_everything)
    }

    /// Whether the grants include an account with this name and these labels.
    #[must_use]
    pub fn include_account(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.accounts.iter().any(|rule| match rule {
            AccountRule::Names(pattern) => pattern.matches(name),
            AccountRule::Labels(required) => contains_all(labels, required.as_map()),
        })
    }

    /// Returns the keys of the added or changed labels of an account that the grants do not allow.
    ///
    /// A label decides which selectors and which label rules of other callers match the account. So
    /// it must belong to a label rule whose labels the account has completely afterwards. Grants of
    /// all accounts allow every label.
    #[must_use]
    pub fn refused_labels<'a>(
        &self,
        before: &BTreeMap<String, String>,
        after: &'a BTreeMap<String, String>,
    ) -> Vec<&'a str> {
        if self.include_accounts_with(&BTreeMap::new()) {
            return Vec::new();
        }
        let satisfied: Vec<_> = self.account_labels().into_iter().filter(|rule| contains_all(after, rule)).collect();
        let is_allowed = |key: &String| satisfied.iter().any(|rule| rule.contains_key(key));
        let set = after.iter().filter(|(key, value)| before.get(*key) != Some(value));
        set.map(|(key, _)| key).filter(|key| !is_allowed(key)).map(String::as_str).collect()
    }

    /// Whether the grants include every cluster, including future ones.
    #[must_use]
    pub fn include_all_clusters(&self) -> bool {
        self.clusters.iter().any(NamePattern::is_everything)
    }

    /// Whether the grants include the cluster.
    #[must_use]
    pub fn include_cluster(&self, name: &str) -> bool {
        self.clusters.iter().any(|pattern| pattern.matches(name))
    }

    /// Whether the grants include the namespace.
    #[must_use]
    pub fn include_namespace(&self, name: &str) -> bool {
        self.namespaces.iter().any(|pattern| pattern.matches(name))
    }

    /// Returns the ranges of account names that are granted.
    #[must_use]
    pub fn account_ranges(&self) -> Ranges {
        self.accounts.iter().filter_map(AccountRule::as_names).collect()
    }

    /// Returns the label sets that are granted.
    #[must_use]
    pub fn account_labels(&self) -> Vec<&BTreeMap<String, String>> {
        self.accounts.iter().filter_map(AccountRule::as_labels).collect()
    }

    /// Returns the ranges of cluster names that are granted.
    #[must_use]
    pub fn cluster_ranges(&self) -> Ranges {
        self.clusters.iter().collect()
    }

    /// Returns the ranges of namespace names that are granted.
    #[must_use]
    pub fn namespace_ranges(&self) -> Ranges {
        self.namespaces.iter().collect()
    }

    /// Parses the grants of a new key or rule.
    ///
    /// A role that is granted everything by default must list all kinds or none. An omitted kind
    /// would otherwise mean "all" beside a kind that is restricted.
    ///
    /// # Errors
    ///
    /// Every omitted kind and every invalid rule, with its JSON path below `grants`.
    pub fn parse_new(role: Role, document: GrantsDocument) -> Result<Self, Vec<FieldError>> {
        let given = [
            ("grants.accounts", document.accounts.is_some()),
            ("grants.clusters", document.clusters.is_some()),
            ("grants.namespaces", document.namespaces.is_some()),
        ];
        let mut errors = FieldErrors::default();
        if role.takes_grants() && role.grants_all_by_default() && given.iter().any(|(_, is_given)| *is_given) {
            for (field, _) in given.iter().filter(|(_, is_given)| !is_given) {
                errors.refuse(field, "is required beside other grants: say [\"*\"] for all");
            }
        }
        let grants = errors.take_all(Self::parse(role, document));
        errors.finish(|| grants)
    }

    /// Parses stored grants. [`Role::grants_all_by_default`] decides the meaning of an omitted kind.
    ///
    /// # Errors
    ///
    /// Every invalid rule, with its JSON path below `grants`.
    pub fn parse(role: Role, document: GrantsDocument) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let default_rule = || role.grants_all_by_default().then(|| NamePattern::Prefix(String::new()));
        let accounts = match document.accounts {
            Some(rules) => list(&mut errors, "accounts", rules, AccountGrant::parse),
            None => Some(default_rule().map(AccountRule::Names).into_iter().collect()),
        };
        let mut names = |kind: &str, patterns: Option<Vec<String>>| match patterns {
            Some(patterns) => list(&mut errors, kind, patterns, |text| NamePattern::parse(&text)),
            None => Some(default_rule().into_iter().collect()),
        };
        let clusters = names("clusters", document.clusters);
        let namespaces = names("namespaces", document.namespaces);
        errors.finish(|| Some(Self { accounts: accounts?, clusters: clusters?, namespaces: namespaces? }))
    }
}

fn contains_all(labels: &BTreeMap<String, String>, required: &BTreeMap<String, String>) -> bool {
    required.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl AccountRule {
    fn as_names(&self) -> Option<&NamePattern> {
        match self {
            Self::Names(pattern) => Some(pattern),
            Self::Labels(_) => None,
        }
    }

    fn as_labels(&self) -> Option<&BTreeMap<String, String>> {
        match self {
            Self::Names(_) => None,
            Self::Labels(labels) => Some(labels.as_map()),
        }
    }
}

/// Parses every rule of one kind.
fn list<I, T>(
    errors: &mut FieldErrors,
    kind: &str,
    rules: Vec<I>,
    parse: impl Fn(I) -> Result<T, Invalid>,
) -> Option<Vec<T>> {
    if rules.len() > RULES_MAX {
        errors.refuse(&format!("grants.{kind}"), "must be at most 100 rules");
        return None;
    }
    let parsed = rules.into_iter().enumerate();
    // Parse every rule before returning, to report all errors.
    let parsed: Vec<Option<T>> =
        parsed.map(|(index, rule)| errors.take(&format!("grants.{kind}[{index}]"), parse(rule))).collect();
    parsed.into_iter().collect()
}

/// Resources that an API key or rule can access.
///
/// Names are exact, or a prefix followed by `*`; `*` alone matches everything. An omitted kind
/// grants everything to an operator or viewer, and nothing to a deliverer or renderer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = Grants)]
pub struct GrantsDocument {
    /// Rules for registry accounts: by name or by labels.
    pub accounts: Option<Vec<AccountGrant>>,
    /// Rules for clusters.
    #[schema(example = json!(["dev"]))]
    pub clusters: Option<Vec<String>>,
    /// Rules for namespaces, the same in every granted cluster.
    #[schema(example = json!(["a-*"]))]
    pub namespaces: Option<Vec<String>>,
}

/// Rule that grants registry accounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "not a rule, expected a name, a prefix followed by `*`, or an object with `matchLabels`")]
pub enum AccountGrant {
    /// Exact name, or a prefix followed by `*`.
    #[schema(example = "team-a-*")]
    Names(String),
    /// Accounts with these labels.
    Labels(LabelGrant),
}

/// Grant of the accounts that have all of these labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelGrant {
    /// Required labels; at least one.
    #[serde(deserialize_with = "unique::map")]
    pub match_labels: BTreeMap<String, String>,
}

impl AccountGrant {
    fn parse(self) -> Result<AccountRule, Invalid> {
        match self {
            Self::Names(text) => NamePattern::parse(&text).map(AccountRule::Names),
            Self::Labels(LabelGrant { match_labels }) if match_labels.is_empty() => {
                Err(Invalid::new("must have at least one label; use `*` to grant all accounts"))
            }
            Self::Labels(LabelGrant { match_labels }) => Labels::parse(match_labels).map(AccountRule::Labels),
        }
    }
}

impl From<&Grants> for GrantsDocument {
    fn from(grants: &Grants) -> Self {
        let texts = |patterns: &[NamePattern]| Some(patterns.iter().map(ToString::to_string).collect());
        let account = |rule: &AccountRule| match rule {
            AccountRule::Names(pattern) => AccountGrant::Names(pattern.to_string()),
            AccountRule::Labels(labels) => AccountGrant::Labels(LabelGrant { match_labels: labels.as_map().clone() }),
        };
        Self {
            accounts: Some(grants.accounts.iter().map(account).collect()),
            clusters: texts(&grants.clusters),
            namespaces: texts(&grants.namespaces),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn document(json: &str) -> GrantsDocument {
        serde_json::from_str(json).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[rstest]
    #[case("team-5000", "team-5000", true)]
    #[case("team-5000", "team-50000", false)]
    #[case("team-*", "team-5000", true)]
    #[case("team-*", "team", false)]
    #[case("team*", "team", true)]
    #[case("*", "anything", true)]
    fn pattern_matches_exact_names_and_prefixes(#[case] pattern: &str, #[case] name: &str, #[case] expected: bool) {
        let parsed = NamePattern::parse(pattern).unwrap();
        assert_eq!(parsed.matches(name), expected);
        assert_eq!(parsed.to_string(), pattern);
    }

    #[rstest]
    #[case("")]
    #[case("**")]
    #[case("a*b")]
    #[case("-a*")]
    #[case("A*")]
    #[case("a_*")]
    #[case("a.*")]
    #[case("%")]
    fn other_wildcards_are_rejected(#[case] pattern: &str) {
        assert!(NamePattern::parse(pattern).is_err());
    }

    proptest! {
        #[test]
        fn range_contains_exactly_the_matching_names(
            pattern in "[a-c-]{0,3}\\*?", name in "[a-c]([a-c0-]{0,4}[a-c])?", after in "[a-c]([a-c0-]{0,2}[a-c])?",
        ) {
            if let Ok(pattern) = NamePattern::parse(&pattern) {
                let (low, high) = pattern.range();
                prop_assert_eq!(pattern.matches(&name), low <= name && name < high);
                let rest = Ranges { low: vec![low], high: vec![high] }.after(Some(&after));
                let is_in_rest = rest.low.iter().zip(&rest.high).any(|(low, high)| *low <= name && name < *high);
                prop_assert_eq!(pattern.matches(&name) && name > after, is_in_rest);
            }
        }
    }

    #[rstest]
    #[case(Role::Operator, true)]
    #[case(Role::Viewer, true)]
    #[case(Role::Admin, true)]
    #[case(Role::Deliverer, false)]
    #[case(Role::Renderer, false)]
    fn omitted_kind_grants_everything_or_nothing_by_role(#[case] role: Role, #[case] everything: bool) {
        let grants = Grants::parse(role, document("{}")).unwrap();
        assert_eq!(grants.include_account("a", &labels(&[])), everything);
        assert_eq!(grants.include_cluster("a"), everything);
        assert_eq!(grants.include_namespace("a"), everything);
        let partly = Grants::parse(role, document(r#"{"accounts":["a"],"clusters":[]}"#)).unwrap();
        assert!(partly.include_account("a", &labels(&[])) && !partly.include_account("b", &labels(&[])));
        assert!(!partly.include_cluster("a"));
        assert_eq!(partly.include_namespace("a"), everything);
    }

    #[test]
    fn label_rule_requires_all_of_its_labels() {
        let by_labels = document(r#"{"accounts":[{"matchLabels":{"team":"a","tier":"1"}}]}"#);
        let grants = Grants::parse(Role::Renderer, by_labels).unwrap();
        assert!(grants.include_account("x", &labels(&[("team", "a"), ("tier", "1"), ("other", "")])));
        assert!(!grants.include_account("x", &labels(&[("team", "a")])));
        assert!(!grants.include_account("x", &labels(&[("team", "b"), ("tier", "1")])));
    }

    #[rstest]
    #[case(r#"["x-*"]"#, &[], &[("team", "b")], &["team"])]
    #[case(r#"["x-*"]"#, &[("team", "b")], &[("team", "b")], &[])]
    #[case(r#"["x-*"]"#, &[("team", "b")], &[], &[])]
    #[case(r#"["x-*"]"#, &[("team", "a")], &[("team", "b")], &["team"])]
    #[case(r#"["*"]"#, &[], &[("team", "b")], &[])]
    #[case(r#"[{"matchLabels":{"team":"a"}}]"#, &[], &[("team", "a"), ("tier", "1")], &["tier"])]
    #[case(r#"[{"matchLabels":{"team":"a"}}]"#, &[("tier", "1")], &[("team", "a"), ("tier", "1")], &[])]
    #[case(r#"["x-*",{"matchLabels":{"team":"b","tier":"1"}}]"#, &[], &[("team", "b")], &["team"])]
    #[case(r#"["x-*",{"matchLabels":{"team":"b","tier":"1"}}]"#, &[("tier", "1")], &[("team", "b"), ("tier", "1")], &[])]
    fn changed_label_must_belong_to_a_satisfied_label_rule(
        #[case] accounts: &str,
        #[case] before: &[(&str, &str)],
        #[case] after: &[(&str, &str)],
        #[case] refused: &[&str],
    ) {
        let grants = Grants::parse(Role::Operator, document(&format!(r#"{{"accounts":{accounts}}}"#))).unwrap();
        assert_eq!(grants.refused_labels(&labels(before), &labels(after)), refused);
    }

    #[test]
    fn grants_round_trip_through_json() {
        let text = r#"{"accounts":["a-*",{"matchLabels":{"team":"a"}}],"clusters":["dev"],"namespaces":[]}"#;
        let grants = Grants::parse(Role::Deliverer, document(text)).unwrap();
        assert_eq!(serde_json::to_string(&GrantsDocument::from(&grants)).unwrap(), text);
    }

    #[test]
    fn every_invalid_rule_is_reported() {
        let bad = document(r#"{"accounts":["a","A",{"matchLabels":{}}],"clusters":["a*b"],"namespaces":["*x"]}"#);
        let errors = Grants::parse(Role::Deliverer, bad).unwrap_err();
        let fields: Vec<&str> = errors.iter().map(|error| error.field.as_str()).collect();
        assert_eq!(fields, ["grants.accounts[1]", "grants.accounts[2]", "grants.clusters[0]", "grants.namespaces[0]"]);
        let many = GrantsDocument { clusters: Some(vec!["a".to_owned(); 101]), ..GrantsDocument::default() };
        assert_eq!(Grants::parse(Role::Viewer, many).unwrap_err()[0].field, "grants.clusters");
    }
}
