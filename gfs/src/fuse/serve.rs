//! Turns requests of the kernel into operations of a [`Filesystem`], and their results into replies.

use super::codec::{self, Header, LockType, Op, ROOT_NODE, Reply};
use super::notify::Notifier;
use super::request::{Answer, OpenKind, Pending};
use crate::FsError;
use crate::face::{
    self, Credentials, DirEntry, Entry, FallocateMode, Filesystem, Ino, Invalidation, LockKind, LockOwner,
    NodeKind, PosixHolder, PosixLock, RenameFlags, Seek, SetAttr, SetTime, Timestamp, Wait, Withdraw,
    XattrFlags,
};
use core::time::Duration;
use quorate_membership::BoxFuture;
use rustix::io::Errno;
use std::sync::Arc;

/// The kernel's "to the end" of an fcntl lock.
const OFFSET_MAX: u64 = i64::MAX.unsigned_abs();
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o010;

/// A filesystem with what its mount needs to know. Cheap to clone: each request has one.
#[derive(Clone)]
pub(crate) struct Server {
    fs: Arc<dyn Filesystem>,
    notifier: Arc<Notifier>,
    root: Ino,
    keep_cache: bool,
}

/// The kernel calls the root 1. An inode that really has that number gets the root's.
fn node_of(root: Ino, ino: Ino) -> u64 {
    match ino {
        Ino(ROOT_NODE) => root.0,
        _ if ino == root => ROOT_NODE,
        Ino(n) => n,
    }
}

fn errno(error: &FsError) -> Errno {
    if matches!(error, FsError::Withdrawn(_) | FsError::Corrupt(_) | FsError::Io(_)) {
        tracing::warn!(%error, "an operation failed");
    }
    Errno::from_raw_os_error(error.errno())
}

impl From<FsError> for Reply {
    fn from(error: FsError) -> Self {
        Self::Error(errno(&error))
    }
}

/// Lets `?` end a request with an error.
struct Failed(Errno);

impl From<FsError> for Failed {
    fn from(error: FsError) -> Self {
        Self(errno(&error))
    }
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self(errno)
    }
}

fn answer(future: impl Future<Output = Result<Answer, Failed>> + Send + 'static) -> Pending {
    Box::pin(async move { future.await.unwrap_or_else(|Failed(errno)| Reply::Error(errno).into()) })
}

fn done(future: impl Future<Output = Result<(), FsError>> + Send + 'static) -> Pending {
    Box::pin(async move { future.await.map_or_else(Reply::from, |()| Reply::Empty).into() })
}

impl Server {
    pub(crate) fn new(fs: Arc<dyn Filesystem>, notifier: Arc<Notifier>, keep_cache: bool) -> Self {
        let root = fs.root();
        fs.set_invalidation(Arc::new(Sink { notifier: Arc::clone(&notifier), root }));
        Self { fs, notifier, root, keep_cache }
    }

    fn ino(&self, node: u64) -> Ino {
        // The map is its own inverse.
        Ino(node_of(self.root, Ino(node)))
    }

    pub(crate) fn forget(&self, node: u64, count: u64) {
        if node != ROOT_NODE {
            self.fs.forget(self.ino(node), count);
        }
    }

