//! Events of the audit log: actor, action, resource, time and outcome; never a secret value.
//!
//! Only names, numbers, fixed words and the recorded values of [`changes`] enter an event:
//! [`Resource`] and [`Details`] have no constructor for free text.

use std::{net::IpAddr, str::FromStr};

use chrono::{DateTime, Utc};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::{
    caller::{Actor, ActorKind, Call},
    invalid::Invalid,
    names::{Name, NamespaceName, PodName, SecretName},
};

pub mod changes;
mod details;
pub mod legacy;
pub mod seal;

pub use details::Details;
use details::THROUGH_SEAL;

macro_rules! words {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ToSchema)]
        pub enum $type {
            $($(#[$variant_doc])* #[schema(rename = $word)] $variant,)+
        }

        impl $type {
            /// All values.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Returns the name in the API and in the database.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl FromStr for $type {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                let known = Self::ALL.iter().copied().find(|one| one.as_str() == text);
                known.ok_or_else(|| {
                    let all: Vec<&str> = Self::ALL.iter().map(|one| one.as_str()).collect();
                    Invalid::new(format!("must be one of {}", all.join(", ")))
                })
            }
        }
    };
}
pub(in crate::domain) use words;

words! {
    /// Action of a caller, performed or refused.
    Action {
        /// Account registered.
        AccountCreate = "registryAccount.create",
        /// Account changed, except for its password.
        AccountUpdate = "registryAccount.update",
        /// Password of an account replaced.
        AccountRotate = "registryAccount.rotate",
        /// Account deleted.
        AccountDelete = "registryAccount.delete",
        /// Stored password presented to its registry.
        AccountVerify = "registryAccount.verify",
        /// Login of an account minted.
        AccountMint = "registryAccount.mint",
        /// Mint failed for another reason than the one before.
        AccountMintFailed = "registryAccount.mintFailed",
        /// Import refused, or dry run. Other imports are recorded account by account.
        AccountImport = "registryAccount.import",
        /// Reading accounts refused.
        AccountRead = "registryAccount.read",
        /// Passwords revealed.
        Reveal = "dockerConfig.reveal",
        /// Explanation of an image match refused.
        Explain = "dockerConfig.explain",
        /// Cluster registered.
        ClusterCreate = "cluster.create",
        /// Cluster changed.
        ClusterUpdate = "cluster.update",
        /// Token of a cluster replaced by a new one of its `ServiceAccount`.
        ClusterRenew = "cluster.renewToken",
        /// Cluster deleted.
        ClusterDelete = "cluster.delete",
        /// Reading or checking clusters refused.
        ClusterRead = "cluster.read",
        /// Coverage of a cluster requested, read or refused. It reads the values of the pull secrets in
        /// use, and shows them to their registries.
        ClusterCoverage = "cluster.coverage",
        /// Secret delivered to a namespace.
        Deliver = "secret.deliver",
        /// Values of the pull secrets of a pod read, and shown to their registries.
        PodDiagnose = "pod.diagnose",
        /// API key created.
        KeyCreate = "apiKey.create",
        /// API key revoked.
        KeyRevoke = "apiKey.revoke",
        /// Reading API keys refused.
        KeyRead = "apiKey.read",
        /// Session of the web console created.
        SessionCreate = "session.create",
        /// Session of the web console ended by its owner.
        SessionEnd = "session.end",
        /// Pull secret declared, or its declaration replaced.
        PullSecretDeclare = "pullSecret.declare",
        /// Pull secret deleted.
        PullSecretDelete = "pullSecret.delete",
        /// Sync of all targets of a pull secret requested.
        PullSecretSync = "pullSecret.sync",
        /// Secret of a pull secret applied to one namespace, or failed to apply.
        PullSecretApply = "pullSecret.apply",
        /// Secret of a pull secret removed from one namespace, or failed to be removed.
        PullSecretRemove = "pullSecret.remove",
        /// Reading pull secrets refused.
        PullSecretRead = "pullSecret.read",
        /// Identity provider registered.
        ProviderCreate = "identityProvider.create",
        /// Identity provider changed.
        ProviderUpdate = "identityProvider.update",
        /// Identity provider deleted.
        ProviderDelete = "identityProvider.delete",
        /// Reading identity providers refused.
        ProviderRead = "identityProvider.read",
        /// Stored secrets re-sealed under another master key.
        MasterKeyRotate = "masterKey.rotate",
        /// Reading the audit log refused.
        AuditRead = "audit.read",
        /// Audit log exported.
        AuditExport = "audit.export",
        /// Old events declared as pruned, and deleted afterwards.
        AuditPrune = "audit.prune",
        /// Authentication failed.
        Authenticate = "caller.authenticate",
        /// Any other request refused.
        Other = "request.other",
    }
}

