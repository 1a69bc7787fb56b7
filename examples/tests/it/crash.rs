//! The storage's image, snapshotted at random moments while three node processes work on it: each snapshot must replay and
//! pass both checkers.

use crate::cluster::{Cluster, Temp, one_at_a_time, signal};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockspaceOptions, Mode};
use quorate_gfs::fs::{Gfs, MountOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use quorate_membership::driver::TokioRuntime;
use quorate_membership::{Lease, Rng};
use rustix::process::Signal;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How many snapshots are taken.
const SNAPSHOTS: u64 = 5;

/// Copies `len` bytes at `offset`, zeros as holes.
fn copy_sparse(from: &Path, offset: u64, len: u64, to: &Path) {
    let (mut from, mut to) = (File::open(from).unwrap(), File::create(to).unwrap());
    to.set_len(len).unwrap();
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = usize::try_from((len - at).min(buf.len() as u64)).unwrap();
        from.seek(SeekFrom::Start(offset + at)).unwrap();
        from.read_exact(&mut buf[..part]).unwrap();
        if buf[..part].iter().any(|b| *b != 0) {
            to.seek(SeekFrom::Start(at)).unwrap();
            to.write_all(&buf[..part]).unwrap();
        }
        at += part as u64;
    }
}

/// Replays every journal as the only user, reads what was acknowledged, unmounts, and has both checkers look.
fn judge(volume: &Path, acknowledged: &[(String, u64)]) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let device = Device::new(FileDevice::open(volume, FileOptions::server()).unwrap());
        let manager = LocalManager::new();
        let options = LockspaceOptions { holds: Some(Mode::EX), ..LockspaceOptions::plain("fs") };
        let lockspace = manager.join(&options).await.unwrap();
        let options = MountOptions { recover_all: true, ..MountOptions::new(0) };
        let gfs = Gfs::mount(
            device.clone(),
            lockspace,
            Arc::new(TokioRuntime::current()),
            Lease::forever(),
            options,
        )
        .await
        .unwrap();
        for (name, count) in acknowledged {
            use quorate_gfs::face::{Credentials, Filesystem};
            let cred = Credentials { uid: 0, gid: 0, groups: Vec::new(), pid: 1 };
            let entry = gfs.lookup(cred, gfs.root(), name.as_str().into()).await;
            let size = entry.unwrap_or_else(|e| panic!("{name}: {e}")).attr.size;
            assert!(count * 64 <= size, "{name}: {count} records were acknowledged, {size} bytes are there");
        }
        gfs.unmount().await.unwrap();
        drop(gfs);
        let report = quorate_gfs::fsck::fsck(device).await.unwrap();
        assert!(report.is_clean(), "{:#?}", report.problems);
    });
    match Command::new("/usr/sbin/fsck.gfs2").arg("-n").arg(volume).output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
        Err(_) => {
            assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "fsck.gfs2 is not installed");
            println!("SKIP: crash snapshots under fsck.gfs2 -n: gfs2-utils is not installed");
        }
    }
}

#[test]
fn snapshots_of_the_image_under_three_working_nodes_replay_and_are_clean() {
    snapshots(|id| format!("/d-{id}"));
}

/// Every change is a change of the same directory, so its lock and those of its groups go round all the time.
#[test]
fn snapshots_of_the_image_under_three_nodes_in_one_directory_replay_and_are_clean() {
    snapshots(|_| String::new());
}

/// `home` is the directory in which a node makes its files.
fn snapshots(home: fn(u32) -> String) {
    let _one = one_at_a_time();
    let mut cluster = Cluster::running(3, "");
    cluster.mount_everywhere(3);
    let cluster = Arc::new(cluster);
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Vec<Arc<AtomicU64>> = (0..3).map(|_| Arc::default()).collect();
    let workers: Vec<_> = (1..=3_u32)
        .map(|id| {
            let (cluster, stop) = (Arc::clone(&cluster), Arc::clone(&stop));
            let count = Arc::clone(&counts[id as usize - 1]);
            std::thread::spawn(move || work(&cluster, id, &home(id), &stop, &count))
        })
        .collect();
    let image = cluster.temp.0.join("shared.img");
    let scratch = Temp::new();
    // The server has the image to itself, so the volume's place is read from a copy.
    let whole = scratch.0.join("whole");
    signal(cluster.pid("storage"), Signal::STOP);
    copy_sparse(&image, 0, crate::cluster::IMAGE_BYTES, &whole);
    signal(cluster.pid("storage"), Signal::CONT);
    let (offset, len) = quorate::volume::linear_place(&whole, "vg0", "lv0").unwrap();
    std::fs::remove_file(&whole).unwrap();
    let mut rng = Rng::new(11);
    let mut last = 0;
    for number in 0..SNAPSHOTS {
        // A random distance in acknowledged records, so that the moment is no round one.
        let total = || counts.iter().map(|c| c.load(Ordering::SeqCst)).sum::<u64>();
        let wanted = last + 5 + rng.below(40);
        crate::cluster::wait_for("the workers", || (wanted <= total()).then_some(()));
        // While the server is stopped nothing reaches the image: the copy is of one moment. What is acknowledged before
        // the stop is known to be durable.
        let acknowledged: Vec<(String, u64)> = counts
            .iter()
            .zip(1..)
            .map(|(c, id)| (format!("log-{id}"), c.load(Ordering::SeqCst)))
            .filter(|(_, count)| 0 < *count)
            .collect();
        signal(cluster.pid("storage"), Signal::STOP);
        let volume = scratch.0.join(format!("snapshot-{number}"));
        copy_sparse(&image, offset, len, &volume);
        signal(cluster.pid("storage"), Signal::CONT);
        last = total();
        judge(&volume, &acknowledged);
        std::fs::remove_file(&volume).unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.join().unwrap();
    }
}

/// Appends with fsync, and makes, renames and removes files beside it.
fn work(cluster: &Cluster, id: u32, home: &str, stop: &AtomicBool, acknowledged: &AtomicU64) {
    use quorate::admin::client::Client;
    use quorate::admin::protocol::FileOperation;
    let mut client = Client::connect(&cluster.socket(id)).unwrap();
    let mut rng = Rng::new(u64::from(id));
    let mut number = 0_u64;
    if !home.is_empty() {
        client.file("data", FileOperation::MakeDir(home.to_owned())).unwrap();
    }
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let write =
            |path: String, data: Vec<u8>, sync| FileOperation::Write { path, offset: None, data, sync };
        client.file("data", write(format!("/log-{id}"), vec![b'a' + id as u8; 64], true)).unwrap();
        acknowledged.fetch_add(1, Ordering::SeqCst);
        let name = format!("{home}/f-{id}-{}", rng.below(8));
        let len = usize::try_from(rng.below(100_000)).unwrap();
        client.file("data", write(name.clone(), vec![number as u8; len], false)).unwrap();
        match rng.below(4) {
            0 => drop(client.file("data", FileOperation::Remove(name)).unwrap()),
            1 => drop(client.file("data", FileOperation::Rename(name, format!("{home}/r-{id}"))).unwrap()),
            2 => drop(
                client
                    .file("data", FileOperation::Truncate { path: name, bytes: rng.below(50_000) })
                    .unwrap(),
            ),
            _ => (),
        }
    }
}
