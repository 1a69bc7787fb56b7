//! Sessions on a simulated network: connections break, overlap and lag; views come at different times; lives end.

mod invariants;
mod sim;

use quorate_membership::session::Bug;
use quorate_membership::sim::seeds;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[test]
fn no_message_is_lost_doubled_or_reordered() {
    let mut total = sim::Work::default();
    for seed in seeds(0..120) {
        match catch_unwind(AssertUnwindSafe(|| sim::run(seed, None))) {
            Ok(work) => total.add(&work),
            Err(panic) => {
                eprintln!("replay: cargo xtask sim sessions --seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{total:?}");
    if 10 < seeds(0..120).count() {
        assert!(0 < total.delivered && 0 < total.takeovers && 0 < total.breaks && 0 < total.removals);
        assert!(0 < total.full && 0 < total.held && 0 < total.pauses && 0 < total.ready);
        assert!(0 < total.forwarded && 0 < total.relayed);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    assert_eq!(sim::run(3, None), sim::run(3, None));
}

fn caught(bug: Bug, words: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..300).find_map(|seed| catch_unwind(AssertUnwindSafe(|| sim::run(seed, Some(bug)))).err());
    std::panic::set_hook(hook);
    let panic = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(text.contains(words), "{bug:?} was found by another check: {text}");
}

#[test]
fn a_message_delivered_twice_is_found() {
    caught(Bug::DeliversTwice, "exactly once");
}

#[test]
fn a_takeover_that_resends_nothing_is_found() {
    caught(Bug::ResendsNothing, "lost");
}

#[test]
fn held_messages_out_of_order_are_found() {
    caught(Bug::ReleasesBackwards, "exactly once");
}

#[test]
fn dropped_held_messages_are_found() {
    caught(Bug::DropsHeld, "exactly once");
}

#[test]
fn a_message_before_its_epoch_is_found() {
    caught(Bug::HoldsNothing, "epochs");
}

#[test]
fn a_message_of_a_removed_life_is_found() {
    caught(Bug::DeliversTheDead, "epochs");
}

#[test]
fn messages_that_are_forgotten_once_a_relay_has_them_are_found() {
    // Whichever shows first: what was lost with the relay, or the credit that nobody counted.
    caught(Bug::TrustsRelays, "");
}

#[test]
fn a_message_to_a_paused_service_is_found() {
    caught(Bug::DeliversToThePaused, "pauses");
}

#[test]
fn a_sender_that_is_never_told_to_go_on_is_found() {
    caught(Bug::ForgetsToSayReady, "ready");
}

#[test]
fn a_peer_without_a_bound_is_found() {
    caught(Bug::IgnoresCredit, "bounded");
}
