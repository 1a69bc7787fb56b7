//! A resource with its three queues: what may be granted, in which order, and who is told that it blocks.
//!
//! The rules are those of the VMS lock manager as Linux has it. With ranges (R16) each of them reads "entries whose
//! range overlaps": a conflict needs incompatible modes and a common byte, and so does waiting one's turn.

use super::rare::Rare;
use super::value::{Transfer, transfer};
use super::{Assumed, Lock, LockKey, Pending, Value};
use crate::{Completion, FencingToken, Flags, Grant, Mode, Range};
use quorate_membership::{Epoch, Identity, Instant};
use smallvec::SmallVec;
use std::collections::BTreeSet;
use thin_vec::ThinVec;

/// What a resource needs to know of its surroundings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    /// The installed epoch; grants carry it.
    pub(crate) epoch: Epoch,
    /// Failed lives that are fenced: RECOVERY requests pass through what is left of them.
    pub(crate) fenced: &'a BTreeSet<Identity>,
    /// The size of the lockspace's value blocks.
    pub(crate) value_bytes: usize,
    /// The time, on this node's clock.
    pub(crate) now: Instant,
}

/// What an operation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// An operation ended: tell its owner.
    Done {
        /// Whose lock.
        key: LockKey,
        /// Which operation.
        op: u32,
        /// How.
        completion: Completion,
        /// How often the value block was written until now.
        value_sequence: u64,
    },
    /// The lock blocks somebody who wants `mode`.
    Blocking {
        /// Whose lock.
        key: LockKey,
        /// The mode wanted.
        mode: Mode,
    },
}

/// What stands against a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// Nothing.
    None,
    /// A lock of a living node.
    Lock,
    /// Only what a failed node has or may have.
    Recovery,
    /// Only its place in the queue.
    Order,
}

/// Whether a request is tried for the first time or waits already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// Not queued yet.
    First,
    /// At this index of its queue.
    Queued(usize),
}

/// A resource at its master.
///
/// Invariants, asserted by [`Self::check`]: granted modes on the granted and convert queues are pairwise compatible
/// where ranges overlap (a RECOVERY lock beside the dead one it passed through excepted); locks on the granted queue wait for nothing, those on the wait queue have
/// no mode.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resource {
    /// Most resources have one lock, and that one is granted: it needs no memory of its own.
    pub(super) granted: SmallVec<[Lock; 1]>,
    pub(super) converting: ThinVec<Lock>,
    pub(super) waiting: ThinVec<Lock>,
    pub(super) assumed: ThinVec<Assumed>,
    pub(super) value: Rare<Value>,
    /// Of the last grant.
    pub(super) sequence: u64,
}

impl Resource {
    /// A new one whose grants continue after `sequence`.
    pub(crate) fn new(sequence: u64) -> Self {
        Self { sequence, ..Self::default() }
    }

    /// Whether nobody has or wants it and no failed node may have it.
    pub(crate) fn is_unused(&self) -> bool {
        self.granted.is_empty()
            && self.converting.is_empty()
            && self.waiting.is_empty()
            && self.assumed.is_empty()
    }

    /// Whether somebody waits.
    pub(crate) fn has_waiters(&self) -> bool {
        !self.converting.is_empty() || !self.waiting.is_empty()
    }

    /// The number of the last grant.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The value block.
    pub(crate) fn value(&self) -> &Value {
        &self.value
    }

    /// The three queues: granted, converting, waiting.
    pub(crate) fn queues(&self) -> [&[Lock]; 3] {
        [&self.granted, &self.converting, &self.waiting]
    }

    /// What failed nodes may have here.
    pub(crate) fn assumed(&self) -> &[Assumed] {
        &self.assumed
    }

    /// All locks of living and failed nodes.
    pub(crate) fn locks(&self) -> impl Iterator<Item = &Lock> {
        self.granted.iter().chain(&self.converting).chain(&self.waiting)
    }

    /// Whether a life has, or may have, a lock here.
    pub(crate) fn is_touched_by(&self, who: Identity) -> bool {
        self.assumed.iter().any(|a| a.debtor == who) || self.locks().any(|l| l.key.node == who)
    }

    /// One lock.
    pub(crate) fn find(&self, key: LockKey) -> Option<&Lock> {
        self.locks().find(|l| l.key == key)
    }

