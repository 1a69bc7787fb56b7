//! What the tests share: a runtime on tokio, and a lock manager's calls as a list.

use quorate_dlm::{Completion, LockCallbacks, LockId, Mode};
use quorate_membership::{BoxFuture, Instant, Runtime};
use std::sync::{Arc, Mutex};

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
pub(crate) struct Recorder(Mutex<Vec<(LockId, Told)>>);

impl Recorder {
    pub(crate) fn take(&self) -> Vec<(LockId, Told)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl LockCallbacks for Recorder {
    fn completion(&self, id: LockId, completion: Completion) {
        self.0.lock().unwrap().push((id, Told::Done(completion)));
    }
    fn blocking(&self, id: LockId, mode: Mode) {
        self.0.lock().unwrap().push((id, Told::Blocking(mode)));
    }
}
