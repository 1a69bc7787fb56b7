//! One simulated host: a clock of its own, a disk that forgets what was not synced, and at most one process.

use crate::machine::{Durable, Input, Member, Record, Token};
use crate::{Instant, Rng};
use core::time::Duration;
use std::collections::VecDeque;

/// A host's clock: an offset and a rate, so that times of two hosts never mean the same.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What it shows when the simulation begins, in nanoseconds.
    pub offset_ns: u64,
    /// How much faster than the simulation it runs, in parts per million.
    pub fast_ppm: i32,
}

impl Clock {
    /// An arbitrary start, and a rate within one percent of the right one.
    #[must_use]
    pub fn drawn(rng: &mut Rng) -> Self {
        let fast_ppm = i32::try_from(rng.below(20_001)).unwrap_or(0) - 10_000;
        Self { offset_ns: 1_000_000_000 + rng.below(1_000_000_000_000), fast_ppm }
    }

    /// What it shows at this instant of the simulation.
    #[must_use]
    pub fn local(&self, global: Instant) -> Instant {
        let extra = i128::from(global.0) * i128::from(self.fast_ppm) / 1_000_000;
        let ns = i128::from(global.0) + extra + i128::from(self.offset_ns);
        Instant(u64::try_from(ns).unwrap_or(0))
    }

    /// The first instant of the simulation at which it shows `local` or later.
    #[must_use]
    pub fn global(&self, local: Instant) -> Instant {
        let since = local.0.saturating_sub(self.offset_ns);
        let rate = 1_000_000 + i128::from(self.fast_ppm);
        let ns = (i128::from(since) * 1_000_000 + rate - 1) / rate + 1;
        Instant(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// A host.
#[derive(Debug)]
pub struct SimNode {
    /// Its clock.
    pub clock: Clock,
    /// What is synced.
    pub disk: Durable,
    /// What was written and is not synced.
    pub(super) unsynced: VecDeque<(Token, Record)>,
    /// Whether something in `unsynced` is waited for.
    pub(super) urgent: bool,
    /// The process, if one runs.
    pub(super) machine: Option<Member>,
    /// Counts processes, so that what was meant for an earlier one is not given to a later one.
    pub(super) process: u64,
    /// What arrived while the process was stopped.
    pub(super) held: Vec<Input>,
    pub(super) paused: bool,
    /// The tick under way, so that there is one at a time.
    pub(super) tick_at: Option<Instant>,
    /// The disk as it was before the last life but one, for rolling back.
    pub(super) old_disk: Option<Durable>,
    pub(super) syncing: bool,
}

impl SimNode {
    pub(super) fn new(clock: Clock, disk: Durable) -> Self {
        Self {
            clock,
            disk,
            unsynced: VecDeque::new(),
            urgent: false,
            machine: None,
            process: 0,
            held: Vec::new(),
            paused: false,
            tick_at: None,
            old_disk: None,
            syncing: false,
        }
    }

    /// The machine of the process that runs, stopped by SIGSTOP or not.
    #[must_use]
    pub fn member(&self) -> Option<&Member> {
        self.machine.as_ref()
    }

    /// Whether the process is stopped by SIGSTOP.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Makes everything up to `token` durable.
    pub(super) fn sync(&mut self, token: Token) {
        while self.unsynced.front().is_some_and(|(t, _)| *t <= token) {
            if let Some((_, record)) = self.unsynced.pop_front() {
                self.disk.apply(record);
            }
        }
    }

    /// The process dies; of what was not synced a beginning may have reached the disk.
    pub(super) fn die(&mut self, rng: &mut Rng) {
        let kept = rng.below(self.unsynced.len() as u64 + 1);
        for (_, record) in self.unsynced.drain(..).take(usize::try_from(kept).unwrap_or(0)) {
            self.disk.apply(record);
        }
        self.machine = None;
        self.process += 1;
        self.held.clear();
        self.paused = false;
        self.tick_at = None;
        self.syncing = false;
        self.urgent = false;
    }
}

/// How long a sync takes: mostly short, sometimes as long as a disk takes that has other things to do.
pub(super) fn sync_time(rng: &mut Rng, slow_ppm: u32) -> Duration {
    if rng.chance_ppm(slow_ppm) {
        rng.duration(Duration::from_millis(20), Duration::from_millis(400))
    } else {
        rng.duration(Duration::from_micros(100), Duration::from_millis(3))
    }
}
