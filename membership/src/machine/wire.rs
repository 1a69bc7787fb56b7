//! The messages between membership machines: unreliable datagrams, which the machine itself repeats.
//!
//! Layout: one byte of version, then postcard; see [`Versions`](super::Versions) for which version. They travel outside the sessions (R2) and are never held back.

use super::version::Versions;
use crate::delta::{Delta, Step};
use crate::evidence::Report;
use crate::proof::{Accept, Ballot, Decision};
use crate::{Epoch, Identity, Incarnation, NodeId, Refusal, Request, StateId, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The longest message, in bytes, version included. The transport must carry this much.
pub const CONTROL_BYTES_MAX: usize = 4 << 20;
/// How many bytes of decisions one [`ControlMsg::Chain`] holds; a single larger decision goes alone.
pub const CHAIN_BYTES_MAX: usize = 256 << 10;

/// A message between machines. The sender's node, life and nonce come with the packet, never from inside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlMsg {
    /// "I live, and this is how far I am." Answered by `HeartbeatAck`.
    Heartbeat(Heartbeat),
    /// The answer, at once and from memory.
    HeartbeatAck(HeartbeatAck),
    /// Sent to a life whose node shows a newer one: any answer makes the newer one a double identity (R1).
    Probe,
    /// The answer to a probe.
    ProbeAnswer,
    /// Paxos phase 1 for `epoch`.
    Prepare {
        /// The first epoch the sender does not know as decided.
        epoch: Epoch,
        /// The ballot to promise.
        ballot: Ballot,
    },
    /// The durable promise of `ballot`, made while the acceptor's chain ended just before `epoch`.
    Promise {
        /// As asked for.
        epoch: Epoch,
        /// As asked for.
        ballot: Ballot,
        /// The acceptor's state directory.
        state: StateId,
        /// What it accepted for `epoch`, and in which ballot.
        accepted: Option<(Ballot, Box<View>)>,
    },
    /// Paxos phase 2: say yes to a record in `ballot`.
    Accept {
        /// The proposer's ballot.
        ballot: Ballot,
        /// The record, as the difference to the one before it: an acceptor that has not got that cannot accept.
        delta: Box<Delta>,
    },
    /// The durable yes.
    Accepted {
        /// The record's epoch.
        epoch: Epoch,
        /// The yes.
        accept: Accept,
    },
    /// A higher ballot is promised here.
    Preempted {
        /// It.
        promised: Ballot,
    },
    /// A decision, as the difference to the one before it.
    Learn(Box<Step>),
    /// Asks for decisions from this epoch on.
    Fetch {
        /// The first one wanted.
        from: Epoch,
    },
    /// Decisions, oldest first, without gaps.
    Chain {
        /// The first one, for a receiver that has not got the one before the steps.
        whole: Option<Box<Decision>>,
        /// Those that follow it.
        steps: Vec<Step>,
    },
    /// A member's request, to the leader.
    Forward {
        /// The member's own count of its requests.
        number: u64,
        /// The request is for the record after this one and none else, so that a late copy cannot apply later.
        at: Epoch,
        /// What is asked for.
        request: Request,
    },
    /// The leader's answer to a request that makes no record.
    Answer {
        /// Which request.
        number: u64,
        /// The epoch it was judged at.
        at: Epoch,
        /// What became of it.
        answer: Answer,
    },
    /// The receiver cannot be what it says it is.
    Refused(JoinRefusal),
}

/// "I live."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// When it was sent, in nanoseconds on the sender's clock; echoed, never interpreted by others.
    pub sent_ns: u64,
    /// The newest epoch that the sender has installed.
    pub epoch: Epoch,
    /// The newest epoch that the sender has stored durably.
    pub stored: Epoch,
    /// The sender's state directory.
    pub state: StateId,
    /// Whether the sender wants to become a member.
    pub wants_in: bool,
    /// Whom the sender hears at present; in a large cluster the voters only.
    pub hears: BTreeSet<NodeId>,
    /// Members that the sender watches and finds silent.
    pub reports: BTreeMap<Identity, Report>,
    /// Whom the sender takes for the leader.
    pub leader: Option<NodeId>,
    /// Whether the sender's part of a recovery waits for something else, so that no deadline counts (R7).
    pub waits: bool,
    /// The versions of the messages that the sender speaks.
    pub speaks: Versions,
    /// The cluster's version as the sender knows it.
    pub version: u8,
}

/// The answer to a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatAck {
    /// The heartbeat's.
    pub sent_ns: u64,
    /// The sender's newest epoch.
    pub epoch: Epoch,
    /// The sender's state directory.
    pub state: StateId,
    /// Whom the sender takes for the leader.
    pub leader: Option<NodeId>,
    /// Whether this counts for the receiver's lease: false if the acceptor accepted or knows a later record that
    /// removes the receiver, or changes the voters it counts by (R8).
    pub leases: bool,
}

