//! Mounting and unmounting.

use super::client::Client;
use super::clock::WallClock;
use super::flock::Flocks;
use super::glock::{Glock, has_value_block};
use super::logd::{Journal, Ring};
use super::posix::Posix;
use super::recover::Replayed;
use super::rgrp::Rgrp;
use super::store::{Store, corrupt};
use super::{Flusher, Gfs, Inner, System};
use crate::FsError;
use crate::face::Invalidation;
use crate::format::{
    BlockNo, DINODE_BYTES, Dinode, FormatError, RINDEX_BYTES, RindexEntry, SUPERBLOCK_BYTES,
    SUPERBLOCK_OFFSET_BYTES, StatfsChange, Superblock,
};
use crate::reader::Reader;
use core::time::Duration;
use quorate_dlm::Lockspace;
use quorate_dlm::cache::{AcquireFlags, CacheConfig, CacheMode, LockCache};
use quorate_gnbd::{BlockDevice, Buf, Device, IoError};
use quorate_membership::{Lease, Runtime};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// How to mount.
#[derive(Clone)]
pub struct MountOptions {
    /// Which journal is this node's. It belongs to this life of the node alone: that is decided elsewhere (R6).
    pub journal: u32,
    /// Write nothing: no journal is used. Dirty journals are replayed only where `recover_all` says so.
    pub read_only: bool,
    /// Replay every journal that nobody uses: for who has the filesystem alone, or opens it first.
    pub recover_all: bool,
    /// How long a committed change may stay in memory only; 5 s by default.
    pub commit_interval: Duration,
    /// How often this node's change of free blocks and inodes is added to the common numbers; 30 s by default.
    pub statfs_interval: Duration,
    /// For time stamps.
    pub clock: WallClock,
    /// Who is told to drop caches above the filesystem; can be set later with `set_invalidation`.
    pub invalidation: Option<Arc<dyn Invalidation>>,
    /// The lock cache's knobs; its `value_block` is set by the mount.
    pub locks: CacheConfig,
}

impl MountOptions {
    /// A read-write mount with this journal, with the host's clock and the intervals of GFS2's glocks.
    #[must_use]
    pub fn new(journal: u32) -> Self {
        Self {
            journal,
            read_only: false,
            recover_all: false,
            commit_interval: Duration::from_secs(5),
            statfs_interval: Duration::from_secs(30),
            clock: super::clock::system_clock(),
            invalidation: None,
            locks: CacheConfig::glocks(),
        }
    }
}

impl core::fmt::Debug for MountOptions {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MountOptions")
            .field("journal", &self.journal)
            .field("read_only", &self.read_only)
            .field("recover_all", &self.recover_all)
            .finish_non_exhaustive()
    }
}

