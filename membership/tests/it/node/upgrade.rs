//! Two versions of the program side by side on real sockets: everything works, the version rises when all are new, and an
//! old program is told that it is.

use super::cluster::{Running, TestCluster, block_on};
use quorate_membership::driver::transport::TransportKind::{Quic, Tcp};
use quorate_membership::machine::{Event, JoinRefusal, Versions};
use quorate_membership::{Cause, Membership, NodeId, Request};

fn start(cluster: &mut TestCluster, node: u32, speaks: Versions) -> Running {
    let mut config = cluster.config(node);
    config.timing.speaks = speaks;
    cluster.start_with(node, config)
}

#[test]
fn the_version_rises_with_the_last_upgraded_node_and_an_old_program_stays_out() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let one = start(&mut cluster, 1, Versions::CURRENT);
    one.wait_members(&[1]);
    let (two, three) = (start(&mut cluster, 2, Versions::NEXT), start(&mut cluster, 3, Versions::NEXT));
    for node in [&one, &two, &three] {
        node.wait_members(&[1, 2, 3]);
    }
    let old = two.recorder.wait("three voters", |log| {
        let last = log.views.last()?;
        (last.voters.voters.len() == 3).then(|| last.version)
    });
    assert_eq!(old, 1);
    // A request of a new program through an old leader works.
    block_on(two.node.propose(Request::SetQuorum(two.node.view().quorum.clone()))).unwrap();
    assert_eq!(two.node.view().version, 1, "node 1 does not speak the next version");
    one.kill();
    two.wait_members(&[2, 3]);
    // Node 1 votes and is away: the version waits for it.
    assert_eq!(two.node.view().version, 1);
    let one = start(&mut cluster, 1, Versions::NEXT);
    for node in [&one, &two, &three] {
        let view = node.recorder.wait("version 2", |log| {
            let last = log.views.last()?;
            (last.version == 2).then(|| last.clone())
        });
        assert!(matches!(view.cause, Cause::Version { from: 1, to: 2 }) || view.version == 2);
    }
    one.wait_members(&[1, 2, 3]);
    // Back to the old program: it learns that the cluster is past it.
    three.kill();
    one.wait_members(&[1, 2]);
    let stale = start(&mut cluster, 3, Versions::CURRENT);
    let end = block_on(async {
        tokio::select! {
            end = stale.node.ended() => end.to_string(),
            () = refused(&stale) => "refused".to_owned(),
        }
    });
    assert!(end == "refused" || end.contains("the cluster speaks version 2"), "{end}");
    assert!(!one.node.view().members.contains_key(&NodeId(3)));
    // A program that gave up the first version finds its way, too.
    stale.kill();
    let last = start(&mut cluster, 3, Versions::AFTER_NEXT);
    last.wait_members(&[1, 2, 3]);
}

/// Resolves when the node was told that its version is too old.
async fn refused(node: &Running) {
    loop {
        let told = node.node.events().into_iter().any(|(_, e)| {
            matches!(e, Event::NotAdmitted(JoinRefusal::Version { cluster: 2, node: Versions::CURRENT }))
        });
        if told {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
