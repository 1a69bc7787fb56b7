//! What really happened, as nobody in the simulation can know it.

use quorate_dlm::FencingToken;
use quorate_membership::Identity;
use std::collections::{BTreeMap, BTreeSet};

/// Data blocks of the device; one cell each, and one cell for each in every journal.
pub(crate) const BLOCKS: usize = 6;
/// Journals of the filesystem.
pub(crate) const JOURNALS: u32 = 16;
/// Cells of the device.
pub(crate) const CELLS: usize = BLOCKS * (1 + JOURNALS as usize);
/// Bytes of a cell: the number of the write that it has.
pub(crate) const CELL: u64 = 8;

/// The cell of a block's entry in a journal.
pub(crate) fn journal_cell(journal: u32, block: usize) -> usize {
    BLOCKS * (1 + journal as usize) + block
}

/// A write of one cell. Every one has a number of its own, which is what the cell holds afterwards.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    /// The block itself, or the block that the journal entry is of.
    pub(crate) block: usize,
    /// The version of the block that is written; zero clears a journal entry.
    pub(crate) version: u64,
    pub(crate) by: Identity,
    /// The grant under which it is written.
    pub(crate) token: FencingToken,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    writes: Vec<Write>,
    versions: u64,
    /// The newest version of each block that was acknowledged and flushed.
    pub(crate) committed: [u64; BLOCKS],
    /// The newest grant of each block that its holder was told of.
    pub(crate) granted: BTreeMap<usize, (FencingToken, Identity)>,
    /// Lives for which the server confirmed an epoch without them.
    pub(crate) fenced: BTreeSet<Identity>,
}

impl Oracle {
    /// A new version of some block.
    pub(crate) fn version(&mut self) -> u64 {
        self.versions += 1;
        self.versions
    }

    /// The number of a new write.
    pub(crate) fn write(&mut self, write: Write) -> u64 {
        self.writes.push(write);
        self.writes.len() as u64
    }

    /// A write by its number; nothing for an empty cell.
    pub(crate) fn get(&self, number: u64) -> Option<&Write> {
        self.writes.get(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    /// The version in a cell.
    pub(crate) fn version_of(&self, number: u64) -> u64 {
        self.get(number).map_or(0, |w| w.version)
    }

    /// A holder was told of its grant.
    pub(crate) fn granted(&mut self, block: usize, token: FencingToken, who: Identity) {
        let newest = self.granted.entry(block).or_insert((token, who));
        *newest = (*newest).max((token, who));
    }
}
