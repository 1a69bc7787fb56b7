//! Our client against our server, without TLS.

use crate::common::*;
use futures_util::future::join_all;
use quorate_gnbd::client::{ConnectError, export_info, list_exports};
use quorate_gnbd::server::Export;
use quorate_gnbd::{BlockDevice, Buf, Device, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use std::time::Duration;

fn memory(size: u64) -> Export {
    let device = Device::new(MemoryDevice::new(size));
    Export { name: "m".into(), description: String::new(), device, cluster: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read_on_another_connection() {
    let server = plain_server(vec![memory(64 << 20)]).await;
    let address = server.addresses()[0];
    let (a, b) = (plain_client(address, "m").await, plain_client(address, "m").await);
    let data = pattern(1, 9 << 20);
    a.write(4096, Buf::copy_of(&data), WriteFlags { fua: true }).await.unwrap();
    a.write_zeroes(8192, 4096, ZeroFlags::default()).await.unwrap();
    a.flush().await.unwrap();
    let back = b.read(4096, Buf::zeroed(data.len())).await.unwrap();
    assert!(back[..4096] == data[..4096] && back[8192..] == data[8192..]);
    assert!(back[4096..8192].iter().all(|x| *x == 0));
    a.discard(0, 64 << 20).await.unwrap();
    let e = a.read((64 << 20) - 512, Buf::zeroed(1024)).await.unwrap_err();
    assert!(matches!(e, IoError::OutOfRange { .. }), "{e}");
    let e = a.read(1, Buf::zeroed(512)).await.unwrap_err();
    assert!(matches!(e, IoError::Misaligned { .. }), "{e}");
    a.shutdown(CEILING).await.unwrap();
    assert_eq!(a.flush().await, Err(IoError::Stopped));
    drop(b);
    assert!(server.shutdown(CEILING).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_export_is_an_error_that_names_the_reason() {
    let server = plain_server(vec![memory(1 << 20)]).await;
    let config = quorate_gnbd::client::NbdConfig {
        address: server.addresses()[0].to_string(),
        export: "none".into(),
        tls: None,
        member: None,
        connections: 1,
    };
    let e = quorate_gnbd::client::NbdDevice::connect(config).await.unwrap_err();
    assert!(e.to_string().contains("no export of that name"), "{e}");
}

/// LIST and INFO: what a server offers, asked without using it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_tells_what_it_offers() {
    let temp = Temp::new();
    let path = temp.file("disk", 12345);
    let server = plain_server(vec![file_export(&path, "d", false), memory(1 << 20)]).await;
    let address = server.addresses()[0].to_string();
    let listed = list_exports(&address, None).await.unwrap();
    let listed: Vec<(&str, &str)> = listed.iter().map(|l| (&*l.name, &*l.description)).collect();
    assert_eq!(listed, [("d", "a test disk"), ("m", "")]);
    let info = export_info(&address, None, "d").await.unwrap();
    assert_eq!((info.name.as_deref(), info.description.as_deref()), (Some("d"), Some("a test disk")));
    assert_eq!((info.geometry.size_bytes, info.geometry.block_bytes, info.can_multi_conn), (12345, 1, true));
    let info = export_info(&address, None, "m").await.unwrap();
    assert_eq!((info.geometry.size_bytes, info.geometry.block_bytes), (1 << 20, 512));
    let e = export_info(&address, None, "none").await.unwrap_err();
    assert!(matches!(e, ConnectError::Refused { option: "INFO", .. }), "{e}");
    assert!(server.shutdown(CEILING).await, "nobody is left");
}

/// R12 over plain NBD: the server goes away for a while, and I/O waits without an error.
#[tokio::test(flavor = "multi_thread")]
async fn io_waits_while_the_server_is_away_and_goes_on_when_it_is_back() {
    let temp = Temp::new();
    let path = temp.file("disk", 16 << 20);
    let server = plain_server(vec![file_export(&path, "d", false)]).await;
    let address = server.addresses()[0];
    let client = plain_client(address, "d").await;
    client.write(0, Buf::copy_of(&[1; 4096]), WriteFlags::default()).await.unwrap();
    assert!(server.shutdown(CEILING).await);
    let writes = (1..=64_u64).map(|i| {
        let data = Buf::copy_of(&[i as u8; 4096]);
        client.write(i * 4096, data, WriteFlags::default())
    });
    let work = async {
        for result in join_all(writes).await {
            result.unwrap();
        }
        client.flush().await.unwrap();
    };
    let back = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        plain_server_at(address, vec![file_export(&path, "d", false)]).await
    };
    let (server, ()) = tokio::time::timeout(CEILING, async { tokio::join!(back, work) }).await.unwrap();
    for i in 1..=64_u64 {
        let back = client.read(i * 4096, Buf::zeroed(4096)).await.unwrap();
        assert!(back.iter().all(|b| *b == i as u8), "block {i}");
    }
    drop(client);
    assert!(server.shutdown(CEILING).await);
}

/// What is acknowledged and not flushed when the server's host crashes is written again (R12).
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_a_server_that_forgets_them() {
    let server = plain_server(vec![memory(16 << 20)]).await;
    let address = server.addresses()[0];
    let client = plain_client(address, "m").await;
    client.write(0, Buf::copy_of(&[7; 8192]), WriteFlags::default()).await.unwrap();
    client.write(4096, Buf::copy_of(&[8; 4096]), WriteFlags { fua: true }).await.unwrap();
    assert!(server.shutdown(CEILING).await);
    // Another memory: everything volatile, and here also what was durable, is gone.
    let server = plain_server_at(address, vec![memory(16 << 20)]).await;
    client.flush().await.unwrap();
    let back = client.read(0, Buf::zeroed(8192)).await.unwrap();
    assert!(back[..4096].iter().all(|b| *b == 7), "what was not flushed was written again");
    assert!(back[4096..].iter().all(|b| *b == 0), "what was durable was not");
    drop(client);
    assert!(server.shutdown(CEILING).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_of_a_loopback_connection() {
    let server = plain_server(vec![memory(256 << 20)]).await;
    let client = plain_client(server.addresses()[0], "m").await;
    let begin = tokio::time::Instant::now();
    let reads = (0..2_000_u64).map(|i| client.read(i * 4096, Buf::zeroed(4096)));
    join_all(reads).await.into_iter().for_each(|r| drop(r.unwrap()));
    let small = begin.elapsed();
    let begin = tokio::time::Instant::now();
    let writes = (0..64_u64).map(|i| client.write(i << 20, Buf::zeroed(1 << 20), WriteFlags::default()));
    join_all(writes).await.into_iter().for_each(|r| drop(r.unwrap()));
    let large = begin.elapsed();
    println!("2000 reads of 4 KiB: {small:?}; 64 writes of 1 MiB: {large:?}");
}
