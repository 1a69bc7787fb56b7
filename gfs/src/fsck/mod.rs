//! The checker: everything that fsck.gfs2 checks and a reader can, without changing anything.
//!
//! Journals that were not closed are laid over the device, so what is checked is the filesystem as it will be after their
//! replay. Nobody may have it mounted read-write meanwhile.

mod dirs;
mod inodes;
mod problem;
mod space;
mod system;

pub use problem::Problem;

use crate::format::{BlockNo, Inum, LogHeader, StatfsChange};
use crate::reader::{ReadError, Reader};
use quorate_gnbd::BlockDevice;
use space::Space;
use std::collections::BTreeMap;

/// After so many problems no more are kept: one broken bitmap block gives thousands.
pub const PROBLEMS_MAX: usize = 10_000;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsckReport {
    /// Everything wrong, in the order it was found; at most [`PROBLEMS_MAX`].
    pub problems: Vec<Problem>,
    /// There were more.
    pub more: bool,
    /// Journals.
    pub journals: u32,
    /// Resource groups.
    pub rgrps: u64,
    /// Inodes, system files included.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// The counters as they should be.
    pub statfs: StatfsChange,
}

impl FsckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Checks the filesystem on a device.
///
/// # Errors
/// The device fails, or holds no GFS2 whose superblock can be read. Whatever else is wrong is in the report.
pub async fn fsck<D: BlockDevice>(device: D) -> Result<FsckReport, ReadError> {
    let reader = Reader::open(device).await?;
    let mut check = Check {
        reader,
        report: FsckReport::default(),
        space: Space::default(),
        inodes: BTreeMap::new(),
        dirty: Vec::new(),
    };
    check.run().await?;
    Ok(check.report)
}

/// What is remembered of an inode until the links are counted.
#[derive(Clone, Copy, Debug)]
struct Known {
    inum: Inum,
    mode: u32,
    nlink: u32,
    /// Dirents that name it.
    links: u32,
    /// The directory that names it under another name than `.` and `..`.
    parent: BlockNo,
    /// What its `..` names.
    dotdot: BlockNo,
    /// Without links and not yet reclaimed.
    unlinked: bool,
}

struct Check<D> {
    reader: Reader<D>,
    report: FsckReport,
    space: Space,
    inodes: BTreeMap<BlockNo, Known>,
    /// Journals that were not closed, with their heads: there are pending changes of statfs in these.
    dirty: Vec<(u32, LogHeader)>,
}

impl<D: BlockDevice> Check<D> {
    async fn run(&mut self) -> Result<(), ReadError> {
        self.journals().await?;
        self.rgrps().await?;
        self.all_inodes().await?;
        self.all_directories().await?;
        self.connections();
        self.leaks();
        self.system_files().await?;
        self.report.inodes = self.inodes.len() as u64;
        Ok(())
    }

    fn problem(&mut self, problem: Problem) {
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push(problem);
        } else {
            self.report.more = true;
        }
    }

    /// Takes what could be read; notes what is broken; passes on that the device fails.
    fn noted<T>(&mut self, at: BlockNo, result: Result<T, ReadError>) -> Result<Option<T>, ReadError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(ReadError::Io(error)) => Err(ReadError::Io(error)),
            Err(error) => {
                self.problem(Problem::Broken { inode: at, what: error.to_string() });
                Ok(None)
            }
        }
    }
}
