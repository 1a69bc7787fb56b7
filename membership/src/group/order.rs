//! The sequencer: gives the items of its groups their places, and forgets what every node has.

#[cfg(any(test, feature = "sim"))]
use super::bug::Bug;
use super::copy::Copy;
use super::event::{Position, ProcessId};
use super::machine::{GroupMachine, Output, PAYLOAD_BYTES_MAX};
use super::wire::{Body, Entry, Item, Members};
use crate::Identity;

/// What a sequencer keeps of a group that not every node has confirmed. Above it, it orders nothing until some are confirmed.
const TAIL_MAX: usize = 1_024;
/// The same in bytes.
const TAIL_BYTES_MAX: usize = 4 << 20;
/// A node confirms after so many entries.
const CONFIRM_EVERY: u64 = 32;
// Otherwise a group of large messages would wait for confirmations that nobody sends.
const _: () = assert!(CONFIRM_EVERY as usize * (PAYLOAD_BYTES_MAX + 64) < TAIL_BYTES_MAX && 32 < TAIL_MAX);

impl GroupMachine {
    /// As the sequencer: gives an item its place, behind what waits.
    pub(super) fn order(&mut self, group: &str, from: ProcessId, item: Item, out: &mut Vec<Output>) {
        let at = Position { epoch: self.epoch, order: self.floor };
        let copy = self.copies.entry(group.to_owned()).or_insert_with(|| Copy::new(Members::new(), at));
        copy.waiting.push_back((from, item));
        self.order_waiting(group, out);
    }

    /// As the sequencer: orders what waits, as long as not too much is unconfirmed.
    fn order_waiting(&mut self, group: &str, out: &mut Vec<Output>) {
        loop {
            self.forget(group, self.stable(group));
            let Some(copy) = self.copies.get_mut(group) else { return };
            if TAIL_MAX <= copy.tail.len() || TAIL_BYTES_MAX <= copy.tail_bytes {
                return;
            }
            let Some((process, item)) = copy.waiting.pop_front() else { break };
            self.place(group, process, item, out);
        }
        if self.copies.get(group).is_some_and(|c| c.members.is_empty()) {
            // A group of that name goes on above this, so that a place means one thing in a view.
            self.floor = self.floor.max(self.copies.remove(group).map_or(0, |c| c.at.order));
        }
    }

    fn place(&mut self, group: &str, from: ProcessId, item: Item, out: &mut Vec<Output>) {
        let (me, epoch) = (self.me, self.epoch);
        let Some(copy) = self.copies.get_mut(group) else { return };
        let known = copy.members.get(&from).copied();
        let fits = match (&item, known) {
            (Item::Join, None) | (Item::Leave(_), Some(_)) => true,
            // What was dropped at the end of a view leaves a gap.
            (Item::Message { number, .. }, Some(last)) => last < *number,
            _ => false,
        };
        if !fits {
            return;
        }
        let mut hosts = copy.hosts();
        let before = copy.at;
        // A new node has nothing until what it is sent arrives.
        let mut stable_max = u64::MAX;
        if item == Item::Join && hosts.insert(from.node) {
            // With what others may miss: whoever was a member longer may die before they have it.
            let ((members, at), tail) = (copy.base.clone(), copy.tail.clone());
            let has = if at.epoch == epoch { at.order + 1 } else { 0 };
            copy.received.insert(from.node, has);
            stable_max = has;
            if from.node != me {
                self.send(from.node, group, Body::Welcome { members, at }, out);
                for entry in tail {
                    self.send(from.node, group, Body::Kept(entry), out);
                }
            }
        }
        hosts.remove(&me);
        #[cfg(any(test, feature = "sim"))]
        let from = match (&item, self.bug) {
            (Item::Message { .. }, Some(Bug::MixesSenders)) => {
                let members = self.copies.get(group).map(|c| c.members.clone()).unwrap_or_default();
                members.keys().next().copied().unwrap_or(from)
            }
            _ => from,
        };
        #[cfg(any(test, feature = "sim"))]
        let times = if self.has(Bug::OrdersTwice) && matches!(item, Item::Message { .. }) { 2 } else { 1 };
        #[cfg(not(any(test, feature = "sim")))]
        let times = 1;
        for place in 1..=times {
            let at = Position { epoch, order: before.order + place };
            let entry = Entry { at, from, item: item.clone() };
            let stable = self.stable(group).min(stable_max);
            for host in &hosts {
                self.send(*host, group, Body::Ordered { entry: entry.clone(), stable }, out);
            }
            self.append(group, entry, out);
            self.confirm(group, stable, out);
        }
    }

    /// As the sequencer: how many of this view's places every node of the group has.
    fn stable(&self, group: &str) -> u64 {
        let Some(copy) = self.copies.get(group) else { return 0 };
        let hosts = copy.hosts();
        let others = hosts.iter().filter(|h| **h != self.me);
        others.map(|h| copy.received.get(h).copied().unwrap_or(0)).min().unwrap_or(copy.at.order + 1)
    }

    pub(super) fn on_received(&mut self, group: &str, from: Identity, order: u64, out: &mut Vec<Output>) {
        let Some(copy) = self.copies.get_mut(group) else { return };
        let known = copy.received.entry(from).or_default();
        *known = (*known).max(order.saturating_add(1));
        self.order_waiting(group, out);
    }

    fn forget(&mut self, group: &str, stable: u64) {
        let Some(order) = stable.checked_sub(1) else { return };
        let last = Position { epoch: self.epoch, order };
        if let Some(copy) = self.copies.get_mut(group) {
            copy.forget(last);
        }
    }

    /// Confirms from time to time, and forgets what everybody has.
    pub(super) fn confirm(&mut self, group: &str, stable: u64, out: &mut Vec<Output>) {
        self.forget(group, stable);
        let sequencer = self.sequencer(group);
        let Some(copy) = self.copies.get_mut(group) else { return };
        if sequencer == Some(self.me) || copy.at.order < copy.confirmed + CONFIRM_EVERY {
            return;
        }
        copy.confirmed = copy.at.order;
        let order = copy.at.order;
        if let Some(to) = sequencer {
            self.send(to, group, Body::Received { order }, out);
        }
    }
}
