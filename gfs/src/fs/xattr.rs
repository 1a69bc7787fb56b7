//! Extended attributes (gfs2.md 7).

use super::Inner;
use super::data::check_mutable;
use super::glock::Glock;
use super::store::{Bytes, corrupt};
use crate::FsError;
use crate::face::{Ino, XattrFlags};
use crate::format::{
    BlockNo, Dinode, DinodeFlags, EA_NAME_BYTES_MAX, EA_VALUE_BYTES_MAX, EaKind, EaRecords, EaValue,
    META_HEADER_BYTES, MetaType, NewEa, ea_bytes_inline, ea_value_blocks, indirect_pointer, init_ea_block,
    insert_ea, remove_ea, set_indirect_pointer,
};
use quorate_dlm::cache::CacheMode;

/// Where an attribute is, and the blocks of its value if they are not in the record.
struct Place {
    block: BlockNo,
    offset: usize,
    external: Vec<BlockNo>,
}

fn split(name: &[u8]) -> Result<(EaKind, &[u8]), FsError> {
    let (kind, name) = EaKind::split(name).ok_or(FsError::Unsupported)?;
    match name.len() {
        0 => Err(FsError::Invalid("name of an attribute")),
        1..=EA_NAME_BYTES_MAX => Ok((kind, name)),
        _ => Err(FsError::NameTooLong),
    }
}

impl Inner {
    /// The blocks with attribute records.
    async fn ea_blocks(&self, dinode: &Dinode) -> Result<Vec<BlockNo>, FsError> {
        if dinode.eattr.is_none() {
            return Ok(Vec::new());
        }
        if !dinode.flags.contains(DinodeFlags::EA_INDIRECT) {
            return Ok(vec![dinode.eattr]);
        }
        let data = self.meta(dinode.eattr, Glock::inode(dinode.inum.addr), MetaType::Indirect).await?;
        let pointers = (0..self.size.indirect_pointers()).filter_map(|index| indirect_pointer(&data, index));
        Ok(pointers.filter(|block| !block.is_none()).collect())
    }

    async fn ea_block(&self, dinode: &Dinode, block: BlockNo) -> Result<Bytes, FsError> {
        self.meta(block, Glock::inode(dinode.inum.addr), MetaType::Ea).await
    }

    /// Every block that the attributes of an inode take.
    pub(super) async fn ea_all_blocks(&self, dinode: &Dinode) -> Result<Vec<BlockNo>, FsError> {
        let mut all = self.ea_blocks(dinode).await?;
        let mut values = Vec::new();
        for &block in &all {
            let data = self.ea_block(dinode, block).await?;
            for record in EaRecords::new(&data).map_err(|error| corrupt(block, &error))? {
                if let EaValue::Blocks { blocks, .. } = record.map_err(|error| corrupt(block, &error))?.value
                {
                    values.extend(blocks.into_iter().filter(|block| !block.is_none()));
                }
            }
        }
        all.extend(values);
        if dinode.flags.contains(DinodeFlags::EA_INDIRECT) {
            all.push(dinode.eattr);
        }
        Ok(all)
    }

    async fn ea_find(&self, dinode: &Dinode, kind: EaKind, name: &[u8]) -> Result<Option<Place>, FsError> {
        for block in self.ea_blocks(dinode).await? {
            let data = self.ea_block(dinode, block).await?;
            for record in EaRecords::new(&data).map_err(|error| corrupt(block, &error))? {
                let record = record.map_err(|error| corrupt(block, &error))?;
                if record.kind == Some(kind) && record.name == name {
                    let external = match record.value {
                        EaValue::Blocks { blocks, .. } => blocks,
                        EaValue::Inline(_) => Vec::new(),
                    };
                    return Ok(Some(Place { block, offset: record.offset, external }));
                }
            }
        }
        Ok(None)
    }

