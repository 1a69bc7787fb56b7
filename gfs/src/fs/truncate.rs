//! Shrinking: freeing blocks from the end of a tree, in several transactions where one would be too large (gfs2.md 3.3).

use super::Inner;
use super::data::check_mutable;
use super::glock::Glock;
use super::inode::Inode;
use super::tree::{Unit, kind_at, pointer_at, set_pointer_at};
use crate::FsError;
use crate::format::{BlockNo, DINODE_BYTES, Dinode, DinodeFlags, MetaType};
use core::ops::Range;
use quorate_membership::BoxFuture;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One transaction frees at most this many blocks,
const FREES_MAX: usize = 4096;
/// and changes at most this many pointer blocks.
const CUTS_MAX: usize = 64;

/// What a transaction takes out of a tree.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// Pointers to zero: block, its level, index.
    pointers: Vec<(BlockNo, usize, usize)>,
    cut_blocks: BTreeSet<u64>,
    /// Blocks to free.
    pub(super) freed: Vec<BlockNo>,
}

impl Cuts {
    /// How many pointer blocks change.
    pub(super) fn changes(&self) -> usize {
        self.cut_blocks.len()
    }
}

impl Inner {
    /// Sets the size of a file. The caller holds it exclusively.
    pub(super) async fn set_size(&self, inode: &Arc<Inode>, size_bytes: u64) -> Result<(), FsError> {
        let mut dinode = self.dinode_of(None, inode.addr()).await?;
        check_mutable(&dinode, false)?;
        if i64::MAX as u64 <= size_bytes {
            return Err(FsError::TooLarge);
        }
        let now = (self.clock)();
        (dinode.mtime, dinode.ctime) = (now, now);
        if dinode.size_bytes <= size_bytes {
            return self.grow(inode, dinode, size_bytes).await;
        }
        let own = inode.addr();
        if dinode.height == 0 {
            let mut tx = self.begin(1).await?;
            let block = tx.edit(own, inode.glock(), MetaType::Dinode).await?;
            block[DINODE_BYTES + size_bytes as usize..].fill(0);
            dinode.size_bytes = size_bytes;
            tx.put_dinode(&dinode).await?;
            tx.commit();
            return Ok(());
        }
        let size = self.size.usize() as u64;
        let keep = size_bytes.div_ceil(size);
        // Writes under way end before their blocks can be freed.
        let writing = inode.writing.lock().await;
        let gone = inode.drop_pages(keep);
        self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
        drop(writing);
        let edge = if size_bytes.is_multiple_of(size) {
            None
        } else {
            self.map_run(None, &dinode, keep - 1, 1).await?.0
        };
        if let Some(block) = edge {
            // With the new size, what lies beyond it reads as zeros.
            dinode.size_bytes = size_bytes;
            self.zero_edge(inode, &dinode, keep - 1, block).await?;
        }
        let mut cuts = Cuts::default();
        let done = self.collect(&dinode, keep..u64::MAX, &mut cuts).await?;
        dinode.size_bytes = size_bytes;
        if done {
            // The usual case: all in one transaction.
            return self.cut(&mut dinode, cuts, true).await;
        }
        dinode.flags |= DinodeFlags::TRUNC_IN_PROG;
        let mut tx = self.begin(1).await?;
        tx.put_dinode(&dinode).await?;
        tx.order(own);
        tx.commit();
        self.finish_truncate(own).await
    }

    async fn zero_edge(
        &self,
        inode: &Arc<Inode>,
        dinode: &Dinode,
        index: u64,
        block: BlockNo,
    ) -> Result<(), FsError> {
        let mut tx = self.begin(1).await?;
        let page = tx.page_at(inode, index);
        let mut data = match page {
            Some(data) => data,
            None => Arc::new(self.read_raw(block, 1).await?.to_vec()),
        };
        let live = (dinode.size_bytes % self.size.usize() as u64) as usize;
        Arc::make_mut(&mut data)[live..].fill(0);
        tx.page(inode, index, data, block);
        tx.order(inode.addr());
        tx.commit();
        Ok(())
    }

    async fn grow(&self, inode: &Arc<Inode>, mut dinode: Dinode, size_bytes: u64) -> Result<(), FsError> {
        let unstuff = dinode.height == 0 && (self.size.stuffed_bytes() as u64) < size_bytes;
        let need = if unstuff { self.blocks_to_add(&dinode, size_bytes, Unit::Data, 0) } else { 0 };
        let locks = self.lock_for_alloc(&BTreeSet::new(), need, dinode.goal_data).await?;
        let mut tx = self.begin(need as usize + 8).await?;
        if unstuff {
            // Only as high as it must be to be no longer stuffed; writes grow the tree when they come.
            let least = self.size.stuffed_bytes() as u64 + 1;
            self.grow_tree(&mut tx, &locks, &mut dinode, Some(inode), least, Unit::Data).await?;
        }
        dinode.size_bytes = size_bytes;
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(())
    }

