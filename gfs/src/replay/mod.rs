//! Journals: finding the head, collecting what is to be replayed, and replaying it in place or over a reader.
//!
//! ```text
//! Journal::all ─▶ find_head ─▶ plan ─┬▶ Reader::lay_over      (nothing is written: rescue)
//!                                    └▶ apply, add_statfs, write_clean_header   (recover does all three)
//! ```
//! Whoever replays in place holds the journal's lock and has cached nothing that it covers (facts: GFS2 9.6, 9.7, 10.7).

mod head;
mod journal;
mod plan;
mod recover;

pub use head::find_head;
pub use journal::Journal;
pub use plan::{ReplayPlan, plan};
pub use recover::{Recovered, add_statfs, apply, recover, write_clean_header};
pub(crate) use recover::{pending_statfs, statfs_of};

use crate::FsError;
use crate::format::BlockNo;
use crate::reader::ReadError;
use quorate_gnbd::IoError;

/// Why a journal could not be replayed. Unless it is `Read` while applying, nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The device failed, or a system file is broken.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The journal's inode is no journal: its size is out of range, or blocks are missing.
    #[error("journal {jid} at block {inode}: {what}")]
    Inode {
        /// Which.
        jid: u32,
        /// Its inode.
        inode: BlockNo,
        /// What is wrong.
        what: &'static str,
    },
    /// There is not one valid header in the ring.
    #[error("journal {jid} has no valid log header")]
    NoHeader {
        /// Which.
        jid: u32,
    },
    /// Between tail and head stands something that no flush has written.
    #[error("journal {jid}, ring block {index}: {what}")]
    Ring {
        /// Which.
        jid: u32,
        /// Where.
        index: u32,
        /// What is wrong.
        what: &'static str,
    },
}

impl From<IoError> for ReplayError {
    fn from(error: IoError) -> Self {
        Self::Read(error.into())
    }
}

impl From<ReplayError> for FsError {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Read(error) => error.into(),
            other => Self::Corrupt(other.to_string()),
        }
    }
}
