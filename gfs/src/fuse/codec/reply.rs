//! Replies and notices to the kernel, encoded.

use super::abi::{self, notice};
use super::request::{Handle, InitOp, LockOp, LockType, Unique};
use rustix::io::Errno;
use std::fmt;
use std::time::Duration;

/// What an inode looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// The inode number shown to programs.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Blocks of 512 bytes in use.
    pub blocks: u64,
    /// Last access: seconds since 1970, nanoseconds.
    pub atime: (i64, u32),
    /// Last change of the data.
    pub mtime: (i64, u32),
    /// Last change of the inode.
    pub ctime: (i64, u32),
    /// Type and permission bits.
    pub mode: u32,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device's number, for device nodes.
    pub rdev: u32,
    /// The preferred size of reads and writes, in bytes.
    pub block_bytes: u32,
}

/// A name that was looked up or made: the kernel counts one lookup for each such reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The node number later requests use; [`abi::ROOT_NODE`](super::ROOT_NODE) is the root's.
    pub node: u64,
    /// Tells a reused node number from the earlier inode.
    pub generation: u64,
    /// How long the kernel may trust the name.
    pub name_ttl: Duration,
    /// How long it may trust the attributes.
    pub attr_ttl: Duration,
    /// The attributes.
    pub attr: Attr,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Given back with every request on it.
    pub handle: Handle,
    /// The pages cached under earlier opens are still good.
    pub keep_cache: bool,
    /// Do not cache pages at all.
    pub direct_io: bool,
}

/// Sizes and counts of a filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statfs {
    /// Blocks in all.
    pub blocks: u64,
    /// Free ones.
    pub blocks_free: u64,
    /// Free ones for ordinary users.
    pub blocks_available: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Free ones.
    pub inodes_free: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// The longest name, in bytes.
    pub name_bytes_max: u32,
}

/// Bytes of a reply, owned by whoever made them.
pub trait Payload: Send {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

impl Payload for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// What is answered to a request.
pub enum Reply {
    /// It failed.
    Error(Errno),
    /// It is done.
    Empty,
    /// LOOKUP, MKNOD, MKDIR, SYMLINK, LINK.
    Entry(Entry),
    /// GETATTR, SETATTR, with how long the kernel may trust it.
    Attr(Attr, Duration),
    /// OPEN, OPENDIR.
    Opened(Opened),
    /// CREATE.
    Created(Entry, Opened),
    /// READ, READLINK, READDIR, GETXATTR, LISTXATTR.
    Data(Box<dyn Payload>),
    /// WRITE: how many bytes.
    Written(u32),
    /// STATFS.
    Statfs(Statfs),
    /// GETXATTR and LISTXATTR with size zero: how many bytes there are.
    Size(u32),
    /// GETLK: what stands against the lock; `Unlock` for nothing.
    Lock {
        /// The lock in the way.
        kind: LockType,
        /// Its first byte.
        start: u64,
        /// Its last byte.
        end: u64,
        /// Its process.
        pid: u32,
    },
    /// LSEEK: the offset found.
    Offset(u64),
    /// INIT.
    Init(Negotiated),
}

impl Reply {
    /// These bytes.
    #[must_use]
    pub fn data(bytes: impl Payload + 'static) -> Self {
        Self::Data(Box::new(bytes))
    }

    /// GETLK: nothing stands against `asked`.
    #[must_use]
    pub fn no_lock(asked: &LockOp) -> Self {
        Self::Lock { kind: LockType::Unlock, start: asked.start, end: asked.end, pid: 0 }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(e) => write!(f, "Error({e})"),
            Self::Empty => write!(f, "Empty"),
            Self::Entry(e) => e.fmt(f),
            Self::Attr(a, _) => a.fmt(f),
            Self::Opened(o) => o.fmt(f),
            Self::Created(e, o) => write!(f, "Created({e:?}, {o:?})"),
            Self::Data(d) => write!(f, "Data({} bytes)", d.bytes().len()),
            Self::Written(n) => write!(f, "Written({n})"),
            Self::Statfs(s) => s.fmt(f),
            Self::Size(n) => write!(f, "Size({n})"),
            Self::Lock { kind, start, end, .. } => write!(f, "Lock({kind:?}, {start}..={end})"),
            Self::Offset(n) => write!(f, "Offset({n})"),
            Self::Init(n) => n.fmt(f),
        }
    }
}

