//! Counters of a lockspace on one node: where operations were carried out, how they ended, how long they waited.

use crate::Completion;
use core::time::Duration;
use quorate_membership::metrics::Exposition;
use serde::{Deserialize, Serialize};

/// How many classes of waiting there are. Class `i` counts waits of up to 2^`i` microseconds that are in no class
/// before; the last one counts everything longer (above about 17 minutes).
pub const WAIT_BUCKETS: usize = 32;

/// How long operations waited, in classes that double.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitHistogram {
    /// How many fell into each class.
    pub counts: [u64; WAIT_BUCKETS],
    /// All waits together, in nanoseconds.
    pub total_ns: u64,
}

impl WaitHistogram {
    /// Counts one wait.
    pub fn record(&mut self, wait: Duration) {
        let us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        // The number of binary digits of us - 1: the smallest i with us <= 2^i.
        let class = (u64::BITS - us.saturating_sub(1).leading_zeros()) as usize;
        if let Some(count) = self.counts.get_mut(class.min(WAIT_BUCKETS - 1)) {
            *count += 1;
        }
        self.total_ns = self.total_ns.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
    }

    /// How many waits were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper limit of class `i`; `None` for the last, which has none.
    #[must_use]
    pub fn limit(i: usize) -> Option<Duration> {
        (i + 1 < WAIT_BUCKETS).then(|| Duration::from_micros(1 << i))
    }

    /// The upper limit of the class in which the wait number `parts_per_thousand` of a thousand falls; `None` if
    /// nothing was counted or it falls into the last class.
    #[must_use]
    pub fn quantile(&self, parts_per_thousand: u64) -> Option<Duration> {
        let total = self.count();
        let rank = (u128::from(total) * u128::from(parts_per_thousand)).div_ceil(1_000);
        let mut seen = 0u128;
        for (i, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if 0 < total && rank <= seen {
                return Self::limit(i);
            }
        }
        None
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total_ns = self.total_ns.saturating_add(other.total_ns);
    }
}

/// What a lockspace did on one node since it was joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockspaceStats {
    /// Operations of this node on resources mastered here.
    pub local: u64,
    /// Operations of this node that were sent to another master.
    pub out: u64,
    /// Operations of other nodes on resources mastered here.
    pub r#in: u64,
    /// Grants and conversions to this node.
    pub granted: u64,
    /// Operations of this node that ended with `Again`.
    pub again: u64,
    /// ... with `Deadlock`.
    pub deadlock: u64,
    /// ... with anything else that is neither a grant nor an unlock.
    pub refused: u64,
    /// Unlocks of this node.
    pub unlocked: u64,
    /// Resources whose mastery moved here, by their use (R15).
    pub moved_in: u64,
    /// ... and away from here.
    pub moved_out: u64,
    /// From the call to the grant, for this node's requests and conversions.
    pub waits: WaitHistogram,
    /// The longest turn in which a shard worked on a view, a frame of another node or its timers, in nanoseconds: so long
    /// a user's call may have had to wait for the shard.
    pub turn_max_ns: u64,
}

impl LockspaceStats {
    pub(crate) fn ended(&mut self, completion: &Completion, wait: Duration) {
        match completion {
            Completion::Granted(_) => {
                self.granted += 1;
                self.waits.record(wait);
            }
            Completion::Unlocked => self.unlocked += 1,
            Completion::Again => self.again += 1,
            Completion::Deadlock => self.deadlock += 1,
            _ => self.refused += 1,
        }
    }

    /// Adds another part of the same lockspace.
    pub fn add(&mut self, other: &Self) {
        let counters = [
            (&mut self.local, other.local),
            (&mut self.out, other.out),
            (&mut self.r#in, other.r#in),
            (&mut self.granted, other.granted),
            (&mut self.again, other.again),
            (&mut self.deadlock, other.deadlock),
            (&mut self.refused, other.refused),
            (&mut self.unlocked, other.unlocked),
            (&mut self.moved_in, other.moved_in),
            (&mut self.moved_out, other.moved_out),
        ];
        for (mine, theirs) in counters {
            *mine += theirs;
        }
        self.waits.add(&other.waits);
        self.turn_max_ns = self.turn_max_ns.max(other.turn_max_ns);
    }
}

/// Writes what lockspaces did here as metrics: `quorate_dlm_*`.
pub(crate) fn expose<'a>(spaces: impl Iterator<Item = (&'a str, LockspaceStats)>, out: &mut Exposition) {
    for (name, stats) in spaces {
        for (at, count) in [("local", stats.local), ("out", stats.out), ("in", stats.r#in)] {
            let help = "Operations, by where they were carried out.";
            out.counter("quorate_dlm_operations_total", help, &[("lockspace", name), ("at", at)], count);
        }
        for (to, count) in [("here", stats.moved_in), ("away", stats.moved_out)] {
            let help = "Resources whose mastery moved to the node that uses them.";
            out.counter("quorate_dlm_moves_total", help, &[("lockspace", name), ("to", to)], count);
        }
        let ends = [
            ("granted", stats.granted),
            ("unlocked", stats.unlocked),
            ("again", stats.again),
            ("deadlock", stats.deadlock),
            ("refused", stats.refused),
        ];
        for (end, count) in ends {
            let help = "Operations of this node, by how they ended.";
            out.counter("quorate_dlm_completions_total", help, &[("lockspace", name), ("end", end)], count);
        }
        let classes: Vec<(Option<f64>, u64)> = (0..WAIT_BUCKETS)
            .map(|i| WaitHistogram::limit(i).map(|l| l.as_secs_f64()))
            .zip(stats.waits.counts)
            .collect();
        let sum = Duration::from_nanos(stats.waits.total_ns).as_secs_f64();
        let help = "From the request to the grant.";
        out.histogram("quorate_dlm_wait_seconds", help, &[("lockspace", name)], &classes, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_falls_into_the_first_class_that_holds_it() {
        let mut waits = WaitHistogram::default();
        for us in [0, 1, 2, 3, 4, 5, 1_000, 1_024, 1_025] {
            waits.record(Duration::from_micros(us));
        }
        assert_eq!(waits.counts[..4], [2, 1, 2, 1]);
        assert_eq!((waits.counts[10], waits.counts[11], waits.count()), (2, 1, 9));
        assert_eq!(waits.quantile(500), Some(Duration::from_micros(4)));
        waits.record(Duration::MAX);
        assert_eq!(waits.counts[WAIT_BUCKETS - 1], 1);
        assert_eq!(waits.quantile(1_000), None);
    }
}
