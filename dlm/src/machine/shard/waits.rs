//! Which resources of this shard have somebody waiting, and when that is suspicious (R16).

use super::{Output, Shard};
use crate::LockName;
use crate::bug::Bug;
use crate::machine::deadlock::SUSPECT_AFTER;
use crate::machine::deadlock::graph::Wait;
use quorate_membership::Instant;
use std::collections::BTreeSet;

/// The resources mastered here that have waiters.
#[derive(Clone, Debug, Default)]
pub(super) struct Waits {
    contended: BTreeSet<LockName>,
    /// When something changed at one of them that no search knows of yet.
    changed: Option<Instant>,
}

impl Waits {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.changed.map(|at| at + SUSPECT_AFTER)
    }
}

impl Shard {
    /// An operation was carried out on the resource: who waits for whom may have changed.
    pub(super) fn note_waits(&mut self, name: &LockName) {
        let has_waiters = self.names.mastered(name).is_some_and(|m| m.resource.has_waiters());
        if has_waiters {
            if !self.waits.contended.contains(name) {
                self.waits.contended.insert(name.clone());
            }
            self.waits.changed.get_or_insert(self.now);
        } else if !self.waits.contended.is_empty() {
            self.waits.contended.remove(name);
        }
    }

    /// Another node may search now, and knows nothing.
    pub(super) fn suspect_anew(&mut self) {
        if !self.waits.contended.is_empty() {
            self.waits.changed.get_or_insert(self.now);
        }
    }

    pub(super) fn on_old_waits(&mut self, out: &mut Vec<Output>) {
        if self.waits.next_deadline().is_none_or(|at| self.now < at) {
            return;
        }
        let mut waits = Vec::new();
        self.collect_waits(0, &mut waits);
        let oldest = waits.iter().map(|w| w.age).max();
        let limit = u64::try_from(SUSPECT_AFTER.as_nanos()).unwrap_or(u64::MAX);
        // Younger ones are looked at again once they are old: a deadlock is as old as its youngest wait.
        self.waits.changed = oldest.filter(|age| *age < limit).map(|_| self.now);
        if oldest.is_some_and(|age| limit <= age) {
            out.push(Output::Suspect);
        }
    }

    /// Adds all that waits at resources mastered here; `space` is the lockspace's hash.
    pub(crate) fn collect_waits(&self, space: u64, out: &mut Vec<Wait>) {
        // What is frozen is somebody else's soon.
        if self.leaving.is_some() {
            return;
        }
        let without_order = self.has_bug(Bug::OverlookOrder);
        for name in &self.waits.contended {
            if let Some(mastered) = self.names.mastered(name) {
                mastered.resource.waits(self.now, space, without_order, out);
            }
        }
    }

    /// An operation of this node is the victim of a deadlock.
    pub(crate) fn refuse(&mut self, now: Instant, id: crate::LockId, op: u32, out: &mut Vec<Output>) {
        self.now = now;
        self.withdraw(id, op, crate::Completion::Deadlock, out);
        self.drain(out);
    }
}
