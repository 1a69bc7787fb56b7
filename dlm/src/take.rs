//! One lock as a value: asked for with [`Take`], had as [`Taken`], given up when that is dropped. Works on every
//! [`Lockspace`], in asynchronous code and in threads that block.

use crate::deliver::lock;
use crate::{
    Completion, ConvertRequest, Flags, Grant, LockCallbacks, LockError, LockId, LockRequest, Lockspace, Mode,
    UnlockRequest,
};
use core::future::{Future, IntoFuture};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Why a lock was not taken or not converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    /// The request was not taken on; nothing changed.
    #[error(transparent)]
    Refused(#[from] LockError),
    /// It ended otherwise than with a grant: not grantable at once, a deadlock, a recovery, the end of the lockspace.
    /// A new lock is gone; a converted one keeps its mode unless the lockspace has stopped.
    #[error("not granted: {0:?}")]
    NotGranted(Completion),
    /// The time given to [`Take::wait_for`] is over; the request was withdrawn.
    #[error("not granted within {0:?}")]
    TimedOut(Duration),
}

type OnBlocking = Box<dyn Fn(Mode) + Send + Sync>;

/// A lock that is to be taken. Nothing is asked before it is awaited or waited for.
pub struct Take {
    space: Arc<dyn Lockspace>,
    request: LockRequest,
    on_blocking: Option<OnBlocking>,
}

impl core::fmt::Debug for Take {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Take").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Take {
    /// A lock of `space`.
    #[must_use]
    pub fn new(space: &Arc<dyn Lockspace>, request: LockRequest) -> Self {
        Self { space: space.clone(), request, on_blocking: None }
    }

    /// Calls `call` when somebody waits who needs the lock in the mode given. It must not block; it is a hint.
    #[must_use]
    pub fn on_blocking(mut self, call: impl Fn(Mode) + Send + Sync + 'static) -> Self {
        self.on_blocking = Some(Box::new(call));
        self
    }

    /// Asks, and blocks this thread until the answer is there. Not for asynchronous code.
    ///
    /// # Errors
    /// See [`TakeError`].
    pub fn wait(self) -> Result<Taken, TakeError> {
        self.start().and_then(|asked| asked.wait(None))
    }

    /// The same for `limit` at most; then the request is withdrawn.
    ///
    /// # Errors
    /// See [`TakeError`].
    pub fn wait_for(self, limit: Duration) -> Result<Taken, TakeError> {
        self.start().and_then(|asked| asked.wait(Some(limit)))
    }

    fn start(self) -> Result<Asked, TakeError> {
        let watch = Arc::new(Watch {
            state: Mutex::default(),
            changed: Condvar::new(),
            on_blocking: self.on_blocking,
        });
        let id = self.space.request(self.request, watch.clone())?;
        Ok(Asked { lock: Some(Lock { space: self.space, id, watch }) })
    }
}

impl IntoFuture for Take {
    type Output = Result<Taken, TakeError>;
    type IntoFuture = Taking;
    fn into_future(self) -> Taking {
        Taking(match self.start() {
            Ok(asked) => Start::Asked(asked),
            Err(error) => Start::Failed(Some(error)),
        })
    }
}

/// A lock being taken. Dropping it withdraws the request, or gives up a grant that is under way.
#[derive(Debug)]
pub struct Taking(Start);

#[derive(Debug)]
enum Start {
    Asked(Asked),
    Failed(Option<TakeError>),
}

impl Future for Taking {
    type Output = Result<Taken, TakeError>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Start::Failed(error) => {
                let spent = TakeError::NotGranted(Completion::Cancelled);
                Poll::Ready(Err(error.take().unwrap_or(spent)))
            }
            Start::Asked(asked) => asked.poll(cx.waker()),
        }
    }
}

