//! The log: flushes that commit what is pending, write-back of what they committed, and the room they leave (gfs2.md 9).
//!
//! A flush runs in a task of its own, so a caller that gives up waiting cannot leave half of one. Callers that wait at
//! the same time share flushes. Flush and write-back exclude each other: when a flush is durable, no write-back of a
//! block freed before it is still under way, so the block may be used again.

use super::Inner;
use super::glock::Glock;
use super::store::{Bytes, Flush, Logged};
use crate::FsError;
use crate::format::{
    BlockNo, LogDescriptor, LogFlags, LogHeader, LogHeaderV2, LogKind, META_HEADER_BYTES, StatfsChange,
};
use core::time::Duration;
use futures_util::future::try_join_all;
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};
use std::collections::VecDeque;
use std::sync::Arc;

/// Ring blocks that a flush leaves free, so that a header that moves the tail always has a place.
const SPARE_BLOCKS: u32 = 16;
/// Locks of inodes that are given up within this time of each other, as when another node reads a directory's files
/// one after the other, are cleaned together: one write-back, one flush with revokes for all.
const CLEAN_TOGETHER: Duration = Duration::from_millis(20);
/// At most so many blocks of other locks are cleaned along with a lock.
const CLEAN_BLOCKS_MAX: usize = 2048;
/// The largest request to the device, bytes.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// A journal: what never changes while it is mounted.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    pub(super) jid: u32,
    pub(super) jinode: BlockNo,
    pub(super) statfs_addr: BlockNo,
    pub(super) quota_addr: BlockNo,
    /// The dinode of this node's statfs_change file.
    pub(super) statfs_block: Bytes,
    /// The device block of every ring index.
    pub(super) ring: Vec<u64>,
}

/// Where the ring is written.
#[derive(Debug)]
pub(super) struct Ring {
    /// The next index to write.
    pub(super) head: u32,
    /// As the newest header on disk says.
    pub(super) tail: u32,
    /// Of the next header.
    pub(super) sequence: u64,
}

/// Room in the log for a transaction; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    fs: &'a Inner,
    blocks: usize,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.fs.store().reserved -= self.blocks;
        self.fs.log_event.notify(usize::MAX);
    }
}

struct Captured {
    id: u64,
    blocks: Vec<(u64, Glock, Bytes)>,
    revokes: Vec<u64>,
    ordered: Vec<u64>,
    local: [i64; 3],
}

impl Inner {
    fn journal(&self) -> Result<&Journal, FsError> {
        self.journal.as_ref().ok_or(FsError::ReadOnly)
    }

    /// The number of this node's journal; 0 where it has none.
    pub(super) fn jid(&self) -> u32 {
        self.journal.as_ref().map_or(0, |journal| journal.jid)
    }

