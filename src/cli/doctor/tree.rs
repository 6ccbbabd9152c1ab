//! Diagnosis for a person, from the document of the API.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

/// A diagnosis as a tree: one mark and one line for each fact, then the verdict and its fix.
pub(super) struct Tree<'a> {
    title: &'a str,
    diagnosis: &'a Value,
}

impl<'a> Tree<'a> {
    pub(super) const fn of(title: &'a str, diagnosis: &'a Value) -> Self {
        Self { title, diagnosis }
    }
}

impl Display for Tree<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let diagnosis = self.diagnosis;
        writeln!(f, "{} {}", mark(diagnosis["ok"] == true), plain(self.title))?;
        write_pull_secrets(f, diagnosis)?;
        for image in items(&diagnosis["images"]) {
            write_image(f, image)?;
        }
        for problem in items(&diagnosis["problems"]) {
            // The pod works in spite of it.
            let mark = if problem["type"] == "invalidReference" { '?' } else { '✗' };
            writeln!(f, "  {mark} {}", text(&problem["sentence"]))?;
            write_fix(f, &problem["fix"])?;
        }
        for right in items(&diagnosis["missingRights"]) {
            let [verb, resource, effect] = ["verb", "resource", "effect"].map(|field| text(&right[field]));
            writeln!(f, "  ? may not {verb} {resource}: {effect}")?;
        }
        Ok(())
    }
}

fn write_pull_secrets(f: &mut Formatter<'_>, diagnosis: &Value) -> fmt::Result {
    match diagnosis["pullSecretsFrom"].as_str() {
        Some("pod") => writeln!(f, "  Pull secrets of the pod")?,
        Some("serviceAccount") => {
            writeln!(f, "  Pull secrets of the ServiceAccount {}", text(&diagnosis["serviceAccount"]))?;
        }
        _ => writeln!(f, "  No pull secrets, neither of the pod nor of its ServiceAccount")?,
    }
    for secret in items(&diagnosis["pullSecrets"]) {
        let problems = items(&secret["problems"]);
        let is_found = secret["state"] == "found";
        let state = match secret["state"].as_str() {
            Some("found") => items(&secret["keys"]).iter().map(text).collect::<Vec<_>>().join(", "),
            Some("missing") => "does not exist".to_owned(),
            Some("forbidden") => "may not be read".to_owned(),
            _ => "was not read".to_owned(),
        };
        writeln!(f, "    {} {}: {state}", mark(is_found && problems.is_empty()), text(&secret["name"]))?;
        for problem in problems {
            let key = problem["key"].as_str().map(|key| format!("{}: ", plain(key))).unwrap_or_default();
            writeln!(f, "      {key}{}", text(&problem["detail"]))?;
        }
        if let Some(owner) = secret["managedBy"]["pullSecret"].as_str() {
            let error = secret["managedBy"]["lastError"].as_str().map(|error| format!(", last error {}", plain(error)));
            let state = text(&secret["managedBy"]["state"]);
            writeln!(f, "      of the pull secret {} ({state}{})", plain(owner), error.unwrap_or_default())?;
        }
    }
    Ok(())
}

fn write_image(f: &mut Formatter<'_>, image: &Value) -> fmt::Result {
    let containers: Vec<String> = items(&image["containers"]).iter().map(|one| text(&one["name"])).collect();
    let name = image["image"].as_str().map_or_else(|| "invalid image reference".to_owned(), plain);
    let is_ok = image["verdict"] == "ok";
    writeln!(f, "  {} {name} ({})", mark(is_ok), containers.join(", "))?;
    for attempt in items(&image["attempts"]) {
        let entry = format!("{}, entry {}", text(&attempt["secret"]), text(&attempt["key"]));
        write_answer(f, &entry, &attempt["answer"], attempt["skipped"].as_str())?;
    }
    if image["anonymous"].is_object() {
        write_answer(f, "without a login", &image["anonymous"], None)?;
    }
    for near in items(&image["nearest"]) {
        let [secret, key, detail] = ["secret", "key", "detail"].map(|field| text(&near[field]));
        writeln!(f, "    ✗ {secret}, entry {key}: {detail}")?;
    }
    let collisions: Vec<String> = items(&image["collisions"]).iter().map(text).collect();
    if !collisions.is_empty() {
        writeln!(f, "    ? different logins for one key in {}", collisions.join(", "))?;
    }
    let reports: Vec<&str> = [&image["waiting"], &image["event"]].into_iter().filter_map(Value::as_str).collect();
    if !reports.is_empty() {
        writeln!(f, "    the kubelet reports: {}", plain(&reports.join(", ")))?;
    }
    writeln!(f, "    {}: {}", text(&image["verdict"]), text(&image["sentence"]))?;
    write_fix(f, &image["fix"])
}

