//! Parameters of the list of registry accounts.

use std::collections::BTreeMap;

use utoipa::IntoParams;

use crate::{
    domain::{invalid::Invalid, listing::NamePart, names::Labels, verification::VerificationResult},
    http::query::{FromQuery, Query, text},
    storage::accounts::AccountFilter,
};

/// Filter of a list of registry accounts.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AccountFilterQuery {
    /// Lists only accounts with this label, `key=value`. May be repeated; all labels must match.
    #[param(value_type = Option<Vec<String>>, example = json!(["team=a"]))]
    label: Labels,
    /// Lists only accounts that expire within this time or have expired: days (`30d`) or hours
    /// (`12h`).
    #[param(value_type = Option<String>, rename = "expiresWithin", example = "30d")]
    expires_within_seconds: Option<i64>,
    /// Lists only accounts whose name contains this part, in any case.
    #[param(value_type = Option<String>, example = "team-a")]
    q: Option<NamePart>,
    /// Lists only accounts with this result of the last verification.
    result: Option<VerificationResult>,
}

impl FromQuery for AccountFilterQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let labels = query.all("label", text);
        let labels = query.errors().take("label", parse_labels(&labels)).unwrap_or_default();
        Self {
            label: labels,
            expires_within_seconds: query.one("expiresWithin", seconds),
            q: query.one("q", NamePart::parse),
            result: query.one("result", str::parse),
        }
    }
}

impl From<AccountFilterQuery> for AccountFilter {
    fn from(filter: AccountFilterQuery) -> Self {
        let AccountFilterQuery { label, expires_within_seconds, q, result } = filter;
        Self { labels: label, expires_within_seconds, name_part: q, result }
    }
}

/// Parts of the accounts of a list that are returned on request only, because they cost more.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AccountUsersQuery {
    /// Also returns the number of pull secrets that use each account.
    #[param(value_type = Option<bool>, rename = "usedBy", default = false)]
    pub(super) used_by: bool,
}

impl FromQuery for AccountUsersQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { used_by: query.flag("usedBy") }
    }
}

pub(in crate::http) fn parse_labels(labels: &[String]) -> Result<Labels, Invalid> {
    let mut parsed = BTreeMap::new();
    for label in labels {
        let (key, value) = label.split_once('=').ok_or_else(|| Invalid::new("must be key=value"))?;
        parsed.insert(key.to_owned(), value.to_owned());
    }
    Labels::parse(parsed)
}

pub(in crate::http) fn seconds(duration: &str) -> Result<i64, Invalid> {
    const MAX: i64 = 100_000;
    let invalid = || Invalid::new("must be a number of days or hours, such as 30d or 12h");
    let (number, unit) = match (duration.strip_suffix('d'), duration.strip_suffix('h')) {
        (Some(days), _) => (days, 86_400),
        (_, Some(hours)) => (hours, 3_600),
        _ => return Err(invalid()),
    };
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<i64>().ok().filter(|number| is_number && *number <= MAX);
    number.map(|number| number * unit).ok_or_else(invalid)
}
