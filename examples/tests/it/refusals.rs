//! What people get wrong: documents, devices, commands without a node. Each is told in one line with an exit code.

use crate::cluster::{Cluster, complaint, one_at_a_time, quorate};
use quorate::admin::protocol::Command as Admin;

const NODES: &str = "name = \"c\"\n[[node]]\nid = 1\nname = \"a\"\naddress = \"127.0.0.1:1\"\n";

#[test]
fn documents_with_duplicates_are_refused_with_line_and_column() {
    let temp = crate::cluster::Temp::new();
    let path = temp.0.join("c.toml");
    let file = path.to_str().unwrap();
    let cases = [
        (
            format!("{NODES}[[node]]\nid = 1\nname = \"b\"\naddress = \"127.0.0.1:2\"\n"),
            "7:6: node id 1 is there twice",
        ),
        (
            format!("{NODES}[[node]]\nid = 2\nname = \"a\"\naddress = \"127.0.0.1:2\"\n"),
            "8:8: node name a is there twice",
        ),
        (format!("{NODES}votes = 1\nvotes = 2\n"), "7:1: duplicate key"),
        (format!("{NODES}votes = -1\n"), "6:9: invalid value: integer `-1`, expected u32"),
        (format!("{NODES}votes = 0\n"), "3:6: no node has a vote"),
        (
            format!("{NODES}[timing]\nheartbeat_ms = 400\n"),
            "7:16: heartbeat_ms is 400, from 10 to 200 is allowed: detection_ms is 800",
        ),
    ];
    for (text, wanted) in cases {
        std::fs::write(&path, &text).unwrap();
        let words = complaint(1, &["config", "check", file]);
        assert!(words.contains(wanted), "{wanted}: {words}");
    }
    std::fs::write(&path, NODES).unwrap();
    assert!(quorate(&["config", "check", file]).status.success());
}

#[test]
fn what_is_not_there_is_named() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(1);
    let words = complaint(1, &["storage", "--dir", &cluster.path("s1"), "--export", "x=/nonexistent/disk"]);
    assert!(
        words.starts_with("quorate: export x: ") && words.contains("No such file or directory"),
        "{words}"
    );
    let words = complaint(1, &["--node", &cluster.path("n1"), "status"]);
    assert!(words.contains("no node answers at ") && words.contains("admin.sock"), "{words}");
    cluster.start_storage();
    cluster.form(1);
    let document = |export: &str| {
        format!(
            "name = \"test\"\n[[node]]\nid = 1\nname = \"node1\"\naddress = \"{}\"\n\
             [[export]]\nname = \"{export}\"\nserver = \"storage1\"\naddress = \"{}\"\n",
            cluster.address(1),
            cluster.storage_address()
        )
    };
    cluster.ask(1, Admin::ConfigApply { expected: None, document: document("absent") }).unwrap();
    let error = cluster.ask(1, Admin::PvCreate("absent".into())).unwrap_err();
    assert!(error.contains("device absent: the storage server refuses this node"), "{error}");
    let error = cluster.ask(1, Admin::Mount("data".into())).unwrap_err();
    assert!(error.contains("the configuration has no filesystem data"), "{error}");
    let twice = document("absent") + "[[node]]\nid = 1\nname = \"b\"\naddress = \"127.0.0.1:2\"\n";
    let error = cluster.ask(1, Admin::ConfigApply { expected: None, document: twice }).unwrap_err();
    assert!(error.contains("11:6: node id 1 is there twice"), "{error}");
}

/// `quorate why` in a script: the exit codes of docs/commands.md.
#[test]
fn why_has_an_exit_code_for_a_lost_quorum_and_for_nothing() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(3);
    cluster.start_storage();
    cluster.form(3);
    let dir = cluster.path("n1");
    let why = |code: i32, words: &str| {
        let said = std::cell::RefCell::new(String::new());
        crate::cluster::wait_or(
            || {
                let output = quorate(&["--node", &dir, "why"]);
                *said.borrow_mut() = format!(
                    "{:?}: {}{}",
                    output.status,
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                );
                (output.status.code() == Some(code) && said.borrow().contains(words)).then_some(())
            },
            || panic!("{code}, {words} was not said, but {}", said.borrow()),
        );
    };
    why(0, "nothing is waited for");
    cluster.kill("node2");
    cluster.kill("node3");
    why(10, "quorum: no majority of the voters 1, 2, 3 answers");
    assert_eq!(quorate(&["--node", &dir, "--json", "why"]).status.code(), Some(10));
}
