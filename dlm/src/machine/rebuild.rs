//! A resource made anew from what the survivors of its master registered (R13).
//!
//! The dead master's last answers may be lost: a holder may tell an operation as pending that the master had carried
//! out. Where that matters, it shows: another survivor has a lock beside which the old mode cannot have been in force.

use super::rare::Rare;
use super::value::{Transfer, transfer};
use super::{Assumed, Context, Event, Lock, LockKey, Pending, Resource, Value, is_down};
use crate::wire::{Operation, Relock};
use crate::{Completion, Flags, Grant, Mode, ValueBlock};
use quorate_membership::Identity;
use std::collections::BTreeSet;
use thin_vec::ThinVec;

/// The newest value block among copies.
#[derive(Debug, Default)]
struct Copies {
    best: Option<(u64, Option<ValueBlock>)>,
    is_valid: bool,
    /// A writer said that what it leaves is not valid.
    is_spoiled: bool,
}

impl Copies {
    fn offer(&mut self, sequence: u64, bytes: Option<ValueBlock>) {
        if self.best.as_ref().is_none_or(|(s, _)| *s < sequence) {
            self.best = Some((sequence, bytes));
        }
    }
}

impl Resource {
    /// Builds the resource from all registered locks; `debtors` may have locks that nobody knows.
    pub(crate) fn rebuild(
        cx: &Context<'_>,
        floor: u64,
        locks: Vec<(Identity, Relock)>,
        debtors: &BTreeSet<Identity>,
        out: &mut Vec<Event>,
    ) -> Self {
        let sequence = locks.iter().map(|(_, l)| l.token.sequence).max().unwrap_or(0).max(floor);
        let mut resource = Self::new(sequence);
        let mut copies = Copies::default();
        for (node, relock) in locks {
            resource.take_in(cx, node, relock, &mut copies, out);
        }
        resource.settle_posix(cx, out);
        resource.settle_doubtful(cx, out);
        if let Some((sequence, bytes)) = copies.best {
            resource.value.sequence = sequence;
            resource.value.invalid = (!copies.is_valid || copies.is_spoiled) && bytes.is_some();
            resource.value.bytes = bytes;
        } else if !debtors.is_empty() {
            resource.value = Value::unknown(cx.value_bytes).into();
        }
        for debtor in debtors {
            let bounds = resource.granted.iter().chain(&resource.converting).filter(|l| !l.recovery);
            let assumed = Assumed::bounded_by(*debtor, bounds);
            resource.assumed.push(assumed);
        }
        resource
    }

    /// One registered lock. What it gave up is taken as given up, whether the old master had answered or not: the
    /// holder does not rely on it any more.
    fn take_in(
        &mut self,
        cx: &Context<'_>,
        node: Identity,
        relock: Relock,
        copies: &mut Copies,
        out: &mut Vec<Event>,
    ) {
        let key = LockKey { node, id: relock.id };
        let done = |op, completion, value_sequence| Event::Done { key, op, completion, value_sequence };
        let sequence = relock.value_sequence;
        if relock.value.is_some() {
            copies.offer(sequence, relock.value.clone());
        }
        let mut lock = Lock {
            key,
            owner: relock.owner,
            posix: relock.posix,
            range: relock.range,
            granted: relock.granted,
            pending: None,
            token: relock.token,
            told: None,
            uses_value: relock.value.is_some(),
            recovery: relock.recovery,
            dead: false,
            since: cx.now,
        };
        let mut ended = false;
        for numbered in relock.operations {
            let op = numbered.op;
            match numbered.operation {
                Operation::New { mode, range, flags, priority, .. } => {
                    let (value, demoted) = (None, false);
                    lock.pending =
                        Some(Box::new(Pending { mode, range, flags, value, demoted, op, priority }));
                }
                Operation::Convert { mode, range, flags, value, priority } => {
                    let Some(granted) = lock.granted else { continue };
                    let range = range.unwrap_or(lock.range);
                    if !is_down(granted, lock.range, mode, range) {
                        let demoted = false;
                        lock.pending =
                            Some(Box::new(Pending { mode, range, flags, value, demoted, op, priority }));
                        continue;
                    }
                    let writes = transfer(Some(granted), mode) == Transfer::Write && flags.has(Flags::VALBLK);
                    if writes && !flags.has(Flags::IVVALBLK) && value.is_some() {
                        // Newer than the copy it was made from; where a survivor has a newer one still, the old
                        // master had taken this write already.
                        copies.offer(sequence + 1, value);
                    }
                    copies.is_spoiled |= flags.has(Flags::IVVALBLK) && Mode::PW <= granted;
                    (lock.granted, lock.range) = (Some(mode), range);
                    lock.uses_value |= flags.has(Flags::VALBLK);
                    let grant = Grant {
                        mode,
                        token: lock.token,
                        value: None,
                        value_invalid: false,
                        alt_mode: false,
                        demoted: false,
                    };
                    out.push(done(op, Completion::Granted(grant), sequence + u64::from(writes)));
                }
                Operation::Unlock { flags, value } => {
                    let writes = lock.granted.is_some_and(|g| Mode::PW <= g) && flags.has(Flags::VALBLK);
                    if writes && !flags.has(Flags::IVVALBLK) && value.is_some() {
                        copies.offer(sequence + 1, value);
                    }
                    copies.is_spoiled |=
                        flags.has(Flags::IVVALBLK) && lock.granted.is_some_and(|g| Mode::PW <= g);
                    out.push(done(op, Completion::Unlocked, sequence));
                    ended = true;
                }
                Operation::Cancel => {
                    if let Some(pending) = lock.pending.take() {
                        out.push(done(pending.op, Completion::Cancelled, sequence));
                        ended = lock.granted.is_none();
                    }
                }
            }
            if ended {
                break;
            }
        }
        // A copy that cannot have been overwritten since: of a lock beside which nobody writes, or passed on by a
        // master that left in order.
        let protects = relock.value_fresh && lock.granted.is_some_and(|g| Mode::CW <= g) && !ended;
        copies.is_valid |=
            !relock.value_invalid && relock.value.is_some() && (protects || relock.value_clean);
        match (ended, lock.granted, &lock.pending) {
            (true, ..) | (false, None, None) => {}
            (false, Some(_), None) => self.granted.push(lock),
            (false, Some(_), Some(_)) => self.converting.push(lock),
            (false, None, Some(_)) => self.waiting.push(lock),
        }
    }

