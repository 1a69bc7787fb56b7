//! The task that works on one entry: it does what [`State::decide`](super::state::State::decide) says until there is
//! nothing to do.

use super::entry::{Entry, EntryCallbacks};
use super::state::{State, Step};
use super::{AcquireError, AcquireFlags, CacheMode};
use crate::deliver::lock;
use crate::{Completion, ConvertRequest, Flags, LockError, LockRequest, Mode, UnlockRequest, ValueBlock};
use core::task::{Context, Poll, Waker};
use futures_util::future::select;
use quorate_membership::Instant;
use std::future::Future;
use std::sync::{Arc, MutexGuard};

/// What a worker does with itself after a step.
enum Next {
    Again,
    End,
    Wait(Instant),
}

impl Entry {
    /// Sees to it that a worker looks at the entry. For contexts that must not be held up.
    pub(super) fn kick_or_spawn(self: &Arc<Self>) {
        if self.claim() {
            self.cache.runtime.spawn(Box::pin(self.clone().work()));
        } else {
            self.kick.notify(usize::MAX);
        }
    }

    /// The same, but does on this thread what can be done without waiting: a lock whose master is here is granted so.
    pub(super) fn work_here(self: &Arc<Self>) {
        if !self.claim() {
            self.kick.notify(usize::MAX);
            return;
        }
        let mut work = Box::pin(self.clone().work());
        let mut cx = Context::from_waker(Waker::noop());
        if work.as_mut().poll(&mut cx) == Poll::Pending {
            // Polled again with the runtime's waker, so nothing that happened in between is missed.
            self.cache.runtime.spawn(work);
        }
    }

    fn claim(&self) -> bool {
        let mut state = lock(&self.state);
        !core::mem::replace(&mut state.working, true)
    }

    async fn work(self: Arc<Self>) {
        loop {
            let kicked = self.kick.listen();
            let step = {
                let mut state = lock(&self.state);
                let step = state.decide(self.cache.runtime.now());
                match step {
                    Step::Rest => state.working = false,
                    Step::Remove => state.removed = true,
                    Step::WaitUntil(_) => {}
                    _ => state.busy = true,
                }
                step
            };
            let next = match step {
                Step::Rest => Next::End,
                Step::WaitUntil(at) => Next::Wait(at),
                Step::Remove => {
                    self.cache.forget(&self);
                    Next::End
                }
                Step::Demote { from, to } => self.demote(from, to).await,
                Step::Unlock => self.unlock(None).await,
                Step::Ask { mode, flags } => self.ask(mode, flags).await,
            };
            match next {
                Next::Again => lock(&self.state).busy = false,
                Next::End => return,
                Next::Wait(at) => {
                    select(kicked, self.cache.runtime.sleep_until(at)).await;
                }
            }
        }
    }

    /// Starts an operation at the master with `start` and waits for its end.
    async fn operate(
        &self,
        recovery: bool,
        start: impl FnOnce() -> Result<(), LockError>,
    ) -> Result<Completion, LockError> {
        {
            let mut state = lock(&self.state);
            state.asking = Some(recovery);
            state.completion = None;
        }
        let started = start();
        let result = match started {
            Err(error) => Err(error),
            Ok(()) => Ok(self.completed().await),
        };
        lock(&self.state).asking = None;
        result
    }

    async fn completed(&self) -> Completion {
        loop {
            let kicked = self.kick.listen();
            if let Some(completion) = lock(&self.state).completion.take() {
                return completion;
            }
            kicked.await;
        }
    }

    async fn demote(self: &Arc<Self>, from: CacheMode, to: Option<CacheMode>) -> Next {
        let value_bytes = self.cache.lockspace.value_bytes();
        let (mut value, known, has_value) = {
            let state = lock(&self.state);
            (
                state.value.clone().unwrap_or_else(|| vec![0; value_bytes]),
                state.value.is_some(),
                state.has_value,
            )
        };
        let before = value.clone();
        if let Err(reason) = self.cache.client.demote(&self.name, from, to, &mut value).await {
            let mut state = lock(&self.state);
            tracing::error!(target: "quorate_dlm::cache", lock = %self.name, %reason, "a lock cannot be given up");
            state.withdrawn = Some(reason);
            return Next::Again;
        }
        // An invalid block is not made valid by passing on what was there.
        let write = has_value
            && from == CacheMode::Exclusive
            && (known || value != before)
            && value.len() == value_bytes;
        let keep_null = has_value && !lock(&self.state).drop_now;
        if to.is_none() && !keep_null {
            return self.unlock(write.then_some(value)).await;
        }
        let mode = to.map_or(Mode::NL, CacheMode::lock_mode);
        let flags = if write { Flags::VALBLK } else { Flags::NONE };
        let kept = write.then(|| value.clone());
        let request = ConvertRequest::new(mode).flags(flags).value(write.then_some(value));
        let Some(id) = lock(&self.state).id else { return self.stop("the lock is gone") };
        match self.operate(false, || self.cache.lockspace.convert(id, request)).await {
            Ok(Completion::Granted(_)) => {
                let mut state = lock(&self.state);
                state.mode = to;
                state.recovery_only = false;
                if kept.is_some() {
                    state.value = kept;
                }
                drop(state);
                self.cache.changed.notify(usize::MAX);
                Next::Again
            }
            // Withdrawn by a waiter that went away: nothing has changed, the decision is taken afresh. The client
            // wrote back once too often.
            Ok(Completion::Cancelled) => Next::Again,
            other => self.fail(&other),
        }
    }

