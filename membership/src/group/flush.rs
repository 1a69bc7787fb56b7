//! The flush: between two views every surviving process gets to the same point of its group's order.
//!
//! While no cluster member changes, a group's order is written by one sequencer over ordered sessions, so what any two
//! nodes have of it are beginnings of one history. The coordinator therefore takes the longest, which holds what every
//! survivor has, adds the change of the view, and hands out what is missing. A view that comes meanwhile begins a new
//! flush over what everybody has by then, which are still beginnings of one history.
//!
//! Two things are not in that history. Which processes run on a node, the node itself knows best: one that has seen its
//! own leave is forgotten there, while the copies of the others may end before it. And a node without processes in a group
//! may have an old copy, from when it ordered the group or had some: it is given a new one where what it lacks is nowhere
//! kept any more, since only nodes with processes hold the others back from forgetting.

use super::copy::Copy;
use super::event::{Position, ProcessId, Reason};
use super::machine::{GroupMachine, Output};
use super::wire::{Body, Entry, Item};
use crate::Identity;
use std::collections::{BTreeMap, BTreeSet};

/// A flush under way.
#[derive(Debug)]
pub(super) struct Flush {
    coordinator: Identity,
    /// At the coordinator: what each node has.
    reports: BTreeMap<Identity, BTreeMap<String, Copy>>,
    /// Who has told everything, and which processes run there.
    done: BTreeMap<Identity, BTreeSet<u64>>,
    /// Groups that go on at this node.
    goes_on: BTreeSet<String>,
}

impl GroupMachine {
    /// The members of the cluster changed: tells the coordinator what is here.
    pub(super) fn begin_flush(&mut self, out: &mut Vec<Output>) {
        let Some(coordinator) = self.nodes.values().next().copied() else { return };
        self.flush = Some(Flush {
            coordinator,
            reports: BTreeMap::new(),
            done: BTreeMap::new(),
            goes_on: BTreeSet::new(),
        });
        self.copies.values_mut().for_each(Copy::forget_view);
        let copies: Vec<(String, Copy)> = self.copies.iter().map(|(n, c)| (n.clone(), c.clone())).collect();
        for (group, copy) in copies {
            let (members, at) = copy.base;
            self.send(coordinator, &group, Body::Have { members, at }, out);
            for entry in copy.tail {
                self.send(coordinator, &group, Body::HaveEntry(entry), out);
            }
        }
        let processes = self.processes();
        self.send(coordinator, "", Body::HaveDone { processes }, out);
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
                    copy.push(entry);
                }
            }
            Body::HaveDone { processes } if leads => {
                flush.done.insert(from, processes);
                if self.nodes.values().all(|n| flush.done.contains_key(n)) {
                    self.hand_out(out);
                }
            }
            Body::Base { members, at } if by_coordinator => {
                flush.goes_on.insert(group.to_owned());
                self.end_members(group, out);
                self.copies.insert(group.to_owned(), Copy::new(members, at));
            }
            Body::Missing(entry) if by_coordinator => {
                flush.goes_on.insert(group.to_owned());
                self.append(group, entry, out);
            }
            Body::Begin { epoch } if by_coordinator => {
                let goes_on = core::mem::take(&mut flush.goes_on);
                self.flush = None;
                self.epoch = epoch;
                self.floor = 0;
                self.copies.retain(|group, _| goes_on.contains(group));
                for group in goes_on {
                    self.drop_strange(&group);
                }
                self.resume(out);
            }
            other => return Some(other),
        }
        None
    }

    /// As the coordinator, with everybody's report.
    fn hand_out(&mut self, out: &mut Vec<Output>) {
        let Some(flush) = self.flush.as_mut() else { return };
        let (reports, running) = (core::mem::take(&mut flush.reports), core::mem::take(&mut flush.done));
        let groups: BTreeSet<String> = reports.values().flat_map(|r| r.keys().cloned()).collect();
        let nodes: Vec<Identity> = self.nodes.values().copied().collect();
        #[cfg(any(test, feature = "sim"))]
        let (keeps_dead, keeps_left, trusts) = (
            self.has(super::Bug::KeepsTheDead),
            self.has(super::Bug::KeepsTheLeft),
            self.has(super::Bug::TrustsOldCopies),
        );
        #[cfg(not(any(test, feature = "sim")))]
        let (keeps_dead, keeps_left, trusts) = (false, false, false);
        for group in groups {
            let copies = reports.values().filter_map(|r| r.get(&group));
            let Some(longest) = copies.max_by_key(|c| c.at) else { continue };
            let why = |p: &ProcessId| match running.get(&p.node) {
                None => (!keeps_dead).then_some(Reason::NodeGone),
                Some(processes) if processes.contains(&p.number) || keeps_left => None,
                Some(_) => Some(Reason::Left),
            };
            let gone: Vec<(ProcessId, Reason)> =
                longest.members.keys().filter_map(|p| why(p).map(|r| (*p, r))).collect();
            if gone.len() == longest.members.len() {
                continue;
            }
            let change = Entry {
                at: Position { epoch: self.record, order: 0 },
                from: ProcessId { node: self.me, number: 0 },
                item: Item::View(gone),
            };
            let hosts = longest.hosts();
            let sequencer = self.sequencer(&group);
            for node in nodes.iter().filter(|n| hosts.contains(*n) || sequencer == Some(**n)) {
                let has = reports.get(node).and_then(|r| r.get(&group)).map(|c| c.at);
                let (members, base) = longest.base.clone();
                let has = has.filter(|at| base <= *at || trusts);
                if has.is_none() {
                    self.send(*node, &group, Body::Base { members, at: base }, out);
                }
                for entry in longest.tail.iter().filter(|e| has.unwrap_or(base) < e.at) {
                    self.send(*node, &group, Body::Missing(entry.clone()), out);
                }
                self.send(*node, &group, Body::Missing(change.clone()), out);
            }
        }
        let epoch = self.record;
        for node in nodes {
            self.send(node, "", Body::Begin { epoch }, out);
        }
    }
}
