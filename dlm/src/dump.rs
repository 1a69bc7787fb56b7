//! What a lock manager shows of itself: lockspaces, resources and queues, for `quorate lock ls` and for bug reports.

use crate::{LockName, Mode, Range};
use core::time::Duration;
use quorate_membership::{Identity, Instant};
use serde::{Deserialize, Serialize};

/// A lockspace as one node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockspaceDump {
    /// Its name.
    pub name: String,
    /// The resources this node masters, in order of name.
    pub resources: Vec<ResourceDump>,
    /// Locks of this node on resources that others master, or whose master is being looked up.
    pub elsewhere: Vec<ElsewhereDump>,
    /// Members, and what recovery waits for, one line each; empty when nothing is pending.
    pub recovery: Vec<String>,
    /// The members attached to the lockspace.
    pub members: Vec<Identity>,
}

/// A resource at its master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceDump {
    /// Its name.
    pub name: LockName,
    /// The master.
    pub master: Identity,
    /// How many grants there were.
    pub sequence: u64,
    /// The value block, if it was ever written.
    pub value: Option<Vec<u8>>,
    /// Whether it is not valid.
    pub value_invalid: bool,
    /// Granted locks.
    pub granted: Vec<LockDump>,
    /// Granted locks that wait for another mode, in order.
    pub converting: Vec<LockDump>,
    /// New locks that wait, in order.
    pub waiting: Vec<LockDump>,
    /// Failed lives that may have it in an unknown mode.
    pub assumed: Vec<Identity>,
}

/// One lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockDump {
    /// Whose.
    pub node: Identity,
    /// Its number at its node.
    pub id: u64,
    /// Who has it within the node.
    pub owner: u64,
    /// What it covers.
    pub range: Range,
    /// The mode in force.
    pub granted: Option<Mode>,
    /// The mode it waits for.
    pub requested: Option<Mode>,
    /// Its node failed.
    pub dead: bool,
    /// For how long it has had its mode, or waited if it waits, as its present master knows; `None` where no time is kept.
    pub age: Option<Duration>,
}

/// A lock of this node on a resource that it does not master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ElsewhereDump {
    /// The resource.
    pub name: LockName,
    /// Its master, if known.
    pub master: Option<Identity>,
    /// The lock's number.
    pub id: u64,
    /// Who has it within the node.
    pub owner: u64,
    /// The mode in force.
    pub granted: Option<Mode>,
    /// The mode it waits for.
    pub requested: Option<Mode>,
    /// For how long it has waited for an answer of the master.
    pub waits: Option<Duration>,
}

/// A program that locks through the service for other processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its process id when it connected.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its command line, cut short.
    pub command: String,
    /// Since when it is connected.
    pub connected: Duration,
    /// Its locks: lockspace, and the number in [`LockDump::id`].
    pub locks: Vec<(String, u64)>,
}

impl LockDump {
    pub(crate) fn of(lock: &crate::machine::Lock, now: Option<Instant>) -> Self {
        Self {
            node: lock.key.node,
            id: lock.key.id.0,
            owner: lock.owner,
            range: lock.range,
            granted: lock.granted,
            requested: lock.pending.as_ref().map(|p| p.mode),
            dead: lock.dead,
            age: now.map(|now| now.since(lock.since)),
        }
    }
}

impl ResourceDump {
    pub(crate) fn of(
        name: &LockName,
        master: Identity,
        resource: &crate::machine::Resource,
        now: Option<Instant>,
    ) -> Self {
        let [granted, converting, waiting] =
            resource.queues().map(|q| q.iter().map(|l| LockDump::of(l, now)).collect::<Vec<_>>());
        Self {
            name: name.clone(),
            master,
            sequence: resource.sequence(),
            value: resource.value().bytes.clone(),
            value_invalid: resource.value().invalid,
            granted,
            converting,
            waiting,
            assumed: resource.assumed().iter().map(|a| a.debtor).collect(),
        }
    }
}
