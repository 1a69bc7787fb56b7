//! The server as the fence, over TLS with certificates of a cluster (R9 to R12).

use crate::cluster_support::*;
use crate::common::*;
use futures_util::future::join_all;
use quorate_fencing::{StorageFence, StorageFenceError};
use quorate_gnbd::client::{ConnectError, NbdDevice, Path};
use quorate_gnbd::fence::wire::{HelloRefusal, InstallError};
use quorate_gnbd::proto::Errno;
use quorate_gnbd::server::Export;
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use quorate_membership::{Epoch, Identity, Incarnation, NodeId, ServerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tokio::sync::Semaphore;

fn who(node: u32, incarnation: u64) -> Identity {
    Identity::new(NodeId(node), Incarnation(incarnation))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_life_is_fenced_for_ever_and_the_others_go_on() {
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![memory(16 << 20)]).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    // Nobody installed the record yet: the first member brings it (R10).
    let one = cluster.member(address, (1, 1)).await.unwrap();
    let two = cluster.member(address, (2, 1)).await.unwrap();
    let load: Vec<_> =
        (0..32_u64).map(|i| two.write(i * 4096, Buf::copy_of(&[2; 4096]), WriteFlags::default())).collect();
    join_all(load).await.into_iter().for_each(|r| drop(r.unwrap()));
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let fence = cluster.fence_client(1);
    let confirmed = fence.install(&entry(address), cluster.chain.all()).await.unwrap();
    assert_eq!(confirmed, (id, Epoch(3)));
    // As the coordinator does it, and again.
    let as_coordinator: &dyn StorageFence = &fence;
    let again = as_coordinator.install(id, &entry(address), cluster.chain.all()).await;
    assert_eq!(again, Ok(Epoch(3)));
    let e = ceiling(two.write(0, Buf::copy_of(&[3; 4096]), WriteFlags::default())).await.unwrap_err();
    assert!(matches!(e, IoError::Fenced { .. }), "{e}");
    let e = ceiling(two.flush()).await.unwrap_err();
    assert!(matches!(e, IoError::Fenced { .. }), "{e}");
    let back = one.read(0, Buf::zeroed(4096)).await.unwrap();
    assert!(back.iter().all(|b| *b == 2));
    let e = cluster.member(address, (2, 1)).await.unwrap_err();
    assert!(matches!(e, ConnectError::Fenced(_)), "{e}");
    let status = fence.status(&entry(address)).await.unwrap();
    let counts = status.lives[&who(2, 1)];
    assert_eq!((status.confirmed, counts.writes_after_fence, counts.writes_applied), (Some(Epoch(3)), 0, 32));
    assert!(2 <= counts.hellos_refused, "{counts:?}");
    // Its next life comes in with the next record, which it brings itself.
    cluster.chain.decide(decision(4, &[(1, 1), (2, 2)], &[id]));
    let two = cluster.member(address, (2, 2)).await.unwrap();
    two.write(0, Buf::copy_of(&[4; 4096]), WriteFlags { fua: true }).await.unwrap();
    drop((one, two));
    assert!(server.shutdown(CEILING).await);
}

/// What a network held up: sent in the name of a life whose fence is confirmed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_held_up_on_an_open_path_is_refused_and_counted() {
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![memory(16 << 20)]).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    let one = cluster.member(address, (1, 1)).await.unwrap();
    let two = cluster.member(address, (2, 1)).await.unwrap();
    let config = cluster.config(address, "n2", (2, 1));
    let mut path = Path::join(&config).await.unwrap();
    assert_eq!(path.write(8192, &[1; 4096]).await.unwrap(), Ok(()), "an open path writes");
    two.write(0, Buf::copy_of(&[2; 4096]), WriteFlags::default()).await.unwrap();
    assert!(two.is_connected(), "the path took nothing from the device");
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let fence = cluster.fence_client(1);
    fence.install(&entry(address), cluster.chain.all()).await.unwrap();
    let late = ceiling(path.write(8192, &[3; 4096])).await.unwrap();
    assert_eq!(late, Err(Errno::Shutdown));
    let counts = fence.status(&entry(address)).await.unwrap().lives[&who(2, 1)];
    assert_eq!((counts.requests_refused, counts.writes_after_fence), (1, 0), "{counts:?}");
    let back = one.read(8192, Buf::zeroed(4096)).await.unwrap();
    assert!(back.iter().all(|b| *b == 1), "nothing of it was applied");
    ceiling(path.close()).await;
    let e = Path::join(&config).await.unwrap_err();
    assert!(matches!(e, ConnectError::Hello(HelloRefusal::NotAdmitted { .. })), "{e}");
    drop((one, two));
    assert!(server.shutdown(CEILING).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_get_a_cluster_export_and_each_only_in_its_own_name() {
    let cluster = Cluster::new();
    let other = Export { name: "open".into(), cluster: false, ..memory(16 << 20) };
    let server = cluster.server(local(), vec![memory(16 << 20), other]).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1)], &[id]));
    // Without hello, and with a certificate that is no node's.
    let mut config = cluster.config(address, "tool", (1, 1));
    let e = NbdDevice::connect(config.clone()).await.unwrap_err();
    assert!(matches!(e, ConnectError::Hello(HelloRefusal::OtherNode(_))), "{e}");
    config.member = None;
    let e = NbdDevice::connect(config.clone()).await.unwrap_err();
    assert!(e.to_string().contains("admitted members"), "{e}");
    config.export = "open".into();
    NbdDevice::connect(config).await.unwrap().flush().await.unwrap();
    // With another node's certificate.
    let e = NbdDevice::connect(cluster.config(address, "n2", (1, 1))).await.unwrap_err();
    assert!(matches!(e, ConnectError::Hello(HelloRefusal::OtherNode(NodeId(2)))), "{e}");
    // Without TLS, and with a certificate of another cluster's CA.
    let mut config = cluster.config(address, "n1", (1, 1));
    config.tls = None;
    let e = NbdDevice::connect(config).await.unwrap_err();
    assert!(e.to_string().contains("TLS"), "{e}");
    let stranger = Cluster::new();
    assert!(NbdDevice::connect(stranger.config(address, "n1", (1, 1))).await.is_err());
    cluster.member(address, (1, 1)).await.unwrap();
    assert!(server.shutdown(CEILING).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_keeps_its_record_over_a_restart_and_is_another_one_without_it() {
    let cluster = Cluster::new();
    let path = cluster.temp.file("disk", 4 << 20);
    let exports = || vec![file_export(&path, "shared", true)];
    let server = cluster.server(local(), exports()).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    let one = cluster.member(address, (1, 1)).await.unwrap();
    one.write(0, Buf::copy_of(&[1; 4096]), WriteFlags::default()).await.unwrap();
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let fence = cluster.fence_client(1);
    fence.install(&entry(address), cluster.chain.all()).await.unwrap();
    assert!(server.shutdown(CEILING).await);
    let server = cluster.server(address, exports()).await;
    assert_eq!(server.server_id(), Some(id));
    let e = cluster.member(address, (2, 1)).await.unwrap_err();
    assert!(matches!(e, ConnectError::Fenced(_)), "{e}");
    ceiling(one.flush()).await.unwrap();
    assert!(server.shutdown(CEILING).await);
    // The record is lost: nobody is served before the new id is enrolled, and I/O waits for that.
    std::fs::remove_file(cluster.state_dir().join("fence")).unwrap();
    let server = cluster.server(address, exports()).await;
    let fresh = server.server_id().unwrap();
    assert_ne!(fresh, id);
    let entry = entry(address);
    let found = StorageFence::install(&fence, id, &entry, cluster.chain.all()).await;
    assert_eq!(found, Err(StorageFenceError::OtherServer { found: fresh, expected: id }));
    let write = one.write(4096, Buf::copy_of(&[5; 4096]), WriteFlags { fua: true });
    let enrol = async {
        cluster.chain.decide(decision(4, &[(1, 1)], &[fresh]));
    };
    ceiling(async { tokio::join!(write, enrol).0 }).await.unwrap();
    assert_eq!(server.status().await.unwrap().epoch, Some(Epoch(4)));
    drop(one);
    assert!(server.shutdown(CEILING).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_is_a_lost_one() {
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![]).await;
    let id = server.server_id();
    assert!(server.shutdown(CEILING).await);
    let path = cluster.state_dir().join("fence");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let server = cluster.server(local(), vec![]).await;
    assert_ne!(server.server_id(), id);
}

/// A device whose writes hang, or whose flush fails, as the test wants it.
struct Odd {
    inner: MemoryDevice,
    free: Semaphore,
    hang: AtomicBool,
    hanging: AtomicU32,
    failing_flushes: AtomicU32,
}

impl Odd {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryDevice::new(1 << 20),
            free: Semaphore::new(0),
            hang: AtomicBool::new(false),
            hanging: AtomicU32::new(0),
            failing_flushes: AtomicU32::new(0),
        })
    }
}

