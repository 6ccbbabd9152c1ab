//! Streams of server-sent events: what all of them share.
//!
//! An [`EventSource`] has the events. The stream authenticates its caller again and again, sends
//! heartbeats, and ends with the process, with the caller's credential, and after an hour. A source
//! is read only when the client has received what was sent before, so a slow client costs no
//! memory; one that receives nothing is cut off ([`connection`](super::connection)).

use std::{
    convert::Infallible,
    fmt::{Display, Write},
    sync::Arc,
    time::Duration,
};

use actix_web::{HttpRequest, HttpResponse, web::Bytes};
use futures_util::{Stream, stream};
use tokio::time::{Instant, sleep_until};
use tracing::Span;

use crate::{
    domain::caller::Identity,
    http::{
        auth::{PresentedCredential, Reauthentication},
        connection::StreamGuard,
        problem::ApiError,
    },
    service::progress::{StreamPermit, Streams},
};

/// Interval of comments, so that proxies do not close an idle connection.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Maximum age of the caller's authentication, and its maximum age when events are read.
const AUTHENTICATED_FOR: Duration = Duration::from_secs(5);
const AUTHENTICATED_FOR_EVENTS: Duration = Duration::from_secs(1);
/// Maximum lifetime of a stream. `EventSource` opens another one by itself.
const LIFETIME: Duration = Duration::from_hours(1);
/// Time after which a client reconnects.
const RETRY_MILLIS: u64 = 2_000;

/// Source of the events of one stream.
pub trait EventSource: 'static {
    /// Whether the caller may still read from the source.
    fn is_open_to(&self, caller: &Identity) -> bool;

    /// Waits until there may be events to read. Dropping the future loses nothing.
    async fn changed(&mut self);

    /// Reads the next events. `None` if there are none for this caller.
    async fn read(&mut self, caller: &Arc<Identity>) -> Result<Option<Chunk>, End>;

    /// Id that a client resumes from after a heartbeat, if the source has one.
    fn place(&self) -> Option<String>;
}

/// Events as they are sent.
#[derive(Debug, Default)]
pub struct Chunk {
    text: String,
    events: u64,
}

impl Chunk {
    /// Appends an event. `data` is JSON in one line.
    pub fn push(&mut self, id: &dyn Display, event: &str, data: &str) {
        // Writing to a string does not fail.
        let _ = write!(self.text, "id: {id}\nevent: {event}\ndata: {data}\n\n");
        self.events += 1;
    }

    /// The chunk, or `None` if it has no event.
    pub fn non_empty(self) -> Option<Self> {
        (self.events > 0).then_some(self)
    }

    /// Appends what follows.
    #[must_use]
    pub fn then(mut self, next: Option<Self>) -> Self {
        if let Some(next) = next {
            self.text.push_str(&next.text);
            self.events += next.events;
        }
        self
    }
}

/// Reason why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The resource no longer exists, or the caller may no longer see it.
    Gone,
    /// The caller's credential is no longer valid or lacks the permission.
    Unauthenticated,
    /// The events cannot be read.
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

/// Responds with the events of a source, after the first ones. `caller` was authenticated with this
/// request.
///
/// # Errors
///
/// [`ApiError::BadRequest`] if the client sent many bytes after its request.
pub fn respond<S: EventSource>(
    request: &HttpRequest,
    caller: &Arc<Identity>,
    permit: StreamPermit,
    source: S,
    first: Chunk,
) -> Result<HttpResponse, ApiError> {
    let now = Instant::now();
    let events = EventStream {
        source,
        streams: Arc::clone(permit.streams()),
        credential: PresentedCredential::of(request)?,
        caller: Arc::clone(caller),
        first: Some(Chunk { text: format!("retry: {RETRY_MILLIS}\n"), events: 0 }.then(Some(first))),
        opened_at: now,
        sent_at: now,
        authenticated_at: now,
        sent: 0,
        end: None,
        span: Span::current(),
        _permit: permit,
        _guard: StreamGuard::begin(request).ok_or(ApiError::BadRequest)?,
    };
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        // Disables buffering in nginx.
        .insert_header(("X-Accel-Buffering", "no"))
        .force_close()
        .streaming(events.into_stream()))
}

/// An open event stream.
struct EventStream<S> {
    source: S,
    streams: Arc<Streams>,
    credential: PresentedCredential,
    caller: Arc<Identity>,
    first: Option<Chunk>,
    opened_at: Instant,
    sent_at: Instant,
    authenticated_at: Instant,
    /// Number of events sent.
    sent: u64,
    end: Option<End>,
    span: Span,
    _permit: StreamPermit,
    _guard: StreamGuard,
}

impl<S: EventSource> EventStream<S> {
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut events| async move {
            let bytes = events.next().await?;
            events.sent_at = Instant::now();
            Some((Ok(bytes), events))
        })
    }

    /// Next part of the body; `None` after the `end` event.
    async fn next(&mut self) -> Option<Bytes> {
        if self.end.is_some() {
            return None;
        }
        if let Some(first) = self.first.take() {
            return Some(self.count(first));
        }
        let streams = Arc::clone(&self.streams);
        loop {
            let done = tokio::select! {
                biased;
                () = streams.stopped() => Err(End::Stopping),
                done = self.step() => done,
            };
            match done {
                Ok(None) => {}
                Ok(Some(chunk)) => return Some(self.count(chunk)),
                Err(end) => {
                    self.end = Some(end);
                    return Some(end.event());
                }
            }
        }
    }

    fn count(&mut self, chunk: Chunk) -> Bytes {
        self.sent += chunk.events;
        chunk.text.into()
    }

    /// Waits for the next action and performs it.
    async fn step(&mut self) -> Result<Option<Chunk>, End> {
        let authenticate_at = self.authenticated_at + AUTHENTICATED_FOR;
        let (beat_at, end_at) = (self.sent_at + HEARTBEAT, self.opened_at + LIFETIME);
        tokio::select! {
            biased;
            () = sleep_until(end_at) => Err(End::Renew),
            () = sleep_until(authenticate_at) => self.authenticate(AUTHENTICATED_FOR).await.map(|()| None),
            () = self.source.changed() => {
                self.authenticate(AUTHENTICATED_FOR_EVENTS).await?;
                self.source.read(&self.caller).await
            }
            () = sleep_until(beat_at) => Ok(Some(self.heartbeat())),
        }
    }

    /// A comment, and the place in the source. An id without data sets the id that a client resumes
    /// from, and is no event.
    fn heartbeat(&self) -> Chunk {
        let place = self.source.place().map(|id| format!("id: {id}\n")).unwrap_or_default();
        Chunk { text: format!(": heartbeat\n{place}\n"), events: 0 }
    }

    /// Authenticates the caller again, unless that happened within `valid_for`.
    async fn authenticate(&mut self, valid_for: Duration) -> Result<(), End> {
        if self.authenticated_at.elapsed() < valid_for {
            return Ok(());
        }
        match self.credential.reauthenticate().await {
            Reauthentication::Known(caller) if self.source.is_open_to(&caller) => {
                (self.caller, self.authenticated_at) = (caller, Instant::now());
                Ok(())
            }
            Reauthentication::Known(_) | Reauthentication::Ended => Err(End::Unauthenticated),
            Reauthentication::Unavailable => Err(End::Unavailable),
        }
    }
}

impl<S> Drop for EventStream<S> {
    fn drop(&mut self) {
        let reason = self.end.map_or("client-disconnected", End::as_str);
        let seconds = self.opened_at.elapsed().as_secs();
        self.span.in_scope(|| tracing::info!(reason, seconds, events = self.sent, "event stream ended"));
    }
}
