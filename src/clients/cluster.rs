//! A Kubernetes API server, called with the credential of one cluster.
//!
//! Three things hold for every call: it ends within [`ClusterClientConfig::timeout`], it is sent once (a POST is never repeated), and what comes
//! back reaches neither log nor error text, because an API server may repeat what it was sent. For the last reason answers are read
//! here and not by `kube::Api`, which logs the whole body of an answer that it cannot read; and of created objects only their
//! metadata is asked for.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::{BodyExt, Limited};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Client, Config, Resource, api::PostParams, client::Body, config::AuthInfo};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};
use tracing::Instrument;

use crate::{
    clients::guard::Guard,
    domain::{
        cluster::{CaCertificate, ClusterAuth, ClusterConnection},
        names::NamespaceName,
    },
};

mod answer;
mod cache;
mod calls;
mod check;
mod error;
pub mod kubeconfig;
mod objects;
mod pinning;
mod review;
mod transport;
mod watch;

use answer::{Answer, TOO_LARGE};
pub use cache::ClusterClients;
pub use calls::Calls;
use calls::Verb;
pub use check::{Check, CheckProblem, LackingPullSecret, MissingRight, Permission, Reviewed};
pub use error::ClusterError;
pub use objects::{AppliedSecret, Attachment, FoundNamespace, SecretContent};
pub use pinning::admit;
pub use review::{REVIEW_REMEMBERED_MAX, ReviewedServiceAccount};
use transport::Peer;
pub use watch::{Change, Interruption, Watched};

/// The field manager under which regcred's fields stand in `managedFields`.
pub const FIELD_MANAGER: &str = "regcred";

const MAX_SECRET_SIZE: usize = 1024 * 1024;
const MAX_ANSWER_SIZE: usize = 1024 * 1024;
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const USER_AGENT: &str = concat!("regcred/", env!("CARGO_PKG_VERSION"));

/// How clusters are called.
#[derive(Debug, Clone)]
pub struct ClusterClientConfig {
    /// The time after which a call is over, whatever it is waiting for.
    pub timeout: Duration,
    /// The part of it in which a connection must have come about, TLS included.
    pub connect_timeout: Duration,
    /// Where a pod finds the token and CA certificate of its `ServiceAccount`.
    pub service_account_dir: PathBuf,
    /// `KUBERNETES_SERVICE_HOST`, as every pod has it.
    pub service_host: Option<String>,
    /// `KUBERNETES_SERVICE_PORT`.
    pub service_port: Option<String>,
    /// The runtime that connections live on; without it, the runtime of whoever calls.
    ///
    /// Give it wherever callers run on several runtimes, as the workers of actix-web do: a connection would otherwise stand still while
    /// the worker that happened to open it is busy, and end with that worker under the hands of the others.
    pub runtime: Option<Handle>,
    /// What admits the addresses of clusters that users named. Without it all are.
    pub guard: Option<Guard>,
    /// Where calls are counted.
    pub calls: Calls,
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
            calls: Calls::default(),
        }
    }
}

/// A Secret to be created.
#[derive(Debug, Clone)]
pub struct NewSecret {
    /// The namespace, a DNS-1123 label.
    pub namespace: String,
    /// The name, a DNS-1123 subdomain.
    pub name: String,
    /// The type, such as `kubernetes.io/dockerconfigjson`.
    pub secret_type: String,
    /// The key of the document, such as `.dockerconfigjson`.
    pub data_key: String,
    /// The document.
    pub document: SecretString,
    /// Labels of the Secret.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the Secret.
    pub annotations: BTreeMap<String, String>,
}

/// What the API server tells of a Secret that it created; a dry run may leave out what only storing gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedSecret {
    /// Identity of the object, other after a delete and create.
    pub uid: Option<String>,
    /// Version of the object.
    pub resource_version: Option<String>,
    /// When it was created, by the clock of the API server.
    pub creation_timestamp: Option<DateTime<Utc>>,
}

/// A client for one cluster: cheap to clone, with its connections kept open between calls.
///
/// The credential lives inside kube's client for as long as this does. `Debug` tells the server alone.
#[derive(Clone)]
pub struct ClusterClient {
    client: Client,
    peer: Arc<Peer>,
    timeout: Duration,
    runtime: Option<Handle>,
    /// Where it connects to, if that is not for the host's name to say.
    pinned: Option<IpAddr>,
    calls: Calls,
    /// The name that calls are counted under.
    name: Arc<str>,
}