    /// What stands against granting `mode` on `range` to `asking`, the queues left aside.
    pub(super) fn conflict(
        &self,
        cx: &Context<'_>,
        asking: &Lock,
        mode: Mode,
        range: Range,
        flags: Flags,
    ) -> Obstacle {
        let passes = |who: &Identity| flags.has(Flags::RECOVERY) && cx.fenced.contains(who);
        let mut found = Obstacle::None;
        for lock in self.granted.iter().chain(&self.converting) {
            if lock.key == asking.key || !lock.conflicts(mode, range) || lock.is_of_owner_of(asking) {
                continue;
            }
            if !lock.dead {
                return Obstacle::Lock;
            }
            if !passes(&lock.key.node) {
                found = Obstacle::Recovery;
            }
        }
        if self.assumed.iter().any(|a| a.conflicts(mode, range) && !passes(&a.debtor)) {
            found = Obstacle::Recovery;
        }
        found
    }

    /// What stands against granting `lock` what it waits for.
    pub(super) fn obstacle(
        &self,
        cx: &Context<'_>,
        lock: &Lock,
        pending: &Pending,
        attempt: Attempt,
    ) -> Obstacle {
        let flags = pending.flags;
        let is_new = lock.granted.is_none();
        if is_new && flags.has(Flags::EXPEDITE) {
            return Obstacle::None;
        }
        match self.conflict(cx, lock, pending.mode, pending.range, flags) {
            Obstacle::None => {}
            other => return other,
        }
        // Waiters behind a hold must not stop the participant that ends the hold, so RECOVERY is out of order too.
        if flags.has(Flags::NOORDER) || flags.has(Flags::RECOVERY) || lock.posix {
            return Obstacle::None;
        }
        let any =
            |queue: &[Lock]| queue.iter().any(|l| l.key != lock.key && l.wanted().overlaps(pending.range));
        let waits_turn = match (is_new, attempt) {
            (false, Attempt::First) => flags.has(Flags::QUECVT) && any(&self.converting),
            (false, Attempt::Queued(at)) => any(&self.converting[..at]),
            (true, Attempt::First) => any(&self.converting) || any(&self.waiting),
            (true, Attempt::Queued(at)) => any(&self.converting) || any(&self.waiting[..at]),
        };
        if waits_turn { Obstacle::Order } else { Obstacle::None }
    }

    /// Grants a new plain lock if nobody waits and nothing stands against it; its token.
    pub(crate) fn grant_at_once(
        &mut self,
        cx: &Context<'_>,
        key: LockKey,
        (owner, range): (u64, Range),
        mode: Mode,
    ) -> Option<FencingToken> {
        let is_calm = self.converting.is_empty() && self.waiting.is_empty() && self.assumed.is_empty();
        if !is_calm || self.granted.iter().any(|l| l.conflicts(mode, range)) {
            return None;
        }
        self.sequence += 1;
        let token = FencingToken::new(cx.epoch, self.sequence);
        let mut lock = Lock::new(key, owner, range, cx.now);
        lock.granted = Some(mode);
        lock.token = token;
        self.granted.push(lock);
        Some(token)
    }

    /// Ends a granted lock if nobody waits, without a trace; false: it takes the general way.
    pub(crate) fn end_at_once(&mut self, key: LockKey) -> bool {
        if !self.converting.is_empty() || !self.waiting.is_empty() {
            return false;
        }
        let Some(at) = self.granted.iter().position(|l| l.key == key) else { return false };
        self.granted.remove(at);
        if self.is_unused() {
            // Value and validity live as long as somebody has a lock, or may have one.
            self.value = Rare::default();
        }
        true
    }

    /// Gives `lock` what it waits for and puts it on the granted queue.
    pub(super) fn grant(&mut self, cx: &Context<'_>, mut lock: Lock, alt_mode: bool, out: &mut Vec<Event>) {
        let Some(mut pending) = lock.pending.take() else { return self.granted.push(lock) };
        if lock.posix {
            return self.grant_posix(cx, &lock, &pending, out);
        }
        let uses_value = pending.flags.has(Flags::VALBLK);
        let transfer = transfer(lock.granted, pending.mode);
        let mut value = None;
        let mut value_invalid = uses_value && self.value.invalid;
        match transfer {
            Transfer::Write if pending.flags.has(Flags::IVVALBLK) => {
                self.value.invalidate();
                value_invalid = false;
            }
            Transfer::Write if uses_value => {
                if let Some(bytes) = pending.value.take() {
                    self.value.write(bytes);
                    value_invalid = false;
                }
            }
            Transfer::Read if uses_value => value = Some(self.value.read(cx.value_bytes)),
            _ => {}
        }
        self.sequence += 1;
        lock.token = FencingToken::new(cx.epoch, self.sequence);
        if lock.granted != Some(pending.mode) || lock.range != pending.range {
            lock.told = None;
        }
        lock.granted = Some(pending.mode);
        lock.range = pending.range;
        lock.uses_value |= uses_value;
        lock.recovery = pending.flags.has(Flags::RECOVERY);
        lock.since = cx.now;
        out.push(Event::Done {
            key: lock.key,
            op: pending.op,
            completion: Completion::Granted(Grant {
                mode: pending.mode,
                token: lock.token,
                value,
                value_invalid,
                alt_mode,
                demoted: pending.demoted,
            }),
            value_sequence: self.value.sequence,
        });
        self.granted.push(lock);
    }

