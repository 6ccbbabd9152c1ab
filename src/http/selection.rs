//! Which accounts a request means: by name, or by a label selector.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::{
    domain::{
        invalid::FieldErrors,
        names::Labels,
        selector::{LabelSelector, Requirement},
        unique::UniqueMap,
    },
    service::docker_configs::AccountChoice,
};

/// A label selector, with the meaning that Kubernetes gives it. An empty one selects everything.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelectorInput {
    /// Labels that must be there with these values.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    match_labels: UniqueMap<String>,
    /// Requirements that must hold.
    #[serde(default)]
    match_expressions: Vec<RequirementInput>,
}

/// One requirement of a label selector.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequirementInput {
    /// Key of the label.
    key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    operator: String,
    /// Values, for `In` and `NotIn`.
    #[serde(default)]
    values: Vec<String>,
}

/// Parses a selector; what is refused is named below `field`.
pub fn selector(errors: &mut FieldErrors, field: &str, input: LabelSelectorInput) -> Option<LabelSelector> {
    let labels = errors.take(&format!("{field}.matchLabels"), Labels::parse(input.match_labels.0));
    let expressions = input.match_expressions.into_iter().enumerate().map(|(index, one)| {
        let parsed = Requirement::parse(&one.key, &one.operator, one.values);
        errors.take(&format!("{field}.matchExpressions[{index}]"), parsed)
    });
    // All of them first, so that every refused one is named.
    let expressions: Vec<Option<Requirement>> = expressions.collect();
    let expressions: Option<Vec<Requirement>> = expressions.into_iter().collect();
    errors.take(field, LabelSelector::new(labels?, expressions?))
}

/// Exactly one of `accounts` and `accountSelector`.
pub fn choice(
    errors: &mut FieldErrors,
    accounts: Option<Vec<String>>,
    account_selector: Option<LabelSelectorInput>,
) -> Option<AccountChoice> {
    match (accounts, account_selector) {
        (Some(names), None) => Some(AccountChoice::Names(names)),
        (None, Some(input)) => selector(errors, "accountSelector", input).map(AccountChoice::Selector),
        (Some(_), Some(_)) => {
            errors.refuse("accountSelector", "must not stand beside `accounts`");
            None
        }
        (None, None) => {
            errors.refuse("accounts", "is missing; name accounts, or give an `accountSelector`");
            None
        }
    }
}