#[derive(Default)]
struct State {
    /// The end of the operation under way, until it is taken.
    ended: Option<Completion>,
    /// The lockspace stopped: the lock is gone, whatever was told before.
    is_lost: bool,
    is_granted: bool,
    wakers: Vec<Waker>,
}

struct Watch {
    state: Mutex<State>,
    changed: Condvar,
    on_blocking: Option<OnBlocking>,
}

impl LockCallbacks for Watch {
    fn completion(&self, _id: LockId, completion: Completion) {
        let wakers = {
            let mut state = lock(&self.state);
            match &completion {
                Completion::Granted(_) => state.is_granted = true,
                Completion::Stopped => (state.is_lost, state.is_granted) = (true, false),
                Completion::Unlocked => state.is_granted = false,
                _ => {}
            }
            state.ended = Some(completion);
            core::mem::take(&mut state.wakers)
        };
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }
    fn blocking(&self, _id: LockId, mode: Mode) {
        if let Some(call) = &self.on_blocking {
            call(mode);
        }
    }
}

impl Watch {
    fn poll_ended(&self, waker: &Waker) -> Poll<Completion> {
        let mut state = lock(&self.state);
        if state.is_lost {
            return Poll::Ready(Completion::Stopped);
        }
        if let Some(completion) = state.ended.take() {
            return Poll::Ready(completion);
        }
        if !state.wakers.iter().any(|w| w.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        Poll::Pending
    }

    #[expect(clippy::disallowed_methods, reason = "a thread that blocks on the real clock, no machine")]
    fn wait_ended(&self, limit: Option<Duration>) -> Option<Completion> {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = lock(&self.state);
        loop {
            if state.is_lost {
                return Some(Completion::Stopped);
            }
            if let Some(completion) = state.ended.take() {
                return Some(completion);
            }
            state = match until {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// A lock that was asked for.
struct Lock {
    space: Arc<dyn Lockspace>,
    id: LockId,
    watch: Arc<Watch>,
}

impl Lock {
    fn give_up(&self) {
        // Gone already, or going: then there is nothing to give up.
        let request = UnlockRequest { flags: Flags::FORCEUNLOCK, value: None };
        let _ = self.space.unlock(self.id, request);
    }
}

/// Waits for the answer to a new request.
struct Asked {
    /// `None` once the answer was taken.
    lock: Option<Lock>,
}

impl core::fmt::Debug for Asked {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Asked").field("id", &self.lock.as_ref().map(|l| l.id)).finish()
    }
}

impl Asked {
    fn finish(&mut self, completion: Completion) -> Result<Taken, TakeError> {
        match (completion, self.lock.take()) {
            (Completion::Granted(grant), Some(lock)) => Ok(Taken { lock, grant }),
            (other, _) => Err(TakeError::NotGranted(other)),
        }
    }

    fn poll(&mut self, waker: &Waker) -> Poll<Result<Taken, TakeError>> {
        match self.lock.as_ref().map(|l| l.watch.poll_ended(waker)) {
            Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(completion)) => Poll::Ready(self.finish(completion)),
            None => Poll::Ready(Err(TakeError::NotGranted(Completion::Cancelled))),
        }
    }

    fn wait(mut self, limit: Option<Duration>) -> Result<Taken, TakeError> {
        let ended = self.lock.as_ref().and_then(|l| l.watch.wait_ended(limit));
        match ended {
            Some(completion) => self.finish(completion),
            // Dropped, and so withdrawn.
            None => Err(TakeError::TimedOut(limit.unwrap_or_default())),
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            lock.give_up();
        }
    }
}

/// A lock that is held. Dropping it gives it up without writing the value block.
pub struct Taken {
    lock: Lock,
    grant: Grant,
}

impl core::fmt::Debug for Taken {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Taken").field("id", &self.lock.id).field("grant", &self.grant).finish()
    }
}

impl Taken {
    /// The last grant: mode, fencing token, value block.
    #[must_use]
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Its number in the lockspace.
    #[must_use]
    pub fn id(&self) -> LockId {
        self.lock.id
    }

    /// Whether it is lost because this life of the node, or the connection to it, has ended.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        lock(&self.lock.watch.state).is_lost
    }

    /// Blocks this thread until the lock is lost, or for `limit`; true if it is lost.
    #[must_use]
    pub fn wait_lost(&self, limit: Duration) -> bool {
        self.lock.watch.wait_ended(Some(limit)) == Some(Completion::Stopped)
    }

    /// Changes mode or value. Dropping the future leaves the conversion under way; the next one finds the lock busy
    /// until it has ended.
    ///
    /// # Errors
    /// See [`TakeError`]; the lock keeps its mode.
    pub async fn convert(&mut self, request: ConvertRequest) -> Result<&Grant, TakeError> {
        self.begin(request)?;
        let watch = self.lock.watch.clone();
        let ended = core::future::poll_fn(move |cx| watch.poll_ended(cx.waker())).await;
        self.converted(ended)
    }

    /// The same, blocking this thread.
    ///
    /// # Errors
    /// See [`TakeError`]; the lock keeps its mode.
    pub fn convert_wait(&mut self, request: ConvertRequest) -> Result<&Grant, TakeError> {
        self.begin(request)?;
        let ended = self.lock.watch.wait_ended(None).unwrap_or(Completion::Stopped);
        self.converted(ended)
    }

    fn begin(&mut self, request: ConvertRequest) -> Result<(), TakeError> {
        lock(&self.lock.watch.state).ended = None;
        Ok(self.lock.space.convert(self.lock.id, request)?)
    }

    fn converted(&mut self, ended: Completion) -> Result<&Grant, TakeError> {
        match ended {
            Completion::Granted(grant) => {
                self.grant = grant;
                Ok(&self.grant)
            }
            other => Err(TakeError::NotGranted(other)),
        }
    }

    /// Gives it up, and writes the value block if the request says so. Does not wait for the end.
    ///
    /// # Errors
    /// See [`LockError`]; the lock is given up all the same, without writing.
    pub fn unlock(self, request: UnlockRequest) -> Result<(), LockError> {
        self.lock.space.unlock(self.lock.id, request)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if lock(&self.watch.state).is_granted {
            self.give_up();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::LocalManager;
    use crate::{LockManager, LockName, LockspaceOptions};

    fn space() -> Arc<dyn Lockspace> {
        let manager = LocalManager::new();
        let options = LockspaceOptions::plain("test");
        let mut join = core::pin::pin!(manager.join(&options));
        match join.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(space)) => space,
            other => panic!("{:?}", other.map(|r| r.err())),
        }
    }

    fn request(mode: Mode) -> LockRequest {
        LockRequest::new(LockName::new(b"r").unwrap(), mode)
    }

    #[test]
    fn a_lock_is_given_up_when_it_is_dropped() {
        let space = space();
        let first = Take::new(&space, request(Mode::EX)).wait().unwrap();
        let limit = Duration::from_millis(5);
        let second = Take::new(&space, request(Mode::PR)).wait_for(limit);
        assert_eq!(second.unwrap_err(), TakeError::TimedOut(limit));
        drop(first);
        let mut third = Take::new(&space, request(Mode::PR)).wait().unwrap();
        let to = ConvertRequest::new;
        assert_eq!(third.convert_wait(to(Mode::EX)).unwrap().mode, Mode::EX);
    }

    #[test]
    fn a_dropped_future_withdraws_its_request() {
        let space = space();
        let first = Take::new(&space, request(Mode::PR)).wait().unwrap();
        let mut waiting = Take::new(&space, request(Mode::EX)).into_future();
        assert!(Pin::new(&mut waiting).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(waiting);
        // Nobody waits any more, so another reader need not either.
        Take::new(&space, request(Mode::PR).flags(Flags::NOQUEUE)).wait().unwrap();
        drop(first);
    }
}
