//! A GFS2 filesystem in memory: made, mounted by two nodes of one process, written by one and read by the other.
//!
//! `cargo run --example gfs` prints what the second node reads.

use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockspaceOptions};
use quorate_gfs::face::{Credentials, Filesystem};
use quorate_gfs::fs::{Gfs, MountOptions};
use quorate_gfs::mkfs::{MkfsOptions, mkfs};
use quorate_gnbd::{Device, MemoryDevice};
use quorate_membership::Lease;
use quorate_membership::driver::TokioRuntime;
use std::error::Error;
use std::sync::Arc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::new(MemoryDevice::new(256 << 20));
    let mut options = MkfsOptions::new(2);
    options.lock_proto = "lock_dlm".into();
    options.lock_table = "example:shared".into();
    mkfs(&device, &options).await?;

    let mut nodes = Vec::new();
    for (journal, locks) in (0..).zip(LocalManager::shared(2)) {
        let lockspace = locks.join(&LockspaceOptions::plain("gfs:shared")).await?;
        let runtime = Arc::new(TokioRuntime::current());
        let options = MountOptions::new(journal);
        nodes.push(Gfs::mount(device.clone(), lockspace, runtime, Lease::forever(), options).await?);
    }
    let [one, two] = &nodes[..] else { return Err("two nodes were mounted".into()) };

    let me = Credentials::default();
    let (entry, handle) = one.create(me.clone(), one.root(), b"greeting".to_vec(), 0o644, true).await?;
    one.write(entry.attr.ino, 0, b"hello from node one\n".to_vec(), false, false).await?;
    one.release(entry.attr.ino, handle, None).await?;
    one.forget(entry.attr.ino, 1);

    // No fsync in between: the lock's hand-over is what makes it visible.
    let found = two.lookup(me, two.root(), b"greeting".to_vec()).await?;
    let text = two.read(found.attr.ino, 0, 4096).await?;
    print!("node two reads: {}", String::from_utf8_lossy(&text));
    two.forget(found.attr.ino, 1);
    for node in &nodes {
        node.unmount().await?;
    }
    Ok(())
}
