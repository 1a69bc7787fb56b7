//! What the tests share: a runtime, devices that die, managers, directories and the real tools.

use quorate_clvm::{ClusterVolumes, NamedDevice, VolumesConfig};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager as _, Lockspace, LockspaceOptions};
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use quorate_membership::{BoxFuture, Instant, Runtime};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// tokio as the runtime. No timers: volumes need none.
pub(crate) struct Tokio;

impl Runtime for Tokio {
    fn now(&self) -> Instant {
        Instant(0)
    }
    fn sleep_until(&self, _: Instant) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(tokio::spawn(task));
    }
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(work)
}

/// A memory device that can be looked into from outside.
#[derive(Clone, Debug)]
pub(crate) struct Memory(pub(crate) Arc<MemoryDevice>);

/// Steps (writes and flushes) that are left before all devices fail; shared by the devices of one machine.
#[derive(Clone, Debug)]
pub(crate) struct Fuse(Arc<AtomicU64>);

impl Fuse {
    pub(crate) fn new(steps: u64) -> Self {
        Self(Arc::new(AtomicU64::new(steps)))
    }

    pub(crate) fn left(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, steps: u64) {
        self.0.store(steps, Ordering::SeqCst);
    }

    fn burn(&self) -> Result<(), IoError> {
        let left = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        left.map(|_| ())
            .map_err(|_| IoError::Failed { offset: 0, detail: "the machine has crashed".to_owned() })
    }
}

/// A memory device with a fuse.
#[derive(Clone, Debug)]
pub(crate) struct Fused(pub(crate) Memory, pub(crate) Fuse);

impl BlockDevice for Fused {
    fn geometry(&self) -> Geometry {
        self.0.0.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        self.0.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.1.burn()?;
        self.0.0.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.1.burn()?;
        self.0.0.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.1.burn()?;
        self.0.0.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.1.burn()?;
        self.0.0.write_zeroes(offset, len, flags).await
    }
}

/// A memory device that lets others run before each request, so that work of several nodes is mixed.
#[derive(Clone, Debug)]
struct Yielding(Memory);

impl BlockDevice for Yielding {
    fn geometry(&self) -> Geometry {
        self.0.0.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        tokio::task::yield_now().await;
        self.0.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        tokio::task::yield_now().await;
        self.0.0.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        tokio::task::yield_now().await;
        self.0.0.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        tokio::task::yield_now().await;
        self.0.0.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        tokio::task::yield_now().await;
        self.0.0.write_zeroes(offset, len, flags).await
    }
}

pub(crate) fn yielding(name: &str, memory: &Memory) -> NamedDevice {
    NamedDevice { name: name.to_owned(), device: Device::new(Yielding(memory.clone())) }
}

pub(crate) fn memory(mib: u64) -> Memory {
    Memory(Arc::new(MemoryDevice::new(mib << 20)))
}

pub(crate) fn fused(name: &str, memory: &Memory, fuse: &Fuse) -> NamedDevice {
    NamedDevice { name: name.to_owned(), device: Device::new(Fused(memory.clone(), fuse.clone())) }
}

pub(crate) fn named(name: &str, memory: &Memory) -> NamedDevice {
    fused(name, memory, &Fuse::new(u64::MAX))
}

pub(crate) async fn lockspace(manager: &LocalManager) -> Arc<dyn Lockspace> {
    manager.join(&LockspaceOptions::plain("clvm")).await.expect("joined")
}

pub(crate) async fn manager(locks: &LocalManager, devices: Vec<NamedDevice>) -> ClusterVolumes {
    let config = VolumesConfig::new("testhost", || 1_700_000_000);
    ClusterVolumes::new(lockspace(locks).await, Arc::new(Tokio), devices, config)
}

/// A directory of its own, removed at the end.
pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("quorate-{test}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a fresh directory");
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether a tool is there; a missing one skips the test by name.
pub(crate) fn has_tool(test: &str, tool: &str) -> bool {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|d| Path::new(d).join(tool).exists());
    if !found {
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{tool} is not installed");
        println!("SKIP: {test}: {tool} is not installed");
    }
    found
}

/// Runs an LVM2 command with a configuration of its own.
pub(crate) fn lvm(dir: &Dir, args: &[&str]) -> Output {
    Command::new(args[0])
        .args(&args[1..])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LVM_SYSTEM_DIR", dir.0.join("lvm"))
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .output()
        .expect("it runs")
}

/// Runs an LVM2 command that must succeed; gives its output.
pub(crate) fn lvm_ok(dir: &Dir, args: &[&str]) -> String {
    let output = lvm(dir, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}\n{text}\n{error}", output.status);
    text
}
