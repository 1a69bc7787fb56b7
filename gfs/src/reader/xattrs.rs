//! Extended attributes of an inode.

use super::{Inode, ReadError, Reader};
use crate::format::{
    BlockNo, DinodeFlags, EaKind, EaRecords, EaValue, META_HEADER_BYTES, MetaType, indirect_pointer,
};
use quorate_gnbd::BlockDevice;

/// An attribute with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// The namespace.
    pub kind: EaKind,
    /// Without prefix.
    pub name: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
}

impl Xattr {
    /// With prefix, as `getxattr` knows it.
    #[must_use]
    pub fn full_name(&self) -> Vec<u8> {
        [self.kind.prefix().as_bytes(), &self.name].concat()
    }
}

impl<D: BlockDevice> Reader<D> {
    /// The blocks with attribute records.
    ///
    /// # Errors
    /// The device fails, or the indirect block is broken.
    pub async fn xattr_blocks(&self, inode: &Inode) -> Result<Vec<BlockNo>, ReadError> {
        let at = inode.dinode.eattr;
        if at.is_none() {
            return Ok(Vec::new());
        }
        if !inode.dinode.flags.contains(DinodeFlags::EA_INDIRECT) {
            return Ok(vec![at]);
        }
        let block = self.meta(at, MetaType::Indirect).await?;
        let pointers =
            (0..self.size().indirect_pointers()).filter_map(|index| indirect_pointer(&block, index));
        Ok(pointers.filter(|pointer| !pointer.is_none()).collect())
    }

    /// All attributes of an inode, in the order of their records.
    ///
    /// # Errors
    /// The device fails, or a record is broken.
    pub async fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, ReadError> {
        let mut found = Vec::new();
        for at in self.xattr_blocks(inode).await? {
            let block = self.block(at).await?;
            let format = |source| ReadError::Format { block: at, source };
            for record in EaRecords::new(&block).map_err(format)? {
                let record = record.map_err(format)?;
                let Some(kind) = record.kind else { continue };
                let value = match record.value {
                    EaValue::Inline(value) => value.to_vec(),
                    EaValue::Blocks { bytes, blocks } => self.long_value(bytes, &blocks).await?,
                };
                found.push(Xattr { kind, name: record.name.to_vec(), value });
            }
        }
        Ok(found)
    }

    async fn long_value(&self, bytes: usize, blocks: &[BlockNo]) -> Result<Vec<u8>, ReadError> {
        let mut value = Vec::with_capacity(bytes);
        for &at in blocks.iter().take(bytes.div_ceil(self.size().headered_bytes())) {
            let block = self.meta(at, MetaType::EaData).await?;
            value.extend_from_slice(&block[META_HEADER_BYTES..]);
        }
        value.truncate(bytes);
        Ok(value)
    }
}