impl fmt::Debug for ClusterClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterClient").field("server", &self.peer.server).finish_non_exhaustive()
    }
}

impl ClusterClient {
    /// Makes a client; nothing is sent yet. Must be called within a tokio runtime, unless the settings name one.
    ///
    /// No proxy is used, whatever the environment says.
    /// In the cluster, the files of the `ServiceAccount` are read here and, since the kubelet rotates them, again every minute.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Misconfigured`] if regcred does not run in a cluster though `inCluster` says so, or the host has no trust
    /// store and no CA certificate was given.
    pub fn connect(connection: &ClusterConnection, config: &ClusterClientConfig) -> Result<Self, ClusterError> {
        Self::connect_at(connection, None, config)
    }

    /// Makes a client that connects to `pinned`, whatever the host's name means by then. The certificate has to bear the
    /// name all the same.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn connect_at(
        connection: &ClusterConnection,
        pinned: Option<IpAddr>,
        config: &ClusterClientConfig,
    ) -> Result<Self, ClusterError> {
        let (mut kube_config, peer) = match &connection.server {
            Some(server) => {
                let mut kube_config = Config::new(to_uri(server.as_str())?);
                if let Some(address) = pinned {
                    pinning::pin(&mut kube_config, server.is_https(), address)?;
                }
                kube_config.root_cert = match &connection.ca_certificate {
                    Some(ca) => Some(ca.as_der().map(<[u8]>::to_vec).collect()),
                    // Without TLS no trust store is needed, and none may be there to load.
                    None if !server.is_https() => Some(Vec::new()),
                    None => None,
                };
                if connection.tls_server_name.is_some() {
                    kube_config.tls_server_name.clone_from(&connection.tls_server_name);
                }
                let peer = Peer {
                    server: server.to_string(),
                    expected_name: connection.tls_server_name.clone().unwrap_or_else(|| server.host().to_owned()),
                    own_ca: connection.ca_certificate.is_some(),
                };
                (kube_config, peer)
            }
            None => in_cluster(config)?,
        };
        match &connection.auth {
            ClusterAuth::Token { token } => kube_config.auth_info.token = Some(token.clone()),
            ClusterAuth::ClientCertificate { certificate, key } => {
                kube_config.auth_info = AuthInfo {
                    client_certificate_data: Some(STANDARD.encode(certificate)),
                    client_key_data: Some(STANDARD.encode(key.expose_secret()).into()),
                    ..AuthInfo::default()
                };
            }
            ClusterAuth::InCluster | ClusterAuth::None => {}
        }
        kube_config.connect_timeout = Some(config.connect_timeout.min(config.timeout));
        // A repeated POST could meet its own first try as a 409; and waiting is up to the caller.
        kube_config.default_retry = false;
        kube_config.headers.push((header::USER_AGENT, HeaderValue::from_static(USER_AGENT)));
        let _runtime = config.runtime.as_ref().map(Handle::enter);
        let client = Client::try_from(kube_config).map_err(|_| ClusterError::Misconfigured {
            detail: format!(
                "TLS for {} cannot be set up: the CA or client certificate, or the host's trust store, is unusable",
                peer.server
            ),
        })?;
        Ok(Self {
            client,
            peer: Arc::new(peer),
            timeout: config.timeout,
            runtime: config.runtime.clone(),
            pinned,
            calls: config.calls.clone(),
            name: Arc::from("unnamed"),
        })
    }

    /// The same client, whose calls are counted under this name of a cluster.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: Arc::from(name), ..self }
    }

    /// Whether it connects to one of these addresses, where it was told to which.
    #[must_use]
    pub fn is_at(&self, addresses: &[IpAddr]) -> bool {
        self.pinned.is_none_or(|pinned| addresses.contains(&pinned))
    }

    /// The API server's URL.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.peer.server
    }

    /// Creates a Secret by one POST, which is never repeated.
    ///
    /// After a [`ClusterError::Timeout`] or [`ClusterError::Unreachable`] the Secret may exist all the same: asking again then gives
    /// [`ClusterError::SecretExists`]. With `dry_run` the API server checks everything and stores nothing. Only a 403 costs a second
    /// call, which finds out whether the right is missing or a policy of the cluster refused.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(
        name = "cluster.create_secret",
        skip_all,
        fields(server = %self.peer.server, namespace = %secret.namespace, secret = %secret.name, dry_run)
    )]
    pub async fn create_secret(&self, secret: &NewSecret, dry_run: bool) -> Result<CreatedSecret, ClusterError> {
        let deadline = Instant::now() + self.timeout;
        let answer = self.call(create_request(secret, dry_run)?, deadline).await?;
        if answer.is_success() {
            return self.created(&answer);
        }
        let failure = answer.create_failure(&self.peer.server, &secret.namespace);
        Err(self.tell_policy_from_right(failure, &secret.namespace, deadline).await)
    }

    /// A 403 may be a missing right, a quota or a policy: the cluster itself is asked which.
    async fn tell_policy_from_right(&self, failure: ClusterError, namespace: &str, deadline: Instant) -> ClusterError {
        if matches!(failure, ClusterError::Forbidden { .. })
            && self.may("create", "secrets", Some(namespace), deadline).await == Ok(true)
        {
            return ClusterError::Refused {
                detail: format!(
                    "the cluster refused the Secret though regcred may create Secrets in namespace {namespace}: a quota or a policy is in the way"
                ),
            };
        }
        failure
    }

    fn created(&self, answer: &Answer) -> Result<CreatedSecret, ClusterError> {
        let object: Option<CreatedObject> = answer.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
        object.map(|object| object.metadata).ok_or_else(|| ClusterError::Unreachable {
            detail: format!(
                "{} answered {}, but the rest of its answer cannot be read: the Secret may exist now",
                self.peer.server, answer.status
            ),
        })
    }

    /// Sends one request and reads the answer, both until `deadline`.
    async fn call(&self, request: Request<Vec<u8>>, deadline: Instant) -> Result<Answer, ClusterError> {
        let Some(runtime) = self.runtime.as_ref().filter(|runtime| !is_here(runtime)) else {
            return self.exchange(request, deadline).await;
        };
        let client = self.clone();
        let exchange = async move { client.exchange(request, deadline).await }.in_current_span();
        runtime.spawn(exchange).await.unwrap_or_else(|_| {
            let detail = format!("the call to {} was given up, since regcred is shutting down", self.peer.server);
            Err(ClusterError::Unreachable { detail })
        })
    }

    async fn exchange(&self, request: Request<Vec<u8>>, deadline: Instant) -> Result<Answer, ClusterError> {
        let verb = Verb::of(&request);
        let answer = self.exchange_uncounted(request, deadline).await;
        self.calls.count(&self.name, verb, answer.as_ref().map(|answer| answer.status));
        answer
    }

    async fn exchange_uncounted(&self, request: Request<Vec<u8>>, deadline: Instant) -> Result<Answer, ClusterError> {
        let sent = timeout_at(deadline, self.client.send(request.map(Body::from))).await;
        let response = sent.map_err(|_| self.timed_out())?.map_err(|error| self.peer.explain(&error))?;
        let (head, body) = response.into_parts();
        let body = match timeout_at(deadline, read_body(body)).await {
            Ok(body) => body,
            // Only a success needs its body; any other status speaks for itself.
            Err(_) if head.status.is_success() => return Err(self.timed_out()),
            Err(_) => None,
        };
        Ok(Answer { status: head.status.as_u16(), retry_after: retry_after(&head.headers), body })
    }

    fn timed_out(&self) -> ClusterError {
        ClusterError::Timeout {
            detail: format!("{} gave no answer within {} ms", self.peer.server, self.timeout.as_millis()),
        }
    }
}

