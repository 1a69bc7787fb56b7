//! What the tests share: a runtime on tokio, and a lock manager's calls as a list.

use quorate_dlm::{Completion, LockCallbacks, LockId, Mode};
use quorate_membership::{BoxFuture, Instant, Runtime};
use std::sync::{Arc, Condvar, Mutex};

/// Time and tasks from tokio.
#[derive(Debug)]
pub(crate) struct TestRuntime {
    start: tokio::time::Instant,
}

impl TestRuntime {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { start: tokio::time::Instant::now() })
    }
}

impl Runtime for TestRuntime {
    fn now(&self) -> Instant {
        Instant(u64::try_from(self.start.elapsed().as_nanos()).unwrap())
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        let at = self.start + std::time::Duration::from_nanos(at.0);
        Box::pin(tokio::time::sleep_until(at))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}

/// What a lock was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Done(Completion),
    Blocking(Mode),
}

/// Writes down all calls.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Vec<(LockId, Told)>>, Condvar);

impl Recorder {
    /// Waits until there are `count` calls, and takes all; an error is what there is when `limit` is over.
    #[cfg_attr(not(feature = "service"), expect(dead_code, reason = "for tests with processes"))]
    pub(crate) fn wait(&self, count: usize, limit: std::time::Duration) -> Result<Vec<Told>, Vec<Told>> {
        let calls = self.0.lock().unwrap();
        let (mut calls, end) = self.1.wait_timeout_while(calls, limit, |c| c.len() < count).unwrap();
        let told = std::mem::take(&mut *calls).into_iter().map(|(_, t)| t).collect();
        if end.timed_out() { Err(told) } else { Ok(told) }
    }

    pub(crate) fn take(&self) -> Vec<(LockId, Told)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl LockCallbacks for Recorder {
    fn completion(&self, id: LockId, completion: Completion) {
        self.0.lock().unwrap().push((id, Told::Done(completion)));
        self.1.notify_all();
    }
    fn blocking(&self, id: LockId, mode: Mode) {
        self.0.lock().unwrap().push((id, Told::Blocking(mode)));
        self.1.notify_all();
    }
}
