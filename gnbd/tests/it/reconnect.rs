//! The connection ends at every byte of a session, and the server comes back as another one.

use crate::common::*;
use quorate_gnbd::client::{ConnectError, NbdConfig, NbdDevice};
use quorate_gnbd::server::Export;
use quorate_gnbd::{BlockDevice, Buf, Device, IoError, MemoryDevice, WriteFlags};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn memory(size: u64) -> Export {
    let device = Device::new(MemoryDevice::new(size));
    Export { name: "m".into(), description: "in memory".into(), device, cluster: false }
}

/// Stands before a server, and ends its first connection after so many bytes of the server's. Counts those of all.
struct Cutter {
    address: SocketAddr,
    passed: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn cutter(server: SocketAddr, after: u64) -> Cutter {
    let listener = TcpListener::bind(local()).await.unwrap();
    let (address, passed) = (listener.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
    let counter = Arc::clone(&passed);
    let task = tokio::spawn(async move {
        let mut limit = after;
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let upstream = TcpStream::connect(server).await.unwrap();
            let counter = Arc::clone(&counter);
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (from_server, mut to_server) = upstream.into_split();
                let up = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let mut part = from_server.take(limit);
                let copied = tokio::io::copy(&mut part, &mut to_client).await.unwrap_or(0);
                counter.fetch_add(copied, Ordering::SeqCst);
                let _ = to_client.shutdown().await;
                up.abort();
            });
            limit = u64::MAX;
        }
    });
    Cutter { address, passed, task }
}

fn config(address: SocketAddr) -> NbdConfig {
    let address = address.to_string();
    NbdConfig { address, export: "m".into(), tls: None, member: None, connections: 1 }
}

async fn work(device: &NbdDevice) {
    device.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.unwrap();
    device.write(512, Buf::copy_of(&[2; 512]), WriteFlags { fua: true }).await.unwrap();
    let back = device.read(0, Buf::zeroed(1024)).await.unwrap();
    assert!(back[..512].iter().all(|b| *b == 1) && back[512..].iter().all(|b| *b == 2));
    device.flush().await.unwrap();
    let back = device.read(0, Buf::zeroed(512)).await.unwrap();
    assert!(back.iter().all(|b| *b == 1));
}

/// As qemu's iotest 083 does it, at every byte of the handshake and many after it: a cut before the device is there is an
/// error that says so, a cut after it is not noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_may_end_at_any_byte() {
    let server = plain_server(vec![memory(1 << 16)]).await;
    let upstream = server.addresses()[0];
    let begin = cutter(upstream, u64::MAX).await;
    let device = NbdDevice::connect(config(begin.address)).await.unwrap();
    work(&device).await;
    device.shutdown(CEILING).await.unwrap();
    // Greeting; the answers to STRUCTURED_REPLY and GO with two pieces of information.
    let handshake = 18 + 20 + (20 + 12) + (20 + 14) + 20;
    // Six answers: done, done, the read's bytes in a chunk, done, the second read's, the flush of the shutdown.
    let session = handshake + 20 + 20 + (28 + 1024) + 20 + (28 + 512) + 20;
    let told = async {
        while begin.passed.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(CEILING, told).await.unwrap();
    assert_eq!(begin.passed.load(Ordering::SeqCst), session, "the session is what is cut below");
    let places = (0..=handshake).chain((handshake + 1..session).step_by(41));
    for after in places {
        let cut = cutter(upstream, after).await;
        let attempt = tokio::time::timeout(CEILING, NbdDevice::connect(config(cut.address))).await.unwrap();
        match attempt {
            Err(e) => {
                assert!(after < handshake && matches!(e, ConnectError::Io { .. }), "cut after {after}: {e}");
            }
            Ok(device) => {
                assert!(handshake <= after, "cut after {after}: there is no device yet");
                tokio::time::timeout(CEILING, work(&device)).await.unwrap();
            }
        }
    }
}

/// A client that ends at any byte leaves nothing behind at the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_end_at_any_byte() {
    let server = plain_server(vec![memory(1 << 16)]).await;
    let mut session = 3_u32.to_be_bytes().to_vec();
    session.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01m\0\0");
    // A write of 64 bytes is not whole blocks; its payload is taken all the same.
    for (kind, length) in [(1_u16, 64_u32), (1, 512), (0, 512), (3, 0), (4, 512), (6, 512)] {
        session.extend(0x2560_9513_u32.to_be_bytes());
        session.extend([0, 0]);
        session.extend(kind.to_be_bytes());
        session.extend([0; 16]);
        session.extend(length.to_be_bytes());
        session.resize(session.len() + if kind == 1 { length as usize } else { 0 }, 0x5a);
    }
    for cut in (0..90).chain((90..=session.len()).step_by(19)) {
        let mut stream = TcpStream::connect(server.addresses()[0]).await.unwrap();
        stream.write_all(&session[..cut]).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut all = Vec::new();
        // It answers what it got, and then ends, too.
        let end = tokio::time::timeout(CEILING, stream.read_to_end(&mut all)).await.unwrap();
        assert!(end.is_ok() && 18 <= all.len(), "cut at {cut}: {end:?}");
    }
    plain_client(server.addresses()[0], "m").await.flush().await.unwrap();
    assert!(server.shutdown(CEILING).await, "no connection is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_with_another_device_is_the_end() {
    let server = plain_server(vec![memory(1 << 20)]).await;
    let address = server.addresses()[0];
    let device = plain_client(address, "m").await;
    device.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.unwrap();
    assert!(server.shutdown(CEILING).await);
    let server = plain_server_at(address, vec![memory(1 << 19)]).await;
    let e = tokio::time::timeout(CEILING, device.flush()).await.unwrap().unwrap_err();
    assert!(matches!(&e, IoError::Failed { detail, .. } if detail.contains("another size")), "{e}");
    let e = device.read(0, Buf::zeroed(512)).await.unwrap_err();
    assert!(matches!(e, IoError::Failed { .. }), "for ever: {e}");
    assert!(server.shutdown(CEILING).await);
}
