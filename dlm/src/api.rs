//! The face of the lock manager: names, value blocks, tokens, requests and their outcomes, and the traits.
//!
//! Two implementations stand behind the traits: the distributed one, and `local`, a complete lock
//! manager of one node.

use crate::{ConvertRequest, LockRequest, Mode, UnlockRequest};
use quorate_membership::{BoxFuture, Epoch, NodeId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The bytes that live with a resource as long as anybody holds a lock on it. The size is the lockspace's (32 by default).
pub type ValueBlock = Vec<u8>;

/// Proof of order, given with every grant: of two grants of one resource the later has the higher token (also after
/// recovery and moves of mastery). A resource outside refuses a token below the highest it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FencingToken {
    /// The epoch of the grant.
    pub epoch: u64,
    /// Counts the resource's grants.
    pub sequence: u64,
}

impl FencingToken {
    /// The token of grant number `sequence` in `epoch`.
    #[must_use]
    pub fn new(epoch: Epoch, sequence: u64) -> Self {
        Self { epoch: epoch.0, sequence }
    }
}

/// A lock of this node in one lockspace. Never reused while the node lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockId(pub u64);

/// What a lock covers of its resource: bytes from `start` up to and including `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Last byte; not below `start`.
    pub end: u64,
}

impl Range {
    /// Everything. What a lock without a range covers.
    pub const ALL: Self = Self { start: 0, end: u64::MAX };

    /// Whether the two have a byte in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether every byte of `other` is in it.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The bytes in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let both = Self { start: self.start.max(other.start), end: self.end.min(other.end) };
        self.overlaps(other).then_some(both)
    }
}

/// How an operation ended. Exactly one comes for every operation that was taken on; but an unlock ends what the lock
/// was waiting for, and then only the unlock's comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completion {
    /// Granted, or converted.
    Granted(Grant),
    /// NOQUEUE and not grantable. A new lock is gone, a converted one keeps its mode.
    Again,
    /// Deadlock; the lock keeps its mode, a new one is gone.
    Deadlock,
    /// Withdrawn by a cancel. A new lock is gone, a converted one keeps its mode.
    Cancelled,
    /// Unlocked; the lock is gone.
    Unlocked,
    /// NORECOVERYWAIT, and the name may be held by a failed node. As for `Again`.
    Recovering,
    /// The request's time was over before it was granted. As for `Again`.
    TimedOut,
    /// The lockspace was stopped (this life of the node is over). The lock is gone.
    Stopped,
    /// POSIX with TEST: this one stands against it.
    Held(Holder),
}

/// Who has a lock that another request is held up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The life of the node.
    pub node: quorate_membership::Identity,
    /// Who within the node; the low 32 bits are the process.
    pub owner: u64,
    /// The mode in force.
    pub mode: Mode,
    /// On which part.
    pub range: Range,
}

/// A granted lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// In which mode; another than asked for with ALTPR or ALTCW.
    pub mode: Mode,
    /// Proof of order.
    pub token: FencingToken,
    /// The value block, where the operation reads one.
    ///
    /// What is read in PR or above is the last write, always. NL and CR shut no writer out: it is the last write of some
    /// moment of the request, but a node that was removed from the cluster, has not heard of it and is not fenced yet may
    /// read what was there at its removal.
    pub value: Option<ValueBlock>,
    /// With VALBLK: the value block is not valid, its last writer may have been lost.
    pub value_invalid: bool,
    /// Granted in the alternative mode.
    pub alt_mode: bool,
    /// Was demoted to NL in between (CONVDEADLK).
    pub demoted: bool,
}

/// Why an operation was not taken on. Nothing changed, and no completion comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Flags that do not go together, or a value block of another size.
    #[error("invalid request: {0}")]
    Invalid(&'static str),
    /// Another operation is pending on the lock.
    #[error("another operation is pending on the lock")]
    Busy,
    /// There is no such lock; or, for a request with ORPHAN, no orphan of that name on this node.
    #[error("no such lock")]
    NotFound,
    /// ORPHAN: there is an orphan of that name, but none in the mode asked for (libdlm's EAGAIN).
    #[error("the orphan has another mode")]
    OtherMode,
    /// The lockspace is stopped on this node.
    #[error("the lockspace is stopped on this node")]
    Stopped,
    /// This node has as many locks in the lockspace as can be numbered: millions in each of its sixteen shards.
    #[error("this node has as many locks in the lockspace as can be numbered")]
    Full,
}

/// Told what becomes of a lock. Calls for one lock come one at a time; they must not block, and may come before the call
/// that started the operation has returned. They may call the lockspace.
pub trait LockCallbacks: Send + Sync {
    /// An operation ended.
    fn completion(&self, id: LockId, completion: Completion);
    /// Somebody waits who needs `mode`. A hint, and one may come late.
    fn blocking(&self, id: LockId, mode: Mode);
}

