//! Journals as such: finding their blocks and head, and replaying one that was not closed (gfs2.md 9.6, 9.7, 10.7).

use super::glock::Glock;
use super::store::corrupt;
use super::{Gfs, Inner};
use crate::FsError;
use crate::format::{
    BlockNo, DINODE_BYTES, LOG_DESCRIPTOR_BYTES, LogDescriptor, LogFlags, LogHeader, LogHeaderV2, LogKind,
    MAGIC, META_HEADER_BYTES, MetaHeader, MetaType, StatfsChange, has_magic, jdata_entries, log_blocks,
};
use futures_util::future::try_join_all;
use quorate_dlm::cache::{AcquireFlags, CacheMode};
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};
use std::collections::{BTreeMap, BTreeSet};

/// Blocks read at a time.
const CHUNK_BLOCKS: usize = 256;

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replayed {
    /// Whether the journal was closed cleanly; then nothing was done.
    pub was_clean: bool,
    /// Blocks written in place.
    pub blocks: u64,
    /// Copies not written because of a revoke.
    pub revoked: u64,
}

/// A journal on the device.
#[derive(Clone, Debug)]
pub(super) struct JournalFile {
    pub(super) jinode: BlockNo,
    pub(super) ring: Vec<u64>,
}

impl Gfs {
    /// Replays the journal of a node that failed, for a survivor: passes through the holds of the failed node (R14).
    ///
    /// The caller makes sure that the failed node is fenced, and proposes `Replayed` afterwards.
    ///
    /// # Errors
    /// `Busy` if somebody else is at it or the journal is in use; else what went wrong: the journal is still dirty.
    pub async fn recover_journal(&self, jid: u32) -> Result<Replayed, FsError> {
        self.0.recover(jid, true).await
    }

    /// The journals that were not closed cleanly, those in use included.
    ///
    /// # Errors
    /// What kept it from looking.
    pub async fn dirty_journals(&self) -> Result<BTreeSet<u32>, FsError> {
        let fs = &self.0;
        let mut dirty = BTreeSet::new();
        for (jid, &jinode) in (0_u32..).zip(&fs.jinodes) {
            let _held = fs.lock(Glock::inode(jinode), CacheMode::Shared).await?;
            let file = fs.journal_file(jinode).await?;
            if !fs.find_head(&file).await?.flags.is_clean() {
                dirty.insert(jid);
            }
        }
        Ok(dirty)
    }
}

impl Inner {
    pub(super) async fn recover(&self, jid: u32, recovery: bool) -> Result<Replayed, FsError> {
        self.check()?;
        if self.journal.as_ref().is_some_and(|own| own.jid == jid) {
            return Err(FsError::Invalid("a node does not recover its own journal while it is mounted"));
        }
        let flags = AcquireFlags { try_now: true, recovery, no_cache: true, ..Default::default() };
        let _journal = match self.lock_with(Glock::journal(jid), CacheMode::Exclusive, flags).await {
            Err(FsError::WouldBlock) => return Err(FsError::Busy),
            other => other?,
        };
        let flags = AcquireFlags { recovery, ..Default::default() };
        let jinode = *self.jinodes.get(jid as usize).ok_or(FsError::NotFound)?;
        let file = {
            let _held = self.lock_with(Glock::inode(jinode), CacheMode::Shared, flags).await?;
            self.journal_file(jinode).await?
        };
        let head = self.find_head(&file).await?;
        if head.flags.is_clean() {
            return Ok(Replayed { was_clean: true, ..Default::default() });
        }
        let replayed = self.replay(&file, &head).await?;
        self.replay_statfs(&head, recovery).await?;
        self.close_journal(&file, &head).await?;
        tracing::info!(jid, blocks = replayed.blocks, revoked = replayed.revoked, "journal replayed");
        Ok(replayed)
    }

