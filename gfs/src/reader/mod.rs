//! Reading a filesystem's blocks, inodes and directories straight from its device, without locks.
//!
//! For whoever may be sure that nobody changes it meanwhile: replay, the rescue of an image, the checker. Journals that
//! were not replayed can be laid over the device: a block that one holds a newer copy of is read from the journal.

mod blocks;
mod directory;
mod inode;
mod xattrs;

pub use blocks::{JournalCopy, Reader};
pub use directory::{DirEntryRef, DirPosition};
pub use inode::{Extent, Inode};
pub use xattrs::Xattr;

use crate::FsError;
use crate::format::{BlockNo, FormatError};
use quorate_gnbd::IoError;

/// Why something could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The device failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A pointer leads outside the device, or to its first bytes.
    #[error("block {block} is not one of the filesystem's: the device has {device_blocks}")]
    Block {
        /// Where it leads.
        block: BlockNo,
        /// How many blocks the device has.
        device_blocks: u64,
    },
    /// A block is not what its referrer says.
    #[error("block {block}: {source}")]
    Format {
        /// Which.
        block: BlockNo,
        /// What is wrong.
        source: FormatError,
    },
    /// An inode contradicts itself.
    #[error("inode {inode}: {what}")]
    Structure {
        /// Which.
        inode: BlockNo,
        /// What is wrong.
        what: &'static str,
    },
    /// A system file is missing.
    #[error("there is no {name} in the system directory {dir}")]
    Missing {
        /// Where it should be.
        dir: BlockNo,
        /// Its name.
        name: String,
    },
}

impl From<ReadError> for FsError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => Self::Io(error),
            other => Self::Corrupt(other.to_string()),
        }
    }
}
