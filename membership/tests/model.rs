//! Exhaustive exploration of three voters: `cargo xtask model membership`, and a smaller one with every test run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use quorate_membership::machine::Bug;
use quorate_membership::sim::model::{Explored, ModelConfig, explore};

/// One record, nobody crashes.
fn small(bug: Option<Bug>) -> ModelConfig {
    ModelConfig { records: 1, steps: 0, may_crash: vec![], bug }
}

/// One crash of anybody, and time for another ballot.
fn large(bug: Option<Bug>) -> ModelConfig {
    ModelConfig { records: 1, steps: 2, may_crash: vec![0, 1, 2], bug }
}

fn show(name: &str, explored: &Explored) {
    println!(
        "{name}: {} states, {} steps, depth {}, {}; reached: {:?}",
        explored.states,
        explored.steps,
        explored.depth,
        if explored.is_whole { "all of them" } else { "not all" },
        explored.reached,
    );
    if let Some((broken, path)) = &explored.broken {
        println!("  {broken} is broken after {} actions: {}", path.len(), path.join(", "));
    }
}

#[test]
fn two_proposals_at_once_keep_every_invariant_in_every_order_of_events() {
    let explored = explore(small(None), 2_000_000, 2);
    show("3 voters, 2 proposals", &explored);
    assert_eq!(explored.broken, None);
    assert!(explored.is_whole && 1_000 < explored.states);
    assert_eq!(explored.reached.len(), 3, "a model in which nothing happens proves nothing");
}

#[test]
fn the_exploration_finds_deliberate_mistakes() {
    for (config, word) in [
        (small(Some(Bug::ForgetsAccepted)), "one view"),
        (small(Some(Bug::AnswersBeforeDurable)), "durable votes"),
    ] {
        let bug = config.bug;
        let explored = explore(config, 2_000_000, 2);
        show(&format!("{bug:?}"), &explored);
        assert_eq!(explored.broken.map(|(name, _)| name).as_deref(), Some(word), "{bug:?}");
    }
}

/// Minutes: only when asked for, see `cargo xtask model membership`.
#[test]
fn three_voters_two_proposals_one_crash() {
    let Ok(limit) = std::env::var("QUORATE_MODEL_STATES") else { return };
    let limit = limit.parse().unwrap();
    for (name, config) in [
        ("3 voters, 2 proposals, 2 records", ModelConfig { records: 2, ..small(None) }),
        ("3 voters, 2 proposals, 1 crash", ModelConfig { steps: 0, ..large(None) }),
        ("3 voters, 2 proposals, 1 crash, another ballot", large(None)),
    ] {
        let explored = explore(config, limit, 2);
        show(name, &explored);
        assert_eq!(explored.broken, None);
    }
}
