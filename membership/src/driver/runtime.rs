//! The real clock and a tokio runtime behind the workspace's [`Runtime`] trait.

use crate::{BoxFuture, Instant, Runtime};
use std::time::Duration;

/// CLOCK_BOOTTIME: unlike the monotonic clock it counts the time a machine was suspended, in which others went on (R8).
#[must_use]
pub fn boottime() -> Instant {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    Instant(seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(t.tv_nsec).unwrap_or(0)))
}

/// A tokio runtime as a [`Runtime`].
#[derive(Clone, Debug)]
pub struct TokioRuntime {
    handle: tokio::runtime::Handle,
}

impl TokioRuntime {
    /// Uses this runtime. It needs its time driver enabled.
    #[must_use]
    pub fn new(handle: tokio::runtime::Handle) -> Self {
        Self { handle }
    }

    /// Uses the runtime that the caller runs on.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn current() -> Self {
        Self::new(tokio::runtime::Handle::current())
    }
}

/// Waits on a handle's timer from any executor.
async fn sleep(handle: tokio::runtime::Handle, at: Instant) {
    loop {
        let left = at.since(boottime());
        if left == Duration::ZERO {
            return;
        }
        // The timer is made inside the runtime's context; after a suspend it may fire early, hence the loop.
        let timer = {
            let _context = handle.enter();
            tokio::time::sleep(left.min(Duration::from_secs(3_600)))
        };
        timer.await;
    }
}

impl Runtime for TokioRuntime {
    fn now(&self) -> Instant {
        boottime()
    }

    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        Box::pin(sleep(self.handle.clone(), at))
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(self.handle.spawn(task));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_ends_at_its_instant_and_not_before() {
        let tokio = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let runtime = TokioRuntime::new(tokio.handle().clone());
        let until = runtime.now() + Duration::from_millis(20);
        tokio.block_on(runtime.sleep_until(until));
        assert!(until <= runtime.now());
    }
}
