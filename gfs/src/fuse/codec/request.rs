//! Requests of the kernel, parsed in place: borrowed names and data, every length checked.

use super::abi::{self, Opcode, fattr, flag};
use std::time::Duration;

/// The number of a request, chosen by the kernel; its reply carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unique(pub u64);

/// What an OPEN, CREATE or OPENDIR was answered with, as the kernel hands it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// The owner of a lock: for fcntl the process's file table, for flock the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LockOwner(pub u64);

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which operation, by number.
    pub opcode: u32,
    /// The request's number.
    pub unique: Unique,
    /// The inode it is about; what an ENTRY reply named it.
    pub node: u64,
    /// The file system user id of the caller.
    pub uid: u32,
    /// The file system group id of the caller.
    pub gid: u32,
    /// The calling thread; zero if it is in another process namespace, or if the kernel asks on its own.
    pub pid: u32,
}

/// A message that is no request: shorter than its own lengths say. The kernel does not send such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request is malformed")]
pub struct Malformed;

/// Why an operation could not be parsed. The header was; answer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// An operation this program does not know. Answered ENOSYS, which the kernel remembers.
    #[error("operation {0} is not known")]
    Unknown(u32),
    /// The body does not have the operation's shape. Answered EIO.
    #[error("the body of operation {0:?} is malformed")]
    Malformed(Opcode),
}

/// A time that SETATTR sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The present time.
    Now,
    /// Since 1970; seconds may be negative.
    At {
        /// Whole seconds.
        seconds: i64,
        /// Nanoseconds above them, below 10^9.
        nanos: u32,
    },
}

/// What SETATTR changes: each field that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// The handle it was called through.
    pub handle: Option<Handle>,
    /// Permission bits (and type bits, unchanged).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New size in bytes.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last change of the data.
    pub mtime: Option<SetTime>,
    /// Set-uid and set-gid must go.
    pub kill_suidgid: bool,
}

/// What a lock is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockType {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None.
    Unlock,
}

/// A request for a lock, or for what stands against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockOp {
    /// The open file.
    pub handle: Handle,
    /// Whose lock.
    pub owner: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte; `i64::MAX` for "to the end".
    pub end: u64,
    /// What it is to become.
    pub kind: LockType,
    /// The process.
    pub pid: u32,
    /// A flock lock, apart from every fcntl lock.
    pub flock: bool,
}

/// The body of INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitOp {
    /// The kernel's major version.
    pub major: u32,
    /// The kernel's minor version.
    pub minor: u32,
    /// How far it would read ahead, in bytes.
    pub readahead_bytes_max: u32,
    /// What it offers.
    pub flags: u32,
}

