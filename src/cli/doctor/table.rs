//! Coverage for a person, from the documents of the API.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

use super::tree::{line_of, plain};

/// Pull secrets that are printed of each list.
const SECRETS_SHOWN: usize = 20;

/// Lists without which a cluster seems to run nothing.
const NEEDED: [&str; 7] = ["pods", "deployments", "statefulsets", "daemonsets", "jobs", "cronjobs", "serviceaccounts"];

/// Whether there is no group although a list of objects with images was not read.
pub(super) fn is_unexamined(coverage: &Value) -> bool {
    let summary = &coverage["snapshot"]["summary"];
    let is_needed = |part: &Value| part["resource"].as_str().is_some_and(|resource| NEEDED.contains(&resource));
    summary["groups"] == 0 && items(&summary["missing"]).iter().any(is_needed)
}

/// A coverage as text: the summary, a table of groups, and lists of pull secrets.
pub(super) struct Report<'a>(&'a Value);

impl<'a> Report<'a> {
    pub(super) const fn of(coverage: &'a Value) -> Self {
        Self(coverage)
    }
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (snapshot, summary) = (&self.0["snapshot"], &self.0["snapshot"]["summary"]);
        let count = |field: &str| summary[field].as_i64().unwrap_or_default();
        let mark = if is_unexamined(self.0) {
            '?'
        } else if count("groups") == count("groupsOk") {
            '✓'
        } else {
            '✗'
        };
        writeln!(
            f,
            "{mark} cluster {} at {}: {} of {} of images can be pulled, of {} and {} in {}",
            text(&self.0["cluster"]),
            text(&snapshot["takenAt"]),
            count("groupsOk"),
            counted(&summary["groups"], "group"),
            counted(&summary["workloads"], "workload"),
            counted(&summary["pods"], "pod"),
            counted(&summary["namespaces"], "namespace")
        )?;
        write_changes(f, &snapshot["changes"])?;
        write_groups(f, items(&self.0["groups"]))?;
        write_secrets(f, "Pull secrets that nothing uses", items(&self.0["unusedSecrets"]))?;
        write_secrets(f, "Pull secrets that regcred could adopt", items(&self.0["adoptableSecrets"]))?;
        for part in items(&summary["missing"]) {
            let [verb, resource, effect] = ["verb", "resource", "effect"].map(|field| text(&part[field]));
            let right = if verb.is_empty() { resource } else { format!("may not {verb} {resource}") };
            writeln!(f, "? {right}: {effect}")?;
        }
        Ok(())
    }
}

