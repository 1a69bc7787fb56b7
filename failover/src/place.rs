//! Where a service belongs, and what a failure leads to: pure functions, with recorded cases in `tests/cases`.
//!
//! The scores are rgmanager's (illegal, good, better, best), so that a `cluster.conf` behaves as it did; ties go to the
//! node with fewer services, then to the lower number.

use crate::{Recovery, ServiceConfig};
use core::time::Duration;
use quorate_membership::{Instant, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// What is wanted of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Target {
    /// It runs; on this node, as long as that is possible, if a person said so.
    Enabled(Option<NodeId>),
    /// It does not run.
    Disabled,
}

/// What a placement depends on. Every member decides on the same facts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterState {
    /// Members that may take services, each with the number it runs.
    pub nodes: BTreeMap<NodeId, usize>,
    /// What is wanted.
    pub target: Target,
    /// Who is attached to it now.
    pub owner: Option<NodeId>,
    /// A removed owner is not fenced yet at the level the service needs (R20).
    pub unfenced: bool,
    /// Members on which it could not be started, or must not be started again.
    pub failed: BTreeSet<NodeId>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing: it is where it belongs.
    Stay(NodeId),
    /// Start it here.
    Start(NodeId),
    /// Stop it at its owner and start it there.
    Move {
        /// The owner.
        from: NodeId,
        /// The better node.
        to: NodeId,
    },
    /// Stop it.
    Stop(NodeId),
    /// Nothing runs and nothing will.
    Nothing(Idle),
    /// A former owner is not fenced.
    WaitForFence,
}

/// Why a service does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Idle {
    /// A person, or the recovery policy, disabled it.
    Disabled,
    /// No node that may run it is there.
    NoNode,
    /// It failed on every node that may run it.
    FailedEverywhere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Score {
    /// Outside an unrestricted domain of which a member is there.
    Good,
    /// In an ordered domain, but not of the best priority there.
    Better,
    /// As good as any.
    Best,
    /// A person's choice.
    Chosen,
}

/// Decides where a service belongs.
#[must_use]
pub fn place(config: &ServiceConfig, state: &ClusterState) -> Plan {
    let (owner, chosen) = match (state.target, state.owner) {
        (Target::Disabled, Some(owner)) => return Plan::Stop(owner),
        (Target::Disabled, None) => return Plan::Nothing(Idle::Disabled),
        (Target::Enabled(chosen), owner) => (owner, chosen),
    };
    if owner.is_none() && state.unfenced {
        return Plan::WaitForFence;
    }
    let usable: BTreeSet<NodeId> =
        state.nodes.keys().copied().filter(|n| !state.failed.contains(n)).collect();
    let scored = usable.iter().filter_map(|n| Some((*n, score(config, &usable, owner, chosen, *n)?)));
    // Highest score; the owner before others, then fewer services, then the lower number.
    let best = scored.min_by_key(|(n, s)| {
        let load = state.nodes.get(n).copied().unwrap_or(0);
        (std::cmp::Reverse(*s), owner != Some(*n), load, *n)
    });
    match (best, owner) {
        (Some((to, _)), Some(from)) if from == to => Plan::Stay(from),
        (Some((to, _)), Some(from)) => Plan::Move { from, to },
        (Some((to, _)), None) => Plan::Start(to),
        // Nowhere else: the owner decides by its recovery policy, if it is a node at all that may run it.
        (None, Some(from)) if state.nodes.contains_key(&from) && is_legal(config, from) => Plan::Stay(from),
        (None, Some(from)) => Plan::Stop(from),
        (None, None) => {
            let somewhere = state.nodes.keys().any(|n| is_legal(config, *n));
            Plan::Nothing(if somewhere { Idle::FailedEverywhere } else { Idle::NoNode })
        }
    }
}

/// Whether the domain allows the node at all.
fn is_legal(config: &ServiceConfig, node: NodeId) -> bool {
    config.domain.as_ref().is_none_or(|d| !d.restricted || d.nodes.contains_key(&node))
}

fn score(
    config: &ServiceConfig,
    usable: &BTreeSet<NodeId>,
    owner: Option<NodeId>,
    chosen: Option<NodeId>,
    node: NodeId,
) -> Option<Score> {
    if !is_legal(config, node) {
        return None;
    }
    if chosen == Some(node) {
        return Some(Score::Chosen);
    }
    let Some(domain) = &config.domain else { return Some(Score::Best) };
    let lowest = domain.nodes.iter().filter(|(n, _)| usable.contains(n)).map(|(_, p)| *p).min();
    let plain = match (domain.nodes.get(&node), lowest) {
        (None, Some(_)) => Score::Good,
        // No member of the domain is there: any node will do.
        (None, None) => Score::Best,
        (Some(priority), Some(lowest)) if domain.ordered && lowest < *priority => Score::Better,
        (Some(_), _) => Score::Best,
    };
    // nofailback: where it runs is as good as it gets; ties stay with the owner.
    Some(if domain.nofailback && owner == Some(node) { Score::Best } else { plain })
}

/// What the owner does after a running resource failed and everything is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Start it again here.
    Restart,
    /// Give it up to another node.
    Relocate,
    /// Leave it stopped until a person enables it.
    Disable,
}

/// Decides what follows a failure at `now`. `restarts`: when it was restarted here, oldest first. `elsewhere`: whether
/// another node could take it.
#[must_use]
pub fn react(config: &ServiceConfig, restarts: &[Instant], now: Instant, elsewhere: bool) -> Reaction {
    let window = config.restart_expire_time;
    let limited = 0 < config.max_restarts && Duration::ZERO < window;
    let recent = restarts.iter().filter(|at| now.since(**at) < window).count();
    match config.recovery {
        Recovery::Disable => Reaction::Disable,
        Recovery::Relocate if elsewhere => Reaction::Relocate,
        Recovery::Restart if limited && elsewhere && config.max_restarts as usize <= recent => {
            Reaction::Relocate
        }
        Recovery::Restart | Recovery::Relocate => Reaction::Restart,
    }
}
