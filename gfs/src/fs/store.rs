//! Metadata in memory: blocks by number under their glocks, and what of them the log and the disk still lack.
//!
//! ```text
//!  commit ─▶ pending ─(flush: copy to the ring, header)─▶ in the log, unwritten ─(write-back)─▶ in the log, written
//!                                                                    └─(revoke committed, or tail passed)─▶ forgotten
//! ```
//! Blocks are immutable once shared (copy on write), so a flush keeps writing the state it captured while transactions
//! go on. A metadata block is written in place only in a state that a flush has committed (gfs2.md 9.4).

use super::Inner;
use super::glock::{Glock, Kind};
use crate::FsError;
use crate::format::{BlockNo, MetaHeader, MetaType};
use quorate_gnbd::{BlockDevice, Buf};
use quorate_membership::Instant;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};

/// The bytes of a block.
pub(super) type Bytes = Arc<Vec<u8>>;

/// Clean metadata blocks beyond this number are dropped from memory.
const CACHED_BLOCKS_MAX: usize = 48 << 10;

/// A block in the active part of the log.
#[derive(Debug)]
pub(super) struct Logged {
    pub(super) glock: Glock,
    /// The flush that holds its newest copy.
    pub(super) flush: u64,
    /// The committed state, until it is written in place.
    pub(super) unwritten: Option<Bytes>,
}

/// A flush between tail and head of the log.
#[derive(Debug)]
pub(super) struct Flush {
    pub(super) id: u64,
    /// Its first ring block.
    pub(super) start: u32,
    /// How many of its blocks are not yet written in place, nor superseded, nor freed.
    pub(super) unwritten: usize,
}

/// The cache of metadata, and the state of the log. One lock: a commit changes both at once.
#[derive(Debug, Default)]
pub(super) struct Store {
    blocks: BTreeMap<u64, Cached>,
    owned: BTreeMap<Glock, BTreeSet<u64>>,
    evict_at: u64,
    /// Changed by transactions since the last flush.
    pub(super) pending: BTreeMap<u64, Glock>,
    /// Freed or given up since the last flush while in the active part of the log.
    pub(super) revokes: BTreeSet<u64>,
    /// Inodes whose dirty data must be on disk before the pending blocks are committed.
    pub(super) ordered: BTreeSet<u64>,
    /// The number of the flush that will hold what is pending now.
    pub(super) open_flush: u64,
    /// Every flush up to this one is durable.
    pub(super) flushed: u64,
    /// Blocks that transactions under way may still add.
    pub(super) reserved: usize,
    pub(super) logged: BTreeMap<u64, Logged>,
    pub(super) flushes: VecDeque<Flush>,
    /// The last flush that changed something of an inode; and of those that matter to read its data back.
    pub(super) inode_flush: BTreeMap<u64, (u64, u64)>,
    /// This node's change of the numbers of statfs since it was last added to the master's: total, free, dinodes.
    pub(super) statfs_local: [i64; 3],
    /// Whether it differs from what the last flush wrote.
    pub(super) statfs_changed: bool,
    /// Freed blocks, which may not be used again before this flush is durable (gfs2.md 4.3).
    pub(super) freed: BTreeMap<u64, u64>,
    /// When a lock was given up last whose blocks had to be cleaned.
    pub(super) cleaned_at: Option<Instant>,
}

#[derive(Debug)]
struct Cached {
    data: Bytes,
    glock: Glock,
}

impl Store {
    pub(super) fn new(statfs_local: [i64; 3]) -> Self {
        Self { open_flush: 1, statfs_local, ..Self::default() }
    }

    pub(super) fn get(&self, block: u64) -> Option<&Bytes> {
        self.blocks.get(&block).map(|cached| &cached.data)
    }

    pub(super) fn insert(&mut self, block: u64, glock: Glock, data: Bytes) {
        if let Some(old) = self.blocks.insert(block, Cached { data, glock })
            && old.glock != glock
        {
            self.disown(old.glock, block);
        }
        self.owned.entry(glock).or_default().insert(block);
    }

    pub(super) fn remove(&mut self, block: u64) {
        if let Some(cached) = self.blocks.remove(&block) {
            self.disown(cached.glock, block);
        }
    }

    fn disown(&mut self, glock: Glock, block: u64) {
        if let Some(set) = self.owned.get_mut(&glock) {
            set.remove(&block);
            if set.is_empty() {
                self.owned.remove(&glock);
            }
        }
    }

