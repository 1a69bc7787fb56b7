//! Random schedules against the invariants, and proof that each of them catches something.

use crate::world::World;
use quorate_ccs::Bug;
use quorate_membership::sim::seeds;
use std::panic::catch_unwind;

/// Seeds when nothing else is said.
const SEEDS_DEFAULT: core::ops::Range<u64> = 0..200;

#[test]
fn sim_invariants_hold_on_every_seed() {
    let mut done = 0;
    for seed in seeds(SEEDS_DEFAULT) {
        let run = || {
            let mut world = World::new(seed, None);
            (world.run(), world.done)
        };
        let Ok(first) = catch_unwind(run) else { panic!("replay: cargo xtask sim ccs --seed {seed}") };
        assert_eq!(first, run(), "seed {seed} is not reproducible");
        done += first.1;
    }
    println!("updates committed: {done}");
    assert!(0 < done, "a simulation that does nothing proves nothing");
}

fn caught(bug: Bug, by: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let found = (0..1500).find_map(|seed| {
        let outcome = catch_unwind(|| World::new(seed, Some(bug)).run());
        let payload = outcome.err()?;
        let text = payload.downcast_ref::<String>().cloned().unwrap_or_default();
        text.contains(by).then_some(seed)
    });
    std::panic::set_hook(hook);
    assert!(found.is_some(), "{bug:?} is not caught by `{by}`");
}

#[test]
fn sim_every_planted_bug_is_caught() {
    // One test, because the panic hook is the process's.
    caught(Bug::ServeWithoutReading, "committed stays");
    caught(Bug::AcceptBeforeDurable, "durable majority");
    caught(Bug::ApplyTwice, "apply once");
    caught(Bug::HalfCommits, "durable majority");
    caught(Bug::ForgetsFormerVoters, "committed stays");
}