words! {
    /// Outcome of an action.
    Outcome {
        /// About to be performed outside the database. An event with the same request id has the
        /// result.
        Attempt = "attempt",
        /// Performed.
        Success = "success",
        /// Refused: the caller lacks a permission or a grant.
        Denied = "denied",
        /// Failed.
        Failure = "failure",
    }
}

/// Resource of an event: its API path without `/v1/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Resource(String);

/// Collections, which events name if they concern no single resource.
const COLLECTIONS: [&str; 13] = [
    "api-keys",
    "audit-events",
    "clusters",
    "docker-configs",
    "events",
    "identity-providers",
    "master-keys",
    "me",
    "pull-secrets",
    "registry-accounts",
    "sessions",
    "summary",
    "targets",
];

impl Resource {
    /// Names a registry account.
    #[must_use]
    pub fn account(name: &Name) -> Self {
        Self(format!("registry-accounts/{name}"))
    }

    /// Names the collection of registry accounts.
    #[must_use]
    pub fn accounts() -> Self {
        Self("registry-accounts".to_owned())
    }

    /// Names a cluster.
    #[must_use]
    pub fn cluster(name: &Name) -> Self {
        Self(format!("clusters/{name}"))
    }

    /// Names a Secret in a cluster.
    #[must_use]
    pub fn secret(cluster: &Name, namespace: &NamespaceName, name: &SecretName) -> Self {
        Self(format!("clusters/{cluster}/namespaces/{namespace}/secrets/{name}"))
    }

    /// Names a namespace of a cluster.
    #[must_use]
    pub fn namespace(cluster: &Name, namespace: &NamespaceName) -> Self {
        Self(format!("clusters/{cluster}/namespaces/{namespace}"))
    }

    /// Names a pod, or a workload by the plural of its kind.
    #[must_use]
    pub fn object(cluster: &Name, namespace: &NamespaceName, plural: &'static str, name: &PodName) -> Self {
        Self(format!("clusters/{cluster}/namespaces/{namespace}/{plural}/{name}"))
    }

    /// Names an API key.
    #[must_use]
    pub fn api_key(id: Uuid) -> Self {
        Self(format!("api-keys/{id}"))
    }

    /// Names a session of the web console.
    #[must_use]
    pub fn session(id: Uuid) -> Self {
        Self(format!("sessions/{id}"))
    }

    /// Names a pull secret.
    #[must_use]
    pub fn pull_secret(name: &Name) -> Self {
        Self(format!("pull-secrets/{name}"))
    }

    /// Names an identity provider.
    #[must_use]
    pub fn identity_provider(name: &Name) -> Self {
        Self(format!("identity-providers/{name}"))
    }

    /// Names a document of several accounts.
    #[must_use]
    pub fn docker_configs() -> Self {
        Self("docker-configs".to_owned())
    }

    /// Names the master keys.
    #[must_use]
    pub fn master_keys() -> Self {
        Self("master-keys".to_owned())
    }

    /// Names the audit log.
    #[must_use]
    pub fn audit_events() -> Self {
        Self("audit-events".to_owned())
    }

