//! What a member can ask the cluster to decide, and why it may refuse.

use crate::{
    Epoch, Identity, NodeId, QuorumOptions, ResourceId, RosterEntry, Safety, ServerEntry, ServerId, StateId,
    VoterSet,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A change of the view record, asked for by a member. Each is decided as one record or refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Attach the asking life to a resource. Idempotent: an existing attachment is confirmed as it is.
    Attach(AttachRequest),
    /// Give up the asking life's attachment. Idempotent.
    Detach(ResourceId),
    /// Prove a part of a debt; see [`Proof`]. Idempotent: what is proven already is confirmed.
    Prove {
        /// Whose debt.
        debtor: Identity,
        /// Which items; all of the debt's items the proof covers if empty.
        resources: BTreeSet<ResourceId>,
        /// The proof.
        proof: Proof,
    },
    /// Leave cleanly: refused while the asking life has an attachment. The vote stays unless given up (R5).
    Leave {
        /// Whether to leave the voter set too.
        give_up_vote: bool,
    },
    /// Enter nodes in the roster, or change entries.
    SetRoster(BTreeMap<NodeId, RosterEntry>),
    /// Strike a node from the roster and from the voters; it must not be a member.
    RemoveNode(NodeId),
    /// Change who votes. Each new voter must be a member, with the state it announced.
    SetVoters(VoterSet),
    /// Change the quorum options; the voter set follows in a record of its own.
    SetQuorum(QuorumOptions),
    /// Put another machine in the place of a node whose state is lost: its old state directory votes no more, and the new
    /// key is the node's. The node must not be a member.
    Replace(NodeId, RosterEntry),
    /// Let a node use a second key beside the roster's, while its certificate is being replaced.
    Renew {
        /// The node.
        node: NodeId,
        /// SHA-256 of the new public key.
        key: [u8; 32],
    },
    /// Refuse a key from now on, everywhere. A member that uses it is removed with the same record.
    Revoke {
        /// SHA-256 of the public key.
        key: [u8; 32],
        /// Why, for the history.
        reason: String,
    },
    /// Trust exactly these CAs (certificates, DER); none: each node trusts the one of its own directory.
    SetCas(BTreeSet<Vec<u8>>),
    /// Take a storage server in as a fence.
    Enrol(ServerId, ServerEntry),
    /// Give a storage server up for good: its exports are unusable until enrolled afresh (R9).
    Retire(ServerId),
    /// Remove a member that must stop (a missed stage deadline, an administrator's word). It becomes a debt.
    Evict {
        /// Whom.
        who: Identity,
        /// Why, for the history.
        reason: String,
    },
}

/// In a few words, for people.
impl core::fmt::Display for Request {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Attach(wanted) => write!(f, "attach to {} ({:?})", wanted.resource, wanted.safety),
            Self::Detach(resource) => write!(f, "detach from {resource}"),
            Self::Prove { debtor, proof, .. } => write!(f, "prove of {debtor}: {proof:?}"),
            Self::Leave { give_up_vote: true } => write!(f, "leave and give up the vote"),
            Self::Leave { give_up_vote: false } => write!(f, "leave"),
            Self::SetRoster(entries) => {
                let nodes: Vec<String> = entries.keys().map(ToString::to_string).collect();
                write!(f, "set the roster's entries of nodes {}", nodes.join(", "))
            }
            Self::RemoveNode(node) => write!(f, "strike node {node} from the roster"),
            Self::Evict { who, reason } => write!(f, "evict {who}: {reason}"),
            Self::Enrol(id, entry) => write!(f, "enrol storage server {id} ({})", entry.name),
            Self::Retire(id) => write!(f, "retire storage server {id}"),
            other => write!(f, "{other:?}"),
        }
    }
}

/// What to attach to, and what it needs if the asking life fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// To what.
    pub resource: ResourceId,
    /// What must be proven before others may act in its place.
    pub safety: Safety,
    /// The storage servers that hold its devices.
    pub servers: BTreeSet<ServerId>,
    /// Whether a journal is wanted (a read-write filesystem): the lowest free one below `journals` is given.
    pub journals: Option<u32>,
    /// The lockspace whose holds protect the resource.
    pub lockspace: Option<String>,
    /// Whether nobody else may be attached to the resource (exclusive use).
    pub exclusive: bool,
}