/// What kernel and mount agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The minor version both speak.
    pub minor: u32,
    /// The flags in force.
    pub flags: u32,
    /// How far the kernel reads ahead, in bytes.
    pub readahead_bytes: u32,
    /// How many requests nobody waits for may be under way.
    pub background_max: u16,
}

/// The kernel's version cannot be spoken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel speaks FUSE {major}.{minor}, at least 7.{} is needed", abi::MINOR_MIN)]
pub struct VersionError {
    /// Its major version.
    pub major: u32,
    /// Its minor version.
    pub minor: u32,
}

/// Whether the kernel may ask for attributes with directory listings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReaddirPlus {
    /// Never.
    Off,
    /// Where it saw the entries being looked at.
    #[default]
    Auto,
}

/// Answers INIT: what is wanted of what the kernel offers. No write-back cache: the kernel would own sizes, times and
/// dirty pages, and giving up a lock would mean to wait for it. No asynchronous direct I/O either: the kernel then waits
/// for a direct read or write in a way that no signal ends, not even the deadly one.
///
/// # Errors
/// The kernel is too old, or of another major version.
pub fn negotiate(offer: &InitOp, plus: ReaddirPlus) -> Result<Negotiated, VersionError> {
    use abi::init::*;
    if offer.major != abi::MAJOR || offer.minor < abi::MINOR_MIN {
        return Err(VersionError { major: offer.major, minor: offer.minor });
    }
    let mut wanted = ASYNC_READ
        | POSIX_LOCKS
        | FLOCK_LOCKS
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | PARALLEL_DIROPS
        | ABORT_ERROR
        | MAX_PAGES
        | HANDLE_KILLPRIV_V2;
    if plus == ReaddirPlus::Auto {
        wanted |= DO_READDIRPLUS | READDIRPLUS_AUTO;
    }
    Ok(Negotiated {
        minor: offer.minor.min(abi::MINOR_MAX),
        flags: wanted & offer.flags,
        readahead_bytes: offer.readahead_bytes_max.min(1 << 20),
        background_max: 64,
    })
}

/// The longest fixed part of a reply: header, entry and open structure of CREATE.
const HEAD_BYTES_MAX: usize = abi::OUT_HEADER_BYTES + 128 + 16;

/// The fixed part of an encoded reply.
pub(crate) struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: usize,
}

