//! No two incompatible grants are usable, that is had under a valid lease, at one instant (R8, R13).

use quorate_dlm::{LockName, Mode};
use quorate_membership::Identity;
use std::collections::BTreeMap;

/// `usable`: the grants of every life whose lease holds at this instant.
pub(crate) fn check(usable: &BTreeMap<LockName, Vec<(Identity, Mode)>>) {
    for (name, locks) in usable {
        for (i, a) in locks.iter().enumerate() {
            for b in &locks[i + 1..] {
                assert!(a.1.is_compatible(b.1), "exclusion: {name} is usable by {a:?} and by {b:?}");
            }
        }
    }
}