    /// Conversions that the old master may have granted without the holder's knowing: CW to PR and back, and those it
    /// demoted for a conversion deadlock. If another survivor's lock stands against the old mode, it had.
    fn settle_doubtful(&mut self, cx: &Context<'_>, out: &mut Vec<Event>) {
        let mut at = 0;
        while let Some(lock) = self.converting.get(at) {
            let others = self.granted.iter().chain(&self.converting).filter(|o| o.key != lock.key);
            let contradicted =
                lock.granted.is_some_and(|g| others.into_iter().any(|o| o.conflicts(g, lock.range)));
            if !contradicted {
                at += 1;
                continue;
            }
            let mut lock = self.converting.remove(at);
            match &mut lock.pending {
                Some(pending) if pending.flags.has(Flags::CONVDEADLK) => {
                    pending.demoted = true;
                    lock.granted = Some(Mode::NL);
                    self.converting.insert(at, lock);
                    at += 1;
                }
                _ => self.grant(cx, lock, false, out),
            }
        }
        self.check();
    }

    /// Fresh, for the first user of a name that `debtors` may have in any mode.
    pub(crate) fn held(cx: &Context<'_>, sequence: u64, debtors: impl Iterator<Item = Identity>) -> Self {
        let mut resource = Self::new(sequence);
        resource.assumed = debtors.map(|d| Assumed::bounded_by(d, [].into_iter())).collect();
        if !resource.assumed.is_empty() {
            resource.value = Value::unknown(cx.value_bytes).into();
        }
        resource
    }

    /// A member failed. What it waited for is gone; what it had stays in force until it is released.
    pub(crate) fn fail(&mut self, cx: &Context<'_>, node: Identity, out: &mut Vec<Event>) {
        self.waiting.retain(|l| l.key.node != node);
        let (theirs, others): (ThinVec<_>, ThinVec<_>) =
            core::mem::take(&mut self.converting).into_iter().partition(|l| l.key.node == node);
        self.converting = others;
        self.granted.extend(theirs);
        let mut writer = false;
        for lock in self.granted.iter_mut().filter(|l| l.key.node == node) {
            lock.pending = None;
            lock.dead = true;
            writer |= lock.uses_value && lock.granted.is_some_and(|g| Mode::PW <= g);
        }
        self.granted.retain(|l| !l.dead || l.granted != Some(Mode::NL));
        if writer {
            self.value.invalidate();
        }
        self.settle(cx, out);
    }

