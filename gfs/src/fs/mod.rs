//! The live filesystem: shared by several nodes through locks, journalled, on any block device.
//!
//! ```text
//!  face::Filesystem ─▶ names, data, attributes, xattrs      (locks of inodes, then of resource groups)
//!                          └─▶ tx: changes on copies ─▶ store: blocks in memory, what the log lacks
//!                                                          └─▶ logd: flush, write-back, tail ─▶ device
//!  lock cache ─▶ client: before a lock is given up, what it covers is logged, written, revoked and dropped
//! ```
//! Start at [`Gfs::mount`].

mod attr;
mod client;
mod clock;
mod data;
mod delete;
mod dir;
mod exhash;
mod face;
mod fallocate;
mod flock;
mod glock;
mod inode;
mod logd;
mod mount;
mod names;
mod posix;
mod readdir;
mod recover;
mod rename;
mod rgrp;
mod statfs;
mod store;
mod tree;
mod truncate;
mod tx;
mod xattr;

pub use clock::{WallClock, system_clock};
pub use mount::{MountError, MountOptions};
pub use recover::Replayed;

use crate::FsError;
use crate::face::Invalidation;
use crate::format::{BlockNo, BlockSize, Superblock};
use inode::Inode;
use logd::{Journal, Ring};
use quorate_dlm::cache::LockCache;
use quorate_gnbd::Device;
use quorate_membership::{Lease, Runtime};
use rgrp::Rgrp;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use store::{Bytes, Store};

/// A mounted filesystem. Cloning shares it.
#[derive(Clone)]
pub struct Gfs(Arc<Inner>);

impl core::fmt::Debug for Gfs {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

/// System files that stay known while mounted.
#[derive(Clone, Copy, Debug, Default)]
struct System {
    jindex: BlockNo,
    per_node: BlockNo,
    statfs: BlockNo,
}

#[derive(Debug, Default)]
struct Flusher {
    running: bool,
    wanted: u64,
}

struct Inner {
    me: Weak<Inner>,
    device: Device,
    size: BlockSize,
    superblock: Superblock,
    system: System,
    /// How many journals there are.
    journals: u32,
    /// The inodes of all of them.
    jinodes: Vec<BlockNo>,
    /// This node's; `None` if mounted read-only.
    journal: Option<Journal>,
    rgrps: Vec<Rgrp>,
    runtime: Arc<dyn Runtime>,
    lease: Lease,
    clock: WallClock,
    cache: Arc<OnceLock<LockCache>>,
    zero_page: Bytes,

    store: Mutex<Store>,
    ring: async_lock::Mutex<Ring>,
    flusher: Mutex<Flusher>,
    /// The log changed: a flush ended, or room was given back, or the node withdrew.
    log_event: event_listener::Event,

    inodes: Mutex<BTreeMap<u64, Arc<Inode>>>,
    pages_cached: AtomicUsize,
    /// Counts batches of data that the device has answered,
    data_written: AtomicU64,
    /// and up to which of them a flush has made them durable.
    data_flushed: AtomicU64,
    sink: Mutex<Option<Arc<dyn Invalidation>>>,
    flocks: flock::Flocks,
    posix: Arc<posix::Posix>,
    /// Handles given out.
    handles: AtomicU64,
    /// Locks that are held as long as the filesystem is mounted.
    held: Mutex<Vec<quorate_dlm::cache::Held>>,
    /// Work in the background that an unmount waits for.
    tasks: AtomicUsize,
    tasks_event: event_listener::Event,
    /// How many of these may delete an inode.
    deleting: AtomicUsize,
    withdrawn: OnceLock<String>,
    unmounting: AtomicBool,
}

impl core::fmt::Debug for Inner {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Gfs")
            .field("table", &self.superblock.lock_table)
            .field("jid", &self.journal.as_ref().map(|journal| journal.jid))
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn cache(&self) -> &LockCache {
        self.cache.get().expect("the lock cache is set before the mount returns")
    }

    fn sink(&self) -> Option<Arc<dyn Invalidation>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails once this node has withdrawn.
    fn check(&self) -> Result<(), FsError> {
        match self.withdrawn.get() {
            Some(reason) => Err(FsError::Withdrawn(reason.clone())),
            None => Ok(()),
        }
    }

    fn check_writable(&self) -> Result<(), FsError> {
        self.check()?;
        if self.journal.is_some() { Ok(()) } else { Err(FsError::ReadOnly) }
    }

    /// Stops using the filesystem: nothing is written any more, and locks that cover unwritten changes are kept, so that
    /// the journal is replayed before anybody else gets them.
    fn withdraw(&self, reason: &str) {
        if self.withdrawn.set(reason.to_owned()).is_ok() {
            tracing::error!(filesystem = self.superblock.lock_table, reason, "withdrawn");
        }
        self.log_event.notify(usize::MAX);
    }

    /// Runs something in the background that may delete an inode: who finds no space waits for it.
    fn spawn_deleting<F>(&self, task: impl FnOnce(Arc<Self>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        use std::sync::atomic::Ordering;
        self.deleting.fetch_add(1, Ordering::AcqRel);
        self.spawn(move |fs| async move {
            task(fs.clone()).await;
            fs.deleting.fetch_sub(1, Ordering::AcqRel);
        });
    }

    /// Waits for the inodes that are being deleted. The caller holds no lock of a group.
    async fn deletions(&self) {
        loop {
            let changed = self.tasks_event.listen();
            if self.deleting.load(std::sync::atomic::Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Runs something in the background; an unmount waits for it.
    fn spawn<F>(&self, task: impl FnOnce(Arc<Self>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        use std::sync::atomic::Ordering;
        let Some(me) = self.me.upgrade() else { return };
        me.tasks.fetch_add(1, Ordering::AcqRel);
        self.runtime.spawn(Box::pin(async move {
            task(me.clone()).await;
            me.tasks.fetch_sub(1, Ordering::AcqRel);
            me.tasks_event.notify(usize::MAX);
        }));
    }
}
