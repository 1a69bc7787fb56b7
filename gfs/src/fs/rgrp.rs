//! Resource groups: which to allocate from, taking blocks and giving them back (gfs2.md 4.3).
//!
//! Each node prefers every Nth group, counted from its journal, and those whose lock it holds, so that nodes at work in
//! one directory do not pass bitmaps back and forth. A freed block is not taken again before the flush that frees it is
//! durable.

use super::Inner;
use super::glock::Glock;
use super::store::corrupt;
use super::tx::Tx;
use crate::FsError;
use crate::format::{
    BlockNo, BlockState, MAGIC, MetaType, RgrpFlags, RgrpHeader, RindexEntry, count_states, find_state,
    get_state, set_state,
};
use quorate_dlm::cache::{CacheMode, Held};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A resource group.
#[derive(Debug)]
pub(super) struct Rgrp {
    pub(super) entry: RindexEntry,
    memory: Mutex<Memory>,
}

/// What this node remembers of a group.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Free blocks as last seen; `None` if unknown.
    pub(super) free: Option<u32>,
    /// Where the last search ended, counted from the first data block.
    pub(super) cursor: u64,
    /// Whether this node holds the lock exclusively.
    pub(super) held: bool,
}

impl Rgrp {
    pub(super) fn new(entry: RindexEntry) -> Self {
        Self { entry, memory: Mutex::default() }
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn glock(&self) -> Glock {
        Glock::rgrp(self.entry.addr)
    }
}

/// Locked groups.
#[derive(Debug)]
pub(super) struct RgrpLocks<'a> {
    fs: &'a Inner,
    held: BTreeMap<usize, Held>,
    /// Where to allocate, in this order.
    from: Vec<usize>,
}

impl Inner {
    /// The group that a block belongs to.
    pub(super) fn rgrp_of(&self, block: BlockNo) -> Result<usize, FsError> {
        let after = self.rgrps.partition_point(|rgrp| rgrp.entry.addr <= block);
        after
            .checked_sub(1)
            .filter(|&index| {
                let entry = &self.rgrps[index].entry;
                (entry.data0..entry.end()).contains(&block)
            })
            .ok_or_else(|| corrupt(block, &"is in no resource group"))
    }

    /// Locks groups to change the states of their blocks, in ascending order.
    pub(super) async fn lock_rgrps(&self, which: &BTreeSet<usize>) -> Result<RgrpLocks<'_>, FsError> {
        let mut held = BTreeMap::new();
        for &index in which {
            held.insert(index, self.lock(self.rgrps[index].glock(), CacheMode::Exclusive).await?);
        }
        Ok(RgrpLocks { fs: self, held, from: Vec::new() })
    }

    /// Locks groups with `need` free blocks, and those in `also`.
    pub(super) async fn lock_for_alloc(
        &self,
        also: &BTreeSet<usize>,
        need: u32,
        goal: BlockNo,
    ) -> Result<RgrpLocks<'_>, FsError> {
        if need == 0 {
            return self.lock_rgrps(also).await;
        }
        for round in 0..3 {
            if round == 2 {
                // What was freed lately becomes usable.
                self.deletions().await;
                self.flush_log().await?;
            }
            for index in self.candidates(goal) {
                if round == 0 && self.rgrps[index].memory().free.is_some_and(|free| free < need) {
                    continue;
                }
                let mut which = also.clone();
                which.insert(index);
                let mut locks = self.lock_rgrps(&which).await?;
                if need <= locks.available(index).await? {
                    locks.from.push(index);
                    return Ok(locks);
                }
            }
        }
        self.lock_many(also, need).await
    }

    /// No single group suffices: locks as many as it takes.
    async fn lock_many(&self, also: &BTreeSet<usize>, need: u32) -> Result<RgrpLocks<'_>, FsError> {
        let mut locks = RgrpLocks { fs: self, held: BTreeMap::new(), from: Vec::new() };
        let (mut found, last_also) = (0_u32, also.last().copied());
        for (index, rgrp) in self.rgrps.iter().enumerate() {
            let enough = need <= found;
            if enough && last_also.is_none_or(|last| last < index) {
                break;
            }
            if enough && !also.contains(&index) {
                continue;
            }
            locks.held.insert(index, self.lock(rgrp.glock(), CacheMode::Exclusive).await?);
            let available = locks.available(index).await?;
            if !enough && available != 0 {
                locks.from.push(index);
                found = found.saturating_add(available);
            } else if !also.contains(&index) {
                locks.held.remove(&index);
            }
        }
        if found < need { Err(FsError::NoSpace) } else { Ok(locks) }
    }

    /// All groups, the best to allocate from first.
    fn candidates(&self, goal: BlockNo) -> Vec<usize> {
        let count = self.rgrps.len();
        let at = self.rgrp_of(goal).unwrap_or(0);
        let circle = (0..count).map(|i| (at + i) % count);
        let ours = |index: &usize| {
            *index % self.journals as usize == self.jid() as usize || self.rgrps[*index].memory().held
        };
        let (mut order, others): (Vec<usize>, Vec<usize>) = circle.partition(ours);
        order.extend(others);
        order
    }
}