/// A set of resources that are locked by one group of users.
pub trait Lockspace: Send + Sync {
    /// Its name.
    fn name(&self) -> &str;
    /// This life of this node, where the lockspace knows it.
    fn me(&self) -> Option<quorate_membership::Identity> {
        None
    }
    /// How long value blocks are.
    fn value_bytes(&self) -> usize;
    /// Asks for a lock.
    ///
    /// # Errors
    /// See [`LockError`].
    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError>;
    /// Does `work`, once, with this lockspace; what it sends to other nodes may be kept until it is done and sent together.
    /// `work` must not block.
    fn corked(&self, work: &mut dyn FnMut(&dyn Lockspace));
    /// Changes the mode of a granted lock.
    ///
    /// # Errors
    /// See [`LockError`].
    fn convert(&self, id: LockId, request: ConvertRequest) -> Result<(), LockError>;
    /// Ends a lock.
    ///
    /// # Errors
    /// See [`LockError`].
    fn unlock(&self, id: LockId, request: UnlockRequest) -> Result<(), LockError>;
    /// Withdraws what is pending on a lock; without effect if nothing is.
    ///
    /// # Errors
    /// See [`LockError`].
    fn cancel(&self, id: LockId) -> Result<(), LockError>;
    /// An owner within this node has ended: its locks are given up, what it waits for is withdrawn. A value block that it
    /// might have been writing (PW or EX with VALBLK) becomes invalid. Locks with PERSISTENT become orphans: they stay,
    /// are told of nothing any more, and are adopted by a request with ORPHAN or ended by [`Self::purge`]. `owner` is not 0.
    fn close_owner(&self, owner: u64);
    /// Ends the orphans that `node` has in this lockspace: of process `pid` (the low 32 bits of their owner), or all of
    /// them with 0. Locks of living owners are not touched.
    fn purge(&self, node: NodeId, pid: u32);
}

/// Opens lockspaces.
pub trait LockManager: Send + Sync {
    /// Joins a lockspace, creating it if nobody has it. Resolves when the first recovery that includes this node is done.
    fn join<'a>(
        &'a self,
        options: &'a LockspaceOptions,
    ) -> BoxFuture<'a, Result<Arc<dyn Lockspace>, JoinError>>;
    /// Leaves it cleanly: every lock of this node must be gone, mastery and directory buckets move away first.
    fn leave<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), JoinError>>;
}

/// When the mastery of a resource moves to another node (R15). Each node decides for what it masters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveOptions {
    /// After so many requests and conversions in a row by one other node, none by anybody else between them; 0: never.
    /// 16 by default. A move costs about as much as six requests to another node, so a lower number pays only where users
    /// seldom change; a higher one leaves the resource longer with a node that does not use it.
    pub after: u16,
    /// For so long it stays where it came to, in milliseconds; 500 by default. Limits how often a resource that two nodes
    /// use by turns, each for long, is under way.
    pub rest_ms: u32,
}

impl MoveOptions {
    /// Mastery stays with the first user until nobody has or wants the resource.
    pub const NEVER: Self = Self { after: 0, rest_ms: 0 };
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self { after: 16, rest_ms: 500 }
    }
}

/// How a lockspace is joined. All members must agree on all of it but `moves`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockspaceOptions {
    /// Its name, up to 64 bytes.
    pub name: String,
    /// The size of value blocks, 1 to 256 bytes; 32 by default.
    pub value_bytes: usize,
    /// What must be proven before a dead member's locks are given to others (R14).
    pub safety: quorate_membership::Safety,
    /// The storage servers that hold the devices the locks protect.
    pub servers: std::collections::BTreeSet<quorate_membership::ServerId>,
    /// A dead node's locks in this mode or stronger become holds, dropped when its debt's `Replayed` stage is decided.
    /// `None`: no holds.
    pub holds: Option<Mode>,
    /// When mastery moves away from this node.
    pub moves: MoveOptions,
}

impl LockspaceOptions {
    /// A lockspace for plain users: lease safety, 32-byte value blocks, no holds.
    #[must_use]
    pub fn plain(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value_bytes: 32,
            safety: quorate_membership::Safety::Lease,
            servers: Default::default(),
            holds: None,
            moves: MoveOptions::default(),
        }
    }
}

/// Why a lockspace was not joined or left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// A name that is too long, or a value block size out of range.
    #[error("invalid lockspace options: {0}")]
    Invalid(&'static str),
    /// The members use other options.
    #[error("lockspace {name}: members use {theirs}, asked for {ours}")]
    Mismatch {
        /// The lockspace.
        name: String,
        /// Their options.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The cluster refused the attachment.
    #[error("lockspace {name}: {source}")]
    Refused {
        /// The lockspace.
        name: String,
        /// Why.
        source: quorate_membership::RequestError,
    },
    /// Locks of this node are left.
    #[error("lockspace {name}: {locks} locks of this node are left")]
    Busy {
        /// The lockspace.
        name: String,
        /// How many.
        locks: usize,
    },
    /// The lock service of this host does not open it.
    #[error("lockspace {name}: {reason}")]
    Service {
        /// The lockspace.
        name: String,
        /// Why.
        reason: String,
    },
    /// This node is not in the lockspace.
    #[error("this node is not in lockspace {0}")]
    NotJoined(String),
}
