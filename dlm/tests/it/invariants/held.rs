//! No name that a dead node may hold is granted before it is fenced and, where there are holds, its journal is replayed.

use crate::sim::world::{World, space_id};
use quorate_dlm::{LockName, Mode};
use quorate_membership::{Epoch, Identity};
use std::collections::BTreeMap;

/// What failed lives had when they failed.
pub(crate) struct HeldUntilReleased {
    has_holds: bool,
    had: BTreeMap<Identity, Vec<(LockName, Mode)>>,
}

impl HeldUntilReleased {
    pub(super) fn new(has_holds: bool) -> Self {
        Self { has_holds, had: BTreeMap::new() }
    }

    /// A life fails. An isolated one goes on for a while; what it has then is the business of `exclusion`.
    pub(crate) fn failed(&mut self, world: &World, who: Identity, is_isolated: bool) {
        if is_isolated || !world.is_attached(who) {
            return;
        }
        let Some(node) = world.nodes.get(&who) else { return };
        let had = node.machine.usable().into_iter().map(|(_, name, mode, _)| (name, mode)).collect();
        self.had.insert(who, had);
    }

    /// A grant to `who`. True if it is one that had to wait for somebody.
    pub(crate) fn granted(&mut self, world: &World, who: Identity, name: &LockName, mode: Mode) -> bool {
        let mut waited = false;
        for (dead, had) in &self.had {
            for (_, theirs) in had.iter().filter(|(n, m)| n == name && !m.is_compatible(mode)) {
                waited = true;
                let item = world.tip().debts.get(dead).and_then(|d| d.items.get(&space_id()));
                let is_out = world.tip().debts.contains_key(dead) || !world.tip().contains(*dead);
                assert!(
                    is_out,
                    "held: {name} is granted to {who} in {mode}, the dead {dead} is a member still"
                );
                let Some(item) = item else { continue };
                assert!(
                    item.fenced && item.rebuilt,
                    "held: {name} is granted to {who} in {mode}, {dead} had it in {theirs} and is not fenced"
                );
                assert!(
                    !(self.has_holds && *theirs == Mode::EX),
                    "held: {name} is granted to {who} in {mode}, {dead} had it in {theirs} and is not replayed"
                );
            }
        }
        let tip: Epoch = world.tip().epoch;
        self.had.retain(|dead, _| {
            world.tip().contains(*dead) || world.tip().debts.contains_key(dead) || tip == Epoch(0)
        });
        waited
    }
}
