//! `/v1/pull-secrets/{name}/events`: how a pull secret gets on, while it does, as server-sent events.

use std::{convert::Infallible, sync::Arc, time::Duration};

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
        auth::{Caller, Shown, ShownAgain, permission::ReadPullSecrets},
        connection::LongAnswer,
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

/// The least time between two looks, so that a fan-out of thousands is a few events; and how many times as long as a look took.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_FOR_LOOKS: u32 = 10;
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How soon it is looked again though nothing was heard, while it gets on and while it has settled.
const POLL: Duration = Duration::from_secs(2);
const POLL_SETTLED: Duration = Duration::from_secs(10);
/// How soon something is said where there is nothing to say, so that nobody on the way takes the connection for dead.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often the caller is asked again who he is; and how old an answer counts when something is told.
const KNOWN_FOR: Duration = Duration::from_secs(5);
const KNOWN_FOR_A_STATUS: Duration = Duration::from_secs(1);
/// How long a stream lasts: whoever wants more begins another one, as `EventSource` does by itself.
const LASTS: Duration = Duration::from_hours(1);
/// How long a client shall wait before it begins another one.
const RETRY_MILLIS: u64 = 2_000;

/// How a pull secret is doing: the data of an event `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretProgress {
    /// Identity.
    id: Uuid,
    /// Unique name.
    name: String,
    /// Grows by one with every change of the declaration.
    version: i64,
    /// Grows with everything that the Secrets must follow.
    generation: i64,
    /// The generation that every target has.
    observed_generation: i64,
    /// How many targets are in which state.
    status: PullSecretStatus,
    /// Every target came to something since the last change: in order, failed or in conflict.
    settled: bool,
    /// Since when its Secrets are being removed.
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
            status: shown.counts.into(),
            settled,
            deleted_at: shown.stored.deleted_at,
        }
    }
}

impl PullSecretProgress {
    /// The same wherever and whenever it is told: what has the same id says the same.
    fn event_id(&self) -> String {
        let PullSecretStatus { synced, pending, failed, conflict, removing, .. } = self.status;
        format!(
            "{}.{}.{}-{synced}.{pending}.{failed}.{conflict}.{removing}-{}",
            self.version,
            self.generation,
            self.observed_generation,
            u8::from(self.settled)
        )
    }

    fn event(&self) -> Result<Bytes, serde_json::Error> {
        let data = serde_json::to_string(self)?;
        Ok(format!("id: {}\nevent: status\ndata: {data}\n\n", self.event_id()).into())
    }
}

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The pull secret is not there any more, or not for this caller.
    Gone,
    /// The key or token is good no more, or allows this no more.
    Unauthenticated,
    /// It cannot be looked how it is doing.
    Unavailable,
    /// The process ends.
    Stopping,
    /// It has lasted long enough.
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

