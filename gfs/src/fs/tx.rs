//! Transactions: changes of metadata blocks that are made on copies and become visible, and part of one flush, at once.
//!
//! A transaction that is dropped has changed nothing, so an operation that fails or is given up half way leaves no trace.
//! The caller holds the locks of all blocks it changes until the transaction is committed.

use super::Inner;
use super::glock::{Glock, Kind};
use super::inode::{Inode, Page};
use super::logd::Reservation;
use super::store::Bytes;
use crate::FsError;
use crate::format::{BlockNo, Dinode, MetaHeader, MetaType};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A set of changes.
#[derive(Debug)]
pub(super) struct Tx<'a> {
    fs: &'a Inner,
    room: Reservation<'a>,
    blocks: BTreeMap<u64, (Bytes, Glock)>,
    freed: BTreeSet<u64>,
    ordered: BTreeSet<u64>,
    pages: Vec<(Arc<Inode>, BTreeMap<u64, Page>)>,
    /// Change of free blocks and of dinodes.
    pub(super) free_change: i64,
    pub(super) dinodes_change: i64,
    /// What of the local change of statfs goes to the master's numbers.
    pub(super) statfs_moved: [i64; 3],
    /// Nothing but time stamps of inodes changed.
    pub(super) times_only: bool,
}

impl Inner {
    /// Begins a transaction of at most about `blocks` blocks. Waits for room in the log, so every lock that is needed
    /// has been taken before (gfs2.md 10.9).
    pub(super) async fn begin(&self, blocks: usize) -> Result<Tx<'_>, FsError> {
        self.check_writable()?;
        let room = self.reserve(blocks).await?;
        Ok(Tx {
            fs: self,
            room,
            blocks: BTreeMap::new(),
            freed: BTreeSet::new(),
            ordered: BTreeSet::new(),
            pages: Vec::new(),
            free_change: 0,
            dinodes_change: 0,
            statfs_moved: [0; 3],
            times_only: false,
        })
    }
}

impl<'a> Tx<'a> {
    pub(super) fn fs(&self) -> &'a Inner {
        self.fs
    }

    /// A block as this transaction sees it.
    pub(super) async fn read(&self, block: BlockNo, glock: Glock, kind: MetaType) -> Result<Bytes, FsError> {
        match self.blocks.get(&block.0) {
            Some((data, _)) => Ok(data.clone()),
            None => self.fs.meta(block, glock, kind).await,
        }
    }

    /// A block to change.
    pub(super) async fn edit(
        &mut self,
        block: BlockNo,
        glock: Glock,
        kind: MetaType,
    ) -> Result<&mut Vec<u8>, FsError> {
        if !self.blocks.contains_key(&block.0) {
            let data = self.fs.meta(block, glock, kind).await?;
            self.blocks.insert(block.0, (data, glock));
        }
        let (data, _) = self.blocks.get_mut(&block.0).expect("it was inserted right here");
        Ok(Arc::make_mut(data))
    }

    /// A new block of zeros with the header of this kind.
    pub(super) fn fresh(&mut self, block: BlockNo, glock: Glock, kind: MetaType) -> &mut Vec<u8> {
        let mut data = vec![0; self.fs.size.usize()];
        MetaHeader { kind, jid: self.fs.jid() }.encode(&mut data);
        self.freed.remove(&block.0);
        let entry = self.blocks.entry(block.0).insert_entry((Arc::new(data), glock));
        Arc::make_mut(&mut entry.into_mut().0)
    }

    pub(super) async fn put_dinode(&mut self, dinode: &Dinode) -> Result<(), FsError> {
        let ino = dinode.inum.addr;
        dinode.encode(self.edit(ino, Glock::inode(ino), MetaType::Dinode).await?);
        Ok(())
    }

    /// The block is free from now on, whatever it held.
    pub(super) fn freed(&mut self, block: BlockNo) {
        self.blocks.remove(&block.0);
        self.freed.insert(block.0);
    }

    /// Whether this transaction frees the block.
    pub(super) fn has_freed(&self, block: u64) -> bool {
        self.freed.contains(&block)
    }

    /// The dirty data of this inode must be on disk before this transaction counts.
    pub(super) fn order(&mut self, ino: BlockNo) {
        self.ordered.insert(ino.0);
    }

    /// A page of a file gets new contents; dirty when the transaction is committed.
    pub(super) fn page(&mut self, inode: &Arc<Inode>, index: u64, data: Bytes, block: BlockNo) {
        let page = Page { data, block: block.0 };
        match self.pages.iter_mut().find(|(other, _)| Arc::ptr_eq(other, inode)) {
            Some((_, pages)) => {
                pages.insert(index, page);
            }
            None => self.pages.push((inode.clone(), BTreeMap::from([(index, page)]))),
        }
    }

    /// A page of a file as this transaction sees it, if it is in memory.
    pub(super) fn page_at(&self, inode: &Arc<Inode>, index: u64) -> Option<Bytes> {
        let own = self.pages.iter().find(|(other, _)| Arc::ptr_eq(other, inode));
        if let Some(page) = own.and_then(|(_, pages)| pages.get(&index)) {
            return Some(page.data.clone());
        }
        inode.pages().map.get(&index).map(|page| page.data.clone())
    }

    /// Makes all of it visible, and part of the next flush.
    pub(super) fn commit(self) {
        let jid = self.fs.jid();
        let mut store = self.fs.store();
        let flush = store.open_flush;
        let mut inodes = BTreeSet::new();
        for (block, (mut data, glock)) in self.blocks {
            let bytes = Arc::make_mut(&mut data);
            bytes[8..16].fill(0);
            bytes[20..24].copy_from_slice(&jid.to_be_bytes());
            store.insert(block, glock, data);
            store.pending.insert(block, glock);
            // It is live metadata again, so an older copy of it may not suppress the new one.
            store.revokes.remove(&block);
            if glock.kind == Kind::Inode {
                inodes.insert(glock.number);
            }
        }
        for block in self.freed {
            store.revoke(block);
            store.remove(block);
            store.freed.insert(block, flush);
            store.inode_flush.remove(&block);
        }
        for ino in inodes {
            let entry = store.inode_flush.entry(ino).or_default();
            entry.0 = flush;
            if !self.times_only {
                entry.1 = flush;
            }
        }
        for (inode, new) in self.pages {
            let mut pages = inode.pages();
            for (index, page) in new {
                pages.dirty.insert(index);
                if pages.map.insert(index, page).is_none() {
                    self.fs.pages_cached.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        store.ordered.extend(self.ordered);
        if self.free_change != 0 || self.dinodes_change != 0 {
            store.statfs_local[1] += self.free_change;
            store.statfs_local[2] += self.dinodes_change;
            store.statfs_changed = true;
        }
        if self.statfs_moved != [0; 3] {
            for (local, moved) in store.statfs_local.iter_mut().zip(self.statfs_moved) {
                *local -= moved;
            }
            store.statfs_changed = true;
        }
        drop(store);
        drop(self.room);
    }
}
