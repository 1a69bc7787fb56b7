//! Inodes in use on this node: who refers to them, their cached data, and what happens when the last reference goes.

use super::Inner;
use super::glock::{Glock, Kind};
use super::store::Bytes;
use crate::FsError;
use crate::face::Ino;
use crate::format::{BlockNo, Inum};
use quorate_dlm::cache::{AcquireFlags, CacheMode, Held};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An inode in use.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) inum: Inum,
    state: Mutex<State>,
    pages: Mutex<Pages>,
    /// Held while dirty pages are written, so that two writes of one page cannot overtake each other.
    pub(super) writing: async_lock::Mutex<()>,
    /// The last batch of data that was written of it.
    pub(super) written: AtomicU64,
    /// The last link may be gone: when the last reference goes, see whether the inode is to be deleted.
    pub(super) unlinked: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    lookups: u64,
    opens: u64,
    /// Shared, as long as the inode is in use here.
    iopen: Option<Held>,
}

/// The cached data of a file.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pub(super) map: BTreeMap<u64, Page>,
    pub(super) dirty: BTreeSet<u64>,
    /// Where the next read of a sequential reader would begin.
    pub(super) expected: u64,
}

/// A block of a file.
#[derive(Clone, Debug)]
pub(super) struct Page {
    pub(super) data: Bytes,
    /// Where it is on disk.
    pub(super) block: u64,
}

impl Inode {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn addr(&self) -> BlockNo {
        self.inum.addr
    }

    pub(super) fn glock(&self) -> Glock {
        Glock::inode(self.inum.addr)
    }

    pub(super) fn opened(&self) {
        self.state().opens += 1;
    }

    fn is_unused(&self) -> bool {
        let state = self.state();
        state.lookups == 0 && state.opens == 0
    }

    /// Forgets cached data of these logical blocks.
    pub(super) fn drop_page_range(&self, range: core::ops::Range<u64>) -> usize {
        let mut pages = self.pages();
        let before = pages.map.len();
        pages.map.retain(|index, _| !range.contains(index));
        pages.dirty.retain(|index| !range.contains(index));
        before - pages.map.len()
    }

    /// Forgets cached data: all of it, or what is from logical block `from` on.
    pub(super) fn drop_pages(&self, from: u64) -> usize {
        let mut pages = self.pages();
        let gone = pages.map.split_off(&from).len();
        pages.dirty.split_off(&from);
        gone
    }
}

impl Inner {
    pub(super) fn inodes(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Inode>>> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An inode that somebody looked up.
    pub(super) fn inode(&self, ino: Ino) -> Result<Arc<Inode>, FsError> {
        self.check()?;
        self.inodes().get(&ino.0).cloned().ok_or(FsError::Stale)
    }

    /// Refers to the inode that a directory entry names. The caller holds the directory's lock, so it exists.
    pub(super) async fn refer(&self, inum: Inum) -> Result<Arc<Inode>, FsError> {
        loop {
            if let Some(inode) = self.inodes().get(&inum.addr.0)
                && inode.inum == inum
            {
                inode.state().lookups += 1;
                return Ok(inode.clone());
            }
            // Exact, and given back at once when the inode is evicted: who deletes it must not find idle holders.
            let flags = AcquireFlags { exact: true, no_cache: true, ..Default::default() };
            let iopen = self.lock_with(Glock::iopen(inum.addr), CacheMode::Shared, flags).await?;
            let mut inodes = self.inodes();
            if let Some(old) = inodes.get(&inum.addr.0) {
                if old.inum == inum {
                    continue;
                }
                // The number was used again while this node still had the old inode in memory, deleted elsewhere.
                inodes.remove(&inum.addr.0);
            }
            let inode = Arc::new(Inode {
                inum,
                state: Mutex::new(State { lookups: 1, opens: 0, iopen: Some(iopen) }),
                pages: Mutex::default(),
                writing: async_lock::Mutex::new(()),
                written: AtomicU64::new(0),
                unlinked: AtomicBool::new(false),
            });
            inodes.insert(inum.addr.0, inode.clone());
            return Ok(inode);
        }
    }

    /// Gives back references; the last one may delete the inode, in the background.
    pub(super) fn unrefer(&self, ino: Ino, lookups: u64, opens: u64) {
        let Some(inode) = self.inodes().get(&ino.0).cloned() else { return };
        {
            let mut state = inode.state();
            state.lookups = state.lookups.saturating_sub(lookups);
            state.opens = state.opens.saturating_sub(opens);
            if state.lookups != 0 || state.opens != 0 {
                return;
            }
        }
        let is_clean = inode.pages().dirty.is_empty() && !inode.unlinked.load(Ordering::Acquire);
        if is_clean && self.try_evict(&inode) {
            return;
        }
        self.spawn_deleting(move |fs| async move { fs.evict(inode).await });
    }

    /// Takes an unused, clean inode out of memory.
    fn try_evict(&self, inode: &Arc<Inode>) -> bool {
        let mut inodes = self.inodes();
        let current = inodes.get(&inode.inum.addr.0).is_some_and(|current| Arc::ptr_eq(current, inode));
        if !current || !inode.is_unused() || !inode.pages().dirty.is_empty() {
            return false;
        }
        inodes.remove(&inode.inum.addr.0);
        drop(inodes);
        let gone = inode.drop_pages(0);
        self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
        inode.state().iopen = None;
        true
    }

    /// Takes every unlinked inode out of memory, in use or not.
    pub(super) fn take_unlinked(&self) -> Vec<Arc<Inode>> {
        let taken: Vec<Arc<Inode>> = {
            let mut inodes = self.inodes();
            let unlinked = inodes.extract_if(.., |_, inode| inode.unlinked.load(Ordering::Acquire));
            unlinked.map(|(_, inode)| inode).collect()
        };
        for inode in &taken {
            let gone = inode.drop_pages(0);
            self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
            inode.state().iopen = None;
        }
        taken
    }

    /// Writes out and drops an unused inode, and deletes it if it has no link.
    async fn evict(self: Arc<Self>, inode: Arc<Inode>) {
        for _ in 0..8 {
            if !inode.is_unused() {
                return;
            }
            if inode.unlinked.load(Ordering::Acquire) {
                // Nobody will read what it holds.
                let _writing = inode.writing.lock().await;
                let gone = inode.drop_pages(0);
                self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
            } else if let Err(error) = self.write_pages(inode.addr()).await {
                self.withdraw(&format!("write-back of inode {}: {error}", inode.addr()));
                return;
            }
            if self.try_evict(&inode) {
                if inode.unlinked.load(Ordering::Acquire)
                    && let Err(error) = self.delete_inode(inode.addr()).await
                {
                    tracing::debug!(inode = inode.addr().0, %error, "an unlinked inode stays for later");
                }
                return;
            }
        }
    }

    /// Another node wants a lock that is in use here.
    pub(super) fn on_wanted(&self, glock: Glock) {
        if glock.kind != Kind::Iopen {
            return;
        }
        let Some(inode) = self.inodes().get(&glock.number).cloned() else { return };
        inode.unlinked.store(true, Ordering::Release);
        if inode.is_unused() {
            self.spawn_deleting(move |fs| async move { fs.evict(inode).await });
        } else if let Some(sink) = self.sink() {
            sink.prune(Ino(glock.number));
        }
    }
}
