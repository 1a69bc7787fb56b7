//! Keys while the cluster runs: renewal with a new key, rotation of the CA, and revocation, over real TLS.

use super::cluster::{TestCluster, block_on};
use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::driver::transport::TransportKind::{Quic, Tcp};
use quorate_membership::{Membership, NodeId, Request, RosterEntry};
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn a_node_gets_a_new_key_while_it_runs_and_the_old_one_is_refused_afterwards() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let config = cluster.config(2);
    let credentials = config.credentials.clone();
    let (two, three) = (cluster.start_with(2, config), cluster.start(3));
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
    }
    let before = two.wait_voters(3);
    let old_key = credentials.certificate().key;
    let fresh = cluster.renewed(2, cluster.ca());
    let key = fresh.certificate().key;
    assert_ne!(key, old_key);
    block_on(one.node.propose(Request::Renew { node: NodeId(2), key })).unwrap();
    credentials.take_over(&fresh).unwrap();
    assert_eq!(credentials.certificate().key, key);
    // The roster follows: connections under the old key end, and come back under the new one.
    let entry = RosterEntry { key, ..before.roster[&NodeId(2)].clone() };
    block_on(one.node.propose(Request::SetRoster(BTreeMap::from([(NodeId(2), entry)])))).unwrap();
    block_on(one.node.propose(Request::Revoke { key: old_key, reason: "renewed".into() })).unwrap();
    let view = two.recorder.wait("the roster with the new key", |log| {
        let last = log.views.last()?;
        (last.roster[&NodeId(2)].key == key && last.trust.revoked.contains(&old_key)).then(|| last.clone())
    });
    assert!(view.trust.renewals.is_empty());
    // Only over connections under the new key can a record with node 2's request come about.
    let leave = Request::Leave { give_up_vote: false };
    let left = block_on(two.node.propose(leave));
    assert!(left.is_ok() || two.node.end().is_some(), "{left:?}");
    block_on(two.node.ended());
    drop(two);
    let after = one.wait_members(&[1, 3]);
    assert_eq!(after.lives[&NodeId(2)], before.lives[&NodeId(2)], "it was never thrown out and let in again");
    // The old certificate is of no use to anybody.
    let mut config = cluster.config(2);
    config.credentials = cluster.credentials(2);
    let stale = cluster.start_with(2, config);
    let refused =
        one.recorder.never(1_500, |log| log.views.last().is_some_and(|v| v.members.contains_key(&NodeId(2))));
    assert!(refused, "a node with the old key came in");
    drop(stale);
}

#[test]
fn a_revoked_member_is_out_with_the_record_and_stays_out() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let one = cluster.start(1);
    one.wait_members(&[1]);
    let (two, three) = (cluster.start(2), cluster.start(3));
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
    }
    let key = cluster.credentials(3).certificate().key;
    let view = block_on(one.node.propose(Request::Revoke { key, reason: "stolen".into() })).unwrap();
    assert!(!view.members.contains_key(&NodeId(3)), "the same record removes it");
    two.wait_members(&[1, 2]);
    three.kill();
    let again = cluster.start(3);
    let refused =
        one.recorder.never(1_500, |log| log.views.last().is_some_and(|v| v.members.contains_key(&NodeId(3))));
    assert!(refused, "a revoked node came in");
    assert!(!again.node.is_quorate());
}

#[test]
fn the_ca_is_rotated_while_the_cluster_runs() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let mut configs: Vec<_> = Vec::new();
    let mut live: Vec<Credentials> = Vec::new();
    let one = {
        let config = cluster.config(1);
        live.push(config.credentials.clone());
        cluster.start_with(1, config)
    };
    one.wait_members(&[1]);
    configs.push(cluster.config(2));
    live.push(configs[0].credentials.clone());
    let two = cluster.start_with(2, configs.remove(0));
    // Node 3 is forgotten in the rotation.
    let three = cluster.start(3);
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
        node.wait_voters(3);
    }
    let id = one.node.view().cluster;
    let next = Ca::create("the next CA", id).unwrap();
    let (old_der, new_der) = (cluster.ca().certificate_der().unwrap(), next.certificate_der().unwrap());
    assert_ne!(old_der, new_der);
    // Both are trusted first, then everybody gets a certificate of the new one, then the old one goes.
    let both = BTreeSet::from([old_der, new_der.clone()]);
    block_on(one.node.propose(Request::SetCas(both))).unwrap();
    for (node, credentials) in [(1, &live[0]), (2, &live[1])] {
        let fresh = cluster.renewed(node, &next);
        let key = fresh.certificate().key;
        block_on(one.node.propose(Request::Renew { node: NodeId(node), key })).unwrap();
        credentials.take_over(&fresh).unwrap();
        let entry = RosterEntry { key, ..one.node.view().roster[&NodeId(node)].clone() };
        let change = Request::SetRoster(BTreeMap::from([(NodeId(node), entry)]));
        block_on(async {
            // The leader's own connections are made anew as well.
            while one.node.propose(change.clone()).await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        });
    }
    block_on(one.node.propose(Request::SetCas(BTreeSet::from([new_der])))).unwrap();
    // Whoever has a certificate of the former CA alone is cut off at once, not at its next handshake.
    one.wait_members(&[1, 2]);
    two.recorder.wait("one CA", |log| (log.views.last()?.trust.cas.len() == 1).then_some(()));
    // A node that starts now with a certificate of the old CA is refused, one of the new CA comes in.
    two.kill();
    one.wait_quorum(false);
    let mut config = cluster.config(2);
    config.credentials = live[1].clone();
    let again = cluster.start_with(2, config);
    again.wait_members(&[1, 2]);
}
