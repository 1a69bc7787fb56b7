//! The lives of a storage server: retired and enrolled afresh, restarted with less than it had, with a disk that fails.

use crate::cluster_support::*;
use crate::common::*;
use quorate_gnbd::fence::wire::InstallError;
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};
use quorate_membership::Epoch;

/// R9: what a retired server exports is unusable until it is enrolled afresh, under an id that it keeps over a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_retired_server_serves_again_only_under_its_next_id() {
    let cluster = Cluster::new();
    let path = cluster.temp.file("disk", 1 << 20);
    let exports = || vec![file_export(&path, "shared", true)];
    let server = cluster.server(local(), exports()).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1)], &[id]));
    let one = cluster.member(address, (1, 1)).await.unwrap();
    one.write(0, Buf::copy_of(&[1; 512]), WriteFlags { fua: true }).await.unwrap();
    cluster.chain.decide(decision(3, &[(1, 1)], &[]));
    let retired = server.install(cluster.chain.all()).await;
    let Err(InstallError::Retired { server: fresh }) = retired else { panic!("{retired:?}") };
    assert_ne!(fresh, id);
    let status = server.status().await.unwrap();
    assert_eq!((status.server, status.epoch, status.admitted.len()), (fresh, None, 0));
    // The record that enrolled it before is worth nothing now, neither here nor after a restart.
    let old = InstallError::DoesNotEnrol { server: fresh };
    assert_eq!(server.install(vec![decision(2, &[(1, 1)], &[id])]).await, Err(old.clone()));
    assert!(server.shutdown(CEILING).await);
    let server = cluster.server(address, exports()).await;
    assert_eq!(server.server_id(), Some(fresh));
    assert_eq!(server.install(vec![decision(2, &[(1, 1)], &[id])]).await, Err(old));
    // I/O waits until it is enrolled under the new id.
    let write = one.write(512, Buf::copy_of(&[2; 512]), WriteFlags { fua: true });
    let enrol = async { cluster.chain.decide(decision(4, &[(1, 1)], &[fresh])) };
    ceiling(async { tokio::join!(write, enrol).0 }).await.unwrap();
    assert_eq!(server.status().await.unwrap().epoch, Some(Epoch(4)));
    let back = one.read(0, Buf::zeroed(1024)).await.unwrap();
    assert!(back[..512].iter().all(|b| *b == 1) && back[512..].iter().all(|b| *b == 2));
    drop(one);
    assert!(server.shutdown(CEILING).await);
}

/// R12: a server that starts again has another verifier, and its clients write again what it may have forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_restarted_server_forgot_its_members_write_again() {
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![memory(1 << 20)]).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    let one = cluster.member(address, (1, 1)).await.unwrap();
    let two = cluster.member(address, (2, 1)).await.unwrap();
    one.write(0, Buf::copy_of(&[1; 1024]), WriteFlags::default()).await.unwrap();
    one.write(512, Buf::copy_of(&[3; 512]), WriteFlags::default()).await.unwrap();
    two.write(4096, Buf::copy_of(&[2; 512]), WriteFlags::default()).await.unwrap();
    let before = server.status().await.unwrap().exports[0].verifier;
    assert!(server.shutdown(CEILING).await);
    // Another memory: nothing that was not flushed by a client is left.
    let server = cluster.server(address, vec![memory(1 << 20)]).await;
    assert_ne!(server.status().await.unwrap().exports[0].verifier, before);
    // A read is answered after what its node had written is there again.
    let back = ceiling(one.read(0, Buf::zeroed(1024))).await.unwrap();
    assert!(back[..512].iter().all(|b| *b == 1) && back[512..].iter().all(|b| *b == 3));
    ceiling(two.flush()).await.unwrap();
    let back = one.read(4096, Buf::zeroed(512)).await.unwrap();
    assert!(back.iter().all(|b| *b == 2));
    drop((one, two));
    assert!(server.shutdown(CEILING).await);
}

/// R9: a record that does not reach the disk confirms nothing, and a half-written one is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_the_disk_does_not_take_is_not_confirmed() {
    let cluster = Cluster::new();
    let server = cluster.server(local(), vec![memory(1 << 20)]).await;
    let (address, id) = (server.addresses()[0], server.server_id().unwrap());
    cluster.chain.decide(decision(2, &[(1, 1), (2, 1)], &[id]));
    server.install(cluster.chain.all()).await.unwrap();
    let (record, fresh) = (cluster.state_dir().join("fence"), cluster.state_dir().join("fence.new"));
    let durable = std::fs::read(&record).unwrap();
    // Stands in for a disk that refuses: the new record cannot be written where a directory is.
    std::fs::create_dir(&fresh).unwrap();
    cluster.chain.decide(decision(3, &[(1, 1)], &[id]));
    let refused = server.install(cluster.chain.all()).await;
    assert!(matches!(refused, Err(InstallError::NotDurable(_))), "{refused:?}");
    assert_eq!(server.status().await.unwrap().confirmed, Some(Epoch(2)));
    assert_eq!(std::fs::read(&record).unwrap(), durable, "the older record is whole");
    std::fs::remove_dir(&fresh).unwrap();
    assert_eq!(server.install(cluster.chain.all()).await, Ok((id, Epoch(3))));
    assert_ne!(std::fs::read(&record).unwrap(), durable, "confirmed is what the disk has");
    assert!(server.shutdown(CEILING).await);
    // Killed while it wrote the next one: what counts is whole.
    std::fs::write(&fresh, &durable[..durable.len() / 2]).unwrap();
    let server = cluster.server(address, vec![memory(1 << 20)]).await;
    let status = server.status().await.unwrap();
    assert_eq!((status.server, status.epoch), (id, Some(Epoch(3))));
    assert!(server.shutdown(CEILING).await);
}
