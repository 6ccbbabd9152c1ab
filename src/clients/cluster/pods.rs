//! Pods of a namespace, page by page, to choose one to diagnose.

use std::{
    fmt::{self, Display},
    str::FromStr,
};

use http::Request;

use super::{
    ClusterClient, ClusterError,
    coverage::Expired,
    diagnosis::{Pod, Pods},
    unbuildable,
};
use crate::domain::{diagnosis::ListedPod, invalid::Invalid, names::NamespaceName};

/// Maximum length of a page, in bytes. A longer one is requested again with fewer pods.
const BODY_MAX: usize = 4 * 1024 * 1024;
/// Maximum number of requests for a page: fewer pods at a time, and once another place.
const ATTEMPTS: u32 = 6;
/// Maximum length of a place in a list.
const TOKEN_MAX: usize = 4096;

/// Place in a list, as an API server named it. Only this API server can read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContinueToken(String);

impl FromStr for ContinueToken {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let is_token = (1..=TOKEN_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        if is_token { Ok(Self(text.to_owned())) } else { Err(Invalid::new("is not a place in a list of a cluster")) }
    }
}

impl Display for ContinueToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Page of the pods of a namespace.
#[derive(Debug)]
pub struct PodPage {
    /// The pods, by name. There may be fewer than requested although more follow.
    pub pods: Vec<ListedPod>,
    /// Place of the next page; none on the last one.
    pub next: Option<ContinueToken>,
}

impl ClusterClient {
    /// Lists at most `limit` pods of a namespace. Returns `None` if the API server does not know the
    /// place: it has expired, or is not one of this list.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_pods(
        &self,
        namespace: &NamespaceName,
        mut limit: u32,
        after: Option<&ContinueToken>,
    ) -> Result<Option<PodPage>, ClusterError> {
        let mut place = after.cloned();
        for _ in 0..ATTEMPTS {
            let mut path = format!("/api/v1/namespaces/{namespace}/pods?limit={limit}");
            if let Some(ContinueToken(token)) = &place {
                path.push_str("&continue=");
                path.extend(url::form_urlencoded::byte_serialize(token.as_bytes()));
            }
            let request = Request::get(path).body(Vec::new()).map_err(unbuildable)?;
            let response = self.call_up_to(request, self.deadline(), BODY_MAX).await?;
            match response.status {
                // The list is continued in its present state.
                410 if place.is_some() => {
                    let expired: Option<Expired> = response.json();
                    let renewed = expired.and_then(|expired| expired.metadata.continue_token.parse().ok());
                    let Some(renewed) = renewed.filter(|renewed| Some(renewed) != place.as_ref()) else {
                        return Ok(None);
                    };
                    place = Some(renewed);
                }
                400 if place.is_some() => return Ok(None),
                _ if !response.is_success() => {
                    return Err(response.error(self.server(), &format!("list pods in namespace {namespace}")));
                }
                _ if response.body.is_none() && limit > 1 => limit = (limit / 4).max(1),
                _ => {
                    let Pods { metadata, items } = response.read(self.server())?;
                    let pods = items.unwrap_or_default().iter().filter_map(Pod::listed).collect();
                    let next = metadata.continue_token.and_then(|token| token.parse().ok());
                    return Ok(Some(PodPage { pods, next }));
                }
            }
        }
        let detail = format!("{} lists no page of pods", self.server());
        Err(ClusterError::Unreachable { detail })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::diagnosis::{PodPhase, WaitingReason, WorkloadKind};

    #[rstest]
    #[case("", false)]
    #[case("eyJ2Ijoi-_=", true)]
    #[case("a b", false)]
    #[case("a\u{e9}", false)]
    fn place_in_a_list_is_one_visible_word(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(text.parse::<ContinueToken>().is_ok(), expected);
        assert!("x".repeat(TOKEN_MAX + 1).parse::<ContinueToken>().is_err());
    }

    fn listed(metadata: &Value, status: &Value) -> Option<ListedPod> {
        let pod = json!({"metadata": metadata, "spec": {}, "status": status});
        serde_json::from_value::<Pod>(pod).unwrap().listed()
    }

    #[test]
    fn pod_names_the_deployment_of_its_replica_set_and_why_it_waits() {
        let owners = json!([{"controller": true, "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-abc"}]);
        let metadata = json!({"name": "web-abc-x", "labels": {"pod-template-hash": "abc"}, "ownerReferences": owners});
        let waiting =
            json!([{"name": "app", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "canary"}}}]);
        let pod = listed(&metadata, &json!({"phase": "Pending", "containerStatuses": waiting})).unwrap();
        let (kind, owner) = pod.owner.unwrap();
        assert_eq!((kind, owner.as_str(), pod.phase), (WorkloadKind::Deployment, "web", PodPhase::Pending));
        assert_eq!(pod.waiting, Some(WaitingReason::ImagePullBackOff));
    }

    #[rstest]
    #[case("Running", json!({"waiting": {"reason": "CrashLoopBackOff"}}), PodPhase::Running)]
    #[case("canary of a phase", json!({}), PodPhase::Unknown)]
    fn other_reasons_and_phases_are_not_repeated(
        #[case] phase: &str,
        #[case] state: Value,
        #[case] expected: PodPhase,
    ) {
        let statuses = json!([{"name": "app", "state": state}]);
        let pod = listed(&json!({"name": "web"}), &json!({"phase": phase, "containerStatuses": statuses})).unwrap();
        assert_eq!((pod.owner, pod.phase, pod.waiting), (None, expected, None));
        assert_eq!(listed(&json!({"name": "../secrets"}), &json!({})), None);
    }
}
