//! Where resource groups go: one per journal, exactly large enough, then equal ones over the rest of the device.

use super::{MkfsError, MkfsOptions};
use crate::format::{BlockNo, BlockSize, RindexEntry};

/// The places that follow from the size of the device, before anything is written.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) size: BlockSize,
    /// Blocks of a journal's ring.
    pub(super) journal_blocks: u64,
    /// Blocks of a quota_change file.
    pub(super) quota_change_blocks: u64,
    /// Ascending; the first `journals` hold one journal each.
    pub(super) rgrps: Vec<RindexEntry>,
}

/// Blocks between a dinode and `data` blocks of contents of `unit_bytes` each.
pub(super) fn indirect_blocks(size: BlockSize, data: u64) -> Option<u64> {
    let height = size.height_for(data.checked_mul(u64::from(size.bytes()))?, size.usize())?;
    let mut total = 0;
    let mut level = data;
    for _ in 1..height {
        level = level.div_ceil(size.indirect_pointers() as u64);
        total += level;
    }
    Some(total)
}

impl Layout {
    pub(super) fn plan(options: &MkfsOptions, device_bytes: u64) -> Result<Self, MkfsError> {
        let size = options.block_size;
        let journals = u64::from(options.journals);
        let journal_blocks = options.journal_bytes / u64::from(size.bytes());
        let quota_change_blocks = options.quota_change_bytes / u64::from(size.bytes());
        let file = |blocks| indirect_blocks(size, blocks).map(|indirect| 1 + indirect + blocks);
        let (Some(journal), Some(quota_change)) = (file(journal_blocks), file(quota_change_blocks)) else {
            return Err(MkfsError::Option { what: "size of a journal", value: options.journal_bytes });
        };
        let journal_data = u32::try_from(journal.next_multiple_of(4))
            .map_err(|_| MkfsError::Option { what: "size of a journal", value: options.journal_bytes })?;

        let blocks = device_bytes >> size.shift();
        let mut rgrps = Vec::new();
        let mut next = size.superblock().0 + 1;
        for _ in 0..journals {
            let entry = RindexEntry::new(size, BlockNo(next), journal_data);
            next = entry.end().0;
            rgrps.push(entry);
        }

        // What does not fit into the rounding of the journals' groups. The last block of a device stays unused, and
        // something must be left to store: one more quartet of blocks.
        let spare = journals * (u64::from(journal_data) - journal);
        let small = (journals * (2 + quota_change) + 8).saturating_sub(spare).next_multiple_of(4) + 4;
        let smallest = RindexEntry::new(size, BlockNo(next), u32::try_from(small).unwrap_or(u32::MAX - 3));
        let needed_blocks = smallest.end().0 + 1;
        if blocks < needed_blocks {
            return Err(MkfsError::TooSmall { device_bytes, needed_bytes: needed_blocks << size.shift() });
        }

        let space = blocks - next;
        let target = (options.rgrp_bytes >> size.shift()).min(space);
        let (count, used) = match space.is_multiple_of(target) {
            true => (space / target, space),
            false => (space / target + 1, space - 1),
        };
        for index in 0..count {
            let length = used / count + u64::from(index < used % count);
            let data = largest_data(size, length);
            rgrps.push(RindexEntry::new(size, BlockNo(next), data));
            next += length;
        }
        Ok(Self { size, journal_blocks, quota_change_blocks, rgrps })
    }

    /// Blocks from this group's header to the next one's; 0 in the last.
    pub(super) fn skip(&self, index: usize) -> u32 {
        self.rgrps.get(index + 1).map_or(0, |next| (next.addr.0 - self.rgrps[index].addr.0) as u32)
    }
}

/// The most data blocks, a multiple of 4, that fit with their bitmap into `length` blocks.
fn largest_data(size: BlockSize, length: u64) -> u32 {
    // Each bitmap block more costs one data block; groups are at most 2 GiB, so this takes few steps.
    let mut bitmaps = 1;
    loop {
        let data = length.saturating_sub(bitmaps) & !3;
        let entry = RindexEntry::new(size, BlockNo(0), u32::try_from(data).unwrap_or(u32::MAX - 3));
        if u64::from(entry.length) <= bitmaps {
            return entry.data;
        }
        bitmaps += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(mebibytes: u64, journals: u32, journal_mebibytes: u64) -> Vec<(u64, u32, u32)> {
        let mut options = MkfsOptions::new(journals);
        options.journal_bytes = journal_mebibytes << 20;
        let layout = Layout::plan(&options, mebibytes << 20).unwrap();
        layout.rgrps.iter().map(|entry| (entry.addr.0, entry.length, entry.data)).collect()
    }

    #[test]
    fn the_geometry_of_real_filesystems() {
        assert_eq!(groups(256, 2, 8), [(17, 1, 2056), (2074, 1, 2056), (4131, 4, 61400)]);
        assert_eq!(
            groups(1024, 1, 16),
            [(17, 1, 4108), (4126, 4, 64500), (68631, 4, 64500), (133_135, 4, 64500), (197_639, 4, 64500)]
        );
        assert_eq!(
            groups(1024, 3, 8),
            [
                (17, 1, 2056),
                (2074, 1, 2056),
                (4131, 1, 2056),
                (6188, 4, 63984),
                (70177, 4, 63984),
                (134_166, 4, 63984),
                (198_155, 4, 63984)
            ]
        );
    }

    #[test]
    fn every_group_is_valid_and_they_do_not_overlap() {
        for bytes in [1024, 2048, 4096, 65536] {
            let size = BlockSize::new(bytes).unwrap();
            for mebibytes in (40..2000).step_by(37) {
                let mut options = MkfsOptions::new(3);
                options.block_size = size;
                let layout = Layout::plan(&options, mebibytes << 20).unwrap();
                for (i, entry) in layout.rgrps.iter().enumerate() {
                    entry.check(size).unwrap();
                    let end =
                        layout.rgrps.get(i + 1).map_or((mebibytes << 20) >> size.shift(), |next| next.addr.0);
                    assert!(entry.end().0 <= end && end - entry.end().0 < 8);
                }
            }
        }
    }

    #[test]
    fn a_device_that_is_too_small_says_how_large_it_has_to_be() {
        let options = MkfsOptions::new(2);
        let Err(MkfsError::TooSmall { needed_bytes, .. }) = Layout::plan(&options, 10 << 20) else {
            panic!()
        };
        assert!(Layout::plan(&options, needed_bytes).is_ok());
        assert!(Layout::plan(&options, needed_bytes - 4096).is_err());
    }
}
