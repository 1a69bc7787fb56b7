//! Operations that are withdrawn for a reason of their own: their time is over, or they are part of a deadlock.
//!
//! Both are a cancel at the master; only the holder knows why, and says so in the completion. A grant that was under way
//! already is a grant. So neither needs anything that a failure of the master could lose.

use super::{Output, Shard};
use crate::wire::Operation;
use crate::{Completion, LockId};
use core::time::Duration;
use quorate_membership::Instant;
use std::collections::{BTreeMap, BTreeSet};

/// What is to be withdrawn, and what is being.
#[derive(Clone, Debug, Default)]
pub(super) struct Withdrawals {
    timers: BTreeSet<(Instant, LockId)>,
    /// Until when an operation may wait.
    limits: BTreeMap<LockId, (Instant, u32)>,
    /// What to say instead of `Cancelled`.
    reasons: BTreeMap<LockId, (u32, Completion)>,
}

impl Withdrawals {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// An operation has ended; the completion to tell.
    pub(super) fn ended(&mut self, id: LockId, op: u32, completion: Completion) -> Completion {
        if let Some((at, _)) = self.limits.get(&id).copied().filter(|(_, o)| *o == op) {
            self.limits.remove(&id);
            self.timers.remove(&(at, id));
        }
        let reason = self.reasons.get(&id).is_some_and(|(o, _)| *o == op);
        match reason.then(|| self.reasons.remove(&id)).flatten() {
            Some((_, reason)) if completion == Completion::Cancelled => reason,
            _ => completion,
        }
    }
}

impl Shard {
    /// The lock's newest operation may wait so long.
    pub(super) fn limit(&mut self, id: LockId, timeout: Option<Duration>) {
        let Some(timeout) = timeout else { return };
        let Some(last) = self.locks.find(&id.0).and_then(|l| l.operations.last()) else { return };
        let at = self.now + timeout;
        self.withdrawals.limits.insert(id, (at, last.numbered.op));
        self.withdrawals.timers.insert((at, id));
    }

    pub(super) fn on_timeouts(&mut self, out: &mut Vec<Output>) {
        while let Some((_, id)) = self.withdrawals.timers.first().copied().filter(|(at, _)| *at <= self.now) {
            self.withdrawals.timers.pop_first();
            if let Some((_, op)) = self.withdrawals.limits.remove(&id) {
                self.withdraw(id, op, Completion::TimedOut, out);
            }
        }
    }

    /// Withdraws an operation that still waits; nothing if it has ended or is being withdrawn.
    pub(super) fn withdraw(&mut self, id: LockId, op: u32, reason: Completion, out: &mut Vec<Output>) {
        let Some(lock) = self.locks.find(&id.0) else { return };
        let [only] = lock.operations.as_slice() else { return };
        let may_wait = matches!(only.numbered.operation, Operation::New { .. } | Operation::Convert { .. });
        if only.numbered.op != op || !may_wait {
            return;
        }
        self.withdrawals.reasons.insert(id, (op, reason));
        if only.is_untold() {
            self.apply_done(id, op, Completion::Cancelled, 0, out);
        } else {
            self.start(id, Operation::Cancel, out);
        }
    }
}
