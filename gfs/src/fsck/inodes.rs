//! Every dinode that the bitmaps name: its header, its tree, its attributes, its number of blocks.

use super::{Check, Known, Problem};
use crate::format::{
    BlockNo, BlockState, DinodeFlags, EaKind, EaRecords, EaValue, FORMAT_MIN, FileType, MetaHeader, MetaType,
    indirect_pointer, pointer,
};
use crate::reader::{Inode, ReadError};
use quorate_gnbd::BlockDevice;

impl<D: BlockDevice> Check<D> {
    pub(super) async fn all_inodes(&mut self) -> Result<(), ReadError> {
        for state in [BlockState::Dinode, BlockState::Unlinked] {
            let mut from = BlockNo(0);
            while let Some(at) = self.space.next(from, state) {
                from = BlockNo(at.0 + 1);
                self.take_dinode(at);
                if state == BlockState::Unlinked {
                    self.problem(Problem::Orphan { inode: at });
                }
                let inode = self.reader.inode(at).await;
                if let Some(inode) = self.noted(at, inode)? {
                    self.inode(&inode, state == BlockState::Unlinked).await?;
                }
            }
        }
        Ok(())
    }

    async fn inode(&mut self, inode: &Inode, unlinked: bool) -> Result<(), ReadError> {
        let at = inode.addr();
        let dinode = &inode.dinode;
        let known = Known {
            inum: dinode.inum,
            mode: dinode.mode,
            nlink: dinode.nlink,
            links: 0,
            parent: BlockNo::NONE,
            dotdot: BlockNo::NONE,
            unlinked,
        };
        self.inodes.insert(at, known);
        if dinode.inum.formal == 0 {
            self.problem(Problem::Broken { inode: at, what: "formal number 0".into() });
        }
        if dinode.flags.contains(DinodeFlags::TRUNC_IN_PROG) {
            self.problem(Problem::Broken { inode: at, what: "a truncation is not finished".into() });
        }
        let symlink = dinode.file_type() == Some(FileType::Symlink);
        if symlink && dinode.height != 0 {
            self.problem(Problem::Broken { inode: at, what: "a symbolic link with blocks".into() });
        }
        let mut blocks = 1 + self.tree(inode).await? + self.attributes(inode).await?;
        if dinode.is_hashed() {
            blocks += self.leaves(inode).await?;
        }
        if blocks != dinode.blocks {
            self.problem(Problem::Blocks { inode: at, stored: dinode.blocks, counted: blocks });
        }
        Ok(())
    }

    /// Takes the blocks of the tree and counts them.
    async fn tree(&mut self, inode: &Inode) -> Result<u64, ReadError> {
        let (at, height) = (inode.addr(), usize::from(inode.dinode.height));
        if height == 0 {
            return Ok(0);
        }
        let size = self.reader.size();
        let hashed = inode.dinode.is_hashed();
        let mut count = 0;
        // A pointer found at `level` leads to a block of level + 1; those of level `height` are data.
        let mut todo: Vec<(BlockNo, usize)> = Vec::new();
        let top = (0..size.dinode_pointers()).filter_map(|index| pointer(&inode.block, index));
        todo.extend(top.filter(|below| !below.is_none()).map(|below| (below, 1)));
        while let Some((block, level)) = todo.pop() {
            if !self.take(at, block) {
                continue;
            }
            count += 1;
            if level < height {
                let read = self.reader.meta(block, MetaType::Indirect).await;
                let Some(bytes) = self.noted(at, read)? else { continue };
                let below = (0..size.indirect_pointers()).filter_map(|index| indirect_pointer(&bytes, index));
                todo.extend(below.filter(|below| !below.is_none()).map(|below| (below, level + 1)));
            } else if hashed {
                let read = self.reader.meta(block, MetaType::HeaderedData).await;
                self.noted(at, read)?;
            }
        }
        Ok(count)
    }

    /// Takes the blocks of the attributes, counts them and checks the records.
    async fn attributes(&mut self, inode: &Inode) -> Result<u64, ReadError> {
        let (at, eattr) = (inode.addr(), inode.dinode.eattr);
        if eattr.is_none() {
            return Ok(0);
        }
        let mut count = 0;
        let blocks = if inode.dinode.flags.contains(DinodeFlags::EA_INDIRECT) {
            if !self.take(at, eattr) {
                return Ok(0);
            }
            count += 1;
            let read = self.reader.xattr_blocks(inode).await;
            self.noted(at, read)?.unwrap_or_default()
        } else {
            vec![eattr]
        };
        for block in blocks {
            if !self.take(at, block) {
                continue;
            }
            count += 1;
            let bytes = self.reader.block(block).await;
            let Some(bytes) = self.noted(at, bytes)? else { continue };
            count += self.records(at, block, &bytes).await?;
        }
        Ok(count)
    }

    /// Checks the records of one attribute block, takes the blocks with values and counts them.
    async fn records(&mut self, inode: BlockNo, block: BlockNo, bytes: &[u8]) -> Result<u64, ReadError> {
        let broken = |error| Problem::Broken { inode, what: format!("attributes in block {block}: {error}") };
        let records = match EaRecords::new(bytes) {
            Ok(records) => records,
            Err(error) => {
                self.problem(broken(error));
                return Ok(0);
            }
        };
        let mut count = 0;
        for record in records {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    self.problem(broken(error));
                    break;
                }
            };
            if record.kind == Some(EaKind::Trusted) && self.reader.superblock().format == FORMAT_MIN {
                self.problem(Problem::Broken { inode, what: "a trusted attribute in format 1801".into() });
            }
            let EaValue::Blocks { blocks, .. } = record.value else { continue };
            for value in blocks {
                if !self.take(inode, value) {
                    continue;
                }
                count += 1;
                let read = self.reader.block(value).await;
                let Some(bytes) = self.noted(inode, read)? else { continue };
                if let Err(error) = MetaHeader::expect(&bytes, MetaType::EaData) {
                    self.problem(broken(error));
                }
            }
        }
        Ok(count)
    }
}
