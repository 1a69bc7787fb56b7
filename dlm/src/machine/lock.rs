//! One lock as its master knows it.

use crate::{FencingToken, Flags, LockId, Mode, Range, ValueBlock};
use quorate_membership::{Identity, Instant};
use serde::{Deserialize, Serialize};

/// Which lock: the life of a node that has it, and that node's own number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct LockKey {
    /// Whose.
    pub(crate) node: Identity,
    /// Its number there.
    pub(crate) id: LockId,
}

/// What a lock waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    /// The mode asked for.
    pub(crate) mode: Mode,
    /// What it is to cover.
    pub(crate) range: Range,
    /// The operation's flags.
    pub(crate) flags: Flags,
    /// The value block it writes when granted.
    pub(crate) value: Option<ValueBlock>,
    /// CONVDEADLK has struck.
    pub(crate) demoted: bool,
    /// The holder's number for the operation; its completion carries it.
    pub(crate) op: u32,
    /// Its weight in a deadlock: the lowest loses.
    pub(crate) priority: i8,
}

/// A lock on one of the three queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lock {
    /// Which.
    pub(crate) key: LockKey,
    /// Who has it within its node.
    pub(crate) owner: u64,
    /// What it covers; for a new lock that waits, what it is to cover.
    pub(crate) range: Range,
    /// The mode in force. `None` exactly on the wait queue.
    pub(crate) granted: Option<Mode>,
    /// What it waits for. `None` exactly on the granted queue.
    pub(crate) pending: Option<Box<Pending>>,
    /// Of the grant in force.
    pub(crate) token: FencingToken,
    /// The strongest mode the holder was told it blocks, since its own mode changed last ("highbast").
    pub(crate) told: Option<Mode>,
    /// Whether its last operation took part in the transfer of the value block.
    pub(crate) uses_value: bool,
    /// Granted in passing through a hold (RECOVERY): it says nothing about what the dead node has.
    pub(crate) recovery: bool,
    /// Its node failed and may still act under the lock, or the lock is a hold (R14).
    pub(crate) dead: bool,
    /// A piece of a POSIX owner, or a request for one (R16).
    pub(crate) posix: bool,
    /// Since when, on the master's clock, it has what it has or waits for what it waits for.
    pub(crate) since: Instant,
}

const _: () = assert!(size_of::<Lock>() <= 96, "a lock that waits for nothing is short");

impl Lock {
    /// A new one that has nothing and waits for nothing yet.
    pub(crate) fn new(key: LockKey, owner: u64, range: Range, now: Instant) -> Self {
        Self {
            key,
            owner,
            range,
            granted: None,
            pending: None,
            token: FencingToken::default(),
            told: None,
            uses_value: false,
            recovery: false,
            dead: false,
            since: now,
            posix: false,
        }
    }

    /// What it waits to cover, or covers.
    pub(crate) fn wanted(&self) -> Range {
        self.pending.as_ref().map_or(self.range, |p| p.range)
    }

    /// Whether its mode in force stands against `mode` on `range`.
    pub(crate) fn conflicts(&self, mode: Mode, range: Range) -> bool {
        self.granted.is_some_and(|g| !g.is_compatible(mode)) && self.range.overlaps(range)
    }
}
