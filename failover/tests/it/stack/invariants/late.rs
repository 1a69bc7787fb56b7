//! No write of a life that is not admitted is applied after the server confirmed its fence (R9).

use quorate_membership::Identity;
use std::collections::BTreeSet;

/// `fenced`: the lives for which the server confirmed an epoch without them.
pub(crate) fn on_apply(fenced: &BTreeSet<Identity>, who: Identity, cell: usize) {
    assert!(!fenced.contains(&who), "late: {who} wrote cell {cell} after its fence was confirmed");
}
