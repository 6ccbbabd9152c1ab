//! Label selectors with the semantics of Kubernetes, and the selection of accounts by name or by
//! label.
//!
//! Source of the semantics: `k8s.io/apimachinery/pkg/labels/selector.go`.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{
    invalid::{FieldErrors, Invalid},
    names::{Labels, Name, label_key, label_value},
    unique,
};

/// Maximum number of requirements in one selector.
const REQUIREMENTS_MAX: usize = 64;

/// Selects objects by label. All requirements must hold; an empty selector selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    match_labels: Labels,
    expressions: Vec<Requirement>,
}

/// One of the `matchExpressions` of a selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    key: String,
    operator: Operator,
}

/// Relation between a label and the values of a requirement.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    /// Also holds for an object without the label.
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

impl Requirement {
    /// Parses one requirement.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the key, the operator or the values break a rule.
    pub fn parse(key: &str, operator: &str, values: Vec<String>) -> Result<Self, Invalid> {
        label_key(key)?;
        values.iter().try_for_each(|value| label_value(value))?;
        let operator = match (operator, values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn", true) => return Err(Invalid::new("needs at least one value for this operator")),
            ("Exists" | "DoesNotExist", false) => return Err(Invalid::new("takes no values with this operator")),
            _ => return Err(Invalid::new("must have the operator In, NotIn, Exists or DoesNotExist")),
        };
        Ok(Self { key: key.to_owned(), operator })
    }

    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl LabelSelector {
    /// Creates a selector.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if there are too many requirements.
    pub fn new(match_labels: Labels, expressions: Vec<Requirement>) -> Result<Self, Invalid> {
        if expressions.len() > REQUIREMENTS_MAX {
            return Err(Invalid::new("must have at most 64 matchExpressions"));
        }
        Ok(Self { match_labels, expressions })
    }

    /// Labels that an object must have, for an index lookup.
    #[must_use]
    pub fn match_labels(&self) -> &Labels {
        &self.match_labels
    }

    /// Whether an object with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.match_labels.as_map().iter().all(has) && self.expressions.iter().all(|one| one.holds(labels))
    }
}

/// A label selector, with the semantics of Kubernetes. An empty selector selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = LabelSelector)]
pub struct LabelSelectorDocument {
    /// Labels that an object must have.
    #[serde(default, deserialize_with = "unique::map")]
    pub match_labels: BTreeMap<String, String>,
    /// Further requirements, all of which must hold.
    #[serde(default)]
    pub match_expressions: Vec<RequirementDocument>,
}

/// One requirement of a label selector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = LabelRequirement)]
pub struct RequirementDocument {
    /// Label key.
    pub key: String,
    /// Relation of the label to `values`.
    #[schema(value_type = LabelOperator)]
    pub operator: String,
    /// Values, for `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// Relation of a label to the values of a [`RequirementDocument`].
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
enum LabelOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelectorDocument {
    /// Parses the selector. Errors name fields below `field`.
    pub fn parse(self, errors: &mut FieldErrors, field: &str) -> Option<LabelSelector> {
        let labels = errors.take(&format!("{field}.matchLabels"), Labels::parse(self.match_labels));
        let expressions: Vec<Option<Requirement>> = self
            .match_expressions
            .into_iter()
            .enumerate()
            .map(|(index, one)| {
                let parsed = Requirement::parse(&one.key, &one.operator, one.values);
                errors.take(&format!("{field}.matchExpressions[{index}]"), parsed)
            })
            .collect();
        let expressions: Option<Vec<Requirement>> = expressions.into_iter().collect();
        errors.take(field, LabelSelector::new(labels?, expressions?))
    }
}

impl From<&LabelSelector> for LabelSelectorDocument {
    fn from(selector: &LabelSelector) -> Self {
        let match_expressions = selector.expressions.iter().map(|one| {
            let (operator, values) = match &one.operator {
                Operator::In(values) => ("In", values.clone()),
                Operator::NotIn(values) => ("NotIn", values.clone()),
                Operator::Exists => ("Exists", Vec::new()),
                Operator::DoesNotExist => ("DoesNotExist", Vec::new()),
            };
            RequirementDocument { key: one.key.clone(), operator: operator.to_owned(), values }
        });
        Self { match_labels: selector.match_labels.as_map().clone(), match_expressions: match_expressions.collect() }
    }
}

/// Accounts, named or selected by label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountSelection {
    /// Accounts with these names, in this order.
    Names(Vec<Name>),
    /// All accounts that a selector matches, including future ones.
    Selector(LabelSelector),
}