impl Head {
    fn new() -> Self {
        Self { bytes: [0; HEAD_BYTES_MAX], len: 0 }
    }
    fn put(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        assert!(end <= HEAD_BYTES_MAX, "no structure of ours is longer than CREATE's");
        self.bytes[self.len..end].copy_from_slice(bytes);
        self.len = end;
    }
    fn u16(&mut self, n: u16) {
        self.put(&n.to_ne_bytes());
    }
    fn u32(&mut self, n: u32) {
        self.put(&n.to_ne_bytes());
    }
    fn u64(&mut self, n: u64) {
        self.put(&n.to_ne_bytes());
    }
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn put_attr(out: &mut Head, a: &Attr) {
    for n in [a.ino, a.size, a.blocks] {
        out.u64(n);
    }
    for (seconds, _) in [a.atime, a.mtime, a.ctime] {
        out.u64(seconds.cast_unsigned());
    }
    for (_, nanos) in [a.atime, a.mtime, a.ctime] {
        out.u32(nanos);
    }
    for n in [a.mode, a.nlink, a.uid, a.gid, a.rdev, a.block_bytes, 0] {
        out.u32(n);
    }
}

fn put_entry(out: &mut Head, e: &Entry) {
    out.u64(e.node);
    out.u64(e.generation);
    out.u64(e.name_ttl.as_secs());
    out.u64(e.attr_ttl.as_secs());
    out.u32(e.name_ttl.subsec_nanos());
    out.u32(e.attr_ttl.subsec_nanos());
    put_attr(out, &e.attr);
}

fn put_opened(out: &mut Head, o: &Opened) {
    let mut flags = 0;
    if o.keep_cache {
        flags |= abi::flag::FOPEN_KEEP_CACHE;
    }
    if o.direct_io {
        flags |= abi::flag::FOPEN_DIRECT_IO;
    }
    out.u64(o.handle.0);
    out.u32(flags);
    out.u32(0);
}

fn put_init(out: &mut Head, n: &Negotiated) {
    out.u32(abi::MAJOR);
    out.u32(n.minor);
    out.u32(n.readahead_bytes);
    out.u32(n.flags);
    out.u16(n.background_max);
    out.u16(n.background_max / 4 * 3); // The kernel counts itself congested from here on.
    out.u32(u32::try_from(abi::DATA_BYTES_MAX).unwrap_or(u32::MAX));
    out.u32(1); // Times are kept in nanoseconds.
    out.u16(u16::try_from(abi::DATA_BYTES_MAX / 4096).unwrap_or(u16::MAX));
    out.u16(0);
    out.put(&[0; 32]); // flags2 and seven unused words.
}

/// Encodes a reply: the fixed part, and the bytes that follow it.
pub(crate) fn encode(unique: Unique, reply: &Reply) -> (Head, &[u8]) {
    let mut out = Head::new();
    out.u32(0); // The length, below.
    let error = if let Reply::Error(errno) = reply { -errno.raw_os_error() } else { 0 };
    out.put(&error.to_ne_bytes());
    out.u64(unique.0);
    let mut tail: &[u8] = &[];
    match reply {
        Reply::Error(_) | Reply::Empty => {}
        Reply::Entry(entry) => put_entry(&mut out, entry),
        Reply::Attr(attr, ttl) => {
            out.u64(ttl.as_secs());
            out.u32(ttl.subsec_nanos());
            out.u32(0);
            put_attr(&mut out, attr);
        }
        Reply::Opened(opened) => put_opened(&mut out, opened),
        Reply::Created(entry, opened) => {
            put_entry(&mut out, entry);
            put_opened(&mut out, opened);
        }
        Reply::Data(data) => tail = data.bytes(),
        Reply::Written(n) | Reply::Size(n) => {
            out.u32(*n);
            out.u32(0);
        }
        Reply::Statfs(s) => {
            for n in [s.blocks, s.blocks_free, s.blocks_available, s.inodes, s.inodes_free] {
                out.u64(n);
            }
            for n in [s.block_bytes, s.name_bytes_max, s.block_bytes, 0] {
                out.u32(n);
            }
            out.put(&[0; 24]);
        }
        Reply::Lock { kind, start, end, pid } => {
            out.u64(*start);
            out.u64(*end);
            out.u32(match kind {
                LockType::Read => 0,
                LockType::Write => 1,
                LockType::Unlock => 2,
            });
            out.u32(*pid);
        }
        Reply::Offset(n) => out.u64(*n),
        Reply::Init(negotiated) => put_init(&mut out, negotiated),
    }
    set_length(&mut out, tail.len());
    (out, tail)
}

fn set_length(out: &mut Head, tail: usize) {
    let len = u32::try_from(out.len + tail).unwrap_or(u32::MAX);
    out.bytes[..4].copy_from_slice(&len.to_ne_bytes());
}

/// Something the kernel should forget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An inode's attributes, and its cached pages from `offset` on. A negative offset leaves the pages.
    Inode {
        /// Which.
        node: u64,
        /// First byte; negative: attributes only, which cannot block.
        offset: i64,
        /// How many bytes; zero: to the end.
        len: i64,
    },
    /// Every name of the mount: each is looked up again before it is used. Never blocks. Linux 6.16.
    Names,
    /// Let go of an inode, if nobody uses it. Linux 6.18.
    Prune {
        /// Which.
        node: u64,
    },
    /// A name. Waits for the directory's lock in the kernel, which an operation that waits for us may hold.
    Name {
        /// In which directory.
        parent: u64,
        /// Which; without NUL.
        name: Vec<u8>,
    },
}