    /// Parses the path of a request. Returns `None` if a segment is not a valid name.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        let path = path.strip_prefix("/v1/")?;
        Self::parse(path.split_once(':').map_or(path, |(before, _)| before)).ok()
    }

    /// Parses a resource.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if a segment is not a valid name.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        // The alphabet of names: a secret with any other character cannot enter.
        let is_name = |part: &str| SecretName::parse(part).is_ok();
        if text.len() <= 600 && text.split('/').all(is_name) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Invalid::new("must be a path without `/v1/`, such as registry-accounts/prod"))
        }
    }

    /// Parses the resource of a filter: one that events can name.
    ///
    /// # Errors
    ///
    /// [`Invalid`] also for a name alone, such as `prod` instead of `registry-accounts/prod`.
    pub fn parse_filter(text: &str) -> Result<Self, Invalid> {
        let resource = Self::parse(text)?;
        if text.contains('/') || COLLECTIONS.contains(&text) {
            return Ok(resource);
        }
        Err(Invalid::new("must begin with the kind of the resource, as in registry-accounts/prod or api-keys/ci"))
    }

    /// Name or id of an API key, if the resource is one.
    #[must_use]
    pub fn as_api_key(&self) -> Option<&str> {
        self.0.strip_prefix("api-keys/")
    }

    /// Returns the path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Event before it has an id and a time.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Caller, or the process itself.
    pub actor: Actor,
    /// Action.
    pub action: Action,
    /// Resource, if known.
    pub resource: Option<Resource>,
    /// Further resources.
    pub related: Vec<Resource>,
    /// Outcome.
    pub outcome: Outcome,
    /// Request id.
    pub request_id: Option<Uuid>,
    /// Id that the client gave the request. It becomes one of the details.
    pub client_request_id: Option<Uuid>,
    /// Address of the caller.
    pub source: Option<IpAddr>,
    /// Further facts.
    pub details: Details,
}

impl NewEvent {
    /// Describes a successful action of an API caller.
    #[must_use]
    pub fn of(call: &Call, action: Action, resource: Resource) -> Self {
        let event = Self::by(&call.identity.actor, action, resource);
        let (request_id, client_request_id) = (Some(call.request_id), call.client_request_id);
        Self { request_id, client_request_id, source: call.source, ..event }
    }

    /// Describes a successful action outside a request.
    #[must_use]
    pub fn by(actor: &Actor, action: Action, resource: Resource) -> Self {
        Self {
            actor: actor.clone(),
            action,
            resource: Some(resource),
            related: Vec::new(),
            outcome: Outcome::Success,
            request_id: None,
            client_request_id: None,
            source: None,
            details: Details::default(),
        }
    }

    /// Sets the outcome.
    #[must_use]
    pub fn outcome(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    /// Sets the details.
    #[must_use]
    pub fn details(self, details: Details) -> Self {
        Self { details, ..self }
    }

    /// Sets the further resources.
    #[must_use]
    pub fn related(self, related: Vec<Resource>) -> Self {
        Self { related, ..self }
    }

    /// Gives the event its id, a `UUIDv7`, and the time in that id.
    #[must_use]
    pub fn stamp(self, id: Uuid) -> Event {
        let details = match self.client_request_id {
            Some(given) => self.details.with("clientRequestId", given.to_string()),
            None => self.details,
        };
        Event {
            id,
            at: time_of(id),
            actor_type: self.actor.kind.as_str().to_owned(),
            actor_id: self.actor.id,
            actor_name: Some(self.actor.name).filter(|name| !name.is_empty()),
            action: self.action.as_str().to_owned(),
            resource: self.resource.map(|resource| resource.0),
            related: self.related.into_iter().map(|resource| resource.0).collect(),
            outcome: self.outcome.as_str().to_owned(),
            request_id: self.request_id,
            source_ip: self.source.map(|source| source.to_string()),
            details: details.to_json(),
        }
    }
}

/// Returns the time in a `UUIDv7`, in milliseconds.
fn time_of(id: Uuid) -> DateTime<Utc> {
    let millis = i64::try_from(id.as_u128() >> 80).unwrap_or_default();
    DateTime::from_timestamp_millis(millis).unwrap_or_default()
}

/// Returns a lower bound for ids made from `time` on. It is above all ids made before.
#[must_use]
pub fn first_id_at(time: DateTime<Utc>) -> Uuid {
    let millis = time.timestamp_millis() + i64::from(!time.timestamp_subsec_nanos().is_multiple_of(1_000_000));
    Uuid::from_u128(u128::from(u64::try_from(millis).unwrap_or_default() & 0xffff_ffff_ffff) << 80)
}

/// Formats bytes in hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Event with its id. Actions and outcomes are text: events of later releases can be read and
/// verified too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Identifier, ordered by time.
    pub id: Uuid,
    /// Time in `id`.
    pub at: DateTime<Utc>,
    /// [`ActorKind`].
    pub actor_type: String,
    /// Id of the API key.
    pub actor_id: Option<Uuid>,
    /// Name of the actor.
    pub actor_name: Option<String>,
    /// [`Action`].
    pub action: String,
    /// [`Resource`].
    pub resource: Option<String>,
    /// Further resources.
    pub related: Vec<String>,
    /// [`Outcome`].
    pub outcome: String,
    /// Request id.
    pub request_id: Option<Uuid>,
    /// Address of the caller.
    pub source_ip: Option<String>,
    /// Further facts, as JSON.
    pub details: String,
}

