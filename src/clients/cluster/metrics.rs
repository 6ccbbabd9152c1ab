//! Metrics of calls to clusters.

use std::{collections::HashSet, sync::Arc};

use http::{Method, Request};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

use super::{ClusterError, Watched};

/// Maximum number of clusters with their own series. Further clusters share the label `other`.
const CLUSTERS_MAX: usize = 250;

/// Labels of a call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    cluster: String,
    verb: &'static str,
    code: String,
}

/// Labels of a watch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WatchLabels {
    cluster: String,
    watched: &'static str,
}

/// Metrics of calls to all clusters.
#[derive(Debug, Clone, Default)]
pub struct ClusterMetrics {
    /// Calls by cluster, verb and code.
    pub calls: Family<CallLabels, Counter>,
    /// Watches that were interrupted or could not be started.
    pub watch_restarts: Family<WatchLabels, Counter>,
    clusters: Arc<Mutex<HashSet<String>>>,
}

impl ClusterMetrics {
    /// Counts a call by its status or error.
    pub(super) fn count_call(&self, cluster: &str, verb: Verb, result: Result<u16, &ClusterError>) {
        let code = match result {
            // Statuses of API servers. Others share one label, so that a broken server cannot
            // create series.
            Ok(status @ (200..=202 | 400..=410 | 412..=415 | 422 | 429 | 500..=504)) => status.to_string(),
            Ok(_) => "other".to_owned(),
            Err(ClusterError::Timeout { .. }) => "timeout".to_owned(),
            Err(ClusterError::Tls { .. }) => "tls".to_owned(),
            Err(_) => "unreachable".to_owned(),
        };
        let labels = CallLabels { cluster: self.label(cluster), verb: verb.0, code };
        self.calls.get_or_create(&labels).inc();
    }

    /// Counts a watch that was interrupted or could not be started.
    pub(super) fn count_watch_restart(&self, cluster: &str, watched: Watched) {
        let labels = WatchLabels { cluster: self.label(cluster), watched: watched.as_str() };
        self.watch_restarts.get_or_create(&labels).inc();
    }

    fn label(&self, cluster: &str) -> String {
        let mut known = self.clusters.lock();
        if !known.contains(cluster) {
            if known.len() >= CLUSTERS_MAX {
                return "other".to_owned();
            }
            known.insert(cluster.to_owned());
        }
        cluster.to_owned()
    }
}

/// Kubernetes verb of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verb(&'static str);

impl Verb {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let uri = request.uri();
        Self(match *request.method() {
            Method::POST => "create",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ if uri
                .query()
                .is_some_and(|query| query.split('&').any(|part| matches!(part, "watch=1" | "watch=true"))) =>
            {
                "watch"
            }
            _ if uri.path().ends_with("/namespaces") || uri.path().ends_with("/secrets") => "list",
            // A list in pages.
            _ if uri.query().is_some_and(|query| query.split('&').any(|part| part.starts_with("limit="))) => "list",
            _ => "get",
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(Method::POST, "/api/v1/namespaces/a/secrets?fieldManager=regcred", "create")]
    #[case(Method::PATCH, "/api/v1/namespaces/a/secrets/pull?force=true", "patch")]
    #[case(Method::DELETE, "/api/v1/namespaces/a/secrets/pull", "delete")]
    #[case(Method::GET, "/api/v1/namespaces/a/secrets/pull", "get")]
    #[case(Method::GET, "/api/v1/namespaces/a/serviceaccounts/default", "get")]
    #[case(Method::GET, "/version", "get")]
    #[case(Method::GET, "/api/v1/namespaces?limit=250", "list")]
    #[case(Method::GET, "/api/v1/secrets?&limit=500&labelSelector=x", "list")]
    #[case(Method::GET, "/api/v1/pods?limit=100&continue=x", "list")]
    #[case(Method::GET, "/api/v1/secrets?&watch=true&resourceVersion=5", "watch")]
    fn request_has_the_verb_of_kubernetes(#[case] method: Method, #[case] uri: &str, #[case] verb: &str) {
        let request = Request::builder().method(method).uri(uri).body(()).expect("a request");

        assert_eq!(Verb::of(&request), Verb(Box::leak(verb.to_owned().into_boxed_str())));
    }

    #[test]
    fn number_of_series_is_bounded() {
        let metrics = ClusterMetrics::default();

        let labels: HashSet<String> = (0..1_000).map(|number| metrics.label(&format!("cluster-{number}"))).collect();

        assert_eq!(labels.len(), CLUSTERS_MAX + 1);
        assert!(labels.contains("other") && metrics.label("cluster-0") == "cluster-0");
    }
}
