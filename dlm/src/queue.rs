//! A completion queue over a lockspace, for programs with many operations under way: submitted in batches, reaped in
//! batches, without a callback object or a wake-up for each.
//!
//! ```
//! use quorate_dlm::local::LocalManager;
//! use quorate_dlm::{LockManager, LockName, LockQueue, LockRequest, LockspaceOptions, Mode, UnlockRequest};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let space = LocalManager::new().join(&LockspaceOptions::plain("example")).await?;
//! let queue = LockQueue::new(space);
//! let name = LockName::new(b"printer")?;
//! let mut told = Vec::new();
//! let ids = queue.batch(|batch| batch.request(LockRequest::new(name, Mode::EX)));
//! queue.wait(&mut told).await;
//! assert_eq!(told[0].id, ids?);
//! queue.batch(|batch| batch.unlock(told[0].id, UnlockRequest::release()))?;
//! # Ok(())
//! # }
//! # use std::future::Future;
//! # let mut run = Box::pin(run());
//! # assert!(run.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready());
//! ```

use crate::deliver::lock;
use crate::{
    Completion, ConvertRequest, LockCallbacks, LockError, LockId, LockRequest, Lockspace, Mode, UnlockRequest,
};
use event_listener::{Event, Listener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Something that happened to a lock of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Which lock.
    pub id: LockId,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// An operation ended.
    Done(Completion),
    /// Somebody waits who needs this mode.
    Blocking(Mode),
}

#[derive(Default)]
struct Inner {
    told: Mutex<Vec<Told>>,
    /// Somebody waits; without, telling costs no wake-up.
    has_waiter: AtomicBool,
    wake: Event,
}

impl Inner {
    fn tell(&self, id: LockId, what: What) {
        lock(&self.told).push(Told { id, what });
        if self.has_waiter.load(Ordering::SeqCst) {
            self.wake.notify(usize::MAX);
        }
    }

    fn take(&self, into: &mut Vec<Told>) -> bool {
        let mut told = lock(&self.told);
        let any = !told.is_empty();
        if into.is_empty() {
            core::mem::swap(&mut *told, into);
        } else {
            into.append(&mut told);
        }
        any
    }
}

impl LockCallbacks for Inner {
    fn completion(&self, id: LockId, completion: Completion) {
        self.tell(id, What::Done(completion));
    }
    fn blocking(&self, id: LockId, mode: Mode) {
        self.tell(id, What::Blocking(mode));
    }
}

/// A queue of what becomes of its locks. What one lock is told comes in order.
pub struct LockQueue {
    space: Arc<dyn Lockspace>,
    inner: Arc<Inner>,
}

impl core::fmt::Debug for LockQueue {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LockQueue").field("lockspace", &self.space.name()).finish_non_exhaustive()
    }
}

impl LockQueue {
    /// A queue for locks of this lockspace.
    #[must_use]
    pub fn new(space: Arc<dyn Lockspace>) -> Self {
        Self { space, inner: Arc::new(Inner::default()) }
    }

    /// Submits operations; those for one master travel together, at the end of `work`. What they come to is reaped.
    pub fn batch<T>(&self, work: impl FnOnce(&mut Batch<'_>) -> T) -> T {
        let (mut work, mut result) = (Some(work), None);
        self.space.corked(&mut |space| {
            if let Some(work) = work.take() {
                result = Some(work(&mut Batch { space, inner: &self.inner }));
            }
        });
        result.expect("a lockspace does corked work once")
    }

    /// Takes what was told since the last time, oldest first, without waiting. False: nothing was.
    pub fn reap(&self, into: &mut Vec<Told>) -> bool {
        self.inner.take(into)
    }

    /// The same, but waits until there is something. Dropping the future loses nothing.
    pub async fn wait(&self, into: &mut Vec<Told>) {
        loop {
            let woken = self.inner.wake.listen();
            self.inner.has_waiter.store(true, Ordering::SeqCst);
            if self.inner.take(into) {
                break;
            }
            woken.await;
        }
        self.inner.has_waiter.store(false, Ordering::SeqCst);
    }

    /// The same for threads: blocks this one.
    pub fn wait_blocking(&self, into: &mut Vec<Told>) {
        loop {
            let woken = self.inner.wake.listen();
            self.inner.has_waiter.store(true, Ordering::SeqCst);
            if self.inner.take(into) {
                break;
            }
            woken.wait();
        }
        self.inner.has_waiter.store(false, Ordering::SeqCst);
    }
}

/// Operations that are submitted together.
pub struct Batch<'a> {
    space: &'a dyn Lockspace,
    inner: &'a Arc<Inner>,
}

impl core::fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Batch").finish_non_exhaustive()
    }
}

impl Batch<'_> {
    /// See [`Lockspace::request`].
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn request(&mut self, request: LockRequest) -> Result<LockId, LockError> {
        self.space.request(request, self.inner.clone())
    }

    /// See [`Lockspace::convert`].
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn convert(&mut self, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.space.convert(id, request)
    }

    /// See [`Lockspace::unlock`].
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn unlock(&mut self, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.space.unlock(id, request)
    }
}
