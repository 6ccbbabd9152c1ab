//! Mapping of failed writes of a Secret to [`ClusterError`], for direct delivery and for pull
//! secrets.

use kube::core::Status;

use crate::{
    clients::cluster::{ClusterError, response::Response},
    domain::names::NamespaceName,
};

/// Rule for the size of a Secret.
pub(super) const TOO_LARGE: &str = "the document is too large: a Secret holds at most 1 MiB";

/// Kind of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// POST. A 409 means that the name is in use.
    Create,
    /// Server-side apply to an existing version. A 404 or 409 means that the Secret was changed or
    /// deleted.
    Apply,
}

impl Write {
    const fn verb(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Apply => "patch",
        }
    }
}

/// Maps a response that is not a success.
pub(super) fn write_error(response: &Response, write: Write, server: &str, namespace: &NamespaceName) -> ClusterError {
    let status = response.to_status();
    let reason = status.as_ref().map_or("", |status| status.reason.as_str());
    match (response.status, write) {
        (404 | 409, Write::Apply) => ClusterError::Changed,
        (409, Write::Create) if reason == "Conflict" => {
            ClusterError::Unreachable { detail: format!("{server} had an internal conflict (409): try again") }
        }
        (409, Write::Create) => ClusterError::SecretExists,
        (404, Write::Create) if reason == "NotFound" && status.as_ref().is_some_and(is_about_namespace) => {
            ClusterError::NamespaceNotFound
        }
        (403, _) if status.as_ref().is_some_and(|status| has_cause(status, "NamespaceTerminating")) => {
            ClusterError::NamespaceTerminating
        }
        (422, _) => invalid_secret(status.as_ref(), write),
        (413, _) => ClusterError::InvalidSecret { field: Some("data".to_owned()), detail: TOO_LARGE.to_owned() },
        (400, _) if status.is_some() => ClusterError::Refused {
            detail: "the cluster refused the Secret (400): check its admission webhooks".to_owned(),
        },
        _ => response.error(server, &format!("{} Secrets in namespace {namespace}", write.verb())),
    }
}

fn is_about_namespace(status: &Status) -> bool {
    status.details.as_ref().is_none_or(|details| matches!(details.kind.as_str(), "namespaces" | ""))
}

fn has_cause(status: &Status, reason: &str) -> bool {
    status.details.iter().flat_map(|details| &details.causes).any(|cause| cause.reason == reason)
}

/// Maps a 422. The field comes from the response, but only if Secrets have such a field; the text
/// does not.
fn invalid_secret(status: Option<&Status>, write: Write) -> ClusterError {
    let causes = status.and_then(|status| status.details.as_ref()).map_or(&[][..], |details| &details.causes);
    if write == Write::Apply {
        let immutable = causes.iter().find_map(|cause| match (cause.field.as_str(), cause.reason.as_str()) {
            ("type", _) => Some(ClusterError::TypeFixed),
            ("data" | "immutable", "FieldValueForbidden") => Some(ClusterError::Immutable),
            _ => None,
        });
        if let Some(error) = immutable {
            return error;
        }
    }
    match causes.iter().find_map(|cause| Some((cause, rule_for(&cause.field)?))) {
        Some((cause, _)) if cause.reason == "FieldValueTooLong" && cause.field.starts_with("data") => {
            ClusterError::InvalidSecret { field: Some("data".to_owned()), detail: TOO_LARGE.to_owned() }
        }
        Some((cause, rule)) => {
            ClusterError::InvalidSecret { field: Some(cause.field.clone()), detail: rule.to_owned() }
        }
        None => ClusterError::InvalidSecret {
            field: None,
            detail: "the cluster's validation or a policy refused the Secret (422)".to_owned(),
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
            "the cluster refused an annotation: keys must be valid, and all annotations together at most 256 KiB"
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

    fn error_of(write: Write, status: u16, reason: &str, details: &Value) -> ClusterError {
        let body = json!({
            "kind": "Status", "status": "Failure", "message": "canary", "reason": reason, "details": details,
        });
        let response = Response { status, retry_after: None, body: Some(body.to_string().into_bytes()) };
        write_error(&response, write, "https://k8s", &NamespaceName::parse("team-a").unwrap())
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
    #[case::type_of_a_new_secret(422, "Invalid", json!({"causes": [{"field": "type"}]}), "invalid-secret")]
    #[case::unlike_kubernetes(418, "", json!(null), "cluster-unreachable")]
    fn status_and_reason_of_a_create_decide(
        #[case] status: u16,
        #[case] reason: &str,
        #[case] details: Value,
        #[case] slug: &str,
    ) {
        let error = error_of(Write::Create, status, reason, &details);
        assert_eq!(error.slug(), slug);
        assert!(!format!("{error:?} {error}").contains("canary"), "{error:?}");
    }

    #[rstest]
    #[case::changed(409, "Conflict", json!({}), "secret-changed")]
    #[case::deleted(404, "NotFound", json!({}), "secret-changed")]
    #[case::terminating(403, "Forbidden", json!({"causes": [{"reason": "NamespaceTerminating"}]}), "namespace-terminating")]
    #[case::forbidden(403, "Forbidden", json!({}), "cluster-forbidden")]
    #[case::type_is_immutable(422, "Invalid", json!({"causes": [{"field": "type"}]}), "secret-type-fixed")]
    #[case::immutable(422, "Invalid", json!({"causes": [{"field": "data", "reason": "FieldValueForbidden"}]}), "secret-immutable")]
    #[case::invalid(422, "Invalid", json!({"causes": [{"field": "data"}]}), "invalid-secret")]
    fn status_and_reason_of_an_apply_decide(
        #[case] status: u16,
        #[case] reason: &str,
        #[case] details: Value,
        #[case] slug: &str,
    ) {
        assert_eq!(error_of(Write::Apply, status, reason, &details).slug(), slug);
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
    fn error_names_only_fields_that_secrets_have(
        #[case] field: &str,
        #[case] reason: &str,
        #[case] named: Option<&str>,
    ) {
        let causes = json!({"causes": [{"reason": reason, "message": "canary", "field": field}]});
        let error = error_of(Write::Create, 422, "Invalid", &causes);
        let ClusterError::InvalidSecret { field, detail } = &error else { panic!("{error:?}") };
        assert_eq!(field.as_deref(), named);
        assert!(!detail.is_empty() && !format!("{error:?}").contains("canary"), "{error:?}");
    }

    #[test]
    fn error_names_the_first_known_field() {
        let causes = json!({"causes": [{"field": "other"}, {"field": "metadata.name"}, {"field": "type"}]});
        let error = error_of(Write::Create, 422, "Invalid", &causes);
        let ClusterError::InvalidSecret { field, .. } = error else { panic!("{error:?}") };
        assert_eq!(field.as_deref(), Some("metadata.name"));
    }
}
