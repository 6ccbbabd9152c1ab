//! What an API server's answer means: decided on status and machine-readable reason, never on message text.

use std::time::Duration;

use kube::core::Status;

use super::error::ClusterError;

/// An answer with its body, or without it where the body broke off.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Option<Vec<u8>>,
}

impl Answer {
    pub(super) const fn is_success(&self) -> bool {
        self.status >= 200 && self.status < 300
    }

    /// The body as a Kubernetes `Status`, if it is one.
    fn to_status(&self) -> Option<Status> {
        serde_json::from_slice(self.body.as_deref()?).ok()
    }

    /// What this answer means when it is not a success, whatever was asked.
    pub(super) fn failure(&self, server: &str) -> ClusterError {
        match self.status {
            401 => ClusterError::Unauthorized,
            403 => {
                ClusterError::Forbidden { detail: "the cluster forbids this to regcred's credential (403)".to_owned() }
            }
            429 => ClusterError::Overloaded { retry_after: self.retry_after },
            504 => ClusterError::Timeout { detail: format!("{server} did not finish in its own time (504)") },
            status @ 500..=599 => {
                ClusterError::Unreachable { detail: format!("{server} has a problem of its own (status {status})") }
            }
            status => ClusterError::Unreachable {
                detail: format!(
                    "{server} does not answer as a Kubernetes API server does (status {status}): check the URL"
                ),
            },
        }
    }

    /// What this answer means when it is not a success and a Secret was to be created.
    pub(super) fn create_failure(&self, server: &str, namespace: &str) -> ClusterError {
        let status = self.to_status();
        let reason = status.as_ref().map_or("", |status| status.reason.as_str());
        match (self.status, reason) {
            (409, "Conflict") => {
                ClusterError::Unreachable { detail: format!("{server} met a conflict of its own (409): try again") }
            }
            (409, _) => ClusterError::SecretExists,
            (404, "NotFound") if status.as_ref().is_some_and(is_about_namespace) => ClusterError::NamespaceNotFound,
            (403, _) if status.as_ref().is_some_and(|status| has_cause(status, "NamespaceTerminating")) => {
                ClusterError::NamespaceTerminating
            }
            (403, _) => ClusterError::Forbidden {
                detail: format!(
                    "regcred's credential for the cluster may not create Secrets in namespace {namespace} (403)"
                ),
            },
            (422, _) => invalid_secret(status.as_ref()),
            (413, _) => ClusterError::InvalidSecret { field: Some("data".to_owned()), detail: TOO_LARGE.to_owned() },
            (400, _) if status.is_some() => ClusterError::Refused {
                detail: "the cluster refused the Secret (400): an admission webhook is the likely reason".to_owned(),
            },
            _ => self.failure(server),
        }
    }
}

impl Answer {
    /// Whether it is a 403 because the namespace is on its way out.
    pub(super) fn is_terminating(&self) -> bool {
        self.to_status().as_ref().is_some_and(|status| has_cause(status, "NamespaceTerminating"))
    }

    /// What this answer means when it is not a success and a Secret that was there was to be changed.
    pub(super) fn apply_failure(&self, server: &str, namespace: &str) -> ClusterError {
        match self.status {
            // An apply that names a version never creates. Older API servers find other words for that than 404 or 409.
            404 | 409 => ClusterError::Changed,
            422 => match self.to_status().as_ref().and_then(fixed_field) {
                Some(fixed) => fixed,
                None => self.create_failure(server, namespace),
            },
            _ => self.create_failure(server, namespace),
        }
    }
}

/// Whether a Secret was not changed because a part of it never can be.
fn fixed_field(status: &Status) -> Option<ClusterError> {
    let causes = &status.details.as_ref()?.causes;
    causes.iter().find_map(|cause| match (cause.field.as_str(), cause.reason.as_str()) {
        ("type", _) => Some(ClusterError::TypeFixed),
        ("data" | "immutable", "FieldValueForbidden") => Some(ClusterError::Immutable),
        _ => None,
    })
}

/// The rule for the size of a Secret.
pub(super) const TOO_LARGE: &str = "the document is too large: a Secret holds at most 1 MiB";

fn is_about_namespace(status: &Status) -> bool {
    status.details.as_ref().is_none_or(|details| matches!(details.kind.as_str(), "namespaces" | ""))
}

fn has_cause(status: &Status, reason: &str) -> bool {
    status.details.iter().flat_map(|details| &details.causes).any(|cause| cause.reason == reason)
}

/// The field comes from the answer, but only if it is one that Secrets have; the words are ours.
fn invalid_secret(status: Option<&Status>) -> ClusterError {
    let causes = status.and_then(|status| status.details.as_ref()).map_or(&[][..], |details| &details.causes);
    let known = causes.iter().find_map(|cause| Some((cause, rule_for(&cause.field)?)));
    match known {
        Some((cause, _)) if cause.reason == "FieldValueTooLong" && cause.field.starts_with("data") => {
            ClusterError::InvalidSecret { field: Some("data".to_owned()), detail: TOO_LARGE.to_owned() }
        }
        Some((cause, rule)) => {
            ClusterError::InvalidSecret { field: Some(cause.field.clone()), detail: rule.to_owned() }
        }
        None => ClusterError::InvalidSecret {
            field: None,
            detail: "the cluster's validation or a policy of it refused the Secret (422)".to_owned(),
        },
    }
}

