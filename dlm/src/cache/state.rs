//! What a cache knows of one lock, and the pure decision of what to do next.

use super::held::Slot;
use super::{AcquireError, AcquireFlags, CacheConfig, CacheMode};
use crate::{Completion, FencingToken, LockId, Mode, ValueBlock};
use core::time::Duration;
use quorate_membership::Instant;
use std::collections::VecDeque;
use std::sync::Arc;

/// How much the hold time grows when the lock was used much.
const HOLD_STEP: Duration = Duration::from_millis(20);
/// From so many uses between grant and wish on, a lock was used much.
const USED_MUCH: u32 = 8;

impl CacheMode {
    /// The mode at the master.
    pub(super) fn lock_mode(self) -> Mode {
        match self {
            Self::Shared => Mode::PR,
            Self::Deferred => Mode::CW,
            Self::Exclusive => Mode::EX,
        }
    }
}

/// A local user that waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) mode: CacheMode,
    pub(super) flags: AcquireFlags,
    pub(super) slot: Arc<Slot>,
}

/// Everything under an entry's mutex.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The lock at the master, if there is one.
    pub(super) id: Option<LockId>,
    /// The mode it is cached in; `None`: at NL, or no lock.
    pub(super) mode: Option<CacheMode>,
    pub(super) token: FencingToken,
    /// The value block, if known and valid.
    pub(super) value: Option<ValueBlock>,
    /// How many local users have it, and how.
    pub(super) holders: u32,
    pub(super) held_as: Option<CacheMode>,
    pub(super) queue: VecDeque<Waiter>,
    /// A task works on it.
    pub(super) working: bool,
    /// The task waits for the master or the client: nobody else may change the mode or hand it out.
    pub(super) busy: bool,
    /// An operation at the master is under way; whether as recovery participant.
    pub(super) asking: Option<bool>,
    /// How that operation ended.
    pub(super) completion: Option<Completion>,
    /// The strongest mode another node wants.
    pub(super) wanted: Option<Mode>,
    /// Give it up altogether as soon as nobody has it, hold time or not.
    pub(super) drop_now: bool,
    /// Granted in passing through a hold: not for ordinary users, and not to be kept.
    pub(super) recovery_only: bool,
    pub(super) hold: Option<Duration>,
    pub(super) hold_until: Instant,
    pub(super) uses: u32,
    pub(super) last_used: Instant,
    /// Whether it takes part in value blocks.
    pub(super) has_value: bool,
    /// Out of the table; look again.
    pub(super) removed: bool,
    pub(super) stopped: Option<String>,
    pub(super) withdrawn: Option<String>,
}

/// What a worker does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing until somebody kicks it.
    Rest,
    /// Nothing until then, unless kicked.
    WaitUntil(Instant),
    /// Let the client write back, then go down at the master.
    Demote { from: CacheMode, to: Option<CacheMode> },
    /// Ask the master for more.
    Ask { mode: CacheMode, flags: AcquireFlags },
    /// Give the rest (NL) up.
    Unlock,
    /// Nobody has or wants it: take the entry out of the table.
    Remove,
}

impl State {
    pub(super) fn failure(&self) -> Option<AcquireError> {
        let withdrawn = self.withdrawn.clone().map(AcquireError::Withdrawn);
        withdrawn.or_else(|| self.stopped.clone().map(AcquireError::Stopped))
    }

    /// Whether the cached mode and the local users allow one more.
    fn admits(&self, mode: CacheMode, flags: AcquireFlags) -> bool {
        let Some(cached) = self.mode else { return false };
        let covers = cached == mode || (cached == CacheMode::Exclusive && !flags.exact);
        let beside = self.holders == 0 || (self.held_as == Some(mode) && mode != CacheMode::Exclusive);
        covers && beside && (!self.recovery_only || flags.recovery)
    }

    /// What it must go down to because others want it; `None`: it may stay as it is.
    fn demand(&self) -> Option<Option<CacheMode>> {
        let cached = self.mode?;
        if self.drop_now {
            return Some(None);
        }
        let wanted = self.wanted?;
        if cached.lock_mode().is_compatible(wanted) {
            return None;
        }
        let lower = match wanted {
            Mode::CR | Mode::PR => Some(CacheMode::Shared),
            Mode::CW => Some(CacheMode::Deferred),
            _ => None,
        };
        Some(lower.filter(|_| cached == CacheMode::Exclusive))
    }

    fn is_due(&self, now: Instant) -> bool {
        self.drop_now || self.hold_until <= now
    }

