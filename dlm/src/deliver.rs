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

    /// The calls that wait, for [`run`]; `None` if there are none, or somebody makes calls already: they take ours along.
    pub(crate) fn begin(&mut self) -> Option<VecDeque<Delivery>> {
        if self.busy || self.queue.is_empty() {
            return None;
        }
        self.busy = true;
        Some(core::mem::take(&mut self.queue))
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

/// Ends the delivering turn also when a callback panics; the calls that were not made wait for the next turn.
struct Turn<'a, T: HasOutbox> {
    mutex: &'a Mutex<T>,
    calls: VecDeque<Delivery>,
}

impl<T: HasOutbox> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        if !self.calls.is_empty() || std::thread::panicking() {
            let mut guard = lock(self.mutex);
            let outbox = guard.outbox();
            self.calls.append(&mut outbox.queue);
            core::mem::swap(&mut outbox.queue, &mut self.calls);
            outbox.busy = false;
        }
    }
}

/// Makes the calls of a turn that has begun, and those that come meanwhile, on this thread.
pub(crate) fn run<T: HasOutbox>(mutex: &Mutex<T>, calls: VecDeque<Delivery>) {
    let mut turn = Turn { mutex, calls };
    loop {
        while let Some(next) = turn.calls.pop_front() {
            match next.call {
                Call::Done(completion) => next.callbacks.completion(next.id, completion),
                Call::Blocking(mode) => next.callbacks.blocking(next.id, mode),
            }
        }
        let mut guard = lock(mutex);
        let outbox = guard.outbox();
        core::mem::swap(&mut outbox.queue, &mut turn.calls);
        if turn.calls.is_empty() {
            // Under the same guard as the empty queue was seen, so that nobody relies on us any more.
            outbox.busy = false;
            return;
        }
    }
}

/// Makes the calls that wait, on this thread, unless another thread (or this one, further out) does so already: it
/// takes ours along. Only so do the calls for one lock stay in order.
pub(crate) fn deliver<T: HasOutbox>(mutex: &Mutex<T>) {
    let calls = lock(mutex).outbox().begin();
    if let Some(calls) = calls {
        run(mutex, calls);
    }
}
