//! Trouble that must change nothing, and trouble that must change one thing once: loss, one-way links, pauses, broken
//! pairs, several crashes at one instant, and a tenth of the nodes on bad ports.
//!
//! The default settings are used throughout. Each statement is also shown to fail under a planted mistake.

use crate::invariants::OneCut;
use crate::simulation::World;
use quorate_membership::machine::{Bug, Config};
use quorate_membership::sim::{ClusterConfig, Faults};
use quorate_membership::{Cause, Epoch, Identity, NodeId, Rng};
use std::collections::BTreeSet;
use std::time::Duration;

const SEEDS: u64 = 4;

/// A cluster of `voters` and `observers` that came up; everybody is a quorate member and the voters vote.
pub(crate) fn up(seed: u64, voters: u32, observers: u32, bug: Option<Bug>) -> World {
    let config = ClusterConfig {
        voters,
        observers,
        contacts: (16 < voters + observers).then_some(1),
        bug,
        ..ClusterConfig::three()
    };
    let mut world = World::new(config, Rng::new(seed));
    world.cluster.start_all();
    let ready = |w: &World| {
        w.cluster.nodes().all(|(n, _)| w.cluster.is_quorate(n))
            && w.history.newest().is_some_and(|v| v.voters.voters.len() == voters as usize)
    };
    for _ in 0..200 {
        run(&mut world, 50).unwrap();
        if ready(&world) {
            // Old heartbeats are out of the detectors' windows, new edges are watched.
            run(&mut world, 5_000).unwrap();
            assert!(ready(&world));
            return world;
        }
    }
    panic!("seed {seed}: not up: {}", world.history.state_of(&world.cluster));
}

pub(crate) fn run(world: &mut World, ms: u64) -> Result<(), String> {
    let until = world.cluster.now() + Duration::from_millis(ms);
    world.run_until(until)
}

pub(crate) fn epoch(world: &World) -> Epoch {
    world.history.newest().unwrap().epoch
}

fn unchanged(world: &World, before: Epoch) -> Result<(), String> {
    match world.history.newest() {
        Some(view) if view.epoch != before => Err(format!("record {}: {:?}", view.epoch, view.evidence)),
        _ => Ok(()),
    }
}

/// Runs `check` on seeds: it must hold on all of them, and fail on one of them with the mistake.
fn holds_and_catches(bug: Bug, check: impl Fn(u64, Option<Bug>) -> Result<(), String>) {
    for seed in 0..SEEDS {
        if let Err(what) = check(seed, None) {
            panic!("seed {seed}: {what}");
        }
    }
    let caught = (0..SEEDS * 4).find_map(|seed| check(seed, Some(bug)).err().map(|what| (seed, what)));
    let (seed, what) = caught.unwrap_or_else(|| panic!("{bug:?} was not caught"));
    println!("{bug:?}: seed {seed}: {what}");
}

#[test]
fn thirty_percent_loss_for_a_minute_changes_no_view() {
    for seed in 0..2 {
        for (voters, observers) in [(3, 0), (5, 2)] {
            let mut world = up(seed, voters, observers, None);
            let before = epoch(&world);
            world.cluster.network.faults =
                Faults { loss_ppm: 300_000, delay_max: Duration::from_millis(5), ..Faults::none() };
            run(&mut world, 60_000).unwrap();
            unchanged(&world, before).unwrap();
        }
    }
}

#[test]
fn pauses_of_three_hundred_milliseconds_change_no_view() {
    for seed in 0..2 {
        let mut world = up(seed, 5, 0, None);
        let (before, mut rng) = (epoch(&world), Rng::new(seed));
        for _ in 0..40 {
            let node = NodeId(1 + rng.below(5) as u32);
            world.cluster.pause(node, Duration::from_millis(300));
            run(&mut world, 300 + rng.below(600)).unwrap();
        }
        unchanged(&world, before).unwrap();
    }
}

