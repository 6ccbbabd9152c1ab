//! Watches of namespaces and Secrets, metadata only.
//!
//! kube's runtime resumes a watch that ended at the last known version, including bookmarks. If the
//! API server cannot resume it (410), the watch starts over with a list. As for every other call,
//! nothing that an API server sent reaches a log or an error: kube's own log lines are disabled
//! (`telemetry.rs`), and only kind and status of its errors are used.

use std::{io, time::Duration};

use futures_util::{StreamExt, future, stream};
use http::{Request, StatusCode};
use http_body_util::{BodyStream, Limited, StreamBody};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::{
    Api, Client, ResourceExt,
    client::Body,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::time::{sleep, timeout};
use tower::{BoxError, service_fn};
use uuid::Uuid;

use super::{ClusterClient, ClusterError, Verb, response::Response, retry_after};
use crate::domain::pull_secret::ID_LABEL;

/// Time after which the API server ends a watch, in seconds.
const WATCH_SECONDS: u32 = 240;
/// Time after which a list or watch that did not end is aborted.
const ABORT_AFTER: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 30);
/// Maximum length of one list or watch, in bytes: the metadata of tens of thousands of objects. A
/// longer one is aborted.
const BODY_MAX: usize = 64 * 1024 * 1024;

/// Kind of watched objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Watched {
    /// All namespaces.
    Namespaces,
    /// Secrets of pull secrets in all namespaces.
    Secrets,
}

impl Watched {
    /// Name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Secrets => "secrets",
        }
    }
}

/// Event of a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A namespace was added, changed or deleted.
    Namespace(String),
    /// A Secret with the label of a pull secret was added, changed or deleted.
    Secret {
        /// Namespace.
        namespace: String,
        /// Pull secret in the label.
        pull_secret_id: Uuid,
        /// Version; none after deletion.
        resource_version: Option<String>,
    },
    /// End of the initial list: pull secret and namespace of every existing Secret. All others were
    /// deleted, possibly while no watch was active.
    AllSecrets(Vec<(Uuid, String)>),
}

/// Interruption of a watch.
#[derive(Debug)]
pub enum Interruption {
    /// The watch ended early or starts over. It continues by itself.
    Broken,
    /// The watch could not be started. Polling it again retries.
    Refused(ClusterError),
}

/// Events of kube's runtime.
type Watch<K> = stream::BoxStream<'static, watcher::Result<Event<PartialObjectMeta<K>>>>;

impl ClusterClient {
    /// Watches objects while the stream is polled. After interruptions it waits with exponential
    /// backoff, up to 30 s.
    #[must_use]
    pub fn watch(&self, watched: Watched) -> stream::BoxStream<'static, Result<Change, Interruption>> {
        let config = watcher::Config::default().timeout(WATCH_SECONDS);
        match watched {
            Watched::Namespaces => self.changes(watched, self.follow::<Namespace>(config), |event| match event {
                Event::Apply(one) | Event::InitApply(one) | Event::Delete(one) => {
                    Some(Change::Namespace(one.name_any()))
                }
                Event::Init | Event::InitDone => None,
            }),
            Watched::Secrets => {
                let mut listed = Vec::new();
                let events = self.follow::<Secret>(config.labels(ID_LABEL));
                self.changes(watched, events, move |event| secret_change(event, &mut listed))
            }
        }
    }

    fn follow<K>(&self, config: watcher::Config) -> Watch<K>
    where
        K: kube::Resource<DynamicType = ()> + 'static,
        PartialObjectMeta<K>:
            kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send,
    {
        watcher(Api::<PartialObjectMeta<K>>::all(self.bounded()), config).default_backoff().boxed()
    }

    fn changes<K: 'static>(
        &self,
        watched: Watched,
        events: Watch<K>,
        mut change: impl FnMut(Event<PartialObjectMeta<K>>) -> Option<Change> + Send + 'static,
    ) -> stream::BoxStream<'static, Result<Change, Interruption>> {
        let this = self.clone();
        let changes = events.map(move |event| match event {
            Ok(event) => change(event).map(Ok),
            Err(error) => {
                let interruption = this.interruption(watched, &error);
                // A missing right is not a restart.
                if !matches!(interruption, Interruption::Refused(ClusterError::Forbidden { .. })) {
                    this.metrics.count_watch_restart(&this.name, watched);
                }
                Some(Err(interruption))
            }
        });
        changes.filter_map(future::ready).boxed()
    }

    fn interruption(&self, watched: Watched, error: &watcher::Error) -> Interruption {
        match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
                let response = Response { status: status.code, retry_after: None, body: None };
                Interruption::Refused(response.error(self.server(), &format!("list and watch {}", watched.as_str())))
            }
            watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => {
                Interruption::Refused(ClusterError::from_transport(&self.peer, error))
            }
            watcher::Error::WatchError(_) | watcher::Error::WatchFailed(_) | watcher::Error::NoResourceVersion => {
                Interruption::Broken
            }
        }
    }

    /// kube client for watches. The head of a response must arrive within the time limit of a call;
    /// its body has a limit in length and time of its own.
    fn bounded(&self) -> Client {
        let this = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let this = this.clone();
            async move {
                let verb = Verb::of(&request);
                let sent = timeout(this.timeout, this.client.send(request)).await;
                let sent = sent.map_err(|_| BoxError::from(io::Error::from(io::ErrorKind::TimedOut)));
                let response = sent.and_then(|sent| sent.map_err(BoxError::from));
                let status = response.as_ref().map(|response| response.status().as_u16());
                let status = status.map_err(|error| ClusterError::from_transport(&this.peer, error.as_ref()));
                this.metrics.count_call(&this.name, verb, status.as_ref().copied());
                let response = response?;
                if let (StatusCode::TOO_MANY_REQUESTS, Some(delay)) =
                    (response.status(), retry_after(response.headers()))
                {
                    sleep(delay).await;
                }
                Ok::<_, BoxError>(response.map(|body| {
                    Limited::new(StreamBody::new(BodyStream::new(body).take_until(sleep(ABORT_AFTER))), BODY_MAX)
                }))
            }
        });
        Client::new(service, "default")
    }
}

/// Maps an event of kube's runtime. `listed` collects the initial list.
fn secret_change(event: Event<PartialObjectMeta<Secret>>, listed: &mut Vec<(Uuid, String)>) -> Option<Change> {
    match event {
        Event::Init => {
            listed.clear();
            None
        }
        Event::InitApply(one) => {
            let (pull_secret_id, namespace) = key(&one)?;
            listed.push((pull_secret_id, namespace.clone()));
            Some(Change::Secret { namespace, pull_secret_id, resource_version: one.resource_version() })
        }
        Event::InitDone => Some(Change::AllSecrets(std::mem::take(listed))),
        Event::Apply(one) => {
            let (pull_secret_id, namespace) = key(&one)?;
            Some(Change::Secret { namespace, pull_secret_id, resource_version: one.resource_version() })
        }
        Event::Delete(one) => {
            let (pull_secret_id, namespace) = key(&one)?;
            Some(Change::Secret { namespace, pull_secret_id, resource_version: None })
        }
    }
}

/// Pull secret and namespace of a Secret. None if the label is not an id.
fn key(secret: &PartialObjectMeta<Secret>) -> Option<(Uuid, String)> {
    Some((secret.labels().get(ID_LABEL)?.parse().ok()?, secret.namespace()?))
}
