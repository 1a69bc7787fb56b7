//! Glocks: which lock covers what, and the 24-byte names by which the lock manager knows them (gfs2.md 10.1).

use super::Inner;
use crate::FsError;
use crate::format::BlockNo;
use quorate_dlm::LockName;
use quorate_dlm::cache::{AcquireError, AcquireFlags, CacheMode, Held};

/// The type of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Kind {
    /// Locks of the filesystem as a whole, by small numbers.
    Nondisk = 1,
    /// An inode: its metadata and data. By dinode block.
    Inode = 2,
    /// A resource group: header and bitmap. By header block.
    Rgrp = 3,
    /// Held shared while the inode is in use on a node, exclusive to delete it.
    Iopen = 5,
    /// `flock` of an inode.
    Flock = 6,
    /// fcntl locks of an inode: a range lock for each owner, never cached.
    Posix = 7,
    /// A journal, by its number.
    Journal = 9,
}

/// A lock: its type and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Glock {
    pub(super) kind: Kind,
    pub(super) number: u64,
}

impl Glock {
    /// Held shared while mounted.
    pub(super) const LIVE: Self = Self { kind: Kind::Nondisk, number: 1 };
    /// Held shared while mounted; who freezes the filesystem wants it exclusively.
    pub(super) const FREEZE: Self = Self { kind: Kind::Nondisk, number: 2 };
    /// Held exclusively for renames between directories.
    pub(super) const RENAME: Self = Self { kind: Kind::Nondisk, number: 3 };

    pub(super) fn inode(block: BlockNo) -> Self {
        Self { kind: Kind::Inode, number: block.0 }
    }
    pub(super) fn rgrp(block: BlockNo) -> Self {
        Self { kind: Kind::Rgrp, number: block.0 }
    }
    pub(super) fn iopen(block: BlockNo) -> Self {
        Self { kind: Kind::Iopen, number: block.0 }
    }
    pub(super) fn flock(block: BlockNo) -> Self {
        Self { kind: Kind::Flock, number: block.0 }
    }
    pub(super) fn posix(block: BlockNo) -> Self {
        Self { kind: Kind::Posix, number: block.0 }
    }
    pub(super) fn journal(jid: u32) -> Self {
        Self { kind: Kind::Journal, number: u64::from(jid) }
    }

    pub(super) fn name(self) -> LockName {
        let text = format!("{:8x}{:16x}", self.kind as u8, self.number);
        LockName::new(text.as_bytes()).expect("24 bytes are within the limit")
    }

    /// The lock of a name, if it is one of ours.
    pub(super) fn parse(name: &LockName) -> Option<Self> {
        let text = core::str::from_utf8(name.as_bytes()).ok().filter(|text| text.len() == 24)?;
        let (kind, number) = text.split_at_checked(8)?;
        let kind = match kind.trim_start() {
            "1" => Kind::Nondisk,
            "2" => Kind::Inode,
            "3" => Kind::Rgrp,
            "5" => Kind::Iopen,
            "6" => Kind::Flock,
            "7" => Kind::Posix,
            "9" => Kind::Journal,
            _ => return None,
        };
        // The standard library takes a sign, which nobody writes.
        let number = Some(number.trim_start()).filter(|n| !n.starts_with('+'))?;
        Some(Self { kind, number: u64::from_str_radix(number, 16).ok()? })
    }
}

/// Whether a lock of this name has a value block: inodes, resource groups and quotas do.
pub(crate) fn has_value_block(name: &LockName) -> bool {
    matches!(name.as_bytes().get(..8), Some(b"       2" | b"       3" | b"       8"))
}

impl Inner {
    /// Takes a lock and waits for it.
    pub(super) async fn lock(&self, glock: Glock, mode: CacheMode) -> Result<Held, FsError> {
        self.lock_with(glock, mode, AcquireFlags::default()).await
    }

    pub(super) async fn lock_with(
        &self,
        glock: Glock,
        mode: CacheMode,
        flags: AcquireFlags,
    ) -> Result<Held, FsError> {
        self.check()?;
        let held = self.cache().acquire(&glock.name(), mode, flags).await.map_err(lock_error)?;
        // While waiting this node may have withdrawn.
        self.check()?;
        Ok(held)
    }

    /// Takes a lock if nobody else has to give it up for that.
    pub(super) async fn try_lock(&self, glock: Glock, mode: CacheMode, nudge: bool) -> Result<Held, FsError> {
        self.lock_with(glock, mode, AcquireFlags { try_now: true, nudge, ..Default::default() }).await
    }
}

fn lock_error(error: AcquireError) -> FsError {
    match error {
        AcquireError::WouldBlock | AcquireError::Recovering => FsError::WouldBlock,
        AcquireError::Stopped(reason) => {
            tracing::debug!(reason, "no lock");
            FsError::NoLease
        }
        other => FsError::Withdrawn(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_24_bytes_and_go_both_ways() {
        for (glock, text) in [
            (Glock::inode(BlockNo(0x1230)), "       2            1230"),
            (Glock::iopen(BlockNo(0x818)), "       5             818"),
            (Glock { kind: Kind::Nondisk, number: 4 }, "       1               4"),
            (Glock::journal(0), "       9               0"),
        ] {
            assert_eq!(glock.name().as_bytes(), text.as_bytes());
            assert_eq!(Glock::parse(&glock.name()), Some(glock));
        }
        assert!(has_value_block(&Glock::rgrp(BlockNo(1)).name()));
        assert!(!has_value_block(&Glock::iopen(BlockNo(1)).name()));
        for none in [&b"x"[..], b"       2           +1230"] {
            assert_eq!(Glock::parse(&LockName::new(none).unwrap()), None);
        }
    }

    #[test]
    fn damaged_names_are_a_glock_or_none_and_never_a_panic() {
        let mut rng = quorate_membership::Rng::new(3);
        let (mut taken, mut refused) = (0, 0);
        for round in 0..20_000_u64 {
            let mut bytes = Glock::inode(BlockNo(round * 77)).name().as_bytes().to_vec();
            quorate_membership::sim::damage(&mut bytes, &mut rng);
            let Ok(name) = LockName::new(&bytes) else { continue };
            match Glock::parse(&name) {
                Some(glock) => {
                    taken += 1;
                    assert_eq!(Glock::parse(&glock.name()), Some(glock));
                }
                None => refused += 1,
            }
        }
        assert!(100 < taken && 100 < refused, "{taken} taken, {refused} refused");
    }
}