    /// Gives back what an answer holds that nobody took; a future if there is something to wait for.
    pub(crate) fn undo(&self, answer: Answer) -> Option<BoxFuture<'static, ()>> {
        for ino in answer.looked_up {
            if ino != self.root {
                self.fs.forget(ino, 1);
            }
        }
        let (ino, handle, kind) = answer.opened?;
        let fs = Arc::clone(&self.fs);
        Some(Box::pin(async move {
            let _ = match kind {
                OpenKind::File => fs.release(ino, handle, None).await,
                OpenKind::Directory => fs.releasedir(ino, handle).await,
            };
        }))
    }

    /// Starts an operation. Session-level ones (INIT, FORGET, INTERRUPT) never come here.
    /// `withdraw` ends the wait for an fcntl lock.
    pub(crate) fn handle(&self, header: &Header, op: Op<'_>, withdraw: Option<Withdraw>) -> Pending {
        let cred = Credentials { uid: header.uid, gid: header.gid, groups: Vec::new(), pid: header.pid };
        let ino = self.ino(header.node);
        let s = self.clone();
        match op {
            Op::Lookup { name } => {
                let name = name.to_vec();
                answer(async move { s.lookup(cred, ino, name).await })
            }
            Op::Getattr { .. } => answer(async move { Ok(s.attr(&s.fs.getattr(ino).await?)) }),
            Op::Setattr(set) => answer(async move { s.setattr(cred, ino, set).await }),
            Op::Readlink => answer(async move { Ok(Reply::data(s.fs.readlink(ino).await?).into()) }),
            Op::Symlink { name, target } => {
                let (name, target) = (name.to_vec(), target.to_vec());
                answer(async move { s.entry(ino, s.fs.symlink(cred, ino, name, target).await?).await })
            }
            Op::Mknod { name, mode, rdev, .. } => {
                let name = name.to_vec();
                answer(async move {
                    let kind = node_kind(mode, rdev)?;
                    s.entry(ino, s.fs.mknod(cred, ino, name, mode & 0o7777, kind).await?).await
                })
            }
            Op::Mkdir { name, mode, .. } => {
                let name = name.to_vec();
                answer(async move { s.entry(ino, s.fs.mkdir(cred, ino, name, mode & 0o7777).await?).await })
            }
            Op::Unlink { name } => {
                let name = name.to_vec();
                done(async move { s.fs.unlink(ino, name).await })
            }
            Op::Rmdir { name } => {
                let name = name.to_vec();
                done(async move { s.fs.rmdir(ino, name).await })
            }
            Op::Rename { name, to_node, to_name, flags } => {
                let (name, to, to_name) = (name.to_vec(), self.ino(to_node), to_name.to_vec());
                answer(async move {
                    s.fs.rename(ino, name, to, to_name, rename_flags(flags)?).await?;
                    Ok(Reply::Empty.into())
                })
            }
            Op::Link { old_node, name } => {
                let (old, name) = (self.ino(old_node), name.to_vec());
                answer(async move { s.entry(ino, s.fs.link(old, ino, name).await?).await })
            }
            Op::Open { flags } => answer(async move { s.open(ino, flags).await }),
            Op::Create { name, flags, mode, .. } => {
                let name = name.to_vec();
                answer(async move { s.create(cred, ino, name, mode & 0o7777, flags).await })
            }
            Op::Read { offset, size, .. } => {
                let user = self.notifier.users.enter(header.node);
                answer(async move {
                    let _user = user;
                    let size = size.min(u32::try_from(codec::DATA_BYTES_MAX).unwrap_or(u32::MAX));
                    Ok(Reply::data(s.fs.read(ino, offset, size).await?).into())
                })
            }
            Op::Write { offset, data, flags, kill_suidgid, .. } => {
                let (user, data) = (self.notifier.users.enter(header.node), data.to_vec());
                let append = flags & libc::O_APPEND.cast_unsigned() != 0;
                answer(async move {
                    let _user = user;
                    Ok(Reply::Written(s.fs.write(ino, offset, data, append, kill_suidgid).await?).into())
                })
            }
            Op::Statfs => answer(async move { Ok(s.statfs().await?) }),
            Op::Release { handle, flock_owner, .. } => done(async move {
                s.fs.release(ino, face::Handle(handle.0), flock_owner.map(|o| LockOwner(o.0))).await
            }),
            Op::Fsync { data_only, .. } => done(async move { s.fs.fsync(ino, data_only).await }),
            Op::Setxattr { name, value, flags } => {
                let (name, value) = (name.to_vec(), value.to_vec());
                let flags = XattrFlags { create: flags & 1 != 0, replace: flags & 2 != 0 };
                done(async move { s.fs.setxattr(ino, name, value, flags).await })
            }
            Op::Getxattr { name, size } => {
                let name = name.to_vec();
                answer(async move { sized(s.fs.getxattr(ino, name).await?, size) })
            }
            Op::Listxattr { size } => answer(async move { sized(s.fs.listxattr(ino).await?, size) }),
            Op::Removexattr { name } => {
                let name = name.to_vec();
                done(async move { s.fs.removexattr(ino, name).await })
            }
            Op::Flush { owner, .. } => done(async move { s.fs.flush(ino, LockOwner(owner.0)).await }),
            Op::Opendir { .. } => answer(async move {
                let handle = s.fs.opendir(ino).await?;
                let opened =
                    codec::Opened { handle: codec::Handle(handle.0), keep_cache: false, direct_io: false };
                let opened = Reply::Opened(opened);
                Ok(Answer { opened: Some((ino, handle, OpenKind::Directory)), ..opened.into() })
            }),
            Op::Readdir { offset, size, plus, .. } => {
                answer(async move { s.readdir(cred, ino, offset, size, plus).await })
            }
            Op::Releasedir { handle } => {
                done(async move { s.fs.releasedir(ino, face::Handle(handle.0)).await })
            }
            Op::Fsyncdir { .. } => done(async move { s.fs.fsyncdir(ino).await }),
            Op::Getlk(lock) => answer(async move {
                let found = s.fs.getlk(ino, LockOwner(lock.owner.0), posix(&lock)).await?;
                Ok(found.map_or_else(|| Reply::no_lock(&lock), |l| conflict(&l)).into())
            }),
            Op::Setlk { lock, wait } => done(async move {
                let owner = LockOwner(lock.owner.0);
                if lock.flock {
                    s.fs.flock(ino, owner, lock_kind(lock.kind), wait).await
                } else {
                    let wait = withdraw.filter(|_| wait).map_or(Wait::No, Wait::Until);
                    s.fs.setlk(ino, face::Handle(lock.handle.0), owner, posix(&lock), wait).await
                }
            }),
            Op::Fallocate { offset, length, mode, .. } => answer(async move {
                s.fs.fallocate(ino, offset, length, fallocate_mode(mode)?).await?;
                Ok(Reply::Empty.into())
            }),
            Op::Lseek { offset, whence, .. } => answer(async move {
                let what = match whence.cast_signed() {
                    libc::SEEK_DATA => Seek::Data,
                    libc::SEEK_HOLE => Seek::Hole,
                    _ => return Err(Errno::INVAL.into()),
                };
                Ok(Reply::Offset(s.fs.lseek(ino, offset, what).await?).into())
            }),
            Op::Init(_) | Op::Forget { .. } | Op::BatchForget(_) | Op::Interrupt { .. } | Op::Destroy => {
                Box::pin(async { Reply::Error(Errno::IO).into() })
            }
        }
    }

    fn attr(&self, entry: &Entry) -> Answer {
        Reply::Attr(attr(&entry.attr), entry.valid).into()
    }

    /// How long the names of a directory may be trusted: as long as its attributes, if they can be taken back at all.
    async fn names_valid(&self, parent: Ino) -> Duration {
        if !self.notifier.caches_names() {
            return Duration::ZERO;
        }
        self.fs.getattr(parent).await.map_or(Duration::ZERO, |e| e.valid)
    }

    fn encode(&self, entry: &Entry, names_valid: Duration) -> codec::Entry {
        codec::Entry {
            node: node_of(self.root, entry.attr.ino),
            generation: entry.attr.generation,
            name_ttl: entry.valid.min(names_valid),
            attr_ttl: entry.valid,
            attr: attr(&entry.attr),
        }
    }

    /// A reply with an inode that counts as looked up.
    async fn entry(&self, parent: Ino, entry: Entry) -> Result<Answer, Failed> {
        let valid = self.names_valid(parent).await;
        let reply = Reply::Entry(self.encode(&entry, valid));
        Ok(Answer { looked_up: vec![entry.attr.ino], ..reply.into() })
    }

    async fn lookup(&self, cred: Credentials, parent: Ino, name: Vec<u8>) -> Result<Answer, Failed> {
        match self.fs.lookup(cred, parent, name).await {
            Ok(entry) => self.entry(parent, entry).await,
            Err(FsError::NotFound) => {
                let name_ttl = self.names_valid(parent).await;
                if name_ttl.is_zero() {
                    return Err(FsError::NotFound.into());
                }
                // Node 0: there is no such name, and the kernel may remember that.
                let attr = codec::Attr::default();
                let none = codec::Entry { node: 0, generation: 0, name_ttl, attr_ttl: Duration::ZERO, attr };
                Ok(Reply::Entry(none).into())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn setattr(&self, cred: Credentials, ino: Ino, set: codec::SetAttr) -> Result<Answer, Failed> {
        let mut mode = set.mode.map(|m| m & 0o7777);
        // With HANDLE_KILLPRIV_V2 the kernel leaves it to us that a changed owner, or a truncation by an ordinary user,
        // takes set-uid and set-gid away (chown(2), truncate(2)).
        let chown = set.uid.is_some() || set.gid.is_some();
        if mode.is_none() && (chown || set.kill_suidgid) {
            let now = self.fs.getattr(ino).await?.attr.mode;
            let without = without_privileges(now);
            if now & face::S_IFMT != face::S_IFDIR && without != now {
                mode = Some(without & 0o7777);
            }
        }
        let time = |t| match t {
            codec::SetTime::Now => SetTime::Now,
            codec::SetTime::At { seconds, nanos } => SetTime::At(Timestamp { sec: seconds, nsec: nanos }),
        };
        let set = SetAttr {
            mode,
            uid: set.uid,
            gid: set.gid,
            size: set.size,
            atime: set.atime.map(time),
            mtime: set.mtime.map(time),
            ctime: None,
        };
        Ok(self.attr(&self.fs.setattr(cred, ino, set).await?))
    }

    /// Files opened for appending bypass the kernel's cache: it would put the bytes where *it* believes the end to be.
    fn opened(&self, handle: face::Handle, flags: u32) -> codec::Opened {
        codec::Opened {
            handle: codec::Handle(handle.0),
            keep_cache: self.keep_cache,
            direct_io: writes(flags) && flags & libc::O_APPEND.cast_unsigned() != 0,
        }
    }

    async fn open(&self, ino: Ino, flags: u32) -> Result<Answer, Failed> {
        let handle = self.fs.open(ino, writes(flags)).await?;
        let reply = Reply::Opened(self.opened(handle, flags));
        Ok(Answer { opened: Some((ino, handle, OpenKind::File)), ..reply.into() })
    }

    async fn create(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        flags: u32,
    ) -> Result<Answer, Failed> {
        // Always exclusive: the kernel takes what CREATE opens for new and checks no permission of it. If another node
        // was faster, STALE makes the kernel look the name up again and open it as what it is.
        let (entry, handle) = match self.fs.create(cred, parent, name, mode, true).await {
            Err(FsError::Exists) if flags & libc::O_EXCL.cast_unsigned() == 0 => {
                return Err(Errno::STALE.into());
            }
            other => other?,
        };
        let ino = entry.attr.ino;
        let valid = self.names_valid(parent).await;
        let reply = Reply::Created(self.encode(&entry, valid), self.opened(handle, flags));
        Ok(Answer { reply, looked_up: vec![ino], opened: Some((ino, handle, OpenKind::File)) })
    }

    async fn readdir(
        &self,
        cred: Credentials,
        ino: Ino,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Result<Answer, Failed> {
        // The shortest entry takes 32 bytes, with attributes 160.
        let most = usize::try_from(size).unwrap_or(usize::MAX) / if plus { 160 } else { 32 } + 1;
        let entries = self.fs.readdir(ino, offset, most).await?;
        let mut listing = codec::Listing::new(size);
        if !plus {
            for e in entries {
                if !listing.push(e.ino.0, e.cookie, kind(&e), &e.name) {
                    break;
                }
            }
            return Ok(listing.into_reply().into());
        }
        let valid = self.names_valid(ino).await;
        let mut looked_up = LookedUp { fs: Arc::clone(&self.fs), root: self.root, inodes: Vec::new() };
        for e in entries {
            if !listing.fits_plus(&e.name) {
                break;
            }
            let itself = matches!(&e.name[..], b"." | b"..");
            // What cannot be looked up (deleted meanwhile) is listed without attributes; the kernel asks if it must know.
            let found = match itself {
                true => None,
                false => self.fs.lookup(cred.clone(), ino, e.name.clone()).await.ok(),
            };
            let entry = found.map(|entry| {
                looked_up.inodes.push(entry.attr.ino);
                self.encode(&entry, valid)
            });
            let fits = listing.push_plus(entry.as_ref(), e.ino.0, e.cookie, kind(&e), &e.name);
            assert!(fits, "it was asked whether the entry fits");
        }
        Ok(Answer { looked_up: looked_up.take(), ..listing.into_reply().into() })
    }

    async fn statfs(&self) -> Result<Answer, FsError> {
        let s = self.fs.statfs().await?;
        Ok(Reply::Statfs(codec::Statfs {
            blocks: s.blocks,
            blocks_free: s.free,
            blocks_available: s.free,
            inodes: s.files,
            inodes_free: s.files_free,
            block_bytes: s.block_size,
            name_bytes_max: s.name_bytes_max,
        })
        .into())
    }
}

/// Lookups of a listing under way; given back if it is dropped.
struct LookedUp {
    fs: Arc<dyn Filesystem>,
    root: Ino,
    inodes: Vec<Ino>,
}

impl LookedUp {
    fn take(&mut self) -> Vec<Ino> {
        std::mem::take(&mut self.inodes)
    }
}

impl Drop for LookedUp {
    fn drop(&mut self) {
        for ino in self.inodes.drain(..).filter(|ino| *ino != self.root) {
            self.fs.forget(ino, 1);
        }
    }
}

/// Passes invalidations on to the kernel.
struct Sink {
    notifier: Arc<Notifier>,
    root: Ino,
}

impl Invalidation for Sink {
    fn inode(&self, ino: Ino, data: bool) -> BoxFuture<'_, ()> {
        Box::pin(self.notifier.inode(node_of(self.root, ino), data))
    }

    fn entries(&self, _parent: Ino) -> BoxFuture<'_, ()> {
        // The kernel cannot drop the names of one directory without taking its lock, which an operation may hold that
        // waits for us. It can declare all names old, which costs a lookup each.
        Box::pin(self.notifier.all_names())
    }

    fn prune(&self, ino: Ino) {
        self.notifier.prune(node_of(self.root, ino));
    }
}

fn writes(flags: u32) -> bool {
    flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY
}

fn without_privileges(mode: u32) -> u32 {
    let group = if mode & S_IXGRP == 0 { 0 } else { S_ISGID };
    mode & !(S_ISUID | group)
}

fn attr(a: &face::Attr) -> codec::Attr {
    let time = |t: Timestamp| (t.sec, t.nsec);
    codec::Attr {
        ino: a.ino.0,
        size: a.size,
        blocks: a.blocks,
        atime: time(a.atime),
        mtime: time(a.mtime),
        ctime: time(a.ctime),
        mode: a.mode,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: device_number(a.major, a.minor),
        block_bytes: a.block_size,
    }
}

/// The kernel's 32-bit form: 12 bits of the major number within 20 of the minor one.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

fn node_kind(mode: u32, rdev: u32) -> Result<NodeKind, Errno> {
    let (major, minor) = (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & 0xfff00);
    Ok(match mode & face::S_IFMT {
        0 | face::S_IFREG => NodeKind::File,
        face::S_IFIFO => NodeKind::Fifo,
        face::S_IFSOCK => NodeKind::Socket,
        face::S_IFCHR => NodeKind::CharDevice(major, minor),
        face::S_IFBLK => NodeKind::BlockDevice(major, minor),
        _ => return Err(Errno::INVAL),
    })
}

fn rename_flags(flags: u32) -> Result<RenameFlags, Errno> {
    match flags {
        0 => Ok(RenameFlags::default()),
        1 => Ok(RenameFlags { no_replace: true, exchange: false }),
        2 => Ok(RenameFlags { no_replace: false, exchange: true }),
        _ => Err(Errno::INVAL),
    }
}

fn fallocate_mode(mode: u32) -> Result<FallocateMode, Errno> {
    const KEEP_SIZE: u32 = 1;
    const PUNCH_HOLE: u32 = 2;
    const ZERO_RANGE: u32 = 0x10;
    if mode & !(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE) != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(FallocateMode {
        keep_size: mode & KEEP_SIZE != 0,
        punch_hole: mode & PUNCH_HOLE != 0,
        zero_range: mode & ZERO_RANGE != 0,
    })
}

/// The bytes of an extended attribute, or how many there are.
fn sized(bytes: Vec<u8>, room: u32) -> Result<Answer, Failed> {
    let len = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
    if room == 0 {
        return Ok(Reply::Size(len).into());
    }
    if room < len { Err(Errno::RANGE.into()) } else { Ok(Reply::data(bytes).into()) }
}

fn kind(entry: &DirEntry) -> codec::DirentType {
    codec::DirentType::from_mode(entry.kind)
}

fn lock_kind(kind: LockType) -> LockKind {
    match kind {
        LockType::Read => LockKind::Read,
        LockType::Write => LockKind::Write,
        LockType::Unlock => LockKind::Unlock,
    }
}

fn posix(lock: &codec::LockOp) -> PosixLock {
    let end = if OFFSET_MAX <= lock.end { u64::MAX } else { lock.end };
    PosixLock { kind: lock_kind(lock.kind), start: lock.start, end, pid: lock.pid }
}

fn conflict(holder: &PosixHolder) -> Reply {
    let lock = &holder.lock;
    let kind = match lock.kind {
        LockKind::Read => LockType::Read,
        LockKind::Write => LockType::Write,
        LockKind::Unlock => LockType::Unlock,
    };
    // A number of another node would name some process of this one: 0 is nobody's.
    let pid = if holder.node.is_none() { lock.pid } else { 0 };
    Reply::Lock { kind, start: lock.start, end: lock.end.min(OFFSET_MAX), pid }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roots_number_and_one_are_swapped() {
        let root = Ino(24);
        for ino in [1, 2, 24, 1000] {
            assert_eq!(node_of(root, Ino(node_of(root, Ino(ino)))), ino);
        }
        assert_eq!(node_of(root, root), 1);
        assert_eq!(node_of(Ino(1), Ino(1)), 1);
    }

    #[test]
    fn set_gid_without_group_execution_is_no_privilege() {
        assert_eq!(without_privileges(0o106_755), 0o100_755);
        assert_eq!(without_privileges(0o102_745), 0o102_745);
    }

    #[test]
    fn device_numbers_survive_the_kernels_form() {
        let Ok(NodeKind::BlockDevice(major, minor)) = node_kind(face::S_IFBLK, device_number(259, 0x12345))
        else {
            panic!("a block device is one")
        };
        assert_eq!((major, minor), (259, 0x12345));
    }

    #[test]
    fn to_the_end_is_one_number_on_either_side() {
        let owner = codec::LockOwner(1);
        let lock = codec::LockOp {
            handle: codec::Handle(1),
            owner,
            start: 5,
            end: OFFSET_MAX,
            kind: LockType::Write,
            pid: 1,
            flock: false,
        };
        assert_eq!(posix(&lock).end, u64::MAX);
        let holder = PosixHolder { lock: posix(&lock), node: None };
        let Reply::Lock { end, .. } = conflict(&holder) else { panic!("it is a lock") };
        assert_eq!(end, OFFSET_MAX);
    }
}
