//! Deleting inodes without links: when the last user on any node is gone (gfs2.md 10.8).

use super::Inner;
use super::glock::Glock;
use super::truncate::Cuts;
use crate::FsError;
use crate::format::{BlockNo, BlockState, Dinode, Leaf, MAGIC, MetaType};
use quorate_dlm::cache::{AcquireFlags, CacheMode};
use std::collections::BTreeSet;

/// One transaction frees the leaves of at most this many runs.
const RUNS_MAX: usize = 1024;

impl Inner {
    /// Deletes an unlinked inode, unless another node still uses it: then that one will.
    pub(super) async fn delete_inode(&self, addr: BlockNo) -> Result<(), FsError> {
        self.check_writable()?;
        let glock = Glock::inode(addr);
        let held = self.lock(glock, CacheMode::Exclusive).await?;
        {
            let rgrp = Glock::rgrp(self.rgrps[self.rgrp_of(addr)?].entry.addr);
            let _rgrp = self.lock(rgrp, CacheMode::Shared).await?;
            if self.block_state(addr).await? != BlockState::Unlinked {
                return Ok(());
            }
        }
        let dinode = self.dinode_of(None, addr).await?;
        if dinode.nlink != 0 {
            return Ok(());
        }
        let flags = AcquireFlags { try_now: true, nudge: true, no_cache: true, ..Default::default() };
        let iopen = match self.lock_with(Glock::iopen(addr), CacheMode::Exclusive, flags).await {
            Err(FsError::WouldBlock) => return Ok(()),
            other => other?,
        };
        self.delete_contents(addr).await?;
        let mut value = vec![0; 32];
        value[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        value[8..16].copy_from_slice(&dinode.inum.formal.to_be_bytes());
        held.set_value(value);
        drop(iopen);
        drop(held);
        // Whoever makes an inode here next finds the lock free.
        self.cache().drop_lock(&glock.name()).await;
        Ok(())
    }

    async fn delete_contents(&self, addr: BlockNo) -> Result<(), FsError> {
        let dinode = self.dinode_of(None, addr).await?;
        if dinode.is_hashed() {
            self.delete_leaves(dinode).await?;
        }
        loop {
            let mut dinode = self.dinode_of(None, addr).await?;
            let mut cuts = Cuts::default();
            let done = self.collect(&dinode, 0..u64::MAX, &mut cuts).await?;
            if done {
                cuts.freed.extend(self.ea_all_blocks(&dinode).await?);
            }
            let mut rgrps = self.rgrps_of(&cuts.freed)?;
            rgrps.insert(self.rgrp_of(addr)?);
            let locks = self.lock_rgrps(&rgrps).await?;
            let mut tx = self.begin(cuts.freed.len() / 256 + self.bitmap_blocks(&rgrps) + 2).await?;
            if done {
                locks.free(&mut tx, &cuts.freed).await?;
                locks.free_dinode(&mut tx, addr).await?;
                tx.commit();
                return Ok(());
            }
            self.apply_cuts(&mut tx, addr, &cuts).await?;
            locks.free(&mut tx, &cuts.freed).await?;
            dinode.blocks = dinode.blocks.saturating_sub(cuts.freed.len() as u64);
            tx.put_dinode(&dinode).await?;
            tx.commit();
        }
    }

    /// Frees the leaves of a hashed directory, a part of the table at a time, so that none can be freed twice.
    async fn delete_leaves(&self, mut dinode: Dinode) -> Result<(), FsError> {
        let own = dinode.inum.addr;
        let runs = self.leaf_runs(&dinode).await?;
        for chunk in runs.chunks(RUNS_MAX) {
            let mut leaves = BTreeSet::new();
            for (_, first) in chunk {
                let mut block = *first;
                while !block.is_none() && leaves.insert(block) {
                    let data = self.meta(block, Glock::inode(own), MetaType::Leaf).await?;
                    let leaf = Leaf::decode(&data).map_err(|error| super::store::corrupt(block, &error))?;
                    block = leaf.next;
                }
            }
            let leaves: Vec<BlockNo> = leaves.into_iter().collect();
            let rgrps = self.rgrps_of(&leaves)?;
            let locks = self.lock_rgrps(&rgrps).await?;
            let mut tx = self.begin(self.bitmap_blocks(&rgrps) + 300).await?;
            for (range, _) in chunk {
                self.table_set(&mut tx, &dinode, range.clone(), BlockNo::NONE).await?;
            }
            locks.free(&mut tx, &leaves).await?;
            dinode.blocks = dinode.blocks.saturating_sub(leaves.len() as u64);
            tx.put_dinode(&dinode).await?;
            tx.commit();
        }
        Ok(())
    }

    /// Deletes unlinked inodes that a failed node left behind. Those in use anywhere are left alone.
    pub(super) async fn reclaim(&self) -> Result<(), FsError> {
        for index in 0..self.rgrps.len() {
            for addr in self.orphans(index).await? {
                if self.inodes().contains_key(&addr.0) {
                    continue;
                }
                if let Err(error) = self.delete_inode(addr).await {
                    self.check()?;
                    tracing::debug!(inode = addr.0, %error, "an orphan stays for later");
                }
            }
        }
        Ok(())
    }
}
