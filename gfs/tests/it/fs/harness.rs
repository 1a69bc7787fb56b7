//! Several nodes in one process over one device in memory and one lock table; and judges of the image they leave.

use crate::tools::{TempDir, fsck_gfs2, tool};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockspaceOptions, Mode};
use quorate_gfs::FsError;
use quorate_gfs::face::{Credentials, Entry, Filesystem, Ino};
use quorate_gfs::format::Timestamp;
use quorate_gfs::fs::{Gfs, MountOptions};
use quorate_gfs::mkfs::{MkfsOptions, mkfs};
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use quorate_membership::{BoxFuture, Instant, Lease, Runtime};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// tokio's runtime as ours.
pub(crate) struct TestRuntime {
    start: tokio::time::Instant,
}

impl TestRuntime {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { start: tokio::time::Instant::now() })
    }
}

impl Runtime for TestRuntime {
    fn now(&self) -> Instant {
        Instant(self.start.elapsed().as_nanos() as u64)
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep_until(self.start + std::time::Duration::from_nanos(at.0)))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(tokio::spawn(task));
    }
}

/// A device in memory that several nodes share, and that lets others run at every request.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) memory: Arc<MemoryDevice>,
    pub(crate) writes: Arc<AtomicU64>,
    pub(crate) flushes: Arc<AtomicU64>,
}

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let memory = Arc::new(MemoryDevice::from_bytes(bytes));
        Self { memory, writes: Arc::default(), flushes: Arc::default() }
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        tokio::task::yield_now().await;
        self.memory.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        self.memory.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        self.memory.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.memory.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.memory.write_zeroes(offset, len, flags).await
    }
}

/// What a node may do with the device: a fenced one nothing.
#[derive(Clone)]
struct Fence {
    disk: Disk,
    fenced: Arc<AtomicBool>,
    /// So many writes more, then it is fenced.
    writes_left: Arc<AtomicU64>,
}

impl Fence {
    fn check(&self) -> Result<(), IoError> {
        if self.fenced.load(Ordering::Acquire) {
            return Err(IoError::Fenced { detail: "test".into() });
        }
        Ok(())
    }
}

impl BlockDevice for Fence {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        self.check()?;
        self.disk.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.check()?;
        let left = &self.writes_left;
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            self.fenced.store(true, Ordering::Release);
            self.check()?;
        }
        self.disk.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.check()?;
        self.disk.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check()?;
        self.disk.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.check()?;
        self.disk.write_zeroes(offset, len, flags).await
    }
}

/// A node with the filesystem mounted.
pub(crate) struct Node {
    pub(crate) gfs: Gfs,
    pub(crate) manager: LocalManager,
    fenced: Arc<AtomicBool>,
    writes_left: Arc<AtomicU64>,
}

impl Node {
    pub(crate) async fn mount(disk: &Disk, manager: &LocalManager, journal: u32) -> Self {
        Self::mount_with(disk, manager, MountOptions::new(journal)).await
    }

    pub(crate) async fn mount_with(disk: &Disk, manager: &LocalManager, options: MountOptions) -> Self {
        let lock_options = LockspaceOptions { holds: Some(Mode::EX), ..LockspaceOptions::plain("fs") };
        let lockspace = manager.join(&lock_options).await.unwrap();
        let fenced = Arc::new(AtomicBool::new(false));
        let writes_left = Arc::new(AtomicU64::new(u64::MAX));
        let fence = Fence { disk: disk.clone(), fenced: fenced.clone(), writes_left: writes_left.clone() };
        let device = Device::new(fence);
        let gfs = Gfs::mount(device, lockspace, TestRuntime::new(), Lease::forever(), options).await;
        Self { gfs: gfs.unwrap(), manager: manager.clone(), fenced, writes_left }
    }

    /// The node is fenced from the device at the write after the next `count`.
    pub(crate) fn fence_after(&self, count: u64) {
        self.writes_left.store(count, Ordering::Relaxed);
    }

    /// The node dies: it is fenced from the device, and its locks end.
    pub(crate) fn kill(&self) {
        self.fenced.store(true, Ordering::Release);
        self.gfs.withdraw("killed by the test");
        self.manager.crash();
    }
}

/// Nodes 1 to `count` over a fresh filesystem with as many journals.
pub(crate) async fn cluster(size_bytes: u64, count: u32) -> (Disk, Vec<Node>) {
    let disk = formatted(size_bytes, count).await;
    let mut nodes = Vec::new();
    for (journal, manager) in LocalManager::shared(count).iter().enumerate() {
        nodes.push(Node::mount(&disk, manager, journal as u32).await);
    }
    (disk, nodes)
}

