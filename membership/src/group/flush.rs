//! The flush: between two views every surviving process gets to the same point of its group's order.
//!
//! While no cluster member changes, a group's order is written by one sequencer over ordered sessions, so what any two
//! nodes have of it are beginnings of one history. The coordinator therefore takes the longest, which holds what every
//! survivor has, adds the change of the view, and hands out what is missing. A view that comes meanwhile begins a new
//! flush over what everybody has by then, which are still beginnings of one history.

use super::machine::{Copy, GroupMachine, Output, Position, ProcessId};
use super::wire::{Body, Entry, Item, Members};
use crate::{Epoch, Identity};
use std::collections::{BTreeMap, BTreeSet};

/// A flush under way.
#[derive(Debug)]
pub(super) struct Flush {
    coordinator: Identity,
    /// At the coordinator: what each node has.
    reports: BTreeMap<Identity, BTreeMap<String, Copy>>,
    done: BTreeSet<Identity>,
    /// Groups that go on at this node.
    goes_on: BTreeSet<String>,
}

/// The members and the position before the first entry that is kept.
pub(super) fn before_tail(copy: &Copy) -> (Members, Position) {
    let mut members = copy.members.clone();
    for entry in copy.tail.iter().rev() {
        match &entry.item {
            Item::Join => drop(members.remove(&entry.from)),
            Item::Leave(_) => drop(members.insert(entry.from, 0)),
            Item::Message { number, .. } => drop(members.insert(entry.from, number.saturating_sub(1))),
            Item::View(gone) => members.extend(gone.iter().map(|p| (*p, 0))),
        }
    }
    let at = match copy.tail.front().map(|e| e.at) {
        None => copy.at,
        Some(Position { epoch, order: 0 }) => {
            Position { epoch: Epoch(epoch.0.saturating_sub(1)), order: u64::MAX }
        }
        Some(Position { epoch, order }) => Position { epoch, order: order - 1 },
    };
    (members, at)
}

impl GroupMachine {
    /// The members of the cluster changed: tells the coordinator what is here.
    pub(super) fn begin_flush(&mut self, out: &mut Vec<Output>) {
        let Some(coordinator) = self.nodes.values().next().copied() else { return };
        self.flush = Some(Flush {
            coordinator,
            reports: BTreeMap::new(),
            done: BTreeSet::new(),
            goes_on: BTreeSet::new(),
        });
        self.copies.values_mut().for_each(Copy::forget_view);
        let copies: Vec<(String, Copy)> = self.copies.iter().map(|(n, c)| (n.clone(), c.clone())).collect();
        for (group, copy) in copies {
            self.send(coordinator, &group, Body::Have { members: copy.members, at: copy.at }, out);
            for entry in copy.tail {
                self.send(coordinator, &group, Body::HaveEntry(entry), out);
            }
        }
        self.send(coordinator, "", Body::HaveDone, out);
    }

    /// Takes a message of the flush; gives back any other.
    pub(super) fn take_flush(
        &mut self,
        from: Identity,
        group: &str,
        body: Body,
        out: &mut Vec<Output>,
    ) -> Option<Body> {
        let me = self.me;
        let Some(flush) = self.flush.as_mut() else { return Some(body) };
        let (leads, by_coordinator) = (flush.coordinator == me, flush.coordinator == from);
        match body {
            Body::Have { members, at } if leads => {
                let report = flush.reports.entry(from).or_default();
                report.insert(group.to_owned(), Copy::new(members, at));
            }
            Body::HaveEntry(entry) if leads => {
                if let Some(copy) = flush.reports.get_mut(&from).and_then(|r| r.get_mut(group)) {
                    copy.tail.push_back(entry);
                }
            }
            Body::HaveDone if leads => {
                flush.done.insert(from);
                if self.nodes.values().all(|n| flush.done.contains(n)) {
                    self.hand_out(out);
                }
            }
            Body::Base { members, at } if by_coordinator => {
                flush.goes_on.insert(group.to_owned());
                self.copies.insert(group.to_owned(), Copy::new(members, at));
            }
            Body::Missing(entry) if by_coordinator => {
                flush.goes_on.insert(group.to_owned());
                self.append(group, entry, out);
            }
            Body::Begin if by_coordinator => {
                let goes_on = core::mem::take(&mut flush.goes_on);
                self.flush = None;
                self.copies.retain(|group, _| goes_on.contains(group));
                self.resume(out);
            }
            other => return Some(other),
        }
        None
    }

    /// As the coordinator, with everybody's report.
    fn hand_out(&mut self, out: &mut Vec<Output>) {
        let Some(flush) = self.flush.as_mut() else { return };
        let reports = core::mem::take(&mut flush.reports);
        let groups: BTreeSet<String> = reports.values().flat_map(|r| r.keys().cloned()).collect();
        let nodes: Vec<Identity> = self.nodes.values().copied().collect();
        for group in groups {
            let copies = reports.values().filter_map(|r| r.get(&group));
            let Some(longest) = copies.max_by_key(|c| c.at) else { continue };
            let is_gone = |p: &&ProcessId| self.nodes.get(&p.node.node) != Some(&p.node);
            let gone: Vec<ProcessId> = longest.members.keys().filter(is_gone).copied().collect();
            if gone.len() == longest.members.len() {
                continue;
            }
            #[cfg(any(test, feature = "sim"))]
            let gone = if self.has(super::Bug::KeepsTheDead) { Vec::new() } else { gone };
            let change = Entry {
                at: Position { epoch: self.epoch, order: 0 },
                from: ProcessId { node: self.me, number: 0 },
                item: Item::View(gone),
            };
            for node in &nodes {
                let hosts = longest.members.keys().any(|p| p.node == *node);
                if !hosts && self.sequencer(&group) != Some(*node) {
                    continue;
                }
                let has = match reports.get(node).and_then(|r| r.get(&group)) {
                    Some(copy) => copy.at,
                    None => {
                        let (members, at) = before_tail(longest);
                        self.send(*node, &group, Body::Base { members, at }, out);
                        at
                    }
                };
                for entry in longest.tail.iter().filter(|e| has < e.at) {
                    #[cfg(any(test, feature = "sim"))]
                    if self.has(super::Bug::SkipsMissing) && matches!(entry.item, Item::Message { .. }) {
                        continue;
                    }
                    self.send(*node, &group, Body::Missing(entry.clone()), out);
                }
                self.send(*node, &group, Body::Missing(change.clone()), out);
            }
        }
        for node in nodes {
            self.send(node, "", Body::Begin, out);
        }
    }
}