    async fn unlock(self: &Arc<Self>, value: Option<ValueBlock>) -> Next {
        let Some(id) = lock(&self.state).id else { return self.stop("the lock is gone") };
        let flags = if value.is_some() { Flags::VALBLK } else { Flags::NONE };
        let request = UnlockRequest { flags, value };
        match self.operate(false, || self.cache.lockspace.unlock(id, request)).await {
            Ok(Completion::Unlocked) => {
                let mut state = lock(&self.state);
                self.forget_lock(&mut state);
                drop(state);
                self.cache.changed.notify(usize::MAX);
                Next::Again
            }
            other => self.fail(&other),
        }
    }

    fn forget_lock(&self, state: &mut MutexGuard<'_, State>) {
        state.id = None;
        state.mode = None;
        state.value = None;
        state.wanted = None;
        state.drop_now = false;
        state.recovery_only = false;
    }

    async fn ask(self: &Arc<Self>, mode: CacheMode, wish: AcquireFlags) -> Next {
        let (id, from, has_value) = {
            let state = lock(&self.state);
            (state.id, state.mode, state.has_value)
        };
        let mut flags = if has_value { Flags::VALBLK } else { Flags::NONE };
        if wish.try_now {
            flags = flags | Flags::NOQUEUE | Flags::NORECOVERYWAIT;
        }
        if wish.nudge {
            flags = flags | Flags::NOQUEUEBAST;
        }
        if wish.recovery {
            flags = flags | Flags::RECOVERY;
        }
        let result = self
            .operate(wish.recovery, || match id {
                Some(id) => {
                    self.cache.lockspace.convert(id, ConvertRequest::new(mode.lock_mode()).flags(flags))
                }
                None => {
                    let request = LockRequest::new(self.name.clone(), mode.lock_mode()).flags(flags);
                    let callbacks = Arc::new(EntryCallbacks(self.clone()));
                    let id = self.cache.lockspace.request(request, callbacks)?;
                    let pass_by = {
                        let mut state = lock(&self.state);
                        state.id = Some(id);
                        !wish.recovery && state.queue.front().is_none_or(|w| w.flags.recovery)
                    };
                    // Its reason went away, or a recovery came, before the number was known.
                    if pass_by { self.cache.lockspace.cancel(id) } else { Ok(()) }
                }
            })
            .await;
        let is_gone = |state: &mut MutexGuard<'_, State>| {
            if id.is_none() {
                state.id = None;
            }
        };
        match result {
            Ok(Completion::Granted(grant)) => {
                let value = {
                    let mut state = lock(&self.state);
                    state.token = grant.token;
                    state.value = grant.value.filter(|_| has_value && !grant.value_invalid);
                    state.value.clone()
                };
                self.cache.client.granted(&self.name, mode, value.as_ref());
                let now = self.cache.runtime.now();
                lock(&self.state).granted(mode, wish.recovery, &self.cache.config, now);
                Next::Again
            }
            Ok(refused @ (Completion::Again | Completion::Recovering)) => {
                let error = match refused {
                    Completion::Again => AcquireError::WouldBlock,
                    _ => AcquireError::Recovering,
                };
                let mut state = lock(&self.state);
                is_gone(&mut state);
                // Those that came meanwhile ask for themselves.
                if state.queue.front().is_some_and(|w| w.flags.try_now)
                    && let Some(waiter) = state.queue.pop_front()
                {
                    waiter.slot.finish(Err(error));
                }
                Next::Again
            }
            Ok(Completion::Cancelled) => {
                is_gone(&mut lock(&self.state));
                Next::Again
            }
            // Two nodes want more than they share, each waiting for the other: one goes down first.
            Ok(Completion::Deadlock) => match from {
                Some(from) => Box::pin(self.demote(from, None)).await,
                // A lock kept at NL stood in the queue before one that has to come first: it queues again, behind it.
                None => {
                    is_gone(&mut lock(&self.state));
                    Next::Again
                }
            },
            other => self.fail(&other),
        }
    }

    fn fail(&self, result: &Result<Completion, LockError>) -> Next {
        match result {
            Ok(Completion::Stopped) | Err(LockError::Stopped) => self.stop("the lockspace has stopped"),
            Ok(other) => self.stop(&format!("unexpected {other:?}")),
            Err(error) => self.stop(&error.to_string()),
        }
    }

    fn stop(&self, reason: &str) -> Next {
        lock(&self.state).stopped = Some(reason.to_owned());
        self.cache.changed.notify(usize::MAX);
        Next::Again
    }
}
