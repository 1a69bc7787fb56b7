//! The contents of a new filesystem: system inodes placed block by block, first fit.

use super::layout::{Layout, indirect_blocks};
use super::{MkfsError, MkfsOptions};
use crate::format::{
    BlockNo, BlockState, Dinode, DinodeFlags, FileType, Inum, InumRange, MetaHeader, MetaType, NewDirent,
    PAYLOAD_FORMAT_DIRENTS, PAYLOAD_FORMAT_QUOTA, PAYLOAD_FORMAT_RINDEX, QUOTA_BYTES, QuotaRecord,
    RINDEX_BYTES, RgrpFlags, RgrpHeader, StatfsChange, init_directory, insert_dirent, set_indirect_pointer,
    set_pointer, set_state,
};
use std::collections::BTreeMap;

/// A journal, whose ring is written apart because it is long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pub(super) jid: u32,
    pub(super) dinode: BlockNo,
    pub(super) first: BlockNo,
    pub(super) blocks: u64,
}

/// Everything to be written but rings, untouched resource groups and the superblock.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) layout: Layout,
    pub(super) blocks: BTreeMap<BlockNo, Vec<u8>>,
    pub(super) rings: Vec<Ring>,
    pub(super) master: Inum,
    pub(super) root: Inum,
    pub(super) free: u64,
    /// How many blocks of each resource group are taken, from its start, and by how many dinodes; groups after the last
    /// entry are untouched.
    groups: Vec<Group>,
}

#[derive(Clone, Debug, Default)]
struct Group {
    used: u32,
    dinodes: u32,
    bitmap: Vec<u8>,
}

impl Image {
    pub(super) fn build(layout: Layout, options: &MkfsOptions) -> Result<Self, MkfsError> {
        let mut builder = Builder { options, formal: 0, cursor: 0, image: Self::empty(layout) };
        builder.build()?;
        Ok(builder.image)
    }

    fn empty(layout: Layout) -> Self {
        Self {
            layout,
            blocks: BTreeMap::new(),
            rings: Vec::new(),
            master: Inum::default(),
            root: Inum::default(),
            free: 0,
            groups: Vec::new(),
        }
    }

    /// The header and bitmap blocks of a resource group.
    pub(super) fn group_blocks(&self, index: usize) -> Vec<Vec<u8>> {
        let entry = self.layout.rgrps[index];
        let untouched = Group { bitmap: vec![0; entry.bitmap_bytes as usize], ..Group::default() };
        let group = self.groups.get(index).unwrap_or(&untouched);
        let bitmaps = entry.bitmaps(self.layout.size).map(|bitmap| {
            let mut block = vec![0; self.layout.size.usize()];
            if bitmap.block == 0 {
                let header = RgrpHeader {
                    jid: 0,
                    flags: RgrpFlags(0),
                    free: entry.data - group.used,
                    dinodes: group.dinodes,
                    skip: self.layout.skip(index),
                    igeneration: 0,
                    data0: entry.data0,
                    data: entry.data,
                    bitmap_bytes: entry.bitmap_bytes,
                };
                header.encode(&mut block);
            } else {
                MetaHeader { kind: MetaType::RgrpBitmap, jid: 0 }.encode(&mut block);
            }
            let from = (bitmap.first / 4) as usize;
            block[bitmap.start..bitmap.start + bitmap.bytes]
                .copy_from_slice(&group.bitmap[from..from + bitmap.bytes]);
            block
        });
        bitmaps.collect()
    }
}

struct Builder<'a> {
    options: &'a MkfsOptions,
    image: Image,
    /// The last formal number given.
    formal: u64,
    /// Groups before this one are full.
    cursor: usize,
}

/// What a new inode is.
struct New {
    permissions: u32,
    kind: FileType,
    flags: DinodeFlags,
    payload_format: u32,
}

impl New {
    const JDATA_FILE: Self = Self {
        permissions: 0o600,
        kind: FileType::Regular,
        flags: DinodeFlags(DinodeFlags::SYSTEM.0 | DinodeFlags::JDATA.0),
        payload_format: 0,
    };
    const PLAIN_FILE: Self = Self { flags: DinodeFlags::SYSTEM, ..Self::JDATA_FILE };

    fn dir(permissions: u32) -> Self {
        Self {
            permissions,
            kind: FileType::Directory,
            payload_format: PAYLOAD_FORMAT_DIRENTS,
            ..Self::JDATA_FILE
        }
    }
}