fn write_answer(f: &mut Formatter<'_>, what: &str, answer: &Value, skipped: Option<&str>) -> fmt::Result {
    let Some(reason) = skipped else {
        let works = mark(answer["manifest"] == "found");
        return writeln!(f, "    {works} {what}: {}: {}", text(&answer["result"]), text(&answer["detail"]));
    };
    let reason = match reason {
        "earlierWorks" => "not needed, an earlier one works",
        "noLogin" => "has a login that cannot be sent",
        "wildcard" => "has a wildcard, so its login is not sent",
        "otherRegistry" => "is for another registry, so its login is not sent",
        "podFails" => "not tried, because a pull secret makes every pull fail",
        _ => "not tried, because a limit was reached",
    };
    writeln!(f, "    - {what}: {reason}")
}

fn write_fix(f: &mut Formatter<'_>, fix: &Value) -> fmt::Result {
    let Some(description) = fix["description"].as_str() else { return Ok(()) };
    let state = if fix["applied"] == true {
        " (applied)"
    } else if fix["applicable"] == true {
        " (regcred can do it: --apply)"
    } else {
        ""
    };
    writeln!(f, "    Fix: {}{state}", plain(description))?;
    for step in items(&fix["steps"]) {
        writeln!(f, "      {}", line_of(step))?;
    }
    Ok(())
}

/// A step as one line.
pub(super) fn line_of(step: &Value) -> String {
    if let Some(command) = step["command"].as_str() {
        return format!("$ {}", plain(command));
    }
    let headers = step["headers"].as_object().into_iter().flatten();
    let headers: Vec<String> = headers.map(|(name, value)| format!(" -H '{name}: {}'", text(value))).collect();
    let body = if step["body"].is_null() { String::new() } else { format!(" {}", step["body"]) };
    format!("{} {}{}{}", text(&step["method"]), text(&step["path"]), plain(&headers.concat()), plain(&body))
}

const fn mark(is_good: bool) -> char {
    if is_good { '✓' } else { '✗' }
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().map(plain).unwrap_or_default()
}

/// Replaces control characters, which a terminal could interpret.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tree_shows_each_fact_the_verdict_and_the_fix() {
        let diagnosis = json!({
            "ok": false, "pullSecretsFrom": "pod", "serviceAccount": "default",
            "pullSecrets": [
                {"name": "k", "state": "found", "keys": ["reg.io"], "problems": [], "managedBy": null},
                {"name": "gone", "state": "missing", "keys": [], "problems": [], "managedBy": null},
            ],
            "images": [{
                "image": "reg.io/app:1", "containers": [{"name": "web", "type": "container"}],
                "verdict": "credentialInvalid", "sentence": "rejected\u{1b}[2J",
                "attempts": [{"secret": "k", "key": "reg.io", "skipped": null,
                    "answer": {"result": "invalid", "detail": "no", "manifest": "unknown"}}],
                "anonymous": null, "nearest": [], "collisions": [], "waiting": "imagePullBackOff", "event": null,
                "fix": {"type": "replaceSecret", "description": "replace k", "applicable": false, "applied": false,
                    "steps": [{"type": "command", "command": "kubectl x"},
                        {"type": "request", "method": "PUT", "path": "/v1/x", "headers": {"If-None-Match": "*"},
                            "body": {"a": 1}}]},
            }],
            "problems": [], "missingRights": [{"verb": "list", "resource": "nodes", "effect": "less"}],
        });
        let expected = "✗ pod/web\n  Pull secrets of the pod\n    ✓ k: reg.io\n    ✗ gone: does not exist\n  \
                        ✗ reg.io/app:1 (web)\n    ✗ k, entry reg.io: invalid: no\n    \
                        the kubelet reports: imagePullBackOff\n    credentialInvalid: rejected\u{fffd}[2J\n    \
                        Fix: replace k\n      $ kubectl x\n      PUT /v1/x -H 'If-None-Match: *' {\"a\":1}\n  \
                        ? may not list nodes: less\n";
        assert_eq!(Tree::of("pod/web", &diagnosis).to_string(), expected);
    }
}
