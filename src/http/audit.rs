//! `/v1/audit-events`

use std::{
    future::{Ready, ready},
    time::{Duration, Instant},
};

use actix_web::{
    FromRequest, HttpRequest, HttpResponse,
    dev::Payload,
    get,
    http::header::{ACCEPT, CACHE_CONTROL, VARY},
    web::{Bytes, Data},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use futures_util::{Stream, stream};
use serde::Serialize;
use serde_json::value::RawValue;
use url::form_urlencoded;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::{
        audit::{EventFilter, Resource, StoredEvent, hex},
        caller::Permission,
        invalid::FieldErrors,
    },
    http::{
        auth::{Caller, Shown, ShownAgain, permission::ReadAudit},
        connection::LongAnswer,
        paging::Page,
        problem::ApiError,
    },
    service::audit::{AuditEvents, Export},
};

const LIMIT_DEFAULT: usize = 50;
const LIMIT_MAX: usize = 500;
const NDJSON: &str = "application/x-ndjson";
/// Interval at which the credential is checked again during an export.
const KNOWN_FOR: Duration = Duration::from_secs(5);

/// Actor of an event.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventActor {
    /// `apiKey`, `identityProvider`, `commandLine`, `worker` for background work on pull secrets,
    /// or `anonymous` for a request without a valid credential.
    #[schema(example = "apiKey")]
    r#type: String,
    /// Id of the API key.
    id: Option<Uuid>,
    /// Name of the API key or of the command-line user. For a token, name of the provider and
    /// subject.
    #[schema(example = "ci-team-a")]
    name: Option<String>,
}

/// Place of an event in the audit log, and the proof that it was not changed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventLink {
    /// Process that wrote the event. For an event of release 0.1.0, its chain.
    id: Uuid,
    /// Place among the events of the process or the chain.
    sequence: i64,
    /// Hash of the event before in its chain, in hexadecimal digits. Empty for an event of a
    /// process.
    previous_hash: String,
    /// HMAC-SHA-256 of this event and its place, in hexadecimal digits.
    hash: String,
}

/// Audit event. Never contains a secret value.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditEvent {
    /// Immutable identifier, ordered by time.
    id: Uuid,
    /// Time, by the clock of the replica.
    at: DateTime<Utc>,
    /// Actor.
    actor: EventActor,
    /// Action.
    #[schema(example = "registryAccount.rotate")]
    action: String,
    /// Resource, as a path without `/v1/`. `null` if authentication failed.
    #[schema(example = "registry-accounts/prod")]
    resource: Option<String>,
    /// Further resources, such as the accounts of a document.
    related: Vec<String>,
    /// `success`, `denied` if the caller lacks a permission or a grant, `failure`, or `attempt`
    /// before an action outside the database. An event with the same request id has the result of
    /// an attempt.
    #[schema(example = "success")]
    outcome: String,
    /// Request id.
    request_id: Option<Uuid>,
    /// Address of the caller.
    source_ip: Option<String>,
    /// Further facts: names, numbers and fixed words, such as the changed fields.
    #[schema(value_type = Object)]
    details: Box<RawValue>,
    /// Place in the audit log.
    chain: EventLink,
}

impl From<StoredEvent> for AuditEvent {
    fn from(stored: StoredEvent) -> Self {
        let event = stored.event;
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
            // The column has type json.
            details: RawValue::from_string(event.details).unwrap_or_default(),
            chain: EventLink {
                id: stored.chain_id,
                sequence: stored.sequence,
                previous_hash: hex(&stored.previous_hash),
                hash: hex(&stored.hash),
            },
        }
    }
}

/// Query of the audit log.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes the query to clients; EventQuery parses it")]
pub struct EventParams {
    /// Only events of this resource, as a path without `/v1/`.
    #[param(example = "registry-accounts/prod")]
    resource: Option<String>,
    /// Only events of the actor with this name.
    actor: Option<String>,
    /// Only events with this action.
    #[param(example = "dockerConfig.reveal")]
    action: Option<String>,
    /// Only events with this outcome.
    outcome: Option<String>,
    /// Only events at or after this time (RFC 3339).
    from: Option<DateTime<Utc>>,
    /// Only events before this time (RFC 3339).
    to: Option<DateTime<Utc>>,
    /// Items per page, 1 to 500; 50 by default. Ignored for JSON lines.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<i64>,
    /// `next` of the previous page. Ignored for JSON lines.
    cursor: Option<String>,
    /// `json`, or `ndjson` for all events as JSON lines. Overrides `Accept`.
    format: Option<String>,
}

/// Parsed query.
pub struct EventQuery {
    filter: EventFilter,
    before: Option<Uuid>,
    limit: usize,
    as_lines: bool,
}

impl FromRequest for EventQuery {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Self::parse(request))
    }
}

