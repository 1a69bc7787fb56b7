//! Who a node is: clocks and certificates, and two nodes with one identity.

use crate::cluster::{Cluster, complaint, copy_dir, one_at_a_time, output_of, wait_for};
use quorate::admin::protocol::Command as Admin;
use quorate_membership::NodeId;
use quorate_membership::driver::pki::Ca;
use std::path::Path;

const DAY: u64 = 86_400;

#[expect(clippy::disallowed_methods, reason = "certificates are valid by the wall clock")]
fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// What a boot with a wrong clock looks like: the certificate's time is not now.
#[test]
fn a_wrong_clock_or_an_expired_certificate_stops_the_start_and_an_expiring_one_is_warned_about() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(1);
    let ca = Ca::load(Path::new(&cluster.path("ca"))).unwrap();
    let now = unix_now();
    let pki = cluster.temp.0.join("n1/pki");
    let issue = |start: u64, end: u64| {
        std::fs::remove_dir_all(&pki).unwrap();
        ca.issue_node_valid("node1", NodeId(1), start, end).unwrap().save(&pki).unwrap();
    };
    let dir = cluster.path("n1");
    issue(now + 10 * DAY, now + 20 * DAY);
    let words = complaint(1, &["node", "--dir", &dir]);
    let wanted = "quorate: the certificate of node 1 is valid only in 10 days: this machine's clock is probably wrong\n";
    assert_eq!(words, wanted);
    issue(now - 20 * DAY, now - 10 * DAY + 60);
    let words = complaint(1, &["node", "--dir", &dir]);
    let wanted = "quorate: the certificate of node 1 expired 9 days ago: issue a new one (or set this machine's clock)\n";
    assert_eq!(words, wanted);
    issue(now - DAY, now + 10 * DAY + 60);
    // The first record has the key of the certificate it was made with; this node is told so, after the warning.
    cluster.start_node(1);
    wait_for("the warning", || {
        cluster
            .log("node1")
            .lines()
            .any(|l| l.contains("the certificate is about to expire") && l.contains("days=10"))
            .then_some(())
    });
}

#[test]
fn one_directory_runs_one_node_and_a_second_identity_is_found_out() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(2);
    cluster.start_storage();
    cluster.form(2);
    let running = cluster.node_process(2);
    // The same directory: its lock.
    let words = complaint(1, &["node", "--dir", &cluster.path("n2")]);
    let state = std::fs::canonicalize(cluster.path("n2/state")).unwrap();
    assert_eq!(
        words,
        format!("quorate: state directory {} is in use by another node process\n", state.display())
    );
    // A fresh directory with the same certificate, and a copied one with its state: both elsewhere.
    let pki = cluster.temp.0.join("n2/pki");
    cluster.make_node(2, "n22", &format!("{}.22:7411", cluster.net));
    let fresh = cluster.temp.0.join("n22");
    // Another key of the same node is not in the roster: nobody lets it in, so it never gets further than asking.
    cluster.start_node(22);
    wait_for("the refusal", || {
        cluster
            .log("node22")
            .contains("the key of node 2 is not the one in the cluster's roster")
            .then_some(())
    });
    cluster.kill("node22");
    std::fs::remove_dir_all(fresh.join("pki")).unwrap();
    std::fs::remove_dir_all(fresh.join("state")).unwrap();
    copy_dir(&pki, &fresh.join("pki"));
    // With its state: the promises of one acceptor must not be made twice.
    let _none = std::fs::remove_dir_all(fresh.join("state"));
    copy_dir(&cluster.temp.0.join("n2/state"), &fresh.join("state"));
    let words = complaint(1, &["node", "--dir", fresh.to_str().unwrap()]);
    assert!(words.contains("was copied: made for inode "), "{words}");
    assert_eq!(cluster.node_process(2), running, "the first one stays");
    assert_eq!(cluster.status(2)["quorate"], true);
}

/// A node with another cluster's certificates dials a member: refused before the first byte of ours, and both logs say so.
#[test]
fn a_node_of_another_cluster_is_refused_and_logged() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(1);
    cluster.start_node(1);
    wait_for("node 1", || cluster.ask(1, Admin::Status).ok());
    let (ca, theirs) = (cluster.path("other-ca"), format!("{}.3:7411", cluster.net));
    let (dir, join) = (cluster.path("n2"), format!("1@{}", cluster.address(1)));
    let listen = cluster.address(2);
    output_of(
        0,
        &[
            "cluster",
            "create",
            "--ca",
            &ca,
            "--dir",
            &cluster.path("n3"),
            "--name",
            "other",
            "--id",
            "1",
            "--node-name",
            "node1",
            "--listen",
            &theirs,
        ],
    );
    output_of(
        0,
        &[
            "cluster", "node", "--ca", &ca, "--dir", &dir, "--id", "2", "--name", "node2", "--listen",
            &listen, "--join", &join,
        ],
    );
    cluster.start_node(2);
    wait_for("both logs", || {
        let here = cluster
            .log("node1")
            .lines()
            .any(|l| l.contains("a peer was refused") && l.contains("UnknownIssuer"));
        let there = cluster.log("node2").lines().any(|l| l.contains("UnknownIssuer"));
        (here && there).then_some(())
    });
    let members = cluster.ask(1, Admin::Members).unwrap();
    assert_eq!(members["nodes"].as_array().map(Vec::len), Some(1), "{members}");
    assert_eq!(cluster.status(1)["quorate"], true);
}
