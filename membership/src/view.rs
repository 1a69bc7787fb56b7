//! The view record: what the cluster has agreed on at one epoch (R4, R6).

use crate::{
    ClusterId, Epoch, Evidence, Identity, Incarnation, NodeId, QuorumOptions, ServerId, StateId, Trust,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One decided record. Records form a chain: the record of epoch E+1 is decided by the voters of the record of epoch E.
///
/// Every change of anything in it, not of the members alone, is a record of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The cluster.
    pub cluster: ClusterId,
    /// This record's number.
    pub epoch: Epoch,
    /// Who is in, and in which life.
    pub members: BTreeMap<NodeId, Incarnation>,
    /// Who may be in. A certificate outside it is refused.
    pub roster: BTreeMap<NodeId, RosterEntry>,
    /// Who decides the next record.
    pub voters: VoterSet,
    /// How the voter set follows the members (R5).
    pub quorum: QuorumOptions,
    /// The version of the protocols that members speak with each other. Only rises, and only here.
    pub version: u8,
    /// Whose certificates are believed, and which keys are not.
    pub trust: Trust,
    /// Storage servers that are fences of this cluster.
    pub servers: BTreeMap<ServerId, ServerEntry>,
    /// What members use that would have to be cleaned up after them. Invariant: every owner is a member.
    pub attachments: BTreeSet<Attachment>,
    /// What removed lives left behind. Invariant: no key is a member.
    pub debts: BTreeMap<Identity, Debt>,
    /// The newest life of every node that ever was a member. Only a higher one may join (R1); a state directory whose
    /// counter is below it was rolled back (R4).
    pub lives: BTreeMap<NodeId, Incarnation>,
    /// The process nonce of every member: a process with the same incarnation and another nonce is an impostor (R1).
    pub nonces: BTreeMap<NodeId, u64>,
    /// The epoch at which the attachments of a lockspace last changed, for lockspaces with attachments or debts. A
    /// [`Proof::Rebuilt`](crate::Proof::Rebuilt) counts only for this epoch or a later one (R7).
    pub lockspaces: BTreeMap<String, Epoch>,
    /// What this record was made for.
    pub cause: Cause,
    /// Who reported what, and how it was counted: why this record was proposed.
    pub evidence: Evidence,
}

/// What a record was made for: the answer to "why this view".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// `quorate cluster create`.
    Created,
    /// These lives failed: nothing was heard of them for the detection time, or a newer life of the node came up.
    Failed(BTreeSet<Identity>),
    /// These lives were removed because they kept the others from forming a full mesh (R3).
    NoMesh(BTreeSet<Identity>),
    /// These lives missed the deadline of a recovery stage (R7).
    MissedStage(BTreeSet<Identity>),
    /// These lives came in.
    Joined(BTreeSet<Identity>),
    /// The leader changed the voter set to fit the roster and the quorum options.
    Voters,
    /// These voters were away for the last-man-standing window: the rest, being quorate, goes on without their votes (R5).
    LastManStanding(BTreeSet<NodeId>),
    /// A witness came up in this life. It votes and is no member.
    Witness(Identity),
    /// All members and voters speak a newer version of the protocols.
    Version {
        /// Before.
        from: u8,
        /// From this record on.
        to: u8,
    },
    /// A person declared that these nodes are off and gave the rest the quorum. **Not decided by a majority**: outside the
    /// guarantees of everything here.
    Forced {
        /// The life that made the record.
        by: Identity,
        /// The person, as the admin socket knows it, and the reason given.
        word: String,
        /// Whom the person declared to be off.
        off: BTreeSet<NodeId>,
    },
    /// A member asked for it; `number` counts that member's requests.
    Request {
        /// Who.
        by: Identity,
        /// Its request number.
        number: u64,
    },
}

/// A node that may become a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RosterEntry {
    /// The name in its certificate, for people and for TLS.
    pub name: String,
    /// SHA-256 of the certificate's public key (SubjectPublicKeyInfo).
    pub key: [u8; 32],
    /// Whether it is meant to vote.
    pub role: Role,
    /// Where it listens, `IP:PORT`, best first.
    pub addresses: Vec<String>,
}

/// What a roster entry is meant to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Becomes an acceptor once a voter-set change admits it.
    Voter,
    /// Watches and locks, never votes.
    Observer,
    /// Votes and never becomes a member: an arbiter (R5).
    Witness,
}

/// The acceptors of the next record with their votes (R4), and the tie breaker (R5).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterSet {
    /// Node, the state directory that holds its promises, and its votes.
    pub voters: BTreeMap<NodeId, Voter>,
    /// This node has half a vote more.
    pub tie_breaker: Option<NodeId>,
    /// The set counts as if it had at least so many votes; those that nobody has are never cast. Zero: as many as it has.
    pub expected: u32,
}

/// One acceptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voter {
    /// The state directory its promises are in. The same node with another directory is another acceptor.
    pub state: StateId,
    /// How many votes it has; zero votes are allowed and never help.
    pub votes: u32,
}

/// A storage server as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerEntry {
    /// The name in its certificate.
    pub name: String,
    /// Where its fence service and its exports are, `IP:PORT`.
    pub address: String,
}

/// What an attachment is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ResourceKind {
    /// A lockspace of the lock manager.
    Lockspace,
    /// A mounted filesystem with its journal.
    Filesystem,
    /// A block device of a storage server.
    BlockDevice,
    /// A service of the failover manager.
    Service,
}