fn rule_for(field: &str) -> Option<&'static str> {
    let well_formed = field.len() <= 128
        && field
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'[' | b']' | b'-' | b'_' | b'/'));
    if !well_formed {
        return None;
    }
    Some(match field {
        "metadata.name" | "metadata.generateName" => {
            "the cluster refused the name: it must be a DNS subdomain of at most 253 lower-case letters, digits, - and ."
        }
        "metadata.namespace" => "the cluster refused the namespace: it must be a DNS label",
        "type" => "the cluster refused the type of the Secret",
        _ if is_or_within(field, "metadata.labels") => {
            "the cluster refused a label: keys and values must be valid Kubernetes labels"
        }
        _ if is_or_within(field, "metadata.annotations") => {
            "the cluster refused an annotation: keys must be valid and all together at most 256 KiB"
        }
        _ if is_or_within(field, "data") => "the cluster refused the document: it does not fit the type of the Secret",
        _ => return None,
    })
}

fn is_or_within(field: &str, parent: &str) -> bool {
    field.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn answer(status: u16, body: &Value) -> Answer {
        Answer { status, retry_after: None, body: Some(body.to_string().into_bytes()) }
    }

    fn meaning(status: u16, body: &Value) -> ClusterError {
        answer(status, body).create_failure("https://k8s", "team-a")
    }

    fn failure(reason: &str, details: &Value) -> Value {
        json!({"kind": "Status", "status": "Failure", "message": "canary", "reason": reason, "details": details})
    }

    #[rstest]
    #[case::taken(409, "AlreadyExists", json!({"name": "canary", "kind": "secrets"}), "secret-exists")]
    #[case::conflict(409, "Conflict", json!({"kind": "resourcequotas"}), "cluster-unreachable")]
    #[case::namespace(404, "NotFound", json!({"name": "canary", "kind": "namespaces"}), "namespace-not-found")]
    #[case::other_not_found(404, "NotFound", json!({"kind": "secrets"}), "cluster-unreachable")]
    #[case::terminating(403, "Forbidden", json!({"causes": [{"reason": "NamespaceTerminating", "message": "canary"}]}), "namespace-terminating")]
    #[case::forbidden(403, "Forbidden", json!({"kind": "secrets"}), "cluster-forbidden")]
    #[case::unauthorized(401, "Unauthorized", json!({}), "cluster-unauthorized")]
    #[case::bad_request(400, "BadRequest", json!({}), "secret-refused")]
    #[case::too_large(413, "RequestEntityTooLarge", json!({}), "invalid-secret")]
    #[case::too_many(429, "TooManyRequests", json!({"retryAfterSeconds": 1}), "cluster-unreachable")]
    #[case::internal(500, "InternalError", json!({"causes": [{"message": "canary"}]}), "cluster-unreachable")]
    #[case::slow(504, "Timeout", json!({}), "cluster-timeout")]
    #[case::unlike_kubernetes(418, "", json!(null), "cluster-unreachable")]
    fn status_and_reason_decide(#[case] status: u16, #[case] reason: &str, #[case] details: Value, #[case] slug: &str) {
        let meaning = meaning(status, &failure(reason, &details));
        assert_eq!(meaning.slug(), slug);
        assert!(!format!("{meaning:?} {meaning}").contains("canary"), "{meaning:?}");
    }

    #[rstest]
    #[case("metadata.name", "FieldValueInvalid", Some("metadata.name"))]
    #[case("metadata.labels", "FieldValueInvalid", Some("metadata.labels"))]
    #[case("metadata.annotations", "FieldValueTooLong", Some("metadata.annotations"))]
    #[case("data[.dockerconfigjson]", "FieldValueRequired", Some("data[.dockerconfigjson]"))]
    #[case("data", "FieldValueTooLong", Some("data"))]
    #[case("type", "FieldValueNotSupported", Some("type"))]
    #[case("", "", None)]
    #[case("spec.canary", "FieldValueInvalid", None)]
    #[case("database", "FieldValueInvalid", None)]
    #[case("data[canary value]", "FieldValueInvalid", None)]
    fn only_fields_that_secrets_have_are_named(#[case] field: &str, #[case] reason: &str, #[case] named: Option<&str>) {
        let causes = json!({"causes": [{"reason": reason, "message": "canary", "field": field}]});
        let meaning = meaning(422, &failure("Invalid", &causes));
        let ClusterError::InvalidSecret { field, detail } = &meaning else { panic!("{meaning:?}") };
        assert_eq!(field.as_deref(), named);
        assert!(!detail.is_empty() && !format!("{meaning:?}").contains("canary"), "{meaning:?}");
    }

    #[test]
    fn the_first_known_field_is_named() {
        let causes = json!({"causes": [{"field": "other"}, {"field": "metadata.name"}, {"field": "type"}]});
        let ClusterError::InvalidSecret { field, .. } = meaning(422, &failure("Invalid", &causes)) else { panic!() };
        assert_eq!(field.as_deref(), Some("metadata.name"));
    }
}
