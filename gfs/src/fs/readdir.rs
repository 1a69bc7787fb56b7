//! Listing a directory in the order of its hashes.
//!
//! The position after an entry is made of its hash and its place among the entries of the same hash (by length of the
//! name, then bytes), so a listing that is cut anywhere goes on with the next entry, also when others come and go.

use super::Inner;
use super::dir::table_index;
use super::glock::Glock;
use super::store::corrupt;
use crate::FsError;
use crate::face::{DirEntry, Ino};
use crate::format::{BlockNo, DINODE_BYTES, Dinode, Dirents, FileType, LEAF_BYTES, MetaType};
use quorate_dlm::cache::CacheMode;

/// Bits for the place among entries of one hash.
const PLACE_BITS: u32 = 20;

impl Inner {
    pub(super) async fn read_dir(&self, ino: Ino, cookie: u64, max: usize) -> Result<Vec<DirEntry>, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dir = self.dinode_of(None, inode.addr()).await?;
        if !dir.is_dir() {
            return Err(FsError::NotDirectory);
        }
        let own = dir.inum.addr;
        let mut out = Vec::new();
        if !dir.is_hashed() {
            let mut entries = Vec::new();
            self.entries_in(own, own, DINODE_BYTES, &mut entries).await?;
            take(entries, cookie, max, &mut out);
            return Ok(out);
        }
        let Ok(hash) = u32::try_from(cookie >> PLACE_BITS) else { return Ok(out) };
        let mut index = table_index(&dir, hash);
        while index < 1 << dir.depth && out.len() < max {
            let first = self.table_get(None, &dir, index).await?;
            let depth = self.leaf(None, own, first).await?.depth.min(dir.depth);
            let mut entries = Vec::new();
            let mut block = first;
            while !block.is_none() {
                self.entries_in(own, block, LEAF_BYTES, &mut entries).await?;
                block = self.leaf(None, own, block).await?.next;
            }
            take(entries, cookie, max, &mut out);
            let run = 1_u64 << (dir.depth - depth);
            index = (index & !(run - 1)) + run;
        }
        Ok(out)
    }

    async fn entries_in(
        &self,
        own: BlockNo,
        block: BlockNo,
        start: usize,
        out: &mut Vec<(u32, DirEntry)>,
    ) -> Result<(), FsError> {
        let kind = if start == DINODE_BYTES { MetaType::Dinode } else { MetaType::Leaf };
        let data = self.meta(block, Glock::inode(own), kind).await?;
        for entry in Dirents::new(&data, start) {
            let entry = entry.map_err(|error| corrupt(block, &error))?;
            if entry.is_unused() {
                continue;
            }
            out.push((
                entry.hash,
                DirEntry {
                    ino: Ino(entry.inum.addr.0),
                    kind: FileType::from_dirent(entry.kind).map_or(0, FileType::mode_bits),
                    cookie: 0,
                    name: entry.name.to_vec(),
                },
            ));
        }
        Ok(())
    }

    /// Every leaf of a hashed directory with the pointers that name it, chains not followed.
    pub(super) async fn leaf_runs(
        &self,
        dir: &Dinode,
    ) -> Result<Vec<(std::ops::Range<u64>, BlockNo)>, FsError> {
        let mut runs: Vec<(std::ops::Range<u64>, BlockNo)> = Vec::new();
        for index in 0..1_u64 << dir.depth {
            let block = self.table_get(None, dir, index).await?;
            match runs.last_mut() {
                Some((range, last)) if *last == block => range.end = index + 1,
                _ => runs.push((index..index + 1, block)),
            }
        }
        Ok(runs)
    }
}

fn take(mut entries: Vec<(u32, DirEntry)>, cookie: u64, max: usize, out: &mut Vec<DirEntry>) {
    entries.sort_by(|(a_hash, a), (b_hash, b)| {
        (a_hash, a.name.len(), &a.name).cmp(&(b_hash, b.name.len(), &b.name))
    });
    let mut place = 0;
    let mut before = None;
    for (hash, mut entry) in entries {
        place = if before == Some(hash) { place + 1 } else { 0 };
        before = Some(hash);
        let position = u64::from(hash) << PLACE_BITS | place;
        if position < cookie {
            continue;
        }
        if max <= out.len() {
            return;
        }
        entry.cookie = position + 1;
        out.push(entry);
    }
}
