//! The audit record: who did what, when, with what result; never a value.
//!
//! What stands in an event comes in through types that can hold names alone: [`Resource`] and [`Details`].

use std::{collections::BTreeMap, net::IpAddr, str::FromStr};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::domain::{
    caller::{Actor, ActorKind, Call, Role},
    docker_config::Profile,
    invalid::Invalid,
    names::{Name, NamespaceName, SecretName},
};

macro_rules! words {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $type {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $type {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name in the API and in the database.
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

words! {
    /// What somebody did, or was refused.
    Action {
        /// Registered an account.
        AccountCreate = "registryAccount.create",
        /// Changed an account, but not its password.
        AccountUpdate = "registryAccount.update",
        /// Gave an account another password.
        AccountRotate = "registryAccount.rotate",
        /// Removed an account.
        AccountDelete = "registryAccount.delete",
        /// Had an account's password shown to its registry.
        AccountVerify = "registryAccount.verify",
        /// Was refused an import. One that goes through is recorded account by account.
        AccountImport = "registryAccount.import",
        /// Was refused to see accounts.
        AccountRead = "registryAccount.read",
        /// Received passwords.
        Reveal = "dockerConfig.reveal",
        /// Was refused to ask which entry fits an image.
        Explain = "dockerConfig.explain",
        /// Registered a cluster.
        ClusterCreate = "cluster.create",
        /// Changed a cluster.
        ClusterUpdate = "cluster.update",
        /// Removed a cluster.
        ClusterDelete = "cluster.delete",
        /// Was refused to see or check clusters.
        ClusterRead = "cluster.read",
        /// Had a Secret placed in a namespace.
        Deliver = "secret.deliver",
        /// Made an API key.
        KeyCreate = "apiKey.create",
        /// Revoked an API key.
        KeyRevoke = "apiKey.revoke",
        /// Was refused to see API keys.
        KeyRead = "apiKey.read",
        /// Declared a pull secret, or replaced its declaration.
        PullSecretDeclare = "pullSecret.declare",
        /// Removed a pull secret.
        PullSecretDelete = "pullSecret.delete",
        /// Had all targets of a pull secret looked at.
        PullSecretSync = "pullSecret.sync",
        /// Brought the Secret of a pull secret up to date in one namespace, or could not.
        PullSecretApply = "pullSecret.apply",
        /// Removed the Secret of a pull secret from one namespace, or could not.
        PullSecretRemove = "pullSecret.remove",
        /// Was refused to see pull secrets.
        PullSecretRead = "pullSecret.read",
        /// Trusted an identity provider.
        ProviderCreate = "identityProvider.create",
        /// Changed what an identity provider is trusted for.
        ProviderUpdate = "identityProvider.update",
        /// Ended the trust in an identity provider.
        ProviderDelete = "identityProvider.delete",
        /// Was refused to see identity providers.
        ProviderRead = "identityProvider.read",
        /// Re-sealed what is stored under another master key.
        MasterKeyRotate = "masterKey.rotate",
        /// Was refused to read this record.
        AuditRead = "audit.read",
        /// Took this record with him.
        AuditExport = "audit.export",
        /// Came to the door with a key that does not open it.
        Authenticate = "caller.authenticate",
        /// Was refused anything else.
        Other = "request.other",
    }
}

words! {
    /// How it went.
    Outcome {
        /// It is about to be done outside of the database; an event with the same request id says how that went.
        Attempt = "attempt",
        /// It was done.
        Success = "success",
        /// He may not.
        Denied = "denied",
        /// It could not be done.
        Failure = "failure",
    }
}

/// What an event is about, as the path of the API has it, without `/v1/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Resource(String);

impl Resource {
    /// A registry account.
    #[must_use]
    pub fn account(name: &Name) -> Self {
        Self(format!("registry-accounts/{name}"))
    }

    /// Registry accounts, some or all of them.
    #[must_use]
    pub fn accounts() -> Self {
        Self("registry-accounts".to_owned())
    }

    /// A cluster.
    #[must_use]
    pub fn cluster(name: &Name) -> Self {
        Self(format!("clusters/{name}"))
    }

    /// A Secret in a cluster.
    #[must_use]
    pub fn secret(cluster: &Name, namespace: &NamespaceName, name: &SecretName) -> Self {
        Self(format!("clusters/{cluster}/namespaces/{namespace}/secrets/{name}"))
    }

    /// An API key.
    #[must_use]
    pub fn api_key(id: Uuid) -> Self {
        Self(format!("api-keys/{id}"))
    }

    /// A pull secret.
    #[must_use]
    pub fn pull_secret(name: &Name) -> Self {
        Self(format!("pull-secrets/{name}"))
    }

    /// An identity provider.
    #[must_use]
    pub fn identity_provider(name: &Name) -> Self {
        Self(format!("identity-providers/{name}"))
    }

    /// A document of several accounts.
    #[must_use]
    pub fn docker_configs() -> Self {
        Self("docker-configs".to_owned())
    }

    /// The master keys.
    #[must_use]
    pub fn master_keys() -> Self {
        Self("master-keys".to_owned())
    }

    /// This record.
    #[must_use]
    pub fn audit_events() -> Self {
        Self("audit-events".to_owned())
    }

    /// What the path of a request is about; nothing where a part of it cannot be a name.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        let path = path.strip_prefix("/v1/")?;
        Self::parse(path.split_once(':').map_or(path, |(before, _)| before)).ok()
    }

    /// Parses a resource, as somebody looks for it.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it can be none.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        // Names have no other characters, and so no secret gets in that has one.
        let is_name = |part: &str| SecretName::parse(part).is_ok();
        if text.len() <= 600 && text.split('/').all(is_name) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Invalid::new("must be a path without `/v1/`, such as registry-accounts/martin-5000"))
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What else is worth knowing of an event. Names, numbers and words of ours go in, and nothing that a caller wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details(BTreeMap<&'static str, serde_json::Value>);

impl Details {
    fn with(mut self, key: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.0.insert(key, value.into());
        self
    }

    /// Which fields were changed.
    #[must_use]
    pub fn fields(self, fields: &[&'static str]) -> Self {
        self.with("fields", fields)
    }

    /// The version that the resource has now.
    #[must_use]
    pub fn version(self, version: i64) -> Self {
        self.with("version", version)
    }

    /// The name of an API key, whose resource is an id.
    #[must_use]
    pub fn name(self, name: &Name) -> Self {
        self.with("name", name.as_str())
    }

    /// The role of an API key.
    #[must_use]
    pub fn role(self, role: Role) -> Self {
        self.with("role", role.as_str())
    }

    /// For which reader.
    #[must_use]
    pub fn profile(self, profile: Profile) -> Self {
        self.with("profile", profile.as_str())
    }

    /// Nothing was to be stored.
    #[must_use]
    pub fn dry_run(self, dry_run: bool) -> Self {
        if dry_run { self.with("dryRun", true) } else { self }
    }

    /// It came with a document of many accounts.
    #[must_use]
    pub fn by_import(self) -> Self {
        self.with("via", "import")
    }

    /// Why it was refused or failed: a slug of ours.
    #[must_use]
    pub fn reason(self, slug: &'static str) -> Self {
        self.with("reason", slug)
    }

    /// In which namespace of which cluster.
    #[must_use]
    pub fn target(self, cluster: &Name, namespace: &NamespaceName) -> Self {
        self.with("cluster", cluster.as_str()).with("namespace", namespace.as_str())
    }

    /// Which generation of a pull secret.
    #[must_use]
    pub fn generation(self, generation: i64) -> Self {
        self.with("generation", generation)
    }

    /// What was done: a word of ours.
    #[must_use]
    pub fn did(self, did: &'static str) -> Self {
        self.with("did", did)
    }

    /// How many there were.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        self.with("count", count)
    }

    fn to_json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_else(|_| "{}".to_owned())
    }
}

/// Something that happens.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Who.
    pub actor: Actor,
    /// What.
    pub action: Action,
    /// To what.
    pub resource: Option<Resource>,
    /// What else it is about.
    pub related: Vec<Resource>,
    /// How it went.
    pub outcome: Outcome,
    /// In which request.
    pub request_id: Option<Uuid>,
    /// From where.
    pub source: Option<IpAddr>,
    /// What else is worth knowing.
    pub details: Details,
}

impl NewEvent {
    /// Something that a caller does, with success if nothing else is said.
    #[must_use]
    pub fn of(call: &Call, action: Action, resource: Resource) -> Self {
        Self {
            actor: call.identity.actor.clone(),
            action,
            resource: Some(resource),
            related: Vec::new(),
            outcome: Outcome::Success,
            request_id: Some(call.request_id),
            source: call.source,
            details: Details::default(),
        }
    }

    /// Something that somebody at the command line does, with success if nothing else is said.
    #[must_use]
    pub fn by(actor: &Actor, action: Action, resource: Resource) -> Self {
        Self {
            actor: actor.clone(),
            action,
            resource: Some(resource),
            related: Vec::new(),
            outcome: Outcome::Success,
            request_id: None,
            source: None,
            details: Details::default(),
        }
    }

    /// With this outcome.
    #[must_use]
    pub fn outcome(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    /// With these details.
    #[must_use]
    pub fn details(self, details: Details) -> Self {
        Self { details, ..self }
    }

    /// About these too.
    #[must_use]
    pub fn related(self, related: Vec<Resource>) -> Self {
        Self { related, ..self }
    }

    /// Gives it an identity, a `UUIDv7`, and with it its time.
    #[must_use]
    pub fn stamp(self, id: Uuid) -> Event {
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
            details: self.details.to_json(),
        }
    }
}

/// The time that a `UUIDv7` was made at, to the millisecond.
fn time_of(id: Uuid) -> DateTime<Utc> {
    let millis = i64::try_from(id.as_u128() >> 80).unwrap_or_default();
    DateTime::from_timestamp_millis(millis).unwrap_or_default()
}

/// What is at or before the id of every event from this time on, and after that of every one before it.
#[must_use]
pub fn first_id_at(time: DateTime<Utc>) -> Uuid {
    let millis = time.timestamp_millis() + i64::from(!time.timestamp_subsec_nanos().is_multiple_of(1_000_000));
    Uuid::from_u128(u128::from(u64::try_from(millis).unwrap_or_default() & 0xffff_ffff_ffff) << 80)
}

/// Bytes as people read and compare them.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// An event as it is stored: words, so that one that a later release wrote can be read and checked too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Identity, in the order of time.
    pub id: Uuid,
    /// When.
    pub at: DateTime<Utc>,
    /// What kind of caller: [`ActorKind`].
    pub actor_type: String,
    /// Id of the API key.
    pub actor_id: Option<Uuid>,
    /// His name.
    pub actor_name: Option<String>,
    /// What: [`Action`].
    pub action: String,
    /// To what: [`Resource`].
    pub resource: Option<String>,
    /// What else it is about.
    pub related: Vec<String>,
    /// How it went: [`Outcome`].
    pub outcome: String,
    /// In which request.
    pub request_id: Option<Uuid>,
    /// From where.
    pub source_ip: Option<String>,
    /// What else is worth knowing, as JSON.
    pub details: String,
}

