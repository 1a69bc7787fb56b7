//! A cached lock in the hands of a local user, and the wait for one.

use super::entry::Entry;
use super::state::Waiter;
use super::{AcquireError, AcquireFlags, CacheMode, Inner};
use crate::deliver::lock;
use crate::{FencingToken, LockName, ValueBlock};
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use std::sync::{Arc, Mutex};

/// A lock that a local user has. Dropping it is the release: the lock stays cached.
#[derive(Debug)]
pub struct Held {
    entry: Arc<Entry>,
    mode: CacheMode,
    token: FencingToken,
    no_cache: bool,
}

impl Held {
    pub(super) fn new(entry: Arc<Entry>, mode: CacheMode, token: FencingToken, no_cache: bool) -> Self {
        Self { entry, mode, token, no_cache }
    }

    /// Which lock.
    #[must_use]
    pub fn name(&self) -> &LockName {
        &self.entry.name
    }

    /// How it is held: as asked for, also when it is cached in a stronger mode.
    #[must_use]
    pub fn mode(&self) -> CacheMode {
        self.mode
    }

    /// Of the master's grant under which it is held.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// The value block; `None` if the lock has none or it is not valid.
    #[must_use]
    pub fn value(&self) -> Option<ValueBlock> {
        lock(&self.entry.state).value.clone()
    }

    /// Sets the value block; others see it when they are granted the lock.
    ///
    /// # Panics
    /// If the lock is not held exclusively, or the block has another size than the lockspace's: a bug of the caller.
    pub fn set_value(&self, value: ValueBlock) {
        assert!(self.mode == CacheMode::Exclusive, "a value block is set under an exclusive lock");
        assert!(value.len() == self.entry.cache.lockspace.value_bytes(), "a value block of the wrong size");
        lock(&self.entry.state).value = Some(value);
    }

    /// Whether another node waits for it. A hint.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        lock(&self.entry.state).wanted.is_some()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.entry.release(self.no_cache);
    }
}

/// Where a waiter's answer is put.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<SlotState>);

#[derive(Debug, Default)]
struct SlotState {
    result: Option<Result<CacheMode, AcquireError>>,
    waker: Option<Waker>,
}

impl Slot {
    pub(super) fn finish(&self, result: Result<CacheMode, AcquireError>) {
        let mut state = lock(&self.0);
        state.result = Some(result);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn take(&self) -> Option<Result<CacheMode, AcquireError>> {
        lock(&self.0).result.take()
    }
}

/// The wait of one local user.
pub(super) struct Acquire {
    entry: Arc<Entry>,
    flags: AcquireFlags,
    slot: Arc<Slot>,
    done: bool,
}

impl Acquire {
    /// Queues the wish and lets the entry work, at first on this thread. Resolves with `None` if the entry has gone.
    pub(super) async fn start(
        cache: &Arc<Inner>,
        name: &LockName,
        mode: CacheMode,
        flags: AcquireFlags,
    ) -> Result<Option<Held>, AcquireError> {
        let entry = cache.find_or_create(name);
        let slot = Arc::new(Slot::default());
        let pass_by = {
            let mut state = lock(&entry.state);
            if state.removed {
                return Ok(None);
            }
            if let Some(failure) = state.failure() {
                return Err(failure);
            }
            if flags.try_now && (state.busy || !state.queue.is_empty()) {
                return Err(AcquireError::WouldBlock);
            }
            let waiter = Waiter { mode, flags, slot: slot.clone() };
            if flags.recovery {
                // The hold that the others wait for ends only through this one.
                state.queue.push_front(waiter);
            } else {
                state.queue.push_back(waiter);
            }
            (flags.recovery && state.asking == Some(false)).then_some(state.id).flatten()
        };
        let wait = Self { entry: entry.clone(), flags, slot, done: false };
        if let Some(id) = pass_by {
            // Without effect if the grant is on its way; then the queue is looked at anyway.
            let _ = cache.lockspace.cancel(id);
        }
        entry.work_here();
        wait.await.map(Some)
    }
}

impl Future for Acquire {
    type Output = Result<Held, AcquireError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let mut state = lock(&self.slot.0);
            match state.result.take() {
                Some(result) => result,
                None => {
                    state.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        };
        self.done = true;
        Poll::Ready(result.map(|mode| {
            let token = lock(&self.entry.state).token;
            Held::new(self.entry.clone(), mode, token, self.flags.no_cache)
        }))
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut state = lock(&self.entry.state);
        state.queue.retain(|w| !Arc::ptr_eq(&w.slot, &self.slot));
        let give_up = (state.queue.is_empty() && state.asking.is_some()).then_some(state.id).flatten();
        drop(state);
        if let Some(Ok(_)) = self.slot.take() {
            self.entry.release(self.flags.no_cache);
        } else if let Some(id) = give_up {
            // Without effect on a demotion: a conversion down is granted at once.
            let _ = self.entry.cache.lockspace.cancel(id);
        }
        self.entry.kick_or_spawn();
    }
}