/// Why some items of a debt may go on to their next stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proof {
    /// Fenced at storage level: these servers confirmed an epoch without the debtor, and its lease is over.
    StorageFence {
        /// Which server confirmed which epoch.
        confirmed: BTreeMap<ServerId, Epoch>,
    },
    /// Fenced at lease level: lease, margin and (for services) kill time are over, or the supervisor said so.
    LeaseOver,
    /// Fenced at any level: a device verified that the machine is off.
    PoweredOff {
        /// Which device.
        device: String,
    },
    /// Fenced at any level: a person says that the machine is off.
    Confirmed {
        /// Who, as the admin socket knows it.
        by: String,
    },
    /// The asking member has rebuilt its part of the lockspace's locks in this epoch. Counts once every attached
    /// member has said so in the same or a later epoch of the same attachments.
    Rebuilt {
        /// The epoch it was rebuilt for.
        epoch: Epoch,
    },
    /// The journal is replayed; closes the item.
    Replayed,
    /// The service is recovered (started elsewhere or known stopped); closes the item.
    Recovered,
}

/// Why a request was not decided. No record was made for it, except where said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// This side has no quorum; retry when it has.
    #[error("not quorate: {have} of {all} votes answer, more than half are needed")]
    NotQuorate {
        /// Votes that answer.
        have: u32,
        /// Votes of the voter set.
        all: u32,
    },
    /// The record forbids it.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// Nothing is known of the outcome: the node stopped or the deadline passed. It may have been decided.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// This life is no member.
    #[error("{0} is not a member")]
    NotMember(Identity),
    /// Too many requests of this node wait. Nothing was asked for.
    #[error("{0} requests of this node are waiting already")]
    Full(usize),
}

/// Why the view record forbids a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// All journals are owned, or owed by a failed node.
    #[error("all {journals} journals of {resource} are in use: owners {owners:?}")]
    NoJournal {
        /// The filesystem.
        resource: ResourceId,
        /// How many there are.
        journals: u32,
        /// Who owns them.
        owners: Vec<Identity>,
    },
    /// Somebody uses it exclusively, or exclusive use was asked for and somebody uses it.
    #[error("{resource} is in use by {owner}")]
    InUse {
        /// The resource.
        resource: ResourceId,
        /// By whom.
        owner: Identity,
    },
    /// An earlier life of the node still owes this resource: a new one may attach once the old one is fenced and the
    /// locks are rebuilt (R6). Wait for a later view and ask again.
    #[error("{resource} is still owed by {debtor}, an earlier life of this node")]
    OldLife {
        /// The resource.
        resource: ResourceId,
        /// The earlier life.
        debtor: Identity,
    },
    /// A leave with attachments left.
    #[error("still attached to {0}")]
    StillAttached(ResourceId),
    /// The named storage server is not enrolled.
    #[error("storage server {0} is not enrolled in this cluster")]
    NotEnrolled(ServerId),
    /// The node is not in the roster, or a member that must leave first, or has no known state.
    #[error("node {node}: {reason}")]
    Node {
        /// Which.
        node: NodeId,
        /// What is wrong.
        reason: String,
    },
    /// The voter set asked for has no votes, or a majority of it does not hold the newest record.
    #[error("voter set: {0}")]
    Voters(String),
    /// Quorum options that contradict themselves or the roster.
    #[error("quorum options: {0}")]
    Quorum(String),
    /// The quorum may not be forced.
    #[error("not forced: {0}")]
    Force(String),
    /// A key or CA cannot be trusted or given up.
    #[error("trust: {0}")]
    Trust(String),
    /// The proof does not cover what is owed.
    #[error("the proof does not hold for {resource}: {reason}")]
    Unproven {
        /// The item.
        resource: ResourceId,
        /// What is missing.
        reason: String,
    },
    /// The life is not in debt (any more).
    #[error("{0} owes nothing")]
    NoDebt(Identity),
    /// A name too long, a list too large.
    #[error("{what} exceeds the limit of {limit}")]
    Limit {
        /// What.
        what: String,
        /// How much is allowed.
        limit: u64,
    },
    /// Another state directory answers for that node.
    #[error("node {node} announced state {announced}, not {asked}")]
    OtherState {
        /// The node.
        node: NodeId,
        /// What it announced.
        announced: StateId,
        /// What was asked for.
        asked: StateId,
    },
}
