//! Inodes: their checked dinode, where their blocks are, and their contents.

use super::{ReadError, Reader};
use crate::format::{BlockNo, DINODE_BYTES, Dinode, MetaType, TreePath, indirect_pointer, pointer};
use quorate_gnbd::BlockDevice;
use std::sync::Arc;

/// An inode, as it was when it was read.
#[derive(Clone, Debug)]
pub struct Inode {
    /// The dinode; it has passed [`Dinode::check`].
    pub dinode: Dinode,
    /// The block it stands in.
    pub block: Arc<Vec<u8>>,
}

impl Inode {
    /// Its block.
    #[must_use]
    pub fn addr(&self) -> BlockNo {
        self.dinode.inum.addr
    }

    /// What stands behind the dinode's header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.block.get(DINODE_BYTES..).unwrap_or_default()
    }

    pub(super) fn wrong(&self, what: &'static str) -> ReadError {
        ReadError::Structure { inode: self.addr(), what }
    }
}

/// Logical blocks that follow each other, also on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first logical block.
    pub logical: u64,
    /// Where it is; `None` for a hole.
    pub start: Option<BlockNo>,
    /// How many.
    pub count: u64,
}

impl<D: BlockDevice> Reader<D> {
    /// Reads and checks a dinode.
    ///
    /// # Errors
    /// The device fails, or there is no sound dinode.
    pub async fn inode(&self, at: BlockNo) -> Result<Inode, ReadError> {
        let block = self.block(at).await?;
        let format = |source| ReadError::Format { block: at, source };
        let dinode = Dinode::decode(&block).map_err(format)?;
        dinode.check(self.size(), at).map_err(format)?;
        Ok(Inode { dinode, block })
    }

    /// Where logical blocks `first` to `first + count` are. What is beyond the tree's reach is a hole.
    ///
    /// # Errors
    /// The device fails, or the tree is broken.
    pub async fn extents(&self, inode: &Inode, first: u64, count: u64) -> Result<Vec<Extent>, ReadError> {
        let height = usize::from(inode.dinode.height);
        let end = first.checked_add(count).ok_or_else(|| inode.wrong("a range beyond the end of numbers"))?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut add = |extent: Extent| {
            if let Some(last) = extents.last_mut() {
                let joins = match (last.start, extent.start) {
                    (None, None) => true,
                    (Some(a), Some(b)) => a.checked_add(last.count) == Some(b),
                    _ => false,
                };
                if joins {
                    last.count += extent.count;
                    return;
                }
            }
            extents.push(extent);
        };
        let mut logical = first;
        while logical < end {
            let Some(path) = self.size().path(height, logical) else {
                add(Extent { logical, start: None, count: end - logical });
                break;
            };
            let count = match self.lowest(inode, height, &path).await? {
                Lowest::Hole { level } => {
                    let span = self.size().span_blocks(height, level);
                    let count = (span - logical % span).min(end - logical);
                    add(Extent { logical, start: None, count });
                    count
                }
                Lowest::Block(block) => {
                    let first = path.indices()[height - 1];
                    let read = if height == 1 { pointer } else { indirect_pointer };
                    let mut count = 0;
                    while count < end - logical {
                        let Some(at) = read(&block, first + count as usize) else { break };
                        if !at.is_none() {
                            self.check(at, 1)?;
                        }
                        add(Extent {
                            logical: logical + count,
                            start: (!at.is_none()).then_some(at),
                            count: 1,
                        });
                        count += 1;
                    }
                    count
                }
            };
            if count == 0 {
                return Err(inode.wrong("a tree that leads nowhere"));
            }
            logical += count;
        }
        Ok(extents)
    }

    /// The block with the pointers to data, or at which level the way to it ends.
    async fn lowest(&self, inode: &Inode, height: usize, path: &TreePath) -> Result<Lowest, ReadError> {
        let mut block = inode.block.clone();
        for (level, &index) in path.indices()[..height - 1].iter().enumerate() {
            let read = if level == 0 { pointer } else { indirect_pointer };
            match read(&block, index) {
                Some(below) if !below.is_none() => block = self.meta(below, MetaType::Indirect).await?,
                _ => return Ok(Lowest::Hole { level }),
            }
        }
        Ok(Lowest::Block(block))
    }

    /// The bytes of a file or link from `offset` on, at most `len`, fewer only at its end.
    ///
    /// # Errors
    /// The device fails, or the tree is broken.
    pub async fn read(&self, inode: &Inode, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
        let left = inode.dinode.size_bytes.saturating_sub(offset);
        let len = (len as u64).min(left) as usize;
        if len == 0 {
            return Ok(Vec::new());
        }
        if inode.dinode.height == 0 {
            let from = offset as usize; // below the size, which the check bounds for stuffed inodes
            let bytes = inode.payload().get(from..from + len);
            return bytes.map(<[u8]>::to_vec).ok_or_else(|| inode.wrong("stuffed data beyond its block"));
        }
        let shift = self.size().shift();
        let first = offset >> shift;
        let blocks = ((offset + len as u64 - 1) >> shift) - first + 1;
        let mut bytes = Vec::with_capacity((blocks as usize) << shift);
        for extent in self.extents(inode, first, blocks).await? {
            match extent.start {
                Some(start) => bytes.extend_from_slice(&self.run(start, extent.count as usize).await?),
                None => bytes.resize(bytes.len() + ((extent.count as usize) << shift), 0),
            }
        }
        let skip = (offset - (first << shift)) as usize;
        bytes.drain(..skip);
        bytes.truncate(len);
        Ok(bytes)
    }
}

enum Lowest {
    Hole { level: usize },
    Block(Arc<Vec<u8>>),
}
