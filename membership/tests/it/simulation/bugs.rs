//! Each deliberate mistake is caught by the invariant that is there for it.

use super::attempt;
use quorate_membership::machine::Bug;

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

#[test]
fn acknowledging_a_removed_life_is_caught() {
    caught(Bug::AcknowledgesTheRemoved, &["lease_end"]);
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
