//! Watches: an API server tells what is there, and then what changes. Metadata only.
//!
//! kube's runtime keeps a watch going: one that ends, as each does after some minutes, or breaks off is resumed at the last version
//! that was heard of, bookmarks included; one that the API server cannot resume any more (410) begins anew with everything
//! that is there. Nothing that an API server writes reaches log or error, as for every other call: kube's own log lines are
//! switched off (`telemetry.rs`), and of its errors only the kind and the status count.

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

use super::{ClusterClient, ClusterError, Verb, answer::Answer, retry_after};
use crate::domain::pull_secret::ID_LABEL;

/// When the API server ends a watch by itself, to be resumed.
const SECONDS: u32 = 240;
/// When a list or a watch is given up that did not end.
const GIVEN_UP: Duration = Duration::from_secs(SECONDS as u64 + 30);
/// The most that one list or one watch may bring: the metadata of tens of thousands of objects. One that brings more is
/// broken off, and a watch resumed.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Watched {
    /// All namespaces.
    Namespaces,
    /// The Secrets of all pull secrets, in all namespaces.
    Secrets,
}

impl Watched {
    /// Its name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Secrets => "secrets",
        }
    }
}

/// Something is there, was changed or was deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A namespace.
    Namespace(String),
    /// A Secret with the label of a pull secret.
    Secret {
        /// Its namespace.
        namespace: String,
        /// The pull secret.
        pull_secret_id: Uuid,
        /// Its version; none if it was deleted.
        resource_version: Option<String>,
    },
    /// The watch began, or began anew, and these are all Secrets that were there: pull secret and namespace of each. Any other
    /// has gone, maybe while nobody watched.
    AllSecrets(Vec<(Uuid, String)>),
}

/// Why a watch was interrupted.
#[derive(Debug)]
pub enum Interruption {
    /// It broke off, or has to begin anew; it goes on by itself.
    Broken,
    /// It cannot be begun; polled again, it tries again.
    Refused(ClusterError),
}

/// Events, as kube's runtime tells them.
type Watch<K> = stream::BoxStream<'static, watcher::Result<Event<PartialObjectMeta<K>>>>;

impl ClusterClient {
    /// Watches for as long as it is polled. After an interruption it waits a while, longer with each in a row, up to 30 s.
    #[must_use]
    pub fn watch(&self, watched: Watched) -> stream::BoxStream<'static, Result<Change, Interruption>> {
        let config = watcher::Config::default().timeout(SECONDS);
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
                let interruption = this.interruption(&error);
                // A right that is missing is nothing that broke.
                if !matches!(interruption, Interruption::Refused(ClusterError::Forbidden { .. })) {
                    this.calls.count_watch_restart(&this.name, watched);
                }
                Some(Err(interruption))
            }
        });
        changes.filter_map(future::ready).boxed()
    }

    fn interruption(&self, error: &watcher::Error) -> Interruption {
        match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
                let answer = Answer { status: status.code, retry_after: None, body: None };
                Interruption::Refused(answer.failure(self.server()))
            }
            watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => {
                Interruption::Refused(self.peer.explain(error))
            }
            watcher::Error::WatchError(_) | watcher::Error::WatchFailed(_) | watcher::Error::NoResourceVersion => {
                Interruption::Broken
            }
        }
    }

    /// The same client for watches: an answer begins within the time of a call, and is bounded in length and time.
    fn bounded(&self) -> Client {
        let this = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let this = this.clone();
            async move {
                let verb = Verb::of(&request);
                let answered = timeout(this.timeout, this.client.send(request)).await;
                let answered = answered.map_err(|_| BoxError::from(io::Error::from(io::ErrorKind::TimedOut)));
                let response = answered.and_then(|answered| answered.map_err(BoxError::from));
                let explained = response.as_ref().map(|response| response.status().as_u16());
                let explained = explained.map_err(|error| this.peer.explain(error.as_ref()));
                this.calls.count(&this.name, verb, explained.as_ref().copied());
                let response = response?;
                if let (StatusCode::TOO_MANY_REQUESTS, Some(asked)) =
                    (response.status(), retry_after(response.headers()))
                {
                    sleep(asked).await;
                }
                Ok::<_, BoxError>(response.map(|body| {
                    Limited::new(StreamBody::new(BodyStream::new(body).take_until(sleep(GIVEN_UP))), ANSWER_MAX)
                }))
            }
        });
        Client::new(service, "default")
    }
}

/// What an event is about; `listed` gathers what was there at the beginning.
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

/// None where somebody wrote something else into the label.
fn key(secret: &PartialObjectMeta<Secret>) -> Option<(Uuid, String)> {
    Some((secret.labels().get(ID_LABEL)?.parse().ok()?, secret.namespace()?))
}
