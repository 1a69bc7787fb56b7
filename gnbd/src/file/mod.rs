//! A regular file or a block device of this host as a [`BlockDevice`], under an exclusive lock.

mod pool;

use crate::{BlockDevice, Buf, Geometry, IoError, WriteFlags, ZeroFlags};
use pool::Pool;
use rustix::fs::{FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most bytes of one transfer: what NBD assumes where nothing was said.
const TRANSFER_BYTES_MAX: u32 = 32 << 20;

/// Zeros are written in pieces of this size where the file system cannot make holes.
const ZERO_PIECE_BYTES: u64 = 1 << 20;

/// How to open a [`FileDevice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Open for reading only; the lock is then shared with other readers.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT). Blocks are then as large as the file system or the disk wants them.
    pub direct: bool,
    /// System calls at one time, 1 to 256. More help disks that are fast at random access.
    pub threads_max: usize,
}

impl FileOptions {
    /// What a storage server uses: read-write through the page cache, 16 calls at a time.
    #[must_use]
    pub fn server() -> Self {
        Self { read_only: false, direct: false, threads_max: 16 }
    }
}

/// Why a file could not become a device. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileOpenError {
    /// The system said no.
    #[error("cannot open {path}: {detail}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// Another process, another export of this one, or the kernel (a mount, a device on top) has it (R10).
    #[error("{path} is in use: another process or export holds the lock on it", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A directory, a pipe or the like.
    #[error("{path} is neither a regular file nor a block device", path = path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
}

/// A file or block device.
///
/// The lock on it is held until the device is dropped and every system call on it has returned (R10).
#[derive(Debug)]
pub struct FileDevice {
    file: Arc<Backing>,
    pool: Pool,
    geometry: Geometry,
}

#[derive(Debug)]
struct Backing {
    // Closing it releases the lock. Every job has an `Arc` of this, so the last job outlived by nothing closes it.
    fd: OwnedFd,
}

impl FileDevice {
    /// Opens a file or block device and locks it.
    ///
    /// # Errors
    /// See [`FileOpenError`].
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, FileOpenError> {
        let fail = |e: Errno| FileOpenError::Open { path: path.into(), detail: e.to_string() };
        let mut flags = OFlags::CLOEXEC | if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        let is_block =
            |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        if !options.read_only && rustix::fs::stat(path).is_ok_and(is_block) {
            // As the kernel claims it for a mount: neither of the two then gets it beside the other.
            flags |= OFlags::EXCL;
        }
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::BUSY) => return Err(FileOpenError::InUse { path: path.into() }),
            other => other.map_err(fail)?,
        };
        let stat = rustix::fs::fstat(&fd).map_err(fail)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(FileOpenError::Kind { path: path.into() });
        }
        let lock = if options.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&fd, lock) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(FileOpenError::InUse { path: path.into() }),
            Err(e) => return Err(fail(e)),
        }
        let block = match (kind, options.direct) {
            (FileType::BlockDevice, _) => rustix::fs::ioctl_blksszget(&fd).map_err(fail)?,
            // The file system's own block is always enough for direct I/O; asking for less is not worth a failed write.
            (_, true) => u32::try_from(stat.st_blksize).unwrap_or(4096).clamp(512, 65536),
            (_, false) => 1,
        };
        let end = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(fail)?;
        let geometry = Geometry {
            size_bytes: end - end % u64::from(block),
            block_bytes: block,
            preferred_bytes: block.max(4096),
            transfer_bytes_max: TRANSFER_BYTES_MAX,
            read_only: options.read_only,
            can_discard: true,
        };
        let pool = Pool::new(options.threads_max.clamp(1, 256));
        Ok(Self { file: Arc::new(Backing { fd }), pool, geometry })
    }

    async fn run<T: Send + 'static>(
        &self,
        offset: u64,
        job: impl FnOnce(&OwnedFd) -> Result<T, IoError> + Send + 'static,
    ) -> Result<T, IoError> {
        let file = Arc::clone(&self.file);
        let told = self.pool.run(move || {
            let result = job(&file.fd);
            // Before anybody hears of the result: whoever waits for it may rely on the file being free.
            drop(file);
            result
        });
        told.await.unwrap_or_else(|_| Err(IoError::Failed { offset, detail: "no thread for it".into() }))
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), IoError> {
        if self.geometry.read_only {
            return Err(IoError::ReadOnly);
        }
        self.geometry.check(offset, len)
    }
}

