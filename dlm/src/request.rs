//! What is asked of a lockspace: new locks, conversions and unlocks, with their options.

use crate::{LockName, Mode, Range, ValueBlock};
use core::fmt;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// The longest time a request may wait, where it says one.
pub(crate) const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

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
    /// The lock outlives its owner (not its node) as an orphan; see [`crate::Lockspace::close_owner`].
    pub const PERSISTENT: Self = Self(0x80);
    /// Never the victim of a deadlock. Where every wait of a deadlock has it, nobody gets an error and all wait on.
    pub const NODLCKWT: Self = Self(0x100);
    /// A new NL lock is granted at once.
    pub const EXPEDITE: Self = Self(0x400);
    /// With NOQUEUE: still tell the holders.
    pub const NOQUEUEBAST: Self = Self(0x800);
    /// Queue at the head.
    pub const HEADQUE: Self = Self(0x1000);
    /// Grant as soon as compatible, out of order.
    pub const NOORDER: Self = Self(0x2000);
    /// Take over an orphan of this node with this name: the mode must be its mode. The answer is a grant of what it has.
    pub const ORPHAN: Self = Self(0x4000);
    /// If not grantable at once, try PR.
    pub const ALTPR: Self = Self(0x8000);
    /// If not grantable at once, try CW.
    pub const ALTCW: Self = Self(0x1_0000);
    /// Unlock whatever the lock's state. Implied: an unlock ends what the lock waits for.
    pub const FORCEUNLOCK: Self = Self(0x2_0000);
    /// Accepted and without effect: no wait here blocks the process (libdlm's NODLCKBLK).
    pub const NODLCKBLK: Self = Self(0x200);
    /// Give up after the request's timeout, which must be there.
    pub const TIMEOUT: Self = Self(0x4_0000);
    /// Ours: pass through the holds of a failed node; for recovery participants (R14).
    pub const RECOVERY: Self = Self(0x100_0000);
    /// Ours: fail with `Recovering` rather than wait for the recovery of a failed node.
    pub const NORECOVERYWAIT: Self = Self(0x200_0000);

    /// Ours: a POSIX file lock. The request cuts what its owner has on the resource anew in one step, NL ends what lies
    /// in the range; what is granted belongs to the owner and not to the request (R16). See [`posix`](crate::posix).
    pub const POSIX: Self = Self(0x400_0000);
    /// Ours, with POSIX: only say who stands against it ([`crate::Completion::Held`]); NL granted if nobody does.
    pub const TEST: Self = Self(0x800_0000);
    /// Ours: the unlock of a granted lock that writes no value block is over at once for this node, and its master is
    /// told without an answer. If the master fails before it hears of it, the lock is gone all the same. Where that is
    /// not possible (an operation is pending, the master is not known) it is an ordinary unlock.
    pub const RELEASE: Self = Self(0x1000_0000);

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
    /// Who asks within the node: a process, a file owner. The low 32 bits are its process id, for displays and
    /// [`crate::Lockspace::purge`]. The deadlock search takes all locks of one owner on this node, in all lockspaces, as
    /// one user that gives nothing up while it waits. 0: nobody in particular; the lock stands for itself.
    pub owner: u64,
    /// How long it may wait, at most a day. `None`: for ever. Over, it ends with [`crate::Completion::TimedOut`].
    pub timeout: Option<Duration>,
    /// The weight of this wait in a deadlock: the lowest is the victim, among equals the youngest. 0 by default.
    pub priority: i8,
}

impl LockRequest {
    /// A lock of the whole resource without options.
    #[must_use]
    pub fn new(name: LockName, mode: Mode) -> Self {
        Self { name, mode, range: Range::ALL, flags: Flags::NONE, owner: 0, timeout: None, priority: 0 }
    }

    /// With these options.
    #[must_use]
    pub fn flags(mut self, flags: Flags) -> Self {
        self.flags = flags;
        self
    }

    /// For this owner.
    #[must_use]
    pub fn owner(mut self, owner: u64) -> Self {
        self.owner = owner;
        self
    }
}

/// A change of a granted lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertRequest {
    /// To which mode.
    pub mode: Mode,
    /// To which part of the resource; `None`: the same as now. Until the conversion is granted the lock covers what it
    /// covers, in its old mode.
    pub range: Option<Range>,
    /// Options.
    pub flags: Flags,
    /// The value block to write, where the conversion writes one (VALBLK, from PW or EX).
    pub value: Option<ValueBlock>,
    /// As in [`LockRequest::timeout`]; the lock keeps its mode.
    pub timeout: Option<Duration>,
    /// As in [`LockRequest::priority`].
    pub priority: i8,
}

impl ConvertRequest {
    /// Another mode, the same range, no options.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self { mode, range: None, flags: Flags::NONE, value: None, timeout: None, priority: 0 }
    }

    /// With these options.
    #[must_use]
    pub fn flags(mut self, flags: Flags) -> Self {
        self.flags = flags;
        self
    }

    /// With this value block to write, or none.
    #[must_use]
    pub fn value(mut self, value: impl Into<Option<ValueBlock>>) -> Self {
        self.value = value.into();
        self
    }

    /// To this part of the resource.
    #[must_use]
    pub fn range(mut self, range: Range) -> Self {
        self.range = Some(range);
        self
    }
}

impl UnlockRequest {
    /// An unlock that is over when the call returns: see [`Flags::RELEASE`].
    #[must_use]
    pub fn release() -> Self {
        Self { flags: Flags::RELEASE, value: None }
    }
}

/// The end of a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnlockRequest {
    /// VALBLK, IVVALBLK, FORCEUNLOCK, RELEASE.
    pub flags: Flags,
    /// The value block to write (VALBLK, from PW or EX).
    pub value: Option<ValueBlock>,
}
