//! The commands about votes, on a cluster of real processes: what they say, their exit codes, and what comes of them.

use crate::cluster::{Cluster, complaint, is, one_at_a_time, quorate, wait_or, who};
use quorate::events::boottime_ns;
use serde_json::Value;

/// Asks until a command says what is wanted with that exit code; what it said.
fn until(what: &str, code: i32, args: &[&str], holds: impl Fn(&str) -> bool) -> String {
    let said = std::cell::RefCell::new(String::new());
    wait_or(
        || {
            let output = quorate(args);
            // What is not well is said on standard error.
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            let fits = output.status.code() == Some(code) && holds(&text);
            *said.borrow_mut() = format!("{:?}: {text}", output.status);
            fits.then_some(text)
        },
        || panic!("{what}: {args:?} said {}", said.borrow()),
    )
}

fn json(args: &[&str]) -> Value {
    let output = quorate(args);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        panic!("{args:?}: {e}: {out}{err}")
    })
}

#[test]
fn votes_are_counted_explained_given_up_and_forced() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(3);
    cluster.start_storage();
    cluster.form(3);
    let dir = cluster.path("n1");
    let ask = |words: &[&'static str]| {
        let mut args = vec!["--node".to_owned(), dir.clone()];
        args.extend(words.iter().map(|w| (*w).to_owned()));
        args
    };
    let run = |words: &[&'static str]| {
        let args = ask(words);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = quorate(&args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let wait = |what: &str, code: i32, words: &[&'static str], holds: &dyn Fn(&str) -> bool| {
        let args = ask(words);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        until(what, code, &args, holds)
    };

    // Looking.
    let text = wait("quorate", 0, &["member", "quorum"], &|t| t.contains("quorate  yes"));
    assert_eq!(text.matches("answers, member").count(), 3, "{text}");
    let text = run(&["member", "what-if", "--split", "1,2/3"]);
    assert!(text.contains("1 2: quorate") && text.contains("3: not quorate"), "{text}");
    let text = run(&["member", "what-if", "--down", "2,3"]);
    assert!(text.contains("1: not quorate"), "{text}");
    let text = run(&["member", "explain"]);
    assert!(text.contains("accepted"), "{text}");

    // Changing.
    run(&["member", "options", "--auto-tie-breaker", "lowest"]);
    run(&["member", "votes", "1", "2"]);
    wait("two votes", 0, &["member", "quorum"], &|t| {
        t.contains("2 votes") && t.contains("auto_tie_breaker lowest")
    });
    let text = run(&["member", "what-if", "--down", "2,3"]);
    assert!(text.contains("1: quorate"), "two of four and the tie breaker: {text}");
    let refused = complaint(1, &["--node", &dir, "member", "expected", "9"]);
    assert!(refused.contains("expected quorum"), "{refused}");
    run(&["member", "votes", "1", "1"]);
    run(&["member", "options", "--auto-tie-breaker", "off"]);
    wait("one vote each", 0, &["member", "quorum"], &|t| t.matches(" 1 votes").count() == 3);

    // Leaving with the vote: two are left of two.
    let since = boottime_ns();
    let three = cluster.path("n3");
    let output = quorate(&["--node", &three, "member", "leave", "--give-up-vote"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(cluster.ended("node3").code(), Some(0), "{}", cluster.log("node3"));
    wait("two voters", 0, &["member", "quorum"], &|t| t.matches("voter  ").count() == 2);

    // It comes back, and votes again.
    cluster.start_node(3);
    cluster.everybody_in(since, &[1, 2, 3]);
    wait("three voters", 0, &["member", "quorum"], &|t| {
        t.matches("answers, member").count() == 3 && t.matches(" 1 votes").count() == 3
    });

    // A failure is explained: who reported it, when, and how it was counted.
    cluster.kill("node3");
    let args = ask(&["--json", "member", "explain"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    until("the removal", 0, &args, |t| t.contains("Failed"));
    let why = json(&args);
    let reports = why["reports"].as_array().unwrap();
    assert!(reports.iter().all(|r| r["subject"].as_str().unwrap().starts_with("3#")), "{why}");
    assert_eq!(reports.len(), 2, "nodes 1 and 2 observe it: {why}");
    assert_eq!(why["left"].as_array().unwrap().len(), 1, "{why}");

    // The others burn down: a person's word, typed, and only if nobody is left out.
    let since = boottime_ns();
    cluster.kill("node2");
    cluster.wait_event("the lost quorum", since, |e| {
        is(e, "quorum") && who(e) == "node 1" && e["quorate"].as_bool() == Some(false)
    });
    wait("no quorum", 10, &["member", "quorum"], &|t| t.contains("quorate  NO"));
    let force = |off: &str, confirm: Option<&str>| {
        let mut args = vec!["--node", &dir, "member", "force-quorum", "--off", off, "--reason", "fire"];
        args.extend(confirm.into_iter().flat_map(|c| ["--confirm", c]));
        let output = quorate(&args);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.code(), text)
    };
    let sentence = |text: &str| {
        let (_, rest) = text.split_once("--confirm '").unwrap();
        rest.split_once('\'').unwrap().0.to_owned()
    };
    let (code, text) = force("2,3", None);
    assert!(code == Some(1) && text.contains("outside the guarantees"), "{text}");
    let (code, refused) = force("2", Some(&sentence(&force("2", None).1)));
    assert_eq!(code, Some(1), "node 3 was not declared off: {refused}");
    let (code, text) = force("2,3", Some(&sentence(&text)));
    assert!(code == Some(0) && text.contains("FORCED"), "{text}");
    wait("quorate by force", 0, &["member", "quorum"], &|t| t.contains("quorate  yes"));
    let forced = |t: &str| t.contains("Forced") && t.contains("fire");
    let mut epoch: u64 = json(&args)["epoch"].as_u64().unwrap();
    while !forced(&json_of(&dir, epoch)) {
        epoch = epoch.checked_sub(1).expect("the forced record is kept, with its reason");
    }
}

fn json_of(dir: &str, epoch: u64) -> String {
    json(&["--node", dir, "--json", "member", "explain", &epoch.to_string()]).to_string()
}

/// Two nodes and a witness: one node suffices with it, and not without.
#[test]
fn a_witness_decides_between_two_nodes() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(2);
    cluster.start_storage();
    cluster.form(2);
    let dir = cluster.path("n1");
    cluster.make_node(9, "w9", &cluster.address(9));
    let certificate = cluster.path("w9/pki/server-cert.pem");
    let output = quorate(&["--node", &dir, "member", "add-witness", "9", &cluster.address(9), &certificate]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.start_witness("w9");
    let args = ["--node", &dir, "member", "quorum"];
    until("the witness votes", 0, &args, |t| t.contains("9 witness    1 votes, answers"));
    cluster.kill("node2");
    until("the failure is decided", 0, &args, |t| t.contains("2 node       1 votes, silent"));
    let members = ["--node", &dir, "--json", "member", "explain"];
    until("node 2 is removed", 0, &members, |t| t.contains("Failed"));
    assert_eq!(quorate(&args).status.code(), Some(0), "one node and the witness are two of three");
    cluster.kill("w9");
    until("the quorum is lost", 10, &args, |t| t.contains("too few votes"));
    cluster.start_witness("w9");
    until("the witness is back", 0, &args, |t| t.contains("9 witness    1 votes, answers"));
}
