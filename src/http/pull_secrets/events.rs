//! `/v1/pull-secrets/{name}/events`: status changes of a pull secret as server-sent events.

use std::{convert::Infallible, fmt::Write, sync::Arc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse, get,
    web::{Bytes, Data, Path},
};
use chrono::{DateTime, Utc};
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};
use tracing::Span;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::{
        caller::{Identity, Permission},
        names::Name,
    },
    http::{
        auth::{Caller, PresentedCredential, Reauthentication, permission::ReadPullSecrets},
        connection::StreamGuard,
        path_name,
        problem::ApiError,
        pull_secrets::{KIND, PullSecretStatus},
    },
    service::{
        ServiceError,
        progress::{StreamPermit, Streams, Subscription},
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
/// Interval of comments, so that proxies do not close an idle connection.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Maximum age of the caller's authentication, and its maximum age when a status is sent.
const AUTHENTICATED_FOR: Duration = Duration::from_secs(5);
const AUTHENTICATED_FOR_STATUS: Duration = Duration::from_secs(1);
/// Maximum lifetime of a stream. `EventSource` opens another one by itself.
const LIFETIME: Duration = Duration::from_hours(1);
/// Time after which a client reconnects.
const RETRY_MILLIS: u64 = 2_000;

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
    fn from(shown: ShownPullSecret) -> Self {
        let settled = shown.is_settled();
        Self {
            id: shown.stored.id,
            name: shown.stored.name.to_string(),
            version: shown.stored.version,
            generation: shown.stored.generation,
            observed_generation: shown.counts.observed_generation,
            status: PullSecretStatus::new(shown.counts, shown.left_out),
            settled,
            deleted_at: shown.stored.deleted_at,
        }
    }
}

impl PullSecretProgress {
    /// Identifier derived from the content: events with the same id have the same content.
    fn event_id(&self) -> String {
        let PullSecretStatus { synced, pending, failed, conflict, removing, left_out, .. } = &self.status;
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
        id
    }

    fn event(&self) -> Result<Bytes, serde_json::Error> {
        let data = serde_json::to_string(self)?;
        Ok(format!("id: {}\nevent: status\ndata: {data}\n\n", self.event_id()).into())
    }
}

/// Reason why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The pull secret no longer exists, or the caller may no longer see it.
    Gone,
    /// The caller's credential is no longer valid or lacks the permission.
    Unauthenticated,
    /// The status cannot be read.
    Unavailable,
    /// The process stops.
    Stopping,
    /// The stream reached its maximum lifetime.
    Renew,
}

impl End {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Unauthenticated => "unauthenticated",
            Self::Unavailable => "unavailable",
            Self::Stopping => "stopping",
            Self::Renew => "renew",
        }
    }

    fn event(self) -> Bytes {
        format!("event: end\ndata: {{\"reason\":\"{}\"}}\n\n", self.as_str()).into()
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
    let name = path_name(KIND, &path)?;
    let events = EventStream::open(&caller.identity.identity, streams.into_inner(), name, &request).await?;
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        // Disables buffering in nginx.
        .insert_header(("X-Accel-Buffering", "no"))
        .force_close()
        .streaming(events.into_stream()))
}

/// An open event stream.
struct EventStream {
    streams: Arc<Streams>,
    credential: PresentedCredential,
    identity: Arc<Identity>,
    name: Name,
    news: Subscription,
    first: Option<Bytes>,
    /// Status that was sent last.
    last: PullSecretProgress,
    pause: Duration,
    opened_at: Instant,
    read_at: Instant,
    sent_at: Instant,
    authenticated_at: Instant,
    /// Number of events sent.
    sent: u64,
    end: Option<End>,
    span: Span,
    _place: StreamPermit,
    _guard: StreamGuard,
}

/// Next action of a stream.
enum Next {
    Read,
    Authenticate,
    Heartbeat,
    End(End),
}

