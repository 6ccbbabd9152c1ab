//! Diagnosis for a person, from the document of the API.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

/// A diagnosis as a tree: one mark and one line for each fact, then the verdict and its fix.
pub(super) struct Tree<'a> {
    title: &'a str,
    /// What has the list of pull secrets: the pod, or the template of a workload.
    holder: &'static str,
    diagnosis: &'a Value,
}

impl<'a> Tree<'a> {
    pub(super) const fn of_pod(title: &'a str, diagnosis: &'a Value) -> Self {
        Self { title, holder: "pod", diagnosis }
    }

    pub(super) const fn of_workload(title: &'a str, diagnosis: &'a Value) -> Self {
        Self { title, holder: "pod template", diagnosis }
    }
}

impl Display for Tree<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let diagnosis = self.diagnosis;
        writeln!(f, "{} {}", mark(diagnosis["ok"] == true), plain(self.title))?;
        write_pull_secrets(f, self.holder, diagnosis)?;
        for image in items(&diagnosis["images"]) {
            write_image(f, image, items(&diagnosis["pullSecrets"]))?;
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

fn write_pull_secrets(f: &mut Formatter<'_>, holder: &str, diagnosis: &Value) -> fmt::Result {
    match diagnosis["pullSecretsFrom"].as_str() {
        Some("pod") => writeln!(f, "  Pull secrets of the {holder}")?,
        Some("serviceAccount") => {
            writeln!(f, "  Pull secrets of the ServiceAccount {}", text(&diagnosis["serviceAccount"]))?;
        }
        _ => writeln!(f, "  No pull secrets, neither of the {holder} nor of its ServiceAccount")?,
    }
    for secret in items(&diagnosis["pullSecrets"]) {
        let keys: Vec<String> = items(&secret["keys"]).iter().map(text).collect();
        let state = match secret["state"].as_str() {
            Some("found") if keys.is_empty() => String::new(),
            Some("found") => format!(": {}", keys.join(", ")),
            Some("missing") => ": does not exist".to_owned(),
            Some("forbidden") => ": may not be read".to_owned(),
            _ => ": was not read".to_owned(),
        };
        writeln!(f, "    {} {}{state}", mark_of_secret(secret, diagnosis), text(&secret["name"]))?;
        for problem in items(&secret["problems"]) {
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

/// `✓` only if a login of it pulls an image: a Secret that can be read may have a wrong one.
fn mark_of_secret(secret: &Value, diagnosis: &Value) -> char {
    let mut attempts = items(&diagnosis["images"]).iter().flat_map(|image| items(&image["attempts"]));
    let works = attempts.any(|one| one["secret"] == secret["name"] && one["answer"]["manifest"] == "found");
    match secret["state"].as_str() {
        Some("found") if !items(&secret["problems"]).is_empty() => '✗',
        Some("found") if works => '✓',
        Some("found") => '•',
        Some("missing") => '✗',
        _ => '?',
    }
}

fn write_image(f: &mut Formatter<'_>, image: &Value, pull_secrets: &[Value]) -> fmt::Result {
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
    match without_details(image, pull_secrets).as_str() {
        "" => writeln!(f, "    {}", text(&image["verdict"]))?,
        sentence => writeln!(f, "    {}: {sentence}", text(&image["verdict"]))?,
    }
    write_fix(f, &image["fix"])
}

/// The sentence of the verdict without the details that the tree has shown above: what precedes the
/// first one, or what follows it.
fn without_details(image: &Value, pull_secrets: &[Value]) -> String {
    const SEPARATORS: [char; 3] = [':', ';', ' '];
    let sentence = text(&image["sentence"]);
    let problems = pull_secrets.iter().flat_map(|secret| items(&secret["problems"]));
    let answers = items(&image["attempts"]).iter().map(|attempt| &attempt["answer"]).chain([&image["anonymous"]]);
    let shown = problems.chain(items(&image["nearest"])).chain(answers).map(|shown| text(&shown["detail"]));
    let found = shown.filter(|detail| !detail.is_empty()).filter_map(|detail| Some((sentence.find(&detail)?, detail)));
    match found.min() {
        Some((0, detail)) => sentence.replacen(&detail, "", 1).trim_start_matches(SEPARATORS).to_owned(),
        Some((place, _)) => sentence[..place].trim_end_matches(SEPARATORS).to_owned(),
        None => sentence,
    }
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
        "nodeHost" => "not tried, because the registry is at the node's own host",
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
    let takes_login = |step: &Value| step["command"].as_str().is_some_and(|line| line.contains("$REGISTRY_PASSWORD"));
    if items(&fix["steps"]).iter().any(takes_login) {
        writeln!(f, "      set REGISTRY_USERNAME and REGISTRY_PASSWORD first:")?;
    }
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
        let expected = "✗ pod/web\n  Pull secrets of the pod\n    • k: reg.io\n    ✗ gone: does not exist\n  \
                        ✗ reg.io/app:1 (web)\n    ✗ k, entry reg.io: invalid: no\n    \
                        the kubelet reports: imagePullBackOff\n    credentialInvalid: rejected\u{fffd}[2J\n    \
                        Fix: replace k\n      $ kubectl x\n      PUT /v1/x -H 'If-None-Match: *' {\"a\":1}\n  \
                        ? may not list nodes: less\n";
        assert_eq!(Tree::of_pod("pod/web", &diagnosis).to_string(), expected);
    }

    #[test]
    fn tree_says_each_thing_once() {
        let diagnosis = json!({
            "ok": false, "pullSecretsFrom": "pod", "serviceAccount": "default",
            "pullSecrets": [
                {"name": "good", "state": "found", "keys": ["reg.io"], "problems": []},
                {"name": "k", "state": "found", "keys": [], "problems": [{"key": null, "detail": "it is not JSON"}]},
            ],
            "images": [
                {"image": "reg.io/app:1", "containers": [{"name": "web"}], "verdict": "ok", "sentence": "it is pulled",
                    "attempts": [{"secret": "good", "key": "reg.io", "skipped": null,
                        "answer": {"result": "valid", "detail": "it works", "manifest": "found"}}]},
                {"image": "quay.io/app:1", "containers": [{"name": "job"}], "verdict": "secretUnreadable",
                    "sentence": "the kubelet finds no login in the pull secret k: it is not JSON",
                    "fix": {"description": "create it", "steps": [
                        {"command": "kubectl create --docker-password=\"$REGISTRY_PASSWORD\""}]}},
            ],
        });
        let attempts = json!([{"answer": {"detail": "it is rejected"}}]);
        let repeated = json!({"sentence": "it is rejected; the image is public", "attempts": attempts});
        assert_eq!(without_details(&repeated, &[]), "the image is public");
        let expected = "✗ job/x\n  Pull secrets of the pod template\n    ✓ good: reg.io\n    ✗ k\n      \
                        it is not JSON\n  ✓ reg.io/app:1 (web)\n    ✓ good, entry reg.io: valid: it works\n    \
                        ok: it is pulled\n  ✗ quay.io/app:1 (job)\n    \
                        secretUnreadable: the kubelet finds no login in the pull secret k\n    Fix: create it\n      \
                        set REGISTRY_USERNAME and REGISTRY_PASSWORD first:\n      \
                        $ kubectl create --docker-password=\"$REGISTRY_PASSWORD\"\n";
        assert_eq!(Tree::of_workload("job/x", &diagnosis).to_string(), expected);
    }
}
