//! Recorded placements: each file in `tests/cases` holds a cluster's state and the expected plan.
//!
//! ```text
//! # comment                                  why the case is there
//! domain ordered restricted nofailback 1:1 2:2   node:priority; without this line: no domain
//! recovery restart 3 60                      policy, max_restarts, restart_expire_time in seconds
//! nodes 1 2=3                                members, =N: services they run
//! target enabled | enabled 2 | disabled
//! owner 1
//! unfenced
//! failed 2
//! expect start 1 | stay 1 | move 1 2 | stop 1 | wait | nothing disabled|nonode|failed
//! restarts 10 20 at 70 elsewhere             for the reaction: seconds; then the time of the failure
//! react restart | relocate | disable
//! ```

use quorate_failover::{
    ClusterState, Domain, Idle, Plan, Reaction, Recovery, ServiceConfig, Target, place, react,
};
use quorate_membership::{Instant, NodeId, Safety};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("`{word}` is no number"))
}

fn node(word: &str) -> NodeId {
    NodeId(number(word) as u32)
}

struct Case {
    config: ServiceConfig,
    state: ClusterState,
    restarts: Vec<Instant>,
    now: Instant,
    elsewhere: bool,
}

fn empty() -> Case {
    Case {
        config: ServiceConfig {
            name: "web".into(),
            resources: vec![],
            domain: None,
            recovery: Recovery::Restart,
            max_restarts: 0,
            restart_expire_time: Duration::ZERO,
            autostart: true,
            safety: Safety::Lease,
            servers: BTreeSet::new(),
        },
        state: ClusterState {
            nodes: BTreeMap::new(),
            target: Target::Enabled(None),
            owner: None,
            unfenced: false,
            failed: BTreeSet::new(),
        },
        restarts: Vec::new(),
        now: Instant(0),
        elsewhere: false,
    }
}

fn seconds(word: &str) -> Instant {
    Instant(number(word) * 1_000_000_000)
}

fn domain(words: &[&str]) -> Domain {
    let mut domain = Domain::default();
    for word in words {
        match (*word, word.split_once(':')) {
            ("ordered", _) => domain.ordered = true,
            ("restricted", _) => domain.restricted = true,
            ("nofailback", _) => domain.nofailback = true,
            (_, Some((n, priority))) => drop(domain.nodes.insert(node(n), number(priority) as u32)),
            _ => panic!("`{word}` is no part of a domain"),
        }
    }
    domain
}

fn show(plan: Plan) -> String {
    match plan {
        Plan::Stay(n) => format!("stay {n}"),
        Plan::Start(n) => format!("start {n}"),
        Plan::Move { from, to } => format!("move {from} {to}"),
        Plan::Stop(n) => format!("stop {n}"),
        Plan::WaitForFence => "wait".into(),
        Plan::Nothing(Idle::Disabled) => "nothing disabled".into(),
        Plan::Nothing(Idle::NoNode) => "nothing nonode".into(),
        Plan::Nothing(Idle::FailedEverywhere) => "nothing failed".into(),
    }
}

fn run(text: &str) -> usize {
    let mut case = empty();
    let mut checks = 0;
    for (n, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or("").trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [] => {}
            ["domain", ref rest @ ..] => case.config.domain = Some(domain(rest)),
            ["recovery", policy, max, window] => {
                case.config.recovery = match policy {
                    "restart" => Recovery::Restart,
                    "relocate" => Recovery::Relocate,
                    "disable" => Recovery::Disable,
                    other => panic!("line {n}: no policy `{other}`"),
                };
                case.config.max_restarts = number(max) as u32;
                case.config.restart_expire_time = Duration::from_secs(number(window));
            }
            ["nodes", ref rest @ ..] => {
                let parse = |w: &&str| match w.split_once('=') {
                    Some((n, load)) => (node(n), number(load) as usize),
                    None => (node(w), 0),
                };
                case.state.nodes = rest.iter().map(parse).collect();
            }
            ["target", "enabled"] => case.state.target = Target::Enabled(None),
            ["target", "enabled", n] => case.state.target = Target::Enabled(Some(node(n))),
            ["target", "disabled"] => case.state.target = Target::Disabled,
            ["owner", n] => case.state.owner = Some(node(n)),
            ["no", "owner"] => case.state.owner = None,
            ["unfenced"] => case.state.unfenced = true,
            ["fenced"] => case.state.unfenced = false,
            ["failed", ref rest @ ..] => case.state.failed = rest.iter().map(|w| node(w)).collect(),
            ["expect", ref want @ ..] => {
                assert_eq!(show(place(&case.config, &case.state)), want.join(" "), "line {n}");
                checks += 1;
            }
            ["restarts", ref rest @ ..] => {
                let at = rest.iter().position(|w| *w == "at").unwrap();
                case.restarts = rest[..at].iter().map(|w| seconds(w)).collect();
                case.now = seconds(rest[at + 1]);
                case.elsewhere = rest.get(at + 2) == Some(&"elsewhere");
            }
            ["react", want] => {
                let found = match react(&case.config, &case.restarts, case.now, case.elsewhere) {
                    Reaction::Restart => "restart",
                    Reaction::Relocate => "relocate",
                    Reaction::Disable => "disable",
                };
                assert_eq!(found, want, "line {n}");
                checks += 1;
            }
            _ => panic!("line {n}: `{line}` is not understood"),
        }
    }
    checks
}

#[test]
fn every_recorded_case_is_decided_as_recorded() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut total = 0;
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let found = std::panic::catch_unwind(|| run(&text));
        let checks = found.unwrap_or_else(|_| panic!("case {}", file.display()));
        assert!(0 < checks, "{} checks nothing", file.display());
        total += checks;
    }
    assert!(30 < total, "{total} checks");
}
