//! Counts refusals, so that no caller can fill the disk with them: at most one event a minute for
//! each kind, and a bounded number of kinds. Known callers have kinds of their own, which a flood
//! of anonymous requests does not use up.

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

/// Most kinds at a time, of known and of anonymous callers. All others share one more, so a process
/// writes at most 91 events a minute.
const KNOWN_KINDS_MAX: usize = 60;
const ANONYMOUS_KINDS_MAX: usize = 30;
/// Shortest interval between two events of one kind.
const WINDOW: Duration = Duration::from_mins(1);
/// Most resources in one event.
const RESOURCES_MAX: usize = 10;

/// Refused request.
#[derive(Debug)]
pub struct Refusal {
    /// Caller.
    pub actor: Actor,
    /// Action.
    pub action: Action,
    /// Resources.
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

    fn is_anonymous(&self) -> bool {
        self.actor.0 == ActorKind::Anonymous
    }
}

/// Returns the /64 network of an IPv6 address, which one customer controls.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// First refusal since the last event, and their number.
    first: Option<Refusal>,
    count: u64,
    written: Option<Instant>,
}

impl Slot {
    fn count(&mut self, mut refusal: Refusal) {
        self.count += 1;
        let resources = std::mem::take(&mut refusal.resources);
        let first = self.first.get_or_insert(refusal);
        for resource in resources {
            if first.resources.len() < RESOURCES_MAX && !first.resources.contains(&resource) {
                first.resources.push(resource);
            }
        }
    }

    fn may_be_written(&self, now: Instant) -> bool {
        self.written.is_none_or(|written| now.duration_since(written) >= WINDOW)
    }

    fn take(&mut self, now: Instant) -> Option<NewEvent> {
        if !self.may_be_written(now) {
            return None;
        }
        let refusal = self.first.take()?;
        self.written = Some(now);
        let count = std::mem::take(&mut self.count);
        let mut resources = refusal.resources.into_iter();
        Some(NewEvent {
            actor: refusal.actor,
            action: refusal.action,
            resource: resources.next(),
            related: resources.collect(),
            outcome: Outcome::Denied,
            request_id: refusal.request_id,
            source: refusal.source,
            details: Details::default().reason(refusal.reason).count(count),
        })
    }
}

#[derive(Debug, Default)]
struct Slots {
    by_kind: HashMap<Kind, Slot>,
    /// Refusals of kinds without a slot.
    others: Slot,
}

impl Slots {
    fn have_room_for(&self, kind: &Kind) -> bool {
        let is_anonymous = kind.is_anonymous();
        let most = if is_anonymous { ANONYMOUS_KINDS_MAX } else { KNOWN_KINDS_MAX };
        self.by_kind.keys().filter(|other| other.is_anonymous() == is_anonymous).count() < most
    }
}

/// Refusals that were not written yet.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Slots>);

impl Refusals {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.0.lock()
    }

    /// Counts a refusal. Never waits and never fails.
    pub fn count(&self, refusal: Refusal) {
        let mut slots = self.slots();
        let kind = Kind::of(&refusal);
        if let Some(slot) = slots.by_kind.get_mut(&kind) {
            slot.count(refusal);
        } else if slots.have_room_for(&kind) {
            slots.by_kind.entry(kind).or_default().count(refusal);
        } else {
            let reason = "too-many-kinds";
            slots.others.count(Refusal {
                actor: anonymous(),
                action: Action::Other,
                resources: Vec::new(),
                reason,
                request_id: None,
                source: None,
            });
        }
    }

    /// Takes the events that are due.
    pub fn take(&self, now: Instant) -> Vec<NewEvent> {
        let mut slots = self.slots();
        let mut events: Vec<NewEvent> = slots.by_kind.values_mut().filter_map(|slot| slot.take(now)).collect();
        slots.by_kind.retain(|_, slot| slot.first.is_some() || !slot.may_be_written(now));
        events.extend(slots.others.take(now));
        events
    }

    /// Takes all events, due or not.
    pub fn take_all(&self) -> Vec<NewEvent> {
        let mut slots = self.slots();
        let mut all: Vec<Slot> = slots.by_kind.drain().map(|(_, slot)| slot).collect();
        all.push(std::mem::take(&mut slots.others));
        let now = Instant::now();
        all.into_iter().filter_map(|slot| Slot { written: None, ..slot }.take(now)).collect()
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

    fn count_of(event: &NewEvent) -> u64 {
        let details = event.clone().stamp(Uuid::now_v7()).details;
        serde_json::from_str::<serde_json::Value>(&details).unwrap()["count"].as_u64().unwrap()
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
        assert_eq!(second[0].related.len(), RESOURCES_MAX - 1);
        assert!(refusals.take(start + Duration::from_mins(2)).is_empty());
        assert!(refusals.slots().by_kind.is_empty());
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

    fn known(name: &str, refusal: Refusal) -> Refusal {
        Refusal { actor: Actor { kind: ActorKind::ApiKey, id: None, name: name.to_owned() }, ..refusal }
    }

    #[test]
    fn flood_of_anonymous_requests_hides_no_known_caller() {
        let refusals = Refusals::default();
        for last in 0..=255 {
            refusals.count(refusal(&format!("192.0.2.{last}"), Action::Authenticate, "docker-configs"));
        }
        for number in 0..=KNOWN_KINDS_MAX {
            let name = format!("ci-{number}");
            refusals.count(known(&name, refusal("198.51.100.1", Action::Reveal, "docker-configs")));
        }
        let events = refusals.take(Instant::now());
        let known = events.iter().filter(|event| event.actor.kind == ActorKind::ApiKey);
        assert_eq!(known.count(), KNOWN_KINDS_MAX);
        assert_eq!(events.len(), KNOWN_KINDS_MAX + ANONYMOUS_KINDS_MAX + 1);
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
