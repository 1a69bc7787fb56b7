//! The rule of the boot verifier (R12): which flush answers which verifier, and when it changes.

use crate::proto::Verifier;

/// Decides about the syncs of one export. Syncs run one at a time; requests that came before a sync began share it.
///
/// One at a time matters: the kernel reports a lost write once per open file, so of two syncs at the same time one could
/// report success for data that the other has just learnt is lost.
#[derive(Debug)]
pub struct SyncGate {
    seed: [u8; 16],
    changes: u64,
    requested: u64,
    running: Option<u64>,
}

/// A request for durability; it is answered by the first sync that began after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SyncTicket(u64);

impl SyncGate {
    /// An export that was opened just now. `seed` must never have been used before: best it is random.
    #[must_use]
    pub fn new(seed: [u8; 16]) -> Self {
        Self { seed, changes: 0, requested: 0, running: None }
    }

    /// The verifier now.
    #[must_use]
    pub fn verifier(&self) -> Verifier {
        let mut bytes = self.seed;
        for (byte, change) in bytes.iter_mut().zip(self.changes.to_le_bytes()) {
            *byte ^= change;
        }
        Verifier(bytes)
    }

    /// Somebody wants everything written so far to be durable.
    pub fn request(&mut self) -> SyncTicket {
        self.requested += 1;
        SyncTicket(self.requested)
    }

    /// Begins a sync, unless one is running.
    pub fn begin(&mut self) -> bool {
        if self.running.is_some() {
            return false;
        }
        self.running = Some(self.requested);
        true
    }

    /// The running sync has ended. Returns the newest ticket it answers; all older ones are answered too. After a
    /// failure the verifier is a new one before anybody is answered: what any client wrote may be lost.
    ///
    /// # Panics
    /// If none was running.
    pub fn end(&mut self, succeeded: bool) -> SyncTicket {
        let covers = self.running.take().expect("a sync was running");
        if !succeeded {
            self.changes += 1;
        }
        SyncTicket(covers)
    }

    /// Whether anybody waits for a sync that has not begun.
    #[must_use]
    pub fn is_wanted(&self, answered: SyncTicket) -> bool {
        answered.0 < self.requested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_before_the_start_share_a_sync_and_later_ones_wait() {
        let mut gate = SyncGate::new([7; 16]);
        let (a, b) = (gate.request(), gate.request());
        assert!(gate.begin() && !gate.begin());
        let late = gate.request();
        let answered = gate.end(true);
        assert!(a <= answered && b <= answered && answered < late);
        assert!(gate.is_wanted(answered));
    }

    #[test]
    fn a_failed_sync_changes_the_verifier_for_good() {
        let mut gate = SyncGate::new([7; 16]);
        let first = gate.verifier();
        gate.request();
        gate.begin();
        gate.end(false);
        let second = gate.verifier();
        assert_ne!(first, second);
        gate.request();
        gate.begin();
        gate.end(true);
        assert_eq!(gate.verifier(), second);
    }
}
