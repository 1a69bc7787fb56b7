//! What can be wrong with a filesystem.

use crate::format::{BlockNo, BlockState, StatfsChange};

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A checker was interrupted; the filesystem cannot be mounted.
    #[error("a check is not finished: lock protocol {proto:?}")]
    Unfinished {
        /// What stands in the superblock.
        proto: String,
    },
    /// A journal was not closed. What follows is as if it were replayed.
    #[error("journal {jid} is not closed: {blocks} blocks to be replayed")]
    DirtyJournal {
        /// Which.
        jid: u32,
        /// How many blocks.
        blocks: usize,
    },
    /// A journal cannot be used, or the directory of journals not.
    #[error("journals: {what}")]
    Journal {
        /// What is wrong.
        what: String,
    },
    /// An entry of the index of resource groups is impossible.
    #[error("rindex entry {index}: {what}")]
    Rindex {
        /// Which.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// A resource group's header or bitmap block is broken, or differs from the index.
    #[error("resource group {addr}: {what}")]
    Rgrp {
        /// Its header.
        addr: BlockNo,
        /// What is wrong.
        what: String,
    },
    /// A resource group's count differs from its bitmap.
    #[error("resource group {addr}: {what} are {stored}, the bitmap says {counted}")]
    RgrpCount {
        /// Its header.
        addr: BlockNo,
        /// Of what.
        what: &'static str,
        /// In the header.
        stored: u64,
        /// In the bitmap.
        counted: u64,
    },
    /// An inode was unlinked and never reclaimed.
    #[error("inode {inode} has no links and was not reclaimed")]
    Orphan {
        /// Which.
        inode: BlockNo,
    },
    /// An inode is broken.
    #[error("inode {inode}: {what}")]
    Broken {
        /// Which.
        inode: BlockNo,
        /// What is wrong.
        what: String,
    },
    /// A pointer leads to no data block of any resource group.
    #[error("inode {owner}: block {block} is in no resource group")]
    Pointer {
        /// Who points.
        owner: BlockNo,
        /// Where to.
        block: BlockNo,
    },
    /// A block's state is not what its use needs.
    #[error("inode {owner}: block {block} is in use, but its state is {state:?}")]
    State {
        /// Who uses it.
        owner: BlockNo,
        /// Which.
        block: BlockNo,
        /// As the bitmap says.
        state: BlockState,
    },
    /// Two pointers lead to one block.
    #[error("inode {owner}: block {block} is used twice")]
    Shared {
        /// The second user.
        owner: BlockNo,
        /// Which.
        block: BlockNo,
    },
    /// Blocks are marked as used that nobody uses.
    #[error("{count} blocks from {first} on are marked as used, but nobody uses them")]
    Leak {
        /// The first.
        first: BlockNo,
        /// How many.
        count: u64,
    },
    /// An inode's number of blocks is wrong.
    #[error("inode {inode} says it has {stored} blocks, it has {counted}")]
    Blocks {
        /// Which.
        inode: BlockNo,
        /// What it says.
        stored: u64,
        /// What it has.
        counted: u64,
    },
    /// A directory's structure is wrong.
    #[error("directory {dir}: {what}")]
    Directory {
        /// Which.
        dir: BlockNo,
        /// What is wrong.
        what: String,
    },
    /// An entry of a directory is wrong.
    #[error("directory {dir}, entry {name:?}: {what}")]
    Entry {
        /// Of which directory.
        dir: BlockNo,
        /// Its name, unprintable bytes replaced.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// An inode's number of links is wrong.
    #[error("inode {inode} says it has {stored} links, it has {counted}")]
    Nlink {
        /// Which.
        inode: BlockNo,
        /// What it says.
        stored: u32,
        /// Entries that name it.
        counted: u32,
    },
    /// No path leads to an inode.
    #[error("inode {inode} is in no directory")]
    Unconnected {
        /// Which.
        inode: BlockNo,
    },
    /// The filesystem's counters are wrong.
    #[error("statfs says {stored:?}, the resource groups {counted:?}")]
    Statfs {
        /// What stands there, with pending changes.
        stored: StatfsChange,
        /// What is right.
        counted: StatfsChange,
    },
    /// A system file is missing or not as it should be.
    #[error("system file {name}: {what}")]
    System {
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
    },
}
