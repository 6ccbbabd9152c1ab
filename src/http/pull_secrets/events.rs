//! `/v1/pull-secrets/{name}/events`: status changes of a pull secret as server-sent events.

use std::{fmt::Write, sync::Arc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse, get,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        caller::{Identity, Permission},
        names::Name,
    },
    http::{
        auth::{Caller, permission::ReadPullSecrets},
        event_stream::{self, Chunk, End, EventSource},
        path_name,
        problem::ApiError,
        pull_secrets::{KIND, PullSecretStatus},
    },
    service::{
        ServiceError,
        progress::{Streams, Subscription},
        pull_secrets::ShownPullSecret,
    },
};

/// Minimum time between two reads of the status, so that a fan-out to thousands of targets is a few
/// events.
const PAUSE: Duration = Duration::from_millis(500);
/// Pause after a read, as a multiple of its duration, up to `PAUSE_MAX`.
const PAUSE_PER_READ: u32 = 10;
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Interval of reads without a notification, before and after the pull secret has settled.
const POLL: Duration = Duration::from_secs(2);
const POLL_SETTLED: Duration = Duration::from_secs(10);

/// Progress of a pull secret: the data of a `status` event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretProgress {
    /// Immutable identifier.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Version of the declaration, incremented by every change.
    version: i64,
    /// Generation of the desired state.
    generation: i64,
    /// Generation that all targets have reached.
    observed_generation: i64,
    /// Number of targets by state, and selected accounts that are not in the document.
    status: PullSecretStatus,
    /// Whether every target was attempted since the last change: it is synced, failed or in
    /// conflict.
    settled: bool,
    /// Time of deletion.
    deleted_at: Option<DateTime<Utc>>,
}

impl From<ShownPullSecret> for PullSecretProgress {
    fn from(mut shown: ShownPullSecret) -> Self {
        let settled = shown.is_settled();
        let status = PullSecretStatus::of(&mut shown);
        Self {
            id: shown.stored.id,
            name: shown.stored.name.to_string(),
            version: shown.stored.version,
            generation: shown.stored.generation,
            observed_generation: shown.counts.observed_generation,
            status,
            settled,
            deleted_at: shown.stored.deleted_at,
        }
    }
}

impl PullSecretProgress {
    /// Identifier derived from the content: events with the same id have the same content.
    fn event_id(&self) -> String {
        let PullSecretStatus { synced, pending, failed, conflict, removing, left_out, warnings, .. } = &self.status;
        let mut id = format!(
            "{}.{}.{}-{synced}.{pending}.{failed}.{conflict}.{removing}-{}",
            self.version,
            self.generation,
            self.observed_generation,
            u8::from(self.settled)
        );
        if !left_out.is_empty() {
            let names: Vec<&str> = left_out.iter().map(|one| one.account.as_str()).collect();
            let _ = write!(id, "-{:08x}", crc32fast::hash(names.join(" ").as_bytes()));
        }
        if !warnings.is_empty() {
            let details: Vec<&str> = warnings.iter().map(|one| one.detail.as_str()).collect();
            let _ = write!(id, "-w{:08x}", crc32fast::hash(details.join(" ").as_bytes()));
        }
        id
    }

    fn chunk(&self) -> Result<Chunk, serde_json::Error> {
        let mut chunk = Chunk::default();
        chunk.push(&self.event_id(), "status", &serde_json::to_string(self)?);
        Ok(chunk)
    }
}

/// Stream the status of a pull secret as server-sent events.
///
/// Sends a `status` event immediately, and then one for every change, at most two per second.
/// `settled` is true once every target was attempted. The id of an event is derived from its
/// content. A comment is sent every 15 seconds. The last event is `end` with a reason: `gone`,
/// `unauthenticated`, or one that allows the client to reconnect: `unavailable`, `stopping`,
/// `renew` (after an hour).
#[utoipa::path(
    tag = "pull-secrets",
    params(("name" = String, Path, description = "Name of the pull secret")),
    responses((status = OK, description = "Events. `PullSecretProgress` is the data of `status` events", content(
        (PullSecretProgress = "text/event-stream"),
    ))),
)]
#[get("/pull-secrets/{name}/events")]
pub async fn get_pull_secret_events(
    caller: Caller<ReadPullSecrets>,
    streams: Data<Streams>,
    path: Path<String>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let (caller, streams) = (&caller.identity.identity, streams.into_inner());
    let name = path_name(KIND, &path)?;
    let found = streams.find(caller, &name).await?;
    let permit = streams.admit(&caller.actor)?;
    let progress = streams.subscribe(found.stored.id);
    // Read again: a change before the subscription was not notified.
    let reading = Instant::now();
    let last = PullSecretProgress::from(streams.find(caller, &name).await?);
    let read_at = Instant::now();
    let first = last.chunk().map_err(|error| ApiError::Internal(error.into()))?;
    let source = ProgressSource { streams, name, progress, last, pause: pause_after(read_at - reading), read_at };
    event_stream::respond(&request, caller, permit, source, first)
}

/// Status changes of a pull secret.
struct ProgressSource {
    streams: Arc<Streams>,
    name: Name,
    progress: Subscription,
    /// Status that was sent last.
    last: PullSecretProgress,
    pause: Duration,
    read_at: Instant,
}

impl EventSource for ProgressSource {
    fn is_open_to(&self, caller: &Identity) -> bool {
        caller.may(Permission::ReadPullSecrets)
    }

    async fn changed(&mut self) {
        sleep_until(self.read_at + self.pause).await;
        let poll = if self.last.settled { POLL_SETTLED } else { POLL };
        tokio::select! {
            () = self.progress.next() => {}
            () = sleep_until(self.read_at + poll) => {}
        }
    }

    /// Reads the status. Returns an event if it differs from the last one.
    async fn read(&mut self, caller: &Arc<Identity>) -> Result<Option<Chunk>, End> {
        let reading = Instant::now();
        let found = self.streams.find(caller, &self.name).await;
        self.read_at = Instant::now();
        self.pause = pause_after(self.read_at - reading);
        let progress = match found {
            // A pull secret that was recreated under the name has another id.
            Ok(found) if found.stored.id == self.last.id => PullSecretProgress::from(found),
            Ok(_) | Err(ServiceError::NotFound { .. } | ServiceError::Hidden { .. }) => return Err(End::Gone),
            Err(error) => {
                tracing::warn!(%error, "pull secret status unavailable, event stream ends");
                return Err(End::Unavailable);
            }
        };
        if progress == self.last {
            return Ok(None);
        }
        let chunk = progress.chunk().map_err(|_| End::Unavailable)?;
        self.last = progress;
        Ok(Some(chunk))
    }

    /// None: the first event of every stream has the present status.
    fn place(&self) -> Option<String> {
        None
    }
}

fn pause_after(read: Duration) -> Duration {
    (read * PAUSE_PER_READ).clamp(PAUSE, PAUSE_MAX)
}