/// Whether this runs on that runtime already: then a task of its own is a detour.
fn is_here(runtime: &Handle) -> bool {
    Handle::try_current().is_ok_and(|here| here.id() == runtime.id())
}

/// The longest that an overloaded API server is left alone because it asks for it. It is not always right, and not always ours.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);

/// When an API server asks to come back. It says it in seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let asked = headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)?;
    Some(asked.min(RETRY_AFTER_MAX))
}

/// Reads a body whole, or gives none if it breaks off or is longer than any answer we ask for.
async fn read_body(body: Body) -> Option<Vec<u8>> {
    Limited::new(body, MAX_ANSWER_SIZE).collect().await.ok().map(|body| body.to_bytes().to_vec())
}

#[derive(Deserialize)]
struct CreatedObject {
    metadata: CreatedSecret,
}

impl<'de> Deserialize<'de> for CreatedSecret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            // The API server always gives the name back: its absence means that something else answered.
            #[serde(rename = "name")]
            _name: String,
            uid: Option<String>,
            resource_version: Option<String>,
            creation_timestamp: Option<DateTime<Utc>>,
        }
        let Metadata { uid, resource_version, creation_timestamp, .. } = Metadata::deserialize(deserializer)?;
        Ok(Self { uid, resource_version, creation_timestamp })
    }
}