impl RgrpLocks<'_> {
    /// Free blocks that may be taken now.
    async fn available(&self, index: usize) -> Result<u32, FsError> {
        let rgrp = &self.fs.rgrps[index];
        let block = self.fs.meta(rgrp.entry.addr, rgrp.glock(), MetaType::Rgrp).await?;
        let header = RgrpHeader::decode(&block).map_err(|error| corrupt(rgrp.entry.addr, &error))?;
        if header.flags.0 & RgrpFlags::NOALLOC != 0 {
            return Ok(0);
        }
        let recent = self.fs.store().freed.range(rgrp.entry.data0.0..rgrp.entry.end().0).count();
        rgrp.memory().free = Some(header.free);
        Ok(header.free.saturating_sub(u32::try_from(recent).unwrap_or(u32::MAX)))
    }

    /// Takes up to `want` neighbouring blocks, near `goal` if that is in a locked group.
    pub(super) async fn take(
        &self,
        tx: &mut Tx<'_>,
        want: u32,
        goal: BlockNo,
    ) -> Result<(BlockNo, u32), FsError> {
        assert!(0 < want, "nothing cannot be taken");
        for &index in &self.from {
            let Some((first, count)) = self.find(Some(tx), index, want, Some(goal), &BTreeSet::new()).await?
            else {
                continue;
            };
            for i in 0..u64::from(count) {
                self.set_state(tx, index, BlockNo(first.0 + i), BlockState::Free, BlockState::Used).await?;
            }
            self.edit_header(tx, index, |header| header.free = header.free.saturating_sub(count)).await?;
            tx.free_change -= i64::from(count);
            return Ok((first, count));
        }
        Err(FsError::NoSpace)
    }

    /// A free block that could become a dinode.
    pub(super) async fn candidate(&self, not: &BTreeSet<u64>) -> Result<BlockNo, FsError> {
        for &index in &self.from {
            if let Some((first, _)) = self.find(None, index, 1, None, not).await? {
                return Ok(first);
            }
        }
        Err(FsError::NoSpace)
    }

    /// Makes a free block a dinode, and says its generation number.
    pub(super) async fn take_dinode(&self, tx: &mut Tx<'_>, block: BlockNo) -> Result<u64, FsError> {
        let index = self.fs.rgrp_of(block)?;
        self.set_state(tx, index, block, BlockState::Free, BlockState::Dinode).await?;
        let mut generation = 0;
        self.edit_header(tx, index, |header| {
            header.free = header.free.saturating_sub(1);
            header.dinodes += 1;
            generation = header.igeneration.max(1); // 0 is skipped
            header.igeneration = generation + 1;
        })
        .await?;
        tx.free_change -= 1;
        tx.dinodes_change += 1;
        Ok(generation)
    }

    /// Gives blocks back.
    pub(super) async fn free(&self, tx: &mut Tx<'_>, blocks: &[BlockNo]) -> Result<(), FsError> {
        let mut counts: BTreeMap<usize, u32> = BTreeMap::new();
        for &block in blocks {
            let index = self.fs.rgrp_of(block)?;
            self.set_state(tx, index, block, BlockState::Used, BlockState::Free).await?;
            tx.freed(block);
            *counts.entry(index).or_default() += 1;
        }
        for (index, count) in counts {
            self.edit_header(tx, index, |header| {
                header.free += count;
                header.flags.0 &= !RgrpFlags::TRIMMED;
            })
            .await?;
            tx.free_change += i64::from(count);
        }
        Ok(())
    }

    /// Gives an unlinked dinode back.
    pub(super) async fn free_dinode(&self, tx: &mut Tx<'_>, block: BlockNo) -> Result<(), FsError> {
        let index = self.fs.rgrp_of(block)?;
        self.set_state(tx, index, block, BlockState::Unlinked, BlockState::Free).await?;
        self.edit_header(tx, index, |header| {
            header.free += 1;
            header.dinodes = header.dinodes.saturating_sub(1);
            header.flags.0 &= !RgrpFlags::TRIMMED;
        })
        .await?;
        tx.freed(block);
        tx.free_change += 1;
        tx.dinodes_change -= 1;
        Ok(())
    }

    /// Marks a dinode that has no link any more.
    pub(super) async fn unlink(&self, tx: &mut Tx<'_>, block: BlockNo) -> Result<(), FsError> {
        let index = self.fs.rgrp_of(block)?;
        self.set_state(tx, index, block, BlockState::Dinode, BlockState::Unlinked).await?;
        // The header's numbers stay, but its value block counts unlinked dinodes.
        self.edit_header(tx, index, |_| ()).await
    }

    async fn set_state(
        &self,
        tx: &mut Tx<'_>,
        index: usize,
        block: BlockNo,
        from: BlockState,
        to: BlockState,
    ) -> Result<(), FsError> {
        assert!(self.held.contains_key(&index), "the group of block {block} is locked");
        let rgrp = &self.fs.rgrps[index];
        let (bitmap, at) =
            rgrp.entry.locate(self.fs.size, block).ok_or_else(|| corrupt(block, &"is in no bitmap"))?;
        let (number, kind) = bitmap_block(rgrp, bitmap.block);
        let data = tx.edit(number, rgrp.glock(), kind).await?;
        let bits = &mut data[bitmap.start..bitmap.start + bitmap.bytes];
        let found = get_state(bits, at);
        if found != Some(from) {
            return Err(corrupt(block, &format!("is {found:?} in the bitmap, should be {from:?}")));
        }
        set_state(bits, at, to);
        Ok(())
    }

    async fn edit_header(
        &self,
        tx: &mut Tx<'_>,
        index: usize,
        change: impl FnOnce(&mut RgrpHeader),
    ) -> Result<(), FsError> {
        let rgrp = &self.fs.rgrps[index];
        let addr = rgrp.entry.addr;
        let data = tx.edit(addr, rgrp.glock(), MetaType::Rgrp).await?;
        // Within a transaction the sum of an earlier change is in order, too.
        let mut header = RgrpHeader::decode(data).map_err(|error| corrupt(addr, &error))?;
        change(&mut header);
        header.jid = tx.fs().jid();
        header.encode(tx.edit(addr, rgrp.glock(), MetaType::Rgrp).await?);
        rgrp.memory().free = Some(header.free);
        Ok(())
    }

    /// Neighbouring free blocks of a group.
    async fn find(
        &self,
        tx: Option<&Tx<'_>>,
        index: usize,
        want: u32,
        goal: Option<BlockNo>,
        not: &BTreeSet<u64>,
    ) -> Result<Option<(BlockNo, u32)>, FsError> {
        let rgrp = &self.fs.rgrps[index];
        let entry = rgrp.entry;
        let range = entry.data0.0..entry.end().0;
        let recent: BTreeSet<u64> = self.fs.store().freed.range(range).map(|(&block, _)| block).collect();
        let taken = |block: u64| {
            recent.contains(&block) || not.contains(&block) || tx.is_some_and(|tx| tx.has_freed(block))
        };
        let start = match goal {
            Some(goal) if (entry.data0..entry.end()).contains(&goal) => goal.0 - entry.data0.0,
            _ => rgrp.memory().cursor,
        };
        let bitmaps: Vec<_> = entry.bitmaps(self.fs.size).collect();
        let first_map = bitmaps.iter().rposition(|bitmap| bitmap.first <= start).unwrap_or(0);
        // Once round, and the first bitmap again for the part before the start.
        for turn in 0..=bitmaps.len() {
            let bitmap = bitmaps[(first_map + turn) % bitmaps.len()];
            let (number, kind) = bitmap_block(rgrp, bitmap.block);
            let data = self.fs.look(tx, number, rgrp.glock(), kind).await?;
            let bits = &data[bitmap.start..bitmap.start + bitmap.bytes];
            let end = bits.len() * 4;
            let mut at = if turn == 0 { (start - bitmap.first.min(start)) as usize } else { 0 };
            while let Some(found) = find_state(bits, at, end, BlockState::Free) {
                let block = entry.data0.0 + bitmap.first + found as u64;
                if taken(block) {
                    at = found + 1;
                    continue;
                }
                let more = (1..want as usize).take_while(|i| {
                    get_state(bits, found + i) == Some(BlockState::Free) && !taken(block + *i as u64)
                });
                let count = 1 + more.count() as u32;
                rgrp.memory().cursor = bitmap.first + found as u64 + u64::from(count);
                return Ok(Some((BlockNo(block), count)));
            }
        }
        Ok(None)
    }
}