/// An operation with its arguments. Names are never empty and hold no NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the arguments of the system calls they are named after")]
pub enum Op<'a> {
    Lookup { name: &'a [u8] },
    Forget { count: u64 },
    BatchForget(Forgets<'a>),
    Getattr { handle: Option<Handle> },
    Setattr(SetAttr),
    Readlink,
    Symlink { name: &'a [u8], target: &'a [u8] },
    Mknod { name: &'a [u8], mode: u32, rdev: u32, umask: u32 },
    Mkdir { name: &'a [u8], mode: u32, umask: u32 },
    Unlink { name: &'a [u8] },
    Rmdir { name: &'a [u8] },
    Rename { name: &'a [u8], to_node: u64, to_name: &'a [u8], flags: u32 },
    Link { old_node: u64, name: &'a [u8] },
    Open { flags: u32 },
    Create { name: &'a [u8], flags: u32, mode: u32, umask: u32 },
    Read { handle: Handle, offset: u64, size: u32 },
    Write { handle: Handle, offset: u64, data: &'a [u8], flags: u32, kill_suidgid: bool },
    Statfs,
    Release { handle: Handle, flags: u32, flock_owner: Option<LockOwner> },
    Fsync { handle: Handle, data_only: bool },
    Setxattr { name: &'a [u8], value: &'a [u8], flags: u32 },
    Getxattr { name: &'a [u8], size: u32 },
    Listxattr { size: u32 },
    Removexattr { name: &'a [u8] },
    Flush { handle: Handle, owner: LockOwner },
    Init(InitOp),
    Opendir { flags: u32 },
    Readdir { handle: Handle, offset: u64, size: u32, plus: bool },
    Releasedir { handle: Handle },
    Fsyncdir { handle: Handle, data_only: bool },
    Getlk(LockOp),
    Setlk { lock: LockOp, wait: bool },
    Interrupt { unique: Unique },
    Destroy,
    Fallocate { handle: Handle, offset: u64, length: u64, mode: u32 },
    Lseek { handle: Handle, offset: u64, whence: u32 },
}

/// The pairs (node, count) of a BATCH_FORGET.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// Each node with the number of lookups to forget.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut cursor = Cursor(self.0);
        std::iter::from_fn(move || Some((cursor.u64().ok()?, cursor.u64().ok()?)))
    }
}

/// Takes numbers off the front of bytes.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*head)
    }
    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_ne_bytes)
    }
    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_ne_bytes)
    }
    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_ne_bytes)
    }
    fn skip(&mut self, bytes: usize) -> Result<(), Malformed> {
        self.0 = self.0.get(bytes..).ok_or(Malformed)?;
        Ok(())
    }
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(head)
    }
    /// Everything up to a NUL, which is taken too.
    fn text(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(Malformed)?;
        let text = self.bytes(end)?;
        self.skip(1)?;
        Ok(text)
    }
    /// A name of a directory entry: not empty, not too long, without `/`.
    fn name(&mut self) -> Result<&'a [u8], Malformed> {
        let name = self.text()?;
        let fits = !name.is_empty() && name.len() <= abi::NAME_BYTES_MAX && !name.contains(&b'/');
        if fits { Ok(name) } else { Err(Malformed) }
    }
    fn handle(&mut self) -> Result<Handle, Malformed> {
        self.u64().map(Handle)
    }
}

impl Header {
    /// Splits a message into header and body.
    ///
    /// # Errors
    /// The message is shorter than a header, or not as long as its header says.
    pub fn parse(message: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut c = Cursor(message);
        let len = c.u32()?;
        let header = Self {
            opcode: c.u32()?,
            unique: Unique(c.u64()?),
            node: c.u64()?,
            uid: c.u32()?,
            gid: c.u32()?,
            pid: c.u32()?,
        };
        let extensions = usize::from(c.u16()?) * 8;
        c.skip(2)?;
        if usize::try_from(len) != Ok(message.len()) {
            return Err(Malformed);
        }
        // Extensions stand at the end; none is negotiated, but what an odd kernel appends is no data.
        let body = c.0.len().checked_sub(extensions).and_then(|n| c.0.get(..n)).ok_or(Malformed)?;
        Ok((header, body))
    }
}

impl<'a> Op<'a> {
    /// Parses the body of an operation.
    ///
    /// # Errors
    /// See [`OpError`].
    pub fn parse(opcode: u32, body: &'a [u8]) -> Result<Self, OpError> {
        let opcode = Opcode::from_number(opcode).ok_or(OpError::Unknown(opcode))?;
        Self::parse_body(opcode, Cursor(body)).map_err(|Malformed| OpError::Malformed(opcode))
    }

