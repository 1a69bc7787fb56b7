//! The lock cache as its users see it: locks stay with the node between uses and are given up when another node asks.
//!
//! This is the layer that GFS2 calls glocks. It is part of the lock manager, so that everybody has it.

use crate::{LockName, ValueBlock};
use quorate_membership::BoxFuture;

/// How a cached lock may be used. Local users of one node share a lock: any number of `Shared` or of `Deferred` holders,
/// or one `Exclusive` holder at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CacheMode {
    /// Protected read (PR): compatible with itself.
    Shared,
    /// Concurrent write (CW): compatible with itself; GFS2's state for direct I/O.
    Deferred,
    /// Exclusive (EX).
    Exclusive,
}

/// How to wait for a cached lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcquireFlags {
    /// Fail with [`AcquireError::WouldBlock`] instead of waiting for other nodes or local users.
    pub try_now: bool,
    /// With `try_now`: still tell the holders that somebody wants it.
    pub nudge: bool,
    /// Do not use a lock cached in a stronger mode than asked for: convert it down first.
    pub exact: bool,
    /// Pass through the holds of a failed node's recovery; for the recovery participant alone (R14).
    pub recovery: bool,
    /// Give the lock back to the master when the last local user lets go, instead of caching it.
    pub no_cache: bool,
}

/// Why a cached lock was not acquired. No lock is held.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AcquireError {
    /// `try_now`, and it is held in a conflicting mode.
    #[error("the lock is held in a conflicting mode")]
    WouldBlock,
    /// The name may be held by a failed node that is not recovered yet, and the caller asked not to wait for that.
    #[error("the lock waits for the recovery of a failed node")]
    Recovering,
    /// This node has lost its lease, or the lockspace is being left.
    #[error("the lockspace is stopped: {0}")]
    Stopped(String),
    /// The caller's part in giving a lock up failed: this node may not use what the lock covers any more.
    #[error("the lock cannot be given up: {0}")]
    Withdrawn(String),
}

/// What the owner of a lock cache does when its locks come and go. Implemented by the filesystem.
pub trait CacheClient: Send + Sync {
    /// The lock was granted by its master in `mode`, with this value block (`None` if it has no valid one). Called
    /// before the first local user gets it. Must not block and must not take cached locks.
    fn granted(&self, name: &LockName, mode: CacheMode, value: Option<&ValueBlock>);

    /// Before the lock goes from `from` down to `to` (`None`: given up): write back what was changed under it, flush,
    /// and drop the caches that `to` does not cover. No local user holds it while this runs. The value block to leave
    /// behind may be changed when `from` is exclusive.
    ///
    /// An error means that the node must stop using what the locks cover: the lock is not given up.
    fn demote<'a>(
        &'a self,
        name: &'a LockName,
        from: CacheMode,
        to: Option<CacheMode>,
        value: &'a mut ValueBlock,
    ) -> BoxFuture<'a, Result<(), String>>;

    /// Another node waits for the lock and local users hold it. A hint; must not block.
    fn wanted(&self, name: &LockName, by: CacheMode) {
        let _ = (name, by);
    }
}
