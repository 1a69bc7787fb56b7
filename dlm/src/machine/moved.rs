//! A resource on its way from one master to the next (R15): everything that decides what it grants.

use super::rare::Rare;
use super::{Lock, LockKey, Resource, Value};
use crate::ValueBlock;
use crate::wire::{WireError, check_value};
use quorate_membership::{Identity, Instant};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The most locks of a resource that moves. One with more stays: it has many users anyway.
pub(crate) const MOVED_LOCKS_MAX: usize = 64;

/// The resource. Times are ages: clocks of two nodes are not compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MovedResource {
    /// Granted, converting, waiting.
    queues: [Vec<Lock>; 3],
    /// Bytes, not valid, how often written.
    value: (Option<ValueBlock>, bool, u64),
    /// Of the last grant.
    sequence: u64,
}

impl MovedResource {
    /// What a message of another node must keep to.
    pub(crate) fn check(&self) -> Result<(), WireError> {
        check_value(self.value.0.as_ref())?;
        if MOVED_LOCKS_MAX < self.locks().count() {
            return Err(WireError::Limit("a list"));
        }
        let [granted, converting, waiting] = &self.queues;
        let fits = granted.iter().all(|l| l.granted.is_some() && l.pending.is_none())
            && converting.iter().all(|l| l.granted.is_some() && l.pending.is_some())
            && waiting.iter().all(|l| l.granted.is_none() && l.pending.is_some());
        let keys: BTreeSet<_> = self.locks().map(|l| l.key).collect();
        if !fits || keys.len() != self.locks().count() || self.locks().any(|l| l.dead) {
            return Err(WireError::Limit("a queue"));
        }
        for lock in self.locks() {
            let pending = lock.pending.as_ref();
            check_value(pending.and_then(|p| p.value.as_ref()))?;
            if lock.range.end < lock.range.start || pending.is_some_and(|p| p.range.end < p.range.start) {
                return Err(WireError::Limit("a range"));
            }
        }
        let held: Vec<&Lock> = granted.iter().chain(converting).collect();
        for (i, a) in held.iter().enumerate() {
            let against = |b: &&Lock| a.granted.is_some_and(|mode| b.conflicts(mode, a.range));
            if held.iter().skip(i + 1).any(against) {
                return Err(WireError::Limit("incompatible grants"));
            }
        }
        Ok(())
    }

    fn locks(&self) -> impl Iterator<Item = &Lock> {
        self.queues.iter().flatten()
    }

    /// Who has or wants a lock on it.
    pub(crate) fn users(&self) -> BTreeSet<Identity> {
        self.locks().map(|l| l.key.node).collect()
    }

    /// The operations in its queues.
    pub(crate) fn pending(&self) -> BTreeMap<LockKey, u32> {
        self.locks().filter_map(|l| Some((l.key, l.pending.as_ref()?.op))).collect()
    }

    /// The number of its last grant.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Forgets the value block: a deliberate mistake.
    pub(crate) fn without_value(mut self) -> Self {
        self.value = Default::default();
        self
    }

    /// Forgets how far grants were numbered: a deliberate mistake.
    pub(crate) fn without_sequence(mut self) -> Self {
        self.sequence = 0;
        self
    }
}

fn with_age(lock: &Lock, now: Instant) -> Lock {
    let age = u64::try_from(now.since(lock.since).as_nanos()).unwrap_or(u64::MAX);
    Lock { since: Instant(age), ..lock.clone() }
}

fn with_time(mut lock: Lock, now: Instant) -> Lock {
    lock.since = Instant(now.0.saturating_sub(lock.since.0));
    lock
}

impl Resource {
    /// Whether it may move: no failed node has or may have anything of it, and it is not too large for a message.
    pub(crate) fn is_movable(&self) -> bool {
        self.assumed.is_empty()
            && !self.value.is_unknown
            && self.locks().count() <= MOVED_LOCKS_MAX
            && self.locks().all(|l| !l.dead && !l.recovery)
    }

    /// All of it, for its next master.
    pub(crate) fn to_moved(&self, now: Instant) -> MovedResource {
        let pack = |queue: &[Lock]| queue.iter().map(|l| with_age(l, now)).collect();
        let value: &Value = &self.value;
        MovedResource {
            queues: [pack(&self.granted), pack(&self.converting), pack(&self.waiting)],
            value: (value.bytes.clone(), value.invalid, value.sequence),
            sequence: self.sequence,
        }
    }

    /// As it was at its last master. `moved` keeps to [`MovedResource::check`].
    pub(crate) fn from_moved(moved: MovedResource, now: Instant) -> Self {
        let [granted, converting, waiting] = moved.queues;
        let (bytes, invalid, sequence) = moved.value;
        Self {
            granted: granted.into_iter().map(|l| with_time(l, now)).collect(),
            converting: converting.into_iter().map(|l| with_time(l, now)).collect(),
            waiting: waiting.into_iter().map(|l| with_time(l, now)).collect(),
            value: Rare::from(Value { bytes, invalid, sequence, is_unknown: false }),
            sequence: moved.sequence,
            ..Self::default()
        }
    }
}
