//! Directories: finding, adding and removing names, in linear and hashed ones (gfs2.md 6).

use super::Inner;
use super::glock::Glock;
use super::rgrp::RgrpLocks;
use super::store::corrupt;
use super::tx::Tx;
use crate::FsError;
use crate::format::{
    BlockNo, DINODE_BYTES, Dinode, Dirents, FileType, Inum, LEAF_BYTES, Leaf, MetaType, NAME_BYTES_MAX,
    NewDirent, dirent_bytes, find_dirent, insert_dirent, name_hash, remove_dirent, replace_dirent,
};

/// A name that was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) inum: Inum,
    pub(super) kind: FileType,
    pub(super) block: BlockNo,
    start: usize,
    offset: usize,
}

impl Found {
    fn block_kind(&self) -> MetaType {
        if self.start == DINODE_BYTES { MetaType::Dinode } else { MetaType::Leaf }
    }
}

/// A chain longer than this is a loop.
const CHAIN_LEAVES_MAX: usize = 1 << 16;

/// Whether a name may be made.
pub(super) fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(FsError::Invalid("name"));
    }
    if NAME_BYTES_MAX < name.len() {
        return Err(FsError::NameTooLong);
    }
    if name == b"." || name == b".." {
        return Err(FsError::Exists);
    }
    Ok(())
}

impl Inner {
    /// Finds a name. The caller holds the directory's lock.
    pub(super) async fn dir_find(
        &self,
        tx: Option<&Tx<'_>>,
        dir: &Dinode,
        name: &[u8],
    ) -> Result<Option<Found>, FsError> {
        let own = dir.inum.addr;
        if !dir.is_hashed() {
            return self.find_in(tx, own, own, DINODE_BYTES, name).await;
        }
        let mut leaf = self.leaf_of(tx, dir, name_hash(name)).await?;
        for _ in 0..CHAIN_LEAVES_MAX {
            if let Some(found) = self.find_in(tx, own, leaf, LEAF_BYTES, name).await? {
                return Ok(Some(found));
            }
            leaf = self.leaf(tx, own, leaf).await?.next;
            if leaf.is_none() {
                return Ok(None);
            }
        }
        Err(corrupt(own, &"a chain of leaves is a loop"))
    }

    async fn find_in(
        &self,
        tx: Option<&Tx<'_>>,
        own: BlockNo,
        block: BlockNo,
        start: usize,
        name: &[u8],
    ) -> Result<Option<Found>, FsError> {
        let kind = if start == DINODE_BYTES { MetaType::Dinode } else { MetaType::Leaf };
        let data = self.look(tx, block, Glock::inode(own), kind).await?;
        let found = find_dirent(&data, start, name).map_err(|error| corrupt(block, &error))?;
        let Some(entry) = found else { return Ok(None) };
        let kind = FileType::from_dirent(entry.kind).ok_or_else(|| corrupt(block, &"type of an entry"))?;
        Ok(Some(Found { inum: entry.inum, kind, block, start, offset: entry.offset }))
    }

    pub(super) async fn leaf(
        &self,
        tx: Option<&Tx<'_>>,
        own: BlockNo,
        leaf: BlockNo,
    ) -> Result<Leaf, FsError> {
        let data = self.look(tx, leaf, Glock::inode(own), MetaType::Leaf).await?;
        Leaf::decode(&data).map_err(|error| corrupt(leaf, &error))
    }

    async fn leaf_of(&self, tx: Option<&Tx<'_>>, dir: &Dinode, hash: u32) -> Result<BlockNo, FsError> {
        self.table_get(tx, dir, table_index(dir, hash)).await
    }

    /// Where pointer `index` of the hash table is: block, its kind, and offset.
    async fn table_place(
        &self,
        tx: Option<&Tx<'_>>,
        dir: &Dinode,
        index: u64,
    ) -> Result<(BlockNo, MetaType, usize), FsError> {
        if dir.height == 0 {
            return Ok((dir.inum.addr, MetaType::Dinode, DINODE_BYTES + index as usize * 8));
        }
        let per_block = self.size.indirect_pointers() as u64;
        let (block, _) = self.map_run(tx, dir, index / per_block, 1).await?;
        let block = block.ok_or_else(|| corrupt(dir.inum.addr, &"a hole in the hash table"))?;
        let at = crate::format::META_HEADER_BYTES + (index % per_block) as usize * 8;
        Ok((block, MetaType::HeaderedData, at))
    }

    /// Pointer `index` of the hash table.
    pub(super) async fn table_get(
        &self,
        tx: Option<&Tx<'_>>,
        dir: &Dinode,
        index: u64,
    ) -> Result<BlockNo, FsError> {
        let (block, kind, at) = self.table_place(tx, dir, index).await?;
        let data = self.look(tx, block, Glock::inode(dir.inum.addr), kind).await?;
        let bytes = data.get(at..at + 8).ok_or_else(|| corrupt(block, &"the hash table ends early"))?;
        Ok(BlockNo(u64::from_be_bytes(bytes.try_into().expect("eight bytes were taken"))))
    }

    pub(super) async fn table_set(
        &self,
        tx: &mut Tx<'_>,
        dir: &Dinode,
        indices: std::ops::Range<u64>,
        to: BlockNo,
    ) -> Result<(), FsError> {
        let glock = Glock::inode(dir.inum.addr);
        for index in indices {
            let (block, kind, at) = self.table_place(Some(tx), dir, index).await?;
            tx.edit(block, glock, kind).await?[at..at + 8].copy_from_slice(&to.0.to_be_bytes());
        }
        Ok(())
    }

