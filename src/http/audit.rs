//! `/v1/audit-events`

use std::time::{Duration, Instant};

use actix_web::{
    HttpRequest, HttpResponse, get,
    http::header::{ACCEPT, CACHE_CONTROL, VARY},
    web::{Bytes, Data},
};
use chrono::{DateTime, Utc};
use futures_util::{Stream, stream};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        audit::{Action, EventFilter, LinkedEvent, Outcome, Resource, hex},
        caller::Permission,
        invalid::Invalid,
    },
    http::{
        auth::{Caller, PresentedCredential, Reauthentication, permission::ReadAudit},
        connection::StreamGuard,
        paging::{Page, PageQuery},
        problem::ApiError,
        query::{FromQuery, Query, text},
    },
    service::audit::{AuditEvents, Export},
};

const NDJSON: &str = "application/x-ndjson";
/// How old an answer of the door counts while all events are being sent.
const KNOWN_FOR: Duration = Duration::from_secs(5);

/// Who did it.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventActor {
    /// What he is: `apiKey`, `identityProvider`, `commandLine`, `worker` for what regcred does of pull secrets by itself, or `anonymous`
    /// for somebody who was not let in.
    #[schema(example = "apiKey")]
    r#type: String,
    /// Id of the API key.
    id: Option<Uuid>,
    /// Name of the API key, or of the user at the command line; of somebody with a token, name of the provider and subject.
    #[schema(example = "ci-team-a")]
    name: Option<String>,
}

/// Where an event is in the record, and what proves that it was not changed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventLink {
    /// Which chain.
    id: Uuid,
    /// Where in it.
    sequence: i64,
    /// The hash of the event before, in hexadecimal digits.
    previous_hash: String,
    /// HMAC-SHA-256 of this event and its place.
    hash: String,
}

/// Who did what, when, with what result; never a value.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditEvent {
    /// Identity of the event, in the order of time.
    id: Uuid,
    /// When, by the clock of the replica.
    at: DateTime<Utc>,
    /// Who.
    actor: EventActor,
    /// What.
    #[schema(example = "registryAccount.rotate")]
    action: String,
    /// To what; `null` for a caller who was not let in.
    #[schema(example = "registry-accounts/martin-5000")]
    resource: Option<String>,
    /// What else it was about, such as the accounts of a document.
    related: Vec<String>,
    /// `success`; `denied`, because he may not; `failure`; or `attempt`: it was about to be done outside of the database, and an event
    /// with the same request id says how it went.
    #[schema(example = "success")]
    outcome: String,
    /// In which request.
    request_id: Option<Uuid>,
    /// From where.
    source_ip: Option<String>,
    /// What else is worth knowing: names, numbers and words, such as the fields that were changed.
    #[schema(value_type = Object)]
    details: Box<RawValue>,
    /// Its place in the record.
    chain: EventLink,
}

impl From<LinkedEvent> for AuditEvent {
    fn from(LinkedEvent { event, link }: LinkedEvent) -> Self {
        Self {
            id: event.id,
            at: event.at,
            actor: EventActor { r#type: event.actor_type, id: event.actor_id, name: event.actor_name },
            action: event.action,
            resource: event.resource,
            related: event.related,
            outcome: event.outcome,
            request_id: event.request_id,
            source_ip: event.source_ip,
            // It comes from a column of this type.
            details: RawValue::from_string(event.details).unwrap_or_default(),
            chain: EventLink {
                id: link.chain_id,
                sequence: link.sequence,
                previous_hash: hex(&link.previous_hash),
                hash: hex(&link.hash),
            },
        }
    }
}

/// Filter and format of a list of events.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Lists only events of this resource, a path without `/v1/`.
    #[param(value_type = Option<String>, example = "registry-accounts/team-a")]
    resource: Option<Resource>,
    /// Lists only events of the actor with this name.
    actor: Option<String>,
    /// Lists only events with this action.
    #[param(value_type = Option<String>, example = "dockerConfig.reveal")]
    action: Option<Action>,
    /// Lists only events with this outcome.
    #[param(value_type = Option<String>)]
    outcome: Option<Outcome>,
    /// Lists only events at or after this time (RFC 3339).
    from: Option<DateTime<Utc>>,
    /// Lists only events before this time (RFC 3339).
    to: Option<DateTime<Utc>>,
    /// Format of the response, instead of `Accept`: `json`, or `ndjson` for all events as JSON lines. JSON lines ignore
    /// `limit` and `cursor`.
    #[param(value_type = Option<String>)]
    format: Option<EventFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EventFormat {
    Json,
    JsonLines,
}

impl FromQuery for EventQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        let time = |value: &str| {
            value.parse::<DateTime<Utc>>().map_err(|_| Invalid::new("must be a time such as 2027-01-31T00:00:00Z"))
        };
        Self {
            resource: query.one("resource", Resource::parse),
            actor: query.one("actor", text),
            action: query.one("action", str::parse),
            outcome: query.one("outcome", str::parse),
            from: query.one("from", time),
            to: query.one("to", time),
            format: query.one("format", |value| match value {
                "json" => Ok(EventFormat::Json),
                "ndjson" => Ok(EventFormat::JsonLines),
                _ => Err(Invalid::new("must be json or ndjson")),
            }),
        }
    }
}

