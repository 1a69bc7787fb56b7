//! What happens when: a queue ordered by virtual time, and by order of insertion at one instant.

use crate::Instant;
use std::collections::BTreeMap;

/// Events to come.
#[derive(Clone, Debug)]
pub struct Schedule<E> {
    now: Instant,
    sequence: u64,
    events: BTreeMap<(Instant, u64), E>,
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Self { now: Instant(0), sequence: 0, events: BTreeMap::new() }
    }
}

impl<E> Schedule<E> {
    /// An empty schedule at instant zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The virtual time: that of the last event taken out.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Puts an event in at `at`, or now if that is over.
    pub fn at(&mut self, at: Instant, event: E) {
        self.sequence += 1;
        self.events.insert((at.max(self.now), self.sequence), event);
    }

    /// Takes out the next event and moves the time to it.
    pub fn pop(&mut self) -> Option<(Instant, E)> {
        let ((at, _), event) = self.events.pop_first()?;
        self.now = at;
        Some((at, event))
    }

    /// Moves the time forward, at most to the next event.
    pub fn advance_to(&mut self, at: Instant) {
        let at = self.next_at().map_or(at, |next| next.min(at));
        self.now = self.now.max(at);
    }

    /// When the next event happens.
    #[must_use]
    pub fn next_at(&self) -> Option<Instant> {
        self.events.first_key_value().map(|((at, _), _)| *at)
    }

    /// How many events are to come.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing is to come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Drops the events that `keep` does not want.
    pub fn retain(&mut self, mut keep: impl FnMut(&E) -> bool) {
        self.events.retain(|_, e| keep(e));
    }
}
