//! Each deliberate mistake is caught by the invariant that is there for it.

use super::{World, attempt};
use crate::stability::{run, up};
use quorate_membership::NodeId;
use quorate_membership::machine::Bug;
use std::time::Duration;

/// So many seeds are tried for each mistake.
const SEEDS_MAX: u64 = 400;

/// Runs seeds until one fails; the failure must name one of `by`.
fn caught(bug: Bug, by: &[&str]) {
    for seed in 0..SEEDS_MAX {
        if let Err(what) = attempt(seed, Some(bug)) {
            let named = by.iter().any(|name| what.starts_with(&format!("invariant {name} ")));
            if named {
                println!("{bug:?}: seed {seed}: {what}");
                return;
            }
        }
    }
    panic!("{bug:?} was not caught by {by:?} in {SEEDS_MAX} seeds");
}

#[test]
fn answers_before_durable_are_caught() {
    caught(Bug::AnswersBeforeDurable, &["durable_votes", "one_view"]);
}

#[test]
fn a_forgotten_accepted_record_is_caught() {
    caught(Bug::ForgetsAccepted, &["one_view"]);
}

#[test]
fn a_majority_of_the_living_is_caught() {
    caught(Bug::MajorityOfTheLiving, &["majority", "one_view"]);
}

#[test]
fn dropped_debts_are_caught() {
    caught(Bug::DropsDebts, &["debts"]);
}

#[test]
fn a_cold_start_that_forgets_is_caught() {
    caught(Bug::ColdStartForgets, &["debts"]);
}

#[test]
fn a_lease_counted_from_arrival_is_caught() {
    caught(Bug::LeaseFromArrival, &["lease_end"]);
}

/// Node 3 is cut off until node 2 has accepted its removal. Then it reaches node 2 again, while node 2's yes does not
/// reach node 1 yet: an acknowledgement now would be a lease of which the yes knows nothing.
fn heard_again_after_the_accept(bug: Option<Bug>) -> Result<(), String> {
    let mut world = up(1, 3, 0, bug);
    let [one, two, three] = [1, 2, 3].map(NodeId);
    let removed = world.cluster.member(three).unwrap().me();
    world.cluster.network.partition(&[three], &[one, two]);
    let accepted = |w: &World| {
        let disk = w.cluster.member(two).unwrap().durable();
        disk.accepted.as_ref().is_some_and(|a| !a.view.contains(removed))
    };
    let end = world.cluster.now() + Duration::from_secs(2);
    while !accepted(&world) {
        assert!(world.cluster.now() < end, "node 2 accepts the removal");
        let next = world.cluster.next_at().unwrap();
        world.run_until(next)?;
    }
    world.cluster.network.heal();
    world.cluster.network.partition(&[three], &[one]);
    world.cluster.network.cut(two, one);
    run(&mut world, 300)?;
    assert!(accepted(&world), "nothing is decided yet");
    assert!(bug.is_some() || !world.cluster.is_quorate(three), "nobody acknowledges it");
    world.cluster.network.heal();
    world.cluster.network.partition(&[three], &[one, two]);
    run(&mut world, 300)?;
    let newest = world.history.newest().unwrap();
    assert!(!newest.contains(removed), "the removal is decided: {:?}", newest.cause);
    Ok(())
}

#[test]
fn acknowledging_a_removed_life_is_caught() {
    heard_again_after_the_accept(None).unwrap();
    let what = heard_again_after_the_accept(Some(Bug::AcknowledgesTheRemoved)).unwrap_err();
    assert!(what.starts_with("invariant lease_end "), "{what}");
}

#[test]
fn not_awaiting_the_lease_is_caught() {
    caught(Bug::LeaseNotAwaited, &["lease_end"]);
}

#[test]
fn fencing_before_the_leases_end_is_caught() {
    caught(Bug::FencesEarly, &["lease_end"]);
}

#[test]
fn admitting_an_old_life_is_caught() {
    caught(Bug::AdmitsOldLives, &["lives"]);
}

#[test]
fn taking_late_requests_is_caught() {
    caught(Bug::TakesLateRequests, &["requests"]);
}

#[test]
fn installing_with_gaps_is_caught() {
    caught(Bug::InstallsWithGaps, &["gaps"]);
}

#[test]
fn a_tie_breaker_counted_on_both_sides_is_caught() {
    caught(Bug::TieBreaksBothSides, &["majority", "one_view"]);
}

#[test]
fn votes_lowered_by_a_side_that_is_not_quorate_are_caught() {
    caught(Bug::LowersWithoutQuorum, &["majority", "one_view"]);
}

#[test]
fn a_quorum_forced_without_a_word_in_the_record_is_caught() {
    caught(Bug::ForcesInSilence, &["majority"]);
}

#[test]
fn a_version_raised_before_all_speak_it_is_caught() {
    caught(Bug::RaisesVersionEarly, &["version"]);
}