/// Encodes a notice: the fixed part, and the bytes that follow it (a name with its NUL).
pub(crate) fn encode_notice(notice: &Notice) -> (Head, Vec<u8>) {
    let mut out = Head::new();
    let mut tail = Vec::new();
    out.u32(0);
    match notice {
        Notice::Inode { node, offset, len } => {
            out.put(&notice::INVAL_INODE.to_ne_bytes());
            out.u64(0);
            out.u64(*node);
            out.put(&offset.to_ne_bytes());
            out.put(&len.to_ne_bytes());
        }
        Notice::Names => {
            out.put(&notice::INC_EPOCH.to_ne_bytes());
            out.u64(0);
        }
        Notice::Prune { node } => {
            out.put(&notice::PRUNE.to_ne_bytes());
            out.u64(0);
            out.u32(1); // How many nodes follow.
            out.u32(0);
            out.u64(0);
            tail.extend_from_slice(&node.to_ne_bytes());
        }
        Notice::Name { parent, name } => {
            out.put(&notice::INVAL_ENTRY.to_ne_bytes());
            out.u64(0);
            out.u64(*parent);
            out.u32(u32::try_from(name.len()).unwrap_or(u32::MAX));
            out.u32(0);
            tail.extend_from_slice(name);
            tail.push(0);
        }
    }
    set_length(&mut out, tail.len());
    (out, tail)
}

/// What a directory entry is, as `readdir` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirentType(u32);

impl DirentType {
    /// From a mode's type bits.
    #[must_use]
    pub fn from_mode(mode: u32) -> Self {
        Self(mode >> 12 & 0xf)
    }
}

/// The body of a directory listing, up to the size the kernel asked for.
#[derive(Debug)]
pub struct Listing {
    bytes: Vec<u8>,
    room: usize,
}

impl Listing {
    /// An empty one of at most `size` bytes.
    #[must_use]
    pub fn new(size: u32) -> Self {
        let room = usize::try_from(size).unwrap_or(usize::MAX).min(abi::DATA_BYTES_MAX);
        Self { bytes: Vec::with_capacity(room.min(1 << 16)), room }
    }

    /// Adds an entry; `cookie` is where the listing goes on after it. False if it did not fit.
    #[must_use]
    pub fn push(&mut self, ino: u64, cookie: u64, kind: DirentType, name: &[u8]) -> bool {
        self.add(&[], ino, cookie, kind, name)
    }

    /// Whether an entry with attributes and a name of that length would fit. Asked before the lookup, since every
    /// entry that is sent counts as one.
    #[must_use]
    pub fn fits_plus(&self, name: &[u8]) -> bool {
        self.bytes.len() + padded(128 + 24 + name.len()) <= self.room
    }

    /// Adds an entry with attributes. `None` stands for an entry that counts as no lookup (`.`, `..`, one that
    /// vanished). False if it did not fit.
    #[must_use]
    pub fn push_plus(
        &mut self,
        entry: Option<&Entry>,
        ino: u64,
        cookie: u64,
        kind: DirentType,
        name: &[u8],
    ) -> bool {
        let mut head = Head::new();
        match entry {
            Some(entry) => put_entry(&mut head, entry),
            None => head.put(&[0; 128]),
        }
        self.add(head.as_bytes(), ino, cookie, kind, name)
    }

