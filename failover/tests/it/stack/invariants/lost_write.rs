//! What was acknowledged and flushed under an exclusive lock is read by every later holder (R12, R14, R18).

use quorate_membership::Identity;

/// `who` holds the lock of the block under a valid lease and has read this version of it.
pub(crate) fn on_read(who: Identity, block: usize, found: u64, committed: u64) {
    assert!(
        committed <= found,
        "lost write: {who} reads version {found} of block {block}, version {committed} was acknowledged and flushed"
    );
}
