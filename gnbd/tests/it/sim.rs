//! Seeds of the simulation of fence, queues, network and disk, and the mistakes it must notice.

use crate::sim_world::{Counts, Planted, World};
use quorate_gnbd::client::queue::QueueBug;
use quorate_gnbd::fence::Bug;
use quorate_membership::sim::seeds;

fn attempt(seed: u64, planted: Option<Planted>) -> Result<Counts, String> {
    let run = std::panic::catch_unwind(|| World::new(seed, planted).run());
    run.map_err(|e| match (e.downcast_ref::<String>(), e.downcast_ref::<&str>()) {
        (Some(s), _) => s.clone(),
        (None, Some(s)) => (*s).to_owned(),
        (None, None) => "a panic".into(),
    })
}

#[test]
fn the_fence_and_the_queues_keep_every_invariant() {
    let mut all = Counts::default();
    for seed in seeds(0..200) {
        match attempt(seed, None) {
            Ok(c) => {
                all.writes += c.writes;
                all.flushes += c.flushes;
                all.fences += c.fences;
                all.crashes += c.crashes;
            }
            Err(e) => panic!("{e}\nreplay: cargo xtask sim gnbd --seed {seed}"),
        }
    }
    println!("{all:?}");
    assert!(0 < all.writes && 0 < all.flushes, "work was done: {all:?}");
    assert!(
        1 == seeds(0..200).count() || (0 < all.fences && 0 < all.crashes),
        "things went wrong on the way: {all:?}"
    );
}

fn is_caught(planted: Planted, by: &[&str]) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let caught = (0..400).find_map(|seed| attempt(seed, Some(planted)).err().map(|e| (seed, e)));
    std::panic::set_hook(hook);
    let (seed, e) = caught.unwrap_or_else(|| panic!("{planted:?} is not noticed"));
    println!("{planted:?}: seed {seed}: {e}");
    assert!(by.iter().any(|b| e.contains(b)), "{planted:?} is noticed by something else: {e}");
}

#[test]
fn every_planted_bug_is_caught() {
    for (planted, by) in [
        (Planted::Fence(Bug::ConfirmBeforeDrain), &["late", "stale"][..]),
        (Planted::Fence(Bug::ConfirmBeforePersist), &["late", "stale"]),
        (Planted::Fence(Bug::AnyIncarnation), &["late", "stale"]),
        (Planted::Fence(Bug::LeaveOpen), &["late", "stale"]),
        (Planted::Fence(Bug::NoGenerationDrain), &["stale"]),
        (Planted::Queue(QueueBug::NoSupersede), &["stale", "durable", "visible"]),
        (Planted::Queue(QueueBug::AnyVerifier), &["durable"]),
        (Planted::Queue(QueueBug::CoverLater), &["durable", "visible", "LIVENESS"]),
        (Planted::Queue(QueueBug::RetainNothing), &["durable", "visible", "LIVENESS"]),
        (Planted::Queue(QueueBug::TrustInterrupted), &["durable", "visible", "LIVENESS"]),
        (Planted::Queue(QueueBug::NoWaitForResend), &["stale", "visible", "durable"]),
    ] {
        is_caught(planted, by);
    }
}