struct Shared(Arc<Odd>);

impl BlockDevice for Shared {
    fn geometry(&self) -> Geometry {
        self.0.inner.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        self.0.inner.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        if self.0.hang.load(Ordering::SeqCst) {
            self.0.hanging.fetch_add(1, Ordering::SeqCst);
            self.0.free.acquire().await.unwrap().forget();
        }
        self.0.inner.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        let fail = |n: u32| n.checked_sub(1);
        if self.0.failing_flushes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fail).is_ok() {
            return Err(IoError::Failed { offset: 0, detail: "the disk lost its cache".into() });
        }
        self.0.inner.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.0.inner.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.0.inner.write_zeroes(offset, len, flags).await
    }
}

async fn odd_cluster(members: &[(u32, u64)]) -> (Cluster, quorate_gnbd::server::Server, Arc<Odd>, ServerId) {
    let cluster = Cluster::new();
    let odd = Odd::new();
    let device = Device::new(Shared(Arc::clone(&odd)));
    let export = Export { name: "shared".into(), description: String::new(), device, cluster: true };
    let server = cluster.server(local(), vec![export]).await;
    let id = server.server_id().unwrap();
    cluster.chain.decide(decision(2, members, &[id]));
    (cluster, server, odd, id)
}

/// R9: a server that cannot drain does not confirm, and the write that hung is not counted as late when it could.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_write_keeps_the_fence_from_being_confirmed() {
    let (cluster, server, odd, id) = odd_cluster(&[(1, 1), (2, 1)]).await;
    let address = server.addresses()[0];
    let two = Arc::new(cluster.member(address, (2, 1)).await.unwrap());
    odd.hang.store(true, Ordering::SeqCst);
    let device = Arc::clone(&two);
    let write =
        tokio::spawn(async move { device.write(0, Buf::copy_of(&[9; 512]), WriteFlags::default()).await });
    ceiling(async {
        while odd.hanging.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let fence = cluster.fence_client(1);
    let undrained = StorageFence::install(&fence, id, &entry(address), cluster.chain.all()).await;
    assert_eq!(undrained, Err(StorageFenceError::Undrained { connections: 1 }));
    odd.free.add_permits(1);
    assert_eq!(StorageFence::install(&fence, id, &entry(address), cluster.chain.all()).await, Ok(Epoch(3)));
    let e = ceiling(write).await.unwrap().unwrap_err();
    assert!(matches!(e, IoError::Fenced { .. }), "{e}");
    let counts = server.status().await.unwrap().lives[&who(2, 1)];
    assert_eq!((counts.writes_applied, counts.writes_after_fence), (1, 0));
    assert!(matches!(
        server.install(vec![decision(9, &[], &[id])]).await,
        Err(InstallError::Gap { installed: Epoch(3) })
    ));
}

/// R11: a device that is opened again in one life is a new generation. A write of the first one that the server still
/// carries out is awaited; it must not come after what the second one wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_opened_again_waits_for_the_writes_of_the_one_before() {
    let (cluster, server, odd, _) = odd_cluster(&[(1, 1)]).await;
    let address = server.addresses()[0];
    // Enrolled already: both devices get in with their first generation.
    server.install(cluster.chain.all()).await.unwrap();
    let first = Arc::new(cluster.member(address, (1, 1)).await.unwrap());
    odd.hang.store(true, Ordering::SeqCst);
    let device = Arc::clone(&first);
    let write =
        tokio::spawn(async move { device.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await });
    ceiling(async {
        while odd.hanging.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    odd.hang.store(false, Ordering::SeqCst);
    write.abort();
    assert!(write.await.unwrap_err().is_cancelled());
    drop(first);
    let mut second = std::pin::pin!(cluster.member(address, (1, 1)));
    // Never ready while the write hangs: the bound only says how long a faulty server is given to show itself.
    let early = tokio::time::timeout(std::time::Duration::from_millis(150), &mut second).await;
    assert!(early.is_err(), "admitted beside a write of the generation before");
    odd.free.add_permits(1);
    let second = ceiling(second).await.unwrap();
    second.write(0, Buf::copy_of(&[2; 512]), WriteFlags::default()).await.unwrap();
    assert!(odd.inner.bytes()[..512].iter().all(|b| *b == 2));
    let counts = server.status().await.unwrap().lives[&who(1, 1)];
    assert_eq!((counts.connections, counts.writes_applied), (4, 2), "two connections each");
}

/// R12: a flush that failed at the server is repaired by the clients, all of them, before anybody is told "durable".
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_sync_every_client_writes_again_what_it_had_not_flushed() {
    let (cluster, server, odd, _) = odd_cluster(&[(1, 1), (2, 1)]).await;
    let address = server.addresses()[0];
    let one = cluster.member(address, (1, 1)).await.unwrap();
    let two = cluster.member(address, (2, 1)).await.unwrap();
    one.write(0, Buf::copy_of(&[1; 4096]), WriteFlags::default()).await.unwrap();
    one.write(2048, Buf::copy_of(&[3; 1024]), WriteFlags::default()).await.unwrap();
    two.write(8192, Buf::copy_of(&[2; 4096]), WriteFlags::default()).await.unwrap();
    odd.failing_flushes.store(1, Ordering::SeqCst);
    // The kernel forgot what it could not write, as kernels do.
    odd.inner.write(0, Buf::zeroed(16384), WriteFlags::default()).await.unwrap();
    ceiling(one.flush()).await.unwrap();
    ceiling(two.flush()).await.unwrap();
    let bytes = odd.inner.crashed(None);
    assert!(bytes[..2048].iter().all(|b| *b == 1) && bytes[2048..3072].iter().all(|b| *b == 3));
    assert!(bytes[3072..4096].iter().all(|b| *b == 1) && bytes[8192..12288].iter().all(|b| *b == 2));
    // A device that never can is an error, and the data is still owed.
    two.write(8192, Buf::copy_of(&[4; 512]), WriteFlags::default()).await.unwrap();
    odd.failing_flushes.store(100, Ordering::SeqCst);
    assert!(matches!(ceiling(two.flush()).await, Err(IoError::Failed { .. })));
    odd.failing_flushes.store(0, Ordering::SeqCst);
    ceiling(two.flush()).await.unwrap();
    assert!(odd.inner.crashed(None)[8192..8704].iter().all(|b| *b == 4));
}

/// Random bytes at every stage: the server answers or closes, and goes on serving others.
#[tokio::test(flavor = "multi_thread")]
async fn junk_on_the_port_harms_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![memory(16 << 20)]).await;
    let plain = plain_server(vec![Export { cluster: false, ..memory(16 << 20) }]).await;
    let id = server.server_id().unwrap();
    cluster.chain.decide(decision(2, &[(1, 1)], &[id]));
    for seed in 0..60 {
        let address = if seed % 2 == 0 { server.addresses()[0] } else { plain.addresses()[0] };
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut junk = match seed % 3 {
            0 => vec![],
            1 => vec![0, 0, 0, 3],
            _ => b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x06shared\0\0".to_vec(),
        };
        junk.extend(pattern(seed, 3000));
        let talk = async {
            let _ = stream.write_all(&junk).await;
            let _ = stream.shutdown().await;
            let mut sink = Vec::new();
            let _ = stream.read_to_end(&mut sink).await;
            assert!(sink.len() < 1 << 20);
        };
        ceiling(talk).await;
    }
    cluster.member(server.addresses()[0], (1, 1)).await.unwrap().flush().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fields_tools_use_our_tls() {
    if !has("TLS interop", "nbdinfo") || !has("TLS interop", "qemu-img") || !has("TLS interop", "nbdcopy") {
        return;
    }
    let cluster = Cluster::new();
    let path = cluster.temp.file("disk", 8 << 20);
    let server = cluster.server(local(), vec![memory(16 << 20), file_export(&path, "open", false)]).await;
    let (address, pki) = (server.addresses()[0], cluster.dir("tool"));
    let pki = pki.to_str().unwrap();
    let uri = |export: &str| format!("nbds://{address}/{export}?tls-certificates={pki}");
    assert_eq!(succeeds("nbdinfo", &["--size", &uri("open")]).await.trim(), "8388608");
    let (ok, text) = run("nbdinfo", &["--size", &uri("shared")]).await;
    assert!(!ok, "a client without a hello gets no cluster export (R10): {text}");
    let (ok, text) = run("nbdinfo", &["--size", &format!("nbd://{address}/open")]).await;
    assert!(!ok, "nothing is served in clear: {text}");
    // Without a certificate of its own, and with one of another cluster's CA.
    let without = cluster.temp.0.join("without");
    std::fs::create_dir(&without).unwrap();
    std::fs::copy(cluster.dir("tool").join("ca-cert.pem"), without.join("ca-cert.pem")).unwrap();
    let mixed = cluster.temp.0.join("mixed");
    std::fs::create_dir(&mixed).unwrap();
    let other = Cluster::new();
    for (from, file) in [(&cluster, "ca-cert.pem"), (&other, "client-cert.pem"), (&other, "client-key.pem")] {
        std::fs::copy(from.dir("tool").join(file), mixed.join(file)).unwrap();
    }
    for dir in [&without, &mixed] {
        let uri = format!("nbds://{address}/open?tls-certificates={}", dir.to_str().unwrap());
        let (ok, text) = run("nbdinfo", &["--size", &uri]).await;
        assert!(!ok && !text.contains("8388608"), "no certificate of the cluster, no export: {text}");
    }
    let source = cluster.temp.0.join("source");
    std::fs::write(&source, pattern(8, 8 << 20)).unwrap();
    succeeds("nbdcopy", &["--flush", source.to_str().unwrap(), &uri("open")]).await;
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&source).unwrap());
    let object = format!("tls-creds-x509,id=t,endpoint=client,dir={pki}");
    let image = format!("driver=nbd,host={},port={},export=open,tls-creds=t", address.ip(), address.port());
    let args = ["info", "--object", &object, "--image-opts", &image];
    assert!(succeeds("qemu-img", &args).await.contains("8 MiB"));
}