    /// Forgets the cached blocks of a lock. None of them may be pending.
    pub(super) fn drop_glock(&mut self, glock: Glock) {
        for block in self.owned.remove(&glock).unwrap_or_default() {
            assert!(!self.pending.contains_key(&block), "block {block} is dropped before it was logged");
            self.blocks.remove(&block);
        }
    }

    pub(super) fn blocks_of(&self, glock: Glock) -> impl Iterator<Item = u64> + '_ {
        self.owned.get(&glock).into_iter().flatten().copied()
    }

    /// Whether the log holds anything that this lock covers.
    pub(super) fn has_pending(&self, glock: Glock) -> bool {
        self.blocks_of(glock).any(|block| self.pending.contains_key(&block))
    }

    /// Drops clean blocks where there are too many.
    fn shrink(&mut self) {
        if self.blocks.len() <= CACHED_BLOCKS_MAX {
            return;
        }
        let victims: Vec<u64> = self
            .blocks
            .range(self.evict_at..)
            .map(|(&block, _)| block)
            .filter(|block| !self.pending.contains_key(block))
            .filter(|block| self.logged.get(block).is_none_or(|logged| logged.unwritten.is_none()))
            .take(CACHED_BLOCKS_MAX / 16)
            .collect();
        self.evict_at = victims.last().map_or(0, |last| last + 1);
        for block in victims {
            self.remove(block);
        }
    }

    /// A metadata block is freed, or its lock given up: the log must not bring it back.
    pub(super) fn revoke(&mut self, block: u64) {
        self.pending.remove(&block);
        if let Some(logged) = self.logged.get_mut(&block) {
            self.revokes.insert(block);
            if logged.unwritten.take().is_some() {
                let flush = logged.flush;
                self.settle(flush);
            }
        }
    }

    /// One block less of this flush has to be written in place.
    pub(super) fn settle(&mut self, flush: u64) {
        if let Some(flush) = self.flushes.iter_mut().find(|candidate| candidate.id == flush) {
            flush.unwritten -= 1;
        }
    }

    /// Committed blocks of other inodes than `glock`'s that nobody has changed since, at most `max` of them.
    pub(super) fn to_clean(&self, glock: Glock, max: usize) -> BTreeSet<u64> {
        let others = self.logged.iter().filter(|(block, logged)| {
            logged.glock != glock && logged.glock.kind == Kind::Inode && !self.pending.contains_key(block)
        });
        others.map(|(&block, _)| block).take(max).collect()
    }

    /// A flush took this block into the log.
    pub(super) fn log(&mut self, block: u64, glock: Glock, flush: u64, data: Bytes) {
        let old = self.logged.insert(block, Logged { glock, flush, unwritten: Some(data) });
        if let Some(old) = old
            && old.unwritten.is_some()
        {
            self.settle(old.flush);
        }
    }
}

impl Inner {
    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a raw block, past every cache.
    pub(super) async fn read_raw(&self, block: BlockNo, count: usize) -> Result<Buf, FsError> {
        let offset = block.offset_bytes(self.size).filter(|_| !block.is_none());
        let offset = offset.ok_or_else(|| FsError::Corrupt(format!("block {block} cannot be")))?;
        Ok(self.device.read(offset, Buf::zeroed(self.size.usize() * count)).await?)
    }

    /// A metadata block of this kind. The caller holds its lock.
    pub(super) async fn meta(&self, block: BlockNo, glock: Glock, kind: MetaType) -> Result<Bytes, FsError> {
        if let Some(data) = self.store().get(block.0) {
            return Ok(data.clone());
        }
        let buf = self.read_raw(block, 1).await?;
        MetaHeader::expect(&buf, kind).map_err(|error| corrupt(block, &error))?;
        let data = Arc::new(buf.to_vec());
        let mut store = self.store();
        // Another reader may have been faster, and a writer after it.
        if let Some(data) = store.get(block.0) {
            return Ok(data.clone());
        }
        store.shrink();
        store.insert(block.0, glock, data.clone());
        Ok(data)
    }
}

/// A block is not what it should be.
pub(super) fn corrupt(block: BlockNo, error: &dyn core::fmt::Display) -> FsError {
    FsError::Corrupt(format!("block {block}: {error}"))
}