    /// A failed life is fenced and the locks are rebuilt: only what must be held until its journal is replayed stays
    /// (`None`: nothing).
    pub(crate) fn release(
        &mut self,
        cx: &Context<'_>,
        node: Identity,
        weakest_hold: Option<Mode>,
        out: &mut Vec<Event>,
    ) {
        let holds = |mode: Option<Mode>| weakest_hold.is_some_and(|weakest| Some(weakest) <= mode);
        self.granted.retain(|l| l.key.node != node || holds(l.granted));
        self.assumed.retain_mut(|a| a.debtor != node || weakest_hold.is_some_and(|w| a.keep_holds(w)));
        if self.value.is_unknown
            && self.assumed.is_empty()
            && self.granted.is_empty()
            && self.converting.is_empty()
        {
            // Whoever had it is gone, and the value block with the last lock: what waits begins anew.
            self.value = Rare::default();
        }
        self.settle(cx, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Numbered;
    use crate::{FencingToken, LockId, LockName, Range};
    use quorate_membership::{Epoch, Incarnation, Instant, NodeId};

    fn node(n: u32) -> Identity {
        Identity::new(NodeId(n), Incarnation(1))
    }

    fn relock(granted: Option<Mode>, copy: Option<(u64, u8)>, operation: Option<Operation>) -> Relock {
        Relock {
            name: LockName::new(b"r").unwrap(),
            id: LockId(1),
            owner: 0,
            posix: false,
            range: Range::ALL,
            granted,
            token: FencingToken { epoch: 1, sequence: 5 },
            recovery: false,
            value: copy.map(|(_, b)| vec![b]),
            value_sequence: copy.map_or(0, |(s, _)| s),
            value_invalid: false,
            value_fresh: true,
            value_clean: false,
            operations: operation.into_iter().map(|operation| Numbered { op: 1, operation }).collect(),
        }
    }

    fn convert(mode: Mode, flags: Flags, value: Option<ValueBlock>) -> Operation {
        Operation::Convert { mode, range: None, flags, value, priority: 0 }
    }

    fn build(locks: Vec<(Identity, Relock)>) -> (Resource, Vec<Event>) {
        let fenced = BTreeSet::new();
        let cx = Context { epoch: Epoch(2), fenced: &fenced, value_bytes: 1, now: Instant(0) };
        let mut out = Vec::new();
        let resource = Resource::rebuild(&cx, 3, locks, &BTreeSet::new(), &mut out);
        (resource, out)
    }

    #[test]
    fn a_lost_answer_to_a_conversion_down_shows_in_anothers_lock() {
        // The old master had taken 1 down to NL, then granted 2: no two incompatible locks come out of it.
        let down = convert(Mode::NL, Flags::VALBLK, Some(vec![2]));
        let one = relock(Some(Mode::EX), Some((1, 1)), Some(down));
        let two = relock(Some(Mode::EX), Some((2, 2)), None);
        let (resource, events) = build(vec![(node(1), one), (node(2), two)]);
        resource.check();
        assert_eq!((resource.value.bytes.clone(), resource.value.invalid), (Some(vec![2]), false));
        assert_eq!((resource.value.sequence, events.len(), resource.sequence), (2, 1, 5));
    }

    #[test]
    fn a_lost_answer_to_a_middle_conversion_shows_too() {
        let middle = convert(Mode::PR, Flags::NONE, None);
        let one = relock(Some(Mode::CW), None, Some(middle));
        let (resource, events) = build(vec![(node(1), one), (node(2), relock(Some(Mode::PR), None, None))]);
        assert!(resource.converting.is_empty());
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn copies_below_cw_are_not_valid_and_the_newest_wins() {
        let locks = vec![
            (node(1), relock(Some(Mode::NL), Some((4, 4)), None)),
            (node(2), relock(Some(Mode::CR), Some((7, 7)), None)),
        ];
        let (resource, _) = build(locks);
        assert_eq!((resource.value.bytes.clone(), resource.value.invalid), (Some(vec![7]), true));
        let (fresh, _) = build(vec![(node(1), relock(Some(Mode::EX), None, None))]);
        assert_eq!((fresh.value.bytes.clone(), fresh.value.sequence), (None, 0));
    }

    #[test]
    fn a_write_without_an_answer_is_not_lost() {
        let down = convert(Mode::NL, Flags::VALBLK, Some(vec![9]));
        let locks = vec![
            (node(1), relock(Some(Mode::EX), Some((3, 3)), Some(down))),
            (node(2), relock(Some(Mode::NL), Some((2, 2)), None)),
        ];
        let (resource, _) = build(locks);
        assert_eq!((resource.value.bytes.clone(), resource.value.invalid), (Some(vec![9]), true));
    }
}
