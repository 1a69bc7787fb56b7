//! Who waits for whom, in words and as a graph: from what the nodes of a cluster show of themselves.
//!
//! Every node makes a [`NodeReport`]; whoever asks gathers them into a [`ClusterReport`], in which a node that does not
//! answer is named rather than waited for. Everything else is a pure function of that.
//!
//! A report is no snapshot of one instant: nodes are asked one after the other, so a wait may be over when it is shown,
//! and a cycle in the graph is no proof of a deadlock. The lock manager's own deadlock search is.

mod text;

pub use text::{NameDecoder, dot, graph_lines, list_lines, sentence, short_age};

use crate::{LockDump, LockName, LockspaceDump, LockspaceStats, Mode, ProcessInfo, ResourceDump};
use core::time::Duration;
use quorate_membership::{Identity, ResourceId, ResourceKind, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How many resources of one lockspace a node reports, those with waiters first. Asked for one by name, it is reported.
pub const RESOURCES_MAX: usize = 1_000;

/// What one node shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Which.
    pub node: Identity,
    /// Its lockspaces, with the resources it masters and its locks elsewhere.
    pub lockspaces: Vec<LockspaceDump>,
    /// What each lockspace did here.
    pub stats: BTreeMap<String, LockspaceStats>,
    /// Programs that lock through it.
    pub processes: Vec<ProcessInfo>,
    /// Resources and locks that were left out, because there are too many.
    pub left_out: usize,
}

impl NodeReport {
    /// Keeps what was asked for, waiters first, and no more than [`RESOURCES_MAX`] of each kind in a lockspace.
    pub fn narrow(&mut self, lockspace: Option<&str>, resource: Option<&str>) {
        self.lockspaces.retain(|d| lockspace.is_none_or(|l| l == d.name));
        for dump in &mut self.lockspaces {
            let is_it = |name: &LockName| resource.is_none_or(|r| r == name.to_string());
            dump.resources.retain(|r| is_it(&r.name));
            dump.elsewhere.retain(|e| is_it(&e.name));
            dump.resources.sort_by_key(|r| (!has_waiters(r), r.name.clone()));
            dump.elsewhere.sort_by_key(|e| (e.waits.is_none(), e.name.clone(), e.id));
            self.left_out += dump.resources.len().saturating_sub(RESOURCES_MAX);
            self.left_out += dump.elsewhere.len().saturating_sub(RESOURCES_MAX);
            dump.resources.truncate(RESOURCES_MAX);
            dump.elsewhere.truncate(RESOURCES_MAX);
        }
        let named: BTreeSet<(&str, u64)> = self
            .lockspaces
            .iter()
            .flat_map(|d| {
                let mastered = d.resources.iter().flat_map(all_locks).map(|l| l.id);
                let ids = mastered.chain(d.elsewhere.iter().map(|e| e.id));
                ids.map(|id| (d.name.as_str(), id)).collect::<Vec<_>>()
            })
            .collect();
        for process in &mut self.processes {
            // Locks on resources that others master are theirs to show; a bound on them all the same.
            let is_named = |(space, id): &(String, u64)| named.contains(&(space.as_str(), *id));
            process.locks.sort_by_key(|l| !is_named(l));
            process.locks.truncate(RESOURCES_MAX);
        }
    }
}

/// What the nodes of a cluster show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterReport {
    /// Those that answered.
    pub nodes: Vec<NodeReport>,
    /// Members that did not.
    pub silent: Vec<Identity>,
}

/// A lock as one end of a wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Party {
    /// Its node.
    pub node: Identity,
    /// Its number there.
    pub id: u64,
    /// Who has it within the node; the low 32 bits are a process id by convention, 0 is nobody in particular.
    pub owner: u64,
    /// The program, where it locks through the service for other processes.
    pub process: Option<(u32, String)>,
}

/// What stands against a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Blocker {
    /// Somebody has it in a mode that excludes what is wanted.
    Holder {
        /// Who.
        who: Party,
        /// In which mode.
        mode: Mode,
        /// Since when.
        age: Option<Duration>,
    },
    /// Somebody came first.
    Queue {
        /// Who.
        who: Party,
        /// What that one wants.
        wants: Mode,
    },
    /// A failed node has it, or may have it.
    Failed {
        /// Which life.
        node: Identity,
        /// In which mode; `None`: in any.
        mode: Option<Mode>,
        /// What has to happen first.
        until: String,
    },
    /// The master has not answered, or is being looked up.
    Master {
        /// Which; `None`: the directory is being asked.
        node: Option<Identity>,
    },
}

/// One request that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// In which lockspace.
    pub lockspace: String,
    /// For which resource.
    pub resource: LockName,
    /// Who.
    pub who: Party,
    /// The mode it has meanwhile.
    pub has: Option<Mode>,
    /// The mode it wants.
    pub wants: Mode,
    /// For how long it has waited.
    pub age: Option<Duration>,
    /// What stands against it, the most basic first.
    pub blockers: Vec<Blocker>,
}

fn all_locks(resource: &ResourceDump) -> impl Iterator<Item = &LockDump> {
    resource.granted.iter().chain(&resource.converting).chain(&resource.waiting)
}