/// Something that can be attached to: a kind and a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResourceId {
    /// What it is.
    pub kind: ResourceKind,
    /// Its name, at most [`RESOURCE_NAME_BYTES_MAX`] bytes.
    pub name: String,
}

/// The longest name of a resource, in bytes.
pub const RESOURCE_NAME_BYTES_MAX: usize = 128;

impl ResourceId {
    /// The resource of this kind and name.
    #[must_use]
    pub fn new(kind: ResourceKind, name: impl Into<String>) -> Self {
        Self { kind, name: name.into() }
    }
}

impl core::fmt::Display for ResourceId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let kind = match self.kind {
            ResourceKind::Lockspace => "lockspace",
            ResourceKind::Filesystem => "filesystem",
            ResourceKind::BlockDevice => "device",
            ResourceKind::Service => "service",
        };
        write!(f, "{kind} {}", self.name)
    }
}

/// What must be proven before somebody else may act in the place of a removed life (R14, R20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Safety {
    /// Its lease and kill time are over.
    Lease,
    /// Every storage server of the attachment confirmed the fence, and the lease is over.
    Storage,
    /// The machine was verified to be off.
    Power,
}

/// A decided right to use a resource (R6). Decided before the first grant, write or start; removed after the last.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// Whose it is.
    pub owner: Identity,
    /// To what.
    pub resource: ResourceId,
    /// What it needs when the owner fails.
    pub safety: Safety,
    /// The storage servers that hold its devices; the fence must be installed at each of them.
    pub servers: BTreeSet<ServerId>,
    /// The journal a filesystem attachment owns; `None` for other kinds and for read-only mounts.
    pub journal: Option<u32>,
    /// The lockspace whose holds protect this resource until it is recovered; names a `Lockspace` resource.
    pub lockspace: Option<String>,
    /// Whether nobody else may be attached.
    pub exclusive: bool,
}

/// How far the recovery of one debt item has come (R7). Ordered: each stage implies those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// Nothing is proven yet.
    Open,
    /// The life cannot do harm any more, at the level its attachment needs.
    Fenced,
    /// Fenced, and the lockspace's locks are rebuilt among the survivors.
    Rebuilt,
    /// Also the journal is replayed; holds may be dropped.
    Replayed,
}

/// What one removed life left behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// The first epoch without it.
    pub removed: Epoch,
    /// Its attachments, each with the proven stage. Never empty: the debt goes with its last item.
    pub items: BTreeMap<ResourceId, DebtItem>,
}

/// One attachment of a removed life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebtItem {
    /// As it was attached.
    pub attachment: Attachment,
    /// What is proven to be over at the attachment's own safety level (storage, lease or power).
    pub fenced: bool,
    /// Locks of this lockspace are rebuilt (lockspace items), or of the lockspace it names (filesystem items).
    pub rebuilt: bool,
    /// Attached members that have rebuilt their part so far, each with the epoch it did so for (lockspace items).
    pub rebuilt_by: BTreeMap<Identity, Epoch>,
}

impl DebtItem {
    /// The stage this item has reached.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match (self.fenced, self.rebuilt) {
            (false, _) => Stage::Open,
            (true, false) => Stage::Fenced,
            (true, true) => Stage::Rebuilt,
        }
    }
}

impl View {
    /// A record with nobody and nothing in it: epoch zero, which is never decided. For tests and as a start.
    #[must_use]
    pub fn empty(cluster: ClusterId) -> Self {
        Self {
            cluster,
            epoch: Epoch(0),
            members: BTreeMap::new(),
            roster: BTreeMap::new(),
            voters: VoterSet::default(),
            quorum: QuorumOptions::default(),
            version: crate::machine::Versions::FIRST,
            trust: Trust::default(),
            servers: BTreeMap::new(),
            attachments: BTreeSet::new(),
            debts: BTreeMap::new(),
            lives: BTreeMap::new(),
            nonces: BTreeMap::new(),
            lockspaces: BTreeMap::new(),
            cause: Cause::Created,
            evidence: Evidence::default(),
        }
    }

    /// Members, each in its life, in order of node id.
    pub fn identities(&self) -> impl Iterator<Item = Identity> {
        self.members.iter().map(|(n, i)| Identity::new(*n, *i))
    }

    /// The identity of a member.
    #[must_use]
    pub fn identity(&self, node: NodeId) -> Option<Identity> {
        self.members.get(&node).map(|i| Identity::new(node, *i))
    }

    /// Whether exactly this life is a member.
    #[must_use]
    pub fn contains(&self, who: Identity) -> bool {
        self.members.get(&who.node) == Some(&who.incarnation)
    }

    /// Members attached to `resource`, in order of node id.
    pub fn attached<'a>(&'a self, resource: &'a ResourceId) -> impl Iterator<Item = &'a Attachment> {
        self.attachments.iter().filter(move |a| a.resource == *resource)
    }

    /// Debts with an item for `resource`, oldest identity first.
    pub fn owing<'a>(&'a self, resource: &'a ResourceId) -> impl Iterator<Item = (Identity, &'a DebtItem)> {
        self.debts.iter().filter_map(move |(who, d)| d.items.get(resource).map(|i| (*who, i)))
    }
}