/// Where an event is in its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Which chain.
    pub chain_id: Uuid,
    /// Where in it: 1, 2, 3, …
    pub sequence: i64,
    /// The hash of the event before; for the first one, the opening of the chain.
    pub previous_hash: Vec<u8>,
    /// HMAC over everything of the event and of the fields above.
    pub hash: Vec<u8>,
}

/// An event and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedEvent {
    /// The event.
    pub event: Event,
    /// Its place.
    pub link: Link,
}

impl Event {
    /// What its hash is over: no two events at two places have the same bytes.
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

/// With the length before it, so that nothing can move from one field to the next.
fn put(bytes: &mut Vec<u8>, field: &[u8]) {
    bytes.extend((field.len() as u64).to_be_bytes());
    bytes.extend(field);
}

fn put_option(bytes: &mut Vec<u8>, field: Option<&[u8]>) {
    bytes.push(u8::from(field.is_some()));
    put(bytes, field.unwrap_or_default());
}

/// How a chain begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Identity of the chain.
    pub id: Uuid,
    /// Its place among all chains: 1, 2, 3, …
    pub number: i64,
    /// When.
    pub opened_at: DateTime<Utc>,
    /// The chain that it goes on for, and how many events that one had.
    pub continues: Option<(Uuid, i64)>,
}

