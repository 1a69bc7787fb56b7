//! The simulation of the distributed lock manager: seeds from `QUORATE_SEEDS=A..B` or `QUORATE_SEED=N`.

mod deadlock;
mod posix;
mod run;
#[allow(dead_code, reason = "scenarios use what the simulation does not")]
pub(crate) mod world;

use quorate_dlm::sim::Bug;
use quorate_membership::sim::{chosen_seeds, seeds};
use run::{Judge, Summary, run};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The message of a panic.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?").to_owned()
}

/// Seeds that failed once, and run always. 1465: a bucket of the directory that had never become whole was passed on as
/// whole, and what a dead member had in it was forgotten. 1967, 14497: a master that was removed and did not know it yet
/// read its value block beside writers under CR and NL, which may be.
const MENDED: [u64; 3] = [1465, 1967, 14497];

#[test]
fn seeds_hold_all_invariants() {
    let mut all = Summary::default();
    let range = seeds(0..200);
    let mended = MENDED.into_iter().filter(|_| chosen_seeds().is_none());
    for seed in range.clone().chain(mended) {
        match catch_unwind(AssertUnwindSafe(|| run(seed, None, Judge::All))) {
            Ok(summary) => {
                all.grants += summary.grants;
                all.crashes += summary.crashes;
                all.held_grants += summary.held_grants;
                all.values += summary.values;
                all.messages += summary.messages;
                all.private += summary.private;
                all.leaves += summary.leaves;
                all.ordered += summary.ordered;
                all.moves += summary.moves;
            }
            Err(panic) => {
                panic!("replay: cargo xtask sim dlm --seed {seed}\n{}", message(&*panic));
            }
        }
    }
    println!("{} seeds: {all:?}", range.end - range.start);
    if 50 <= range.end - range.start {
        let did = [
            [all.grants, all.crashes, all.held_grants, all.values],
            [all.private, all.leaves, all.ordered, all.moves],
        ];
        let did = did.as_flattened();
        assert!(did.iter().all(|n| 10 < *n), "too little was done: {all:?}");
    }
}

/// Runs seeds with a deliberate mistake until a check sees it; the seed, and what it said.
fn caught(bug: Bug, judge: Judge, word: &str, seeds: Range<u64>) -> Option<(u64, String)> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = seeds.into_iter().find_map(|seed| {
        let result = catch_unwind(AssertUnwindSafe(|| run(seed, Some(bug), judge)));
        result.err().map(|panic| (seed, message(&*panic))).filter(|(_, text)| text.starts_with(word))
    });
    std::panic::set_hook(hook);
    found
}

#[test]
fn every_deliberate_mistake_is_caught() {
    let bugs = [
        (Bug::GrantBeforeFence, "held: "),
        (Bug::ForgetHolds, "held: "),
        (Bug::AnswerEarly, ""),
        (Bug::NoUnknownHolds, "held: "),
        (Bug::LoseRelock, ""),
        (Bug::HearTheDead, ""),
        (Bug::ForgetFloor, "token: "),
        (Bug::TrustEveryCopy, "value: "),
        (Bug::LoseUnlock, ""),
        (Bug::StopEverything, "untouched: "),
        (Bug::NeverResend, "liveness: "),
        (Bug::LoseUnlockInRecovery, "liveness: "),
        (Bug::MoveUnannounced, ""),
        (Bug::MoveLosesForward, "liveness: "),
        (Bug::MoveKeepsMaster, "masters: "),
        (Bug::MoveLosesValue, "value: "),
        (Bug::MoveLosesToken, "token: "),
        (Bug::MoveTakesTwice, ""),
        (Bug::HeirForgotten, ""),
        (Bug::ClaimLost, "liveness: "),
    ];
    let mut missed = Vec::new();
    for (bug, word) in bugs {
        match caught(bug, Judge::All, "", 0..1_000) {
            Some((seed, text)) => {
                let first = text.lines().next().unwrap_or("");
                println!("{bug:?}: seed {seed}: {}", first.chars().take(150).collect::<String>());
                if !text.starts_with(word) {
                    println!("  (expected {word})");
                }
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

#[test]
fn deadlocks_are_found_within_a_second_and_never_made_up() {
    let mut all = deadlock::Summary::default();
    // A simulation of its own beside `seeds_hold_all_invariants`, with a quarter of its seeds.
    let range = seeds(0..200);
    let range = range.start..range.end.min(range.start + (range.end - range.start).div_ceil(4));
    for seed in range.clone() {
        match catch_unwind(AssertUnwindSafe(|| deadlock::run(seed, None))) {
            Ok(summary) => {
                all.grants += summary.grants;
                all.refused += summary.refused;
                all.cycles += summary.cycles;
                all.crashes += summary.crashes;
            }
            Err(panic) => {
                panic!("replay: cargo xtask sim dlm --seed {seed} (deadlock)\n{}", message(&*panic))
            }
        }
    }
    println!("{} seeds: {all:?}", range.end - range.start);
    if 50 <= range.end - range.start {
        let did = [all.grants, all.refused, all.cycles, all.crashes];
        assert!(did.iter().all(|n| 10 < *n), "too little was done: {all:?}");
    }
}

#[test]
fn mistakes_of_the_deadlock_search_are_caught() {
    for (bug, word) in [(Bug::WalkOnce, "false deadlock: "), (Bug::OverlookOrder, "late: ")] {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let found = (0..500).find_map(|seed| {
            let result = catch_unwind(AssertUnwindSafe(|| deadlock::run(seed, Some(bug))));
            result.err().map(|panic| (seed, message(&*panic)))
        });
        std::panic::set_hook(hook);
        let (seed, text) = found.unwrap_or_else(|| panic!("not caught: {bug:?}"));
        println!("{bug:?}: seed {seed}: {}", text.chars().take(150).collect::<String>());
        assert!(text.starts_with(word), "{bug:?}: expected {word}, found {text}");
    }
}

/// What users see is enough for these: with every invariant switched off, the recorded history shows the mistake.
#[test]
fn the_history_alone_shows_what_users_must_never_see() {
    let bugs = [
        (Bug::GrantBeforeFence, "history: exclusion: "),
        (Bug::LoseRelock, "history: exclusion: "),
        (Bug::TrustEveryCopy, "history: value: "),
    ];
    for (bug, word) in bugs {
        let (seed, text) =
            caught(bug, Judge::History, word, 0..1_000).unwrap_or_else(|| panic!("{bug:?} is not seen"));
        println!(
            "{bug:?}: seed {seed}: {}",
            text.lines().next().unwrap_or("").chars().take(150).collect::<String>()
        );
        assert!(text.starts_with(word), "{bug:?}: {text}");
    }
}