impl AccountSelection {
    /// Maximum number of accounts in one docker config.
    pub const MAX: usize = 1_000;

    /// Parses the fields `accounts` and `accountSelector` of a request, exactly one of which must
    /// be set.
    pub fn parse(
        errors: &mut FieldErrors,
        names: Option<Vec<String>>,
        selector: Option<LabelSelectorDocument>,
    ) -> Option<Self> {
        match (names, selector) {
            (Some(names), None) => parse_names(errors, &names).map(Self::Names),
            (None, Some(selector)) => selector.parse(errors, "accountSelector").map(Self::Selector),
            (Some(_), Some(_)) => {
                errors.refuse("accountSelector", "cannot be combined with `accounts`; remove one of them");
                None
            }
            (None, None) => {
                errors.refuse("accounts", "is missing; name accounts, or give an `accountSelector`");
                None
            }
        }
    }
}

fn parse_names(errors: &mut FieldErrors, names: &[String]) -> Option<Vec<Name>> {
    if names.is_empty() || names.len() > AccountSelection::MAX {
        errors.refuse("accounts", "must name 1 to 1000 accounts");
        return None;
    }
    let mut seen = HashMap::with_capacity(names.len());
    let parsed: Vec<Option<Name>> = names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let field = || format!("accounts[{index}]");
            if let Some(first) = seen.insert(name, index) {
                errors.refuse(&field(), format!("is the same account as accounts[{first}]"));
            }
            Name::parse(name).map_err(|invalid| errors.refuse(&field(), invalid)).ok()
        })
        .collect();
    parsed.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[rstest]
    #[case("In", &["a", "b"], true, false, false)]
    #[case("NotIn", &["a", "b"], false, true, true)]
    #[case("Exists", &[], true, true, false)]
    #[case("DoesNotExist", &[], false, false, true)]
    fn requirements_have_the_semantics_of_kubernetes(
        #[case] operator: &str,
        #[case] values: &[&str],
        #[case] team_a: bool,
        #[case] team_c: bool,
        #[case] no_team: bool,
    ) {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        let requirement = Requirement::parse("team", operator, values).unwrap();
        let selector = LabelSelector::new(Labels::default(), vec![requirement]).unwrap();
        assert_eq!(selector.matches(&labels(&[("team", "a")])), team_a);
        assert_eq!(selector.matches(&labels(&[("team", "c")])), team_c);
        assert_eq!(selector.matches(&labels(&[("other", "a")])), no_team);
    }

    #[test]
    fn all_requirements_must_hold_and_an_empty_selector_selects_everything() {
        let match_labels = Labels::parse(labels(&[("team", "a")])).unwrap();
        let expressions = vec![Requirement::parse("tier", "Exists", Vec::new()).unwrap()];
        let selector = LabelSelector::new(match_labels, expressions).unwrap();
        assert!(selector.matches(&labels(&[("team", "a"), ("tier", "")])));
        assert!(!selector.matches(&labels(&[("team", "a")])));
        assert!(!selector.matches(&labels(&[("team", "b"), ("tier", "")])));
        assert!(LabelSelector::default().matches(&labels(&[])));
    }

    #[rstest]
    #[case("team", "in", &["a"])]
    #[case("team", "In", &[])]
    #[case("team", "Exists", &["a"])]
    #[case("te am", "Exists", &[])]
    #[case("team", "In", &["a b"])]
    fn invalid_requirements_are_refused(#[case] key: &str, #[case] operator: &str, #[case] values: &[&str]) {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        assert!(Requirement::parse(key, operator, values).is_err());
    }
}
