//! fcntl locks between nodes: range locks of the lock manager, one resource per inode (type 7).
//!
//! Linux hands them to a daemon that multicasts each request; here the master of the inode's name decides, which is
//! this node if it was the first to lock the file.

use super::Inner;
use super::glock::Glock;
use crate::FsError;
use crate::face::{Handle, Ino, LockKind, LockOwner, PosixHolder, PosixLock, Wait};
use crate::format::BlockNo;
use quorate_dlm::posix::{Kind, Owner, PosixError, PosixLocks};
use quorate_dlm::{LockName, Lockspace, Mode, Range};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The fcntl locks of this node.
#[derive(Debug)]
pub(super) struct Posix {
    locks: PosixLocks,
    /// Through which handle an owner asked last: the locks of an open file description end with that handle, and nobody
    /// says so but its release.
    through: Mutex<BTreeMap<(Ino, LockOwner), Handle>>,
}

fn name(ino: Ino) -> LockName {
    Glock::posix(BlockNo(ino.0)).name()
}

fn wanted(lock: PosixLock) -> Result<(Kind, Range), FsError> {
    let kind = match lock.kind {
        LockKind::Read => Kind::Read,
        LockKind::Write => Kind::Write,
        LockKind::Unlock => Kind::Unlock,
    };
    if lock.end < lock.start {
        return Err(FsError::Invalid("a range that ends before it starts"));
    }
    Ok((kind, Range { start: lock.start, end: lock.end }))
}

impl From<PosixError> for FsError {
    fn from(error: PosixError) -> Self {
        match error {
            PosixError::WouldBlock => Self::WouldBlock,
            PosixError::Withdrawn => Self::Interrupted,
            PosixError::Deadlock => Self::Deadlock,
            PosixError::Invalid(why) => Self::Invalid(why),
            _ => Self::NoLease,
        }
    }
}

impl Posix {
    pub(super) fn new(space: Arc<dyn Lockspace>) -> Self {
        Self { locks: PosixLocks::new(space), through: Mutex::default() }
    }

    fn through(&self) -> std::sync::MutexGuard<'_, BTreeMap<(Ino, LockOwner), Handle>> {
        self.through.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everything, before an unmount.
    pub(super) async fn clear(&self) {
        self.through().clear();
        // An error says that the lockspace is gone, and the locks with it.
        let _ = self.locks.close_all().await;
    }
}

impl Inner {
    pub(super) async fn set_posix(
        &self,
        ino: Ino,
        handle: Handle,
        owner: LockOwner,
        lock: PosixLock,
        wait: Wait,
    ) -> Result<(), FsError> {
        self.check()?;
        let inode = self.inode(ino)?;
        let wanted = wanted(lock)?;
        if wanted.0 != Kind::Unlock {
            self.posix.through().insert((ino, owner), handle);
        }
        let owner = Owner { id: owner.0, pid: lock.pid };
        self.posix.locks.set(&name(Ino(inode.addr().0)), owner, wanted, &wait).await?;
        Ok(())
    }

    pub(super) async fn test_posix(
        &self,
        ino: Ino,
        owner: LockOwner,
        lock: PosixLock,
    ) -> Result<Option<PosixHolder>, FsError> {
        self.check()?;
        let inode = self.inode(ino)?;
        let owner = Owner { id: owner.0, pid: lock.pid };
        let found = self.posix.locks.test(&name(Ino(inode.addr().0)), owner, wanted(lock)?).await?;
        Ok(found.map(|holder| PosixHolder {
            lock: PosixLock {
                kind: if holder.mode == Mode::EX { LockKind::Write } else { LockKind::Read },
                start: holder.range.start,
                end: holder.range.end,
                pid: (holder.owner & u64::from(u32::MAX)) as u32,
            },
            node: self.posix.locks.is_elsewhere(&holder).then_some(holder.node.node),
        }))
    }

    /// The owner closed a descriptor of the file.
    pub(super) async fn close_posix(&self, ino: Ino, owner: LockOwner) -> Result<(), FsError> {
        if self.posix.through().remove(&(ino, owner)).is_none() {
            return Ok(());
        }
        self.posix.locks.close(&name(ino), owner.0).await?;
        Ok(())
    }

    /// The owners that asked through a handle last.
    pub(super) fn owners_through(&self, ino: Ino, handle: Handle) -> Vec<LockOwner> {
        let range = (ino, LockOwner(0))..=(ino, LockOwner(u64::MAX));
        let through = self.posix.through();
        through.range(range).filter(|(_, h)| **h == handle).map(|((_, owner), _)| *owner).collect()
    }
}