pub(crate) async fn formatted(size_bytes: u64, journals: u32) -> Disk {
    let disk = Disk::new(vec![0; size_bytes as usize]);
    let mut options = MkfsOptions::new(journals);
    options.journal_bytes = 8 << 20;
    options.now = Timestamp { sec: 1_000_000, nsec: 0 };
    mkfs(&disk, &options).await.unwrap();
    disk
}

/// A filesystem for one process alone.
pub(crate) async fn formatted_alone(size_bytes: u64) -> Disk {
    let disk = Disk::new(vec![0; size_bytes as usize]);
    let mut options = MkfsOptions::new(1);
    options.journal_bytes = 8 << 20;
    options.now = Timestamp { sec: 1_000_000, nsec: 0 };
    (options.lock_proto, options.lock_table) = ("lock_nolock".into(), String::new());
    mkfs(&disk, &options).await.unwrap();
    disk
}

/// Runs a test on two threads, and ends it if it hangs.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(std::time::Duration::from_secs(120), test).await.expect("the test hangs")
    })
}

/// Has fsck.gfs2 look at an image; what it says must be nothing but what `allowed` accepts.
pub(crate) fn judge(test: &str, bytes: &[u8]) {
    let ours =
        crate::tools::block_on_anywhere(quorate_gfs::fsck::fsck(MemoryDevice::from_bytes(bytes.to_vec())));
    let report = ours.expect("the image can be read");
    assert!(report.is_clean(), "{test}: our fsck finds {:#?}", report.problems);
    let Some(fsck) = tool(test, "fsck.gfs2") else { return };
    let dir = TempDir::new();
    let image = dir.path("image");
    std::fs::write(&image, bytes).unwrap();
    let (code, text) = fsck_gfs2(&fsck, &image);
    if code != 0 {
        let kept = std::env::temp_dir().join(format!("quorate-gfs-bad-{test}.img"));
        std::fs::write(&kept, bytes).unwrap();
        panic!("{test}: fsck.gfs2 exits with {code} (image kept as {})\n{text}", kept.display());
    }
}

/// As [`judge`], for an image that crashed and was replayed, mounted and unmounted.
///
/// A crash may leave a dinode without a name in between of two transactions (gfs2.md 9.4), but we make both in one.
pub(crate) fn judge_after_crash(test: &str, bytes: &[u8]) {
    judge(test, bytes);
}

/// Short forms of the operations, as a user of uid 1000.
pub(crate) struct User<'a>(pub(crate) &'a Gfs);

pub(crate) fn cred() -> Credentials {
    Credentials { uid: 1000, gid: 100, groups: Vec::new(), pid: 1 }
}

impl User<'_> {
    pub(crate) fn root(&self) -> Ino {
        self.0.root()
    }
    pub(crate) async fn walk(&self, path: &str) -> Result<Ino, FsError> {
        let mut at = self.root();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            at = self.0.lookup(cred(), at, name.into()).await?.attr.ino;
        }
        Ok(at)
    }
    pub(crate) async fn create(&self, dir: Ino, name: &str) -> Result<Ino, FsError> {
        let (entry, handle) = self.0.create(cred(), dir, name.into(), 0o644, true).await?;
        self.0.release(entry.attr.ino, handle, None).await?;
        Ok(entry.attr.ino)
    }
    pub(crate) async fn mkdir(&self, dir: Ino, name: &str) -> Result<Ino, FsError> {
        Ok(self.0.mkdir(cred(), dir, name.into(), 0o755).await?.attr.ino)
    }
    pub(crate) async fn write(&self, ino: Ino, offset: u64, data: &[u8]) -> Result<u32, FsError> {
        self.0.write(ino, offset, data.to_vec(), false, false).await
    }
    pub(crate) async fn append(&self, ino: Ino, data: &[u8]) -> Result<u32, FsError> {
        self.0.write(ino, 0, data.to_vec(), true, false).await
    }
    pub(crate) async fn read(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let size = self.stat(ino).await?.attr.size;
        self.0.read(ino, 0, u32::try_from(size).unwrap()).await
    }
    pub(crate) async fn stat(&self, ino: Ino) -> Result<Entry, FsError> {
        self.0.getattr(ino).await
    }
    pub(crate) async fn names(&self, dir: Ino) -> Result<Vec<String>, FsError> {
        let mut names = Vec::new();
        let mut cookie = 0;
        loop {
            let entries = self.0.readdir(dir, cookie, 50).await?;
            let Some(last) = entries.last() else { break };
            cookie = last.cookie;
            names.extend(entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()));
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}