fn create_request(secret: &NewSecret, dry_run: bool) -> Result<Request<Vec<u8>>, ClusterError> {
    let invalid = |field: &str, detail: &str| ClusterError::InvalidSecret {
        field: Some(field.to_owned()),
        detail: detail.to_owned(),
    };
    // The namespace becomes part of the path, so nothing else may pass, whoever calls.
    if NamespaceName::parse(&secret.namespace).is_err() {
        return Err(invalid("metadata.namespace", "the namespace must be a DNS label"));
    }
    if secret.document.expose_secret().len() > MAX_SECRET_SIZE {
        return Err(invalid("data", TOO_LARGE));
    }
    let object = Secret {
        metadata: ObjectMeta {
            name: Some(secret.name.clone()),
            namespace: Some(secret.namespace.clone()),
            labels: Some(secret.labels.clone()).filter(|labels| !labels.is_empty()),
            annotations: Some(secret.annotations.clone()).filter(|annotations| !annotations.is_empty()),
            ..ObjectMeta::default()
        },
        type_: Some(secret.secret_type.clone()),
        data: Some(BTreeMap::from([(
            secret.data_key.clone(),
            ByteString(secret.document.expose_secret().as_bytes().to_vec()),
        )])),
        ..Secret::default()
    };
    let params = PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
    let path = Secret::url_path(&(), Some(&secret.namespace));
    let mut request = post(path, &params, &object)?;
    request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY));
    Ok(request)
}

fn post(path: String, params: &PostParams, object: &impl serde::Serialize) -> Result<Request<Vec<u8>>, ClusterError> {
    let body = serde_json::to_vec(object).map_err(|_| unbuildable())?;
    kube::core::Request::new(path).create(params, body).map_err(|_| unbuildable())
}

fn unbuildable() -> ClusterError {
    ClusterError::Misconfigured { detail: "the request to the cluster cannot be put together".to_owned() }
}

fn to_uri(server: &str) -> Result<http::Uri, ClusterError> {
    server
        .parse()
        .map_err(|_| ClusterError::Misconfigured { detail: "the URL of the cluster cannot be used".to_owned() })
}

/// The configuration that the kubelet gives to every pod.
fn in_cluster(config: &ClusterClientConfig) -> Result<(Config, Peer), ClusterError> {
    let missing = |detail: &str| ClusterError::Misconfigured { detail: detail.to_owned() };
    let (Some(host), Some(port)) = (&config.service_host, &config.service_port) else {
        return Err(missing(
            "regcred does not run in a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set",
        ));
    };
    let port: u16 = port.parse().map_err(|_| missing("KUBERNETES_SERVICE_PORT is not a port"))?;
    let server = if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") };

    let ca_file = config.service_account_dir.join("ca.crt");
    let ca = std::fs::read_to_string(&ca_file).map_err(|_| missing("the ServiceAccount's ca.crt cannot be read"))?;
    let ca =
        CaCertificate::parse(&ca).map_err(|_| missing("the ServiceAccount's ca.crt holds no usable certificate"))?;
    let token_file = config.service_account_dir.join("token");
    let token: SecretString =
        std::fs::read_to_string(&token_file).map_err(|_| missing("the ServiceAccount's token cannot be read"))?.into();
    if token.expose_secret().is_empty() || !token.expose_secret().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(missing("the ServiceAccount's token is not one line of visible ASCII characters"));
    }
    let token_file = token_file
        .into_os_string()
        .into_string()
        .map_err(|_| missing("the ServiceAccount's folder has no UTF-8 name"))?;

    let mut config = Config::new(to_uri(&server)?);
    config.root_cert = Some(ca.as_der().map(<[u8]>::to_vec).collect());
    config.root_cert_file = Some(ca_file);
    config.auth_info.token_file = Some(token_file);
    Ok((config, Peer { expected_name: host.clone(), server, own_ca: true }))
}