/// One direction of one pair is cut for most of the time in which a relay may bridge it.
fn one_way(seed: u64, bug: Option<Bug>) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let mut world = up(seed, 5, 0, bug);
    let before = epoch(&world);
    // The leader is at one end of half of them.
    let other = 2 + rng.below(4) as u32;
    let (from, to) = if seed.is_multiple_of(2) { (other, 1) } else { (1, other) };
    world.cluster.network.cut(NodeId(from), NodeId(to));
    run(&mut world, 2_700)?;
    let quorate = world.cluster.nodes().all(|(n, _)| world.cluster.is_quorate(n));
    world.cluster.network.heal();
    run(&mut world, 5_000)?;
    unchanged(&world, before)?;
    if quorate { Ok(()) } else { Err("a member lost its lease".into()) }
}

#[test]
fn a_one_way_link_changes_no_view_while_it_may_be_relayed_and_the_leaders_word_alone_is_not_enough() {
    holds_and_catches(Bug::LeaderAlone, one_way);
}

#[test]
fn a_leader_that_hears_nobody_is_replaced_and_removed_although_everybody_hears_it() {
    for seed in 0..SEEDS {
        let mut world = up(seed, 5, 0, None);
        let deaf = world.cluster.member(NodeId(1)).unwrap().me();
        for other in 2..=5 {
            world.cluster.network.cut(NodeId(other), NodeId(1));
        }
        run(&mut world, 6_000).unwrap();
        let newest = world.history.newest().unwrap();
        assert!(!newest.contains(deaf), "{newest:?}");
        assert_eq!(newest.members.len(), 4, "{:?}", newest.cause);
    }
}

/// Broken pairs, and the nodes that must go for them.
type Pairs = &'static [(u32, u32)];
const BROKEN: [(Pairs, &[u32]); 4] = [
    (&[(2, 3)], &[3]),
    (&[(4, 1), (4, 2)], &[4]),
    (&[(2, 3), (4, 5)], &[3, 5]),
    (&[(1, 2), (2, 3), (2, 4)], &[2]),
];

/// Pairs are cut for half a minute, one way or both: the smallest set goes, once, and comes back after the healing.
fn broken_pairs(seed: u64, bug: Option<Bug>) -> Result<(), String> {
    let (pairs, out) = BROKEN[seed as usize % BROKEN.len()];
    let mut world = up(seed, 6, 0, bug);
    let nodes: BTreeSet<NodeId> = out.iter().map(|n| NodeId(*n)).collect();
    let lives: BTreeSet<Identity> = nodes.iter().map(|n| world.cluster.member(*n).unwrap().me()).collect();
    let before = epoch(&world);
    world.watch(Box::new(OneCut { incident: lives.clone(), before }));
    for (a, b) in pairs {
        world.cluster.network.cut(NodeId(*a), NodeId(*b));
        if !seed.is_multiple_of(3) {
            world.cluster.network.cut(NodeId(*b), NodeId(*a));
        }
    }
    run(&mut world, 30_000)?;
    let newest = world.history.newest().unwrap();
    if newest.epoch != before.next() || !matches!(&newest.cause, Cause::NoMesh(gone) if *gone == lives) {
        return Err(format!("not one record without {nodes:?}: record {} {:?}", newest.epoch, newest.cause));
    }
    world.cluster.network.heal();
    run(&mut world, 12_000)?;
    let back = world.history.newest().unwrap().members.len();
    if back == 6 { Ok(()) } else { Err(format!("{back} of 6 are in after the healing")) }
}

#[test]
fn the_smallest_set_leaves_in_one_record_and_does_not_flap() {
    holds_and_catches(Bug::RemovesBothEnds, broken_pairs);
}

#[test]
fn a_node_that_was_removed_for_its_paths_shows_better_ones_first() {
    // The pair is healed right after the removal.
    let check = |seed: u64, bug: Option<Bug>| {
        let mut world = up(seed, 5, 0, bug);
        world.cluster.network.partition(&[NodeId(2)], &[NodeId(3)]);
        while !matches!(world.history.newest().unwrap().cause, Cause::NoMesh(_)) {
            run(&mut world, 10)?;
        }
        world.cluster.network.heal();
        run(&mut world, 12_000)?;
        let back = world.history.newest().unwrap().members.len();
        if back == 5 { Ok(()) } else { Err(format!("{back} of 5 are in after the healing")) }
    };
    holds_and_catches(Bug::ReadmitsAtOnce, check);
}