impl From<EventQuery> for EventFilter {
    fn from(query: EventQuery) -> Self {
        let EventQuery { resource, actor, action, outcome, from, to, format: _ } = query;
        Self { resource, actor, action, outcome, from, to }
    }
}

/// Format that the request's `Accept` header asks for.
fn accepted(request: &HttpRequest) -> EventFormat {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let is_ndjson = |range: &str| range.split(';').next().is_some_and(|media_type| media_type.trim() == NDJSON);
    if accept.split(',').any(is_ndjson) { EventFormat::JsonLines } else { EventFormat::Json }
}

/// List audit events, the newest first: who did what, when, with what result; never a value.
///
/// With `Accept: application/x-ndjson` or `format=ndjson` all events that the filter lets through, one on each line. That
/// is an event itself.
#[utoipa::path(
    tag = "audit",
    params(PageQuery<Uuid>, EventQuery),
    responses((status = OK, description = "A page of events, or all of them as JSON lines", content(
        (Page<AuditEvent> = "application/json"),
        (String = "application/x-ndjson"),
    ))),
)]
#[get("/audit-events")]
pub async fn list_audit_events(
    caller: Caller<ReadAudit, (PageQuery<Uuid>, EventQuery)>,
    events: Data<AuditEvents>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let (page_query, query) = caller.query;
    let format = query.format.unwrap_or_else(|| accepted(&request));
    let filter = EventFilter::from(query);
    let mut response = HttpResponse::Ok();
    response.insert_header((CACHE_CONTROL, "no-store")).insert_header((VARY, "Accept"));
    if format == EventFormat::JsonLines {
        let export = events.export(&caller.identity, filter).await?;
        let lines = Lines::begin(export, &request)?;
        return Ok(response.content_type(NDJSON).force_close().streaming(lines.into_stream()));
    }
    let found = events.list(&caller.identity, &filter, page_query.after().copied(), page_query.rows()).await?;
    let page: Page<AuditEvent> = Page::of(found, &page_query, |linked| linked.event.id.to_string());
    Ok(response.json(page))
}

/// An export on its way to a caller. It may take long to read and to send all of it; whoever takes nothing for long is cut off
/// all the same.
struct Lines {
    export: Export,
    shown: PresentedCredential,
    /// When the door was page_query last.
    known: Instant,
    _answer: StreamGuard,
}

impl Lines {
    fn begin(export: Export, request: &HttpRequest) -> Result<Self, ApiError> {
        let shown = PresentedCredential::of(request)?;
        let answer = StreamGuard::begin(request).ok_or(ApiError::BadRequest)?;
        Ok(Self { export, shown, known: Instant::now(), _answer: answer })
    }

    /// One chunk for each page, which is read when the one before was taken. If Postgres goes away in between, or the caller may
    /// not read it any more, the transfer breaks off, so that nobody takes a part for the whole.
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, ApiError>> {
        stream::try_unfold(self, async |mut lines| {
            let chunk = lines.next().await;
            chunk.map(|chunk| Some((chunk?, lines)))
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        self.ask().await?;
        let Some(page) = self.export.next().await? else { return Ok(None) };
        let mut text = Vec::with_capacity(page.len() * 512);
        for event in page {
            line(event, &mut text);
        }
        Ok(Some(Bytes::from(text)))
    }

    /// Asks at the door again, if the last answer is old.
    async fn ask(&mut self) -> Result<(), ApiError> {
        if self.known.elapsed() < KNOWN_FOR {
            return Ok(());
        }
        match self.shown.reauthenticate().await {
            Reauthentication::Known(identity) if identity.may(Permission::ReadAudit) => {
                self.known = Instant::now();
                Ok(())
            }
            _ => Err(ApiError::Forbidden),
        }
    }
}

fn line(event: LinkedEvent, text: &mut Vec<u8>) {
    // Nothing in it can fail to be written.
    if serde_json::to_writer(&mut *text, &AuditEvent::from(event)).is_ok() {
        text.push(b'\n');
    }
}

/// An event as a line of JSON, as the API has it.
#[must_use]
pub fn json_line(event: LinkedEvent) -> String {
    let mut text = Vec::with_capacity(512);
    line(event, &mut text);
    String::from_utf8(text).unwrap_or_default()
}
