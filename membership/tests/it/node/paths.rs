//! What carries messages between nodes: a path that is cut, a pair that is relayed, a peer that takes nothing.

use super::cluster::{CEILING, Running, SERVICE, TestCluster};
use super::proxy::Proxy;
use quorate_membership::driver::transport::TransportKind::{Quic, Tcp};
use quorate_membership::driver::{LinkStatus, boottime};
use quorate_membership::{Membership, NodeId, SendError, Sessions};

/// Looks until a node's paths are as wanted.
fn wait_paths(node: &Running, what: &str, wanted: impl Fn(&[LinkStatus]) -> bool) {
    let started = boottime();
    loop {
        let links = node.node.links();
        if wanted(&links) {
            return;
        }
        assert!(boottime().since(started) < CEILING, "{what} at node {}: {links:#?}", node.me());
        // A look every now and then; nothing else tells of paths.
        node.recorder.never(20, |_| false);
    }
}

fn on_path(links: &[LinkStatus], path: u8) -> bool {
    let carriers: Vec<u8> = links.iter().filter(|l| l.carries_sessions).map(|l| l.path).collect();
    carriers == [path]
}

/// Sends numbers from `from` on, as fast as the peer's credit allows.
fn send(from: &Running, to: &Running, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let started = boottime();
        let payload = [&number.to_le_bytes()[..], &[7; 1_000]].concat();
        loop {
            match from.node.send(to.me(), SERVICE, payload.clone()) {
                Ok(()) => break,
                Err(SendError::Full(_)) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
            assert!(boottime().since(started) < CEILING, "stuck at {number}");
        }
    }
}

fn wait_numbers(at: &Running, count: u32) {
    at.recorder.wait("all messages", |log| (count as usize <= log.messages.len()).then_some(()));
    let numbers: Vec<u32> = at.recorder.wait("the messages", |log| {
        let number = |p: &[u8]| u32::from_le_bytes(p[..4].try_into().unwrap());
        Some(log.messages.iter().map(|(_, _, p)| number(p)).collect())
    });
    assert!(numbers.iter().copied().eq(0..count), "lost, doubled or out of order");
}

#[test]
fn a_peer_that_takes_nothing_stops_its_sender_within_the_credit_and_loses_nothing() {
    let mut cluster = TestCluster::new(2, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let two = cluster.start(2);
    for node in [&one, &two] {
        node.wait_members(&[1, 2]);
        node.wait_voters(2);
    }
    two.node.pause(SERVICE, true);
    let payload = |number: u32| [&number.to_le_bytes()[..], &[7; 60_000]].concat();
    let mut count = 0;
    let full = loop {
        match one.node.send(two.me(), SERVICE, payload(count)) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
        assert!(count < 200, "12 MB are on their way and nobody says stop");
    };
    assert_eq!(full, SendError::Full(NodeId(2)));
    assert!(100 < count, "the credit is 8 MiB, {count} messages of 60 kB were taken");
    two.node.pause(SERVICE, false);
    wait_numbers(&two, count);
    assert_eq!(one.node.view().members.len(), 2);
}

#[test]
fn a_pair_whose_connections_are_cut_talks_through_the_third() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    // Long enough not to end the pair (R3) while the test looks at it.
    let grace = std::time::Duration::from_secs(60);
    let mut config = cluster.config(1);
    config.timing.mesh_grace = grace;
    let one = cluster.start_with(1, config);
    one.wait_members(&[1]);
    let mut config = cluster.config(2);
    config.timing.mesh_grace = grace;
    let two = cluster.start_with(2, config);
    one.wait_members(&[1, 2]);
    let proxy = Proxy::to(two.node.local_address());
    let mut config = cluster.config(3);
    config.timing.mesh_grace = grace;
    config.peers.insert(NodeId(2), vec![proxy.address()]);
    let three = cluster.start_with(3, config);
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
        node.wait_voters(3);
    }
    send(&two, &three, 0..10);
    wait_numbers(&three, 10);
    assert_eq!(two.node.relayed_by(three.me()), None);
    proxy.cut(true);
    three.recorder.forget_messages();
    send(&two, &three, 0..2_000);
    send(&three, &two, 0..2_000);
    wait_numbers(&three, 2_000);
    wait_numbers(&two, 2_000);
    assert_eq!(two.node.relayed_by(three.me()), Some(one.me()));
    assert_eq!(three.node.relayed_by(two.me()), Some(one.me()));
    for node in [&one, &two, &three] {
        assert_eq!(node.node.view().members.len(), 3, "nobody is removed");
    }
}

#[test]
fn the_loss_of_one_path_changes_no_view_and_loses_no_message() {
    let mut cluster = TestCluster::new(2, Quic, Tcp);
    let mut config = cluster.config(1);
    config.listen_also = vec!["127.0.0.2:0".parse().unwrap()];
    let one = cluster.start_with(1, config);
    one.wait_members(&[1]);
    let addresses = one.node.local_addresses().to_vec();
    let proxy = Proxy::to(addresses[0]);
    let mut config = cluster.config(2);
    config.peers = [(NodeId(1), vec![proxy.address(), addresses[1]])].into();
    config.listen_also = vec!["127.0.0.2:0".parse().unwrap()];
    let two = cluster.start_with(2, config);
    for node in [&one, &two] {
        node.wait_members(&[1, 2]);
        node.wait_voters(2);
        wait_paths(node, "both paths", |l| l.len() == 2 && l.iter().all(|l| l.up) && on_path(l, 0));
    }
    let epochs = [&one, &two].map(|n| n.node.view().epoch);

    std::thread::scope(|scope| {
        scope.spawn(|| send(&one, &two, 0..20_000));
        scope.spawn(|| send(&two, &one, 0..20_000));
        // In the middle of them.
        one.recorder.wait("some", |log| (5_000 < log.messages.len()).then_some(()));
        proxy.cut(true);
    });
    wait_numbers(&one, 20_000);
    wait_numbers(&two, 20_000);
    for node in [&one, &two] {
        wait_paths(node, "the other path", |l| on_path(l, 1) && l.iter().map(|l| l.up).eq([false, true]));
        assert!(node.node.is_quorate() && node.node.lease().is_valid(boottime()));
    }

    // It is mended, and the sessions go back.
    proxy.cut(false);
    for node in [&one, &two] {
        wait_paths(node, "the first path again", |l| on_path(l, 0) && l.iter().all(|l| l.up));
        node.recorder.forget_messages();
    }
    send(&one, &two, 0..100);
    wait_numbers(&two, 100);
    assert_eq!(epochs, [&one, &two].map(|n| n.node.view().epoch), "no view changed");
}
