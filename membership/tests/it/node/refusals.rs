//! Who is kept out, what strangers can do to a running node, and what a node does when its own disk fails.

use super::cluster::{Running, SERVICE, TestCluster, block_on};
use crate::temp::TempDir;
use quorate_membership::driver::transport::TransportKind::{Quic, Tcp};
use quorate_membership::driver::{Node, NodeEnd, StartError, StateDirError};
use quorate_membership::machine::StopReason;
use quorate_membership::{Membership, NodeId, Request, Rng, Role, RosterEntry, Sessions};
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::process::Command;

#[test]
fn random_bytes_and_idle_connections_disturb_nobody() {
    let mut cluster = TestCluster::new(2, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let address = one.node.local_address();
    let mut rng = Rng::new(1);
    let mut junk = |n: usize| (0..n).map(|_| rng.next_u64() as u8).collect::<Vec<u8>>();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut idle = Vec::new();
    for i in 0..200 {
        udp.send_to(&junk(20 + i * 5), address).unwrap();
        let mut tcp = TcpStream::connect(address).unwrap();
        if i % 2 == 0 {
            // It may have been turned away already.
            let _ = tcp.write_all(&junk(1 + i * 20));
        }
        idle.push(tcp);
    }
    // More handshakes hang than are allowed at a time, and still a node gets in once their deadline is over.
    let two = cluster.start(2);
    two.wait_members(&[1, 2]);
    one.node.send(two.me(), SERVICE, vec![1]).unwrap();
    two.recorder.wait("the message", |log| (!log.messages.is_empty()).then_some(()));
}

#[test]
fn a_second_process_with_a_nodes_identity_is_told_and_the_first_stays() {
    let mut cluster = TestCluster::new(2, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let two = cluster.start(2);
    two.wait_members(&[1, 2]);
    let mut config = cluster.config(2);
    let error = Node::start(config.clone()).unwrap_err();
    assert!(matches!(error, StartError::State(StateDirError::Locked { .. })), "{error}");
    // The same certificate, an empty directory.
    config.state_dir = cluster.state_dir(22);
    config.listen = "127.0.0.1:0".parse().unwrap();
    let double = Running::start(config);
    let end = block_on(double.node.ended());
    let NodeEnd::Life(reason) = &end else { panic!("{end}") };
    assert!(matches!(reason, StopReason::DoubleIdentity(NodeId(2)) | StopReason::RolledBack { .. }), "{end}");
    assert_eq!(two.node.end(), None);
    assert!(two.node.is_quorate());
}

#[test]
fn a_revoked_nodes_connections_are_closed_and_it_is_out() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let (two, three) = (cluster.start(2), cluster.start(3));
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
    }
    let key = cluster.credentials(3).me().key;
    // Each node revokes it, as its administrator would do: the set is outside of what the cluster agrees on.
    cluster.revoked(1).revoke(key);
    cluster.revoked(2).revoke(key);
    one.wait_members(&[1, 2]);
    // Nobody acknowledges its heartbeats any more, so its lease runs out.
    three.recorder.wait("the loss of quorum", |log| (!log.quorate).then_some(()));
}

#[test]
fn a_taken_port_and_a_foreign_directory_are_named() {
    let cluster = TestCluster::new(2, Quic, Tcp);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = cluster.config(1);
    config.listen = taken.local_addr().unwrap();
    let error = Node::start(config).unwrap_err();
    let words = format!("cannot listen on {}: Address already in use", taken.local_addr().unwrap());
    assert!(error.to_string().starts_with(&words), "{error}");
    let mut config = cluster.config(2);
    config.state_dir = cluster.state_dir(1);
    let error = Node::start(config).unwrap_err();
    assert!(matches!(error, StartError::State(StateDirError::OtherOwner { .. })), "{error}");
}

/// A small file system of its own, for filling it up.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(test: &str) -> Option<Self> {
        let dir = TempDir::new("tmpfs");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=128k", "none"]).arg(dir.path()).output();
        if mount.is_ok_and(|o| o.status.success()) {
            return Some(Self(dir));
        }
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{test}: a tmpfs cannot be mounted");
        println!("SKIP: {test}: a tmpfs cannot be mounted (root is needed)");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[test]
fn a_node_whose_state_disk_is_full_stops_and_the_others_go_on() {
    let Some(disk) = Tmpfs::mount("a_node_whose_state_disk_is_full_stops_and_the_others_go_on") else {
        return;
    };
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let two = cluster.start(2);
    two.wait_members(&[1, 2]);
    let mut config = cluster.config(3);
    config.state_dir = disk.0.path().join("state");
    let three = Running::start(config);
    one.wait_members(&[1, 2, 3]);
    three.wait_members(&[1, 2, 3]);
    let mut fill = std::fs::File::create(disk.0.path().join("fill")).unwrap();
    while fill.write_all(&[0; 4096]).is_ok() {}
    while fill.write_all(&[0; 1]).is_ok() {}
    // Changes of the record until the disk of node 3 has none left for one of them.
    let view = one.node.view();
    let entry = view.roster.get(&NodeId(2)).unwrap();
    for i in 0..500 {
        if three.node.end().is_some() {
            break;
        }
        let name = format!("{}-{i}", entry.name);
        let change = RosterEntry { name, role: Role::Voter, ..entry.clone() };
        let _ = block_on(one.node.propose(Request::SetRoster([(NodeId(2), change)].into())));
    }
    let end = block_on(three.node.ended());
    assert_eq!(end, NodeEnd::Life(StopReason::Storage));
    assert_eq!(end.to_string(), "the state could not be made durable");
    one.wait_members(&[1, 2]);
}
