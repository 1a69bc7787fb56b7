//! Two bits per block: its state; four blocks per byte, the least significant pair first.

/// The state of a block in the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum BlockState {
    /// Nobody's.
    Free = 0,
    /// Any block of an inode but the dinode.
    Used = 1,
    /// A dinode without links that is not yet reclaimed.
    Unlinked = 2,
    /// A dinode.
    Dinode = 3,
}

impl BlockState {
    /// All four, by number.
    pub const ALL: [Self; 4] = [Self::Free, Self::Used, Self::Unlinked, Self::Dinode];

    fn from_bits(bits: u8) -> Self {
        Self::ALL[usize::from(bits & 3)]
    }
}

/// The state of block `index` of a bitmap, or `None` outside it.
#[must_use]
pub fn get_state(bitmap: &[u8], index: usize) -> Option<BlockState> {
    bitmap.get(index / 4).map(|byte| BlockState::from_bits(byte >> (index % 4 * 2)))
}

/// Sets the state of block `index`.
///
/// # Panics
/// If the bitmap does not reach so far.
pub fn set_state(bitmap: &mut [u8], index: usize, state: BlockState) {
    let shift = index % 4 * 2;
    let byte = &mut bitmap[index / 4];
    *byte = *byte & !(3 << shift) | (state as u8) << shift;
}

/// The first block from `from` on, and before `end`, that has this state.
#[must_use]
pub fn find_state(bitmap: &[u8], from: usize, end: usize, state: BlockState) -> Option<usize> {
    let end = end.min(bitmap.len() * 4);
    // A byte of which no pair can have the state is skipped whole; states free and used are the common runs.
    let whole = [0x00, 0x55, 0xaa, 0xff];
    let mut index = from;
    while index < end {
        let byte = bitmap[index / 4];
        if index.is_multiple_of(4) && byte != whole[state as usize] && whole.contains(&byte) {
            index += 4;
            continue;
        }
        if BlockState::from_bits(byte >> (index % 4 * 2)) == state {
            return Some(index);
        }
        index += 1;
    }
    None
}

/// How many of the first `blocks` blocks have each state.
#[must_use]
pub fn count_states(bitmap: &[u8], blocks: usize) -> [u64; 4] {
    let mut counts = [0; 4];
    for index in 0..blocks.min(bitmap.len() * 4) {
        counts[usize::from(bitmap[index / 4] >> (index % 4 * 2) & 3)] += 1;
    }
    counts
}

/// One block's part of the bitmap of a resource group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Which block of the resource group holds it; 0 is the header.
    pub block: u32,
    /// Where in that block it starts.
    pub start: usize,
    /// How many bytes it has.
    pub bytes: usize,
    /// The data block (counted from the group's first) of its first pair.
    pub first: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_found_set_and_counted() {
        // Block 18 of a fresh filesystem is a dinode, the following are used.
        let mut bitmap = vec![0x57, 0x55, 0x55, 0xf5];
        assert_eq!(get_state(&bitmap, 0), Some(BlockState::Dinode));
        assert_eq!(get_state(&bitmap, 1), Some(BlockState::Used));
        assert_eq!(get_state(&bitmap, 14), Some(BlockState::Dinode));
        assert_eq!(get_state(&bitmap, 16), None);
        assert_eq!(find_state(&bitmap, 1, 16, BlockState::Dinode), Some(14));
        assert_eq!(find_state(&bitmap, 1, 14, BlockState::Dinode), None);
        assert_eq!(find_state(&bitmap, 0, 99, BlockState::Free), None);
        set_state(&mut bitmap, 6, BlockState::Free);
        assert_eq!(find_state(&bitmap, 0, 16, BlockState::Free), Some(6));
        set_state(&mut bitmap, 7, BlockState::Unlinked);
        assert_eq!(count_states(&bitmap, 16), [1, 11, 1, 3]);
        assert_eq!(count_states(&bitmap, 2), [0, 1, 0, 1]);
    }
}
