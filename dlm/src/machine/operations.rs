//! The operations on a resource: request, convert, cancel, unlock, and the end of a node.

use super::resource::{Attempt, Obstacle};
use super::{Context, Event, Lock, LockKey, Pending, Resource};
use crate::{Completion, FencingToken, Flags, LockError, Mode, Range, ValueBlock};
use quorate_membership::Identity;

impl Resource {
    /// A new lock. Its flags were checked.
    pub(crate) fn request(
        &mut self,
        cx: &Context<'_>,
        key: LockKey,
        owner: u64,
        pending: Pending,
        out: &mut Vec<Event>,
    ) {
        let lock = Lock {
            key,
            owner,
            range: pending.range,
            granted: None,
            posix: pending.flags.has(Flags::POSIX),
            pending: Some(Box::new(pending)),
            token: FencingToken::default(),
            told: None,
            uses_value: false,
            recovery: false,
            dead: false,
            since: cx.now,
        };
        let posix = lock.posix;
        // A new lock frees nothing, a POSIX one may.
        if self.attempt(cx, lock, out) && posix {
            self.regrant(cx, out);
            self.tell_blockers(out);
        }
        self.finish(out);
    }

    /// Changes the mode of a granted lock. Its flags were checked.
    ///
    /// # Errors
    /// The lock is unknown or busy; nothing changed.
    pub(crate) fn convert(
        &mut self,
        cx: &Context<'_>,
        key: LockKey,
        pending: Pending,
        out: &mut Vec<Event>,
    ) -> Result<(), LockError> {
        let Some(at) = self.granted.iter().position(|l| l.key == key) else {
            return Err(if self.find(key).is_some() { LockError::Busy } else { LockError::NotFound });
        };
        let mut lock = self.granted.remove(at);
        lock.pending = Some(Box::new(pending));
        if self.attempt(cx, lock, out) {
            self.regrant(cx, out);
            self.tell_blockers(out);
        }
        self.finish(out);
        Ok(())
    }

    /// Tries a request for the first time. True if others may have become grantable.
    fn attempt(&mut self, cx: &Context<'_>, mut lock: Lock, out: &mut Vec<Event>) -> bool {
        let Some(pending) = lock.pending.as_deref().cloned() else { return false };
        let (flags, key, range) = (pending.flags, lock.key, pending.range);
        let is_new = lock.granted.is_none();
        if lock.posix && flags.has(Flags::TEST) {
            let answer = self.test_posix(&lock, &pending);
            out.push(self.done(key, pending.op, answer));
            return false;
        }
        let obstacle = self.obstacle(cx, &lock, &pending, Attempt::First);
        if obstacle == Obstacle::None {
            self.grant(cx, lock, false, out);
            self.tell_blockers(out);
            return true;
        }
        for (flag, mode) in [(Flags::ALTPR, Mode::PR), (Flags::ALTCW, Mode::CW)] {
            let other = Pending { mode, ..pending.clone() };
            if flags.has(flag) && self.obstacle(cx, &lock, &other, Attempt::First) == Obstacle::None {
                lock.pending = Some(Box::new(other));
                self.grant(cx, lock, true, out);
                self.tell_blockers(out);
                return true;
            }
        }
        let recovers = obstacle == Obstacle::Recovery
            || self.conflict(cx, &lock, pending.mode, range, flags) == Obstacle::Recovery;
        let refused = if recovers && flags.has(Flags::NORECOVERYWAIT) {
            Some(Completion::Recovering)
        } else if !recovers && flags.has(Flags::NOQUEUE) {
            Some(Completion::Again)
        } else if !is_new && !flags.has(Flags::NODLCKWT) && self.is_conversion_deadlock(&lock, &pending) {
            if flags.has(Flags::CONVDEADLK) {
                lock.granted = Some(Mode::NL);
                lock.pending = Some(Box::new(Pending { demoted: true, ..pending.clone() }));
                None
            } else {
                Some(Completion::Deadlock)
            }
        } else {
            None
        };
        if let Some(completion) = refused {
            let again = completion == Completion::Again;
            lock.pending = None;
            if !is_new {
                self.granted.push(lock);
            }
            out.push(self.done(key, pending.op, completion));
            if again && flags.has(Flags::NOQUEUEBAST) {
                self.tell_blockers_of(key, pending.mode, range, out);
            }
            return false;
        }
        let demoted = lock.pending.as_ref().is_some_and(|p| p.demoted);
        lock.since = cx.now;
        let queue = if is_new { &mut self.waiting } else { &mut self.converting };
        if flags.has(Flags::HEADQUE) {
            queue.insert(0, lock);
        } else {
            queue.push(lock);
        }
        if !demoted {
            self.tell_blockers_of(key, pending.mode, range, out);
        }
        demoted
    }

