//! How a directory grows: from linear to hashed, leaves that split, tables that double, leaves in chains (gfs2.md 6.4).

use super::Inner;
use super::dir::table_index;
use super::glock::Glock;
use super::rgrp::RgrpLocks;
use super::store::corrupt;
use super::tree::Unit;
use super::tx::Tx;
use crate::FsError;
use crate::format::{
    BlockNo, DINODE_BYTES, Dinode, DinodeFlags, Dirents, LEAF_BYTES, Leaf, META_HEADER_BYTES, MetaType,
    init_dirents, move_dirents_below,
};

impl Inner {
    fn new_leaf(&self, dir: &Dinode, depth: u16, entries: u16, dist: u32) -> Leaf {
        Leaf {
            jid: self.jid(),
            depth,
            entries,
            next: BlockNo::NONE,
            inode: dir.inum.addr,
            dist,
            changed: (self.clock)(),
        }
    }

    /// A linear directory becomes a hashed one with a single leaf.
    pub(super) async fn dir_convert(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dir: &mut Dinode,
    ) -> Result<(), FsError> {
        let (own, glock) = (dir.inum.addr, Glock::inode(dir.inum.addr));
        let old = tx.read(own, glock, MetaType::Dinode).await?;
        let mut last = None;
        for entry in Dirents::new(&old, DINODE_BYTES) {
            let entry = entry.map_err(|error| corrupt(own, &error))?;
            last = Some((entry.offset, entry.rec_len));
        }
        let (offset, rec_len) = last.ok_or_else(|| corrupt(own, &"a directory without entries"))?;
        let block = self.take_one(tx, locks, dir).await?;
        let entries =
            u16::try_from(dir.entries).map_err(|_| corrupt(own, &"too many entries for a block"))?;
        let leaf = self.new_leaf(dir, 0, entries, 1);
        let data = tx.fresh(block, glock, MetaType::Leaf);
        let payload = &old[DINODE_BYTES..];
        data[LEAF_BYTES..LEAF_BYTES + payload.len()].copy_from_slice(payload);
        let gain = DINODE_BYTES - LEAF_BYTES;
        let at = offset - gain + 20;
        let rec_len = u16::try_from(rec_len + gain).map_err(|_| corrupt(own, &"record length"))?;
        data[at..at + 2].copy_from_slice(&rec_len.to_be_bytes());
        leaf.encode(data);
        dir.flags |= DinodeFlags::EXHASH;
        dir.depth = self.size.depth_min();
        dir.size_bytes = 8 << dir.depth;
        dir.payload_format = 0;
        let data = tx.edit(own, glock, MetaType::Dinode).await?;
        data[DINODE_BYTES..].fill(0);
        for slot in data[DINODE_BYTES..].chunks_exact_mut(8).take(1 << dir.depth) {
            slot.copy_from_slice(&block.0.to_be_bytes());
        }
        Ok(())
    }

    /// A leaf that owns several pointers gives the lower half of them, and of its hashes, to a new one.
    pub(super) async fn dir_split(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dir: &mut Dinode,
        block: BlockNo,
        hash: u32,
    ) -> Result<(), FsError> {
        let (own, glock) = (dir.inum.addr, Glock::inode(dir.inum.addr));
        let mut leaf = self.leaf(Some(tx), own, block).await?;
        let run = 1_u64 << (dir.depth - leaf.depth);
        let start = table_index(dir, hash) & !(run - 1);
        let boundary = ((start + run / 2) << (32 - u32::from(dir.depth))) as u32; // below 2^32: start is in the table
        let new_block = self.take_one(tx, locks, dir).await?;
        leaf.depth += 1;
        let mut new_leaf = self.new_leaf(dir, leaf.depth, 0, 1);
        let mut old_data = Vec::clone(&*tx.read(block, glock, MetaType::Leaf).await?);
        let mut new_data = vec![0; self.size.usize()];
        init_dirents(&mut new_data, LEAF_BYTES);
        let moved = move_dirents_below(&mut old_data, &mut new_data, LEAF_BYTES, boundary)
            .map_err(|error| corrupt(block, &error))?;
        leaf.entries = leaf.entries.saturating_sub(moved);
        new_leaf.entries = moved;
        leaf.encode(&mut old_data);
        new_leaf.encode(&mut new_data);
        *tx.fresh(new_block, glock, MetaType::Leaf) = new_data;
        *tx.edit(block, glock, MetaType::Leaf).await? = old_data;
        self.table_set(tx, dir, start..start + run / 2, new_block).await
    }

    /// The hash table gets twice the pointers.
    pub(super) async fn dir_double(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dir: &mut Dinode,
    ) -> Result<(), FsError> {
        let (own, glock) = (dir.inum.addr, Glock::inode(dir.inum.addr));
        let mut table = Vec::with_capacity(16 << dir.depth);
        for index in 0..1_u64 << dir.depth {
            let pointer = self.table_get(Some(tx), dir, index).await?.0.to_be_bytes();
            table.extend_from_slice(&pointer);
            table.extend_from_slice(&pointer);
        }
        let new_size = table.len() as u64;
        self.grow_tree(tx, locks, dir, None, new_size, Unit::Headered).await?;
        dir.depth += 1;
        dir.size_bytes = new_size;
        if dir.height == 0 {
            let data = tx.edit(own, glock, MetaType::Dinode).await?;
            data[DINODE_BYTES..DINODE_BYTES + table.len()].copy_from_slice(&table);
            return Ok(());
        }
        let unit = self.size.headered_bytes();
        for (logical, chunk) in table.chunks(unit).enumerate() {
            let logical = logical as u64;
            let block = match self.map_run(Some(tx), dir, logical, 1).await?.0 {
                Some(block) => block,
                None => self.allocate(tx, locks, dir, logical, 1, Unit::Headered).await?.0,
            };
            let data = tx.edit(block, glock, MetaType::HeaderedData).await?;
            data[META_HEADER_BYTES..META_HEADER_BYTES + chunk.len()].copy_from_slice(chunk);
        }
        Ok(())
    }

    /// The table is at its limit: another leaf at the end of the chain, whose last is `last`.
    pub(super) async fn dir_overflow(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dir: &mut Dinode,
        last: BlockNo,
    ) -> Result<(), FsError> {
        let (own, glock) = (dir.inum.addr, Glock::inode(dir.inum.addr));
        let mut leaf = self.leaf(Some(tx), own, last).await?;
        let block = self.take_one(tx, locks, dir).await?;
        let new_leaf = self.new_leaf(dir, leaf.depth, 0, leaf.dist.max(1) + 1);
        let data = tx.fresh(block, glock, MetaType::Leaf);
        init_dirents(data, LEAF_BYTES);
        new_leaf.encode(data);
        leaf.next = block;
        leaf.encode(tx.edit(last, glock, MetaType::Leaf).await?);
        Ok(())
    }
}
