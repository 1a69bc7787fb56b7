//! What can go wrong in an operation of the filesystem, and the errno a caller sees.

use quorate_gnbd::IoError;

/// Why an operation failed. Unless a variant says otherwise nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// No such name or inode.
    #[error("no such file or directory")]
    NotFound,
    /// The name is taken.
    #[error("file exists")]
    Exists,
    /// Not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// A directory, where none may be.
    #[error("is a directory")]
    IsDirectory,
    /// A directory with entries.
    #[error("directory not empty")]
    NotEmpty,
    /// The filesystem is full. A write may have happened in part; the size says how far.
    #[error("no space left on device")]
    NoSpace,
    /// A name above 255 bytes, or a link target that does not fit into a block.
    #[error("file name too long")]
    NameTooLong,
    /// Arguments that make no sense.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// Not allowed for anybody (an immutable file, a link to a directory).
    #[error("operation not permitted")]
    NotPermitted,
    /// Not allowed for this caller.
    #[error("permission denied")]
    AccessDenied,
    /// Mounted read-only.
    #[error("read-only file system")]
    ReadOnly,
    /// Too many links to one inode.
    #[error("too many links")]
    TooManyLinks,
    /// The inode was deleted, by this or another node.
    #[error("stale file handle")]
    Stale,
    /// It would have to wait, and was asked not to.
    #[error("resource temporarily unavailable")]
    WouldBlock,
    /// A signal ended the wait.
    #[error("interrupted")]
    Interrupted,
    /// Waiting would never end.
    #[error("resource deadlock avoided")]
    Deadlock,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// A file, or an attribute's value, above the limit of the format.
    #[error("file too large")]
    TooLarge,
    /// An attribute's value above 65536 bytes.
    #[error("argument list too long")]
    ValueTooLarge,
    /// No such position (seek beyond the end).
    #[error("no such device or address")]
    NoDevice,
    /// Not implemented.
    #[error("operation not supported")]
    Unsupported,
    /// In use.
    #[error("device or resource busy")]
    Busy,
    /// The node has no valid lease: it may not answer (R8). May have been changed.
    #[error("this node has lost its lease")]
    NoLease,
    /// This node withdrew from the filesystem. May have been changed in memory, but not on disk.
    #[error("withdrawn from the filesystem: {0}")]
    Withdrawn(String),
    /// The structure on disk contradicts itself.
    #[error("corrupt filesystem: {0}")]
    Corrupt(String),
    /// The device failed. May have been changed in part.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl FsError {
    /// The Linux error number (`errno(3)`, values of all architectures but alpha, mips, parisc and sparc).
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound => 2,
            Self::Exists => 17,
            Self::NotDirectory => 20,
            Self::IsDirectory => 21,
            Self::NotEmpty => 39,
            Self::NoSpace | Self::Io(IoError::NoSpace) => 28,
            Self::NameTooLong => 36,
            Self::Invalid(_) => 22,
            Self::NotPermitted => 1,
            Self::AccessDenied => 13,
            Self::ReadOnly | Self::Io(IoError::ReadOnly) => 30,
            Self::TooManyLinks => 31,
            Self::Stale => 116,
            Self::WouldBlock => 11,
            Self::Interrupted => 4,
            Self::Deadlock => 35,
            Self::NoAttribute => 61,
            Self::TooLarge => 27,
            Self::ValueTooLarge => 7,
            Self::NoDevice => 6,
            Self::Unsupported => 95,
            Self::Busy => 16,
            Self::NoLease | Self::Withdrawn(_) | Self::Corrupt(_) | Self::Io(_) => 5,
        }
    }
}
