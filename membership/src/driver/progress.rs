//! Whether the node's event loops turn: without that it sends no heartbeats (R7).

use super::boottime;
use core::time::Duration;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The loops of one node. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Vec<Arc<LoopState>>>>);

#[derive(Debug)]
struct LoopState {
    name: String,
    silence_max: Duration,
    turned_at: AtomicU64,
}

/// One event loop's handle; dropping it takes the loop off the list.
#[derive(Debug)]
pub struct LoopBeat {
    progress: Progress,
    state: Arc<LoopState>,
}

impl Progress {
    /// Without any loop.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Watches a loop, which must turn at least every `silence_max`, idle or not. It counts as having turned now.
    #[must_use]
    pub fn watch(&self, name: &str, silence_max: Duration) -> LoopBeat {
        let turned_at = AtomicU64::new(boottime().0);
        let state = Arc::new(LoopState { name: name.to_owned(), silence_max, turned_at });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(state.clone());
        LoopBeat { progress: self.clone(), state }
    }

    /// The name of a loop that has not turned for too long, if there is one.
    #[must_use]
    pub fn stuck(&self) -> Option<String> {
        let now = boottime();
        let loops = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_stuck = |l: &&Arc<LoopState>| {
            l.silence_max < now.since(crate::Instant(l.turned_at.load(Ordering::Relaxed)))
        };
        loops.iter().find(is_stuck).map(|l| l.name.clone())
    }
}

impl LoopBeat {
    /// The loop has turned.
    pub fn turned(&self) {
        self.state.turned_at.store(boottime().0, Ordering::Relaxed);
    }
}

impl Drop for LoopBeat {
    fn drop(&mut self) {
        let mut loops = self.progress.0.lock().unwrap_or_else(PoisonError::into_inner);
        loops.retain(|l| !Arc::ptr_eq(l, &self.state));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_turn_is_named_until_it_turns_or_ends() {
        let progress = Progress::new();
        let fine = progress.watch("fine", Duration::from_secs(60));
        assert_eq!(progress.stuck(), None);
        let late = progress.watch("late", Duration::ZERO);
        while progress.stuck().is_none() {}
        assert_eq!(progress.stuck().as_deref(), Some("late"));
        drop(late);
        fine.turned();
        assert_eq!(progress.stuck(), None);
    }
}