    /// Frees what lies beyond the size of an inode whose truncation was begun, here or by a node that failed.
    pub(super) async fn finish_truncate(&self, own: BlockNo) -> Result<(), FsError> {
        loop {
            let mut dinode = self.dinode_of(None, own).await?;
            let keep = dinode.size_bytes.div_ceil(self.size.usize() as u64);
            let mut cuts = Cuts::default();
            let done = self.collect(&dinode, keep..u64::MAX, &mut cuts).await?;
            self.cut(&mut dinode, cuts, done).await?;
            if done {
                return Ok(());
            }
        }
    }

    /// One transaction of a truncation; with `last` the one that ends it.
    async fn cut(&self, dinode: &mut Dinode, cuts: Cuts, last: bool) -> Result<(), FsError> {
        let own = dinode.inum.addr;
        let rgrps = self.rgrps_of(&cuts.freed)?;
        let locks = self.lock_rgrps(&rgrps).await?;
        let mut tx = self.begin(cuts.cut_blocks.len() + self.bitmap_blocks(&rgrps) + 2).await?;
        self.apply_cuts(&mut tx, own, &cuts).await?;
        locks.free(&mut tx, &cuts.freed).await?;
        dinode.blocks = dinode.blocks.saturating_sub(cuts.freed.len() as u64);
        if last {
            dinode.flags = dinode.flags.without(DinodeFlags::TRUNC_IN_PROG);
            if dinode.size_bytes == 0 {
                dinode.height = 0;
                (dinode.goal_meta, dinode.goal_data) = (own, own);
                tx.edit(own, Glock::inode(own), MetaType::Dinode).await?[DINODE_BYTES..].fill(0);
            }
            tx.order(own);
        }
        tx.put_dinode(dinode).await?;
        tx.commit();
        Ok(())
    }

    /// Zeroes the collected pointers, except in blocks that are freed themselves.
    pub(super) async fn apply_cuts(
        &self,
        tx: &mut super::tx::Tx<'_>,
        own: BlockNo,
        cuts: &Cuts,
    ) -> Result<(), FsError> {
        let freed: BTreeSet<BlockNo> = cuts.freed.iter().copied().collect();
        for &(block, level, index) in &cuts.pointers {
            if !freed.contains(&block) {
                let data = tx.edit(block, Glock::inode(own), kind_at(level)).await?;
                set_pointer_at(data, level, index, BlockNo::NONE);
            }
        }
        Ok(())
    }

    /// The groups that blocks are in.
    pub(super) fn rgrps_of(&self, blocks: &[BlockNo]) -> Result<BTreeSet<usize>, FsError> {
        blocks.iter().map(|&block| self.rgrp_of(block)).collect()
    }

    /// How many blocks of these groups a transaction may change.
    pub(super) fn bitmap_blocks(&self, rgrps: &BTreeSet<usize>) -> usize {
        rgrps.iter().map(|&index| self.rgrps[index].entry.length as usize).sum()
    }

    /// Collects what hangs in a tree at these logical blocks, from the right; `false` if there is more.
    pub(super) async fn collect(
        &self,
        dinode: &Dinode,
        range: Range<u64>,
        cuts: &mut Cuts,
    ) -> Result<bool, FsError> {
        if dinode.height == 0 {
            return Ok(true);
        }
        self.collect_at(dinode, dinode.inum.addr, (0, 0), range, cuts).await
    }

    fn collect_at<'a>(
        &'a self,
        dinode: &'a Dinode,
        block: BlockNo,
        (level, base): (usize, u64),
        range: Range<u64>,
        cuts: &'a mut Cuts,
    ) -> BoxFuture<'a, Result<bool, FsError>> {
        Box::pin(async move {
            let height = usize::from(dinode.height);
            let glock = Glock::inode(dinode.inum.addr);
            let data = self.meta(block, glock, kind_at(level)).await?;
            let span = self.size.span_blocks(height, level);
            for index in (0..self.pointers_at(level)).rev() {
                let first = base.saturating_add(span.saturating_mul(index as u64));
                let end = first.saturating_add(span);
                if end <= range.start {
                    break;
                }
                if range.end <= first {
                    continue;
                }
                let child = pointer_at(&data, level, index).unwrap_or(BlockNo::NONE);
                if child.is_none() {
                    continue;
                }
                if FREES_MAX <= cuts.freed.len() || CUTS_MAX <= cuts.cut_blocks.len() {
                    return Ok(false);
                }
                let below = (level + 1, first);
                if level + 1 < height && !self.collect_at(dinode, child, below, range.clone(), cuts).await? {
                    return Ok(false);
                }
                if range.start <= first && end <= range.end {
                    cuts.pointers.push((block, level, index));
                    cuts.cut_blocks.insert(block.0);
                    cuts.freed.push(child);
                }
            }
            Ok(true)
        })
    }
}