    pub(super) async fn get_xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        let (kind, name) = split(name)?;
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        let place = self.ea_find(&dinode, kind, name).await?.ok_or(FsError::NoAttribute)?;
        let data = self.ea_block(&dinode, place.block).await?;
        let records = EaRecords::new(&data).map_err(|error| corrupt(place.block, &error))?;
        let found = records.map_while(Result::ok).find(|record| record.offset == place.offset);
        match found.ok_or(FsError::NoAttribute)?.value {
            EaValue::Inline(value) => Ok(value.to_vec()),
            EaValue::Blocks { bytes, blocks } => {
                let mut value = Vec::with_capacity(bytes);
                for block in blocks {
                    let data = self.meta(block, inode.glock(), MetaType::EaData).await?;
                    value.extend_from_slice(&data[META_HEADER_BYTES..]);
                }
                value.truncate(bytes);
                Ok(value)
            }
        }
    }

    pub(super) async fn list_xattr(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Shared).await?;
        let dinode = self.dinode_of(None, inode.addr()).await?;
        let mut names = Vec::new();
        for block in self.ea_blocks(&dinode).await? {
            let data = self.ea_block(&dinode, block).await?;
            for record in EaRecords::new(&data).map_err(|error| corrupt(block, &error))? {
                let record = record.map_err(|error| corrupt(block, &error))?;
                if let Some(kind) = record.kind {
                    names.extend_from_slice(kind.prefix().as_bytes());
                    names.extend_from_slice(record.name);
                    names.push(0);
                }
            }
        }
        Ok(names)
    }

    /// Sets an attribute, or with `None` removes it.
    pub(super) async fn change_xattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: Option<&[u8]>,
        flags: XattrFlags,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        let (kind, name) = split(name)?;
        if value.is_some_and(|value| EA_VALUE_BYTES_MAX < value.len()) {
            return Err(FsError::ValueTooLarge);
        }
        if kind == EaKind::Trusted && self.superblock.format < 1802 {
            return Err(FsError::Unsupported);
        }
        let inode = self.inode(ino)?;
        let _held = self.lock_inode(&inode, CacheMode::Exclusive).await?;
        let (own, glock) = (inode.addr(), inode.glock());
        let mut dinode = self.dinode_of(None, own).await?;
        check_mutable(&dinode, false)?;
        let place = self.ea_find(&dinode, kind, name).await?;
        if place.is_some() && flags.create {
            return Err(FsError::Exists);
        }
        if place.is_none() && (flags.replace || value.is_none()) {
            return Err(FsError::NoAttribute);
        }
        let external = match value {
            Some(value) if self.size.headered_bytes() < ea_bytes_inline(name.len(), value.len()) => {
                ea_value_blocks(self.size, value.len())
            }
            _ => 0,
        };
        let freed = place.as_ref().map_or(Vec::new(), |place| place.external.clone());
        let also = self.rgrps_of(&freed)?;
        let need = if value.is_some() { external as u32 + 2 } else { 0 };
        let locks = self.lock_for_alloc(&also, need, dinode.goal_meta).await?;
        let blocks = self.ea_blocks(&dinode).await?;
        let mut tx = self.begin(external + blocks.len() + self.bitmap_blocks(&also) + 12).await?;
        if let Some(place) = &place {
            let data = tx.edit(place.block, glock, MetaType::Ea).await?;
            remove_ea(data, place.offset).map_err(|error| corrupt(place.block, &error))?;
            locks.free(&mut tx, &freed).await?;
            dinode.blocks = dinode.blocks.saturating_sub(freed.len() as u64);
        }
        if let Some(value) = value {
            let mut value_blocks = Vec::new();
            for chunk in value.chunks(self.size.headered_bytes()).take(external) {
                let block = self.take_one(&mut tx, &locks, &mut dinode).await?;
                let data = tx.fresh(block, glock, MetaType::EaData);
                data[META_HEADER_BYTES..META_HEADER_BYTES + chunk.len()].copy_from_slice(chunk);
                value_blocks.push(block);
            }
            let value = if external == 0 {
                EaValue::Inline(value)
            } else {
                EaValue::Blocks { bytes: value.len(), blocks: value_blocks }
            };
            let new = NewEa { kind, name, value };
            let mut placed = false;
            for block in blocks {
                let mut data = Vec::clone(&*tx.read(block, glock, MetaType::Ea).await?);
                if insert_ea(&mut data, &new).map_err(|error| corrupt(block, &error))?.is_some() {
                    *tx.edit(block, glock, MetaType::Ea).await? = data;
                    placed = true;
                    break;
                }
            }
            if !placed {
                self.ea_add_block(&mut tx, &locks, &mut dinode, &new).await?;
            }
        }
        dinode.ctime = (self.clock)();
        tx.put_dinode(&dinode).await?;
        tx.commit();
        Ok(())
    }

    /// No block has room: another one, named by the dinode or by an indirect block.
    async fn ea_add_block(
        &self,
        tx: &mut super::tx::Tx<'_>,
        locks: &super::rgrp::RgrpLocks<'_>,
        dinode: &mut Dinode,
        new: &NewEa<'_>,
    ) -> Result<(), FsError> {
        let glock = Glock::inode(dinode.inum.addr);
        let block = self.take_one(tx, locks, dinode).await?;
        let jid = self.jid();
        let data = tx.fresh(block, glock, MetaType::Ea);
        init_ea_block(data, jid);
        if insert_ea(data, new).map_err(|error| corrupt(block, &error))?.is_none() {
            return Err(FsError::NoSpace);
        }
        if dinode.eattr.is_none() {
            dinode.eattr = block;
            return Ok(());
        }
        if !dinode.flags.contains(DinodeFlags::EA_INDIRECT) {
            let indirect = self.take_one(tx, locks, dinode).await?;
            let data = tx.fresh(indirect, glock, MetaType::Indirect);
            set_indirect_pointer(data, 0, dinode.eattr);
            set_indirect_pointer(data, 1, block);
            dinode.eattr = indirect;
            dinode.flags |= DinodeFlags::EA_INDIRECT;
            return Ok(());
        }
        let data = tx.edit(dinode.eattr, glock, MetaType::Indirect).await?;
        let free = (0..self.size.indirect_pointers())
            .find(|&index| indirect_pointer(data, index).is_some_and(BlockNo::is_none));
        set_indirect_pointer(data, free.ok_or(FsError::NoSpace)?, block);
        Ok(())
    }
}
