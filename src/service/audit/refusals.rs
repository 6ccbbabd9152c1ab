//! Counts refusals, so that no caller can fill the disk with them: at most one event a minute for
//! each kind, and a bounded number of kinds. Each caller has a share of kinds of its own, so that
//! none can hide the refusals of another one.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use crate::domain::{
    audit::{Action, Details, NewEvent, Outcome, Resource, anonymous},
    caller::{Actor, ActorKind},
};

/// Most kinds at a time of one caller, and of all anonymous callers. One more counts the caller's
/// other kinds.
const CALLER_KINDS_MAX: usize = 10;
const ANONYMOUS_KINDS_MAX: usize = 30;
/// Most callers with a share at a time. All others have one kind together, so a process writes at
/// most 100 × 11 + 31 + 1 = 1,132 events a minute.
const CALLERS_MAX: usize = 100;
/// Shortest interval between two events of one kind.
const WINDOW: Duration = Duration::from_mins(1);
/// Most resources in one event, those of all its refusals together.
const RESOURCES_MAX: usize = 10;

/// Refused request.
#[derive(Debug)]
pub struct Refusal {
    /// Caller.
    pub actor: Actor,
    /// Action.
    pub action: Action,
    /// Resources: the one that the request is about, then related ones.
    pub resources: Vec<Resource>,
    /// Slug of the reason.
    pub reason: &'static str,
    /// Request id.
    pub request_id: Option<Uuid>,
    /// Address of the caller.
    pub source: Option<IpAddr>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    actor: (ActorKind, Option<Uuid>, String),
    action: Action,
    reason: &'static str,
    network: Option<IpAddr>,
}

impl Kind {
    fn of(refusal: &Refusal) -> Self {
        let Actor { kind, id, name } = &refusal.actor;
        let network = refusal.source.map(network);
        Self { actor: (*kind, *id, name.clone()), action: refusal.action, reason: refusal.reason, network }
    }
}

/// Owner of a share: an API key, or all tokens of an identity provider. A tenant of an issuer may
/// be able to choose among many subjects.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Owner(ActorKind, Option<Uuid>, String);

impl Owner {
    fn of(Actor { kind, id, name }: &Actor) -> Self {
        let provider = || name.split_once('/').map_or(name.as_str(), |(provider, _)| provider);
        let name = if *kind == ActorKind::IdentityProvider { provider() } else { name };
        Self(*kind, *id, name.to_owned())
    }
}

/// Returns the /64 network of an IPv6 address, which one customer controls.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

/// Resources of a refusal, and how often they were refused together.
#[derive(Debug)]
struct Target {
    resources: Vec<Resource>,
    count: u64,
}

#[derive(Debug, Default)]
struct Slot {
    /// First refusal since the last event, and the number of all.
    first: Option<Refusal>,
    count: u64,
    /// Distinct targets of these refusals, the first ones.
    targets: Vec<Target>,
    written: Option<Instant>,
}

impl Slot {
    fn count(&mut self, mut refusal: Refusal) {
        self.count += 1;
        let mut resources = std::mem::take(&mut refusal.resources);
        resources.truncate(RESOURCES_MAX);
        if let Some(known) = self.targets.iter_mut().find(|target| target.resources == resources) {
            known.count += 1;
        } else {
            let named: usize = self.targets.iter().map(|target| target.resources.len().max(1)).sum();
            if named + resources.len().max(1) <= RESOURCES_MAX {
                self.targets.push(Target { resources, count: 1 });
            }
        }
        self.first.get_or_insert(refusal);
    }

    fn may_be_written(&self, now: Instant) -> bool {
        self.written.is_none_or(|written| now.duration_since(written) >= WINDOW)
    }

    /// Whether it has refusals to write, or delays the next event of its kind.
    fn is_in_use(&self, now: Instant) -> bool {
        self.first.is_some() || !self.may_be_written(now)
    }

    fn take(&mut self, now: Instant) -> Option<NewEvent> {
        if !self.may_be_written(now) {
            return None;
        }
        let refusal = self.first.take()?;
        self.written = Some(now);
        let count = std::mem::take(&mut self.count);
        let targets = std::mem::take(&mut self.targets);
        let details = Details::default().reason(refusal.reason).count(count);
        let (resource, related, details) = named(targets, count, details);
        Some(NewEvent {
            actor: refusal.actor,
            action: refusal.action,
            resource,
            related,
            outcome: Outcome::Denied,
            request_id: refusal.request_id,
            // The event stands for several requests.
            client_request_id: None,
            source: refusal.source,
            details,
        })
    }
}

