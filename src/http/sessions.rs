//! `/v1/sessions`

use std::sync::Arc;

use actix_web::{
    HttpMessage, HttpRequest, HttpResponse, delete, get,
    http::header::{CACHE_CONTROL, LOCATION, SET_COOKIE},
    post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    domain::caller::ActorKind,
    http::{
        auth::{Caller, permission::Authenticated},
        paging::Page,
        problem::ApiError,
        query::DryRunQuery,
        session_cookie::Transport,
    },
    service::{ServiceError, sessions::Sessions},
    storage::sessions::Session as StoredSession,
};

/// Session that a request was authenticated with.
pub struct CurrentSession(pub Arc<StoredSession>);

impl CurrentSession {
    /// The session of a request; `None` for an API key or token.
    pub fn of(request: &HttpRequest) -> Option<Arc<StoredSession>> {
        request.extensions().get::<Self>().map(|current| Arc::clone(&current.0))
    }
}

/// Session of the web console. It acts for the API key that it was created with.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Immutable identifier.
    id: Uuid,
    /// Whether the request was made with this session.
    current: bool,
    /// Time of creation.
    created_at: DateTime<Utc>,
    /// Time of the last request, up to a minute late. A session ends 30 minutes after it.
    last_used_at: DateTime<Utc>,
    /// Time at which the session ends, even if it is in use.
    expires_at: DateTime<Utc>,
    /// Address that the session was created from; `null` if it is unknown.
    #[schema(example = "10.0.0.7")]
    source_ip: Option<String>,
}

impl Session {
    /// The session, as seen by a request that may have been made with it.
    pub fn seen_by(stored: StoredSession, current: Option<&StoredSession>) -> Self {
        Self {
            current: current.is_some_and(|current| current.id == stored.id),
            id: stored.id,
            created_at: stored.created_at,
            last_used_at: stored.last_used_at,
            expires_at: stored.expires_at,
            source_ip: stored.source_ip,
        }
    }
}

/// Create a session of the web console for the API key of the request.
///
/// The response sets the cookie `__Host-regcred`, or `regcred` for a page that was loaded over plain
/// HTTP from a loopback address. The cookie is accepted in place of `Authorization` from pages of
/// regcred itself, with JSON bodies, except where passwords are revealed. A session ends after 30
/// minutes without a request, after 8 hours, and with its API key, which can have 16 sessions: a
/// further one ends the oldest.
#[utoipa::path(
    tag = "sessions",
    params(DryRunQuery),
    responses((status = CREATED, body = Session, headers(("Location" = String, description = "Path of the session")))),
)]
#[post("/sessions")]
pub async fn create_session(
    caller: Caller<Authenticated, DryRunQuery>,
    request: HttpRequest,
    sessions: Data<Sessions>,
) -> Result<HttpResponse, ApiError> {
    if caller.identity.actor.kind != ActorKind::ApiKey || CurrentSession::of(&request).is_some() {
        return Err(ApiError::SessionRefused("a session is created with an API key as `Authorization: Bearer rgc_…`"));
    }
    let transport = Transport::of(&request)?;
    let (stored, new) = sessions.create(&caller.identity).await?;
    let session = Session::seen_by(stored, None);
    if caller.identity.dry_run {
        return Ok(HttpResponse::Ok().json(session));
    }
    tracing::info!(session.id = %session.id, transport = ?transport, "session created");
    Ok(HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/sessions/{}", session.id)))
        .insert_header((CACHE_CONTROL, "no-store"))
        .insert_header((SET_COOKIE, transport.set(&new.text)))
        .json(session))
}

/// List the sessions of the caller's API key that have not ended, newest first. All are on one page.
#[utoipa::path(tag = "sessions", responses((status = OK, body = Page<Session>)))]
#[get("/sessions")]
pub async fn list_sessions(
    caller: Caller<Authenticated>,
    request: HttpRequest,
    sessions: Data<Sessions>,
) -> Result<HttpResponse, ApiError> {
    let current = CurrentSession::of(&request);
    let found = sessions.list(&caller.identity).await?;
    let items = found.into_iter().map(|stored| Session::seen_by(stored, current.as_deref())).collect();
    Ok(HttpResponse::Ok().json(Page::<Session> { items, next: None }))
}

/// End a session of the caller's API key, in every replica at once.
#[utoipa::path(
    tag = "sessions",
    params(
        ("id" = String, Path, description = "Id of the session, or `current` for that of the request"),
        DryRunQuery,
    ),
    responses((status = NO_CONTENT)),
)]
#[delete("/sessions/{id}")]
pub async fn end_session(
    caller: Caller<Authenticated, DryRunQuery>,
    request: HttpRequest,
    sessions: Data<Sessions>,
    path: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let current = CurrentSession::of(&request).map(|session| session.id);
    let unknown = || ServiceError::NotFound { kind: "session", name: path.chars().take(100).collect() };
    let id = if path.as_str() == "current" { current } else { Uuid::try_parse(&path).ok() }.ok_or_else(unknown)?;
    sessions.end(&caller.identity, id).await?;
    let mut response = HttpResponse::NoContent();
    if current == Some(id) && !caller.identity.dry_run {
        // Both: the page may have been loaded another way than the one that signed in.
        for transport in [Transport::Secure, Transport::Loopback] {
            response.append_header((SET_COOKIE, transport.remove()));
        }
    }
    Ok(response.finish())
}