    /// Waits until `blocks` more may become pending.
    pub(super) async fn reserve(&self, blocks: usize) -> Result<Reservation<'_>, FsError> {
        let limit = self.journal()?.ring.len() * 2 / 5;
        loop {
            let changed = self.log_event.listen();
            self.check()?;
            {
                let mut store = self.store();
                let (pending, reserved) = (store.pending.len(), store.reserved);
                // An oversized transaction has the log for itself.
                if pending + reserved + blocks <= limit || (reserved == 0 && pending <= limit / 8) {
                    store.reserved += blocks;
                    return Ok(Reservation { fs: self, blocks });
                }
                if pending != 0 {
                    let target = store.open_flush;
                    drop(store);
                    self.want_flush(target);
                }
            }
            changed.await;
        }
    }

    /// Makes everything that is committed now durable.
    pub(super) async fn flush_log(&self) -> Result<(), FsError> {
        let target = {
            let store = self.store();
            if store.pending.is_empty() && store.revokes.is_empty() && !store.statfs_changed {
                store.open_flush - 1
            } else {
                store.open_flush
            }
        };
        self.flush_to(target).await
    }

    /// Waits until flush `target` is durable.
    pub(super) async fn flush_to(&self, target: u64) -> Result<(), FsError> {
        loop {
            let changed = self.log_event.listen();
            if target <= self.store().flushed {
                return Ok(());
            }
            self.check()?;
            self.want_flush(target);
            changed.await;
        }
    }

    /// Starts a flush if `target` is not durable and none runs.
    fn want_flush(&self, target: u64) {
        let mut flusher = self.flusher.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        flusher.wanted = flusher.wanted.max(target);
        if flusher.running {
            return;
        }
        let Some(me) = self.me.upgrade() else { return };
        flusher.running = true;
        drop(flusher);
        self.runtime.spawn(Box::pin(async move { me.flusher_loop().await }));
    }

    async fn flusher_loop(self: Arc<Self>) {
        loop {
            let result = self.flush_once(LogFlags::NORMAL, false).await;
            if let Err(error) = result {
                self.withdraw(&format!("log flush: {error}"));
            }
            self.log_event.notify(usize::MAX);
            if let Err(error) = self.make_room().await {
                self.withdraw(&format!("write-back: {error}"));
            }
            let mut flusher = self.flusher.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if flusher.wanted <= self.store().flushed || self.check().is_err() {
                flusher.running = false;
                drop(flusher);
                self.log_event.notify(usize::MAX);
                return;
            }
        }
    }

    fn capture(&self, journal: &Journal) -> Captured {
        let mut store = self.store();
        let id = store.open_flush;
        store.open_flush += 1;
        if std::mem::take(&mut store.statfs_changed) {
            let mut data = Vec::clone(&journal.statfs_block);
            for (i, number) in store.statfs_local.iter().enumerate() {
                let at = crate::format::DINODE_BYTES + i * 8;
                data[at..at + 8].copy_from_slice(&number.to_be_bytes());
            }
            data[20..24].copy_from_slice(&journal.jid.to_be_bytes());
            let glock = Glock::inode(journal.statfs_addr);
            store.insert(journal.statfs_addr.0, glock, Arc::new(data));
            store.pending.insert(journal.statfs_addr.0, glock);
            store.revokes.remove(&journal.statfs_addr.0);
        }
        let blocks = std::mem::take(&mut store.pending)
            .into_iter()
            .map(|(block, glock)| {
                let data = store.get(block).expect("a pending block stays in the cache").clone();
                (block, glock, data)
            })
            .collect();
        Captured {
            id,
            blocks,
            revokes: std::mem::take(&mut store.revokes).into_iter().collect(),
            ordered: std::mem::take(&mut store.ordered).into_iter().collect(),
            local: store.statfs_local,
        }
    }

    /// One flush. With `force` also if there is nothing to commit, so that the tail moves.
    pub(super) async fn flush_once(&self, flags: u32, force: bool) -> Result<(), FsError> {
        let journal = self.journal()?;
        let mut ring = self.ring.lock().await;
        self.check()?;
        let captured = self.capture(journal);
        let body = self.encode_body(&captured);
        if !force && body.is_empty() {
            self.store().flushed = captured.id;
            return Ok(());
        }
        let size = journal.ring.len() as u32; // at most 1 GiB in blocks of 512 bytes
        if size < used(&ring, size) + body.len() as u32 + SPARE_BLOCKS {
            self.write_back_locked(|_, _| true).await?;
            self.flush_device().await?;
            self.write_header(journal, &mut ring, LogFlags::NORMAL, captured.local).await?;
            if size < used(&ring, size) + body.len() as u32 + SPARE_BLOCKS {
                return Err(FsError::Corrupt(format!("a flush of {} blocks is above the log", body.len())));
            }
        }
        let start = ring.head;
        let count = body.len() as u32;
        let out = body.into_iter().enumerate().map(|(i, data)| {
            let index = (start + i as u32) % size;
            (journal.ring[index as usize], data)
        });
        let data = try_join_all(captured.ordered.iter().map(|&ino| self.write_pages(BlockNo(ino))));
        let log = self.write_blocks(out.collect());
        futures_util::future::try_join(data, log).await?;
        self.flush_device().await?;
        {
            let mut store = self.store();
            store.flushes.push_back(Flush { id: captured.id, start, unwritten: captured.blocks.len() });
            for (block, glock, data) in captured.blocks {
                // A revoke since the capture belongs to the next flush: this copy is in the log.
                let freed = store.freed.get(&block).is_some_and(|&flush| captured.id < flush);
                store.log(block, glock, captured.id, data);
                if freed {
                    store.revoke(block);
                }
            }
            for block in &captured.revokes {
                if store.logged.get(block).is_some_and(|logged| logged.flush < captured.id) {
                    store.logged.remove(block);
                }
            }
        }
        ring.head = (start + count) % size;
        self.write_header(journal, &mut ring, flags, captured.local).await?;
        let mut store = self.store();
        store.flushed = captured.id;
        store.freed.retain(|_, flush| captured.id < *flush);
        store.inode_flush.retain(|_, (any, _)| captured.id < *any);
        Ok(())
    }

    /// Writes the header that commits everything before it, with the tail as it is now.
    async fn write_header(
        &self,
        journal: &Journal,
        ring: &mut Ring,
        flags: u32,
        local: [i64; 3],
    ) -> Result<(), FsError> {
        let size = journal.ring.len() as u32;
        let index = ring.head;
        let addr = journal.ring[index as usize];
        let tail = {
            let mut store = self.store();
            while store.flushes.front().is_some_and(|flush| flush.unwritten == 0) {
                store.flushes.pop_front();
            }
            store.flushes.front().map(|flush| (flush.id, flush.start))
        };
        let header = LogHeader {
            jid: journal.jid,
            sequence: ring.sequence,
            flags: LogFlags(flags),
            tail: tail.map_or(index, |(_, start)| start),
            index,
            v2: Some(LogHeaderV2 {
                time: (self.clock)(),
                addr: BlockNo(addr),
                jinode: journal.jinode,
                statfs_addr: journal.statfs_addr,
                quota_addr: journal.quota_addr,
                local: StatfsChange { total: local[0], free: local[1], dinodes: local[2] },
            }),
        };
        let mut buf = Buf::zeroed(self.size.usize());
        header.encode(&mut buf);
        self.device.write(addr * self.size.usize() as u64, buf, WriteFlags { fua: true }).await?;
        ring.head = (index + 1) % size;
        ring.sequence += 1;
        ring.tail = header.tail;
        // Only now is what lies before the tail out of the reach of a replay.
        let mut store = self.store();
        let oldest = tail.map_or(u64::MAX, |(id, _)| id);
        store.logged.retain(|_, logged| oldest <= logged.flush);
        Ok(())
    }

    fn encode_body(&self, captured: &Captured) -> Vec<Bytes> {
        let size = self.size;
        let mut body: Vec<Bytes> = Vec::new();
        for chunk in captured.blocks.chunks(size.descriptor_pointers()) {
            let entries: Vec<BlockNo> = chunk.iter().map(|(block, ..)| BlockNo(*block)).collect();
            let count = entries.len() as u32;
            let mut block = vec![0; size.usize()];
            LogDescriptor { kind: LogKind::Metadata, length: count + 1, count }.encode(&mut block, &entries);
            body.push(Arc::new(block));
            body.extend(chunk.iter().map(|(.., data)| data.clone()));
        }
        if !captured.revokes.is_empty() {
            let entries: Vec<BlockNo> = captured.revokes.iter().map(|&block| BlockNo(block)).collect();
            let (first, rest) = entries.split_at(entries.len().min(size.descriptor_pointers()));
            let more = (size.usize() - META_HEADER_BYTES) / 8;
            let length = 1 + rest.len().div_ceil(more) as u32;
            let mut block = vec![0; size.usize()];
            LogDescriptor { kind: LogKind::Revoke, length, count: entries.len() as u32 }
                .encode(&mut block, first);
            body.push(Arc::new(block));
            for chunk in rest.chunks(more) {
                let mut block = vec![0; size.usize()];
                LogDescriptor::encode_continuation(&mut block, chunk);
                body.push(Arc::new(block));
            }
        }
        body
    }

    /// Writes back the older half of the log where more than half of the ring is in use.
    async fn make_room(&self) -> Result<(), FsError> {
        let size = self.journal()?.ring.len() as u32;
        let ring = self.ring.lock().await;
        if used(&ring, size) <= size / 2 {
            return Ok(());
        }
        let newest = {
            let store = self.store();
            let middle = store.flushes.len() / 2;
            store.flushes.get(middle).map_or(u64::MAX, |flush| flush.id)
        };
        self.write_back_locked(|_, logged| logged.flush <= newest).await
    }

    /// Writes committed blocks in place, all of them.
    pub(super) async fn write_back(&self) -> Result<(), FsError> {
        let _ring = self.ring.lock().await;
        self.write_back_locked(|_, _| true).await
    }

    /// Writes those committed blocks in place that are wanted. The caller holds the ring.
    async fn write_back_locked(&self, wanted: impl Fn(u64, &Logged) -> bool) -> Result<(), FsError> {
        let blocks: Vec<(u64, u64, Bytes)> = {
            let store = self.store();
            let wanted = store.logged.iter().filter(|(block, logged)| wanted(**block, logged));
            wanted
                .filter_map(|(&block, logged)| {
                    logged.unwritten.clone().map(|data| (block, logged.flush, data))
                })
                .collect()
        };
        self.write_blocks(blocks.iter().map(|(block, _, data)| (*block, data.clone())).collect()).await?;
        let mut store = self.store();
        for (block, flush, _) in blocks {
            let written = store.logged.get_mut(&block).filter(|logged| logged.flush == flush);
            if written.is_some_and(|logged| logged.unwritten.take().is_some()) {
                store.settle(flush);
            }
        }
        Ok(())
    }

    /// Before a lock is given up: commits, writes in place and revokes what it covers (gfs2.md 10.6).
    pub(super) async fn clean_glock(&self, glock: Glock) -> Result<(), FsError> {
        if self.journal.is_none() {
            return Ok(());
        }
        let target = {
            let store = self.store();
            // A flush under way holds captured blocks that are not in `logged` yet.
            if store.has_pending(glock) { Some(store.open_flush) } else { Some(store.open_flush - 1) }
        };
        if let Some(target) = target
            && self.may_be_logged(glock)
        {
            self.flush_to(target).await?;
        }
        let wanted = {
            let now = self.runtime.now();
            let mut store = self.store();
            if !store.logged.values().any(|logged| logged.glock == glock) {
                return Ok(());
            }
            let last = store.cleaned_at.replace(now);
            let others = last.is_some_and(|last| now.since(last) < CLEAN_TOGETHER);
            store.to_clean(glock, if others { CLEAN_BLOCKS_MAX } else { 0 })
        };
        // No flush is under way until the revokes are noted: it could hold a newer copy of another lock's block, which a
        // revoke in the flush after it would undo.
        let ring = self.ring.lock().await;
        self.write_back_locked(|block, logged| logged.glock == glock || wanted.contains(&block)).await?;
        let target = {
            let mut store = self.store();
            let done: Vec<u64> = store
                .logged
                .iter()
                // What a transaction has changed since is live in the log again.
                .filter(|(block, logged)| {
                    let is_written = logged.unwritten.is_none() && !store.pending.contains_key(block);
                    logged.glock == glock || is_written && wanted.contains(block)
                })
                .map(|(&block, _)| block)
                .collect();
            if done.is_empty() {
                return Ok(());
            }
            store.revokes.extend(done);
            store.open_flush
        };
        drop(ring);
        self.flush_to(target).await
    }

    /// Whether anything of the lock may be pending or in a flush under way.
    fn may_be_logged(&self, glock: Glock) -> bool {
        let store = self.store();
        store.has_pending(glock) || store.flushed + 1 < store.open_flush
    }

    /// The clean end of the log: everything in place, and a header that says so (gfs2.md 9.5).
    pub(super) async fn shut_log(&self) -> Result<(), FsError> {
        let journal = self.journal()?;
        self.flush_once(LogFlags::NORMAL | LogFlags::SHUTDOWN, false).await?;
        self.write_back().await?;
        let local = self.store().statfs_local;
        let mut ring = self.ring.lock().await;
        self.flush_device().await?;
        self.write_header(journal, &mut ring, LogFlags::NORMAL | LogFlags::SHUTDOWN, local).await?;
        self.write_header(journal, &mut ring, LogFlags::UNMOUNT | LogFlags::BY_SHUTDOWN, local).await
    }

    /// Writes blocks, neighbours in one request, many requests at a time.
    pub(super) async fn write_blocks(&self, blocks: Vec<(u64, Bytes)>) -> Result<(), FsError> {
        let size = self.size.usize();
        let most = (self.device.geometry().transfer_bytes_max as usize).min(REQUEST_BYTES_MAX) / size;
        let mut rest: VecDeque<(u64, Bytes)> = blocks.into();
        let mut requests = Vec::new();
        while let Some((first, _)) = rest.front() {
            let first = *first;
            let run = rest
                .iter()
                .take(most.max(1))
                .enumerate()
                .take_while(|(i, (block, _))| *block == first + *i as u64)
                .count();
            let mut buf = Buf::zeroed(run * size);
            for (slot, (_, data)) in buf.chunks_exact_mut(size).zip(rest.drain(..run)) {
                slot.copy_from_slice(&data);
            }
            requests.push(self.device.write(first * size as u64, buf, WriteFlags::default()));
        }
        try_join_all(requests).await?;
        Ok(())
    }
}

/// Ring blocks from the tail to the head.
fn used(ring: &Ring, size: u32) -> u32 {
    (ring.head + size - ring.tail) % size
}
