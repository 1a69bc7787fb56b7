//! Busy polling: for a while after each message the session loop looks for the next one instead of going to sleep.
//!
//! Waking a sleeping thread on another CPU takes longer than a message, its encryption and its answer together. Who has a
//! CPU to spare for latency says for how long the loop may spin; by default it never does.

use super::boottime;
use crate::Instant;
use core::time::Duration;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

/// Longer is a CPU given away for nothing: a message that comes after that may as well wake the loop.
pub const BUSY_POLL_MAX: Duration = Duration::from_millis(10);

/// What the loop and those who send through it share.
#[derive(Debug)]
pub(super) struct BusyPoll {
    time: Duration,
    active_ns: AtomicU64,
    spins: AtomicBool,
    start: Notify,
}

impl BusyPoll {
    pub(super) fn new(time: Duration) -> Self {
        Self {
            time: time.min(BUSY_POLL_MAX),
            active_ns: AtomicU64::new(0),
            spins: AtomicBool::new(false),
            start: Notify::new(),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        !self.time.is_zero()
    }

    /// A message came, or one was sent whose answer may come.
    pub(super) fn active(&self) {
        if self.is_on() {
            self.active_ns.store(boottime().0, Ordering::SeqCst);
            if !self.spins.load(Ordering::SeqCst) {
                self.start.notify_one();
            }
        }
    }

    fn is_due(&self) -> bool {
        let since = boottime().since(Instant(self.active_ns.load(Ordering::SeqCst)));
        since < self.time
    }

    /// Keeps the runtime that it is a task of awake while there is reason to. Never ends by itself.
    pub(super) async fn spin(&self) {
        loop {
            self.start.notified().await;
            self.spins.store(true, Ordering::SeqCst);
            while self.is_due() {
                tokio::task::yield_now().await;
            }
            self.spins.store(false, Ordering::SeqCst);
            // Somebody may have seen that it spins just before.
            if self.is_due() {
                self.start.notify_one();
            }
        }
    }

    /// The runtime of the loop. One that spins looks at its sockets and at what other threads woke after every task:
    /// there always is a task that can run.
    pub(super) fn runtime(time: Duration) -> std::io::Result<tokio::runtime::Runtime> {
        Self::builder(time).build()
    }

    fn builder(time: Duration) -> tokio::runtime::Builder {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        if !time.is_zero() {
            builder.event_interval(1).global_queue_interval(1);
        }
        builder.enable_all();
        builder
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// How long after a message a runtime went to sleep, having heard another thread before.
    fn first_sleep_after_a_message(time: Duration) -> Duration {
        let busy = Arc::new(BusyPoll::new(time));
        let (slept_at, slept) = (Arc::new(AtomicU64::new(0)), Arc::new(Notify::new()));
        let (note, wake) = (slept_at.clone(), slept.clone());
        let runtime = BusyPoll::builder(time)
            .on_thread_park(move || {
                note.store(boottime().0, Ordering::SeqCst);
                wake.notify_one();
            })
            .build()
            .unwrap();
        runtime.block_on(async {
            let spinning = busy.clone();
            tokio::spawn(async move { spinning.spin().await });
            let (to, from) = tokio::sync::oneshot::channel();
            let begin = boottime();
            busy.active();
            std::thread::spawn(move || to.send(()).unwrap());
            // What another thread wakes is seen while it spins, too.
            from.await.unwrap();
            slept.notified().await;
            Instant(slept_at.load(Ordering::SeqCst)).since(begin)
        })
    }

    #[test]
    fn it_does_not_sleep_before_its_time_and_then_it_does() {
        let time = Duration::from_millis(8);
        assert!(time <= first_sleep_after_a_message(time));
    }

    #[test]
    fn it_is_off_by_default_and_never_longer_than_the_most() {
        let off = BusyPoll::new(Duration::ZERO);
        off.active();
        assert!(!off.is_on() && !off.is_due());
        assert_eq!(BusyPoll::new(Duration::from_secs(5)).time, BUSY_POLL_MAX);
    }
}