/// Why a filesystem was not mounted. Nothing of it is held any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// There is no such filesystem on the device.
    #[error("no GFS2 filesystem: {0}")]
    NotGfs2(#[from] FormatError),
    /// The device failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// It has fewer journals.
    #[error("there is no journal {journal}, the filesystem has {count}")]
    NoJournal {
        /// Which was asked for.
        journal: u32,
        /// How many there are.
        count: u32,
    },
    /// Another node uses the journal, or replays it.
    #[error("journal {0} is in use")]
    JournalBusy(u32),
    /// A checker works on it, or was interrupted.
    #[error("an unfinished fsck: lock protocol {0:?}")]
    Fsck(String),
    /// Whatever else went wrong.
    #[error(transparent)]
    Failed(#[from] FsError),
}

impl Gfs {
    /// Mounts the filesystem on `device`, whose locks are those of `lockspace`.
    ///
    /// The journal is replayed first if it was not closed cleanly.
    ///
    /// # Errors
    /// See [`MountError`].
    pub async fn mount(
        device: Device,
        lockspace: Arc<dyn Lockspace>,
        runtime: Arc<dyn Runtime>,
        lease: Lease,
        options: MountOptions,
    ) -> Result<Self, MountError> {
        let superblock = read_superblock(&device).await?;
        if superblock.lock_proto.starts_with("fsck_") {
            return Err(MountError::Fsck(superblock.lock_proto));
        }
        let client = Arc::new(Client::default());
        let config = CacheConfig { value_block: has_value_block, ..options.locks };
        let posix = Arc::new(Posix::new(lockspace.clone()));
        let cache = LockCache::new(lockspace, runtime.clone(), lease.clone(), client.clone(), config);
        let cell = Arc::new(OnceLock::new());
        assert!(cell.set(cache.clone()).is_ok(), "the cell is new");
        let bare = Bare { device, superblock, runtime, lease, cache: cell, posix, options: options.clone() };
        let result = bare.mount(&client).await;
        if result.is_err() {
            cache.shutdown().await;
        }
        result
    }

    /// Replays journals of failed nodes where nobody who lives has the filesystem mounted: for the first that opens it. Passes
    /// through the holds of the failed nodes, which a mount does not (R14). Nothing stays mounted.
    ///
    /// The caller makes sure that the failed nodes are fenced, proposes `Replayed` afterwards, and mounts then.
    ///
    /// # Errors
    /// See [`MountError`]; `JournalBusy` if somebody else is at it.
    pub async fn replay_unmounted(
        device: Device,
        lockspace: Arc<dyn Lockspace>,
        runtime: Arc<dyn Runtime>,
        lease: Lease,
        journals: &BTreeSet<u32>,
    ) -> Result<BTreeMap<u32, Replayed>, MountError> {
        let superblock = read_superblock(&device).await?;
        if superblock.lock_proto.starts_with("fsck_") {
            return Err(MountError::Fsck(superblock.lock_proto));
        }
        let options = MountOptions::new(0);
        let config = CacheConfig { value_block: has_value_block, ..options.locks };
        let posix = Arc::new(Posix::new(lockspace.clone()));
        let client = Arc::new(Client::default());
        let cache = LockCache::new(lockspace, runtime.clone(), lease.clone(), client, config);
        let cell = Arc::new(OnceLock::new());
        assert!(cell.set(cache.clone()).is_ok(), "the cell is new");
        let bare = Bare { device, superblock, runtime, lease, cache: cell, posix, options };
        let result = bare.replay(journals).await;
        cache.shutdown().await;
        result
    }

    /// Writes everything out, closes the journal and gives up every lock. The last clone may be dropped afterwards.
    ///
    /// # Errors
    /// What could not be written; the locks that cover it are not given up, and the journal stays dirty.
    pub async fn unmount(&self) -> Result<(), FsError> {
        let fs = &self.0;
        fs.unmounting.store(true, Ordering::Release);
        fs.log_event.notify(usize::MAX);
        fs.tasks_event.notify(usize::MAX);
        fs.flocks.clear();
        fs.posix.clear().await;
        loop {
            let changed = fs.tasks_event.listen();
            if fs.tasks.load(Ordering::Acquire) == 0 {
                break;
            }
            changed.await;
        }
        let result = self.close().await;
        if let Err(error) = &result {
            fs.withdraw(&format!("unmount: {error}"));
        }
        fs.inodes().clear();
        fs.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
        fs.cache().shutdown().await;
        result
    }

    async fn close(&self) -> Result<(), FsError> {
        let fs = &self.0;
        fs.check()?;
        if fs.journal.is_none() {
            return Ok(());
        }
        // Nobody uses anything any more, whatever references were not given back.
        let unlinked = fs.take_unlinked();
        for inode in unlinked {
            if let Err(error) = fs.delete_inode(inode.addr()).await {
                fs.check()?;
                tracing::debug!(inode = inode.addr().0, %error, "an unlinked inode stays for later");
            }
        }
        fs.reclaim_leftovers().await?;
        let all: Vec<u64> = fs.inodes().keys().copied().collect();
        for ino in all {
            fs.write_pages(BlockNo(ino)).await?;
        }
        fs.sync_statfs().await?;
        fs.flush_log().await?;
        fs.shut_log().await
    }

    /// Stops using the filesystem at once, for instance because this node lost its right to: no more writes, errors for
    /// everybody, and locks over unwritten changes are kept for the replay of the journal.
    pub fn withdraw(&self, reason: &str) {
        self.0.withdraw(reason);
    }

    /// Why this node withdrew, if it did.
    #[must_use]
    pub fn withdrawn(&self) -> Option<String> {
        self.0.withdrawn.get().cloned()
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.0.superblock
    }

    /// How many journals the filesystem has.
    #[must_use]
    pub fn journals(&self) -> u32 {
        self.0.journals
    }

    /// Deletes unlinked inodes that failed nodes left behind.
    ///
    /// # Errors
    /// What kept it from looking.
    pub async fn reclaim(&self) -> Result<(), FsError> {
        self.0.reclaim().await
    }
}

/// Reads and checks the superblock of a device.
pub(crate) async fn read_superblock(device: &Device) -> Result<Superblock, MountError> {
    let unit = u64::from(device.geometry().block_bytes).max(4096);
    if device.geometry().size_bytes < SUPERBLOCK_OFFSET_BYTES + unit {
        return Err(FormatError::TooShort { what: "device", need: SUPERBLOCK_BYTES, have: 0 }.into());
    }
    let buf = device.read(SUPERBLOCK_OFFSET_BYTES, Buf::zeroed(unit as usize)).await?;
    Ok(Superblock::decode(&buf)?)
}

/// What a mount begins with.
struct Bare {
    device: Device,
    superblock: Superblock,
    runtime: Arc<dyn Runtime>,
    lease: Lease,
    cache: Arc<OnceLock<LockCache>>,
    posix: Arc<Posix>,
    options: MountOptions,
}

/// What has to be known of the filesystem before it can be used.
#[derive(Default)]
struct Plan {
    rgrps: Vec<RindexEntry>,
    jinodes: Vec<BlockNo>,
    journal: Option<Journal>,
    ring: Option<Ring>,
    statfs_local: [i64; 3],
}

impl Bare {
    async fn mount(self, client: &Arc<Client>) -> Result<Gfs, MountError> {
        // A filesystem without journal and groups, to read the system files with.
        let mut reader = self.inner(Plan::default(), System::default());
        let mut held = Vec::new();
        held.push(reader.lock(Glock::LIVE, CacheMode::Shared).await?);
        held.push(reader.lock(Glock::FREEZE, CacheMode::Shared).await?);
        let mut plan = Plan::default();
        let master = reader.superblock.master.addr;
        let system = System {
            jindex: reader.child(master, b"jindex").await?,
            per_node: reader.child(master, b"per_node").await?,
            statfs: reader.child(master, b"statfs").await?,
        };
        let rindex = reader.child(master, b"rindex").await?;
        plan.rgrps = reader.read_rindex(rindex).await?;
        plan.jinodes = reader.read_jindex(system.jindex).await?;
        let count = plan.jinodes.len() as u32;
        let own = self.options.journal;
        if !self.options.read_only && count <= own {
            return Err(MountError::NoJournal { journal: own, count });
        }
        reader = self.inner(
            Plan { rgrps: plan.rgrps.clone(), jinodes: plan.jinodes.clone(), ..Plan::default() },
            system,
        );
        for jid in 0..count {
            if jid == own && !self.options.read_only || self.options.recover_all {
                match reader.recover_patiently(jid, jid == own, false).await {
                    Err(FsError::Busy) if jid != own => {}
                    Err(FsError::Busy) => return Err(MountError::JournalBusy(jid)),
                    other => {
                        other?;
                    }
                }
            }
        }
        if !self.options.read_only {
            match reader.own_journal(own).await {
                Ok(journal) => held.push(journal),
                Err(FsError::Busy) => return Err(MountError::JournalBusy(own)),
                Err(error) => return Err(error.into()),
            }
            let jinode = plan.jinodes[own as usize];
            held.push(reader.lock(Glock::inode(jinode), CacheMode::Shared).await?);
            let file = reader.journal_file(own, jinode).await?;
            let (head, ring) = (file.head().await?, file.ring());
            if !head.flags.is_clean() {
                return Err(MountError::JournalBusy(own));
            }
            let statfs_addr = reader.child(system.per_node, format!("statfs_change{own}").as_bytes()).await?;
            let quota_addr = reader.child(system.per_node, format!("quota_change{own}").as_bytes()).await?;
            held.push(reader.lock(Glock::inode(statfs_addr), CacheMode::Exclusive).await?);
            let statfs_block = reader.dinode_block(statfs_addr).await?;
            let local = StatfsChange::decode(&statfs_block[DINODE_BYTES..])?;
            plan.statfs_local = [local.total, local.free, local.dinodes];
            let start = (head.index + 1) % ring.len() as u32;
            plan.ring = Some(Ring { head: start, tail: start, sequence: head.sequence + 1 });
            plan.journal = Some(Journal { jid: own, jinode, statfs_addr, quota_addr, statfs_block, ring });
        }
        let inner = self.inner(plan, system);
        *inner.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
        assert!(client.0.set(Arc::downgrade(&inner)).is_ok(), "the client is new");
        // What the reader cached is gone, but locks it took are still cached; nobody changed anything under them.
        let root = inner.superblock.root;
        inner.refer(root).await?;
        inner.start(&self.options);
        Ok(Gfs(inner))
    }

    /// Where the journals are is read without locks: only a mounted filesystem changes that.
    async fn replay(self, journals: &BTreeSet<u32>) -> Result<BTreeMap<u32, Replayed>, MountError> {
        let raw = Reader::open(self.device.clone()).await.map_err(FsError::from)?;
        let master = raw.inode(self.superblock.master.addr).await.map_err(FsError::from)?;
        let jindex = raw.system(&master, "jindex").await.map_err(FsError::from)?;
        let statfs = raw.system(&master, "statfs").await.map_err(FsError::from)?.addr();
        let mut jinodes = Vec::new();
        for jid in 0_u32.. {
            let name = format!("journal{jid}");
            let Some((inum, _)) = raw.lookup(&jindex, name.as_bytes()).await.map_err(FsError::from)? else {
                break;
            };
            jinodes.push(inum.addr);
        }
        let inner = self.inner(Plan { jinodes, ..Plan::default() }, System { statfs, ..System::default() });
        let mut replayed = BTreeMap::new();
        for &jid in journals {
            match inner.recover_patiently(jid, true, true).await {
                Err(FsError::Busy) => return Err(MountError::JournalBusy(jid)),
                other => drop(replayed.insert(jid, other?)),
            }
        }
        Ok(replayed)
    }

    fn inner(&self, plan: Plan, system: System) -> Arc<Inner> {
        let size = self.superblock.block_size;
        let statfs_local = plan.statfs_local;
        Arc::new_cyclic(|me| Inner {
            me: me.clone(),
            device: self.device.clone(),
            size,
            superblock: self.superblock.clone(),
            system,
            journals: (plan.jinodes.len() as u32).max(1),
            jinodes: plan.jinodes,
            journal: plan.journal,
            rgrps: plan.rgrps.into_iter().map(Rgrp::new).collect(),
            runtime: self.runtime.clone(),
            lease: self.lease.clone(),
            clock: self.options.clock.clone(),
            cache: self.cache.clone(),
            zero_page: Arc::new(vec![0; size.usize()]),
            store: Mutex::new(Store::new(statfs_local)),
            ring: async_lock::Mutex::new(plan.ring.unwrap_or(Ring { head: 0, tail: 0, sequence: 0 })),
            flusher: Mutex::new(Flusher::default()),
            log_event: event_listener::Event::new(),
            inodes: Mutex::new(BTreeMap::new()),
            pages_cached: AtomicUsize::new(0),
            data_written: AtomicU64::new(0),
            data_flushed: AtomicU64::new(0),
            sink: Mutex::new(self.options.invalidation.clone()),
            flocks: Flocks::default(),
            posix: self.posix.clone(),
            handles: AtomicU64::new(0),
            held: Mutex::new(Vec::new()),
            tasks: AtomicUsize::new(0),
            tasks_event: event_listener::Event::new(),
            deleting: AtomicUsize::new(0),
            withdrawn: OnceLock::new(),
            unmounting: AtomicBool::new(false),
        })
    }
}

impl Inner {
    async fn child(&self, dir: BlockNo, name: &[u8]) -> Result<BlockNo, FsError> {
        let _held = self.lock(Glock::inode(dir), CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, dir).await?;
        let found = self.dir_find(None, &dinode, name).await?;
        let missing = || corrupt(dir, &format!("no system file {}", name.escape_ascii()));
        Ok(found.ok_or_else(missing)?.inum.addr)
    }

    async fn read_jindex(&self, jindex: BlockNo) -> Result<Vec<BlockNo>, FsError> {
        let _held = self.lock(Glock::inode(jindex), CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, jindex).await?;
        let mut journals = Vec::new();
        while let Some(found) =
            self.dir_find(None, &dinode, format!("journal{}", journals.len()).as_bytes()).await?
        {
            journals.push(found.inum.addr);
        }
        Ok(journals)
    }

    /// A system file as a whole.
    async fn read_system(&self, dinode: &Dinode) -> Result<Vec<u8>, FsError> {
        let block = self.dinode_block(dinode.inum.addr).await?;
        let size = dinode.size_bytes;
        if dinode.height == 0 {
            return Ok(block[DINODE_BYTES..DINODE_BYTES + size as usize].to_vec());
        }
        let unit = self.size.usize() as u64;
        let mut data = Vec::new();
        let mut at = 0;
        while at < size.div_ceil(unit) {
            let (block, count) = self.map_run(None, dinode, at, (size.div_ceil(unit) - at).min(256)).await?;
            let block = block.ok_or_else(|| corrupt(dinode.inum.addr, &"a system file with a hole"))?;
            data.extend_from_slice(&self.read_raw(block, count as usize).await?);
            at += count;
        }
        data.truncate(size as usize);
        Ok(data)
    }

    async fn read_rindex(&self, rindex: BlockNo) -> Result<Vec<RindexEntry>, FsError> {
        let _held = self.lock(Glock::inode(rindex), CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, rindex).await?;
        let device_blocks = self.device.geometry().size_bytes / self.size.usize() as u64;
        let mut rgrps: Vec<RindexEntry> = Vec::new();
        for bytes in self.read_system(&dinode).await?.chunks_exact(RINDEX_BYTES) {
            let entry = RindexEntry::decode(bytes).map_err(|error| corrupt(rindex, &error))?;
            entry.check(self.size).map_err(|error| corrupt(rindex, &error))?;
            if rgrps.last().is_some_and(|last| entry.addr < last.end()) || device_blocks < entry.end().0 {
                return Err(corrupt(rindex, &"resource groups overlap, or are beyond the device"));
            }
            rgrps.push(entry);
        }
        if rgrps.is_empty() { Err(corrupt(rindex, &"no resource groups")) } else { Ok(rgrps) }
    }

    /// Starts what runs in the background.
    fn start(&self, options: &MountOptions) {
        if self.journal.is_none() {
            return;
        }
        let (commit, statfs) = (options.commit_interval, options.statfs_interval);
        self.spawn(move |fs| async move { fs.daemon(commit, statfs).await });
    }

    async fn daemon(&self, commit: Duration, statfs: Duration) {
        let mut statfs_at = self.runtime.now() + statfs;
        loop {
            let stop = self.tasks_event.listen();
            if self.unmounting.load(Ordering::Acquire) || self.check().is_err() {
                return;
            }
            let sleep = self.runtime.sleep_until(self.runtime.now() + commit);
            futures_util::future::select(sleep, stop).await;
            if self.unmounting.load(Ordering::Acquire) || self.check().is_err() {
                return;
            }
            let result = self.tick(&mut statfs_at, statfs).await;
            if let Err(error) = result {
                tracing::debug!(%error, "the periodic write-out failed");
            }
        }
    }

    async fn tick(
        &self,
        statfs_at: &mut quorate_membership::Instant,
        statfs: Duration,
    ) -> Result<(), FsError> {
        let dirty: Vec<u64> = self
            .inodes()
            .iter()
            .filter(|(_, inode)| !inode.pages().dirty.is_empty())
            .map(|(&ino, _)| ino)
            .collect();
        for ino in dirty {
            self.write_pages(BlockNo(ino)).await?;
        }
        if *statfs_at <= self.runtime.now() {
            *statfs_at = self.runtime.now() + statfs;
            self.sync_statfs().await?;
        }
        self.flush_log().await
    }
}

/// How often a journal's lock is asked for: a survivor that has just replayed the journal gives it back a little later.
const JOURNAL_TRIES: u32 = 100;
/// Between two tries.
const JOURNAL_PAUSE: Duration = Duration::from_millis(20);

impl Inner {
    /// Recovers a journal; its owner waits a little for whoever replays it.
    async fn recover_patiently(&self, jid: u32, is_own: bool, recovery: bool) -> Result<Replayed, FsError> {
        for _ in 0..JOURNAL_TRIES {
            match self.recover(jid, recovery).await {
                Err(FsError::Busy) if is_own => self.pause(JOURNAL_PAUSE).await,
                other => return other,
            }
        }
        Err(FsError::Busy)
    }

    /// The lock of this node's own journal.
    async fn own_journal(&self, own: u32) -> Result<quorate_dlm::cache::Held, FsError> {
        let flags = AcquireFlags { try_now: true, ..Default::default() };
        for _ in 0..JOURNAL_TRIES {
            match self.lock_with(Glock::journal(own), CacheMode::Exclusive, flags).await {
                Err(FsError::WouldBlock) => self.pause(JOURNAL_PAUSE).await,
                other => return other,
            }
        }
        Err(FsError::Busy)
    }

    async fn pause(&self, time: Duration) {
        self.runtime.sleep_until(self.runtime.now() + time).await;
    }

    /// Before an unmount: deletes what could not be deleted when its last user let go, because a lock was just then on
    /// its way. What other nodes have open stays for them.
    async fn reclaim_leftovers(&self) -> Result<(), FsError> {
        for _ in 0..3 {
            let mut left = false;
            for index in 0..self.rgrps.len() {
                left |= !self.orphans(index).await?.is_empty();
            }
            if !left {
                return Ok(());
            }
            self.reclaim().await?;
            self.pause(JOURNAL_PAUSE).await;
        }
        Ok(())
    }
}
