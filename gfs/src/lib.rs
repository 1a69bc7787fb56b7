//! GFS2 in user space: the on-disk format, journals, glocks and the filesystem over a block device and a lock manager.

pub mod claim;
mod error;
pub mod face;
pub mod format;
pub mod fs;
pub mod fsck;
#[cfg(feature = "fuse")]
pub mod fuse;
#[cfg(feature = "fuse")]
pub mod host;
pub mod mkfs;
pub mod reader;
pub mod replay;
pub mod rescue;

pub use error::FsError;
