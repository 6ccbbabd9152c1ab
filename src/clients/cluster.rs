//! Client for Kubernetes API servers. Each [`ClusterClient`] has the credential of one cluster.
//!
//! What holds for every call:
//!
//! - It ends within [`ClusterClientConfig::timeout`].
//! - It is sent once. In particular, a POST is never repeated.
//! - Nothing that the API server sent reaches a log or an error text, because it may repeat what it
//!   was sent. So requests are built by kube, but responses are read here: `kube::Api` logs the
//!   body of a response that it cannot parse.
//! - Of Secrets and namespaces only the metadata is requested. Diagnosis and coverage, which read
//!   values of Secrets by name, are the exception.

use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use http::Request;
use http_body_util::{BodyExt, Limited};
use kube::{Client, client::Body};
use secrecy::SecretString;
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};
use tracing::Instrument;

use crate::{
    clients::outbound::{Guard, Peer},
    domain::cluster::ClusterConnection,
};

mod access_review;
mod cache;
mod check;
mod connection;
mod coverage;
mod diagnosis;
mod error;
pub mod kubeconfig;
mod list;
mod metrics;
mod namespaces;
mod pace;
mod pods;
mod response;
mod secrets;
mod service_accounts;
mod token_request;
mod token_review;
mod user_kubeconfig;
mod version;
mod watch;
mod workload;

pub use access_review::{AccessReviews, MissingRight, ReviewsExhausted};
pub use cache::ClusterClients;
pub use check::{Check, CheckProblem, LackingAccount, LackingPullSecret, Permission};
pub use connection::{admit, resolve_in_cluster};
pub use coverage::Place;
pub use error::ClusterError;
pub use metrics::ClusterMetrics;
pub use namespaces::FoundNamespace;
pub use pace::Pace;
pub use pods::{ContinueToken, PodPage, WaitingPods};
pub use secrets::{ListedSecret, SecretMetadata};
pub use service_accounts::Attachment;
pub use token_request::IssuedToken;
pub use token_review::{REVIEW_REMEMBERED_MAX, ReviewedServiceAccount};
pub use watch::{Change, Interruption, Watched};

use metrics::Verb;
use response::{Response, retry_after};

/// Field manager of regcred's fields in `managedFields`.
pub const FIELD_MANAGER: &str = "regcred";

/// Maximum length of a response body, in bytes.
const BODY_MAX: usize = 1024 * 1024;

/// Configuration of [`ClusterClient`]s.
#[derive(Debug, Clone)]
pub struct ClusterClientConfig {
    /// Time limit for a call.
    pub timeout: Duration,
    /// Part of `timeout` in which a connection must be established, TLS included.
    pub connect_timeout: Duration,
    /// Directory in which a pod has the token and CA certificate of its `ServiceAccount`.
    pub service_account_dir: PathBuf,
    /// `KUBERNETES_SERVICE_HOST`, as set in every pod.
    pub service_host: Option<String>,
    /// `KUBERNETES_SERVICE_PORT`.
    pub service_port: Option<String>,
    /// Runtime of the connections; the caller's runtime if absent.
    ///
    /// Required if callers run on several runtimes, as the workers of actix-web do: a connection
    /// would otherwise stall while the worker that opened it is busy, and end with that worker.
    pub runtime: Option<Handle>,
    /// Guard for addresses of clusters. Without one, all addresses are admitted.
    pub guard: Option<Guard>,
    /// Metrics of calls.
    pub metrics: ClusterMetrics,
}

impl Default for ClusterClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(5),
            service_account_dir: PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount"),
            service_host: None,
            service_port: None,
            runtime: None,
            guard: None,
            metrics: ClusterMetrics::default(),
        }
    }
}

impl ClusterClientConfig {
    /// Token of the pod's own `ServiceAccount`, if regcred runs in a cluster.
    #[must_use]
    pub fn own_token(&self) -> Option<SecretString> {
        std::fs::read_to_string(self.service_account_dir.join("token")).ok().map(SecretString::from)
    }
}

/// Client for one cluster. Clones share its open connections.
///
/// kube's client holds the credential for as long as this client exists. `Debug` prints the server
/// only.
#[derive(Clone)]
pub struct ClusterClient {
    client: Client,
    peer: Arc<Peer>,
    timeout: Duration,
    runtime: Option<Handle>,
    /// Address that the client connects to instead of resolving the host name.
    pinned: Option<IpAddr>,
    metrics: ClusterMetrics,
    /// Name of the cluster in metrics.
    name: Arc<str>,
}

impl fmt::Debug for ClusterClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterClient").field("server", &self.server()).finish_non_exhaustive()
    }
}