/// What became of a request that made no record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The record forbids it.
    Refused(Refusal),
    /// The record says so already.
    Unchanged,
    /// Something outside the record is missing for now; ask again.
    NotNow(Refusal),
}

/// Why a process is not let in. It must not go on as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum JoinRefusal {
    /// Another process of this node lives: the same life with another nonce, or an older life that answered (R1).
    #[error("node {0} runs a second time elsewhere: double identity")]
    DoubleIdentity(NodeId),
    /// This life is not newer than one the cluster has seen: the state directory was rolled back, lost or copied.
    #[error("the cluster has seen life {known} of this node: this state directory is older")]
    RolledBack {
        /// The newest life it has seen.
        known: Incarnation,
    },
    /// The node is not in the roster.
    #[error("node {0} is not in the cluster's roster")]
    NotInRoster(NodeId),
    /// This life was removed.
    #[error("{0} was removed from the cluster")]
    Removed(Identity),
    /// The node's program does not speak the cluster's version.
    #[error("the cluster speaks version {cluster}, the program of this node speaks {node}: upgrade it")]
    Version {
        /// The cluster's.
        cluster: u8,
        /// The refused node's.
        node: Versions,
    },
}

/// Why bytes are no message. The packet is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Nothing there.
    #[error("an empty message")]
    Empty,
    /// Another version.
    #[error("control version {found}, this node speaks {speaks}")]
    Version {
        /// In the message.
        found: u8,
        /// What the reader speaks.
        speaks: Versions,
    },
    /// Above the limit.
    #[error("a control message of {size} bytes is above the limit of {CONTROL_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        size: usize,
    },
    /// Not what the version says.
    #[error("a control message that does not decode")]
    Malformed,
}

impl ControlMsg {
    /// The bytes to send, in one version.
    ///
    /// # Panics
    /// If this program does not write `version`: a mistake of the caller.
    #[must_use]
    pub fn encode(&self, version: u8) -> Vec<u8> {
        #[cfg(any(test, feature = "sim"))]
        if version == Versions::NEXT.newest {
            return next::encode(self);
        }
        assert!(Versions::CURRENT.speaks(version), "version {version} is not spoken here");
        postcard::to_extend(self, vec![version]).expect("plain data into memory always encodes")
    }

    /// Reads a message of a version that is spoken; hostile bytes give an error.
    ///
    /// # Errors
    /// See [`WireError`].
    pub fn decode(bytes: &[u8], speaks: Versions) -> Result<Self, WireError> {
        if CONTROL_BYTES_MAX < bytes.len() {
            return Err(WireError::TooLarge { size: bytes.len() });
        }
        let Some((&found, rest)) = bytes.split_first() else { return Err(WireError::Empty) };
        if !speaks.speaks(found) {
            return Err(WireError::Version { found, speaks });
        }
        #[cfg(any(test, feature = "sim"))]
        if found == Versions::NEXT.newest {
            return next::decode(rest);
        }
        match postcard::take_from_bytes(rest) {
            Ok((msg, [])) => Ok(msg),
            _ => Err(WireError::Malformed),
        }
    }

    /// Whether the message may be dropped by a transport under pressure, because a newer one of its kind follows
    /// within a heartbeat interval. These are small and want a datagram; the others may be long and want a stream.
    #[must_use]
    pub fn is_periodic(&self) -> bool {
        matches!(self, Self::Heartbeat(_) | Self::HeartbeatAck(_) | Self::Probe | Self::ProbeAnswer)
    }
}

/// The second version, which exists for tests of the upgrade: an acknowledgement is written with its fields in another
/// order, so that a reader of the first version cannot take it for one.
#[cfg(any(test, feature = "sim"))]
mod next {
    use super::{ControlMsg, HeartbeatAck, Versions, WireError};
    use crate::{Epoch, NodeId, StateId};

    pub(super) fn encode(msg: &ControlMsg) -> Vec<u8> {
        let version = Versions::NEXT.newest;
        let done = match msg {
            ControlMsg::HeartbeatAck(ack) => {
                let fields = (ack.leases, ack.epoch, ack.state, ack.sent_ns, ack.leader);
                postcard::to_extend(&fields, vec![version, b'a'])
            }
            other => postcard::to_extend(other, vec![version, b'o']),
        };
        done.expect("plain data into memory always encodes")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<ControlMsg, WireError> {
        match bytes.split_first() {
            Some((b'a', rest)) => {
                match postcard::take_from_bytes::<(bool, Epoch, StateId, u64, Option<NodeId>)>(rest) {
                    Ok(((leases, epoch, state, sent_ns, leader), [])) => {
                        Ok(ControlMsg::HeartbeatAck(HeartbeatAck { sent_ns, epoch, state, leader, leases }))
                    }
                    _ => Err(WireError::Malformed),
                }
            }
            Some((b'o', rest)) => match postcard::take_from_bytes(rest) {
                Ok((msg, [])) => Ok(msg),
                _ => Err(WireError::Malformed),
            },
            _ => Err(WireError::Malformed),
        }
    }
}