    /// The fast path: one more local user, if nothing stands against it.
    pub(super) fn take_cached(&mut self, mode: CacheMode, flags: AcquireFlags, now: Instant) -> bool {
        let free = self.queue.is_empty()
            && !self.busy
            && !self.removed
            && self.stopped.is_none()
            && self.withdrawn.is_none()
            && self.admits(mode, flags)
            && (self.demand().is_none() || !self.is_due(now));
        if free {
            self.take(mode, now);
        }
        free
    }

    fn take(&mut self, mode: CacheMode, now: Instant) {
        self.holders += 1;
        self.held_as = Some(mode);
        self.uses = self.uses.saturating_add(1);
        self.last_used = now;
    }

    /// The grant of the master in `mode`.
    pub(super) fn granted(&mut self, mode: CacheMode, recovery: bool, config: &CacheConfig, now: Instant) {
        let hold = self.hold.unwrap_or(config.hold_max);
        self.mode = Some(mode);
        self.recovery_only = recovery;
        self.hold_until = now + hold;
        self.uses = 0;
    }

    /// Another node wants it. Adapts the hold time, once per wish.
    pub(super) fn want(&mut self, mode: Mode, config: &CacheConfig) {
        if self.wanted.is_none() && self.mode.is_some() {
            let hold = self.hold.unwrap_or(config.hold_max);
            let adapted = if USED_MUCH <= self.uses { hold + HOLD_STEP } else { hold / 2 };
            let adapted = adapted.clamp(config.hold_min, config.hold_max);
            // A shorter time counts at once.
            self.hold_until = self.hold_until.min(self.hold_until - hold.saturating_sub(adapted));
            self.hold = Some(adapted);
        }
        self.wanted = self.wanted.max(Some(mode));
    }

    /// Decides what to do, after handing the lock to those who can have it. Called with no operation under way.
    pub(super) fn decide(&mut self, now: Instant) -> Step {
        if let Some(failure) = self.failure() {
            for waiter in self.queue.drain(..) {
                waiter.slot.finish(Err(failure.clone()));
            }
            // A withdrawn lock stays where it is: it protects what could not be written back.
            return if self.stopped.is_some() { Step::Remove } else { Step::Rest };
        }
        loop {
            let demand = self.demand();
            // Each grant serves at least one local user, or two nodes could pass a lock to and fro for ever.
            let owed = self.uses == 0 && self.queue.front().is_some_and(|w| self.admits(w.mode, w.flags));
            if let (Some(from), Some(to), false) = (self.mode, demand, owed)
                && self.is_due(now)
            {
                if self.holders == 0 {
                    return Step::Demote { from, to };
                }
                self.refuse_impatient();
                return Step::Rest;
            }
            let Some(head) = self.queue.front() else { return self.decide_idle(demand) };
            let (mode, flags) = (head.mode, head.flags);
            if self.admits(mode, flags) {
                self.take(mode, now);
                if let Some(waiter) = self.queue.pop_front() {
                    waiter.slot.finish(Ok(mode));
                }
                continue;
            }
            if 0 < self.holders {
                self.refuse_impatient();
                return Step::Rest;
            }
            return match self.mode {
                None => Step::Ask { mode, flags },
                // What passed through a hold is no basis for anything else.
                Some(from) if self.recovery_only && !flags.recovery => Step::Demote { from, to: None },
                Some(CacheMode::Exclusive) => Step::Demote { from: CacheMode::Exclusive, to: Some(mode) },
                Some(_) if mode == CacheMode::Exclusive => Step::Ask { mode, flags },
                // Shared and Deferred exclude each other: there is no way from one to the other but through nothing.
                Some(from) => Step::Demote { from, to: None },
            };
        }
    }

    fn decide_idle(&mut self, demand: Option<Option<CacheMode>>) -> Step {
        if 0 < self.holders {
            return Step::Rest;
        }
        if let (Some(from), true) = (self.mode, self.recovery_only) {
            return Step::Demote { from, to: None };
        }
        match (self.mode, self.id) {
            (Some(_), _) if demand.is_some() => Step::WaitUntil(self.hold_until),
            (Some(_), _) => Step::Rest,
            (None, Some(_)) if self.drop_now => Step::Unlock,
            (None, Some(_)) => Step::Rest,
            (None, None) => Step::Remove,
        }
    }

    /// Local users that do not wait for others fail as soon as they would have to.
    fn refuse_impatient(&mut self) {
        self.queue.retain(|w| {
            if w.flags.try_now {
                w.slot.finish(Err(AcquireError::WouldBlock));
            }
            !w.flags.try_now
        });
    }
}
