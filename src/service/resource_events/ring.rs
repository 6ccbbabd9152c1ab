//! The last events of a process, from which streams resume.

use std::{collections::VecDeque, sync::Arc};

use uuid::Uuid;

use crate::domain::resource_event::EventId;

/// Maximum number of events.
pub const EVENTS_MAX: usize = 10_000;
/// Maximum size of the events in bytes, approximately.
const SIZE_MAX: usize = 32 * 1024 * 1024;

/// The last events, each with its sequence number in the epoch.
#[derive(Debug)]
pub struct Ring<T> {
    epoch: u64,
    /// Number of events of this epoch that were dropped.
    dropped: u64,
    events: VecDeque<(Arc<T>, usize)>,
    size: usize,
}

impl<T> Ring<T> {
    /// Creates an empty ring with a new epoch.
    pub fn new() -> Self {
        // The last 62 bits are random.
        let epoch = Uuid::now_v7().as_u64_pair().1;
        Self { epoch, dropped: 0, events: VecDeque::new(), size: 0 }
    }

    /// Id of the last event, or of the beginning of the epoch.
    pub fn end(&self) -> EventId {
        self.id(self.events.len())
    }

    fn id(&self, place: usize) -> EventId {
        EventId { epoch: self.epoch, sequence: self.dropped + place as u64 }
    }

    /// Appends an event of a size in bytes, and drops the oldest ones beyond the limits.
    pub fn push(&mut self, event: T, size: usize) {
        self.events.push_back((Arc::new(event), size));
        self.size += size;
        while self.events.len() > EVENTS_MAX || self.size > SIZE_MAX {
            let Some((_, size)) = self.events.pop_front() else { return };
            self.size -= size;
            self.dropped += 1;
        }
    }

    /// Place of the event after `id`; `None` if `id` is not of this history, or if events after it
    /// were dropped.
    fn place_after(&self, id: EventId) -> Option<usize> {
        let place = usize::try_from(id.sequence.checked_sub(self.dropped)?).ok()?;
        (id.epoch == self.epoch && place <= self.events.len()).then_some(place)
    }

    /// Whether all events after `id` are kept.
    pub fn continues(&self, id: EventId) -> bool {
        self.place_after(id).is_some()
    }

    /// Returns at most `limit` events after `id`; `None` if not all events after it are kept.
    pub fn after(&self, id: EventId, limit: usize) -> Option<Vec<(EventId, Arc<T>)>> {
        let place = self.place_after(id)?;
        let events = self.events.iter().enumerate().skip(place).take(limit);
        Some(events.map(|(index, (event, _))| (self.id(index + 1), Arc::clone(event))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(events: usize) -> Ring<usize> {
        let mut ring = Ring::new();
        (0..events).for_each(|event| ring.push(event, 1));
        ring
    }

    fn after(ring: &Ring<usize>, sequence: u64) -> Option<Vec<usize>> {
        let found = ring.after(EventId { sequence, ..ring.end() }, usize::MAX)?;
        assert!(found.iter().enumerate().all(|(index, (id, _))| id.sequence == sequence + 1 + index as u64));
        Some(found.into_iter().map(|(_, event)| *event).collect())
    }

    #[test]
    fn events_after_an_id_follow_without_gap() {
        let ring = ring(3);
        assert_eq!(after(&ring, 0), Some(vec![0, 1, 2]));
        assert_eq!(after(&ring, 2), Some(vec![2]));
        assert_eq!(after(&ring, 3), Some(vec![]));
        assert_eq!(after(&ring, 4), None, "an id of the future");
        let limited = ring.after(EventId { sequence: 0, ..ring.end() }, 2).unwrap();
        assert_eq!(limited.last().map(|(id, _)| id.sequence), Some(2));
    }

    #[test]
    fn dropped_events_end_the_history_of_older_ids() {
        let ring = ring(EVENTS_MAX + 2);
        assert_eq!(after(&ring, 1), None);
        assert_eq!(after(&ring, 2).unwrap().len(), EVENTS_MAX);
        assert_eq!(ring.end().sequence, EVENTS_MAX as u64 + 2);
    }

    #[test]
    fn size_is_limited_too() {
        let mut ring = ring(10);
        ring.push(10, SIZE_MAX - 2);
        assert_eq!(after(&ring, 7), None);
        assert_eq!(after(&ring, 8), Some(vec![8, 9, 10]));
        ring.push(11, SIZE_MAX + 1);
        assert_eq!((ring.events.len(), ring.size), (0, 0));
        assert_eq!((after(&ring, 12), after(&ring, 11)), (Some(vec![]), None));
    }

    #[test]
    fn id_of_another_epoch_is_unknown() {
        let (ring, other) = (ring(3), ring(3));
        assert!(ring.continues(ring.end()) && !ring.continues(other.end()));
    }
}
