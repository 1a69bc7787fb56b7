//! Numbers of the FUSE kernel protocol 7.38 (`linux/fuse.h`, BSD licensed), native byte order throughout.
//!
//! ```text
//! request  = header 40 bytes: len u32, opcode u32, unique u64, node u64, uid u32, gid u32, pid u32, extlen u16, pad u16
//!            then the operation's structure, then names (NUL-terminated) or data
//! reply    = header 16 bytes: len u32, error i32 (0 or -errno), unique u64; then the operation's structure
//! notice   = a reply with unique 0 whose error is the notice's code
//! ```

/// The major version; another one is not spoken.
pub(crate) const MAJOR: u32 = 7;
/// The newest minor version spoken here.
pub(crate) const MINOR_MAX: u32 = 38;
/// The oldest minor version spoken here: 28 brought `max_pages` (Linux 4.20), without which writes stop at 128 KiB.
pub(crate) const MINOR_MIN: u32 = 28;
/// Bytes of a reply's header.
pub(crate) const OUT_HEADER_BYTES: usize = 16;
/// The node number of the mount's root.
pub const ROOT_NODE: u64 = 1;
/// The most bytes of file data in one request. The kernel caps a request at 256 pages.
pub const DATA_BYTES_MAX: usize = 1 << 20;
/// What a read of the device must have room for: the data and the headers before it (the kernel refuses less).
pub(crate) const READ_BUFFER_BYTES: usize = DATA_BYTES_MAX + 4096;
/// The longest name of a directory entry the kernel passes on, in bytes.
pub const NAME_BYTES_MAX: usize = 1024;

const _: () = assert!(8192 <= READ_BUFFER_BYTES, "the kernel refuses buffers below 8 KiB");

/// Flags of INIT that are asked for or looked at.
pub(crate) mod init {
    /// Several reads of a file at once.
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    /// fcntl locks come here.
    pub(crate) const POSIX_LOCKS: u32 = 1 << 1;
    /// Writes above one page.
    pub(crate) const BIG_WRITES: u32 = 1 << 5;
    /// flock locks come here.
    pub(crate) const FLOCK_LOCKS: u32 = 1 << 10;
    /// Pages are dropped when size or mtime turn out to have changed (R8).
    pub(crate) const AUTO_INVAL_DATA: u32 = 1 << 12;
    /// READDIRPLUS.
    pub(crate) const DO_READDIRPLUS: u32 = 1 << 13;
    /// READDIRPLUS only where the entries are looked at.
    pub(crate) const READDIRPLUS_AUTO: u32 = 1 << 14;
    /// Lookups and listings of one directory at once.
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    /// Reading the device after an abort says ECONNABORTED rather than ENODEV.
    pub(crate) const ABORT_ERROR: u32 = 1 << 21;
    /// `max_pages` of the answer counts.
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
    /// Set-uid and set-gid bits are cleared here, as the flags of the request say.
    pub(crate) const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Flags of single requests and replies.
pub(crate) mod flag {
    /// GETATTR: the handle is valid.
    pub(crate) const GETATTR_FH: u32 = 1 << 0;
    /// SETLK: it is a flock lock, not an fcntl one.
    pub(crate) const LK_FLOCK: u32 = 1 << 0;
    /// RELEASE: the file's flock lock goes with it.
    pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
    /// WRITE: clear set-uid and set-gid.
    pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
    /// FSYNC: data only.
    pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
    /// OPEN reply: keep the cached pages of earlier opens.
    pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
    /// OPEN reply: no page cache.
    pub(crate) const FOPEN_DIRECT_IO: u32 = 1 << 0;
}

/// Bits of SETATTR's `valid`.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Codes of notices to the kernel.
pub(crate) mod notice {
    /// Drop an inode's attributes, and pages of a range.
    pub(crate) const INVAL_INODE: i32 = 2;
    /// Drop a name of a directory.
    pub(crate) const INVAL_ENTRY: i32 = 3;
    /// Look every cached name up again before it is used (Linux 6.16). Takes no lock in the kernel.
    pub(crate) const INC_EPOCH: i32 = 8;
    /// Let go of inodes nobody uses (Linux 6.18).
    pub(crate) const PRUNE: i32 = 9;
}

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What is asked for. Numbers the kernel may send and that are not here are answered ENOSYS.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        #[expect(missing_docs, reason = "the names are the system calls'")]
        pub enum Opcode { $($(#[$doc])* $name = $number,)* }

        impl Opcode {
            /// The operation of this number.
            #[must_use]
            pub fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }

        #[cfg(test)]
        pub(crate) const ALL: &[Opcode] = &[$(Opcode::$name,)*];
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Getlk = 31,
    Setlk = 32,
    Setlkw = 33,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
}
