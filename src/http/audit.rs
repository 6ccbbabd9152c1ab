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
        audit::{Action, EventFilter, Outcome, Resource, StoredEvent, hex},
        caller::{ActorKind, Permission},
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
/// Interval at which the credential is checked again during an export.
const KNOWN_FOR: Duration = Duration::from_secs(5);

/// Actor of an event.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventActor {
    /// `apiKey`, `identityProvider`, `commandLine`, `worker` for background work on pull secrets,
    /// or `anonymous` for a request without a valid credential.
    #[schema(value_type = ActorKind, example = "apiKey")]
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
    #[schema(value_type = Outcome, example = "success")]
    outcome: String,
    /// Request id.
    request_id: Option<Uuid>,
    /// Address of the caller.
    source_ip: Option<String>,
    /// Further facts: names, numbers and fixed words. A change has `changes`: the recorded fields
    /// that differ, each with `field`, `old` and `new`.
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
            // The column has type json. In JSON a line break is white space between tokens.
            details: RawValue::from_string(event.details.replace(['\n', '\r'], " ")).unwrap_or_default(),
            chain: EventLink {
                id: stored.chain_id,
                sequence: stored.sequence,
                previous_hash: hex(&stored.previous_hash),
                hash: hex(&stored.hash),
            },
        }
    }
}

/// Filter and format of a list of events.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Lists only events of this resource, a path without `/v1/`. An API key is named by its id or
    /// its name.
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
            resource: query.one("resource", Resource::parse_filter),
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
    let page: Page<AuditEvent> = Page::of(found, &page_query, |stored: &StoredEvent| stored.event.id.to_string());
    Ok(response.json(page))
}

/// Export in progress. It may take long, but a client that reads nothing is disconnected all the
/// same.
struct Lines {
    export: Export,
    credential: PresentedCredential,
    /// Time of the last check of the credential.
    checked: Instant,
    _answer: StreamGuard,
}

impl Lines {
    fn begin(export: Export, request: &HttpRequest) -> Result<Self, ApiError> {
        let credential = PresentedCredential::of(request)?;
        let answer = StreamGuard::begin(request).ok_or(ApiError::BadRequest)?;
        Ok(Self { export, credential, checked: Instant::now(), _answer: answer })
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
        self.check_credential().await?;
        let Some(page) = self.export.next().await? else { return Ok(None) };
        let mut text = Vec::with_capacity(page.len() * 512);
        for event in page {
            line(event, &mut text);
        }
        Ok(Some(Bytes::from(text)))
    }

    /// Checks the credential again if the last check is too old.
    async fn check_credential(&mut self) -> Result<(), ApiError> {
        if self.checked.elapsed() < KNOWN_FOR {
            return Ok(());
        }
        match self.credential.reauthenticate().await {
            Reauthentication::Known(identity) if identity.may(Permission::ReadAudit) => {
                self.checked = Instant::now();
                Ok(())
            }
            Reauthentication::Known(identity) => {
                Err(ApiError::Forbidden { role: identity.role, permission: Permission::ReadAudit })
            }
            Reauthentication::Ended | Reauthentication::Unavailable => {
                Err(ApiError::Unauthenticated("the credential ended during the export, or could not be checked again"))
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        audit::{NewEvent, worker},
        names::Name,
    };

    #[test]
    fn a_line_break_in_the_database_forges_no_line_of_an_export() {
        let account = Resource::account(&Name::parse("prod").unwrap());
        let mut event = NewEvent::by(&worker(), Action::AccountRotate, account).stamp(Uuid::now_v7());
        event.details = "{\"a\":\r\n{\"id\":1}\n}".to_owned();
        event.actor_name = Some("a\nb".to_owned());

        let line = json_line(StoredEvent {
            event,
            key_id: None,
            chain_id: Uuid::nil(),
            sequence: 1,
            previous_hash: Vec::new(),
            hash: Vec::new(),
        });

        assert_eq!(line.find(['\n', '\r']), Some(line.len() - 1), "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&read["details"]["a"]["id"], &read["actor"]["name"]), (&1.into(), &"a\nb".into()));
    }
}
