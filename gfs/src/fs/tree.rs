//! The tree of pointers of an inode: following it, growing it, hanging new blocks into it (gfs2.md 3.2).

use super::Inner;
use super::glock::Glock;
use super::inode::Inode;
use super::rgrp::RgrpLocks;
use super::store::{Bytes, corrupt};
use super::tx::Tx;
use crate::FsError;
use crate::format::{
    BlockNo, DINODE_BYTES, Dinode, META_HEADER_BYTES, MetaType, indirect_pointer, pointer,
    set_indirect_pointer, set_pointer,
};
use std::sync::Arc;

/// Pointer `index` of the block at `level` of a tree; level 0 is the dinode.
pub(super) fn pointer_at(block: &[u8], level: usize, index: usize) -> Option<BlockNo> {
    if level == 0 { pointer(block, index) } else { indirect_pointer(block, index) }
}

/// Sets pointer `index` of the block at `level`.
pub(super) fn set_pointer_at(block: &mut [u8], level: usize, index: usize, to: BlockNo) {
    if level == 0 { set_pointer(block, index, to) } else { set_indirect_pointer(block, index, to) }
}

/// What a block at `level` is.
pub(super) fn kind_at(level: usize) -> MetaType {
    if level == 0 { MetaType::Dinode } else { MetaType::Indirect }
}

/// What hangs at the bottom of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Data of a file.
    Data,
    /// Headered blocks: the hash table of a directory.
    Headered,
}

impl Inner {
    /// How many pointers the block at `level` has.
    pub(super) fn pointers_at(&self, level: usize) -> usize {
        if level == 0 { self.size.dinode_pointers() } else { self.size.indirect_pointers() }
    }

    /// A block as the transaction sees it, or as it is cached.
    pub(super) async fn look(
        &self,
        tx: Option<&Tx<'_>>,
        block: BlockNo,
        glock: Glock,
        kind: MetaType,
    ) -> Result<Bytes, FsError> {
        match tx {
            Some(tx) => tx.read(block, glock, kind).await,
            None => self.meta(block, glock, kind).await,
        }
    }

    /// Where logical block `logical` is, and for how many blocks (at most `most`) that goes on without a break. `None`
    /// is a hole.
    pub(super) async fn map_run(
        &self,
        tx: Option<&Tx<'_>>,
        dinode: &Dinode,
        logical: u64,
        most: u64,
    ) -> Result<(Option<BlockNo>, u64), FsError> {
        let height = usize::from(dinode.height);
        let Some(path) = self.size.path(height, logical) else { return Ok((None, most)) };
        let glock = Glock::inode(dinode.inum.addr);
        let mut at = dinode.inum.addr;
        for (level, &index) in path.indices().iter().enumerate() {
            let block = self.look(tx, at, glock, kind_at(level)).await?;
            let next = pointer_at(&block, level, index).unwrap_or(BlockNo::NONE);
            if level + 1 < height {
                if next.is_none() {
                    let span = self.size.span_blocks(height, level);
                    return Ok((None, (span - logical % span).min(most)));
                }
                at = next;
                continue;
            }
            let limit = (self.pointers_at(level) - index).min(usize::try_from(most).unwrap_or(usize::MAX));
            let run = (1..limit)
                .take_while(|&i| {
                    let other = pointer_at(&block, level, index + i).unwrap_or(BlockNo::NONE);
                    if next.is_none() { other.is_none() } else { other.0 == next.0 + i as u64 }
                })
                .count() as u64;
            return Ok(((!next.is_none()).then_some(next), run + 1));
        }
        Err(corrupt(dinode.inum.addr, &"a tree without levels"))
    }

    /// How many blocks it may take at most to hang `count` new ones in at the end of a file of `size_bytes`.
    pub(super) fn blocks_to_add(&self, dinode: &Dinode, size_bytes: u64, unit: Unit, count: u64) -> u32 {
        let height = self.size.height_for(size_bytes, self.unit_bytes(unit)).unwrap_or(0);
        let height = height.max(usize::from(dinode.height)).max(1);
        let lowest = count / self.size.indirect_pointers() as u64 + 2;
        let indirect = if height == 1 { 0 } else { lowest + 2 * height as u64 };
        u32::try_from(count + indirect + 1).unwrap_or(u32::MAX)
    }

    pub(super) fn unit_bytes(&self, unit: Unit) -> usize {
        if unit == Unit::Data { self.size.usize() } else { self.size.headered_bytes() }
    }

