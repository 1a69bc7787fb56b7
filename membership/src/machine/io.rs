//! What goes into the machine and what comes out of it.

use super::durable::Record;
use super::wire::{ControlMsg, JoinRefusal};
use crate::{Epoch, Identity, Incarnation, Instant, NodeId, Request, RequestError, View};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A process at the other end: the node is proven by its certificate, the rest is what its hello claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// Proven.
    pub node: NodeId,
    /// Claimed; the machine judges it (R1).
    pub incarnation: Incarnation,
    /// Claimed: random per process.
    pub nonce: u64,
}

impl Peer {
    /// The life without the nonce.
    #[must_use]
    pub fn identity(self) -> Identity {
        Identity::new(self.node, self.incarnation)
    }
}

/// Names one write of the machine. Tokens grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Names one request of a local user; chosen by the driver, not used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The transport received a message. Order, loss and doubling do not matter.
    Packet {
        /// From whom.
        from: Peer,
        /// What.
        msg: ControlMsg,
    },
    /// Every write up to this token is durable. From the storage, in answer to [`Output::Persist`].
    Persisted(Token),
    /// A write or fsync failed: nothing that was not confirmed may be relied on. The machine stops.
    StorageFailed,
    /// A local user asks for a change. Answered by [`Output::RequestDone`].
    Request {
        /// Names the answer.
        id: RequestId,
        /// What is wanted.
        request: Request,
    },
    /// The transport lost its connection to a node. A hint: it may shorten suspicion, never a lease.
    LinkLost {
        /// Which node.
        node: NodeId,
    },
    /// A person takes `wait_for_all` back at this node, until the process ends.
    CancelWaitForAll,
    /// A person declares that the nodes of `off` are off and gives the rest the quorum. Outside the guarantees. Answered
    /// by [`Output::RequestDone`].
    Force {
        /// Names the answer.
        id: RequestId,
        /// Every voter and member that is not heard.
        off: BTreeSet<NodeId>,
        /// Who says so, and why: it goes into the record.
        word: String,
    },
    /// Whether this node's part of a recovery waits for storage, a fence or quorum (R7); true until said otherwise.
    Waiting(bool),
    /// The time of [`Member::next_deadline`](super::Member::next_deadline) has come. Spurious ticks are no-ops.
    ///
    /// The driver ticks only while the node's event loops turn: without ticks there are no heartbeats (R7).
    Tick,
}

/// What the driver must do, in this order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send a message if there is a path; losing it is allowed.
    Send {
        /// To which node.
        to: NodeId,
        /// If set, only over a connection to exactly this life; drop the message if there is none.
        life: Option<Incarnation>,
        /// What.
        msg: ControlMsg,
    },
    /// Append `record` to the state and make it durable; then [`Input::Persisted`] with the highest durable token.
    /// What depends on it is withheld until then. Later outputs do not wait.
    Persist {
        /// Names it.
        token: Token,
        /// What to append.
        record: Record,
        /// True: nothing urgent waits for this; it may go with the next write, but within a second.
        lazy: bool,
    },
    /// `view` is the newest record now. Views come in order and without gaps, once this life is a member; before
    /// that a chain that was cut elsewhere may make the first one `jumped`.
    Installed {
        /// The record.
        view: Arc<View>,
        /// Whether records before it were not delivered.
        jumped: bool,
    },
    /// The outcome of a request.
    RequestDone {
        /// Which.
        id: RequestId,
        /// The view that holds it, or why not.
        result: Result<Arc<View>, RequestError>,
    },
    /// The lease of this life ends at `until` unless extended; in the past: it has none (R8).
    Lease {
        /// On this node's clock.
        until: Instant,
    },
    /// This life gained or lost quorum: it is a member under a valid lease, or not.
    Quorum(bool),
    /// This life is over. Stop everything; the machine takes no more input.
    Stop {
        /// Why.
        reason: StopReason,
    },
    /// Something worth a log line; changes nothing.
    Event(Event),
}

/// Why a life ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// The cluster removed it. A new life may join.
    #[error("removed from the cluster by the record of epoch {epoch}")]
    Removed {
        /// The first epoch without it.
        epoch: Epoch,
    },
    /// It left as it asked to.
    #[error("left the cluster cleanly with the record of epoch {epoch}")]
    Left {
        /// The first epoch without it.
        epoch: Epoch,
    },
    /// Another process of this node lives. A restart does not help while it does.
    #[error("another process runs as node {0}: double identity")]
    DoubleIdentity(NodeId),
    /// The state directory is older than what the cluster has seen of this node: call
    /// [`Durable::renounce`](super::Durable::renounce) and start the next life, an observer.
    #[error(
        "the cluster has seen life {known} of this node: the state directory was lost, copied or rolled back"
    )]
    RolledBack {
        /// The newest life it has seen.
        known: Incarnation,
    },
    /// The state disk failed; the node never runs on promises that are not durable (R4).
    #[error("the state could not be made durable")]
    Storage,
    /// The cluster went on to a version of the messages that this program does not speak.
    #[error(
        "the cluster speaks version {cluster} since epoch {epoch}, this program speaks {program}: upgrade it"
    )]
    Version {
        /// The cluster's.
        cluster: u8,
        /// The record that raised it, or the first one seen with it.
        epoch: Epoch,
        /// This program's.
        program: super::Versions,
    },
    /// It was away for so long that nobody has the records it missed.
    #[error("records after epoch {have} are not kept by anybody, the oldest is {oldest}")]
    TooFarBehind {
        /// Its newest.
        have: Epoch,
        /// The oldest one offered.
        oldest: Epoch,
    },
}

/// What the machine noticed, for logs and for `quorate why`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Silence, or a newer life, makes this life suspect here.
    Suspected(Identity),
    /// A process was refused.
    Refused {
        /// Who.
        node: NodeId,
        /// Why.
        refusal: JoinRefusal,
    },
    /// This node proposes from now on.
    Leads {
        /// In which epoch it began.
        epoch: Epoch,
    },
    /// Somebody else has a higher ballot.
    Preempted,
    /// A person forced the quorum here (not decided by a majority).
    Forced {
        /// The record.
        epoch: Epoch,
    },
    /// A record that a person forced was offered and is not believed here.
    ForcedElsewhere {
        /// By which node it came.
        from: NodeId,
        /// Its number.
        epoch: Epoch,
    },
    /// A pair of members has no direct path (R3).
    NoPath(NodeId, NodeId),
    /// Members were told to be removed for missing a stage deadline (R7).
    MissedStage(BTreeSet<Identity>),
    /// A message that contradicts the protocol or the roster was dropped.
    Dropped {
        /// From whom.
        from: Peer,
        /// Why.
        why: &'static str,
    },
    /// This process was not allowed in and waits.
    NotAdmitted(JoinRefusal),
}

/// Why an input was not taken. The machine is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A write was confirmed that was never asked for: a driver bug.
    #[error("write {0:?} was never asked for")]
    UnknownToken(Token),
    /// The machine has stopped.
    #[error("this life is over")]
    Stopped,
}