/// Names what was refused. An event of one target has its resource and related ones. An event of
/// several has none of its own: `related` makes it findable, and the details have each target, since
/// a resource of one beside a related one of another would state a refusal that never happened.
fn named(targets: Vec<Target>, count: u64, details: Details) -> (Option<Resource>, Vec<Resource>, Details) {
    if let [only] = &targets[..]
        && only.count == count
    {
        let mut resources = targets.into_iter().flat_map(|only| only.resources);
        return (resources.next(), resources.collect(), details);
    }
    let details = details.refused(targets.iter().map(|target| (target.resources.as_slice(), target.count)));
    let mut related: Vec<Resource> = Vec::new();
    for resource in targets.into_iter().flat_map(|target| target.resources) {
        if !related.contains(&resource) {
            related.push(resource);
        }
    }
    (None, related, details)
}

/// Refusals of one owner.
#[derive(Debug, Default)]
struct Share {
    by_kind: HashMap<Kind, Slot>,
    /// Refusals of kinds without a slot.
    others: Slot,
}

impl Share {
    fn count(&mut self, refusal: Refusal, kinds_max: usize) {
        let kind = Kind::of(&refusal);
        if let Some(slot) = self.by_kind.get_mut(&kind) {
            slot.count(refusal);
        } else if self.by_kind.len() < kinds_max {
            self.by_kind.entry(kind).or_default().count(refusal);
        } else {
            let actor = refusal.actor;
            self.others.count(too_many_kinds(actor));
        }
    }

    /// Takes the events that are due, and drops the slots that have no further use.
    fn take(&mut self, now: Instant) -> Vec<NewEvent> {
        let mut events: Vec<NewEvent> = self.by_kind.values_mut().filter_map(|slot| slot.take(now)).collect();
        events.extend(self.others.take(now));
        self.by_kind.retain(|_, slot| slot.is_in_use(now));
        events
    }

    fn is_in_use(&self, now: Instant) -> bool {
        !self.by_kind.is_empty() || self.others.is_in_use(now)
    }
}

#[derive(Debug, Default)]
struct Shares {
    anonymous: Share,
    by_owner: HashMap<Owner, Share>,
    /// Refusals of owners without a share.
    others: Slot,
}

/// Refusal that stands for kinds beyond a share.
fn too_many_kinds(actor: Actor) -> Refusal {
    let reason = "too-many-kinds";
    Refusal { actor, action: Action::Other, resources: Vec::new(), reason, request_id: None, source: None }
}

/// Refusals that were not written yet.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Shares>);