/// Event as it is stored, with its HMAC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    /// Event.
    pub event: Event,
    /// Key of the HMAC. `None` for an event of a chain, which a release before seals wrote.
    pub key_id: Option<String>,
    /// Process that wrote the event; for an event of a chain, the chain.
    pub chain_id: Uuid,
    /// Place among the events of the process or the chain: 1, 2, 3, …
    pub sequence: i64,
    /// Hash of the event before in the chain; empty for an event of a process.
    pub previous_hash: Vec<u8>,
    /// HMAC over all other fields.
    pub hash: Vec<u8>,
}

impl StoredEvent {
    /// Returns the last seal whose events this prune deletes; `None` for an event of another action.
    #[must_use]
    pub fn pruned_through(&self) -> Option<i64> {
        let details = serde_json::from_str::<serde_json::Value>(&self.event.details);
        details.ok().filter(|_| self.event.action == Action::AuditPrune.as_str())?.get(THROUGH_SEAL)?.as_i64()
    }

    /// Returns the id and the HMAC.
    #[must_use]
    pub fn binding(&self) -> (Uuid, &[u8]) {
        (self.event.id, &self.hash)
    }
}

impl Event {
    /// Returns the input of the event's HMAC, which is different for any two events and places.
    #[must_use]
    pub fn bytes(&self, chain_id: Uuid, sequence: i64, previous_hash: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(384);
        bytes.extend(chain_id.as_bytes());
        bytes.extend(sequence.to_be_bytes());
        put(&mut bytes, previous_hash);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.at.timestamp_micros().to_be_bytes());
        put(&mut bytes, self.actor_type.as_bytes());
        put_option(&mut bytes, self.actor_id.as_ref().map(|id| id.as_bytes().as_slice()));
        put_option(&mut bytes, self.actor_name.as_deref().map(str::as_bytes));
        put(&mut bytes, self.action.as_bytes());
        put_option(&mut bytes, self.resource.as_deref().map(str::as_bytes));
        bytes.extend((self.related.len() as u64).to_be_bytes());
        self.related.iter().for_each(|one| put(&mut bytes, one.as_bytes()));
        put(&mut bytes, self.outcome.as_bytes());
        put_option(&mut bytes, self.request_id.as_ref().map(|id| id.as_bytes().as_slice()));
        put_option(&mut bytes, self.source_ip.as_deref().map(str::as_bytes));
        put(&mut bytes, self.details.as_bytes());
        bytes
    }
}

/// Appends a field after its length: no byte can move from one field to the next.
fn put(bytes: &mut Vec<u8>, field: &[u8]) {
    bytes.extend((field.len() as u64).to_be_bytes());
    bytes.extend(field);
}

fn put_option(bytes: &mut Vec<u8>, field: Option<&[u8]>) {
    bytes.push(u8::from(field.is_some()));
    put(bytes, field.unwrap_or_default());
}

/// Selects events. All conditions must hold.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Resource or further resource.
    pub resource: Option<Resource>,
    /// Name of the actor.
    pub actor: Option<String>,
    /// Action.
    pub action: Option<Action>,
    /// Outcome.
    pub outcome: Option<Outcome>,
    /// Earliest time.
    pub from: Option<DateTime<Utc>>,
    /// First time after the range.
    pub to: Option<DateTime<Utc>>,
}

