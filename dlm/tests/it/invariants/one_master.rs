//! No name has two masters among members that work under the same view (a bucket answered too early makes two).

use super::Watched;
use quorate_dlm::LockName;
use quorate_membership::{Epoch, Identity};
use std::collections::BTreeMap;

pub(super) fn check(watched: &Watched<'_>) {
    let mut masters: BTreeMap<(Epoch, LockName), Identity> = BTreeMap::new();
    for (who, node) in &watched.world.nodes {
        if node.is_isolated || node.is_leaving || !watched.world.is_attached(*who) {
            continue;
        }
        let epoch = watched.world.installed(*who);
        for resource in node.machine.dump().resources {
            let before = masters.insert((epoch, resource.name.clone()), *who);
            assert!(before.is_none(), "masters: {} has masters {before:?} and {who}", resource.name);
        }
    }
}
