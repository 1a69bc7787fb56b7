//! The face of a filesystem to whoever mounts it: operations by inode number, asynchronous, with owned arguments.

use crate::FsError;
pub use crate::format::Timestamp;
use core::time::Duration;
use quorate_membership::BoxFuture;
use std::sync::Arc;

/// The number of an inode: the block of its dinode (gfs2 `no_addr`, `st_ino`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl core::fmt::Display for Ino {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An open file or directory. Belongs to the mount that opened it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

/// On whose behalf an operation is done. Permissions are checked by the mount (the kernel, with `default_permissions`);
/// the filesystem uses these for the ownership of what it makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// Supplementary groups, where the mount knows them.
    pub groups: Vec<u32>,
    /// Process id, for locks and displays; 0 if unknown.
    pub pid: u32,
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Tells this inode from earlier ones of the same number (gfs2 `no_formal_ino`).
    pub generation: u64,
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes in use.
    pub blocks: u64,
    /// The block size, bytes.
    pub block_size: u32,
    /// Device nodes: major number.
    pub major: u32,
    /// Device nodes: minor number.
    pub minor: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the contents.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
}

/// Type bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
/// A directory.
pub const S_IFDIR: u32 = 0o040_000;
/// A regular file.
pub const S_IFREG: u32 = 0o100_000;
/// A symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// A block device.
pub const S_IFBLK: u32 = 0o060_000;
/// A character device.
pub const S_IFCHR: u32 = 0o020_000;
/// A named pipe.
pub const S_IFIFO: u32 = 0o010_000;
/// A socket.
pub const S_IFSOCK: u32 = 0o140_000;

/// Attributes, and how long the mount may use them without asking again.
///
/// Within that time the filesystem tells the [`Invalidation`] sink before anything changes. It never exceeds what is left
/// of the node's lease (R8), so a node that was removed stops trusting its kernel's cache in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub attr: Attr,
    /// For how long; zero if it must not be cached.
    pub valid: Duration,
}

/// A new value of a time stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The time now.
    Now,
    /// This.
    At(Timestamp),
}

/// What `setattr` changes; `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits (type bits are ignored).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the contents.
    pub mtime: Option<SetTime>,
    /// Last change of the inode; now if something else is set.
    pub ctime: Option<Timestamp>,
}

/// What kind of node to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device with these numbers.
    CharDevice(u32, u32),
    /// A block device with these numbers.
    BlockDevice(u32, u32),
}

/// How `rename` treats the target. At most one may be set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// Fail with `Exists` if the target is there.
    pub no_replace: bool,
    /// Swap the two.
    pub exchange: bool,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number.
    pub ino: Ino,
    /// Type bits of the mode (`S_IF...`).
    pub kind: u32,
    /// Where to go on after this entry.
    pub cookie: u64,
    /// Its name; `.` and `..` are listed like the others.
    pub name: Vec<u8>,
}

/// What `statfs` tells, in blocks of `block_size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsStat {
    /// The block size, bytes.
    pub block_size: u32,
    /// Blocks.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Inodes in use and possible.
    pub files: u64,
    /// Possible ones.
    pub files_free: u64,
    /// The longest name, bytes.
    pub name_bytes_max: u32,
}

/// How `setxattr` treats an attribute that is there, or is not. At most one may be set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XattrFlags {
    /// Fail with `Exists` if it is there.
    pub create: bool,
    /// Fail with `NoAttribute` if it is not.
    pub replace: bool,
}

/// What `fallocate` does to a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FallocateMode {
    /// Leave the size as it is.
    pub keep_size: bool,
    /// Make a hole (needs `keep_size`).
    pub punch_hole: bool,
    /// Make the range read as zeros.
    pub zero_range: bool,
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next data.
    Data,
    /// The next hole; the end of the file counts as one.
    Hole,
}

/// Who holds a lock on a file: for fcntl locks the kernel's lock owner (one per process), for flock the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockOwner(pub u64);

/// Kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None.
    Unlock,
}

/// How long to wait for an fcntl lock.
pub use quorate_dlm::posix::{Wait, Withdraw};

/// The fcntl lock that bars another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixHolder {
    /// What it covers, how, and the process that has it.
    pub lock: PosixLock,
    /// The node of that process; `None`: this one.
    pub node: Option<quorate_membership::NodeId>,
}

