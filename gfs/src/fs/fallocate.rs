//! Reserving blocks, punching holes, zeroing ranges (`fallocate(2)`).
//!
//! GFS2 knows no blocks that are reserved but unwritten: what is reserved is allocated and written with zeros, as the
//! kernel does it. A hole gives back whole blocks, and pointer blocks that lie in it as a whole; others stay, even
//! when they are empty.

use super::Inner;
use super::data::{CHUNK_BLOCKS, DIRTY_PAGES_MAX, FILE_BYTES_MAX, check_mutable, regular};
use super::inode::Inode;
use super::tree::Unit;
use super::truncate::Cuts;
use crate::FsError;
use crate::face::{FallocateMode, Ino};
use crate::format::{BlockNo, DINODE_BYTES, MetaType};
use quorate_dlm::cache::CacheMode;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Inner {
    /// Does what `mode` says to `len` bytes from `offset` on.
    pub(super) async fn fallocate_file(
        &self,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        if len == 0 {
            return Err(FsError::Invalid("a range of no bytes"));
        }
        if mode.punch_hole && (!mode.keep_size || mode.zero_range) {
            return Err(FsError::Unsupported);
        }
        let end = offset.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX).ok_or(FsError::TooLarge)?;
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Exclusive).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        regular(&dinode)?;
        check_mutable(&dinode, false)?;
        if mode.punch_hole || mode.zero_range {
            self.punch(&inode, offset, end).await?;
        }
        if !mode.punch_hole {
            self.preallocate(&inode, offset, end, mode.keep_size).await?;
        }
        Ok(())
    }

    /// Fills the holes of a range with blocks of zeros. A failure leaves what was done until then.
    async fn preallocate(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        end: u64,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let own = inode.addr();
        let size = self.size.usize() as u64;
        let stuffed = self.size.stuffed_bytes() as u64;
        let (mut at, last) = (offset / size, (end - 1) / size);
        let mut chunk = CHUNK_BLOCKS;
        loop {
            let dinode = self.dinode_of(None, own).await?;
            // What lies in the dinode is there already.
            let is_inside = dinode.height == 0 && end.max(dinode.size_bytes) <= stuffed;
            if is_inside || last < at {
                break;
            }
            let count = chunk.min(last - at + 1);
            match self.fill_holes(inode, at, count, end, keep_size).await {
                Ok(()) => at += count,
                Err(FsError::NoSpace) if 1 < chunk => chunk = 1,
                Err(error) => return Err(error),
            }
            if DIRTY_PAGES_MAX < inode.pages().dirty.len() {
                self.write_pages(own).await?;
                self.shrink_pages();
            }
        }
        let mut dinode = self.dinode_of(None, own).await?;
        let now = (self.clock)();
        dinode.ctime = now;
        if !keep_size && dinode.size_bytes < end {
            (dinode.size_bytes, dinode.mtime) = (end, now);
        }
        let mut tx = self.begin(1).await?;
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(())
    }

    /// One transaction of a reservation.
    async fn fill_holes(
        &self,
        inode: &Arc<Inode>,
        first: u64,
        count: u64,
        end: u64,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let own = inode.addr();
        let mut dinode = self.dinode_of(None, own).await?;
        let last = first + count - 1;
        let holes = self.holes(&dinode, first, last).await?;
        if holes == 0 {
            return Ok(());
        }
        let covered = (last + 1).saturating_mul(self.size.usize() as u64).min(FILE_BYTES_MAX);
        let covered = covered.max(dinode.size_bytes);
        let need = self.blocks_to_add(&dinode, covered, Unit::Data, holes);
        let locks = self.lock_for_alloc(&BTreeSet::new(), need, dinode.goal_data).await?;
        let mut tx = self.begin((need as usize).saturating_sub(holes as usize) + 16).await?;
        self.grow_tree(&mut tx, &locks, &mut dinode, Some(inode), covered, Unit::Data).await?;
        let mut at = first;
        while at <= last {
            let (block, run) = self.map_run(Some(&tx), &dinode, at, last - at + 1).await?;
            at += match block {
                Some(_) => run,
                None => {
                    let (block, run) =
                        self.allocate(&mut tx, &locks, &mut dinode, at, run, Unit::Data).await?;
                    for i in 0..run {
                        tx.page(inode, at + i, self.zero_page.clone(), BlockNo(block.0 + i));
                    }
                    run
                }
            };
        }
        tx.order(own);
        if !keep_size {
            dinode.size_bytes = dinode.size_bytes.max(covered.min(end));
        }
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(())
    }

    /// Makes a range read as zeros and frees the whole blocks in it; the size stays.
    async fn punch(&self, inode: &Arc<Inode>, offset: u64, end: u64) -> Result<(), FsError> {
        let own = inode.addr();
        let mut dinode = self.dinode_of(None, own).await?;
        let now = (self.clock)();
        (dinode.mtime, dinode.ctime) = (now, now);
        if dinode.height == 0 {
            let end = end.min(dinode.size_bytes);
            let mut tx = self.begin(1).await?;
            let block = tx.edit(own, inode.glock(), MetaType::Dinode).await?;
            if offset < end {
                block[DINODE_BYTES + offset as usize..DINODE_BYTES + end as usize].fill(0);
            }
            tx.put_dinode(&dinode).await?;
            tx.commit();
            return Ok(());
        }
        let size = self.size.usize() as u64;
        // Behind the end of the file there are zeros anyway.
        let whole_to = if dinode.size_bytes <= end { end.div_ceil(size) } else { end / size };
        let whole_from = offset.div_ceil(size);
        if whole_to < whole_from || !offset.is_multiple_of(size) {
            let to = end.min(whole_from * size).min(dinode.size_bytes);
            self.zero_part(inode, offset, to).await?;
        }
        if whole_from <= whole_to && whole_to * size < end {
            self.zero_part(inode, whole_to * size, end.min(dinode.size_bytes)).await?;
        }
        if whole_to <= whole_from {
            return self.touch(&dinode).await;
        }
        loop {
            // Writes under way end before their blocks can be freed.
            let writing = inode.writing.lock().await;
            let gone = inode.drop_page_range(whole_from..whole_to);
            self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
            drop(writing);
            let mut now = self.dinode_of(None, own).await?;
            (now.mtime, now.ctime) = (dinode.mtime, dinode.ctime);
            let mut cuts = Cuts::default();
            let done = self.collect(&now, whole_from..whole_to, &mut cuts).await?;
            let rgrps = self.rgrps_of(&cuts.freed)?;
            let locks = self.lock_rgrps(&rgrps).await?;
            let mut tx = self.begin(cuts.changes() + self.bitmap_blocks(&rgrps) + 2).await?;
            self.apply_cuts(&mut tx, own, &cuts).await?;
            locks.free(&mut tx, &cuts.freed).await?;
            now.blocks = now.blocks.saturating_sub(cuts.freed.len() as u64);
            tx.order(own);
            tx.put_dinode(&now).await?;
            tx.commit();
            if done {
                return Ok(());
            }
        }
    }

    async fn touch(&self, dinode: &crate::format::Dinode) -> Result<(), FsError> {
        let mut tx = self.begin(1).await?;
        tx.put_dinode(dinode).await?;
        tx.commit();
        Ok(())
    }

    /// Zeroes bytes within one block, if the block is there.
    async fn zero_part(&self, inode: &Arc<Inode>, from: u64, to: u64) -> Result<(), FsError> {
        if to <= from {
            return Ok(());
        }
        let dinode = self.dinode_of(None, inode.addr()).await?;
        let index = from / self.size.usize() as u64;
        let (Some(_), _) = self.map_run(None, &dinode, index, 1).await? else { return Ok(()) };
        self.load_edges(inode, &dinode, from, to).await?;
        let mut tx = self.begin(1).await?;
        self.put_pages(&mut tx, inode, &dinode, from, &vec![0; (to - from) as usize]).await?;
        tx.order(inode.addr());
        tx.commit();
        Ok(())
    }
}
