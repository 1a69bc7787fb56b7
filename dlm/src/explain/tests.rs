//! Sentences and graphs of reports made by hand.

use super::*;
use crate::{ElsewhereDump, Range};
use quorate_membership::{ClusterId, Incarnation, NodeId};

fn node(n: u32) -> Identity {
    Identity::new(NodeId(n), Incarnation(1))
}

fn lock(n: u32, id: u64, granted: Option<Mode>, requested: Option<Mode>, seconds: u64) -> LockDump {
    let age = Some(Duration::from_secs(seconds));
    LockDump { node: node(n), id, owner: 0, range: Range::ALL, granted, requested, dead: false, age }
}

fn report() -> ClusterReport {
    let resource = ResourceDump {
        name: LockName::new(b"r").unwrap(),
        master: node(1),
        sequence: 9,
        value: None,
        value_invalid: false,
        granted: vec![lock(1, 16, Some(Mode::EX), None, 90)],
        converting: Vec::new(),
        waiting: vec![lock(2, 32, None, Some(Mode::PR), 5), lock(3, 48, None, Some(Mode::EX), 2)],
        assumed: Vec::new(),
    };
    let quiet = ResourceDump {
        name: LockName::new(b"a").unwrap(),
        granted: vec![lock(1, 64, Some(Mode::PR), None, 1)],
        waiting: Vec::new(),
        ..resource.clone()
    };
    let dump =
        LockspaceDump { name: "web".into(), resources: vec![quiet, resource], ..LockspaceDump::default() };
    let process = ProcessInfo {
        pid: 77,
        uid: 0,
        command: "backup".into(),
        connected: Duration::ZERO,
        locks: vec![("web".into(), 32)],
    };
    let elsewhere = ElsewhereDump {
        name: LockName::new(b"far").unwrap(),
        master: Some(node(4)),
        id: 80,
        owner: 5,
        granted: None,
        requested: Some(Mode::CW),
        waits: Some(Duration::from_secs(1)),
    };
    let at_master = ElsewhereDump { name: LockName::new(b"r").unwrap(), id: 32, ..elsewhere.clone() };
    let there = LockspaceDump {
        name: "web".into(),
        elsewhere: vec![at_master, elsewhere],
        ..LockspaceDump::default()
    };
    let of = |n, lockspaces, processes| NodeReport {
        node: node(n),
        lockspaces,
        stats: BTreeMap::new(),
        processes,
        left_out: 0,
    };
    ClusterReport {
        nodes: vec![of(1, vec![dump], vec![]), of(2, vec![there], vec![process])],
        silent: vec![node(4)],
    }
}

fn no_words(_: &str, _: &LockName) -> Option<String> {
    None
}

#[test]
fn a_wait_is_said_once_with_all_that_stands_against_it_the_longest_first() {
    let view = View::empty(ClusterId::from_bytes([1; 16]));
    let waits = waits(&report(), &view);
    let said: Vec<String> = waits.iter().map(|w| sentence(w, &no_words)).collect();
    assert_eq!(
        said,
        [
            "node 2 pid 77 (backup) wants PR on web \"r\" and has waited for 5 s: node 1 has it in EX for 90 s",
            "node 3 wants EX on web \"r\" and has waited for 2 s: node 1 has it in EX for 90 s; \
             node 2 pid 77 (backup) came first and wants PR",
            "node 2 pid 5 wants CW on web \"far\" and has waited for 1 s: its master, node 4, has not answered",
        ]
    );
    let graph = dot(&waits, &no_words);
    assert!(graph.starts_with("digraph waits {") && graph.ends_with("}\n"));
    assert!(
        graph.contains(
            "  \"node 3\" -> \"node 2 pid 77 (backup)\" [label=\"EX web \\\"r\\\"\", style=dashed];"
        )
    );
    assert_eq!(graph_lines(&waits, &no_words).len(), 4);
}

#[test]
fn a_failed_holder_is_named_with_what_has_to_happen() {
    let mut report = report();
    let resource = &mut report.nodes[0].lockspaces[0].resources[1];
    resource.granted[0].dead = true;
    resource.assumed = vec![node(9)];
    let view = View::empty(ClusterId::from_bytes([1; 16]));
    let first = sentence(&waits(&report, &view)[0], &|_, _| Some("inode 7".into()));
    assert_eq!(
        first,
        "node 2 pid 77 (backup) wants PR on web \"r\" (inode 7) and has waited for 5 s: the failed node 9#1 may have it \
         until its removal is decided and not yet seen by all; the failed node 1#1 has it in EX until its removal is \
         decided and not yet seen by all"
    );
}

#[test]
fn the_list_has_waiters_first_and_names_who_is_silent() {
    let lines = list_lines(&report(), &no_words);
    assert_eq!(
        lines,
        [
            "lockspace web: 2 resources, 1 with waiters",
            "  \"r\", mastered by node 1",
            "    waits >PR node 2 pid 77 (backup) for 5 s",
            "    waits >EX node 3 for 2 s",
            "    has EX node 1 for 90 s",
            "  \"a\", mastered by node 1",
            "    has PR node 1 for 1 s",
            "node 4#1 did not answer; what it masters is not shown",
        ]
    );
}

#[test]
fn a_report_is_narrowed_to_what_was_asked_and_to_its_limit() {
    let mut one = report().nodes.remove(0);
    one.narrow(Some("web"), Some("a"));
    assert_eq!(one.lockspaces[0].resources.len(), 1);
    let mut many = report().nodes.remove(0);
    let sample = many.lockspaces[0].resources[0].clone();
    many.lockspaces[0].resources.splice(0..0, (0..RESOURCES_MAX + 5).map(|_| sample.clone()));
    many.narrow(None, None);
    assert_eq!((many.lockspaces[0].resources.len(), many.left_out), (RESOURCES_MAX, 7));
    assert!(has_waiters(&many.lockspaces[0].resources[0]));
}