/// Several nodes crash at one instant, in a small cluster the leader among them every other time.
fn incident(seed: u64, bug: Option<Bug>) -> Result<(), String> {
    let mut world = up(seed, 7, 0, bug);
    let first = 1 + (seed % 2) as u32;
    let lives: BTreeSet<Identity> =
        (first..first + 3).map(|n| world.cluster.member(NodeId(n)).unwrap().me()).collect();
    let before = epoch(&world);
    world.watch(Box::new(OneCut { incident: lives.clone(), before }));
    for who in &lives {
        world.cluster.crash(who.node);
    }
    run(&mut world, 1_200)?;
    let newest = world.history.newest().unwrap();
    let gone = lives.iter().all(|who| !newest.contains(*who));
    if gone { Ok(()) } else { Err(format!("still in after 1.2 s: {:?}", newest.members)) }
}

#[test]
fn three_of_seven_that_crash_at_once_are_one_record_within_a_second_or_little_more() {
    holds_and_catches(Bug::CutsAtOnce, incident);
}

/// How often nodes were removed, the bad ones and the others.
fn removals(world: &World, bad: &BTreeSet<NodeId>) -> (usize, usize) {
    let lives = world.history.views.values().filter_map(|v| match &v.cause {
        Cause::Failed(l) | Cause::NoMesh(l) => Some(l),
        _ => None,
    });
    let (ill, well): (Vec<Identity>, Vec<Identity>) =
        lives.flatten().copied().partition(|w| bad.contains(&w.node));
    (ill.len(), well.len())
}

#[test]
fn a_tenth_of_the_nodes_with_eighty_percent_loss_goes_and_nothing_oscillates() {
    for (seed, voters, observers) in [(0, 5, 5), (1, 5, 15)] {
        let mut world = up(seed, voters, observers, None);
        let all = voters + observers;
        let bad: BTreeSet<NodeId> = (0..all / 10).map(|n| NodeId(all - n)).collect();
        for node in &bad {
            world.cluster.network.set_loss(*node, 800_000);
        }
        run(&mut world, 25_000).unwrap();
        let (ill, well) = removals(&world, &bad);
        assert_eq!(well, 0, "a healthy node was removed");
        assert!(ill <= 2 * bad.len(), "{ill} removals of {} bad nodes", bad.len());
        let in_the_middle = epoch(&world);
        run(&mut world, 15_000).unwrap();
        let more = epoch(&world).0 - in_the_middle.0;
        assert!(more <= 2, "{more} further records after that");
        for node in &bad {
            world.cluster.network.set_loss(*node, 0);
        }
        run(&mut world, 30_000).unwrap();
        assert_eq!(world.history.newest().unwrap().members.len(), all as usize, "all are back");
    }
}

#[test]
fn a_process_that_was_stopped_for_any_time_finds_itself_out_before_it_does_anything() {
    // The invariants look at every step, the first one after the pause included: under a lease that is over, or in a
    // life that is removed and whose lease the others know to be over, nobody is quorate.
    let lease = Config::lan().lease();
    for ms in [100, 300, 650, 700, 750, 800, 900, 1_500, 2_500, 5_000, 20_000, 100_000] {
        let mut world = up(ms, 3, 0, None);
        let node = NodeId(1 + (ms % 3) as u32);
        let (life, pause) = (world.cluster.member(node).unwrap().me(), Duration::from_millis(ms));
        let clock = world.cluster.local_now(node);
        world.cluster.pause(node, pause);
        run(&mut world, ms - 1).unwrap();
        // What it would find if it looked before it read a single packet.
        let slept = world.cluster.local_now(node).since(clock);
        if lease < slept {
            assert!(!world.cluster.is_quorate(node), "quorate after {slept:?} under a lease of {lease:?}");
        }
        if Duration::from_millis(1_200) < pause {
            assert!(!world.history.newest().unwrap().contains(life), "not removed after {pause:?}");
        }
        run(&mut world, 8_000).unwrap();
        assert_eq!(world.history.newest().unwrap().members.len(), 3, "after a pause of {pause:?}");
    }
}
