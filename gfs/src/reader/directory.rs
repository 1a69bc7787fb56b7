//! Directories: names to inodes, and the entries in the order of the table.

use super::{Inode, ReadError, Reader};
use crate::format::{
    BlockNo, DINODE_BYTES, Dirents, FileType, Inum, LEAF_BYTES, Leaf, META_HEADER_BYTES, MetaType,
    find_dirent, indirect_pointer, name_hash, pointer,
};
use quorate_gnbd::BlockDevice;
use std::collections::BTreeSet;
use std::sync::Arc;

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntryRef {
    /// What it names.
    pub inum: Inum,
    /// Of what kind, as the entry says.
    pub kind: Option<FileType>,
    /// The name.
    pub name: Vec<u8>,
    /// Where to go on after it.
    pub next: DirPosition,
}

/// A place between two entries of a directory that does not change. The default is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirPosition {
    /// Index in the hash table, of the first pointer to a leaf; 0 in a linear directory.
    pub table: u32,
    /// Entries of that leaf and its chain to be skipped.
    pub skip: u32,
}

impl<D: BlockDevice> Reader<D> {
    /// Finds a name.
    ///
    /// # Errors
    /// The device fails, or the directory is broken; `Structure` if it is none.
    pub async fn lookup(
        &self,
        dir: &Inode,
        name: &[u8],
    ) -> Result<Option<(Inum, Option<FileType>)>, ReadError> {
        if !dir.dinode.is_dir() {
            return Err(dir.wrong("not a directory"));
        }
        let (mut block, mut at, start) = if dir.dinode.is_hashed() {
            let index = u64::from(name_hash(name)) >> (32 - u32::from(dir.dinode.depth));
            let leaf = self.table_entry(dir, index as u32).await?;
            (self.meta(leaf, MetaType::Leaf).await?, leaf, LEAF_BYTES)
        } else {
            (dir.block.clone(), dir.addr(), DINODE_BYTES)
        };
        let mut seen = BTreeSet::from([at]);
        loop {
            let found =
                find_dirent(&block, start, name).map_err(|source| ReadError::Format { block: at, source })?;
            if let Some(entry) = found {
                return Ok(Some((entry.inum, FileType::from_dirent(entry.kind))));
            }
            match self.next_leaf(dir, &block, at, &mut seen).await? {
                Some((next, next_block)) => (at, block) = (next, next_block),
                None => return Ok(None),
            }
        }
    }

    /// Finds a name that must be there.
    ///
    /// # Errors
    /// As [`Self::lookup`], or `Missing`.
    pub async fn system(&self, dir: &Inode, name: &str) -> Result<Inode, ReadError> {
        match self.lookup(dir, name.as_bytes()).await? {
            Some((inum, _)) => self.inode(inum.addr).await,
            None => Err(ReadError::Missing { dir: dir.addr(), name: name.into() }),
        }
    }

    /// The entries from a position on, `.` and `..` among them, at least `min` unless the end comes before.
    ///
    /// # Errors
    /// The device fails, or the directory is broken.
    pub async fn entries(
        &self,
        dir: &Inode,
        from: DirPosition,
        min: usize,
    ) -> Result<Vec<DirEntryRef>, ReadError> {
        if !dir.dinode.is_dir() {
            return Err(dir.wrong("not a directory"));
        }
        let mut entries = Vec::new();
        if !dir.dinode.is_hashed() {
            let end = DirPosition { table: 1, skip: 0 };
            if from.table == 0 {
                self.collect(dir, (dir.addr(), dir.block.clone(), DINODE_BYTES), from, end, &mut entries)
                    .await?;
            }
            return Ok(entries);
        }
        let slots = 1_u32 << dir.dinode.depth;
        let mut position = from;
        while position.table < slots && entries.len() < min.max(1) {
            let leaf = self.table_entry(dir, position.table).await?;
            let mut after = position.table + 1;
            while after < slots && self.table_entry(dir, after).await? == leaf {
                after += 1;
            }
            let end = DirPosition { table: after, skip: 0 };
            let block = self.meta(leaf, MetaType::Leaf).await?;
            self.collect(dir, (leaf, block, LEAF_BYTES), position, end, &mut entries).await?;
            position = end;
        }
        Ok(entries)
    }

    /// All entries.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub async fn all_entries(&self, dir: &Inode) -> Result<Vec<DirEntryRef>, ReadError> {
        self.entries(dir, DirPosition::default(), usize::MAX).await
    }

    /// Pointer `index` of the hash table.
    ///
    /// # Errors
    /// The device fails, or the table is broken.
    pub async fn table_entry(&self, dir: &Inode, index: u32) -> Result<BlockNo, ReadError> {
        let index = index as usize;
        let found = if dir.dinode.height == 0 {
            pointer(&dir.block, index)
        } else {
            let per_block = (self.size().usize() - META_HEADER_BYTES) / 8;
            let extents = self.extents(dir, (index / per_block) as u64, 1).await?;
            match extents.first().and_then(|extent| extent.start) {
                Some(at) => {
                    let block = self.meta(at, MetaType::HeaderedData).await?;
                    indirect_pointer(&block, index % per_block)
                }
                None => None,
            }
        };
        found.filter(|leaf| !leaf.is_none()).ok_or_else(|| dir.wrong("a hole in the hash table"))
    }

    /// The overflow leaf behind a leaf. A chain that returns to itself is an error.
    async fn next_leaf(
        &self,
        dir: &Inode,
        block: &[u8],
        at: BlockNo,
        seen: &mut BTreeSet<BlockNo>,
    ) -> Result<Option<(BlockNo, Arc<Vec<u8>>)>, ReadError> {
        if at == dir.addr() {
            return Ok(None);
        }
        let leaf = Leaf::decode(block).map_err(|source| ReadError::Format { block: at, source })?;
        if leaf.next.is_none() {
            return Ok(None);
        }
        if !seen.insert(leaf.next) {
            return Err(dir.wrong("a chain of leaves that returns to itself"));
        }
        Ok(Some((leaf.next, self.meta(leaf.next, MetaType::Leaf).await?)))
    }

    /// Adds the live entries of a block and its chain, but the first `from.skip`.
    async fn collect(
        &self,
        dir: &Inode,
        (mut at, mut block, start): (BlockNo, Arc<Vec<u8>>, usize),
        from: DirPosition,
        end: DirPosition,
        entries: &mut Vec<DirEntryRef>,
    ) -> Result<(), ReadError> {
        let before = entries.len();
        let mut count = 0;
        let mut seen = BTreeSet::from([at]);
        loop {
            for entry in Dirents::new(&block, start) {
                let entry = entry.map_err(|source| ReadError::Format { block: at, source })?;
                if entry.is_unused() {
                    continue;
                }
                count += 1;
                if from.skip < count {
                    entries.push(DirEntryRef {
                        inum: entry.inum,
                        kind: FileType::from_dirent(entry.kind),
                        name: entry.name.to_vec(),
                        next: DirPosition { table: from.table, skip: count },
                    });
                }
            }
            match self.next_leaf(dir, &block, at, &mut seen).await? {
                Some((next, next_block)) => (at, block) = (next, next_block),
                None => break,
            }
        }
        if before < entries.len()
            && let Some(last) = entries.last_mut()
        {
            last.next = end;
        }
        Ok(())
    }
}