/// Follow how a pull secret gets on, as server-sent events.
///
/// At once an event `status` with how it is doing, and then one whenever that changes, twice a second at most; `settled` in it says
/// that every target came to something. The id of an event is made of what it says. A comment comes every 15 seconds. The last event
/// is `end`, with the reason: `gone`, `unauthenticated`, or, where another stream may be begun at once, `unavailable`, `stopping`,
/// `renew` (after an hour).
#[utoipa::path(
    tag = "pull-secrets",
    params(("name" = String, Path, description = "Name of the pull secret")),
    responses((status = OK, description = "Events; `PullSecretProgress` is the data of those named `status`", content(
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
    let events = Events::begin(&caller.identity.identity, streams.into_inner(), name, &request).await?;
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        // nginx would gather what it passes on.
        .insert_header(("X-Accel-Buffering", "no"))
        .force_close()
        .streaming(events.into_stream()))
}

/// A stream of events.
struct Events {
    streams: Arc<Streams>,
    shown: Shown,
    identity: Arc<Identity>,
    name: Name,
    news: Subscription,
    first: Option<Bytes>,
    last: PullSecretProgress,
    pause: Duration,
    began: Instant,
    looked: Instant,
    said: Instant,
    known: Instant,
    told: u64,
    end: Option<End>,
    span: Span,
    _place: StreamPermit,
    _answer: LongAnswer,
}

/// What happens next.
enum Next {
    Look,
    Ask,
    Beat,
    End(End),
}

impl Events {
    async fn begin(
        identity: &Arc<Identity>,
        streams: Arc<Streams>,
        name: Name,
        request: &HttpRequest,
    ) -> Result<Self, ApiError> {
        let found = streams.find(identity, &name).await?;
        let place = streams.admit(&identity.actor)?;
        let news = streams.subscribe(found.stored.id);
        // Again, so that nothing falls between the look and the hearing.
        let looking = Instant::now();
        let last = PullSecretProgress::from(streams.find(identity, &name).await?);
        let now = Instant::now();
        let event = last.event().map_err(|error| ApiError::Internal(error.into()))?;
        let first = [format!("retry: {RETRY_MILLIS}\n").as_bytes(), &event[..]].concat();
        Ok(Self {
            streams,
            shown: Shown::of(request)?,
            identity: Arc::clone(identity),
            name,
            news,
            first: Some(first.into()),
            last,
            pause: pause_after(now - looking),
            began: now,
            looked: now,
            said: now,
            known: now,
            told: 0,
            end: None,
            span: Span::current(),
            _place: place,
            _answer: LongAnswer::begin(request).ok_or(ApiError::BadRequest)?,
        })
    }

    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut events| async move {
            let bytes = events.next().await?;
            events.said = Instant::now();
            Some((Ok(bytes), events))
        })
    }

    /// What is told next; none after the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.end.is_some() {
            return None;
        }
        if let Some(first) = self.first.take() {
            self.told += 1;
            return Some(first);
        }
        loop {
            let done = match self.wait().await {
                Next::Look => self.look().await,
                Next::Ask => self.ask(KNOWN_FOR).await.map(|()| None),
                Next::Beat => return Some(Bytes::from_static(b": still here\n\n")),
                Next::End(end) => Err(end),
            };
            match done {
                Ok(None) => {}
                Ok(Some(event)) => {
                    self.told += 1;
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
        let look_at = self.looked + if self.last.settled { POLL_SETTLED } else { POLL };
        let (look_from, streams) = (self.looked + self.pause, Arc::clone(&self.streams));
        let (beat_at, ask_at, end_at) = (self.said + HEARTBEAT, self.known + KNOWN_FOR, self.began + LASTS);
        let heard = async {
            sleep_until(look_from).await;
            self.news.next().await;
        };
        tokio::select! {
            biased;
            () = streams.stopped() => Next::End(End::Stopping),
            () = sleep_until(end_at) => Next::End(End::Renew),
            () = sleep_until(ask_at) => Next::Ask,
            () = sleep_until(look_at.max(look_from)) => Next::Look,
            () = heard => Next::Look,
            () = sleep_until(beat_at) => Next::Beat,
        }
    }

    /// Looks how it is doing; an event if that is not what was told last.
    async fn look(&mut self) -> Result<Option<Bytes>, End> {
        let looking = Instant::now();
        let found = self.until_stopped(self.streams.find(&self.identity, &self.name)).await?;
        self.looked = Instant::now();
        self.pause = pause_after(self.looked - looking);
        let progress = match found {
            // One that was made anew under the name is another one.
            Ok(found) if found.stored.id == self.last.id => PullSecretProgress::from(found),
            Ok(_) | Err(ServiceError::NotFound { .. } | ServiceError::Hidden { .. }) => return Err(End::Gone),
            Err(error) => {
                tracing::warn!(%error, "a stream of events ends, since it cannot be looked how the pull secret is doing");
                return Err(End::Unavailable);
            }
        };
        if progress == self.last {
            return Ok(None);
        }
        self.ask(KNOWN_FOR_A_STATUS).await?;
        let event = progress.event().map_err(|_| End::Unavailable)?;
        self.last = progress;
        Ok(Some(event))
    }

    /// Asks at the door again, if the last answer is older than this.
    async fn ask(&mut self, known_for: Duration) -> Result<(), End> {
        if self.known.elapsed() < known_for {
            return Ok(());
        }
        match self.until_stopped(self.shown.again()).await? {
            ShownAgain::Known(identity) if identity.may(Permission::ReadPullSecrets) => {
                (self.identity, self.known) = (identity, Instant::now());
                Ok(())
            }
            ShownAgain::Known(_) | ShownAgain::Ended => Err(End::Unauthenticated),
            ShownAgain::Unavailable => Err(End::Unavailable),
        }
    }

    /// A process that ends waits for no answer.
    async fn until_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::select! {
            biased;
            () = self.streams.stopped() => Err(End::Stopping),
            done = work => Ok(done),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let reason = self.end.map_or("the client went", End::as_str);
        let seconds = self.began.elapsed().as_secs();
        self.span.in_scope(|| tracing::info!(reason, seconds, events = self.told, "a stream of events has ended"));
    }
}

fn pause_after(look: Duration) -> Duration {
    (look * PAUSE_FOR_LOOKS).clamp(PAUSE, PAUSE_MAX)
}