impl Opening {
    /// What the opening's HMAC is over; `before` is that of the chain with the number before.
    #[must_use]
    pub fn bytes(&self, before: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128);
        put(&mut bytes, before);
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.number.to_be_bytes());
        bytes.extend(self.opened_at.timestamp_micros().to_be_bytes());
        let continues = self.continues.map(|(id, sequence)| [&id.as_bytes()[..], &sequence.to_be_bytes()].concat());
        put_option(&mut bytes, continues.as_deref());
        bytes
    }
}

/// Where a chain is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// How many events it has.
    pub sequence: i64,
    /// The hash of the last one; the opening, where there is none.
    pub hash: Vec<u8>,
}

/// A chain as it is stored.
#[derive(Debug, Clone)]
pub struct Chain {
    /// How it begins.
    pub opening: Opening,
    /// The opening's HMAC.
    pub opening_hash: Vec<u8>,
    /// Which key its HMACs are made with.
    pub key_id: String,
    /// Where it is.
    pub head: Head,
    /// An HMAC over where it is.
    pub seal: Vec<u8>,
}

/// Which events somebody wants to see. All that is said must hold.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// About this.
    pub resource: Option<Resource>,
    /// By whom, by name.
    pub actor: Option<String>,
    /// What was done.
    pub action: Option<Action>,
    /// How it went.
    pub outcome: Option<Outcome>,
    /// From this time on.
    pub from: Option<DateTime<Utc>>,
    /// Before this time.
    pub to: Option<DateTime<Utc>>,
}