    /// Makes the tree high enough for `size_bytes`. A stuffed inode gets a block for what is in its dinode.
    pub(super) async fn grow_tree(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dinode: &mut Dinode,
        inode: Option<&Arc<Inode>>,
        size_bytes: u64,
        unit: Unit,
    ) -> Result<(), FsError> {
        let wanted = self.size.height_for(size_bytes, self.unit_bytes(unit)).ok_or(FsError::TooLarge)?;
        if wanted == 0 {
            return Ok(());
        }
        if dinode.height == 0 {
            self.unstuff(tx, locks, dinode, inode, unit).await?;
        }
        let (own, glock) = (dinode.inum.addr, Glock::inode(dinode.inum.addr));
        while usize::from(dinode.height) < wanted {
            let old = tx.read(own, glock, MetaType::Dinode).await?;
            if old[DINODE_BYTES..].iter().any(|&byte| byte != 0) {
                let block = self.take_one(tx, locks, dinode).await?;
                let fresh = tx.fresh(block, glock, MetaType::Indirect);
                let payload = &old[DINODE_BYTES..];
                fresh[META_HEADER_BYTES..META_HEADER_BYTES + payload.len()].copy_from_slice(payload);
                let data = tx.edit(own, glock, MetaType::Dinode).await?;
                data[DINODE_BYTES..].fill(0);
                set_pointer(data, 0, block);
            }
            dinode.height += 1;
        }
        Ok(())
    }

    /// Moves stuffed contents into a block of their own.
    async fn unstuff(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dinode: &mut Dinode,
        inode: Option<&Arc<Inode>>,
        unit: Unit,
    ) -> Result<(), FsError> {
        let (own, glock) = (dinode.inum.addr, Glock::inode(dinode.inum.addr));
        let old = tx.read(own, glock, MetaType::Dinode).await?;
        let len = (dinode.size_bytes as usize).min(self.size.stuffed_bytes());
        let stuffed = &old[DINODE_BYTES..DINODE_BYTES + len];
        let mut first = BlockNo::NONE;
        if !stuffed.is_empty() {
            first = self.take_one(tx, locks, dinode).await?;
            match unit {
                Unit::Data => {
                    let inode = inode.expect("a file that is unstuffed is in use");
                    let mut page = vec![0; self.size.usize()];
                    page[..len].copy_from_slice(stuffed);
                    tx.page(inode, 0, Arc::new(page), first);
                    tx.order(own);
                }
                Unit::Headered => {
                    let fresh = tx.fresh(first, glock, MetaType::HeaderedData);
                    fresh[META_HEADER_BYTES..META_HEADER_BYTES + len].copy_from_slice(stuffed);
                }
            }
        }
        let data = tx.edit(own, glock, MetaType::Dinode).await?;
        data[DINODE_BYTES..].fill(0);
        set_pointer(data, 0, first);
        dinode.height = 1;
        Ok(())
    }

    /// Takes one block for an inode and counts it.
    pub(super) async fn take_one(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dinode: &mut Dinode,
    ) -> Result<BlockNo, FsError> {
        let (block, _) = locks.take(tx, 1, dinode.goal_meta).await?;
        dinode.blocks += 1;
        dinode.goal_meta = block;
        dinode.goal_data = block;
        Ok(block)
    }

    /// Hangs up to `want` new blocks in from `logical` on, which is a hole the tree is high enough for. Says which blocks,
    /// and how many: as many as are neighbours on disk and hang in one pointer block.
    pub(super) async fn allocate(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dinode: &mut Dinode,
        logical: u64,
        want: u64,
        unit: Unit,
    ) -> Result<(BlockNo, u64), FsError> {
        let (own, glock) = (dinode.inum.addr, Glock::inode(dinode.inum.addr));
        let height = usize::from(dinode.height);
        let path = self.size.path(height, logical).ok_or_else(|| corrupt(own, &"the tree is too low"))?;
        let mut at = own;
        for (level, &index) in path.indices().iter().enumerate().take(height - 1) {
            let block = tx.read(at, glock, kind_at(level)).await?;
            let mut next = pointer_at(&block, level, index).unwrap_or(BlockNo::NONE);
            if next.is_none() {
                next = self.take_one(tx, locks, dinode).await?;
                tx.fresh(next, glock, MetaType::Indirect);
                set_pointer_at(tx.edit(at, glock, kind_at(level)).await?, level, index, next);
            }
            at = next;
        }
        let level = height - 1;
        let index = path.indices()[level];
        let block = tx.read(at, glock, kind_at(level)).await?;
        let most = (self.pointers_at(level) - index).min(usize::try_from(want).unwrap_or(usize::MAX));
        let holes = (0..most)
            .take_while(|i| pointer_at(&block, level, index + i).is_some_and(BlockNo::is_none))
            .count() as u32;
        if holes == 0 {
            return Err(corrupt(at, &"a block is already there"));
        }
        let (first, count) = locks.take(tx, holes, dinode.goal_data).await?;
        let data = tx.edit(at, glock, kind_at(level)).await?;
        for i in 0..count as usize {
            set_pointer_at(data, level, index + i, BlockNo(first.0 + i as u64));
        }
        if unit == Unit::Headered {
            for i in 0..u64::from(count) {
                tx.fresh(BlockNo(first.0 + i), glock, MetaType::HeaderedData);
            }
        }
        dinode.blocks += u64::from(count);
        dinode.goal_meta = BlockNo(first.0 + u64::from(count) - 1);
        dinode.goal_data = dinode.goal_meta;
        Ok((first, u64::from(count)))
    }
}
