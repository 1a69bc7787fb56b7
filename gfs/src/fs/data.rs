//! The data of files: reading and writing through cached pages, and writing those back.

use super::Inner;
use super::inode::{Inode, Page};
use super::store::Bytes;
use super::tree::Unit;
use super::tx::Tx;
use crate::FsError;
use crate::face::Ino;
use crate::format::{BlockNo, DINODE_BYTES, Dinode, DinodeFlags, FileType};
use futures_util::future::try_join_all;
use quorate_dlm::cache::CacheMode;
use quorate_gnbd::BlockDevice;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One transaction writes at most this many blocks of data.
pub(super) const CHUNK_BLOCKS: u64 = 256;
/// A sequential reader is this many blocks ahead.
const READ_AHEAD_BLOCKS: u64 = 128;
/// With more dirty pages than this in one file, its writer writes them back.
pub(super) const DIRTY_PAGES_MAX: usize = 8192;
/// Clean pages beyond this number are dropped.
const CACHED_PAGES_MAX: usize = 64 << 10;
/// The largest file, bytes: what a signed 64-bit offset can name.
pub(super) const FILE_BYTES_MAX: u64 = i64::MAX as u64;

impl Inner {
    /// Reads up to `len` bytes.
    pub(super) async fn read_file(&self, ino: Ino, offset: u64, len: u32) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        regular(&dinode)?;
        let end = offset.saturating_add(u64::from(len)).min(dinode.size_bytes);
        if end <= offset {
            return Ok(Vec::new());
        }
        if dinode.height == 0 {
            let block = self.dinode_block(inode.addr()).await?;
            return Ok(block[DINODE_BYTES + offset as usize..DINODE_BYTES + end as usize].to_vec());
        }
        let size = self.size.usize() as u64;
        let (first, last) = (offset / size, (end - 1) / size);
        let pages = self.fill_pages(&inode, &dinode, first, last).await?;
        let mut out = Vec::with_capacity((end - offset) as usize);
        for index in first..=last {
            let from = offset.saturating_sub(index * size).min(size) as usize;
            let to = (end - index * size).min(size) as usize;
            match pages.get(&index) {
                Some(page) => out.extend_from_slice(&page[from..to]),
                None => out.resize(out.len() + to - from, 0), // a hole
            }
        }
        Ok(out)
    }

    /// The pages from `first` to `last`; some more are read if the file is read in order. Holes have none.
    async fn fill_pages(
        &self,
        inode: &Arc<Inode>,
        dinode: &Dinode,
        first: u64,
        last: u64,
    ) -> Result<BTreeMap<u64, Bytes>, FsError> {
        let mut found = BTreeMap::new();
        let end = {
            let mut pages = inode.pages();
            let sequential = pages.expected == first || (first..=last).contains(&pages.expected);
            pages.expected = last + 1;
            found.extend(pages.map.range(first..=last).map(|(&index, page)| (index, page.data.clone())));
            if found.len() as u64 == last - first + 1 {
                return Ok(found);
            }
            let file_last = dinode.size_bytes.saturating_sub(1) / self.size.usize() as u64;
            if sequential { (last + READ_AHEAD_BLOCKS).min(file_last) } else { last }
        };
        self.shrink_pages();
        let mut at = first;
        let mut runs = Vec::new();
        while at <= end {
            let (block, count) = self.map_run(None, dinode, at, end - at + 1).await?;
            if let Some(block) = block {
                self.missing_runs(inode, (&found, last), at, block, count, &mut runs);
            }
            at += count;
        }
        let loads =
            runs.into_iter().map(|(index, block, count)| self.load(inode, dinode, index, block, count));
        found.extend(try_join_all(loads).await?.into_iter().flatten());
        Ok(found)
    }

    fn missing_runs(
        &self,
        inode: &Inode,
        (found, last): (&BTreeMap<u64, Bytes>, u64),
        at: u64,
        block: BlockNo,
        count: u64,
        runs: &mut Vec<(u64, BlockNo, u64)>,
    ) {
        let pages = inode.pages();
        let mut run: Option<(u64, BlockNo, u64)> = None;
        for i in 0..count {
            // What is in memory but was not found at first is read once more, so that it cannot be dropped meanwhile.
            if found.contains_key(&(at + i)) || (last < at + i && pages.map.contains_key(&(at + i))) {
                runs.extend(run.take());
                continue;
            }
            match &mut run {
                Some((_, _, len)) if *len < CHUNK_BLOCKS => *len += 1,
                _ => {
                    runs.extend(run.take());
                    run = Some((at + i, BlockNo(block.0 + i), 1));
                }
            }
        }
        runs.extend(run);
    }

    /// Reads neighbouring blocks into pages. Those that are in memory already stay as they are.
    async fn load(
        &self,
        inode: &Inode,
        dinode: &Dinode,
        index: u64,
        block: BlockNo,
        count: u64,
    ) -> Result<Vec<(u64, Bytes)>, FsError> {
        let buf = self.read_raw(block, count as usize).await?;
        let size = self.size.usize();
        let mut out = Vec::with_capacity(count as usize);
        let mut pages = inode.pages();
        for (i, bytes) in buf.chunks_exact(size).enumerate() {
            let index = index + i as u64;
            let page = pages.map.entry(index).or_insert_with(|| {
                let mut data = bytes.to_vec();
                // Nothing beyond the end of the file may show when the file grows.
                let live = dinode.size_bytes.saturating_sub(index * size as u64).min(size as u64) as usize;
                data[live..].fill(0);
                self.pages_cached.fetch_add(1, Ordering::Relaxed);
                Page { data: Arc::new(data), block: block.0 + i as u64 }
            });
            out.push((index, page.data.clone()));
        }
        Ok(out)
    }

    /// Writes `data` at `offset`, or at the end.
    pub(super) async fn write_file(
        &self,
        ino: Ino,
        offset: u64,
        data: Vec<u8>,
        append: bool,
        kill_priv: bool,
    ) -> Result<u32, FsError> {
        self.check_writable()?;
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Exclusive).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        regular(&dinode)?;
        check_mutable(&dinode, append)?;
        let offset = if append { dinode.size_bytes } else { offset };
        let end = offset.checked_add(data.len() as u64).filter(|&end| end <= FILE_BYTES_MAX);
        end.ok_or(FsError::TooLarge)?;
        let size = self.size.usize() as u64;
        let mut done = 0;
        let mut chunk = CHUNK_BLOCKS;
        while done < data.len() {
            let at = offset + done as u64;
            let most = chunk * size - at % size;
            let len = (data.len() - done).min(most as usize);
            match self.write_chunk(&inode, at, &data[done..done + len], kill_priv).await {
                Ok(()) => done += len,
                // Perhaps fewer blocks are there; and what is written stays written.
                Err(FsError::NoSpace) if 1 < chunk => chunk = 1,
                Err(FsError::NoSpace) if 0 < done => break,
                Err(error) => return Err(error),
            }
        }
        if DIRTY_PAGES_MAX < inode.pages().dirty.len() {
            self.write_pages(inode.addr()).await?;
        }
        self.shrink_pages();
        Ok(done as u32)
    }

    /// Writes what fits into one transaction. The caller holds the inode exclusively.
    async fn write_chunk(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        data: &[u8],
        kill_priv: bool,
    ) -> Result<(), FsError> {
        let own = inode.addr();
        let mut dinode = self.dinode_of(None, own).await?;
        let end = offset + data.len() as u64;
        let new_size = dinode.size_bytes.max(end);
        if dinode.height == 0 && new_size <= self.size.stuffed_bytes() as u64 {
            let mut tx = self.begin(1).await?;
            let block = tx.edit(own, inode.glock(), crate::format::MetaType::Dinode).await?;
            block[DINODE_BYTES + offset as usize..DINODE_BYTES + end as usize].copy_from_slice(data);
            self.written(&mut dinode, new_size, kill_priv);
            tx.put_dinode(&dinode).await?;
            tx.commit();
            return Ok(());
        }
        let size = self.size.usize() as u64;
        let (first, last) = (offset / size, (end - 1) / size);
        let holes = self.holes(&dinode, first, last).await?;
        if holes == 0 {
            self.load_edges(inode, &dinode, offset, end).await?;
            let mut tx = self.begin(1).await?;
            tx.times_only = new_size == dinode.size_bytes && !kill_priv;
            self.put_pages(&mut tx, inode, &dinode, offset, data).await?;
            self.written(&mut dinode, new_size, kill_priv);
            tx.put_dinode(&dinode).await?;
            tx.commit();
            return Ok(());
        }
        let need = self.blocks_to_add(&dinode, new_size, Unit::Data, holes);
        let locks = self.lock_for_alloc(&BTreeSet::new(), need, dinode.goal_data).await?;
        self.load_edges(inode, &dinode, offset, end).await?;
        let mut tx = self.begin(need as usize - holes as usize + 16).await?;
        self.grow_tree(&mut tx, &locks, &mut dinode, Some(inode), new_size, Unit::Data).await?;
        let mut at = first;
        while at <= last {
            let (block, count) = self.map_run(Some(&tx), &dinode, at, last - at + 1).await?;
            at += match block {
                Some(_) => count,
                None => {
                    let (block, count) =
                        self.allocate(&mut tx, &locks, &mut dinode, at, count, Unit::Data).await?;
                    for i in 0..count {
                        tx.page(inode, at + i, self.zero_page.clone(), BlockNo(block.0 + i));
                    }
                    count
                }
            };
        }
        self.put_pages(&mut tx, inode, &dinode, offset, data).await?;
        tx.order(own);
        self.written(&mut dinode, new_size, kill_priv);
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(())
    }

    /// How many blocks between two are not there.
    pub(super) async fn holes(&self, dinode: &Dinode, first: u64, last: u64) -> Result<u64, FsError> {
        if dinode.height == 0 {
            return Ok(last - first + 1);
        }
        let (mut at, mut holes) = (first, 0);
        while at <= last {
            let (block, count) = self.map_run(None, dinode, at, last - at + 1).await?;
            holes += if block.is_none() { count } else { 0 };
            at += count;
        }
        Ok(holes)
    }

    /// Reads the blocks that a write changes in part.
    pub(super) async fn load_edges(
        &self,
        inode: &Arc<Inode>,
        dinode: &Dinode,
        offset: u64,
        end: u64,
    ) -> Result<(), FsError> {
        if dinode.height == 0 {
            return Ok(());
        }
        let size = self.size.usize() as u64;
        for (edge, index) in [(offset, offset / size), (end, (end - 1) / size)] {
            if !edge.is_multiple_of(size)
                && !inode.pages().map.contains_key(&index)
                && let (Some(block), _) = self.map_run(None, dinode, index, 1).await?
            {
                self.load(inode, dinode, index, block, 1).await?;
            }
        }
        Ok(())
    }

    /// Puts data into the pages of blocks that are there.
    pub(super) async fn put_pages(
        &self,
        tx: &mut Tx<'_>,
        inode: &Arc<Inode>,
        dinode: &Dinode,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FsError> {
        let size = self.size.usize();
        let (mut done, mut run) = (0, (0, BlockNo::NONE, 0));
        while done < data.len() {
            let at = offset + done as u64;
            let (index, from) = (at / size as u64, (at % size as u64) as usize);
            let len = (size - from).min(data.len() - done);
            if run.0 + run.2 <= index {
                let (block, count) = self.map_run(Some(tx), dinode, index, CHUNK_BLOCKS).await?;
                let block = block.ok_or_else(|| FsError::Corrupt(format!("no block {index} to write to")))?;
                run = (index, block, count);
            }
            let block = BlockNo(run.1.0 + index - run.0);
            let page: Bytes = if len == size {
                Arc::new(data[done..done + len].to_vec())
            } else {
                let mut page = match tx.page_at(inode, index) {
                    Some(page) => page,
                    None => match self.load(inode, dinode, index, block, 1).await?.pop() {
                        Some((_, page)) => page,
                        None => self.zero_page.clone(),
                    },
                };
                Arc::make_mut(&mut page)[from..from + len].copy_from_slice(&data[done..done + len]);
                page
            };
            tx.page(inode, index, page, block);
            done += len;
        }
        Ok(())
    }

    fn written(&self, dinode: &mut Dinode, size_bytes: u64, kill_priv: bool) {
        let now = (self.clock)();
        dinode.size_bytes = size_bytes;
        dinode.mtime = now;
        dinode.ctime = now;
        if kill_priv {
            // set-uid always, set-gid only where it means that (execute bit of the group).
            dinode.mode &= if dinode.mode & 0o010 != 0 { !0o6000 } else { !0o4000 };
        }
    }

    /// Writes the dirty pages of an inode.
    pub(super) async fn write_pages(&self, ino: BlockNo) -> Result<(), FsError> {
        let Some(inode) = self.inodes().get(&ino.0).cloned() else { return Ok(()) };
        self.write_pages_of(&inode).await
    }

    pub(super) async fn write_pages_of(&self, inode: &Inode) -> Result<(), FsError> {
        if inode.pages().dirty.is_empty() {
            // But a write under way must be over, too.
            drop(inode.writing.lock().await);
            if inode.pages().dirty.is_empty() {
                return Ok(());
            }
        }
        let _writing = inode.writing.lock().await;
        let dirty: Vec<(u64, Page)> = {
            let pages = inode.pages();
            pages.dirty.iter().filter_map(|&index| Some((index, pages.map.get(&index)?.clone()))).collect()
        };
        let mut blocks: Vec<(u64, Bytes)> =
            dirty.iter().map(|(_, page)| (page.block, page.data.clone())).collect();
        blocks.sort_by_key(|(block, _)| *block);
        self.write_blocks(blocks).await?;
        inode.written.store(self.data_written.fetch_add(1, Ordering::AcqRel) + 1, Ordering::Release);
        let mut pages = inode.pages();
        for (index, written) in dirty {
            // A page that was changed meanwhile is dirty still.
            if pages.map.get(&index).is_none_or(|page| Arc::ptr_eq(&page.data, &written.data)) {
                pages.dirty.remove(&index);
            }
        }
        Ok(())
    }

    /// Makes what the device has answered durable.
    pub(super) async fn flush_device(&self) -> Result<(), FsError> {
        let written = self.data_written.load(Ordering::Acquire);
        self.device.flush().await?;
        self.data_flushed.fetch_max(written, Ordering::AcqRel);
        Ok(())
    }

    /// Whether data of an inode is on the device but perhaps not durable.
    pub(super) fn is_unflushed(&self, ino: BlockNo) -> bool {
        let inodes = self.inodes();
        // An inode that is no longer in memory may have written any of it.
        let written = inodes.get(&ino.0).map_or(u64::MAX, |inode| inode.written.load(Ordering::Acquire));
        self.data_flushed.load(Ordering::Acquire) < written.min(self.data_written.load(Ordering::Acquire))
    }

    /// Makes an inode durable: its data, and what is needed to read it back, or all.
    pub(super) async fn sync_inode(&self, ino: Ino, data_only: bool) -> Result<(), FsError> {
        let inode = self.inode(ino)?;
        if self.journal.is_none() {
            return Ok(());
        }
        self.write_pages_of(&inode).await?;
        let (any, needed) = self.store().inode_flush.get(&ino.0).copied().unwrap_or_default();
        let target = if data_only { needed } else { any };
        if self.store().flushed < target {
            self.flush_to(target).await?;
        }
        // The flush of the log has flushed the device after the data was written, if there was one.
        if self.is_unflushed(inode.addr()) { self.flush_device().await } else { Ok(()) }
    }

    /// Drops clean pages where there are too many.
    pub(super) fn shrink_pages(&self) {
        if self.pages_cached.load(Ordering::Relaxed) <= CACHED_PAGES_MAX {
            return;
        }
        let inodes: Vec<Arc<Inode>> = self.inodes().values().cloned().collect();
        for inode in inodes {
            let mut pages = inode.pages();
            let before = pages.map.len();
            let dirty = std::mem::take(&mut pages.dirty);
            pages.map.retain(|index, _| dirty.contains(index));
            pages.dirty = dirty;
            let gone = before - pages.map.len();
            self.pages_cached.fetch_sub(gone, Ordering::Relaxed);
            if self.pages_cached.load(Ordering::Relaxed) <= CACHED_PAGES_MAX / 2 {
                return;
            }
        }
    }
}

/// Only regular files have data.
pub(super) fn regular(dinode: &Dinode) -> Result<(), FsError> {
    match dinode.file_type() {
        Some(FileType::Regular) => Ok(()),
        Some(FileType::Directory) => Err(FsError::IsDirectory),
        _ => Err(FsError::Invalid("not a regular file")),
    }
}

/// Refuses changes that the inode's flags forbid.
pub(super) fn check_mutable(dinode: &Dinode, append: bool) -> Result<(), FsError> {
    let appendable = append || !dinode.flags.contains(DinodeFlags::APPENDONLY);
    if dinode.flags.contains(DinodeFlags::IMMUTABLE) || !appendable {
        return Err(FsError::NotPermitted);
    }
    Ok(())
}