impl ClusterClient {
    /// Creates a client. Nothing is sent.
    ///
    /// Must be called within a tokio runtime, unless the configuration names one. Proxy variables
    /// of the environment are ignored. In a cluster, the files of the `ServiceAccount` are read now
    /// and, since the kubelet rotates them, again every minute.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Misconfigured`] if regcred does not run in a cluster although `inCluster`
    /// says so, or if the host has no trust store and no CA certificate is given.
    pub fn connect(connection: &ClusterConnection, config: &ClusterClientConfig) -> Result<Self, ClusterError> {
        Self::connect_at(connection, None, config)
    }

    /// Creates a client that connects to `pinned` instead of resolving the host name. The
    /// certificate must still be valid for the name.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn connect_at(
        connection: &ClusterConnection,
        pinned: Option<IpAddr>,
        config: &ClusterClientConfig,
    ) -> Result<Self, ClusterError> {
        let (kube_config, peer) = connection::kube_config(connection, pinned, config)?;
        let _runtime = config.runtime.as_ref().map(Handle::enter);
        let client = Client::try_from(kube_config).map_err(|_| ClusterError::Misconfigured {
            detail: format!(
                "TLS for {} cannot be set up: the CA or client certificate, or the host's trust store, is unusable",
                peer.label
            ),
        })?;
        Ok(Self {
            client,
            peer: Arc::new(peer),
            timeout: config.timeout,
            runtime: config.runtime.clone(),
            pinned,
            metrics: config.metrics.clone(),
            name: Arc::from("unnamed"),
        })
    }

    /// Sets the name of the cluster in metrics.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: Arc::from(name), ..self }
    }

    /// Whether the client is pinned to one of these addresses, or not pinned.
    #[must_use]
    pub fn is_at(&self, addresses: &[IpAddr]) -> bool {
        self.pinned.is_none_or(|pinned| addresses.contains(&pinned))
    }

    /// URL of the API server.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.peer.label
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Sends a request and reads the response, both until `deadline`.
    async fn call(&self, request: Request<Vec<u8>>, deadline: Instant) -> Result<Response, ClusterError> {
        self.call_up_to(request, deadline, BODY_MAX).await
    }

    /// As [`call`](Self::call), with another maximum length of the body.
    async fn call_up_to(
        &self,
        request: Request<Vec<u8>>,
        deadline: Instant,
        body_max: usize,
    ) -> Result<Response, ClusterError> {
        let Some(runtime) = self.runtime.as_ref().filter(|runtime| !is_current(runtime)) else {
            return self.exchange(request, deadline, body_max).await;
        };
        let client = self.clone();
        let exchange = async move { client.exchange(request, deadline, body_max).await }.in_current_span();
        runtime.spawn(exchange).await.unwrap_or_else(|_| {
            let detail = format!("the call to {} was cancelled: regcred is shutting down", self.server());
            Err(ClusterError::Unreachable { detail })
        })
    }

    async fn exchange(
        &self,
        request: Request<Vec<u8>>,
        deadline: Instant,
        body_max: usize,
    ) -> Result<Response, ClusterError> {
        let verb = Verb::of(&request);
        let response = self.exchange_uncounted(request, deadline, body_max).await;
        self.metrics.count_call(&self.name, verb, response.as_ref().map(|response| response.status));
        response
    }

    #[tracing::instrument(level = "debug", name = "cluster.call", skip_all, fields(server = self.server(), method = %request.method()))]
    async fn exchange_uncounted(
        &self,
        request: Request<Vec<u8>>,
        deadline: Instant,
        body_max: usize,
    ) -> Result<Response, ClusterError> {
        let sent = timeout_at(deadline, self.client.send(request.map(Body::from))).await;
        let response =
            sent.map_err(|_| self.timed_out())?.map_err(|error| ClusterError::from_transport(&self.peer, &error))?;
        let (head, body) = response.into_parts();
        let body = match timeout_at(deadline, read_body(body, body_max)).await {
            Ok(body) => body,
            // Only a success needs its body.
            Err(_) if head.status.is_success() => return Err(self.timed_out()),
            Err(_) => None,
        };
        Ok(Response { status: head.status.as_u16(), retry_after: retry_after(&head.headers), body })
    }

    fn timed_out(&self) -> ClusterError {
        let detail = format!("{} sent no response within {} ms", self.server(), self.timeout.as_millis());
        ClusterError::Timeout { detail }
    }
}

/// Whether the caller already runs on this runtime, so that no task is needed.
fn is_current(runtime: &Handle) -> bool {
    Handle::try_current().is_ok_and(|current| current.id() == runtime.id())
}

/// Reads a body, or returns none if it is incomplete or too long.
async fn read_body(body: Body, body_max: usize) -> Option<Vec<u8>> {
    Limited::new(body, body_max).collect().await.ok().map(|body| body.to_bytes().to_vec())
}

/// Error of a request that kube cannot build.
fn unbuildable<E>(_: E) -> ClusterError {
    ClusterError::Misconfigured { detail: "the request to the cluster cannot be built".to_owned() }
}
