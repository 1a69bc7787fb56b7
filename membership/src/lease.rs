//! The lease under which a node acts (R8), as the rest of the process sees it: one atomic deadline.

use crate::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A shared view of the node's lease. Cloning shares it.
///
/// It is checked *after* reading what is answered and *before* answering: a cached grant, a read, a monitor. Only the
/// membership driver extends it; a lease that was frozen or ended for good holds no instant any more.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    until_ns: Arc<AtomicU64>,
}

impl Lease {
    /// A lease that has never been granted.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A lease that never ends, for a lock manager or a filesystem without a cluster.
    #[must_use]
    pub fn forever() -> Self {
        let lease = Self::new();
        lease.until_ns.store(u64::MAX, Ordering::Release);
        lease
    }

    /// Whether the node may still answer at `now`.
    #[must_use]
    pub fn is_valid(&self, now: Instant) -> bool {
        now.0 < self.until_ns.load(Ordering::Acquire)
    }

    /// The instant at which the lease ends, if nothing extends it.
    #[must_use]
    pub fn until(&self) -> Instant {
        Instant(self.until_ns.load(Ordering::Acquire))
    }

    /// Moves the end of the lease. For the membership driver and for simulators.
    pub fn set(&self, until: Instant) {
        self.until_ns.store(until.0, Ordering::Release);
    }
}
