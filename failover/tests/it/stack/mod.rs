//! The whole stack in one simulation: membership, fencing, locks, the storage server's fence and the block queues, all
//! production machines, under a small stand-in for a filesystem. Seeds from `QUORATE_SEEDS=A..B` or `QUORATE_SEED=N`.

mod fs;
mod invariants;
mod oracle;
mod sessions;
mod storage;
mod world;

use oracle::BLOCKS;
use quorate_membership::Identity;
use quorate_membership::sim::seeds;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use world::{Planted, Summary, World};

/// One seed: faults, then health, then every member reads every block under its exclusive lock.
fn run(seed: u64, planted: Option<Planted>) -> Summary {
    let mut world = World::new(seed, planted);
    world.run_for(Duration::from_secs(7), |_| false);
    world.stop_faults();
    let healed = world.run_for(Duration::from_secs(60), |w| w.is_whole());
    assert!(healed, "heals: a minute after the last fault it is not whole: {}", world.complaint());
    let lives: Vec<Identity> = world.newest().unwrap().identities().collect();
    for who in lives {
        for block in 0..BLOCKS {
            world.open(who, block, true, 0);
            let done = world.run_for(Duration::from_secs(10), |w| !w.uses(who, block));
            assert!(done, "heals: {who} does not get block {block}: {}", world.complaint());
        }
    }
    world.summary
}

fn attempt(seed: u64, planted: Option<Planted>) -> Result<Summary, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, planted))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
    })
}

#[test]
fn the_stack_keeps_every_invariant() {
    let (mut all, range) = (Summary::default(), seeds(0..100));
    for seed in range.clone() {
        match attempt(seed, None) {
            Ok(one) => all.add(&one),
            Err(text) => panic!("replay: cargo xtask sim stack --seed {seed}\n{text}"),
        }
    }
    println!("{} seeds: {all:?}", range.end - range.start);
    if 50 <= range.end - range.start {
        assert!(all.counts().iter().all(|n| 10 < *n), "too little was done: {all:?}");
    }
}

#[test]
fn every_planted_bug_of_the_stack_is_caught() {
    use quorate_dlm::sim::Bug as Locks;
    use quorate_gnbd::client::queue::QueueBug as Queue;
    use quorate_gnbd::fence::Bug as Fence;
    use quorate_membership::machine::Bug as Member;
    let bugs = [
        (Planted::Member(Member::DropsDebts), &["debts: "][..]),
        (Planted::Coordinator(quorate_fencing::Bug::GivesUp), &["heals: "]),
        (Planted::NoLease, &["lease first: "]),
        (Planted::Locks(Locks::GrantBeforeFence), &["lost write: ", "exclusion: ", "lock order: "]),
        (Planted::Locks(Locks::ForgetHolds), &["lost write: ", "lock order: "]),
        (Planted::Locks(Locks::NoUnknownHolds), &["lost write: ", "exclusion: ", "lock order: "]),
        (Planted::Locks(Locks::LoseRelock), &["lost write: ", "exclusion: ", "lock order: ", "heals: "]),
        // A token that goes back makes the writes of the newest grant look old.
        (Planted::Locks(Locks::MoveLosesToken), &["lock order: "]),
        (Planted::Fence(Fence::ConfirmBeforeDrain), &["late: "]),
        (Planted::Fence(Fence::LeaveOpen), &["late: "]),
        (Planted::Queue(Queue::RetainNothing), &["lost write: ", "debts: "]),
        (Planted::Filesystem(fs::Bug::UnlockDirty), &["lost write: "]),
        (Planted::Filesystem(fs::Bug::SkipReplay), &["debts: "]),
    ];
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let caught: Vec<_> = bugs
        .iter()
        .map(|(bug, _)| (0..1_000).find_map(|seed| attempt(seed, Some(*bug)).err().map(|e| (seed, e))))
        .collect();
    std::panic::set_hook(hook);
    let mut missed = Vec::new();
    for ((bug, by), caught) in bugs.iter().zip(caught) {
        match caught {
            Some((seed, text)) => {
                println!("{bug:?}: seed {seed}: {}", text.chars().take(160).collect::<String>());
                if !by.iter().any(|word| text.starts_with(word)) {
                    missed.push((bug, text));
                }
            }
            None => missed.push((bug, "not noticed".to_owned())),
        }
    }
    assert!(missed.is_empty(), "not caught, or by something else: {missed:?}");
}

/// Of all that two masters side by side bring about, the grants themselves are seen where nothing else is wrong before.
#[test]
fn two_masters_of_one_resource_are_noticed_by_their_grants() {
    let two = Some(Planted::Locks(quorate_dlm::sim::Bug::MoveKeepsMaster));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..300).find(|seed| attempt(*seed, two).is_err_and(|text| text.starts_with("exclusion: ")));
    std::panic::set_hook(hook);
    assert!(found.is_some(), "no two grants were seen");
}
