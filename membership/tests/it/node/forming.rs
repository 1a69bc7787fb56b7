//! Nodes form a cluster, talk, fail, leave and come back, over each pair of transports.

use super::cluster::{Running, SERVICE, TestCluster, block_on};
use quorate_membership::driver::boottime;
use quorate_membership::driver::transport::TransportKind::{self, Quic, Tcp};
use quorate_membership::{
    Epoch, Identity, Incarnation, Membership, NodeId, SendError, ServiceId, SessionHandler, Sessions,
};
use std::sync::Arc;
use std::time::Duration;

/// Each sends `count` messages to each, and all arrive in order.
fn talk(nodes: &[&Running], count: u32) {
    nodes.iter().for_each(|n| n.recorder.forget_messages());
    for from in nodes {
        for to in nodes {
            for i in 0..count {
                from.node.send(to.me(), SERVICE, i.to_le_bytes().to_vec()).unwrap();
            }
        }
    }
    for to in nodes {
        for from in nodes {
            let got = to.recorder.wait("messages", |log| {
                let got: Vec<u32> = log
                    .messages
                    .iter()
                    .filter(|(f, _, _)| *f == from.me())
                    .map(|(_, _, p)| u32::from_le_bytes(p.as_slice().try_into().unwrap()))
                    .collect();
                (count as usize <= got.len()).then_some(got)
            });
            assert!(got.iter().copied().eq(0..count), "{got:?}");
        }
    }
}

fn three_nodes(control: TransportKind, sessions: TransportKind) {
    let mut cluster = TestCluster::new(3, control, sessions);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let two = cluster.start(2);
    let three = cluster.start(3);
    for node in [&one, &two, &three] {
        let view = node.wait_members(&[1, 2, 3]);
        assert!(view.contains(node.me()));
    }
    talk(&[&one, &two, &three], 500);

    // A crash: the others agree on a view without it, and its life gets no more messages.
    let dead = two.me();
    two.kill();
    let view = one.wait_members(&[1, 3]);
    assert!(!view.contains(dead));
    three.wait_members(&[1, 3]);
    assert_eq!(one.node.send(dead, SERVICE, vec![]), Err(SendError::NotMember(dead)));

    // It comes back as a new life, and sessions with it are new ones.
    let two = cluster.start(2);
    assert_eq!(two.me(), Identity::new(NodeId(2), Incarnation(2)));
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
    }
    talk(&[&one, &two], 3);

    // A clean leave is no failure.
    let left = three.me();
    block_on(three.node.shutdown(Duration::from_secs(10))).unwrap();
    let view = one.wait_members(&[1, 2]);
    assert!(!view.debts.contains_key(&left));
    assert_eq!(three.node.send(one.me(), SERVICE, vec![]), Err(SendError::Stopped));
}

#[test]
fn three_nodes_over_quic_and_tcp() {
    three_nodes(Quic, Tcp);
}

#[test]
fn three_nodes_over_tcp_alone() {
    three_nodes(Tcp, Tcp);
}

#[test]
fn three_nodes_over_quic_alone() {
    three_nodes(Quic, Quic);
}

/// A service with a mistake.
struct Broken;

impl SessionHandler for Broken {
    fn deliver(&self, _: Identity, _: Epoch, _: &[u8]) {
        panic!("a mistake, on purpose");
    }
}

#[test]
fn a_node_whose_service_panics_ends_at_once_and_the_others_go_on() {
    let mut cluster = TestCluster::new(2, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let two = cluster.start(2);
    let broken = ServiceId(201);
    two.node.register(broken, Arc::new(Broken));
    one.wait_members(&[1, 2]);
    two.wait_members(&[1, 2]);
    one.node.send(two.me(), broken, vec![1]).unwrap();
    let end = block_on(two.node.ended());
    assert_eq!(end.to_string(), "a thread of the node panicked");
    assert!(!two.node.lease().is_valid(boottime()));
    assert_eq!(two.node.send(one.me(), SERVICE, vec![]), Err(SendError::Stopped));
    assert!(!two.node.is_quorate());
}

#[test]
fn a_lease_holds_while_the_node_runs_and_ends_with_it() {
    let mut cluster = TestCluster::new(1, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let lease = one.node.lease();
    assert!(one.node.is_quorate() && lease.is_valid(boottime()));
    one.kill();
    assert!(!lease.is_valid(boottime()));
}
