//! One node's copy of a group: the members, and the last entries of the order with the state before them.

use super::event::{Position, ProcessId};
use super::wire::{Entry, Item, Members};
use crate::Identity;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A node's copy of a group.
///
/// Invariant: `members` and `at` are `base` after the entries of `tail`.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    pub(super) members: Members,
    pub(super) at: Position,
    /// The state before the first entry of `tail`. Every node with a process in the group has it, or a later one.
    pub(super) base: (Members, Position),
    /// The last entries up to `at`, at least those that some node of the group may not have.
    pub(super) tail: VecDeque<Entry>,
    pub(super) tail_bytes: usize,
    /// At a member: the last order that was confirmed to the sequencer.
    pub(super) confirmed: u64,
    /// At the sequencer: how many of this view's places, from zero on, each node has confirmed.
    pub(super) received: BTreeMap<Identity, u64>,
    /// At the sequencer: what waits until more is confirmed.
    pub(super) waiting: VecDeque<(ProcessId, Item)>,
}

fn apply(members: &mut Members, entry: &Entry) {
    match &entry.item {
        Item::Join => drop(members.insert(entry.from, 0)),
        Item::Leave(_) => drop(members.remove(&entry.from)),
        Item::Message { number, .. } => drop(members.insert(entry.from, *number)),
        Item::View(gone) => members.retain(|p, _| gone.iter().all(|(g, _)| g != p)),
    }
}

impl Copy {
    pub(super) fn new(members: Members, at: Position) -> Self {
        Self {
            base: (members.clone(), at),
            members,
            at,
            tail: VecDeque::new(),
            tail_bytes: 0,
            confirmed: 0,
            received: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    /// What belongs to the view that ends.
    pub(super) fn forget_view(&mut self) {
        self.confirmed = 0;
        self.received.clear();
        self.waiting.clear();
    }

    /// The nodes with processes in the group.
    pub(super) fn hosts(&self) -> BTreeSet<Identity> {
        self.members.keys().map(|p| p.node).collect()
    }

    /// Whether an entry at this place comes next.
    pub(super) fn is_next(&self, at: Position) -> bool {
        if at.epoch == self.at.epoch {
            at.order == self.at.order + 1
        } else {
            self.at.epoch < at.epoch && at.order == 0
        }
    }

    /// The next entry.
    pub(super) fn push(&mut self, entry: Entry) {
        apply(&mut self.members, &entry);
        self.at = entry.at;
        self.tail_bytes += entry.bytes();
        self.tail.push_back(entry);
    }

    /// Every node has what is up to here: it goes into the base.
    pub(super) fn forget(&mut self, last: Position) {
        while let Some(entry) = self.tail.pop_front_if(|e| e.at <= last) {
            self.tail_bytes -= entry.bytes();
            apply(&mut self.base.0, &entry);
            self.base.1 = entry.at;
        }
    }
}
