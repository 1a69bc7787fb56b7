//! Calls to the owners of locks: in order, one at a time, and never under a lock of ours.

use crate::{Completion, LockCallbacks, LockId, Mode};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// An operation ended.
    Done(Completion),
    /// Somebody wants the lock in this mode.
    Blocking(Mode),
}

/// A call to come.
pub(crate) struct Delivery {
    pub(crate) callbacks: Arc<dyn LockCallbacks>,
    pub(crate) id: LockId,
    pub(crate) call: Call,
}

/// The calls to come of one shard, in order.
#[derive(Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Delivery>,
    busy: bool,
}

impl core::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Outbox").field("queued", &self.queue.len()).field("busy", &self.busy).finish()
    }
}

impl Outbox {
    pub(crate) fn push(&mut self, delivery: Delivery) {
        self.queue.push_back(delivery);
    }
}

/// Something behind a mutex that has an outbox.
pub(crate) trait HasOutbox {
    fn outbox(&mut self) -> &mut Outbox;
}

/// Locks, whatever a panic elsewhere left.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the delivering turn also when a callback panics.
struct Turn<'a, T: HasOutbox>(&'a Mutex<T>);

impl<T: HasOutbox> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        lock(self.0).outbox().busy = false;
    }
}

/// Makes the calls that wait, on this thread, unless another thread (or this one, further out) does so already: it
/// takes ours along. Only so do the calls for one lock stay in order.
pub(crate) fn deliver<T: HasOutbox>(mutex: &Mutex<T>) {
    let mut turn = None;
    loop {
        let next = {
            let mut guard = lock(mutex);
            let outbox = guard.outbox();
            if turn.is_none() {
                if outbox.busy || outbox.queue.is_empty() {
                    return;
                }
                outbox.busy = true;
            }
            let next = outbox.queue.pop_front();
            if next.is_none() {
                // Under the same guard as the empty queue was seen, so that nobody relies on us any more.
                outbox.busy = false;
            }
            next
        };
        let Some(next) = next else {
            core::mem::forget(turn);
            return;
        };
        if turn.is_none() {
            turn = Some(Turn(mutex));
        }
        match next.call {
            Call::Done(completion) => next.callbacks.completion(next.id, completion),
            Call::Blocking(mode) => next.callbacks.blocking(next.id, mode),
        }
    }
}