/// regcred itself.
#[must_use]
pub fn worker() -> Actor {
    Actor { kind: ActorKind::Worker, id: None, name: String::new() }
}

/// Nobody who was let in.
#[must_use]
pub fn nobody() -> Actor {
    Actor { kind: ActorKind::Anonymous, id: None, name: String::new() }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;

    fn event() -> Event {
        let actor = Actor { kind: ActorKind::ApiKey, id: Some(Uuid::now_v7()), name: "ci".to_owned() };
        let account = Resource::account(&Name::parse("martin").unwrap());
        NewEvent::by(&actor, Action::AccountRotate, account).stamp(Uuid::now_v7())
    }

    #[test]
    fn words_are_read_as_they_are_written() {
        for action in Action::ALL {
            assert_eq!(action.as_str().parse(), Ok(*action));
        }
        for outcome in Outcome::ALL {
            assert_eq!(outcome.as_str().parse(), Ok(*outcome));
        }
        assert!("dockerConfig.Reveal".parse::<Action>().is_err());
    }

    #[test]
    fn a_path_names_a_resource_if_all_of_it_can_be_names() {
        let of = |path: &str| Resource::of_path(path).map(|resource| resource.0);
        assert_eq!(of("/v1/registry-accounts/martin-5000").as_deref(), Some("registry-accounts/martin-5000"));
        assert_eq!(of("/v1/registry-accounts:import").as_deref(), Some("registry-accounts"));
        for refused in ["/healthz", "/v1/registry-accounts/Canary", "/v1/registry-accounts/%20", "/v1/clusters/a//b"] {
            assert_eq!(of(refused), None, "{refused}");
        }
    }

    #[test]
    fn the_time_of_an_event_is_that_of_its_id() {
        let event = event();
        assert!(first_id_at(event.at) <= event.id);
        assert!(first_id_at(event.at + TimeDelta::microseconds(1)) > event.id);
        assert!(first_id_at(event.at + TimeDelta::milliseconds(1)) > event.id);
        assert!((crate::clock::now() - event.at).num_seconds() < 5);
    }

    #[test]
    fn every_field_is_in_the_bytes() {
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
        fn nothing_moves_from_one_field_to_the_next(one in ".{0,8}", other in ".{0,8}", third in ".{0,8}", fourth in ".{0,8}") {
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
