//! `/v1/events`: changes of all resources that the caller may see, as server-sent events.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, get, web::Data};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::{
        caller::Identity,
        pull_secret::TargetState,
        resource_event::{EventId, ResourceChange, ResourceKind},
    },
    http::{
        auth::{self, Caller, permission::Authenticated},
        event_stream::{self, Chunk, End, EventSource},
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::{
        progress::Streams,
        resource_events::{self, EventFeed, EventSubscription, Taken},
    },
};

/// Request header with the id that a client resumes from.
const LAST_EVENT_ID: &str = "Last-Event-ID";

/// Event of a resource: the data of the events of a stream. Events name resources, without their
/// content.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ResourceEvent {
    /// Load everything: earlier events may be missing. Also the first event of a new stream.
    Reset(ResetEvent),
    /// A registry account, or the result of its verification.
    RegistryAccount(RegistryAccountEvent),
    /// A pull secret.
    PullSecret(PullSecretEvent),
    /// A target of a pull secret, or many.
    Target(TargetEvent),
    /// A cluster.
    Cluster(ClusterEvent),
}

/// Declares types with one value, by which clients tell events apart. Generators of clients read
/// them where they do not read a tag beside a reference.
macro_rules! kinds {
    ($($name:ident: $kind:ident),+ $(,)?) => {$(
        #[derive(Debug, Serialize, ToSchema)]
        #[serde(rename_all = "camelCase")]
        enum $name {
            $kind,
        }
    )+};
}
kinds! {
    ResetKind: Reset,
    RegistryAccountKind: RegistryAccount,
    PullSecretKind: PullSecret,
    TargetKind: Target,
    ClusterKind: Cluster,
}

/// Earlier events may be missing: load everything.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResetEvent {
    #[schema(inline)]
    kind: ResetKind,
}

/// Event of a registry account.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegistryAccountEvent {
    #[schema(inline)]
    kind: RegistryAccountKind,
    /// What happened.
    change: ResourceChange,
    /// Name.
    name: String,
    /// Version after the change.
    version: i64,
}

/// Event of a pull secret.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretEvent {
    #[schema(inline)]
    kind: PullSecretKind,
    /// What happened.
    change: ResourceChange,
    /// Name.
    name: String,
    /// Version after the change.
    version: i64,
    /// Generation of the desired state after the change.
    generation: i64,
}

/// Event of a target, or of more than 100 targets of a pull secret at once.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetEvent {
    #[schema(inline)]
    kind: TargetKind,
    /// What happened.
    change: ResourceChange,
    /// Name of the pull secret.
    name: String,
    /// Version of the pull secret.
    version: i64,
    /// Name of the cluster; `null` for many targets.
    cluster: Option<String>,
    /// Namespace; `null` for many targets.
    namespace: Option<String>,
    /// State; `null` for many targets.
    #[schema(value_type = Option<TargetState>)]
    state: Option<String>,
    /// Whether the Secret is being removed.
    removing: bool,
}

/// Event of a cluster.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterEvent {
    #[schema(inline)]
    kind: ClusterKind,
    /// What happened.
    change: ResourceChange,
    /// Name.
    name: String,
    /// Version after the change.
    version: i64,
}

impl ResourceEvent {
    const RESET: Self = Self::Reset(ResetEvent { kind: ResetKind::Reset });

    fn new(event: &resource_events::ResourceEvent, change: ResourceChange) -> Self {
        let (name, version) = (event.name.clone(), event.version);
        match event.kind {
            ResourceKind::RegistryAccount => Self::RegistryAccount(RegistryAccountEvent {
                kind: RegistryAccountKind::RegistryAccount,
                change,
                name,
                version,
            }),
            ResourceKind::Cluster => Self::Cluster(ClusterEvent { kind: ClusterKind::Cluster, change, name, version }),
            ResourceKind::PullSecret => Self::PullSecret(PullSecretEvent {
                kind: PullSecretKind::PullSecret,
                change,
                name,
                version,
                generation: event.generation,
            }),
            ResourceKind::Target => {
                let target = event.target.as_ref();
                Self::Target(TargetEvent {
                    kind: TargetKind::Target,
                    change,
                    name,
                    version,
                    cluster: target.map(|target| target.cluster.clone()),
                    namespace: target.map(|target| target.namespace.clone()),
                    state: target.map(|target| target.state.clone()),
                    removing: target.is_some_and(|target| target.removing),
                })
            }
        }
    }

