//! File locks between nodes: `flock` as locks of type 6 (gfs2.md 10.11).
//!
//! The lock cache keeps apart the holders of one node like those of several, so an flock is a held cached lock.

use super::Inner;
use super::glock::Glock;
use crate::FsError;
use crate::face::{Ino, LockKind, LockOwner};
use quorate_dlm::cache::{AcquireFlags, CacheMode, Held};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The flocks of this node, by inode and open file.
#[derive(Debug, Default)]
pub(super) struct Flocks(Mutex<BTreeMap<(u64, LockOwner), (LockKind, Held)>>);

impl Flocks {
    fn take(&self, ino: Ino, owner: LockOwner) -> Option<(LockKind, Held)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(ino.0, owner))
    }

    fn put(&self, ino: Ino, owner: LockOwner, kind: LockKind, held: Held) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((ino.0, owner), (kind, held));
    }

    /// Ends all of them.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        drop(all);
    }
}

impl Inner {
    pub(super) async fn set_flock(
        &self,
        ino: Ino,
        owner: LockOwner,
        kind: LockKind,
        wait: bool,
    ) -> Result<(), FsError> {
        let inode = self.inode(ino)?;
        if let Some((old, held)) = self.flocks.take(ino, owner) {
            if old == kind {
                self.flocks.put(ino, owner, kind, held);
                return Ok(());
            }
            // A change is an unlock and a lock: in between, others may come first (flock(2)).
            drop(held);
        }
        let mode = match kind {
            LockKind::Unlock => return Ok(()),
            LockKind::Read => CacheMode::Shared,
            LockKind::Write => CacheMode::Exclusive,
        };
        // Not cached: a try must not find locks that are idle on another node.
        let flags =
            AcquireFlags { try_now: !wait, nudge: !wait, exact: true, no_cache: true, ..Default::default() };
        let glock = Glock::flock(inode.addr());
        let mut tries = 0;
        let held = loop {
            match self.lock_with(glock, mode, flags).await {
                // Another node may have it cached but not in use: the nudge makes it give it up.
                Err(FsError::WouldBlock) if tries < FLOCK_TRIES => {
                    tries += 1;
                    let later = self.runtime.now() + core::time::Duration::from_millis(1 << tries);
                    self.runtime.sleep_until(later).await;
                }
                other => break other?,
            }
        };
        self.flocks.put(ino, owner, kind, held);
        Ok(())
    }

    pub(super) fn end_flock(&self, ino: Ino, owner: LockOwner) {
        drop(self.flocks.take(ino, owner));
    }
}

/// How often a try for a lock is repeated, after 2, 4 and 8 ms.
const FLOCK_TRIES: u32 = 3;