impl EventQuery {
    fn parse(request: &HttpRequest) -> Result<Self, ApiError> {
        let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        let as_lines = accept.split(',').any(|range| range.split(';').next().is_some_and(|t| t.trim() == NDJSON));
        let mut query = Self { filter: EventFilter::default(), before: None, limit: LIMIT_DEFAULT, as_lines };
        let mut errors = FieldErrors::default();
        for (key, value) in form_urlencoded::parse(request.query_string().as_bytes()) {
            let filter = &mut query.filter;
            match &*key {
                "resource" => filter.resource = errors.take("resource", Resource::parse(&value)),
                "actor" => filter.actor = Some(value.into_owned()),
                "action" => filter.action = errors.take("action", value.parse()),
                "outcome" => filter.outcome = errors.take("outcome", value.parse()),
                "from" | "to" => match value.parse::<DateTime<Utc>>() {
                    Ok(time) if key == "from" => filter.from = Some(time),
                    Ok(time) => filter.to = Some(time),
                    Err(_) => errors.refuse(&key, "must be a time such as 2027-01-31T00:00:00Z"),
                },
                "limit" => match value.parse() {
                    Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => query.limit = limit,
                    _ => errors.refuse("limit", "must be a number from 1 to 500"),
                },
                "cursor" => match decode(&value) {
                    Some(id) => query.before = Some(id),
                    None => errors.refuse("cursor", "must be the `next` of an earlier page"),
                },
                "format" => match &*value {
                    "json" => query.as_lines = false,
                    "ndjson" => query.as_lines = true,
                    _ => errors.refuse("format", "must be json or ndjson"),
                },
                other => errors.refuse(&other.chars().take(50).collect::<String>(), "is not a known query parameter"),
            }
        }
        Ok(errors.finish(|| Some(query))?)
    }
}

fn decode(cursor: &str) -> Option<Uuid> {
    Uuid::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()
}

/// List audit events, newest first.
///
/// With `Accept: application/x-ndjson` or `format=ndjson`, the response has all matching events,
/// one per line. Such an export is recorded itself.
#[utoipa::path(
    tag = "audit",
    params(EventParams),
    responses((status = OK, description = "Page of events, or all events as JSON lines", content(
        (Page<AuditEvent> = "application/json"),
        (String = "application/x-ndjson"),
    ))),
)]
#[get("/audit-events")]
pub async fn list_audit_events(
    caller: Caller<ReadAudit>,
    events: Data<AuditEvents>,
    query: EventQuery,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let EventQuery { filter, before, limit, as_lines } = query;
    let mut response = HttpResponse::Ok();
    response.insert_header((CACHE_CONTROL, "no-store")).insert_header((VARY, "Accept"));
    if as_lines {
        let export = events.export(&caller.identity, filter).await?;
        let lines = Lines::begin(export, &request)?;
        return Ok(response.content_type(NDJSON).force_close().streaming(lines.into_stream()));
    }
    // One more than requested shows whether another page follows.
    let mut found =
        events.list(&caller.identity, &filter, before, i64::try_from(limit + 1).unwrap_or(i64::MAX)).await?;
    let has_next = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| has_next).map(|last| BASE64_URL_SAFE_NO_PAD.encode(last.event.id));
    let items = found.into_iter().map(AuditEvent::from).collect();
    Ok(response.json(Page::<AuditEvent> { items, next }))
}

/// Export in progress. It may take long, but a client that reads nothing is disconnected all the
/// same.
struct Lines {
    export: Export,
    shown: Shown,
    /// Time of the last check of the credential.
    known: Instant,
    _answer: LongAnswer,
}

impl Lines {
    fn begin(export: Export, request: &HttpRequest) -> Result<Self, ApiError> {
        let shown = Shown::of(request)?;
        let answer = LongAnswer::begin(request).ok_or(ApiError::BadRequest)?;
        Ok(Self { export, shown, known: Instant::now(), _answer: answer })
    }

    /// Sends one chunk per page, and reads a page when the previous one was taken. If Postgres
    /// fails or the caller loses the permission, the transfer breaks off: a client cannot mistake a
    /// part for all events.
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

    /// Checks the credential again if the last check is too old.
    async fn ask(&mut self) -> Result<(), ApiError> {
        if self.known.elapsed() < KNOWN_FOR {
            return Ok(());
        }
        match self.shown.again().await {
            ShownAgain::Known(identity) if identity.may(Permission::ReadAudit) => {
                self.known = Instant::now();
                Ok(())
            }
            _ => Err(ApiError::Forbidden),
        }
    }
}

fn line(event: StoredEvent, text: &mut Vec<u8>) {
    // Writing to a vector does not fail.
    if serde_json::to_writer(&mut *text, &AuditEvent::from(event)).is_ok() {
        text.push(b'\n');
    }
}

/// Formats an event as a JSON line of the API.
#[must_use]
pub fn json_line(event: StoredEvent) -> String {
    let mut text = Vec::with_capacity(512);
    line(event, &mut text);
    String::from_utf8(text).unwrap_or_default()
}