/// Returns a number of things, such as `1 pod` and `2 pods`.
fn counted(number: &Value, noun: &str) -> String {
    let number = number.as_i64().unwrap_or_default();
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn write_changes(f: &mut Formatter<'_>, changes: &Value) -> fmt::Result {
    if changes.is_null() {
        return Ok(());
    }
    let count = |field: &str| changes[field].as_i64().unwrap_or_default();
    writeln!(
        f,
        "  since {}: {} broken, {} fixed, {} new, {} gone",
        text(&changes["comparedWith"]),
        count("broken"),
        count("fixed"),
        count("added"),
        count("removed")
    )
}

/// Writes a table whose columns are as wide as their cells.
fn write_groups(f: &mut Formatter<'_>, groups: &[Value]) -> fmt::Result {
    if groups.is_empty() {
        return Ok(());
    }
    let header = ["VERDICT", "NAMESPACE", "IMAGE", "USED BY", "PULL SECRETS", "FAILS AT"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(header).chain(groups.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 6] = std::array::from_fn(width);
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

fn row(group: &Value) -> [String; 6] {
    let users = items(&group["workloads"]).iter();
    let mut used_by: Vec<String> = users.map(|one| format!("{} {}", one["count"], text(&one["kind"]))).collect();
    if used_by.is_empty() {
        used_by.push(counted(&group["pods"], "pod"));
    }
    let image = group["repository"].as_str().map_or_else(|| "invalid image reference".to_owned(), plain);
    [
        text(&group["verdict"]),
        text(&group["namespace"]),
        image,
        used_by.join(", "),
        words(&group["pullSecrets"]),
        words(&group["failsAt"]),
    ]
}

fn write_secrets(f: &mut Formatter<'_>, title: &str, secrets: &[Value]) -> fmt::Result {
    if secrets.is_empty() {
        return Ok(());
    }
    writeln!(f, "{title}: {}", secrets.len())?;
    for secret in secrets.iter().take(SECRETS_SHOWN) {
        writeln!(f, "  {}/{}", text(&secret["namespace"]), text(&secret["name"]))?;
        for step in items(&secret["adoption"]["steps"]) {
            writeln!(f, "    {}", line_of(step))?;
        }
    }
    if secrets.len() > SECRETS_SHOWN {
        writeln!(f, "  and {} more: -o json lists all", secrets.len() - SECRETS_SHOWN)?;
    }
    Ok(())
}

fn words(list: &Value) -> String {
    let words: Vec<String> = items(list).iter().map(text).collect();
    if words.is_empty() { "-".to_owned() } else { words.join(",") }
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().map(plain).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case(0, "pods", true)]
    #[case(0, "cronjobs", true)]
    #[case(0, "serviceaccounts", true)]
    #[case(0, "nodes", false)]
    #[case(0, "secrets", false)]
    #[case(1, "pods", false)]
    fn cluster_without_a_list_of_pods_is_not_ok(#[case] groups: u32, #[case] resource: &str, #[case] expected: bool) {
        let missing = json!([{"verb": "list", "resource": resource, "effect": "unknown", "count": null}]);
        let summary = json!({"groups": groups, "groupsOk": groups, "missing": missing});
        let coverage = json!({"cluster": "dev", "snapshot": {"summary": summary}});
        assert_eq!(is_unexamined(&coverage), expected);
        let mark = if expected { '?' } else { '✓' };
        assert!(Report::of(&coverage).to_string().starts_with(mark), "{}", Report::of(&coverage));
    }

    #[test]
    fn report_has_the_summary_the_groups_and_the_pull_secrets() {
        let coverage = json!({
            "cluster": "dev",
            "snapshot": {
                "takenAt": "2027-01-01T00:00:00Z",
                "summary": {"groups": 3, "groupsOk": 1, "workloads": 4, "pods": 5, "namespaces": 2, "missing": [
                    {"verb": "list", "resource": "secrets", "effect": "unused ones are unknown"},
                ]},
                "changes": {"comparedWith": "2026-12-31T00:00:00Z", "broken": 1, "fixed": 0, "added": 2, "removed": 3},
            },
            "groups": [
                {"verdict": "noSecret", "namespace": "a", "repository": "reg.io/app", "pods": 2, "pullSecrets": [],
                    "workloads": [{"kind": "deployment", "count": 1}, {"kind": "pod", "count": 2}],
                    "failsAt": ["newNode", "restart"]},
                {"verdict": "unknown", "namespace": "bb", "repository": null, "pods": 1, "pullSecrets": ["k\u{1b}", "l"],
                    "workloads": [], "failsAt": []},
            ],
            "unusedSecrets": [{"namespace": "a", "name": "old", "adoption": null}],
            "adoptableSecrets": [{"namespace": "a", "name": "k", "adoption": {"steps": [{"command": "kubectl x"}]}}],
        });
        let expected = "\
✗ cluster dev at 2027-01-01T00:00:00Z: 1 of 3 groups of images can be pulled, of 4 workloads and 5 pods in 2 namespaces
  since 2026-12-31T00:00:00Z: 1 broken, 0 fixed, 2 new, 3 gone
VERDICT   NAMESPACE  IMAGE                    USED BY              PULL SECRETS  FAILS AT
noSecret  a          reg.io/app               1 deployment, 2 pod  -             newNode,restart
unknown   bb         invalid image reference  1 pod                k\u{fffd},l          -
Pull secrets that nothing uses: 1
  a/old
Pull secrets that regcred could adopt: 1
  a/k
    $ kubectl x
? may not list secrets: unused ones are unknown
";
        assert_eq!(Report::of(&coverage).to_string(), expected);
    }
}