impl Inner {
    /// The state of a block. The caller holds the lock of its group.
    pub(super) async fn block_state(&self, block: BlockNo) -> Result<BlockState, FsError> {
        let rgrp = &self.rgrps[self.rgrp_of(block)?];
        let (bitmap, at) =
            rgrp.entry.locate(self.size, block).ok_or_else(|| corrupt(block, &"is in no bitmap"))?;
        let (number, kind) = bitmap_block(rgrp, bitmap.block);
        let data = self.meta(number, rgrp.glock(), kind).await?;
        get_state(&data[bitmap.start..bitmap.start + bitmap.bytes], at)
            .ok_or_else(|| corrupt(block, &"is in no bitmap"))
    }

    /// Unlinked inodes that nobody has deleted yet, in one group.
    pub(super) async fn orphans(&self, index: usize) -> Result<Vec<BlockNo>, FsError> {
        let rgrp = &self.rgrps[index];
        let _held = self.lock(rgrp.glock(), CacheMode::Shared).await?;
        let mut found = Vec::new();
        for bitmap in rgrp.entry.bitmaps(self.size) {
            let (number, kind) = bitmap_block(rgrp, bitmap.block);
            let data = self.meta(number, rgrp.glock(), kind).await?;
            let bits = &data[bitmap.start..bitmap.start + bitmap.bytes];
            let mut at = 0;
            while let Some(index) = find_state(bits, at, bits.len() * 4, BlockState::Unlinked) {
                found.push(BlockNo(rgrp.entry.data0.0 + bitmap.first + index as u64));
                at = index + 1;
            }
        }
        Ok(found)
    }