/// Returns the actor of background work.
#[must_use]
pub fn worker() -> Actor {
    Actor { kind: ActorKind::Worker, id: None, name: String::new() }
}

/// Returns the actor of a request without a valid credential.
#[must_use]
pub fn anonymous() -> Actor {
    Actor { kind: ActorKind::Anonymous, id: None, name: String::new() }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;

    fn event() -> Event {
        let actor = Actor { kind: ActorKind::ApiKey, id: Some(Uuid::now_v7()), name: "ci".to_owned() };
        let account = Resource::account(&Name::parse("prod").unwrap());
        NewEvent::by(&actor, Action::AccountRotate, account).stamp(Uuid::now_v7())
    }

    #[test]
    fn words_parse_as_they_are_formatted() {
        for action in Action::ALL {
            assert_eq!(action.as_str().parse(), Ok(*action));
        }
        for outcome in Outcome::ALL {
            assert_eq!(outcome.as_str().parse(), Ok(*outcome));
        }
        assert!("dockerConfig.Reveal".parse::<Action>().is_err());
    }

    #[test]
    fn path_is_a_resource_if_every_segment_is_a_name() {
        let of = |path: &str| Resource::of_path(path).map(|resource| resource.0);
        assert_eq!(of("/v1/registry-accounts/prod").as_deref(), Some("registry-accounts/prod"));
        assert_eq!(of("/v1/registry-accounts:import").as_deref(), Some("registry-accounts"));
        for refused in ["/healthz", "/v1/registry-accounts/Canary", "/v1/registry-accounts/%20", "/v1/clusters/a//b"] {
            assert_eq!(of(refused), None, "{refused}");
        }
    }

    #[test]
    fn time_of_an_event_is_the_time_in_its_id() {
        let event = event();
        assert!(first_id_at(event.at) <= event.id);
        assert!(first_id_at(event.at + TimeDelta::microseconds(1)) > event.id);
        assert!(first_id_at(event.at + TimeDelta::milliseconds(1)) > event.id);
        assert!((crate::clock::now() - event.at).num_seconds() < 5);
    }

    #[test]
    fn every_field_of_an_event_is_signed() {
        let (chain, original) = (Uuid::now_v7(), event());
        let bytes = |event: &Event| event.bytes(chain, 1, b"before");
        let edits: [fn(&mut Event); 12] = [
            |e| e.id = Uuid::now_v7(),
            |e| e.at += TimeDelta::microseconds(1),
            |e| e.actor_type.push('x'),
            |e| e.actor_id = None,
            |e| e.actor_name = None,
            |e| e.action.push('x'),
            |e| e.resource = None,
            |e| e.related.push("x".to_owned()),
            |e| e.outcome.push('x'),
            |e| e.request_id = Some(Uuid::nil()),
            |e| e.source_ip = Some(String::new()),
            |e| e.details.push(' '),
        ];
        for (index, edit) in edits.iter().enumerate() {
            let mut changed = original.clone();
            edit(&mut changed);
            assert_ne!(bytes(&changed), bytes(&original), "edit {index}");
        }
        assert_ne!(original.bytes(chain, 2, b"before"), bytes(&original));
        assert_ne!(original.bytes(chain, 1, b"other"), bytes(&original));
        assert_ne!(original.bytes(Uuid::now_v7(), 1, b"before"), bytes(&original));
    }

    proptest! {
        #[test]
        fn no_byte_moves_from_one_field_to_the_next(one in ".{0,8}", other in ".{0,8}", third in ".{0,8}", fourth in ".{0,8}") {
            prop_assume!((&one, &other) != (&third, &fourth));
            let with = |action: &str, resource: &str| {
                let mut event = Event { id: Uuid::nil(), ..event() };
                (event.at, event.actor_id) = (DateTime::default(), None);
                event.action = action.to_owned();
                event.resource = Some(resource.to_owned());
                event.bytes(Uuid::nil(), 1, &[])
            };
            prop_assert_ne!(with(&one, &other), with(&third, &fourth));
        }
    }
}
