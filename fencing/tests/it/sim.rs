//! Seeds of the simulation: faults first, then they stop and every debt must be closed.

use crate::world::World;
use quorate_fencing::Bug;
use quorate_membership::sim::seeds;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Far above what any seed needs: a loop that does not end is a failure, not a long test.
const HAPPENINGS_MAX: u64 = 200_000;

#[derive(Debug, Default)]
struct Done {
    proofs: u64,
    installs: u64,
    trace: u64,
}

fn run(seed: u64, bug: Option<Bug>) -> Result<Done, String> {
    let mut world = World::new(seed, bug);
    let mut count = 0;
    while world.now.0 < 120_000_000_000 {
        let Some(result) = world.step() else { break };
        result?;
        count += 1;
        if HAPPENINGS_MAX < count {
            return Err("liveness: it never comes to rest".to_owned());
        }
    }
    if !world.newest().debts.is_empty() {
        return Err(format!("liveness: debts are left after healing: {:?}", world.newest().debts));
    }
    Ok(Done { proofs: world.proofs, installs: world.installs, trace: world.trace() })
}

fn guarded(seed: u64, bug: Option<Bug>) -> Result<Done, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, bug))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!("panic: {}", text.unwrap_or_else(|| "without a text".to_owned())))
    })
}

#[test]
fn every_seed_is_safe_and_heals() {
    let (mut proofs, mut installs) = (0, 0);
    for seed in seeds(0..200) {
        let again = guarded(seed, None);
        match guarded(seed, None) {
            Ok(done) => {
                let trace = again.map(|d| d.trace).unwrap_or_default();
                assert_eq!(trace, done.trace, "seed {seed} runs differently the second time");
                proofs += done.proofs;
                installs += done.installs;
            }
            Err(error) => panic!("{error}\nreplay: cargo xtask sim fencing --seed {seed}"),
        }
    }
    println!("{proofs} proofs, {installs} installations");
    assert!(0 < proofs && 0 < installs, "the simulation does no real work");
}

/// Runs seeds until the bug is caught by what shall catch it.
fn is_caught(bug: Bug, by: &str) {
    let caught = (0..300).find_map(|seed| guarded(seed, Some(bug)).err().filter(|e| e.starts_with(by)));
    assert!(caught.is_some(), "{bug:?} is not caught by {by}");
}

#[test]
fn fencing_without_quorum_is_caught() {
    is_caught(Bug::NoQuorum, "only_quorate");
}

#[test]
fn fencing_by_every_member_is_caught() {
    is_caught(Bug::EveryMember, "only_quorate");
}

#[test]
fn turning_off_twice_is_caught() {
    is_caught(Bug::ForgetsPowerOff, "once");
}

#[test]
fn proving_before_the_end_of_the_lease_is_caught() {
    is_caught(Bug::IgnoresLease, "lease_first");
}

#[test]
fn proving_a_service_before_its_kill_time_is_caught() {
    is_caught(Bug::IgnoresKillTime, "lease_first");
}

#[test]
fn taking_one_server_for_all_is_caught() {
    is_caught(Bug::OneServerIsEnough, "every_server");
}

#[test]
fn taking_one_power_supply_for_all_is_caught() {
    is_caught(Bug::FirstStepIsEnough, "really_off");
}

#[test]
fn taking_a_failure_for_success_is_caught() {
    is_caught(Bug::IgnoresFailure, "really_off");
}

#[test]
fn giving_up_is_caught() {
    is_caught(Bug::GivesUp, "liveness");
}