    fn add(&mut self, entry: &[u8], ino: u64, cookie: u64, kind: DirentType, name: &[u8]) -> bool {
        let Ok(name_len) = u32::try_from(name.len()) else { return false };
        let end = self.bytes.len() + padded(entry.len() + 24 + name.len());
        if self.room < end {
            return false;
        }
        self.bytes.extend_from_slice(entry);
        self.bytes.extend_from_slice(&ino.to_ne_bytes());
        self.bytes.extend_from_slice(&cookie.to_ne_bytes());
        self.bytes.extend_from_slice(&name_len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.0.to_ne_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    /// The body.
    #[must_use]
    pub fn into_reply(self) -> Reply {
        Reply::data(self.bytes)
    }
}

/// Entries start at multiples of 8 bytes.
fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(reply: &Reply) -> usize {
        let (head, tail) = encode(Unique(1), reply);
        let announced = u32::from_ne_bytes(head.as_bytes()[..4].try_into().unwrap());
        assert_eq!(announced as usize, head.as_bytes().len() + tail.len());
        announced as usize - abi::OUT_HEADER_BYTES
    }

    fn entry() -> Entry {
        let second = Duration::from_secs(1);
        Entry { node: 5, generation: 1, name_ttl: second, attr_ttl: second, attr: Attr::default() }
    }

    #[test]
    fn every_reply_has_the_length_of_the_kernels_structure() {
        let opened = Opened { handle: Handle(1), keep_cache: true, direct_io: false };
        assert_eq!(length(&Reply::Empty), 0);
        assert_eq!(length(&Reply::Error(Errno::INTR)), 0);
        assert_eq!(length(&Reply::Entry(entry())), 128);
        assert_eq!(length(&Reply::Attr(Attr::default(), Duration::ZERO)), 104);
        assert_eq!(length(&Reply::Opened(opened)), 16);
        assert_eq!(length(&Reply::Created(entry(), opened)), 144);
        assert_eq!(length(&Reply::data(vec![0; 7])), 7);
        assert_eq!(length(&Reply::Written(7)), 8);
        assert_eq!(length(&Reply::Statfs(Statfs::default())), 80);
        assert_eq!(length(&Reply::Lock { kind: LockType::Read, start: 0, end: 1, pid: 2 }), 24);
        assert_eq!(length(&Reply::Offset(7)), 8);
        let offer = InitOp { major: 7, minor: 45, readahead_bytes_max: 131_072, flags: u32::MAX };
        assert_eq!(length(&Reply::Init(negotiate(&offer, ReaddirPlus::Auto).unwrap())), 64);
    }

    #[test]
    fn an_error_is_negative_and_carries_the_request() {
        let (head, _) = encode(Unique(77), &Reply::Error(Errno::INTR));
        assert_eq!(head.as_bytes()[4..8], (-4_i32).to_ne_bytes());
        assert_eq!(head.as_bytes()[8..16], 77_u64.to_ne_bytes());
    }

    #[test]
    fn notices_have_the_kernels_layout() {
        let (head, tail) = encode_notice(&Notice::Inode { node: 9, offset: -1, len: 0 });
        assert_eq!((head.as_bytes().len(), tail.len()), (40, 0));
        let (head, tail) = encode_notice(&Notice::Name { parent: 1, name: b"abc".to_vec() });
        assert_eq!((head.as_bytes().len(), &tail[..]), (32, &b"abc\0"[..]));
        assert_eq!(head.as_bytes()[..4], 36_u32.to_ne_bytes());
    }

    #[test]
    fn an_old_kernel_is_refused_and_a_newer_one_answered_with_our_version() {
        let offer = |major, minor| InitOp { major, minor, readahead_bytes_max: 0, flags: 0 };
        assert!(negotiate(&offer(7, 27), ReaddirPlus::Off).is_err());
        assert!(negotiate(&offer(8, 50), ReaddirPlus::Off).is_err());
        assert_eq!(negotiate(&offer(7, 45), ReaddirPlus::Off).unwrap().minor, 38);
        assert_eq!(negotiate(&offer(7, 31), ReaddirPlus::Off).unwrap().minor, 31);
    }

    #[test]
    fn nothing_is_negotiated_that_was_not_offered_and_never_the_writeback_cache() {
        let offer = |flags| InitOp { major: 7, minor: 38, readahead_bytes_max: 0, flags };
        assert_eq!(negotiate(&offer(0), ReaddirPlus::Auto).unwrap().flags, 0);
        let all = negotiate(&offer(u32::MAX), ReaddirPlus::Auto).unwrap().flags;
        assert_eq!(all & 1 << 16, 0);
        assert_ne!(all & abi::init::FLOCK_LOCKS, 0);
    }

    #[test]
    fn a_listing_never_exceeds_what_was_asked_for() {
        let mut listing = Listing::new(64);
        let kind = DirentType::from_mode(0o100_644);
        assert!(listing.push(1, 1, kind, b"eight888"));
        assert!(listing.push(2, 2, kind, b"x"));
        assert!(!listing.push(3, 3, kind, b"y"));
        assert!(!listing.fits_plus(b"y"));
        assert_eq!(listing.bytes.len(), 64);
        assert_eq!(listing.bytes[20..24], 8_u32.to_ne_bytes());
    }
}