    /// Where the blocks of a journal are. The caller holds its inode's lock.
    pub(super) async fn journal_file(&self, jinode: BlockNo) -> Result<JournalFile, FsError> {
        let dinode = self.dinode_of(None, jinode).await?;
        let blocks = dinode.size_bytes / self.size.usize() as u64;
        // 8 MiB to 1 GiB (gfs2.md 9).
        if !(8 << 20..=1 << 30).contains(&dinode.size_bytes) {
            return Err(corrupt(jinode, &"a journal of this size cannot be"));
        }
        let mut ring = Vec::with_capacity(blocks as usize);
        while (ring.len() as u64) < blocks {
            let at = ring.len() as u64;
            let (block, count) = self.map_run(None, &dinode, at, blocks - at).await?;
            let block = block.ok_or_else(|| corrupt(jinode, &"a journal with a hole"))?;
            ring.extend(block.0..block.0 + count);
        }
        Ok(JournalFile { jinode, ring })
    }

    /// Ring blocks `from` up to, not including, `to`, neighbours in one request.
    async fn read_ring(&self, ring: &[u64], from: usize, to: usize) -> Result<Vec<Buf>, FsError> {
        let mut requests = Vec::new();
        let mut at = from;
        while at < to {
            let first = ring[at];
            let count =
                (at..to).take(CHUNK_BLOCKS).take_while(|&i| ring[i] == first + (i - at) as u64).count();
            requests.push(self.read_raw(BlockNo(first), count));
            at += count;
        }
        let size = self.size.usize();
        let bufs = try_join_all(requests).await?;
        Ok(bufs.iter().flat_map(|buf| buf.chunks_exact(size).map(Buf::copy_of).collect::<Vec<_>>()).collect())
    }

