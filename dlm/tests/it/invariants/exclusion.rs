//! No two incompatible grants are usable (answered under a valid lease) at one instant.

use super::Watched;
use quorate_dlm::{LockId, LockName, Mode, Range};
use quorate_membership::Identity;
use std::collections::BTreeMap;

pub(crate) type Usable = BTreeMap<LockName, Vec<(Identity, LockId, Mode, Range)>>;

pub(super) fn check(watched: &Watched<'_>) -> Usable {
    let mut usable: Usable = BTreeMap::new();
    for (who, node) in &watched.world.nodes {
        if !watched.world.may_act(*who) {
            continue;
        }
        for (id, name, mode, range) in node.machine.usable() {
            usable.entry(name).or_default().push((*who, id, mode, range));
        }
    }
    for (name, locks) in &usable {
        for (i, a) in locks.iter().enumerate() {
            for b in &locks[i + 1..] {
                let fine = a.2.is_compatible(b.2) || !a.3.overlaps(b.3);
                assert!(fine, "exclusion: {name} is usable by {a:?} and by {b:?}");
            }
        }
    }
    usable
}
