//! Watches: an API server tells what changes. Metadata only.
//!
//! A watch begins with everything that is there, so nothing that changed before it is missed, and no version has to be
//! remembered between two of them. Each ends by itself after some minutes.

use std::time::Duration;

use http::{HeaderValue, Request, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde::Deserialize;
use tokio::{sync::mpsc, time::timeout};
use uuid::Uuid;

use super::{ClusterClient, ClusterError, METADATA_ONLY, answer::Answer, objects::Metadata, unbuildable};
use crate::domain::pull_secret::ID_LABEL;

/// When the API server ends a watch by itself.
const SECONDS: u64 = 240;
/// When it is given up that did not end.
const GIVEN_UP: Duration = Duration::from_secs(SECONDS + 30);
/// The longest event: metadata is bounded by less.
const EVENT_MAX: usize = 1024 * 1024;

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watched {
    /// All namespaces.
    Namespaces,
    /// The Secrets of all pull secrets, in all namespaces.
    Secrets,
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
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    event_type: String,
    object: Object,
}

#[derive(Deserialize)]
struct Object {
    // An event that says that the watch is over brings a status in place of an object, and a bookmark has no name.
    #[serde(default)]
    metadata: serde_json::Value,
}

impl ClusterClient {
    /// Watches until the API server ends it. Changes go to `changes`.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    pub async fn watch(&self, watched: Watched, changes: &mpsc::Sender<Change>) -> Result<(), ClusterError> {
        let (path, objects) = match watched {
            Watched::Namespaces => ("/api/v1/namespaces?".to_owned(), "namespaces"),
            Watched::Secrets => (
                format!("/api/v1/secrets?labelSelector={}&", ID_LABEL.replace('/', "%2F")),
                "Secrets of the whole cluster",
            ),
        };
        let path = format!("{path}watch=1&allowWatchBookmarks=true&timeoutSeconds={SECONDS}");
        let request = Request::get(path)
            .header(header::ACCEPT, HeaderValue::from_static(METADATA_ONLY))
            .body(Vec::new())
            .map_err(|_| unbuildable())?;
        let sent = timeout(self.timeout, self.client.send(request.map(Body::from))).await;
        let response = sent.map_err(|_| self.timed_out())?.map_err(|error| self.peer.explain(&error))?;
        let (head, body) = response.into_parts();
        let answer = Answer { status: head.status.as_u16(), retry_after: None, body: None };
        match answer.status {
            _ if answer.is_success() => {}
            403 => {
                let detail = format!("regcred's credential for the cluster may not watch {objects} (403)");
                return Err(ClusterError::Forbidden { detail });
            }
            _ => return Err(answer.failure(self.server())),
        }
        // One that hangs is no reason to complain: it begins anew.
        timeout(GIVEN_UP, self.follow(body, changes)).await.unwrap_or(Ok(()))
    }

    async fn follow(&self, mut body: Body, changes: &mpsc::Sender<Change>) -> Result<(), ClusterError> {
        let broken = || ClusterError::Unreachable { detail: format!("{} broke off a watch", self.server()) };
        let mut line: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| broken())?.into_data() else { continue };
            for part in data.split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(part);
                if line.len() > EVENT_MAX {
                    return Err(broken());
                }
                if part.ends_with(b"\n") {
                    let event: Event = serde_json::from_slice(&line).map_err(|_| broken())?;
                    line.clear();
                    if event.event_type == "ERROR" {
                        return Err(broken());
                    }
                    // Whoever follows the changes may have gone: then so does this.
                    if let Some(change) = change(event)
                        && changes.send(change).await.is_err()
                    {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

/// What an event is about; none for bookmarks.
fn change(event: Event) -> Option<Change> {
    let is_deleted = event.event_type == "DELETED";
    if !is_deleted && !["ADDED", "MODIFIED"].contains(&event.event_type.as_str()) {
        return None;
    }
    let metadata: Metadata = serde_json::from_value(event.object.metadata).ok()?;
    match metadata.namespace {
        None => Some(Change::Namespace(metadata.name)),
        Some(namespace) => Some(Change::Secret {
            namespace,
            pull_secret_id: metadata.labels.get(ID_LABEL)?.parse().ok()?,
            resource_version: metadata.resource_version.filter(|_| !is_deleted),
        }),
    }
}
