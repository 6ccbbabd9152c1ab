//! Responses of an API server: decided by status and machine-readable reason, never by message
//! text.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderMap, header};
use kube::core::Status;
use serde::{Deserialize, de::DeserializeOwned};

use super::error::ClusterError;

/// Maximum delay that an API server can request. Its value may be wrong, or sent by a proxy.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// Response, with its body unless that was incomplete.
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) retry_after: Option<Duration>,
    pub(super) body: Option<Vec<u8>>,
}

/// Object of which only the metadata was requested.
#[derive(Deserialize)]
pub(super) struct PartialObject {
    pub(super) metadata: Metadata,
}

/// The fields of `ObjectMeta` that are used. Smaller than k8s-openapi's type, which parses
/// `managedFields`, too.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    // An API server always sends the name. Without one, the response comes from something else.
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) resource_version: Option<String>,
    pub(super) creation_timestamp: Option<DateTime<Utc>>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) deletion_timestamp: Option<String>,
}

impl Response {
    pub(super) const fn is_success(&self) -> bool {
        self.status >= 200 && self.status < 300
    }

    /// Parses the body.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(self.body.as_deref()?).ok()
    }

    /// Parses the body, which must be of this type.
    pub(super) fn read<T: DeserializeOwned>(&self, server: &str) -> Result<T, ClusterError> {
        self.json().ok_or_else(|| ClusterError::Unreachable {
            detail: format!("{server} answered {}, but the rest of its response cannot be read", self.status),
        })
    }

    /// Parses the body as a Kubernetes `Status`.
    pub(super) fn to_status(&self) -> Option<Status> {
        self.json()
    }

    /// Error of a request that needed `right`, such as `get Secrets in namespace x`.
    pub(super) fn error(&self, server: &str, right: &str) -> ClusterError {
        match self.status {
            401 => ClusterError::Unauthorized,
            403 => ClusterError::Forbidden { detail: format!("the credential for the cluster may not {right} (403)") },
            429 => ClusterError::Overloaded { retry_after: self.retry_after },
            504 => ClusterError::Timeout { detail: format!("{server} did not finish in time (504)") },
            status @ 500..=599 => {
                ClusterError::Unreachable { detail: format!("{server} has an internal problem (status {status})") }
            }
            status => ClusterError::Unreachable {
                detail: format!(
                    "{server} does not answer like a Kubernetes API server (status {status}): check the URL"
                ),
            },
        }
    }
}

/// Delay that an API server requests, in seconds.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}
