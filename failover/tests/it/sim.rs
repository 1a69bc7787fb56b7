//! Seeds: managers under crashes, pauses, failing agents and lost answers. First faults, then healing.

use crate::invariants::Invariants;
use crate::world::World;
use quorate_failover::machine::Bug;
use quorate_membership::Instant;
use quorate_membership::sim::seeds;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    starts: usize,
    failovers: usize,
    leftovers: usize,
    steps: usize,
}

fn run(seed: u64, bug: Option<Bug>) -> Work {
    let mut world = World::new(seed, bug);
    let invariants = Invariants;
    let mut steps = 0;
    let mut until = |world: &mut World, end: Instant| {
        while world.step(end) {
            invariants.check(world);
            steps += 1;
            assert!(steps < 200_000, "it goes round in circles");
        }
    };
    let mut end = Instant(0) + Duration::from_secs(30);
    until(&mut world, end);
    // Healing: crashed nodes come back, failed stops are tried again, everything is enabled.
    end = end + World::settle_time();
    until(&mut world, end);
    world.enable_all();
    end = end + World::settle_time();
    until(&mut world, end);
    world.start_all();
    end = end + World::settle_time();
    until(&mut world, end);
    world.check_healed();
    Work { starts: world.starts, failovers: world.failovers, leftovers: world.leftovers, steps }
}

#[test]
fn no_service_runs_twice_and_all_run_again() {
    let mut all = Work::default();
    for seed in seeds(0..300) {
        let work = catch_unwind(AssertUnwindSafe(|| run(seed, None)));
        let Ok(work) = work else { panic!("replay: cargo xtask sim failover --seed {seed}") };
        all.starts += work.starts;
        all.failovers += work.failovers;
        all.leftovers += work.leftovers;
        all.steps += work.steps;
    }
    println!("{all:?}");
    assert!(0 < all.starts);
    if 100 < seeds(0..300).count() {
        assert!(0 < all.failovers && 0 < all.leftovers, "{all:?}");
    }
}

#[test]
fn a_seed_runs_the_same_way_twice() {
    assert_eq!(run(7, None), run(7, None));
}

/// Runs seeds with a deliberate mistake until an invariant that says `what` catches it.
fn caught(bug: Bug, what: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..400).find_map(|seed| {
        let error = catch_unwind(AssertUnwindSafe(|| run(seed, Some(bug)))).err()?;
        let text = error.downcast_ref::<String>().cloned().unwrap_or_default();
        text.contains(what).then_some(seed)
    });
    std::panic::set_hook(hook);
    assert!(found.is_some(), "{bug:?} was not caught");
}

#[test]
fn starting_before_the_fence_is_caught() {
    caught(Bug::StartsUnfenced, "without the attachment");
}

#[test]
fn starting_without_the_owner_lock_is_caught() {
    caught(Bug::IgnoresLock, "without the owner lock");
}

#[test]
fn giving_up_before_stopping_is_caught() {
    caught(Bug::ReleasesFirst, "runs on nodes");
}

#[test]
fn believing_a_failed_stop_is_caught() {
    caught(Bug::IgnoresFailedStop, "runs on nodes");
}

#[test]
fn starting_over_leftovers_is_caught() {
    caught(Bug::SkipsProbe, "while");
}

#[test]
fn stopping_in_the_order_of_the_start_is_caught() {
    caught(Bug::StopsForwards, "stops resource");
}

#[test]
fn starting_in_the_wrong_order_is_caught() {
    caught(Bug::StartsBackwards, "before an earlier one");
}

#[test]
fn starting_without_quorum_is_caught() {
    caught(Bug::IgnoresQuorum, "without quorum");
}
