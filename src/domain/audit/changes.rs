//! Old and new values of a changed resource.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

/// Maximum length of all values of an event together, in bytes of JSON. Beyond it, only the lengths
/// of the longest ones are recorded: no padding hides the short ones, such as servers.
const VALUES_MAX: usize = 64 * 1024;

/// Values of a resource that its events record, by JSON path. Never a secret: each caller of
/// [`with`](Self::with) names the fields one by one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RecordedFields(BTreeMap<String, Value>);

impl RecordedFields {
    /// Adds a field. An absent field has the value `null`.
    #[must_use]
    pub fn with(mut self, field: impl Into<String>, value: impl Into<Value>) -> Self {
        self.0.insert(field.into(), value.into());
        self
    }

    /// Adds each label as a field `labels.KEY`.
    #[must_use]
    pub fn with_labels(mut self, labels: &BTreeMap<String, String>) -> Self {
        let labels = labels.iter().map(|(key, value)| (format!("labels.{key}"), Value::from(value.as_str())));
        self.0.extend(labels);
        self
    }
}

/// Lists the fields whose values differ, in order of their names. Without a resource, such as the
/// one before a creation, all fields are absent.
pub(super) fn between(old: Option<&RecordedFields>, new: Option<&RecordedFields>) -> Vec<Value> {
    let value = |fields: Option<&RecordedFields>, field: &str| {
        fields.and_then(|fields| fields.0.get(field)).cloned().unwrap_or_default()
    };
    let fields: BTreeSet<&String> = [old, new].into_iter().flatten().flat_map(|fields| fields.0.keys()).collect();
    let values = fields.into_iter().map(|field| (field, value(old, field), value(new, field)));
    let differing: Vec<_> = values.filter(|(_, old, new)| old != new).collect();
    let mut lengths: Vec<usize> = differing.iter().flat_map(|(_, old, new)| [length(old), length(new)]).collect();
    lengths.sort_unstable();
    let mut total = 0;
    let too_long = lengths.into_iter().find(|length| {
        total += length;
        total > VALUES_MAX
    });
    let bounded = |value: Value| match length(&value) {
        length if too_long.is_some_and(|too_long| length >= too_long) => json!({"omittedBytes": length}),
        _ => value,
    };
    let changes = differing.into_iter();
    changes.map(|(field, old, new)| json!({"field": field, "old": bounded(old), "new": bounded(new)})).collect()
}

/// Length of a value as JSON.
fn length(value: &Value) -> usize {
    value.to_string().len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(pairs: &[(&str, &str)]) -> RecordedFields {
        pairs.iter().fold(RecordedFields::default(), |fields, (field, value)| fields.with(*field, *value))
    }

    #[test]
    fn only_differing_fields_are_listed_with_both_values() {
        let (old, new) = (fields(&[("a", "1"), ("b", "1"), ("c", "1")]), fields(&[("a", "1"), ("b", "2"), ("d", "1")]));
        let expected = [
            json!({"field": "b", "old": "1", "new": "2"}),
            json!({"field": "c", "old": "1", "new": null}),
            json!({"field": "d", "old": null, "new": "1"}),
        ];
        assert_eq!(between(Some(&old), Some(&new)), expected);
        assert_eq!(between(Some(&old), Some(&old)), [json!(null); 0]);
    }

    #[test]
    fn creation_and_deletion_list_every_field() {
        let one = fields(&[("a", "1")]).with("b", Value::Null);
        assert_eq!(between(None, Some(&one)), [json!({"field": "a", "old": null, "new": "1"})]);
        assert_eq!(between(Some(&one), None), [json!({"field": "a", "old": "1", "new": null})]);
    }

    #[test]
    fn each_label_is_a_field() {
        let labels = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
        let labelled = RecordedFields::default().with_labels(&labels);
        assert_eq!(between(None, Some(&labelled)), [json!({"field": "labels.team", "old": null, "new": "a"})]);
    }

    #[test]
    fn longest_values_are_recorded_by_their_length() {
        let half = "x".repeat(VALUES_MAX / 2);
        let new = fields(&[("a", &half), ("b", &half), ("server", "https://evil.example.com")]);
        let omitted = json!({"omittedBytes": half.len() + 2});
        let expected = [
            json!({"field": "a", "old": null, "new": omitted}),
            json!({"field": "b", "old": null, "new": omitted}),
            json!({"field": "server", "old": null, "new": "https://evil.example.com"}),
        ];
        assert_eq!(between(None, Some(&new)), expected);
        let fitting = fields(&[("a", &half), ("server", "https://evil.example.com")]);
        assert_eq!(between(None, Some(&fitting))[0]["new"], json!(half));
    }

    proptest! {
        #[test]
        fn values_of_an_event_are_bounded(lengths in proptest::collection::vec(0..40_000_usize, 0..20)) {
            let new = lengths.iter().enumerate().fold(RecordedFields::default(), |fields, (at, length)| {
                fields.with(format!("f{at}"), "x".repeat(*length))
            });
            let changes = between(None, Some(&new));
            prop_assert_eq!(changes.len(), lengths.len());
            let kept = changes.iter().filter(|change| change["new"].is_string());
            let kept: usize = kept.map(|change| length(&change["new"])).sum();
            prop_assert!(kept <= VALUES_MAX);
        }
    }
}