fn error_at(offset: u64, e: Errno) -> IoError {
    match e {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => IoError::NoSpace,
        Errno::ROFS => IoError::ReadOnly,
        e => IoError::Failed { offset, detail: e.to_string() },
    }
}

fn read_all(fd: &OwnedFd, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        match rustix::io::pread(fd, &mut buf[done..], at) {
            Ok(0) => {
                return Err(IoError::Failed { offset: at, detail: "the file has become shorter".into() });
            }
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(error_at(at, e)),
        }
    }
    Ok(())
}

fn write_all(fd: &OwnedFd, offset: u64, buf: &[u8]) -> Result<(), IoError> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        match rustix::io::pwrite(fd, &buf[done..], at) {
            Ok(0) => return Err(IoError::Failed { offset: at, detail: "nothing was written".into() }),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(error_at(at, e)),
        }
    }
    Ok(())
}

fn sync(fd: &OwnedFd) -> Result<(), IoError> {
    // Not repeated when interrupted: an error must reach the caller exactly as often as the kernel reports it (R12).
    rustix::fs::fdatasync(fd).map_err(|e| error_at(0, e))
}

fn zero(fd: &OwnedFd, offset: u64, len: u64, no_hole: bool) -> Result<(), IoError> {
    if len == 0 {
        return Ok(());
    }
    let how = if no_hole {
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
    } else {
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
    };
    match rustix::fs::fallocate(fd, how, offset, len) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => {}
        Err(e) => return Err(error_at(offset, e)),
    }
    let piece = Buf::zeroed(len.min(ZERO_PIECE_BYTES) as usize);
    let mut at = offset;
    while at < offset + len {
        let n = piece.len().min((offset + len - at) as usize);
        write_all(fd, at, &piece[..n])?;
        at += n as u64;
    }
    Ok(())
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset: u64, mut buf: Buf) -> Result<Buf, IoError> {
        self.geometry.check(offset, buf.len() as u64)?;
        self.run(offset, move |fd| read_all(fd, offset, &mut buf).map(|()| buf)).await
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.check_write(offset, buf.len() as u64)?;
        self.run(offset, move |fd| {
            write_all(fd, offset, &buf)?;
            if flags.fua {
                sync(fd)?;
            }
            Ok(buf)
        })
        .await
    }

    async fn flush(&self) -> Result<(), IoError> {
        if self.geometry.read_only {
            return Ok(());
        }
        self.run(0, sync).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check_write(offset, len)?;
        self.run(offset, move |fd| {
            if len == 0 {
                return Ok(());
            }
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(fd, how, offset, len) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => Ok(()),
                Err(e) => Err(error_at(offset, e)),
            }
        })
        .await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.check_write(offset, len)?;
        self.run(offset, move |fd| {
            zero(fd, offset, len, flags.no_hole)?;
            if flags.fua { sync(fd) } else { Ok(()) }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Temp(PathBuf);
    impl Temp {
        fn new(name: &str, size: u64) -> Self {
            let path = std::env::temp_dir().join(format!("gnbd-{}-{name}", std::process::id()));
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            Self(path)
        }
    }
    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[tokio::test]
    async fn what_was_written_is_read_zeroed_and_discarded() {
        let temp = Temp::new("rw", 1 << 20);
        for direct in [false, true] {
            let Ok(device) = FileDevice::open(&temp.0, FileOptions { direct, ..FileOptions::server() })
            else {
                assert!(direct, "only direct I/O may be missing");
                continue;
            };
            let data = Buf::copy_of(&[0xa5; 8192]);
            device.write(4096, data, WriteFlags { fua: true }).await.unwrap();
            device.write_zeroes(4096, 4096, ZeroFlags { fua: false, no_hole: true }).await.unwrap();
            device.flush().await.unwrap();
            let back = device.read(4096, Buf::zeroed(8192)).await.unwrap();
            assert!(back[..4096].iter().all(|b| *b == 0) && back[4096..].iter().all(|b| *b == 0xa5));
            device.discard(0, 1 << 20).await.unwrap();
            let past = device.read(1 << 20, Buf::zeroed(4096)).await.unwrap_err();
            assert!(matches!(past, IoError::OutOfRange { .. }), "{past}");
        }
    }

    #[test]
    fn one_backing_is_one_device() {
        let temp = Temp::new("lock", 4096);
        let first = FileDevice::open(&temp.0, FileOptions::server()).unwrap();
        let second = FileDevice::open(&temp.0, FileOptions::server()).unwrap_err();
        assert_eq!(second, FileOpenError::InUse { path: temp.0.clone() });
        drop(first);
        FileDevice::open(&temp.0, FileOptions::server()).unwrap();
    }

    /// R10: whoever opens it next must not meet a write of the one before.
    #[tokio::test]
    async fn the_lock_is_held_until_the_last_system_call_has_returned() {
        let temp = Temp::new("held", 4096);
        let device = FileDevice::open(&temp.0, FileOptions::server()).unwrap();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
        let mut slow = Box::pin(device.run(0, move |fd| {
            begun.send(()).unwrap();
            may_go_on.recv().unwrap();
            write_all(fd, 0, &[1; 512])
        }));
        assert!(futures_util::poll!(&mut slow).is_pending());
        has_begun.recv().unwrap();
        // Given up by whoever asked, and the device with it.
        drop(slow);
        drop(device);
        let again = FileDevice::open(&temp.0, FileOptions::server()).unwrap_err();
        assert_eq!(again, FileOpenError::InUse { path: temp.0.clone() });
        go_on.send(()).unwrap();
        let device = loop {
            match FileDevice::open(&temp.0, FileOptions::server()) {
                Ok(device) => break device,
                Err(FileOpenError::InUse { .. }) => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        };
        assert_eq!(device.read(0, Buf::zeroed(512)).await.unwrap()[..], [1; 512]);
    }

    #[tokio::test]
    async fn zeros_keep_or_free_the_room_as_they_are_told_and_discard_frees_it() {
        use std::os::unix::fs::MetadataExt;
        let temp = Temp::new("room", 1 << 20);
        let device = FileDevice::open(&temp.0, FileOptions::server()).unwrap();
        let room = || std::fs::metadata(&temp.0).unwrap().blocks() * 512;
        device.write(0, Buf::copy_of(&[1; 1 << 20]), WriteFlags { fua: true }).await.unwrap();
        let full = room();
        assert!(1 << 20 <= full);
        device.write_zeroes(0, 1 << 20, ZeroFlags { fua: true, no_hole: true }).await.unwrap();
        assert!(1 << 20 <= room(), "a range without holes stays allocated");
        device.write_zeroes(0, 1 << 19, ZeroFlags { fua: true, no_hole: false }).await.unwrap();
        let half = room();
        device.discard(1 << 19, 1 << 19).await.unwrap();
        // A file system that cannot punch holes writes zeros, and keeps what is discarded.
        if half < full {
            assert!(half <= full - (1 << 19) && room() < half, "{full}, {half}, {}", room());
        }
        assert_eq!(std::fs::metadata(&temp.0).unwrap().len(), 1 << 20, "it never becomes shorter");
    }

    #[test]
    fn a_directory_and_a_missing_file_are_no_devices() {
        let dir = std::env::temp_dir();
        let e = FileDevice::open(&dir, FileOptions { read_only: true, ..FileOptions::server() }).unwrap_err();
        assert_eq!(e, FileOpenError::Kind { path: dir.clone() });
        let e = FileDevice::open(&dir.join("gnbd-none"), FileOptions::server()).unwrap_err();
        assert!(matches!(e, FileOpenError::Open { .. }), "{e}");
    }

    #[tokio::test]
    async fn a_full_file_system_is_no_space() {
        // Stands in for a full disk: files may not grow beyond what the address type of the system allows.
        assert_eq!(error_at(0, Errno::NOSPC), IoError::NoSpace);
        assert_eq!(error_at(0, Errno::DQUOT), IoError::NoSpace);
    }
}
