//! Resource groups: their headers, the state of every block, and who uses it.

use super::{Check, Problem};
use crate::format::{
    BlockNo, BlockState, MetaHeader, MetaType, RINDEX_BYTES, RgrpHeader, RindexEntry, count_states,
    find_state, get_state,
};
use crate::reader::ReadError;
use quorate_gnbd::BlockDevice;

/// The resource groups, ascending.
#[derive(Debug, Default)]
pub(super) struct Space {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    entry: RindexEntry,
    /// States, two bits each.
    bitmap: Vec<u8>,
    /// Whether a block's user was found, one bit each.
    seen: Vec<u8>,
}

impl Space {
    fn find(&self, block: BlockNo) -> Option<(usize, usize)> {
        let at = self.groups.partition_point(|group| group.entry.data0 <= block).checked_sub(1)?;
        let entry = &self.groups[at].entry;
        (block < entry.end()).then(|| (at, (block.0 - entry.data0.0) as usize))
    }

    pub(super) fn state(&self, block: BlockNo) -> Option<BlockState> {
        let (group, index) = self.find(block)?;
        get_state(&self.groups[group].bitmap, index)
    }

    /// Marks a block as used, and says whether it was already.
    fn mark(&mut self, block: BlockNo) -> Option<bool> {
        let (group, index) = self.find(block)?;
        let byte = self.groups[group].seen.get_mut(index / 8)?;
        let before = *byte >> (index % 8) & 1 == 1;
        *byte |= 1 << (index % 8);
        Some(before)
    }

    /// The first block at or behind `from` in this state.
    pub(super) fn next(&self, from: BlockNo, state: BlockState) -> Option<BlockNo> {
        let start = self.groups.partition_point(|group| group.entry.end() <= from);
        self.groups[start..].iter().find_map(|group| {
            let first = from.0.saturating_sub(group.entry.data0.0) as usize;
            let found = find_state(&group.bitmap, first, group.entry.data as usize, state)?;
            Some(BlockNo(group.entry.data0.0 + found as u64))
        })
    }
}

impl<D: BlockDevice> Check<D> {
    /// Reads rindex and all resource groups, and checks each by itself.
    pub(super) async fn rgrps(&mut self) -> Result<(), ReadError> {
        let master = self.reader.superblock().master.addr;
        let inode = match self.reader.inode(master).await {
            Ok(dir) => self.reader.system(&dir, "rindex").await,
            Err(error) => Err(error),
        };
        let Some(inode) = self.noted(master, inode)? else { return Ok(()) };
        let size_bytes = inode.dinode.size_bytes;
        let fits = size_bytes / RINDEX_BYTES as u64 <= self.reader.device_blocks();
        if !size_bytes.is_multiple_of(RINDEX_BYTES as u64) || size_bytes == 0 || !fits {
            self.problem(Problem::Rindex { index: 0, what: format!("the file has {size_bytes} bytes") });
            return Ok(());
        }
        let contents = self.reader.read(&inode, 0, size_bytes as usize).await;
        let Some(contents) = self.noted(inode.addr(), contents)? else { return Ok(()) };
        let mut end = self.reader.size().superblock().0 + 1;
        for (index, bytes) in contents.chunks_exact(RINDEX_BYTES).enumerate() {
            let checked = RindexEntry::decode(bytes).and_then(|entry| {
                entry.check(self.reader.size())?;
                Ok(entry)
            });
            match checked {
                Err(error) => self.problem(Problem::Rindex { index, what: error.to_string() }),
                Ok(entry) if entry.addr.0 < end => {
                    self.problem(Problem::Rindex { index, what: "overlaps what is before it".into() });
                }
                Ok(entry) if self.reader.device_blocks() < entry.end().0 => {
                    self.problem(Problem::Rindex { index, what: "reaches beyond the device".into() });
                }
                Ok(entry) => {
                    end = entry.end().0;
                    self.rgrp(entry).await?;
                }
            }
        }
        Ok(())
    }

    async fn rgrp(&mut self, entry: RindexEntry) -> Result<(), ReadError> {
        let size = self.reader.size();
        let addr = entry.addr;
        let blocks = self.reader.run(addr, entry.length as usize).await?;
        let mut bitmap = vec![0; entry.bitmap_bytes as usize];
        for part in entry.bitmaps(size) {
            let block = &blocks[part.block as usize * size.usize()..][..size.usize()];
            let from = (part.first / 4) as usize;
            bitmap[from..from + part.bytes].copy_from_slice(&block[part.start..part.start + part.bytes]);
            if part.block != 0
                && let Err(error) = MetaHeader::expect(block, MetaType::RgrpBitmap)
            {
                self.problem(Problem::Rgrp { addr, what: format!("bitmap block {}: {error}", part.block) });
            }
        }
        let counts = count_states(&bitmap, entry.data as usize);
        let dinodes = counts[2] + counts[3];
        match RgrpHeader::decode(&blocks) {
            Err(error) => self.problem(Problem::Rgrp { addr, what: error.to_string() }),
            Ok(header) => {
                // Old tools left the copies of the index zero.
                let copies = (header.data0, header.data, header.bitmap_bytes);
                if copies != (entry.data0, entry.data, entry.bitmap_bytes) && copies != (BlockNo::NONE, 0, 0)
                {
                    self.problem(Problem::Rgrp { addr, what: "its header differs from rindex".into() });
                }
                for (what, stored, counted) in
                    [("free blocks", header.free, counts[0]), ("dinodes", header.dinodes, dinodes)]
                {
                    let stored = u64::from(stored);
                    if stored != counted {
                        self.problem(Problem::RgrpCount { addr, what, stored, counted });
                    }
                }
            }
        }
        self.report.rgrps += 1;
        self.report.statfs.total += i64::from(entry.data);
        self.report.statfs.free += counts[0] as i64; // at most `data`
        self.report.statfs.dinodes += dinodes as i64;
        let seen = vec![0; (entry.data as usize).div_ceil(8)];
        self.space.groups.push(Group { entry, bitmap, seen });
        Ok(())
    }

    /// Records that `owner` uses a block that is no dinode. Says whether it may be followed: it is in a resource group and
    /// nobody else's.
    pub(super) fn take(&mut self, owner: BlockNo, block: BlockNo) -> bool {
        let (Some(state), Some(before)) = (self.space.state(block), self.space.mark(block)) else {
            self.problem(Problem::Pointer { owner, block });
            return false;
        };
        if before {
            self.problem(Problem::Shared { owner, block });
            return false;
        }
        if state != BlockState::Used {
            self.problem(Problem::State { owner, block, state });
        }
        true
    }

    /// Records that a block is a dinode. It was found by its state, so only a second use can be wrong.
    pub(super) fn take_dinode(&mut self, block: BlockNo) {
        if self.space.mark(block) == Some(true) {
            self.problem(Problem::Shared { owner: block, block });
        }
    }

    /// Used blocks without a user.
    pub(super) fn leaks(&mut self) {
        let mut leaks: Vec<(u64, u64)> = Vec::new();
        for group in &self.space.groups {
            for index in 0..group.entry.data as usize {
                let used = get_state(&group.bitmap, index) == Some(BlockState::Used);
                if !used || group.seen[index / 8] >> (index % 8) & 1 == 1 {
                    continue;
                }
                let block = group.entry.data0.0 + index as u64;
                match leaks.last_mut() {
                    Some((first, count)) if *first + *count == block => *count += 1,
                    _ => leaks.push((block, 1)),
                }
            }
        }
        for (first, count) in leaks {
            self.problem(Problem::Leak { first: BlockNo(first), count });
        }
    }
}
