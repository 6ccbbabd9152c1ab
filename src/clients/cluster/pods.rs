//! Pods of a namespace, page by page, to choose those to diagnose.

use std::{
    collections::HashSet,
    fmt::{self, Display},
    str::FromStr,
};

use http::Request;

use super::{
    ClusterClient, ClusterError,
    coverage::{Expired, List},
    diagnosis::Pod,
    unbuildable,
};
use crate::domain::{
    diagnosis::{ListedPod, WorkloadKind},
    invalid::Invalid,
    names::{NamespaceName, PodName},
};

/// Pods in one page of a search, which have many fields, and maximum number of these pages.
const PAGE: u32 = 20;
const PAGES_MAX: u32 = 500;
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

/// Search for pods of a namespace that wait for their images.
#[derive(Debug, Default)]
pub struct WaitingPods {
    /// Pods of which a container waits for its image, or whose containers have no status yet.
    pub waiting: Vec<PodName>,
    /// Kinds and names of the workloads that have a pod.
    pub workloads: HashSet<(WorkloadKind, String)>,
    /// Number of pods that were read.
    pub total: usize,
    /// Whether the namespace was read to its end.
    pub is_complete: bool,
}

impl WaitingPods {
    fn add(&mut self, pod: ListedPod) {
        self.total += 1;
        if let Some((kind, name)) = &pod.owner {
            if *kind == WorkloadKind::Job {
                self.workloads.extend(cron_job_of(name.as_str()).map(|name| (WorkloadKind::CronJob, name.to_owned())));
            }
            self.workloads.insert((*kind, name.to_string()));
        }
        if pod.may_wait_for_image() {
            self.waiting.push(pod.name);
        }
    }
}

/// Name of the `CronJob` that creates Jobs of such a name: it appends the scheduled time.
fn cron_job_of(job: &str) -> Option<&str> {
    let (name, time) = job.rsplit_once('-')?;
    (!time.is_empty() && time.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
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
                    let List::<Pod> { metadata, items } = response.read(self.server())?;
                    let pods = items.unwrap_or_default().iter().filter_map(Pod::listed).collect();
                    // Empty on the last page.
                    let next = metadata.continue_token.parse().ok();
                    return Ok(Some(PodPage { pods, next }));
                }
            }
        }
        let detail = format!("{} lists no page of pods", self.server());
        Err(ClusterError::Unreachable { detail })
    }

    /// Finds the pods of a namespace that wait for their images.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn list_waiting_pods(&self, namespace: &NamespaceName) -> Result<WaitingPods, ClusterError> {
        let (mut found, mut place) = (WaitingPods::default(), None);
        for _ in 0..PAGES_MAX {
            let Some(page) = self.list_pods(namespace, PAGE, place.as_ref()).await? else { break };
            page.pods.into_iter().for_each(|pod| found.add(pod));
            place = page.next;
            if place.is_none() {
                return Ok(WaitingPods { is_complete: true, ..found });
            }
        }
        Ok(found)
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

    #[test]
    fn pod_without_container_statuses_waits() {
        let waiting = json!({"phase": "Pending", "containerStatuses": [
            {"name": "c", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]});
        let crashing = json!({"phase": "Running", "containerStatuses": [
            {"name": "c", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
        let mut found = WaitingPods::default();
        for (name, status) in [
            ("new", json!({"phase": "Pending"})),
            ("waiting", waiting),
            ("crashing", crashing),
            ("done", json!({"phase": "Succeeded"})),
        ] {
            found.add(listed(&json!({"name": name}), &status).unwrap());
        }
        let names: Vec<&str> = found.waiting.iter().map(PodName::as_str).collect();
        assert_eq!((found.total, &names[..]), (4, &["new", "waiting"][..]));
    }

    #[test]
    fn pod_of_a_scheduled_job_is_one_of_its_cron_job() {
        let owned = |name: &str| {
            let owner = json!({"controller": true, "apiVersion": "batch/v1", "kind": "Job", "name": name});
            listed(&json!({"name": "p", "ownerReferences": [owner]}), &json!({})).unwrap()
        };
        let mut found = WaitingPods::default();
        for name in ["nightly-28000000", "one-off"] {
            found.add(owned(name));
        }
        let expected = [
            (WorkloadKind::Job, "nightly-28000000"),
            (WorkloadKind::CronJob, "nightly"),
            (WorkloadKind::Job, "one-off"),
        ];
        assert_eq!(found.workloads, HashSet::from(expected.map(|(kind, name)| (kind, name.to_owned()))));
    }
}