    fn parse_body(opcode: Opcode, mut c: Cursor<'a>) -> Result<Self, Malformed> {
        Ok(match opcode {
            Opcode::Lookup => Self::Lookup { name: c.name()? },
            Opcode::Forget => Self::Forget { count: c.u64()? },
            Opcode::BatchForget => {
                let count = usize::try_from(c.u32()?).map_err(|_| Malformed)?;
                c.skip(4)?;
                Self::BatchForget(Forgets(c.bytes(count.checked_mul(16).ok_or(Malformed)?)?))
            }
            Opcode::Getattr => {
                let flags = c.u32()?;
                c.skip(4)?;
                let handle = c.handle()?;
                Self::Getattr { handle: (flags & flag::GETATTR_FH != 0).then_some(handle) }
            }
            Opcode::Setattr => Self::Setattr(setattr(&mut c)?),
            Opcode::Readlink => Self::Readlink,
            Opcode::Symlink => {
                let name = c.name()?;
                let target = c.text()?;
                Self::Symlink { name, target }
            }
            Opcode::Mknod => {
                let (mode, rdev, umask) = (c.u32()?, c.u32()?, c.u32()?);
                c.skip(4)?;
                Self::Mknod { name: c.name()?, mode, rdev, umask }
            }
            Opcode::Mkdir => {
                let (mode, umask) = (c.u32()?, c.u32()?);
                Self::Mkdir { name: c.name()?, mode, umask }
            }
            Opcode::Unlink => Self::Unlink { name: c.name()? },
            Opcode::Rmdir => Self::Rmdir { name: c.name()? },
            Opcode::Rename => {
                let to_node = c.u64()?;
                let name = c.name()?;
                Self::Rename { name, to_node, to_name: c.name()?, flags: 0 }
            }
            Opcode::Rename2 => {
                let (to_node, flags) = (c.u64()?, c.u32()?);
                c.skip(4)?;
                let name = c.name()?;
                Self::Rename { name, to_node, to_name: c.name()?, flags }
            }
            Opcode::Link => {
                let old_node = c.u64()?;
                Self::Link { old_node, name: c.name()? }
            }
            Opcode::Open => Self::Open { flags: c.u32()? },
            Opcode::Opendir => Self::Opendir { flags: c.u32()? },
            Opcode::Create => {
                let (flags, mode, umask) = (c.u32()?, c.u32()?, c.u32()?);
                c.skip(4)?;
                Self::Create { name: c.name()?, flags, mode, umask }
            }
            Opcode::Read => {
                let (handle, offset, size) = read(&mut c)?;
                Self::Read { handle, offset, size }
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                let (handle, offset, size) = read(&mut c)?;
                Self::Readdir { handle, offset, size, plus: opcode == Opcode::Readdirplus }
            }
            Opcode::Write => {
                let (handle, offset, size, how) = (c.handle()?, c.u64()?, c.u32()?, c.u32()?);
                c.skip(8)?; // Lock owner.
                let flags = c.u32()?;
                c.skip(4)?;
                let data = c.bytes(usize::try_from(size).map_err(|_| Malformed)?)?;
                let kill_suidgid = how & flag::WRITE_KILL_SUIDGID != 0;
                Self::Write { handle, offset, data, flags, kill_suidgid }
            }
            Opcode::Statfs => Self::Statfs,
            Opcode::Release => {
                let (handle, flags, release, owner) = (c.handle()?, c.u32()?, c.u32()?, c.u64()?);
                let flock = release & flag::RELEASE_FLOCK_UNLOCK != 0;
                Self::Release { handle, flags, flock_owner: flock.then_some(LockOwner(owner)) }
            }
            Opcode::Releasedir => Self::Releasedir { handle: c.handle()? },
            Opcode::Fsync => {
                let handle = c.handle()?;
                Self::Fsync { handle, data_only: c.u32()? & flag::FSYNC_FDATASYNC != 0 }
            }
            Opcode::Fsyncdir => {
                let handle = c.handle()?;
                Self::Fsyncdir { handle, data_only: c.u32()? & flag::FSYNC_FDATASYNC != 0 }
            }
            Opcode::Setxattr => {
                let (size, flags) = (c.u32()?, c.u32()?);
                let name = c.text()?;
                let value = c.bytes(usize::try_from(size).map_err(|_| Malformed)?)?;
                Self::Setxattr { name, value, flags }
            }
            Opcode::Getxattr => {
                let size = c.u32()?;
                c.skip(4)?;
                Self::Getxattr { name: c.text()?, size }
            }
            Opcode::Listxattr => Self::Listxattr { size: c.u32()? },
            Opcode::Removexattr => Self::Removexattr { name: c.text()? },
            Opcode::Flush => {
                let handle = c.handle()?;
                c.skip(8)?;
                Self::Flush { handle, owner: LockOwner(c.u64()?) }
            }
            Opcode::Init => Self::Init(InitOp {
                major: c.u32()?,
                minor: c.u32()?,
                readahead_bytes_max: c.u32()?,
                flags: c.u32()?,
            }),
            Opcode::Getlk => Self::Getlk(lock(&mut c)?),
            Opcode::Setlk => Self::Setlk { lock: lock(&mut c)?, wait: false },
            Opcode::Setlkw => Self::Setlk { lock: lock(&mut c)?, wait: true },
            Opcode::Interrupt => Self::Interrupt { unique: Unique(c.u64()?) },
            Opcode::Destroy => Self::Destroy,
            Opcode::Fallocate => {
                Self::Fallocate { handle: c.handle()?, offset: c.u64()?, length: c.u64()?, mode: c.u32()? }
            }
            Opcode::Lseek => Self::Lseek { handle: c.handle()?, offset: c.u64()?, whence: c.u32()? },
        })
    }
}