    /// Whether `lock`, which must queue for a conversion, and a conversion that waits already wait for each other.
    /// The later one is the victim.
    ///
    /// It always takes that I keep the other one waiting with what I have: a conversion from NL is in nobody's way and
    /// may queue behind any other.
    fn is_conversion_deadlock(&self, lock: &Lock, pending: &Pending) -> bool {
        self.converting.iter().any(|other| {
            let i_block = other.pending.as_ref().is_some_and(|p| lock.conflicts(p.mode, other.wanted()));
            // Behind another I wait for it by the order alone. Ahead of it (HEADQUE), or where parts of the resource let
            // me be granted past it, only if what it has is in my way.
            let whole =
                [lock.range, pending.range, other.range, other.wanted()].iter().all(|r| *r == Range::ALL);
            let behind = whole && !pending.flags.has(Flags::HEADQUE);
            i_block && (behind || other.conflicts(pending.mode, pending.range))
        })
    }

    /// Withdraws what a lock waits for; nothing if it waits for nothing.
    ///
    /// # Errors
    /// The lock is unknown; nothing changed.
    pub(crate) fn cancel(
        &mut self,
        cx: &Context<'_>,
        key: LockKey,
        out: &mut Vec<Event>,
    ) -> Result<(), LockError> {
        if let Some(at) = self.waiting.iter().position(|l| l.key == key) {
            let lock = self.waiting.remove(at);
            let op = lock.pending.map_or(0, |p| p.op);
            out.push(self.done(key, op, Completion::Cancelled));
        } else if let Some(at) = self.converting.iter().position(|l| l.key == key) {
            let mut lock = self.converting.remove(at);
            let op = lock.pending.take().map_or(0, |p| p.op);
            out.push(self.done(key, op, Completion::Cancelled));
            self.granted.push(lock);
        } else if self.granted.iter().any(|l| l.key == key) {
            return Ok(());
        } else {
            return Err(LockError::NotFound);
        }
        self.settle(cx, out);
        Ok(())
    }

    /// Ends a lock whatever it waits for; that operation has no completion of its own. Its flags were checked.
    ///
    /// # Errors
    /// The lock is unknown; nothing changed.
    pub(crate) fn unlock(
        &mut self,
        cx: &Context<'_>,
        key: LockKey,
        (flags, value, op): (Flags, Option<ValueBlock>, u32),
        out: &mut Vec<Event>,
    ) -> Result<(), LockError> {
        let lock = self.take(key).ok_or(LockError::NotFound)?;
        if lock.granted.is_some_and(|g| Mode::PW <= g) {
            if flags.has(Flags::IVVALBLK) {
                self.value.invalidate();
            } else if flags.has(Flags::VALBLK)
                && let Some(value) = value
            {
                self.value.write(value);
            }
        }
        out.push(self.done(key, op, Completion::Unlocked));
        self.settle(cx, out);
        Ok(())
    }

    /// A lock belongs to another owner within its node now.
    pub(crate) fn set_owner(&mut self, key: LockKey, owner: u64) {
        let locks = self.granted.iter_mut().chain(&mut self.converting).chain(&mut self.waiting);
        if let Some(lock) = locks.into_iter().find(|l| l.key == key) {
            lock.owner = owner;
        }
    }

    pub(crate) fn take(&mut self, key: LockKey) -> Option<Lock> {
        if let Some(at) = self.granted.iter().position(|l| l.key == key) {
            return Some(self.granted.remove(at));
        }
        for queue in [&mut self.converting, &mut self.waiting] {
            if let Some(at) = queue.iter().position(|l| l.key == key) {
                return Some(queue.remove(at));
            }
        }
        None
    }

    /// Grants what has become possible and tells those who block the rest.
    pub(crate) fn settle(&mut self, cx: &Context<'_>, out: &mut Vec<Event>) {
        self.regrant(cx, out);
        self.tell_blockers(out);
        self.finish(out);
    }

    /// Removes all locks of a life at once: a process that ended on a node that lives, or a clean detach.
    ///
    /// A writer that is lost makes the value block invalid.
    pub(crate) fn purge(&mut self, cx: &Context<'_>, node: Identity, out: &mut Vec<Event>) {
        let lost_writer = self
            .locks()
            .any(|l| l.key.node == node && l.uses_value && l.granted.is_some_and(|g| Mode::PW <= g));
        if lost_writer {
            self.value.invalidate();
        }
        self.granted.retain(|l| l.key.node != node);
        for queue in [&mut self.converting, &mut self.waiting] {
            queue.retain(|l| l.key.node != node);
        }
        self.settle(cx, out);
    }

    #[cfg_attr(not(debug_assertions), expect(clippy::unused_self, reason = "checks in debug builds only"))]
    fn finish(&self, _out: &mut [Event]) {
        #[cfg(debug_assertions)]
        self.check();
    }
}