impl Refusals {
    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.0.lock()
    }

    /// Counts a refusal. Never waits and never fails.
    pub fn count(&self, refusal: Refusal) {
        let mut shares = self.shares();
        if refusal.actor.kind == ActorKind::Anonymous {
            shares.anonymous.count(refusal, ANONYMOUS_KINDS_MAX);
            return;
        }
        let owner = Owner::of(&refusal.actor);
        if let Some(share) = shares.by_owner.get_mut(&owner) {
            share.count(refusal, CALLER_KINDS_MAX);
        } else if shares.by_owner.len() < CALLERS_MAX {
            shares.by_owner.entry(owner).or_default().count(refusal, CALLER_KINDS_MAX);
        } else {
            shares.others.count(too_many_kinds(anonymous()));
        }
    }

    /// Takes the events that are due.
    pub fn take(&self, now: Instant) -> Vec<NewEvent> {
        let mut shares = self.shares();
        let mut events = shares.anonymous.take(now);
        events.extend(shares.by_owner.values_mut().flat_map(|share| share.take(now)));
        shares.by_owner.retain(|_, share| share.is_in_use(now));
        events.extend(shares.others.take(now));
        events
    }

    /// Takes all events, due or not.
    pub fn take_all(&self) -> Vec<NewEvent> {
        let shares = std::mem::take(&mut *self.shares());
        let of_owners = shares.by_owner.into_values().chain([shares.anonymous]);
        let slots =
            of_owners.flat_map(|share| share.by_kind.into_values().chain([share.others])).chain([shares.others]);
        let now = Instant::now();
        slots.filter_map(|slot| Slot { written: None, ..slot }.take(now)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(source: &str, action: Action, resource: &str) -> Refusal {
        let resources = vec![Resource::parse(resource).unwrap()];
        let source = Some(source.parse().unwrap());
        Refusal { actor: anonymous(), action, resources, reason: "forbidden", request_id: None, source }
    }

    fn details_of(event: &NewEvent) -> serde_json::Value {
        serde_json::from_str(&event.clone().stamp(Uuid::now_v7()).details).unwrap()
    }

    fn count_of(event: &NewEvent) -> u64 {
        details_of(event)["count"].as_u64().unwrap()
    }

    #[test]
    fn refusals_of_several_resources_are_not_joined_into_one() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let deliver = |cluster: &str, account: &str| {
            let names = [format!("clusters/{cluster}"), format!("registry-accounts/{account}")];
            let resources = names.iter().map(|name| Resource::parse(name).unwrap()).collect();
            refusals.count(Refusal { resources, ..refusal("192.0.2.1", Action::Deliver, "clusters/dev") });
        };
        deliver("dev", "a");
        deliver("dev", "a");
        let events = refusals.take(start);
        let [one] = &events[..] else { panic!("{events:?}") };
        assert_eq!(one.resource.as_ref().map(Resource::as_str), Some("clusters/dev"));
        assert_eq!(one.related.iter().map(Resource::as_str).collect::<Vec<_>>(), ["registry-accounts/a"]);
        assert_eq!(details_of(one), serde_json::json!({"reason": "forbidden", "count": 2}));

        deliver("dev", "a");
        deliver("prod", "b");
        deliver("dev", "a");
        let events = refusals.take(start + WINDOW);
        let [joined] = &events[..] else { panic!("{events:?}") };
        assert!(joined.resource.is_none(), "{joined:?}");
        let related: Vec<_> = joined.related.iter().map(Resource::as_str).collect();
        assert_eq!(related, ["clusters/dev", "registry-accounts/a", "clusters/prod", "registry-accounts/b"]);
        let expected = serde_json::json!([
            {"resource": "clusters/dev", "related": ["registry-accounts/a"], "count": 2},
            {"resource": "clusters/prod", "related": ["registry-accounts/b"], "count": 1},
        ]);
        assert_eq!(details_of(joined)["refused"], expected);
    }

    #[test]
    fn first_refusal_is_due_at_once_and_the_next_after_a_minute() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        refusals.count(refusal("192.0.2.1", Action::Reveal, "docker-configs"));
        let first = refusals.take(start);
        assert_eq!(first.iter().map(count_of).collect::<Vec<_>>(), [1]);
        for account in 0..1_000 {
            refusals.count(refusal("192.0.2.1", Action::Reveal, &format!("registry-accounts/a-{account}")));
        }
        assert!(refusals.take(start + Duration::from_secs(59)).is_empty());
        let second = refusals.take(start + Duration::from_mins(1));
        assert_eq!(second.iter().map(count_of).collect::<Vec<_>>(), [1_000]);
        assert_eq!((second[0].resource.is_none(), second[0].related.len()), (true, RESOURCES_MAX));
        assert!(refusals.take(start + Duration::from_mins(2)).is_empty());
        assert!(refusals.shares().by_owner.is_empty());
    }

    #[test]
    fn flood_from_many_networks_makes_few_events_and_loses_no_count() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let mut events = Vec::new();
        for second in 0..60 {
            for last in 0..=255 {
                refusals.count(refusal(&format!("192.0.2.{last}"), Action::Authenticate, "docker-configs"));
            }
            events.extend(refusals.take(start + Duration::from_secs(second)));
        }
        assert_eq!(events.len(), ANONYMOUS_KINDS_MAX + 1);
        events.extend(refusals.take_all());
        assert_eq!(events.iter().map(count_of).sum::<u64>(), 60 * 256);
    }

    fn by(kind: ActorKind, name: &str, refusal: Refusal) -> Refusal {
        Refusal { actor: Actor { kind, id: None, name: name.to_owned() }, ..refusal }
    }

    fn known(name: &str, refusal: Refusal) -> Refusal {
        by(ActorKind::ApiKey, name, refusal)
    }

    /// Refusals of one caller, each of another kind.
    fn probe(refusals: &Refusals, kind: ActorKind, names: impl Iterator<Item = String>) {
        for (number, name) in names.enumerate() {
            let source = format!("198.51.{}.{}", number / 256, number % 256);
            refusals.count(by(kind, &name, refusal(&source, Action::Reveal, "docker-configs")));
        }
    }

    fn of_actor(events: &[NewEvent], name: &str) -> Vec<(&'static str, u64)> {
        let of_actor = events.iter().filter(|event| event.actor.name == name);
        let mut found: Vec<_> = of_actor.map(|event| (event.action.as_str(), count_of(event))).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn flood_of_anonymous_requests_hides_no_known_caller() {
        let refusals = Refusals::default();
        for last in 0..=255 {
            refusals.count(refusal(&format!("192.0.2.{last}"), Action::Authenticate, "docker-configs"));
        }
        for number in 0..CALLERS_MAX {
            let name = format!("ci-{number}");
            refusals.count(known(&name, refusal("198.51.100.1", Action::Reveal, "docker-configs")));
        }
        let events = refusals.take(Instant::now());
        let known = events.iter().filter(|event| event.actor.kind == ActorKind::ApiKey);
        assert_eq!(known.count(), CALLERS_MAX);
        assert_eq!(events.len(), CALLERS_MAX + ANONYMOUS_KINDS_MAX + 1);
    }

    #[test]
    fn one_caller_cannot_hide_the_refusals_of_another() {
        let refusals = Refusals::default();
        probe(&refusals, ActorKind::ApiKey, std::iter::repeat_n("noisy".to_owned(), 1_000));
        probe(&refusals, ActorKind::IdentityProvider, (0..1_000).map(|number| format!("github/branch-{number}")));
        refusals.count(known("quiet", refusal("203.0.113.1", Action::Deliver, "clusters/dev")));
        refusals.count(by(
            ActorKind::IdentityProvider,
            "gitlab/job",
            refusal("203.0.113.1", Action::Deliver, "clusters/dev"),
        ));

        let events = refusals.take(Instant::now());

        assert_eq!(of_actor(&events, "quiet"), [("secret.deliver", 1)]);
        assert_eq!(of_actor(&events, "gitlab/job"), [("secret.deliver", 1)]);
        // The noisy caller is named, also in the event for its further kinds.
        let mut expected = vec![("dockerConfig.reveal", 1); CALLER_KINDS_MAX];
        expected.push(("request.other", 1_000 - CALLER_KINDS_MAX as u64));
        assert_eq!(of_actor(&events, "noisy"), expected);
        let of_provider = events.iter().filter(|event| event.actor.name.starts_with("github/"));
        assert_eq!(of_provider.map(count_of).sum::<u64>(), 1_000);
        assert_eq!(events.len(), 2 * (CALLER_KINDS_MAX + 1) + 2);
    }

    #[test]
    fn number_of_events_a_minute_is_bounded_for_any_number_of_callers() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let mut events = Vec::new();
        for second in 0..60 {
            for number in 0..2 * CALLERS_MAX {
                probe(&refusals, ActorKind::ApiKey, std::iter::repeat_n(format!("ci-{number}"), CALLER_KINDS_MAX + 2));
            }
            events.extend(refusals.take(start + Duration::from_secs(second)));
        }
        assert_eq!(events.len(), CALLERS_MAX * (CALLER_KINDS_MAX + 1) + 1);
        events.extend(refusals.take_all());
        assert_eq!(events.iter().map(count_of).sum::<u64>(), (60 * 2 * CALLERS_MAX * (CALLER_KINDS_MAX + 2)) as u64);
    }

    #[test]
    fn refusal_of_many_resources_names_a_few() {
        let refusals = Refusals::default();
        let names = (0..1_000).map(|number| Resource::parse(&format!("registry-accounts/a-{number}")).unwrap());
        let one = Refusal { resources: names.collect(), ..refusal("192.0.2.1", Action::Reveal, "docker-configs") };
        refusals.count(one);
        let events = refusals.take(Instant::now());
        assert_eq!((events.len(), events[0].related.len()), (1, RESOURCES_MAX - 1));
        assert_eq!(count_of(&events[0]), 1);
    }

    #[test]
    fn kinds_differ_by_actor_action_and_network() {
        let refusals = Refusals::default();
        refusals.count(refusal("2001:db8::1", Action::Reveal, "docker-configs"));
        refusals.count(refusal("2001:db8::2", Action::Reveal, "docker-configs"));
        refusals.count(refusal("2001:db8::2", Action::Deliver, "docker-configs"));
        refusals.count(refusal("2001:db8:0:1::2", Action::Deliver, "docker-configs"));
        refusals.count(known("ci", refusal("2001:db8::1", Action::Reveal, "docker-configs")));
        assert_eq!(refusals.take(Instant::now()).len(), 4);
    }
}
