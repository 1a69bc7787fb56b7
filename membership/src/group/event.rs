//! What a process of a group is told, and how processes and places in the order are named.

use crate::{Epoch, Identity};
use serde::{Deserialize, Serialize};

/// A process of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The life of the node it runs on.
    pub node: Identity,
    /// Which of that life's processes; never used twice.
    pub number: u64,
}

impl core::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}/{}", self.node, self.number)
    }
}

/// A place in the order of a group. Equal at all its members, and growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// A record in whose view it is: the one that the flush's coordinator had.
    pub epoch: Epoch,
    /// Zero is the change of the cluster's members itself.
    pub order: u64,
}

/// Why a process is no member any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// It left.
    Left,
    /// It ended without leaving, on a node that lives.
    Crashed,
    /// Its node was removed from the cluster.
    NodeGone,
}

/// What a process is told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The members from here on. The first one is that of the own join.
    Configuration {
        /// Where in the order.
        at: Position,
        /// Everybody, in one order everywhere.
        members: Vec<ProcessId>,
        /// Who came.
        joined: Vec<ProcessId>,
        /// Who went, and why.
        left: Vec<(ProcessId, Reason)>,
    },
    /// A message of a member; also the own ones.
    Message {
        /// Where in the order.
        at: Position,
        /// The sender.
        from: ProcessId,
        /// As [`GroupMachine::multicast`](super::GroupMachine::multicast) returned it to the sender.
        number: u64,
        /// The message.
        payload: Vec<u8>,
    },
    /// The view ended before these own messages had their place: nobody gets them.
    Dropped {
        /// The first.
        first: u64,
        /// The last.
        last: u64,
    },
    /// This process has left; nothing follows.
    Left,
}
