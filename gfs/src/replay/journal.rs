//! A journal's ring: where its blocks are on the device.

use super::ReplayError;
use crate::format::{BlockNo, BlockSize, FileType};
use crate::mkfs::{JOURNAL_BYTES_MAX, JOURNAL_BYTES_MIN};
use crate::reader::{Extent, Inode, ReadError, Reader};
use quorate_gnbd::BlockDevice;

/// The ring of one journal.
#[derive(Clone, Debug)]
pub struct Journal {
    jid: u32,
    inode: BlockNo,
    size: BlockSize,
    /// Without holes, ascending from logical block 0.
    extents: Vec<Extent>,
    blocks: u32,
}

impl Journal {
    /// All journals, in order: the kernel, too, looks up journal0, journal1, ... until a name is missing.
    ///
    /// # Errors
    /// The device fails, a system directory is broken, or a journal is none.
    pub async fn all<D: BlockDevice>(reader: &Reader<D>) -> Result<Vec<Self>, ReplayError> {
        let master = reader.inode(reader.superblock().master.addr).await?;
        let jindex = reader.system(&master, "jindex").await?;
        let mut journals = Vec::new();
        for jid in 0.. {
            let name = format!("journal{jid}");
            let Some((inum, _)) = reader.lookup(&jindex, name.as_bytes()).await? else { break };
            let inode = reader.inode(inum.addr).await?;
            journals.push(Self::new(reader, jid, &inode).await?);
        }
        if journals.is_empty() {
            return Err(ReadError::Missing { dir: jindex.addr(), name: "journal0".into() }.into());
        }
        Ok(journals)
    }

    /// The ring of the journal with this inode.
    ///
    /// # Errors
    /// The device fails, or the inode is no journal.
    pub async fn new<D: BlockDevice>(
        reader: &Reader<D>,
        jid: u32,
        inode: &Inode,
    ) -> Result<Self, ReplayError> {
        let size = reader.size();
        let bad = |what| Err(ReplayError::Inode { jid, inode: inode.addr(), what });
        let bytes = inode.dinode.size_bytes;
        if inode.dinode.file_type() != Some(FileType::Regular) {
            return bad("not a regular file");
        }
        if !(JOURNAL_BYTES_MIN..=JOURNAL_BYTES_MAX).contains(&bytes)
            || !bytes.is_multiple_of(u64::from(size.bytes()))
        {
            return bad("its size is not that of a journal");
        }
        let blocks = bytes >> size.shift();
        let extents = reader.extents(inode, 0, blocks).await?;
        if extents.iter().any(|extent| extent.start.is_none()) {
            return bad("blocks are missing");
        }
        Ok(Self { jid, inode: inode.addr(), size, extents, blocks: blocks as u32 }) // at most 2^21
    }

    /// Its number.
    #[must_use]
    pub fn jid(&self) -> u32 {
        self.jid
    }

    /// Its inode's block.
    #[must_use]
    pub fn inode(&self) -> BlockNo {
        self.inode
    }

    /// How many blocks the ring has.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The block size.
    #[must_use]
    pub fn size(&self) -> BlockSize {
        self.size
    }

    /// The ring block after `index`.
    #[must_use]
    pub fn after(&self, index: u32) -> u32 {
        if index + 1 < self.blocks { index + 1 } else { 0 }
    }

    /// How far `to` is ahead of `from` around the ring.
    #[must_use]
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        if from <= to { to - from } else { self.blocks - from + to }
    }

    /// Where a ring block is on the device.
    ///
    /// # Panics
    /// If the ring is shorter.
    #[must_use]
    pub fn block(&self, index: u32) -> BlockNo {
        self.run(index).0
    }

    /// Where a ring block is, and how many follow it there.
    fn run(&self, index: u32) -> (BlockNo, u32) {
        assert!(index < self.blocks, "ring index {index} in a ring of {}", self.blocks);
        let at = self.extents.partition_point(|extent| extent.logical <= u64::from(index)) - 1;
        let extent = &self.extents[at];
        let skip = u64::from(index) - extent.logical;
        let start = extent.start.expect("checked for holes").0;
        (BlockNo(start + skip), (extent.count - skip) as u32) // within a ring
    }

    /// Reads up to `count` ring blocks from `index` on, not beyond the ring's end; fewer where the ring is in pieces.
    pub(super) async fn read<D: BlockDevice>(
        &self,
        reader: &Reader<D>,
        index: u32,
        count: u32,
    ) -> Result<quorate_gnbd::Buf, ReadError> {
        let (start, run) = self.run(index);
        reader.raw(start, count.min(run).max(1) as usize).await
    }
}
