//! The server process is killed under load, again and again; its clients notice a pause and nothing else.

use crate::cluster_support::*;
use crate::common::*;
use quorate_gnbd::client::NbdDevice;
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};
use quorate_membership::{Epoch, Rng};
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

const DIR: &str = "GNBD_TEST_CHILD_DIR";
const ADDRESS: &str = "GNBD_TEST_CHILD_ADDRESS";
const BLOCK: u64 = 4096;

/// Not a test of its own: what the test below runs as another process.
#[tokio::test(flavor = "multi_thread")]
async fn serve_as_child() {
    let (Some(dir), Ok(address)) = (std::env::var_os(DIR), std::env::var(ADDRESS)) else { return };
    let dir = std::path::PathBuf::from(dir);
    let export = file_export(&dir.join("disk"), "shared", true);
    let pki = dir.join("pki").join("storage");
    let server = start_server(address.parse().unwrap(), &pki, &dir.join("state"), vec![export]).await;
    println!("READY {} {}", server.addresses()[0], server.server_id().unwrap());
    // Until the parent kills this process, or is gone itself.
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await;
}

struct Process {
    child: Child,
    address: SocketAddr,
    id: quorate_membership::ServerId,
}

async fn start(cluster: &Cluster, address: SocketAddr) -> Process {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::serve_as_child", "--nocapture"])
        .env(DIR, &cluster.temp.0)
        .env(ADDRESS, address.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(at) = line.find("READY ") {
                return line[at + 6..].to_owned();
            }
        }
        panic!("the server ended before it was ready");
    };
    let ready = tokio::time::timeout(CEILING, ready).await.unwrap();
    let (address, id) = ready.trim().split_once(' ').unwrap();
    Process { child, address: address.parse().unwrap(), id: id.parse().unwrap() }
}

/// Overwrites its own blocks with growing numbers; returns the last acknowledged number of each.
async fn writer(device: Arc<NbdDevice>, base: u64, stop: Arc<AtomicBool>, work: Arc<AtomicU64>) -> Vec<u64> {
    let mut rng = Rng::new(base);
    let mut last = vec![0; 16];
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let slot = rng.below(16) as usize;
        let mut buf = Buf::zeroed(BLOCK as usize);
        buf.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&(base + number).to_le_bytes()));
        let fua = rng.chance_ppm(50_000);
        device.write((base + slot as u64) * BLOCK, buf, WriteFlags { fua }).await.unwrap();
        last[slot] = base + number;
        if rng.chance_ppm(50_000) {
            device.flush().await.unwrap();
        }
        if rng.chance_ppm(100_000) {
            let back = device.read((base + slot as u64) * BLOCK, Buf::zeroed(BLOCK as usize)).await.unwrap();
            assert_eq!(back[..8], last[slot].to_le_bytes());
        }
        work.fetch_add(1, Ordering::Relaxed);
    }
    device.flush().await.unwrap();
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_under_load_loses_nothing_and_disturbs_nobody() {
    let cluster = Cluster::new();
    cluster.temp.file("disk", 16 << 20);
    let mut server = start(&cluster, local()).await;
    let (address, id) = (server.address, server.id);
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    let one = Arc::new(cluster.member(address, (1, 1)).await.unwrap());
    let two = Arc::new(cluster.member(address, (2, 1)).await.unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let work = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..16_u64)
        .map(|i| {
            let device = Arc::clone(if i % 2 == 0 { &one } else { &two });
            tokio::spawn(writer(device, i * 16, Arc::clone(&stop), Arc::clone(&work)))
        })
        .collect();
    for _ in 0..4 {
        let before = work.load(Ordering::Relaxed);
        let busy = async {
            while work.load(Ordering::Relaxed) < before + 300 {
                assert!(tasks.iter().all(|t| !t.is_finished()), "a writer failed");
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(CEILING, busy).await.expect("work goes on");
        server.child.kill().await.unwrap();
        server = start(&cluster, address).await;
        assert_eq!(server.id, id, "the record survives");
    }
    stop.store(true, Ordering::Relaxed);
    let check = Arc::clone(&one);
    for (i, task) in tasks.into_iter().enumerate() {
        let last = tokio::time::timeout(CEILING, task).await.unwrap().unwrap();
        for (slot, number) in last.into_iter().enumerate().filter(|(_, n)| *n != 0) {
            let at = (i as u64 * 16 + slot as u64) * BLOCK;
            let back = check.read(at, Buf::zeroed(BLOCK as usize)).await.unwrap();
            assert!(back.chunks_exact(8).all(|c| c == number.to_le_bytes()), "writer {i}, slot {slot}");
        }
    }
    // Fenced and killed at once: the confirmed fence holds in the next process.
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let fence = cluster.fence_client(1);
    assert_eq!(fence.install(&entry(address), cluster.chain.all()).await.unwrap(), (id, Epoch(3)));
    server.child.kill().await.unwrap();
    let server = start(&cluster, address).await;
    let e = two.write(0, Buf::zeroed(4096), WriteFlags::default()).await.unwrap_err();
    assert!(matches!(e, quorate_gnbd::IoError::Fenced { .. }), "{e}");
    let status = fence.status(&entry(address)).await.unwrap();
    assert!(status.lives.values().all(|l| l.writes_after_fence == 0));
    assert_eq!(status.epoch, Some(Epoch(3)));
    println!("{} writes acknowledged over 5 kills", work.load(Ordering::Relaxed));
    drop(server);
}
