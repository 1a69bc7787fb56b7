//! No write is applied over a newer acknowledged one: not late from an old connection (R11), nor sent again (R12).

/// `acknowledged` is the newest number acknowledged for the block, by whomever.
pub(crate) fn on_apply(acknowledged: &[u64], block: usize, number: u64) {
    let newest = acknowledged[block];
    assert!(
        newest <= number,
        "INVARIANT stale: {number} is applied to block {block} over the acknowledged {newest}"
    );
}
