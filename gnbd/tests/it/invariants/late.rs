//! No write of a removed life is applied after its fence was confirmed (R9).

use quorate_membership::Identity;
use std::collections::BTreeSet;

/// `fenced` are the lives for which some installation without them was confirmed.
pub(crate) fn on_apply(fenced: &BTreeSet<Identity>, who: Identity, block: usize) {
    assert!(
        !fenced.contains(&who),
        "INVARIANT late: {who} wrote block {block} after its fence was confirmed"
    );
}
