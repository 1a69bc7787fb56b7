//! The field's own tools against our server, and our client against the field's servers.

use crate::common::*;
use quorate_gnbd::client::{export_info, list_exports};
use quorate_gnbd::{BlockDevice, Buf, WriteFlags, ZeroFlags};
use std::path::Path;

fn uri(server: &quorate_gnbd::server::Server, export: &str) -> String {
    format!("nbd://{}/{export}", server.addresses()[0])
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_shows_what_we_export() {
    if !has("nbdinfo", "nbdinfo") {
        return;
    }
    let temp = Temp::new();
    let (a, b) = (temp.file("a", 10 << 20), temp.file("b", 12345));
    let server = plain_server(vec![file_export(&a, "a", false), file_export(&b, "b", false)]).await;
    assert_eq!(succeeds("nbdinfo", &["--size", &uri(&server, "a")]).await.trim(), "10485760");
    assert_eq!(succeeds("nbdinfo", &["--size", &uri(&server, "b")]).await.trim(), "12345");
    let text = succeeds("nbdinfo", &["--json", &uri(&server, "a")]).await;
    for want in [
        "\"structured\": true",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_flush\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
        "base:allocation",
    ] {
        assert!(text.contains(want), "{want} is missing in {text}");
    }
    let text = succeeds("nbdinfo", &["--list", &uri(&server, "")]).await;
    assert!(text.contains("export=\"a\"") && text.contains("a test disk"), "{text}");
    let text = succeeds("nbdinfo", &["--map", &uri(&server, "a")]).await;
    assert!(text.contains("10485760"), "{text}");
    let (ok, text) = run("nbdinfo", &[&uri(&server, "none")]).await;
    assert!(!ok, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_copies_in_and_out() {
    if !has("nbdcopy", "nbdcopy") {
        return;
    }
    let temp = Temp::new();
    let (disk, source, target) = (temp.file("disk", 40 << 20), temp.0.join("source"), temp.0.join("target"));
    let mut bytes = pattern(3, 40 << 20);
    bytes[5 << 20..15 << 20].fill(0);
    std::fs::write(&source, &bytes).unwrap();
    let server = plain_server(vec![file_export(&disk, "d", false)]).await;
    let uri = uri(&server, "d");
    succeeds("nbdcopy", &["--flush", source.to_str().unwrap(), &uri]).await;
    succeeds("nbdcopy", &[&uri, target.to_str().unwrap()]).await;
    assert!(std::fs::read(&target).unwrap() == bytes && std::fs::read(&disk).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_reads_writes_zeroes_and_trims() {
    if !has("qemu", "qemu-io") || !has("qemu", "qemu-img") {
        return;
    }
    let temp = Temp::new();
    let disk = temp.file("disk", 64 << 20);
    let server = plain_server(vec![file_export(&disk, "d", false)]).await;
    let uri = uri(&server, "d");
    let commands = [
        "write -P 0xa5 0 1M",
        "write -f -P 0x5a 1M 64k",
        "write -z 512k 64k",
        "write -z -u 576k 64k",
        "discard 2M 1M",
        "flush",
        "read -P 0xa5 0 512k",
        "read -P 0 512k 128k",
        "read -P 0x5a 1M 64k",
        "read 60M 4M",
    ];
    let mut args = vec!["-f", "raw", &uri];
    for c in &commands {
        args.extend(["-c", c]);
    }
    let text = succeeds("qemu-io", &args).await;
    assert!(!text.contains("Pattern verification failed"), "{text}");
    let copy = temp.0.join("copy.qcow2");
    succeeds("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, copy.to_str().unwrap()]).await;
    let same = ["compare", "-f", "raw", "-F", "qcow2", &uri, copy.to_str().unwrap()];
    succeeds("qemu-img", &same).await;
    let (ok, text) = run("qemu-io", &["-f", "raw", "-c", "read 64M 4k", &uri]).await;
    assert!(!ok || text.contains("failed"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_its_own_writes() {
    if !has("fio", "fio") {
        return;
    }
    let temp = Temp::new();
    let disk = temp.file("disk", 16 << 20);
    let server = plain_server(vec![file_export(&disk, "d", false)]).await;
    let uri = format!("--uri={}", uri(&server, "d"));
    let args = [
        "--name=t",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=32",
        "--size=8M",
        "--verify=crc32c",
    ];
    let (ok, text) = run("fio", &args).await;
    if !ok && text.contains("engine nbd not loadable") {
        println!("SKIP: fio: built without the nbd engine");
        return;
    }
    assert!(ok, "{text}");
}

/// Waits until the server's socket answers.
async fn up(address: &str) {
    let wait = async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(CEILING, wait).await.expect("the server listens");
}

/// A port that was free a moment ago.
fn port() -> u16 {
    std::net::TcpListener::bind(local()).unwrap().local_addr().unwrap().port()
}

async fn exercise(address: &str, export: &str) {
    let device = plain_client(address.parse().unwrap(), export).await;
    let data = pattern(5, 3 << 20);
    device.write(1 << 20, Buf::copy_of(&data), WriteFlags::default()).await.unwrap();
    device.write(4 << 20, Buf::copy_of(&data[..4096]), WriteFlags { fua: true }).await.unwrap();
    device.write_zeroes(2 << 20, 65536, ZeroFlags::default()).await.unwrap();
    device.discard(8 << 20, 1 << 20).await.unwrap();
    device.flush().await.unwrap();
    let back = device.read(1 << 20, Buf::zeroed(data.len())).await.unwrap();
    assert!(back[..1 << 20] == data[..1 << 20]);
    assert!(back[1 << 20..(1 << 20) + 65536].iter().all(|b| *b == 0));
    device.shutdown(CEILING).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_uses_nbdkit() {
    if !has("nbdkit", "nbdkit") {
        return;
    }
    let port = port().to_string();
    let mut child = tokio::process::Command::new("nbdkit")
        .args(["-f", "-i", "127.0.0.1", "-p", &port, "memory", "16M"])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let address = format!("127.0.0.1:{port}");
    up(&address).await;
    exercise(&address, "").await;
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_uses_qemu_nbd() {
    if !has("qemu-nbd", "qemu-nbd") {
        return;
    }
    let temp = Temp::new();
    let disk = temp.file("disk", 16 << 20);
    let port = port().to_string();
    let disk = Path::new(&disk).to_str().unwrap();
    let mut child = tokio::process::Command::new("qemu-nbd")
        .args(["-f", "raw", "-b", "127.0.0.1", "-p", &port, "-e", "8", "-t", "-x", "d", disk])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let address = format!("127.0.0.1:{port}");
    up(&address).await;
    exercise(&address, "d").await;
    child.kill().await.unwrap();
}

/// What our client asks of a server, as the server itself writes it down (nbdkit's log filter).
#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_hears_each_request_with_its_flags() {
    if !has("nbdkit", "nbdkit") {
        return;
    }
    let temp = Temp::new();
    let (log, port) = (temp.0.join("log"), port().to_string());
    let logfile = format!("logfile={}", log.display());
    let mut child = tokio::process::Command::new("nbdkit")
        .args(["-f", "-i", "127.0.0.1", "-p", &port, "--filter=log", "memory", "16M", &logfile])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let address = format!("127.0.0.1:{port}");
    up(&address).await;
    assert!(!list_exports(&address, None).await.unwrap().is_empty());
    let info = export_info(&address, None, "").await.unwrap();
    assert_eq!((info.geometry.size_bytes, info.can_multi_conn), (16 << 20, true));
    let device = plain_client(address.parse().unwrap(), "").await;
    let write = |at, fua| device.write(at, Buf::copy_of(&[1; 512]), WriteFlags { fua });
    let zero = |at, fua, no_hole| device.write_zeroes(at, 512, ZeroFlags { fua, no_hole });
    write(0x1000, false).await.unwrap();
    write(0x2000, true).await.unwrap();
    zero(0x3000, false, false).await.unwrap();
    zero(0x4000, true, true).await.unwrap();
    device.discard(0x5000, 512).await.unwrap();
    device.flush().await.unwrap();
    device.read(0x6000, Buf::zeroed(512)).await.unwrap();
    device.shutdown(CEILING).await.unwrap();
    child.kill().await.unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    let heard = |what: &str, with: &[&str]| {
        let found =
            log.lines().any(|l| l.contains(&format!(" {what} id=")) && with.iter().all(|w| l.contains(w)));
        assert!(found, "{what} {with:?} is not in\n{log}");
    };
    heard("Write", &["offset=0x1000 count=0x200", "fua=0"]);
    heard("Write", &["offset=0x2000 count=0x200", "fua=1"]);
    heard("Zero", &["offset=0x3000 count=0x200", "trim=1", "fua=0"]);
    heard("Zero", &["offset=0x4000 count=0x200", "trim=0", "fua=1"]);
    heard("Trim", &["offset=0x5000 count=0x200"]);
    heard("Flush", &[]);
    heard("Read", &["offset=0x6000 count=0x200"]);
    let connections = log.lines().filter(|l| l.contains(" Connect ")).count();
    assert_eq!(connections, 3, "one for the question, two for the device:\n{log}");
}
