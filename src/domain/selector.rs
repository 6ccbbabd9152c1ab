//! Label selectors, with the meaning that Kubernetes gives them (`k8s.io/apimachinery/pkg/labels/selector.go`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{
    invalid::{FieldErrors, Invalid},
    names::{Labels, label_key, label_value},
    unique,
};

/// The most requirements of one selector.
const REQUIREMENTS_MAX: usize = 64;

/// Selects by labels: all requirements must hold. An empty selector selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    match_labels: Labels,
    expressions: Vec<Requirement>,
}

/// One of a selector's `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    key: String,
    operator: Operator,
}

/// How a requirement looks at a label.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    /// Holds for whoever lacks the label, too.
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
    /// Puts a selector together.
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

    /// The labels that must be there with these values, for an index to look up.
    #[must_use]
    pub fn match_labels(&self) -> &Labels {
        &self.match_labels
    }

    /// Whether something with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.match_labels.as_map().iter().all(has) && self.expressions.iter().all(|one| one.holds(labels))
    }
}

/// A label selector as it stands in a declaration: in requests, answers and the database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = LabelSelector)]
pub struct LabelSelectorDocument {
    /// Labels that must be there with these values.
    #[serde(default, deserialize_with = "unique::map")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements that must hold.
    #[serde(default)]
    pub match_expressions: Vec<RequirementDocument>,
}

/// One requirement of a label selector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = LabelRequirement)]
pub struct RequirementDocument {
    /// Key of the label.
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: String,
    /// Values, for `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

impl LabelSelectorDocument {
    /// Parses it; what is refused is named below `field`.
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
    fn requirements_mean_what_they_do_in_kubernetes(
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
    fn all_requirements_must_hold_and_none_selects_everything() {
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
    fn bad_requirements_are_refused(#[case] key: &str, #[case] operator: &str, #[case] values: &[&str]) {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        assert!(Requirement::parse(key, operator, values).is_err());
    }
}