    /// How many blocks it may take to add a name.
    pub(super) async fn dir_need(&self, dir: &Dinode, name: &[u8]) -> Result<u32, FsError> {
        let own = dir.inum.addr;
        let glock = Glock::inode(own);
        if !dir.is_hashed() {
            let data = self.meta(own, glock, MetaType::Dinode).await?;
            return Ok(if has_room(&data, DINODE_BYTES, name) { 0 } else { 4 });
        }
        let mut block = self.leaf_of(None, dir, name_hash(name)).await?;
        let first = self.leaf(None, own, block).await?;
        let mut leaf = first;
        loop {
            let data = self.meta(block, glock, MetaType::Leaf).await?;
            if has_room(&data, LEAF_BYTES, name) {
                return Ok(0);
            }
            if leaf.next.is_none() {
                break;
            }
            block = leaf.next;
            leaf = self.leaf(None, own, block).await?;
        }
        let doubles = first.depth == dir.depth && dir.depth < crate::format::HASH_DEPTH_MAX;
        let table =
            if doubles { (8_u64 << (dir.depth + 1)) / self.size.headered_bytes() as u64 + 3 } else { 0 };
        Ok(3 + table as u32)
    }

    /// Adds a name that is not there. The caller counts links, and writes the dinode afterwards.
    pub(super) async fn dir_insert(
        &self,
        tx: &mut Tx<'_>,
        locks: &RgrpLocks<'_>,
        dir: &mut Dinode,
        name: &[u8],
        inum: Inum,
        kind: FileType,
    ) -> Result<(), FsError> {
        let new = NewDirent { name, inum, kind, rahead: 0 };
        let (own, hash) = (dir.inum.addr, name_hash(name));
        // Each turn makes the leaf's share of the hashes smaller, or appends a leaf.
        for _ in 0..64 {
            if !dir.is_hashed() {
                let data = tx.edit(own, Glock::inode(own), MetaType::Dinode).await?;
                if insert_dirent(data, DINODE_BYTES, &new).map_err(|error| corrupt(own, &error))?.is_some() {
                    self.name_changed(dir, 1);
                    return Ok(());
                }
                self.dir_convert(tx, locks, dir).await?;
                continue;
            }
            let first = self.leaf_of(Some(tx), dir, hash).await?;
            let mut block = first;
            loop {
                let mut leaf = self.leaf(Some(tx), own, block).await?;
                let data = tx.edit(block, Glock::inode(own), MetaType::Leaf).await?;
                if insert_dirent(data, LEAF_BYTES, &new).map_err(|error| corrupt(block, &error))?.is_some() {
                    leaf.entries += 1;
                    leaf.changed = (self.clock)();
                    leaf.encode(data);
                    self.name_changed(dir, 1);
                    return Ok(());
                }
                if leaf.next.is_none() {
                    break;
                }
                block = leaf.next;
            }
            let depth = self.leaf(Some(tx), own, first).await?.depth;
            if depth < dir.depth {
                self.dir_split(tx, locks, dir, first, hash).await?;
            } else if dir.depth < crate::format::HASH_DEPTH_MAX {
                self.dir_double(tx, locks, dir).await?;
            } else {
                self.dir_overflow(tx, locks, dir, block).await?;
            }
        }
        Err(corrupt(own, &"a leaf never gets room"))
    }

    fn name_changed(&self, dir: &mut Dinode, entries: i32) {
        dir.entries = dir.entries.saturating_add_signed(entries);
        let now = (self.clock)();
        (dir.mtime, dir.ctime) = (now, now);
    }

    /// Removes a name. The caller counts links, and writes the dinode afterwards.
    pub(super) async fn dir_remove(
        &self,
        tx: &mut Tx<'_>,
        dir: &mut Dinode,
        name: &[u8],
    ) -> Result<(), FsError> {
        let found = self.dir_find(Some(tx), dir, name).await?.ok_or(FsError::NotFound)?;
        let data = tx.edit(found.block, Glock::inode(dir.inum.addr), found.block_kind()).await?;
        remove_dirent(data, found.start, found.offset).map_err(|error| corrupt(found.block, &error))?;
        if found.start == LEAF_BYTES {
            let mut leaf = Leaf::decode(data).map_err(|error| corrupt(found.block, &error))?;
            leaf.entries = leaf.entries.saturating_sub(1);
            leaf.changed = (self.clock)();
            leaf.encode(data);
        }
        self.name_changed(dir, -1);
        Ok(())
    }

    /// Makes a name stand for another inode.
    pub(super) async fn dir_replace(
        &self,
        tx: &mut Tx<'_>,
        dir: &mut Dinode,
        name: &[u8],
        inum: Inum,
        kind: FileType,
    ) -> Result<(), FsError> {
        let found = self.dir_find(Some(tx), dir, name).await?.ok_or(FsError::NotFound)?;
        let data = tx.edit(found.block, Glock::inode(dir.inum.addr), found.block_kind()).await?;
        replace_dirent(data, found.offset, inum, kind, 0);
        self.name_changed(dir, 0);
        Ok(())
    }
}

/// Which pointer of the table a hash selects.
pub(super) fn table_index(dir: &Dinode, hash: u32) -> u64 {
    u64::from(hash) >> (32 - u32::from(dir.depth))
}

/// Whether a name fits into a block without changing its structure.
fn has_room(block: &[u8], start: usize, name: &[u8]) -> bool {
    let need = dirent_bytes(name.len());
    Dirents::new(block, start).map_while(Result::ok).any(|entry| {
        let used = if entry.is_unused() { 0 } else { dirent_bytes(entry.name.len()) };
        used + need <= entry.rec_len
    })
}