    /// Grants what has become possible: conversions from the head, then new requests, again after each grant.
    ///
    /// A NOQUEUE request is queued only behind a recovery; once that is over it is granted or refused.
    pub(crate) fn regrant(&mut self, cx: &Context<'_>, out: &mut Vec<Event>) {
        while self.grant_next(cx, out) {}
        if self.is_unused() {
            // Value and validity live as long as somebody has a lock, or may have one.
            self.value = Rare::default();
        }
    }

    fn grant_next(&mut self, cx: &Context<'_>, out: &mut Vec<Event>) -> bool {
        for is_new in [false, true] {
            let queue = if is_new { &self.waiting } else { &self.converting };
            let mut verdict = None;
            for (at, lock) in queue.iter().enumerate() {
                let Some(pending) = &lock.pending else { continue };
                match self.obstacle(cx, lock, pending, Attempt::Queued(at)) {
                    Obstacle::None => verdict = Some((at, true)),
                    Obstacle::Lock | Obstacle::Order if pending.flags.has(Flags::NOQUEUE) => {
                        // In order or not, it may not wait for the living.
                        let recovering = self.conflict(cx, lock, pending.mode, pending.range, pending.flags)
                            == Obstacle::Recovery;
                        if !recovering {
                            verdict = Some((at, false));
                        }
                    }
                    _ => {}
                }
                if verdict.is_some() {
                    break;
                }
            }
            let Some((at, granted)) = verdict else { continue };
            let mut lock = if is_new { self.waiting.remove(at) } else { self.converting.remove(at) };
            if granted {
                self.grant(cx, lock, false, out);
            } else if let Some(pending) = lock.pending.take() {
                out.push(self.done(lock.key, pending.op, Completion::Again));
                if lock.granted.is_some() {
                    self.granted.push(lock);
                }
            }
            return true;
        }
        false
    }

    /// Tells holders that they block `mode` on `range`, each once per mode.
    pub(super) fn tell_blockers_of(&mut self, key: LockKey, mode: Mode, range: Range, out: &mut Vec<Event>) {
        for lock in &mut self.granted {
            // The owner of a POSIX lock is never asked to give it up.
            if lock.posix {
                continue;
            }
            if lock.key != key && !lock.dead && lock.conflicts(mode, range) && lock.told < Some(mode) {
                lock.told = Some(mode);
                out.push(Event::Blocking { key: lock.key, mode });
            }
        }
    }

    /// Tells holders that they block somebody who waits; after grants, which may block those still waiting.
    pub(crate) fn tell_blockers(&mut self, out: &mut Vec<Event>) {
        let wanted: Vec<_> = self
            .converting
            .iter()
            .chain(&self.waiting)
            .filter_map(|l| l.pending.as_ref().map(|p| (l.key, p.mode, p.range)))
            .collect();
        for (key, mode, range) in wanted {
            self.tell_blockers_of(key, mode, range, out);
        }
    }

    pub(super) fn done(&self, key: LockKey, op: u32, completion: Completion) -> Event {
        Event::Done { key, op, completion, value_sequence: self.value.sequence }
    }

    /// Asserts the invariants.
    ///
    /// # Panics
    /// If one is broken: going on would be worse.
    pub(crate) fn check(&self) {
        assert!(self.granted.iter().all(|l| l.granted.is_some() && l.pending.is_none()), "granted queue");
        assert!(self.converting.iter().all(|l| l.granted.is_some() && l.pending.is_some()), "convert queue");
        assert!(self.waiting.iter().all(|l| l.granted.is_none() && l.pending.is_some()), "wait queue");
        let held: Vec<&Lock> = self.granted.iter().chain(&self.converting).collect();
        for (i, a) in held.iter().enumerate() {
            for b in held.iter().skip(i + 1) {
                assert!(
                    a.dead || b.dead || a.granted.is_none_or(|mode| !b.conflicts(mode, a.range)),
                    "incompatible grants: {a:?} and {b:?}"
                );
            }
        }
    }
}