    /// The value block of a group's lock, from its cached blocks (gfs2.md 10.4); `None` if they are not cached.
    pub(super) fn rgrp_value(&self, number: u64) -> Option<Vec<u8>> {
        let index = self.rgrps.binary_search_by_key(&number, |rgrp| rgrp.entry.addr.0).ok()?;
        let rgrp = &self.rgrps[index];
        let store = self.store();
        let header = RgrpHeader::decode(store.get(number)?).ok()?;
        let mut unlinked = 0;
        for bitmap in rgrp.entry.bitmaps(self.size) {
            let data = store.get(number + u64::from(bitmap.block))?;
            let bits = &data[bitmap.start..bitmap.start + bitmap.bytes];
            unlinked += count_states(bits, bits.len() * 4)[BlockState::Unlinked as usize];
        }
        let mut value = vec![0; 32];
        value[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        value[4..8].copy_from_slice(&header.flags.0.to_be_bytes());
        value[8..12].copy_from_slice(&header.free.to_be_bytes());
        value[12..16].copy_from_slice(&header.dinodes.to_be_bytes());
        value[16..24].copy_from_slice(&header.igeneration.to_be_bytes());
        value[24..28].copy_from_slice(&(unlinked as u32).to_be_bytes());
        Some(value)
    }
}

fn bitmap_block(rgrp: &Rgrp, block: u32) -> (BlockNo, MetaType) {
    let kind = if block == 0 { MetaType::Rgrp } else { MetaType::RgrpBitmap };
    (BlockNo(rgrp.entry.addr.0 + u64::from(block)), kind)
}
