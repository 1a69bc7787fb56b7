//! What the tests share: temporary directories, real tools that judge our images, and an executor.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is removed at the end of the test.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("quorate-gfs-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where a tool is, or `None` after saying that the test is skipped for want of it.
pub(crate) fn tool(test: &str, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = dirs.map(|dir: PathBuf| dir.join(name)).find(|path| path.is_file());
    if found.is_none() {
        assert!(
            std::env::var_os("QUORATE_NO_SKIP").is_none_or(|v| v != "1"),
            "{test}: {name} is not installed"
        );
        eprintln!("SKIP: {test}: {name} is not installed");
    }
    found
}

/// Runs a future to its end.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Runs a future that waits for nothing outside, also from within a runtime.
pub(crate) fn block_on_anywhere<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

/// A sparse file.
pub(crate) fn sparse(path: &Path, bytes: u64) {
    std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
}

/// Runs a tool and gives all it said.
pub(crate) fn run(tool: &Path, args: &[&str]) -> (Output, String) {
    let output = Command::new(tool).args(args).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

/// Makes an image with mkfs.gfs2.
pub(crate) fn mkfs_gfs2(tool: &Path, image: &Path, args: &[&str]) {
    let mut all = vec!["-O", "-K", "-q"];
    all.extend(args);
    all.push(image.to_str().unwrap());
    let (output, text) = run(tool, &all);
    assert!(output.status.success(), "{text}");
}

/// What `fsck.gfs2 -n` says of an image: its exit code and its output.
pub(crate) fn fsck_gfs2(tool: &Path, image: &Path) -> (i32, String) {
    let (output, text) = run(tool, &["-n", image.to_str().unwrap()]);
    (output.status.code().unwrap_or(-1), text)
}
