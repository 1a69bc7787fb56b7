//! The face of the lock manager: names, value blocks, tokens, requests and their outcomes, and the traits.
//!
//! Two implementations stand behind the traits: the distributed one, and `local`, a complete lock
//! manager of one node.

use crate::Mode;
use core::fmt;
use quorate_membership::{BoxFuture, Epoch};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The longest name of a resource, in bytes. Names are bytes, not text; the empty one is allowed.
pub const NAME_BYTES_MAX: usize = 64;

/// The name of a resource within its lockspace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct LockName(Box<[u8]>);

/// A name of more than [`NAME_BYTES_MAX`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a resource name of {0} bytes is above the limit of {NAME_BYTES_MAX}")]
pub struct NameTooLong(pub usize);

impl LockName {
    /// Checks the length.
    ///
    /// # Errors
    /// The name is too long.
    pub fn new(bytes: &[u8]) -> Result<Self, NameTooLong> {
        if NAME_BYTES_MAX < bytes.len() { Err(NameTooLong(bytes.len())) } else { Ok(Self(bytes.into())) }
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Vec<u8>> for LockName {
    type Error = NameTooLong;
    fn try_from(bytes: Vec<u8>) -> Result<Self, NameTooLong> {
        Self::new(&bytes)
    }
}

impl From<LockName> for Vec<u8> {
    fn from(name: LockName) -> Self {
        name.0.into_vec()
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

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
}

/// Options of requests, named as in libdlm without `LKF_`. A set of bits with libdlm's values.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Flags(pub u32);

impl Flags {
    /// None.
    pub const NONE: Self = Self(0);
    /// Fail with `Again` rather than wait.
    pub const NOQUEUE: Self = Self(0x1);
    /// Take part in the transfer of the value block.
    pub const VALBLK: Self = Self(0x8);
    /// A conversion waits its turn behind queued conversions.
    pub const QUECVT: Self = Self(0x10);
    /// Leaving PW or EX marks the value block invalid instead of writing it.
    pub const IVVALBLK: Self = Self(0x20);
    /// On a conversion deadlock demote to NL and stay queued.
    pub const CONVDEADLK: Self = Self(0x40);
    /// The lock outlives its process as an orphan.
    pub const PERSISTENT: Self = Self(0x80);
    /// Never the victim of a conversion deadlock.
    pub const NODLCKWT: Self = Self(0x100);
    /// A new NL lock is granted at once.
    pub const EXPEDITE: Self = Self(0x400);
    /// With NOQUEUE: still tell the holders.
    pub const NOQUEUEBAST: Self = Self(0x800);
    /// Queue at the head.
    pub const HEADQUE: Self = Self(0x1000);
    /// Grant as soon as compatible, out of order.
    pub const NOORDER: Self = Self(0x2000);
    /// Take over an orphan.
    pub const ORPHAN: Self = Self(0x4000);
    /// If not grantable at once, try PR.
    pub const ALTPR: Self = Self(0x8000);
    /// If not grantable at once, try CW.
    pub const ALTCW: Self = Self(0x1_0000);
    /// Unlock whatever the lock's state.
    pub const FORCEUNLOCK: Self = Self(0x2_0000);
    /// Ours: pass through the holds of a failed node; for recovery participants (R14).
    pub const RECOVERY: Self = Self(0x100_0000);
    /// Ours: fail with `Recovering` rather than wait for the recovery of a failed node.
    pub const NORECOVERYWAIT: Self = Self(0x200_0000);

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl core::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flags({:#x})", self.0)
    }
}

/// A new lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockRequest {
    /// On which resource.
    pub name: LockName,
    /// In which mode.
    pub mode: Mode,
    /// On which part; conflicts need overlapping ranges.
    pub range: Range,
    /// Options.
    pub flags: Flags,
    /// Who asks within the node, for displays and deadlock search: a process id, a file owner.
    pub owner: u64,
}

impl LockRequest {
    /// A lock of the whole resource without options.
    #[must_use]
    pub fn new(name: LockName, mode: Mode) -> Self {
        Self { name, mode, range: Range::ALL, flags: Flags::NONE, owner: 0 }
    }

    /// With these options.
    #[must_use]
    pub fn flags(mut self, flags: Flags) -> Self {
        self.flags = flags;
        self
    }
}

/// A change of a granted lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertRequest {
    /// To which mode.
    pub mode: Mode,
    /// Options.
    pub flags: Flags,
    /// The value block to write, where the conversion writes one (VALBLK, from PW or EX).
    pub value: Option<ValueBlock>,
}

/// The end of a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnlockRequest {
    /// VALBLK, IVVALBLK, FORCEUNLOCK.
    pub flags: Flags,
    /// The value block to write (VALBLK, from PW or EX).
    pub value: Option<ValueBlock>,
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
    /// The lockspace was stopped (this life of the node is over). The lock is gone.
    Stopped,
}

/// A granted lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// In which mode; another than asked for with ALTPR or ALTCW.
    pub mode: Mode,
    /// Proof of order.
    pub token: FencingToken,
    /// The value block, where the operation reads one.
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
    /// There is no such lock.
    #[error("no such lock")]
    NotFound,
    /// The lockspace is stopped on this node.
    #[error("the lockspace is stopped on this node")]
    Stopped,
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
    /// How long value blocks are.
    fn value_bytes(&self) -> usize;
    /// Asks for a lock.
    ///
    /// # Errors
    /// See [`LockError`].
    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError>;
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

/// How a lockspace is joined. All members must agree on all of it but `participant`.
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
    /// This node is not in the lockspace.
    #[error("this node is not in lockspace {0}")]
    NotJoined(String),
}