fn read(c: &mut Cursor<'_>) -> Result<(Handle, u64, u32), Malformed> {
    let found = (c.handle()?, c.u64()?, c.u32()?);
    c.skip(4 + 8 + 4 + 4)?; // Read flags, lock owner, open flags, padding.
    Ok(found)
}

fn lock(c: &mut Cursor<'_>) -> Result<LockOp, Malformed> {
    // lk_in: fh, owner, start, end, type, pid, lk_flags, padding. With the header, lk_flags stands at byte 80.
    let (handle, owner, start, end) = (c.handle()?, LockOwner(c.u64()?), c.u64()?, c.u64()?);
    let (kind, pid, flags) = (c.u32()?, c.u32()?, c.u32()?);
    // F_RDLCK, F_WRLCK, F_UNLCK as Linux numbers them on every architecture the workspace builds for.
    let kind = match kind {
        0 => LockType::Read,
        1 => LockType::Write,
        2 => LockType::Unlock,
        _ => return Err(Malformed),
    };
    if end < start {
        return Err(Malformed);
    }
    Ok(LockOp { handle, owner, start, end, kind, pid, flock: flags & flag::LK_FLOCK != 0 })
}

fn setattr(c: &mut Cursor<'_>) -> Result<SetAttr, Malformed> {
    let valid = c.u32()?;
    c.skip(4)?;
    let (handle, size) = (c.handle()?, c.u64()?);
    c.skip(8)?; // Lock owner.
    let (atime, mtime, _ctime) = (c.u64()?, c.u64()?, c.u64()?);
    let (atime_nanos, mtime_nanos, _ctime_nanos) = (c.u32()?, c.u32()?, c.u32()?);
    let mode = c.u32()?;
    c.skip(4)?;
    let (uid, gid) = (c.u32()?, c.u32()?);
    let has = |bit: u32| valid & bit != 0;
    let time = |set: u32, now: u32, seconds: u64, nanos: u32| {
        if has(now) {
            return Ok(Some(SetTime::Now));
        }
        if !has(set) {
            return Ok(None);
        }
        if Duration::from_secs(1).as_nanos() <= u128::from(nanos) {
            return Err(Malformed);
        }
        Ok(Some(SetTime::At { seconds: seconds.cast_signed(), nanos }))
    };
    Ok(SetAttr {
        handle: has(fattr::FH).then_some(handle),
        mode: has(fattr::MODE).then_some(mode),
        uid: has(fattr::UID).then_some(uid),
        gid: has(fattr::GID).then_some(gid),
        size: has(fattr::SIZE).then_some(size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nanos)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nanos)?,
        kill_suidgid: has(fattr::KILL_SUIDGID),
    })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