impl EventStream {
    async fn open(
        identity: &Arc<Identity>,
        streams: Arc<Streams>,
        name: Name,
        request: &HttpRequest,
    ) -> Result<Self, ApiError> {
        let found = streams.find(identity, &name).await?;
        let place = streams.admit(&identity.actor)?;
        let news = streams.subscribe(found.stored.id);
        // Read again: a change before the subscription was not notified.
        let reading = Instant::now();
        let last = PullSecretProgress::from(streams.find(identity, &name).await?);
        let now = Instant::now();
        let event = last.event().map_err(|error| ApiError::Internal(error.into()))?;
        let first = [format!("retry: {RETRY_MILLIS}\n").as_bytes(), &event[..]].concat();
        Ok(Self {
            streams,
            credential: PresentedCredential::of(request)?,
            identity: Arc::clone(identity),
            name,
            news,
            first: Some(first.into()),
            last,
            pause: pause_after(now - reading),
            opened_at: now,
            read_at: now,
            sent_at: now,
            authenticated_at: now,
            sent: 0,
            end: None,
            span: Span::current(),
            _place: place,
            _guard: StreamGuard::begin(request).ok_or(ApiError::BadRequest)?,
        })
    }

    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut events| async move {
            let bytes = events.next().await?;
            events.sent_at = Instant::now();
            Some((Ok(bytes), events))
        })
    }

    /// Next chunk of the body; `None` after the `end` event.
    async fn next(&mut self) -> Option<Bytes> {
        if self.end.is_some() {
            return None;
        }
        if let Some(first) = self.first.take() {
            self.sent += 1;
            return Some(first);
        }
        loop {
            let done = match self.wait().await {
                Next::Read => self.read().await,
                Next::Authenticate => self.authenticate(AUTHENTICATED_FOR).await.map(|()| None),
                Next::Heartbeat => return Some(Bytes::from_static(b": heartbeat\n\n")),
                Next::End(end) => Err(end),
            };
            match done {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.sent += 1;
                    return Some(event);
                }
                Err(end) => {
                    self.end = Some(end);
                    return Some(end.event());
                }
            }
        }
    }

    async fn wait(&mut self) -> Next {
        let poll_at = self.read_at + if self.last.settled { POLL_SETTLED } else { POLL };
        let (read_from, streams) = (self.read_at + self.pause, Arc::clone(&self.streams));
        let authenticate_at = self.authenticated_at + AUTHENTICATED_FOR;
        let (beat_at, end_at) = (self.sent_at + HEARTBEAT, self.opened_at + LIFETIME);
        let notified = async {
            sleep_until(read_from).await;
            self.news.next().await;
        };
        tokio::select! {
            biased;
            () = streams.stopped() => Next::End(End::Stopping),
            () = sleep_until(end_at) => Next::End(End::Renew),
            () = sleep_until(authenticate_at) => Next::Authenticate,
            () = sleep_until(poll_at.max(read_from)) => Next::Read,
            () = notified => Next::Read,
            () = sleep_until(beat_at) => Next::Heartbeat,
        }
    }

    /// Reads the status. Returns an event if it differs from the last one.
    async fn read(&mut self) -> Result<Option<Bytes>, End> {
        let reading = Instant::now();
        let found = self.until_stopped(self.streams.find(&self.identity, &self.name)).await?;
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
        self.authenticate(AUTHENTICATED_FOR_STATUS).await?;
        let event = progress.event().map_err(|_| End::Unavailable)?;
        self.last = progress;
        Ok(Some(event))
    }

    /// Authenticates the caller again, unless that happened within `valid_for`.
    async fn authenticate(&mut self, valid_for: Duration) -> Result<(), End> {
        if self.authenticated_at.elapsed() < valid_for {
            return Ok(());
        }
        match self.until_stopped(self.credential.reauthenticate()).await? {
            Reauthentication::Known(identity) if identity.may(Permission::ReadPullSecrets) => {
                (self.identity, self.authenticated_at) = (identity, Instant::now());
                Ok(())
            }
            Reauthentication::Known(_) | Reauthentication::Ended => Err(End::Unauthenticated),
            Reauthentication::Unavailable => Err(End::Unavailable),
        }
    }

    /// Runs `work` until it is done or the process stops.
    async fn until_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::select! {
            biased;
            () = self.streams.stopped() => Err(End::Stopping),
            done = work => Ok(done),
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        let reason = self.end.map_or("client-disconnected", End::as_str);
        let seconds = self.opened_at.elapsed().as_secs();
        self.span.in_scope(|| tracing::info!(reason, seconds, events = self.sent, "event stream ended"));
    }
}

fn pause_after(read: Duration) -> Duration {
    (read * PAUSE_PER_READ).clamp(PAUSE, PAUSE_MAX)
}