fn has_waiters(resource: &ResourceDump) -> bool {
    !(resource.waiting.is_empty() && resource.converting.is_empty())
}

/// What has to happen before others get what a failed life has in a lockspace.
#[must_use]
pub fn until(view: &View, lockspace: &str, who: Identity) -> String {
    let resource = ResourceId::new(ResourceKind::Lockspace, lockspace);
    let Some(item) = view.debts.get(&who).and_then(|d| d.items.get(&resource)) else {
        return "its removal is decided and not yet seen by all".to_owned();
    };
    if !item.fenced {
        return "it is fenced".to_owned();
    }
    if !item.rebuilt {
        let late: Vec<String> = view
            .attached(&resource)
            .map(|a| a.owner)
            .filter(|owner| !item.rebuilt_by.contains_key(owner))
            .map(|owner| owner.to_string())
            .collect();
        return format!("the locks are rebuilt by {}", late.join(", "));
    }
    "its journal is replayed".to_owned()
}

/// Programs by lockspace and lock number, for each node.
struct Programs<'a>(BTreeMap<(Identity, &'a str, u64), &'a ProcessInfo>);

impl<'a> Programs<'a> {
    fn of(report: &'a ClusterReport) -> Self {
        let mut out = BTreeMap::new();
        for node in &report.nodes {
            for process in &node.processes {
                for (space, id) in &process.locks {
                    out.insert((node.node, space.as_str(), *id), process);
                }
            }
        }
        Self(out)
    }

    fn party(&self, space: &str, node: Identity, id: u64, owner: u64) -> Party {
        let process = self.0.get(&(node, space, id)).map(|p| (p.pid, p.command.clone()));
        Party { node, id, owner, process }
    }
}

/// Everything that waits, the longest first.
#[must_use]
pub fn waits(report: &ClusterReport, view: &View) -> Vec<Wait> {
    let programs = Programs::of(report);
    let mut out = Vec::new();
    let mut at_master: BTreeSet<(Identity, String, u64)> = BTreeSet::new();
    for dump in report.nodes.iter().flat_map(|n| &n.lockspaces) {
        for resource in &dump.resources {
            let queued = resource.converting.iter().chain(&resource.waiting);
            for (at, lock) in queued.enumerate() {
                let Some(wants) = lock.requested else { continue };
                at_master.insert((lock.node, dump.name.clone(), lock.id));
                out.push(Wait {
                    lockspace: dump.name.clone(),
                    resource: resource.name.clone(),
                    who: programs.party(&dump.name, lock.node, lock.id, lock.owner),
                    has: lock.granted,
                    wants,
                    age: lock.age,
                    blockers: blockers(&programs, view, &dump.name, resource, (at, lock, wants)),
                });
            }
        }
    }
    for node in &report.nodes {
        for (dump, lock) in node.lockspaces.iter().flat_map(|d| d.elsewhere.iter().map(move |e| (d, e))) {
            let Some(wants) = lock.requested else { continue };
            if at_master.contains(&(node.node, dump.name.clone(), lock.id)) {
                continue;
            }
            out.push(Wait {
                lockspace: dump.name.clone(),
                resource: lock.name.clone(),
                who: programs.party(&dump.name, node.node, lock.id, lock.owner),
                has: lock.granted,
                wants,
                age: lock.waits,
                blockers: vec![Blocker::Master { node: lock.master }],
            });
        }
    }
    out.sort_by(|a, b| {
        b.age.cmp(&a.age).then_with(|| (&a.lockspace, &a.resource).cmp(&(&b.lockspace, &b.resource)))
    });
    out
}

fn blockers(
    programs: &Programs<'_>,
    view: &View,
    space: &str,
    resource: &ResourceDump,
    (at, lock, wants): (usize, &LockDump, Mode),
) -> Vec<Blocker> {
    let mut out = Vec::new();
    for assumed in &resource.assumed {
        let until = until(view, space, *assumed);
        out.push(Blocker::Failed { node: *assumed, mode: None, until });
    }
    let others = resource.granted.iter().chain(&resource.converting);
    for other in others.filter(|o| (o.node, o.id) != (lock.node, lock.id)) {
        let Some(mode) = other.granted.filter(|g| !g.is_compatible(wants)) else { continue };
        if !other.range.overlaps(lock.range) {
            continue;
        }
        out.push(if other.dead {
            let until = until(view, space, other.node);
            Blocker::Failed { node: other.node, mode: Some(mode), until }
        } else {
            let who = programs.party(space, other.node, other.id, other.owner);
            Blocker::Holder { who, mode, age: other.age }
        });
    }
    // The order of the queues: conversions wait for conversions before them, new requests for all of those and for new
    // requests before them.
    let ahead = resource.converting.iter().chain(&resource.waiting).take(at);
    for other in ahead.filter(|o| o.range.overlaps(lock.range)) {
        let Some(wants) = other.requested else { continue };
        let who = programs.party(space, other.node, other.id, other.owner);
        out.push(Blocker::Queue { who, wants });
    }
    out
}

#[cfg(test)]
mod tests;