impl Builder<'_> {
    fn build(&mut self) -> Result<(), MkfsError> {
        let journals = self.options.journals;
        self.image.groups = vec![Group::default(); journals as usize];
        for (group, entry) in self.image.groups.iter_mut().zip(&self.image.layout.rgrps) {
            group.bitmap = vec![0; entry.bitmap_bytes as usize];
        }
        let mut journal_inums = Vec::new();
        for jid in 0..journals {
            journal_inums.push(self.journal(jid)?);
        }
        let master = self.dir(&New::dir(0o755), None)?;
        let jindex = self.dir(&New::dir(0o700), Some(master))?;
        for (jid, inum) in journal_inums.into_iter().enumerate() {
            self.enter(jindex, &format!("journal{jid}"), inum, FileType::Regular)?;
        }
        let per_node = self.dir(&New::dir(0o700), Some(master))?;
        for jid in 0..journals {
            let mut range = [0; 16];
            InumRange::default().encode(&mut range);
            let inum = self.file(&New::JDATA_FILE, &range)?;
            self.enter(per_node, &format!("inum_range{jid}"), inum, FileType::Regular)?;
            let inum = self.file(&New::JDATA_FILE, &[0; 24])?;
            self.enter(per_node, &format!("statfs_change{jid}"), inum, FileType::Regular)?;
            let inum = self.quota_change()?;
            self.enter(per_node, &format!("quota_change{jid}"), inum, FileType::Regular)?;
        }
        // Only root and quota have no number yet when inum is written: it holds the next formal number after both.
        let inum = self.file(&New::JDATA_FILE, &(self.formal + 6).to_be_bytes())?;
        let statfs = self.file(&New::JDATA_FILE, &[0; 24])?;
        let rindex = self.rindex()?;
        let quota = self.quota()?;
        let root = self.dir(&New { flags: DinodeFlags::JDATA, ..New::dir(0o755) }, None)?;
        for (name, inum, kind) in [
            ("jindex", jindex, FileType::Directory),
            ("per_node", per_node, FileType::Directory),
            ("inum", inum, FileType::Regular),
            ("statfs", statfs, FileType::Regular),
            ("rindex", rindex, FileType::Regular),
            ("quota", quota, FileType::Regular),
        ] {
            self.enter(master, name, inum, kind)?;
        }
        self.totals(statfs);
        self.image.master = master;
        self.image.root = root;
        Ok(())
    }

    /// Takes the first free block.
    fn take(&mut self, state: BlockState) -> Result<BlockNo, MkfsError> {
        let image = &mut self.image;
        loop {
            let Some(entry) = image.layout.rgrps.get(self.cursor) else { return Err(self.full()) };
            if image.groups.len() == self.cursor {
                image.groups.push(Group { bitmap: vec![0; entry.bitmap_bytes as usize], ..Group::default() });
            }
            let group = &mut image.groups[self.cursor];
            if group.used < entry.data {
                set_state(&mut group.bitmap, group.used as usize, state);
                let block = BlockNo(entry.data0.0 + u64::from(group.used));
                group.used += 1;
                group.dinodes += u32::from(state == BlockState::Dinode);
                return Ok(block);
            }
            self.cursor += 1;
        }
    }

    /// The layout has counted the blocks of every file but the index of very many groups.
    fn full(&self) -> MkfsError {
        let device_bytes = self.image.layout.rgrps.last().map_or(0, |entry| entry.end().0) << self.shift();
        MkfsError::TooSmall { device_bytes, needed_bytes: device_bytes + self.options.rgrp_bytes }
    }

    fn shift(&self) -> u32 {
        self.image.layout.size.shift()
    }

    fn number(&mut self, addr: BlockNo) -> Inum {
        self.formal += 1;
        Inum { formal: self.formal, addr }
    }

    fn dinode(&self, new: &New, inum: Inum, size_bytes: u64) -> Dinode {
        let now = self.options.now;
        Dinode {
            jid: 0,
            inum,
            mode: new.kind.mode_bits() | new.permissions,
            uid: 0,
            gid: 0,
            nlink: 1,
            size_bytes,
            blocks: 1,
            atime: now,
            mtime: now,
            ctime: now,
            major: 0,
            minor: 0,
            goal_meta: inum.addr,
            goal_data: inum.addr,
            generation: 0,
            flags: new.flags,
            payload_format: new.payload_format,
            height: 0,
            depth: 0,
            entries: 0,
            eattr: BlockNo::NONE,
        }
    }

    fn dir(&mut self, new: &New, parent: Option<Inum>) -> Result<Inum, MkfsError> {
        let addr = self.take(BlockState::Dinode)?;
        let inum = self.number(addr);
        let size = self.image.layout.size;
        let mut block = vec![0; size.usize()];
        let dinode = Dinode { nlink: 2, entries: 2, ..self.dinode(new, inum, size.stuffed_bytes() as u64) };
        dinode.encode(&mut block);
        init_directory(&mut block, inum, parent.unwrap_or(inum));
        self.image.blocks.insert(addr, block);
        Ok(inum)
    }

    /// Enters a name into a directory; system directories are small, but with very many journals they would not be
    /// linear any more, and that is refused.
    fn enter(&mut self, dir: Inum, name: &str, inum: Inum, kind: FileType) -> Result<(), MkfsError> {
        let block =
            self.image.blocks.get_mut(&dir.addr).expect("directories are made before names are entered");
        let mut dinode = Dinode::decode(block).expect("we wrote this dinode");
        let new = NewDirent { name: name.as_bytes(), inum, kind, rahead: 0 };
        let place = insert_dirent(block, crate::format::DINODE_BYTES, &new).expect("we wrote these entries");
        if place.is_none() {
            return Err(MkfsError::TooManyJournals {
                journals: self.options.journals,
                most: journals_max(self.image.layout.size.usize()),
            });
        }
        dinode.entries += 1;
        dinode.nlink += u32::from(kind == FileType::Directory);
        dinode.encode(block);
        Ok(())
    }

    /// A file with these contents.
    fn file(&mut self, new: &New, contents: &[u8]) -> Result<Inum, MkfsError> {
        let size = self.image.layout.size;
        let stuffed = contents.len() <= size.stuffed_bytes();
        let data = if stuffed { 0 } else { contents.len().div_ceil(size.usize()) };
        let (inum, blocks) = self.tree(new, contents.len() as u64, data as u64)?;
        if stuffed {
            let block = self.image.blocks.get_mut(&inum.addr).expect("the dinode was just made");
            block[crate::format::DINODE_BYTES..][..contents.len()].copy_from_slice(contents);
        }
        for (addr, part) in blocks.into_iter().zip(contents.chunks(size.usize())) {
            let mut block = part.to_vec();
            block.resize(size.usize(), 0);
            self.image.blocks.insert(addr, block);
        }
        Ok(inum)
    }

    /// A file's dinode and indirect blocks over `data` blocks, taken in the order of a sequential write.
    fn tree(&mut self, new: &New, size_bytes: u64, data: u64) -> Result<(Inum, Vec<BlockNo>), MkfsError> {
        let size = self.image.layout.size;
        let addr = self.take(BlockState::Dinode)?;
        let inum = self.number(addr);
        let mut dinode = self.dinode(new, inum, size_bytes);
        let mut block = vec![0; size.usize()];
        let height = match data {
            0 => 0,
            _ => size.height_for(data << size.shift(), size.usize()).unwrap_or(0).max(1),
        };
        let mut blocks = Vec::new();
        for logical in 0..data {
            let path = size.path(height, logical).expect("the height was chosen for the length");
            let mut above: Option<BlockNo> = None;
            for (level, &index) in path.indices().iter().enumerate() {
                let parent: &mut Vec<u8> = match above {
                    None => &mut block,
                    Some(above) => self.image.blocks.get_mut(&above).expect("made on the way down"),
                };
                let found = match above {
                    None => crate::format::pointer(parent, index),
                    Some(_) => crate::format::indirect_pointer(parent, index),
                };
                let below = match found.filter(|found| !found.is_none()) {
                    Some(below) => below,
                    None => {
                        let below = self.take(BlockState::Used)?;
                        let parent = match above {
                            None => &mut block,
                            Some(above) => self.image.blocks.get_mut(&above).expect("made on the way down"),
                        };
                        match above {
                            None => set_pointer(parent, index, below),
                            Some(_) => set_indirect_pointer(parent, index, below),
                        }
                        dinode.blocks += 1;
                        dinode.goal_meta = below;
                        if level + 1 < height {
                            self.indirect(below);
                        }
                        below
                    }
                };
                above = Some(below);
            }
            blocks.extend(above);
        }
        dinode.height = height as u16; // at most 10
        dinode.encode(&mut block);
        self.image.blocks.insert(addr, block);
        Ok((inum, blocks))
    }

    fn indirect(&mut self, at: BlockNo) {
        let mut block = vec![0; self.image.layout.size.usize()];
        MetaHeader { kind: MetaType::Indirect, jid: 0 }.encode(&mut block);
        self.image.blocks.insert(at, block);
    }

    fn quota_change(&mut self) -> Result<Inum, MkfsError> {
        let data = self.image.layout.quota_change_blocks;
        let (inum, blocks) = self.tree(&New::PLAIN_FILE, data << self.shift(), data)?;
        for addr in blocks {
            let mut block = vec![0; self.image.layout.size.usize()];
            MetaHeader { kind: MetaType::QuotaChange, jid: 0 }.encode(&mut block);
            self.image.blocks.insert(addr, block);
        }
        Ok(inum)
    }

    fn rindex(&mut self) -> Result<Inum, MkfsError> {
        let mut contents = vec![0; self.image.layout.rgrps.len() * RINDEX_BYTES];
        for (slot, entry) in contents.chunks_exact_mut(RINDEX_BYTES).zip(&self.image.layout.rgrps) {
            entry.encode(slot);
        }
        self.file(&New { payload_format: PAYLOAD_FORMAT_RINDEX, ..New::JDATA_FILE }, &contents)
    }

    /// Root's two records, as mkfs.gfs2 leaves them.
    fn quota(&mut self) -> Result<Inum, MkfsError> {
        let mut contents = [0; 2 * QUOTA_BYTES];
        for slot in contents.chunks_exact_mut(QUOTA_BYTES) {
            QuotaRecord { value: 1, ..QuotaRecord::default() }.encode(slot);
        }
        self.file(&New { payload_format: PAYLOAD_FORMAT_QUOTA, ..New::JDATA_FILE }, &contents)
    }

    /// A journal: dinode, all indirect blocks, then the ring in one piece, at the start of its own group.
    fn journal(&mut self, jid: u32) -> Result<Inum, MkfsError> {
        let size = self.image.layout.size;
        let blocks = self.image.layout.journal_blocks;
        let indirect = indirect_blocks(size, blocks).expect("planned");
        self.cursor = jid as usize;
        let addr = self.take(BlockState::Dinode)?;
        let inum = self.number(addr);
        let mut dinode = self.dinode(&New::PLAIN_FILE, inum, blocks << size.shift());
        let height = size.height_for(blocks << size.shift(), size.usize()).expect("planned");
        let first = BlockNo(addr.0 + 1 + indirect);
        for _ in 0..indirect + blocks {
            self.take(BlockState::Used)?;
        }
        let mut block = vec![0; size.usize()];
        // Level by level: what is `below` starts right after all blocks of the level that points to it.
        let inptrs = size.indirect_pointers() as u64;
        let mut counts = vec![blocks];
        for _ in 1..height {
            counts.push(counts[counts.len() - 1].div_ceil(inptrs));
        }
        counts.reverse(); // from the level right under the dinode down to the ring
        let mut start = addr.0 + 1;
        for index in 0..counts[0] {
            set_pointer(&mut block, index as usize, BlockNo(start + index));
        }
        for pair in counts.windows(2) {
            let below = start + pair[0];
            for index in 0..pair[0] {
                self.indirect(BlockNo(start + index));
                let parent = self.image.blocks.get_mut(&BlockNo(start + index)).expect("just made");
                for slot in 0..inptrs.min(pair[1] - index * inptrs) {
                    set_indirect_pointer(parent, slot as usize, BlockNo(below + index * inptrs + slot));
                }
            }
            start = below;
        }
        dinode.blocks = 1 + indirect + blocks;
        dinode.height = height as u16; // at most 10
        dinode.goal_meta = BlockNo(first.0 - 1);
        dinode.goal_data = BlockNo(first.0 + blocks - 1);
        dinode.encode(&mut block);
        self.image.blocks.insert(addr, block);
        self.image.rings.push(Ring { jid, dinode: addr, first, blocks });
        self.cursor = 0;
        Ok(inum)
    }

    fn totals(&mut self, statfs: Inum) {
        let mut totals = StatfsChange::default();
        for (i, entry) in self.image.layout.rgrps.iter().enumerate() {
            let (used, dinodes) =
                self.image.groups.get(i).map_or((0, 0), |group| (group.used, group.dinodes));
            totals.total += i64::from(entry.data);
            totals.free += i64::from(entry.data - used);
            totals.dinodes += i64::from(dinodes);
        }
        self.image.free = totals.free as u64; // a sum of u32
        let block = self.image.blocks.get_mut(&statfs.addr).expect("made before the totals");
        totals.encode(&mut block[crate::format::DINODE_BYTES..]);
    }
}

/// How many journals a linear per_node directory can name: three entries of 56 bytes each (48 for short numbers).
fn journals_max(block_bytes: usize) -> u32 {
    ((block_bytes - crate::format::DINODE_BYTES - 96) / (3 * 56)) as u32
}
