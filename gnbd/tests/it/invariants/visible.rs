//! A read sees every write that was acknowledged before it was issued (the contract of `BlockDevice`).

/// `least` is the number acknowledged for the block when the read was issued.
pub(crate) fn on_read(block: usize, least: u64, found: u64) {
    assert!(least <= found, "INVARIANT visible: block {block} reads {found} after {least} was acknowledged");
}
