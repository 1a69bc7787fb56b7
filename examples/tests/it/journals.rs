//! Whose journal is whose, over the death and restart of its owner.

use crate::cluster::{Cluster, is, one_at_a_time, runs, time, wait_for, who};
use quorate::admin::protocol::Command as Admin;
use quorate::events::boottime_ns;
use serde_json::Value;

fn journal(cluster: &Cluster, id: u32) -> Option<u64> {
    let status = cluster.ask(id, Admin::Status).ok()?;
    status["mounts"].as_array()?.iter().find(|m| m["filesystem"] == "data")?["journal"].as_u64()
}

/// Until a node has mounted again what its former life had.
fn mounted_again(cluster: &Cluster, id: u32) -> u64 {
    wait_for(&format!("node {id}'s mount"), || journal(cluster, id))
}

/// "jids durable": which journal is whose is in the decided record. The others own theirs, so the next life of a dead node
/// gets the same journal again, and not before a survivor has replayed it.
#[test]
fn a_node_has_its_journal_again_over_a_restart_after_it_was_replayed() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::running(3, "");
    cluster.mount_everywhere(3);
    assert_eq!([1, 2, 3].map(|id| journal(&cluster, id)), [Some(0), Some(1), Some(2)]);
    cluster.append(2, "/two", b"of node 2\n").unwrap();
    let node = cluster.node_process(2);
    let since = boottime_ns();
    cluster.kill("node2");
    wait_for("the node's death with its supervisor", || (!runs(node)).then_some(()));
    cluster.start_node(2);
    assert_eq!(mounted_again(&cluster, 2), 1);
    assert_eq!(cluster.read(2, "/two"), b"of node 2\n");
    let of = |e: &Value, kind: &str| is(e, kind) && e["filesystem"] == "data" && e["journal"] == 1;
    let replayed = time(&cluster.wait_event("the replay", since, |e| of(e, "replayed")));
    let mounted = time(&cluster.wait_event("the mount", since, |e| of(e, "mounted") && who(e) == "node 2"));
    assert!(replayed < mounted, "node 2 had its journal before it was replayed");
}

/// All die. The record is what is left: the first to open gets its own dirty journal, which is not the lowest unless it is
/// node 1, and replays those of the others; these get one when it is replayed.
#[test]
fn after_the_death_of_all_every_node_mounts_again_and_nothing_acknowledged_is_lost() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::running(3, "");
    cluster.mount_everywhere(3);
    let paths = ["/one", "/two", "/three"];
    for (id, path) in (1..=3).zip(paths) {
        cluster.append(id, path, path.as_bytes()).unwrap();
    }
    let nodes = [1, 2, 3].map(|id| cluster.node_process(id));
    let since = boottime_ns();
    for id in 1..=3 {
        cluster.kill(&format!("node{id}"));
    }
    wait_for("the end of all", || nodes.iter().all(|pid| !runs(*pid)).then_some(()));
    for id in 1..=3 {
        cluster.start_node(id);
    }
    let mut journals = [1, 2, 3].map(|id| mounted_again(&cluster, id));
    journals.sort_unstable();
    assert_eq!(journals, [0, 1, 2]);
    for path in paths {
        assert_eq!(cluster.read(1, path), path.as_bytes());
    }
    // In the order in which it happened.
    let mut events: Vec<Value> = cluster
        .events()
        .iter()
        .filter(|e| since <= time(e) && e["filesystem"] == "data" && (is(e, "replayed") || is(e, "mounted")))
        .cloned()
        .collect();
    events.sort_by_key(time);
    let mut replayed = Vec::new();
    let mut mounts = 0;
    for event in &events {
        let journal = event["journal"].as_u64().unwrap();
        if is(event, "replayed") {
            replayed.push(journal);
            continue;
        }
        if mounts == 0 {
            assert_eq!(
                format!("node {}", journal + 1),
                who(event),
                "the first opener has its own: {events:#?}"
            );
        }
        mounts += 1;
        assert!(replayed.contains(&journal), "{event} before the replay: {events:#?}");
    }
    assert_eq!(mounts, 3, "{events:#?}");
}
