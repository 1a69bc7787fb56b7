//! Exhaustive exploration of small clusters: `cargo xtask model dlm`, and a smaller one with every test run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use quorate_dlm::sim::Bug;
use quorate_dlm::sim::model::{Explored, ModelConfig, explore};

/// Two nodes that compete for one resource, one of them with two users; either may crash.
fn small(bug: Option<Bug>) -> ModelConfig {
    ModelConfig { users: vec![(0, 0), (1, 0), (0, 0)], nodes: 2, may_crash: vec![0, 1], bug }
}

/// Three nodes, two resources, one crash.
fn large(bug: Option<Bug>) -> ModelConfig {
    ModelConfig { users: vec![(0, 0), (1, 0), (1, 1), (2, 1)], nodes: 3, may_crash: vec![0, 1, 2], bug }
}

fn show(name: &str, explored: &Explored) {
    println!(
        "{name}: {} states, {} steps, depth {}, {}",
        explored.states,
        explored.steps,
        explored.depth,
        if explored.is_whole { "all of them" } else { "not all" }
    );
    if let Some((broken, path)) = &explored.broken {
        println!("  {broken} is broken after {} actions: {}", path.len(), path.join(", "));
    }
}

#[test]
fn a_small_cluster_keeps_every_invariant_in_every_order_of_events() {
    let explored = explore(small(None), 2_000_000, 2);
    show("2 nodes, 1 resource, 1 crash", &explored);
    assert_eq!(explored.broken, None);
    assert!(explored.is_whole && 1_000 < explored.states);
}

#[test]
fn the_exploration_finds_deliberate_mistakes() {
    for (bug, word) in [
        (Bug::GrantBeforeFence, "held"),
        (Bug::LoseUnlock, "finishes"),
        (Bug::LoseUnlockInRecovery, "finishes"),
    ] {
        let explored = explore(small(Some(bug)), 2_000_000, 2);
        show(&format!("{bug:?}"), &explored);
        assert_eq!(explored.broken.map(|(name, _)| name).as_deref(), Some(word), "{bug:?}");
    }
}

/// Minutes: only when asked for, see `cargo xtask model dlm`.
#[test]
fn three_nodes_two_resources_one_crash() {
    let Ok(limit) = std::env::var("QUORATE_MODEL_STATES") else { return };
    let explored = explore(large(None), limit.parse().unwrap(), 2);
    show("3 nodes, 2 resources, 1 crash", &explored);
    assert_eq!(explored.broken, None);
}