    /// Name of the event in the stream.
    const fn name(&self) -> &'static str {
        match self {
            Self::Reset(_) => "reset",
            Self::RegistryAccount(_) => ResourceKind::RegistryAccount.as_str(),
            Self::PullSecret(_) => ResourceKind::PullSecret.as_str(),
            Self::Target(_) => ResourceKind::Target.as_str(),
            Self::Cluster(_) => ResourceKind::Cluster.as_str(),
        }
    }

    fn push_to(&self, chunk: &mut Chunk, id: EventId) -> Result<(), End> {
        let data = serde_json::to_string(self).map_err(|_| End::Unavailable)?;
        chunk.push(&id, self.name(), &data);
        Ok(())
    }
}

/// Filter of the events.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Sends only events of this kind. May be given several times. Without it, all kinds that the
    /// caller may read.
    #[param(value_type = Option<Vec<ResourceKind>>)]
    kind: Vec<ResourceKind>,
}

impl FromQuery for EventsQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { kind: query.all("kind", str::parse) }
    }
}

/// Stream changes of registry accounts, pull secrets, their targets and clusters as server-sent
/// events.
///
/// A client keeps a list up to date without polling: it loads the resources at each `reset`, and
/// those that later events name. The first event is a `reset`, unless `Last-Event-ID` is an id of
/// the last 10,000 events of the process that answers: then the events after it follow. Events
/// arrive within a second of the commit, in the order of the commits of each resource, and name
/// only resources that the caller may see. More than 100 changed targets of a pull secret share one
/// event.
///
/// A comment is sent every 15 seconds. The last event is `end` with a reason: `unauthenticated`, or
/// one that allows the client to reconnect: `unavailable`, `stopping`, `renew` (after an hour).
#[utoipa::path(
    tag = "events",
    params(
        EventsQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "Id of the last event that was received"),
    ),
    responses((status = OK, description = "Events. `ResourceEvent` is the data of each, except of `end`", content(
        (ResourceEvent = "text/event-stream"),
    ))),
)]
#[get("/events")]
pub async fn get_events(
    caller: Caller<Authenticated, EventsQuery>,
    streams: Data<Streams>,
    feed: Data<EventFeed>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let (caller, kinds) = (&caller.identity.identity, caller.query.kind);
    for kind in &kinds {
        auth::require(caller, kind.permission())?;
    }
    let permit = streams.into_inner().admit(&caller.actor)?;
    let last = request.headers().get(LAST_EVENT_ID).and_then(|id| id.to_str().ok()?.parse().ok());
    let subscription = feed.into_inner().subscribe(last).await?;
    let mut source = FeedSource { subscription, kinds, caller: Arc::clone(caller) };
    let internal = |_| ApiError::Internal(anyhow::anyhow!("an event cannot be written"));
    let first = source.chunk().map_err(internal)?;
    event_stream::respond(&request, caller, permit, source, first)
}

/// Events of the feed that the caller may see.
struct FeedSource {
    subscription: EventSubscription,
    /// Kinds that the client asked for; empty for all that the caller may read.
    kinds: Vec<ResourceKind>,
    /// The caller at the last read.
    caller: Arc<Identity>,
}

impl FeedSource {
    /// Takes the next events and retains those that the caller may see.
    fn chunk(&mut self) -> Result<Chunk, End> {
        let mut chunk = Chunk::default();
        let events = match self.subscription.take() {
            Taken::Events(events) => events,
            Taken::Reset(id) => {
                ResourceEvent::RESET.push_to(&mut chunk, id)?;
                return Ok(chunk);
            }
        };
        let readable = ResourceKind::readable_by(&self.caller);
        let wants = |kind| readable.contains(&kind) && (self.kinds.is_empty() || self.kinds.contains(&kind));
        let grants = &self.caller.grants;
        for (id, event) in events {
            if event.changes_view_of(grants) {
                ResourceEvent::RESET.push_to(&mut chunk, id)?;
            } else if wants(event.kind)
                && let Some(change) = event.seen_by(grants)
            {
                ResourceEvent::new(&event, change).push_to(&mut chunk, id)?;
            }
        }
        Ok(chunk)
    }
}

impl EventSource for FeedSource {
    fn is_open_to(&self, caller: &Identity) -> bool {
        self.kinds.iter().all(|kind| caller.may(kind.permission()))
    }

    async fn changed(&mut self) {
        self.subscription.changed().await;
    }

    async fn read(&mut self, caller: &Arc<Identity>) -> Result<Option<Chunk>, End> {
        if (caller.role, &caller.grants) != (self.caller.role, &self.caller.grants) {
            // Other resources are visible now.
            self.subscription.reset();
        }
        self.caller = Arc::clone(caller);
        self.chunk().map(Chunk::non_empty)
    }

    fn place(&self) -> Option<String> {
        self.subscription.place().map(|id| id.to_string())
    }
}