    /// The newest header of a journal.
    pub(super) async fn find_head(&self, file: &JournalFile) -> Result<LogHeader, FsError> {
        let ring = &file.ring;
        let mut best: Option<LogHeader> = None;
        let mut at = 0;
        'scan: while at < ring.len() {
            let to = (at + 4 * CHUNK_BLOCKS).min(ring.len());
            for (i, block) in self.read_ring(ring, at, to).await?.iter().enumerate() {
                let Ok(header) = LogHeader::decode(block) else { continue };
                if header.index as usize != at + i {
                    continue;
                }
                match &best {
                    // The seam: what follows is a turn of the ring older.
                    Some(found) if header.sequence < found.sequence => break 'scan,
                    _ => best = Some(header),
                }
            }
            at = to;
        }
        best.filter(|head| (head.tail as usize) < ring.len())
            .ok_or_else(|| corrupt(file.jinode, &"a journal without a valid header"))
    }

    /// Writes everything in place that the journal holds and nothing revokes.
    pub(super) async fn replay(&self, file: &JournalFile, head: &LogHeader) -> Result<Replayed, FsError> {
        let (ring, tail, end) = (&file.ring, head.tail as usize, head.index as usize);
        let mut blocks = if tail <= end {
            self.read_ring(ring, tail, end).await?
        } else {
            let mut blocks = self.read_ring(ring, tail, ring.len()).await?;
            blocks.extend(self.read_ring(ring, 0, end).await?);
            blocks
        };
        let bad =
            |at: usize, what: &dyn core::fmt::Display| corrupt(BlockNo(ring[(tail + at) % ring.len()]), what);
        let mut revokes: BTreeMap<u64, usize> = BTreeMap::new();
        let mut copies: Vec<(u64, usize, bool, bool)> = Vec::new();
        let mut at = 0;
        while at < blocks.len() {
            let block = &blocks[at];
            let header = MetaHeader::decode(block).map_err(|error| bad(at, &error))?;
            if header.kind == MetaType::LogHeader {
                LogHeader::decode(block).map_err(|error| bad(at, &error))?;
                at += 1;
                continue;
            }
            let descriptor = LogDescriptor::decode(block, self.size).map_err(|error| bad(at, &error))?;
            let length = descriptor.length as usize;
            if blocks.len() < at + length {
                return Err(bad(at, &"a log descriptor that goes beyond the head"));
            }
            let count = descriptor.count as usize;
            match descriptor.kind {
                LogKind::Metadata => {
                    let entries = log_blocks(block, LOG_DESCRIPTOR_BYTES).take(count);
                    copies.extend(entries.enumerate().map(|(i, to)| (to.0, at + 1 + i, false, false)));
                }
                LogKind::Jdata => {
                    let entries = jdata_entries(block).take(count);
                    copies.extend(entries.enumerate().map(|(i, (to, esc))| (to.0, at + 1 + i, true, esc)));
                }
                LogKind::Revoke => {
                    let mut left = count;
                    for (i, block) in blocks[at..at + length].iter().enumerate() {
                        let from = if i == 0 { LOG_DESCRIPTOR_BYTES } else { META_HEADER_BYTES };
                        for revoked in log_blocks(block, from).take(left) {
                            revokes.insert(revoked.0, at + i);
                            left -= 1;
                        }
                    }
                }
            }
            at += length;
        }
        let mut done = Replayed::default();
        // The last copy of each block wins.
        let mut writes: BTreeMap<u64, (usize, bool, bool)> = BTreeMap::new();
        for (to, at, jdata, escaped) in copies {
            if revokes.get(&to).is_some_and(|&revoke| at < revoke) {
                done.revoked += 1;
            } else {
                writes.insert(to, (at, jdata, escaped));
            }
        }
        let mut out = Vec::new();
        for (to, (at, jdata, escaped)) in writes {
            if !jdata && !has_magic(&blocks[at]) {
                return Err(bad(at, &"a copy of metadata without magic number"));
            }
            if escaped {
                blocks[at][..4].copy_from_slice(&MAGIC.to_be_bytes());
            }
            out.push((to, std::sync::Arc::new(blocks[at].to_vec())));
        }
        done.blocks = out.len() as u64;
        self.write_blocks(out).await?;
        self.flush_device().await?;
        Ok(done)
    }

    /// Adds the failed node's change of statfs to the master's numbers, and makes it zero, in place.
    async fn replay_statfs(&self, head: &LogHeader, recovery: bool) -> Result<(), FsError> {
        let Some(v2) = head.v2.filter(|v2| !v2.local.is_zero()) else { return Ok(()) };
        let flags = AcquireFlags { recovery, ..Default::default() };
        let addr = self.system.statfs;
        let glock = Glock::inode(addr);
        let _held = self.lock_with(glock, CacheMode::Exclusive, flags).await?;
        // No older copy of it may be in this node's log when it is written in place.
        self.clean_glock(glock).await?;
        self.store().drop_glock(glock);
        self.edit_in_place(addr, |numbers| {
            let master = StatfsChange::decode(numbers).map_err(|error| corrupt(addr, &error))?;
            master.plus(&v2.local).encode(numbers);
            Ok(())
        })
        .await?;
        self.edit_in_place(v2.statfs_addr, |numbers| {
            StatfsChange::default().encode(numbers);
            Ok(())
        })
        .await?;
        self.flush_device().await
    }

    async fn edit_in_place(
        &self,
        addr: BlockNo,
        edit: impl FnOnce(&mut [u8]) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        let mut buf = self.read_raw(addr, 1).await?;
        MetaHeader::expect(&buf, MetaType::Dinode).map_err(|error| corrupt(addr, &error))?;
        edit(&mut buf[DINODE_BYTES..])?;
        self.device.write(addr.0 * self.size.usize() as u64, buf, WriteFlags::default()).await?;
        Ok(())
    }

    /// Writes a header behind the head that says the journal is clean.
    pub(super) async fn close_journal(&self, file: &JournalFile, head: &LogHeader) -> Result<(), FsError> {
        let index = (head.index + 1) % file.ring.len() as u32;
        let addr = file.ring[index as usize];
        let header = LogHeader {
            jid: head.jid,
            sequence: head.sequence + 1,
            flags: LogFlags(LogFlags::UNMOUNT | LogFlags::RECOVERY),
            tail: 0,
            index,
            v2: Some(LogHeaderV2 {
                time: (self.clock)(),
                addr: BlockNo(addr),
                jinode: file.jinode,
                ..Default::default()
            }),
        };
        let mut buf = Buf::zeroed(self.size.usize());
        header.encode(&mut buf);
        self.device.write(addr * self.size.usize() as u64, buf, WriteFlags { fua: true }).await?;
        Ok(())
    }
}
