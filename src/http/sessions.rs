//! `/v1/sessions`

use std::sync::Arc;

use actix_web::{
    HttpMessage, HttpRequest, HttpResponse, delete, get,
    http::header::{CACHE_CONTROL, LOCATION, SET_COOKIE},
    post,
    web::{Data, Path},
};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    domain::caller::{Actor, ActorKind, Permission},
    http::{
        auth::{Caller, permission::Authenticated, require},
        paging::Page,
        problem::ApiError,
        query::{DryRunQuery, FromQuery, Query},
        session_cookie::Transport,
    },
    service::{
        ServiceError,
        sessions::{ListedSession, Sessions},
    },
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

/// Session of the web console. It acts for the API key that it was created with, or for the person who
/// signed in through an identity provider.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Immutable identifier.
    id: Uuid,
    /// Whether the request was made with this session.
    current: bool,
    /// Caller that the session acts for.
    owner: SessionOwner,
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
    pub fn seen_by(stored: StoredSession, current: Option<&StoredSession>, owner: &Actor) -> Self {
        Self {
            owner: SessionOwner { r#type: owner.kind.as_str(), name: owner.name.clone() },
            current: current.is_some_and(|current| current.id == stored.id),
            id: stored.id,
            created_at: stored.created_at,
            last_used_at: stored.last_used_at,
            expires_at: stored.expires_at,
            source_ip: stored.source_ip,
        }
    }

    /// The session of a list.
    pub fn listed(listed: ListedSession, current: Option<&StoredSession>) -> Self {
        Self::seen_by(listed.session, current, &listed.owner)
    }
}

/// Caller that a session acts for.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionOwner {
    /// Type of caller: `apiKey` or `identityProvider`.
    #[schema(value_type = ActorKind, example = "apiKey")]
    r#type: &'static str,
    /// Name of the API key, or of the identity provider and the subject.
    #[schema(example = "lena")]
    name: String,
}

/// Whose sessions to list.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AllQuery {
    /// Lists the newest 200 sessions of all callers. Requires the permission to change API keys.
    #[param(value_type = Option<bool>, default = false)]
    all: bool,
}

impl FromQuery for AllQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { all: query.flag("all") }
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
    let session = Session::seen_by(stored, None, &caller.identity.actor);
    if caller.identity.dry_run {
        return Ok(HttpResponse::Ok().json(session));
    }
    Ok(created(session, transport, &new.text))
}

/// Answer that sets the cookie of a new session.
pub fn created(session: Session, transport: Transport, token: &SecretString) -> HttpResponse {
    tracing::info!(session.id = %session.id, transport = ?transport, "session created");
    HttpResponse::Created()
        .insert_header((LOCATION, format!("/v1/sessions/{}", session.id)))
        .insert_header((CACHE_CONTROL, "no-store"))
        .append_header((SET_COOKIE, transport.set(token)))
        .json(session)
}

/// List the sessions of the caller that have not ended, newest first: those of its API key, or of the
/// person who signed in. All are on one page.
#[utoipa::path(tag = "sessions", params(AllQuery), responses((status = OK, body = Page<Session>)))]
#[get("/sessions")]
pub async fn list_sessions(
    caller: Caller<Authenticated, AllQuery>,
    request: HttpRequest,
    sessions: Data<Sessions>,
) -> Result<HttpResponse, ApiError> {
    let current = CurrentSession::of(&request);
    let found = if caller.query.all {
        require(&caller.identity, Permission::WriteApiKeys)?;
        sessions.list_all(&caller.identity).await?
    } else {
        sessions.list(&caller.identity, current.as_deref()).await?
    };
    let items = found.into_iter().map(|listed| Session::listed(listed, current.as_deref())).collect();
    Ok(HttpResponse::Ok().json(Page::<Session> { items, next: None }))
}

/// End a session of the caller, in every replica at once. A caller that may change API keys ends those
/// of others, too.
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
    let session = CurrentSession::of(&request);
    let current = session.as_ref().map(|session| session.id);
    let unknown = || ServiceError::NotFound { kind: "session", name: path.chars().take(100).collect() };
    let id = if path.as_str() == "current" { current } else { Uuid::try_parse(&path).ok() }.ok_or_else(unknown)?;
    sessions.end(&caller.identity, session.as_deref(), id).await?;
    Ok(ended(current == Some(id) && !caller.identity.dry_run))
}

/// End all sessions of the caller, in every replica at once: sign out everywhere.
#[utoipa::path(tag = "sessions", params(DryRunQuery), responses((status = NO_CONTENT)))]
#[delete("/sessions")]
pub async fn end_sessions(
    caller: Caller<Authenticated, DryRunQuery>,
    request: HttpRequest,
    sessions: Data<Sessions>,
) -> Result<HttpResponse, ApiError> {
    let session = CurrentSession::of(&request);
    sessions.end_all(&caller.identity, session.as_deref()).await?;
    Ok(ended(session.is_some() && !caller.identity.dry_run))
}

/// Answer after sessions have ended. `removes_cookie` if that of the request is one of them.
fn ended(removes_cookie: bool) -> HttpResponse {
    let mut response = HttpResponse::NoContent();
    if removes_cookie {
        // Both: the page may have been loaded another way than the one that signed in.
        for transport in [Transport::Secure, Transport::Loopback] {
            response.append_header((SET_COOKIE, transport.remove()));
        }
    }
    response.finish()
}