/// An fcntl lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixLock {
    /// Shared, exclusive or none.
    pub kind: LockKind,
    /// First byte.
    pub start: u64,
    /// Last byte; `u64::MAX` for "to the end".
    pub end: u64,
    /// The process.
    pub pid: u32,
}

/// A filesystem, as the mount and the file API see it.
///
/// Every operation checks the node's lease after reading and before answering (R8). Dropping a future gives up the
/// answer: a wait for a lock is withdrawn, a change may be made in whole or not at all. What changes something has a
/// default that answers `ReadOnly`.
///
/// References: an inode that `lookup`, `create`, `mknod`, `mkdir`, `symlink` or `link` returned counts as looked up once
/// more and stays usable until `forget` gave back as many; open handles keep it too.
pub trait Filesystem: Send + Sync {
    /// The root directory; needs no lookup.
    fn root(&self) -> Ino;
    /// Sets who is told to drop cached data. Before the first operation; none by default.
    fn set_invalidation(&self, sink: Arc<dyn Invalidation>) {
        let _ = sink;
    }

    /// Finds a name in a directory. `NotFound` may be cached as long as the directory's attributes are valid.
    fn lookup(&self, cred: Credentials, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>>;
    /// Gives back `count` lookups. An inode without links, lookups and handles is deleted.
    fn forget(&self, ino: Ino, count: u64);
    /// The attributes of an inode.
    fn getattr(&self, ino: Ino) -> BoxFuture<'_, Result<Entry, FsError>>;
    /// Changes attributes.
    fn setattr(&self, cred: Credentials, ino: Ino, set: SetAttr) -> BoxFuture<'_, Result<Entry, FsError>> {
        let _ = (cred, ino, set);
        read_only()
    }
    /// The target of a symbolic link.
    fn readlink(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>>;
    /// Makes a node. `mode`: permission bits, the umask applied.
    fn mknod(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        kind: NodeKind,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let _ = (cred, parent, name, mode, kind);
        read_only()
    }
    /// Makes a regular file and opens it, or opens the one that is there; with `exclusive` that is an error (`Exists`).
    fn create(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        exclusive: bool,
    ) -> BoxFuture<'_, Result<(Entry, Handle), FsError>> {
        let _ = (cred, parent, name, mode, exclusive);
        read_only()
    }
    /// Makes a directory.
    fn mkdir(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let _ = (cred, parent, name, mode);
        read_only()
    }
    /// Makes a symbolic link.
    fn symlink(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        target: Vec<u8>,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let _ = (cred, parent, name, target);
        read_only()
    }
    /// Gives an inode another name.
    fn link(&self, ino: Ino, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>> {
        let _ = (ino, parent, name);
        read_only()
    }
    /// Removes a name of something that is not a directory.
    fn unlink(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (parent, name);
        read_only()
    }
    /// Removes an empty directory.
    fn rmdir(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (parent, name);
        read_only()
    }
    /// Renames, replacing what has the new name unless the flags say otherwise.
    fn rename(
        &self,
        parent: Ino,
        name: Vec<u8>,
        new_parent: Ino,
        new_name: Vec<u8>,
        flags: RenameFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (parent, name, new_parent, new_name, flags);
        read_only()
    }

    /// Opens a file. `write`: whether for writing.
    fn open(&self, ino: Ino, write: bool) -> BoxFuture<'_, Result<Handle, FsError>>;
    /// Reads up to `len` bytes; fewer only at the end of the file.
    fn read(&self, ino: Ino, offset: u64, len: u32) -> BoxFuture<'_, Result<Vec<u8>, FsError>>;
    /// Writes all of `data`; says how much it wrote. `append`: at the end of the file as it is then on any node, whatever
    /// `offset` says. `kill_priv`: clear the set-uid and set-gid bits.
    fn write(
        &self,
        ino: Ino,
        offset: u64,
        data: Vec<u8>,
        append: bool,
        kill_priv: bool,
    ) -> BoxFuture<'_, Result<u32, FsError>> {
        let _ = (ino, offset, data, append, kill_priv);
        read_only()
    }
    /// A descriptor of the file was closed: the owner's fcntl locks on it end.
    fn flush(&self, ino: Ino, owner: LockOwner) -> BoxFuture<'_, Result<(), FsError>>;
    /// Makes a file's contents and attributes durable; with `data_only` only what is needed to read them back.
    fn fsync(&self, ino: Ino, data_only: bool) -> BoxFuture<'_, Result<(), FsError>>;
    /// Closes a handle; the flock of `owner`, if any, ends, and so do fcntl locks of an open file description (OFD).
    fn release(
        &self,
        ino: Ino,
        handle: Handle,
        owner: Option<LockOwner>,
    ) -> BoxFuture<'_, Result<(), FsError>>;
    /// Reserves, punches or zeroes a range.
    fn fallocate(
        &self,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (ino, offset, len, mode);
        read_only()
    }
    /// Finds data or a hole from `offset` on; `NoDevice` (ENXIO) beyond the end.
    fn lseek(&self, ino: Ino, offset: u64, what: Seek) -> BoxFuture<'_, Result<u64, FsError>> {
        let _ = (ino, offset, what);
        Box::pin(async { Err(FsError::Unsupported) })
    }

    /// Opens a directory.
    fn opendir(&self, ino: Ino) -> BoxFuture<'_, Result<Handle, FsError>>;
    /// Entries from `cookie` on (0: the first), at most `max`; none at the end.
    fn readdir(&self, ino: Ino, cookie: u64, max: usize) -> BoxFuture<'_, Result<Vec<DirEntry>, FsError>>;
    /// Makes a directory durable.
    fn fsyncdir(&self, ino: Ino) -> BoxFuture<'_, Result<(), FsError>>;
    /// Closes a directory.
    fn releasedir(&self, ino: Ino, handle: Handle) -> BoxFuture<'_, Result<(), FsError>>;

    /// Sizes of the filesystem.
    fn statfs(&self) -> BoxFuture<'_, Result<FsStat, FsError>>;
    /// Makes everything durable.
    fn sync(&self) -> BoxFuture<'_, Result<(), FsError>>;

    /// The value of an extended attribute; the name has its prefix (`user.`).
    fn getxattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, FsError>>;
    /// The names of all extended attributes, with prefix, each ended by a zero byte.
    fn listxattr(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>>;
    /// Sets an extended attribute.
    fn setxattr(
        &self,
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        flags: XattrFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (ino, name, value, flags);
        read_only()
    }
    /// Removes an extended attribute.
    fn removexattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (ino, name);
        read_only()
    }

    /// The first fcntl lock that bars `lock`, or `None`.
    fn getlk(
        &self,
        ino: Ino,
        owner: LockOwner,
        lock: PosixLock,
    ) -> BoxFuture<'_, Result<Option<PosixHolder>, FsError>> {
        let _ = (ino, owner, lock);
        Box::pin(async { Err(FsError::Unsupported) })
    }
    /// Sets or ends an fcntl lock through an open handle; waits for it as `wait` says, else `WouldBlock`. A wait that is
    /// withdrawn ends with `Interrupted`, or with the lock if that came first; dropping the future withdraws too, and
    /// then the owner may have the lock until it closes the file.
    fn setlk(
        &self,
        ino: Ino,
        handle: Handle,
        owner: LockOwner,
        lock: PosixLock,
        wait: Wait,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (ino, handle, owner, lock, wait);
        Box::pin(async { Err(FsError::Unsupported) })
    }
    /// Takes or ends the flock of an open file; with `wait` waits for it (dropping the future withdraws), else
    /// `WouldBlock`. A change of kind is an unlock and a lock.
    fn flock(
        &self,
        ino: Ino,
        owner: LockOwner,
        kind: LockKind,
        wait: bool,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let _ = (ino, owner, kind, wait);
        Box::pin(async { Err(FsError::Unsupported) })
    }
}

fn read_only<T: Send + 'static>() -> BoxFuture<'static, Result<T, FsError>> {
    Box::pin(async { Err(FsError::ReadOnly) })
}

/// Drops what the kernel (or any user above the filesystem) has cached, because another node is about to change it.
///
/// The futures resolve when the cache is dropped; the lock is given up only then. They must not wait for an operation of
/// the filesystem that is under way, because that may wait for the same lock.
pub trait Invalidation: Send + Sync {
    /// Attributes of an inode, and with `data` its pages too.
    fn inode(&self, ino: Ino, data: bool) -> BoxFuture<'_, ()>;
    /// Every name of a directory, also those known not to exist.
    fn entries(&self, parent: Ino) -> BoxFuture<'_, ()>;
    /// Another node unlinks this inode: let go of it if nobody has it open, by `forget`. A hint.
    fn prune(&self, ino: Ino) {
        let _ = ino;
    }
}
