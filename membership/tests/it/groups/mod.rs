//! Process groups in simulation: order, synchrony, and what becomes of messages and members when nodes and processes go.

mod invariants;
mod sim;

use quorate_membership::group::Bug;
use quorate_membership::sim::seeds;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[test]
fn groups_keep_their_order_and_their_views() {
    let mut total = sim::Work::default();
    for seed in seeds(0..60) {
        match catch_unwind(AssertUnwindSafe(|| sim::run(seed, None))) {
            Ok(work) => total.add(&work),
            Err(panic) => {
                eprintln!("replay: cargo xtask sim groups --seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{total:?}");
    if 10 < seeds(0..60).count() {
        assert!(0 < total.sent && 0 < total.delivered && 0 < total.dropped && 0 < total.configurations);
        assert!(0 < total.crashes && 0 < total.removed);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    assert_eq!(sim::run(3, None), sim::run(3, None));
}

fn caught(bug: Bug, words: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..200).find_map(|seed| catch_unwind(AssertUnwindSafe(|| sim::run(seed, Some(bug)))).err());
    std::panic::set_hook(hook);
    let panic = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(text.contains(words), "{bug:?} was found by another check: {text}");
}

#[test]
fn a_message_before_its_place_is_found() {
    caught(Bug::DeliversAtOnce, "");
}

#[test]
fn messages_that_are_not_handed_out_are_found() {
    caught(Bug::SkipsMissing, "virtual synchrony");
}

#[test]
fn messages_of_a_view_that_is_over_are_found() {
    caught(Bug::TakesOldViews, "");
}

#[test]
fn a_dropped_message_that_comes_later_is_found() {
    caught(Bug::SendsDropped, "no creation");
}

#[test]
fn a_drop_without_a_word_is_found() {
    caught(Bug::DropsSilently, "self-delivery");
}

#[test]
fn a_sender_left_out_is_found() {
    caught(Bug::ForgetsItself, "");
}

#[test]
fn processes_of_removed_nodes_that_stay_are_found() {
    // Or by what waits forever for a word of a dead node.
    caught(Bug::KeepsTheDead, "");
}

#[test]
fn processes_that_left_unseen_and_stay_are_found() {
    caught(Bug::KeepsTheLeft, "membership order");
}

#[test]
fn a_group_that_goes_on_from_an_old_copy_is_found() {
    caught(Bug::TrustsOldCopies, "gap");
}

#[test]
fn a_wrong_sender_is_found() {
    caught(Bug::MixesSenders, "no creation");
}

#[test]
fn a_message_with_two_places_is_found() {
    caught(Bug::OrdersTwice, "no creation");
}

#[test]
fn a_leave_out_of_order_is_found() {
    caught(Bug::TellsLeavesEarly, "");
}
