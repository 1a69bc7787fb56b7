//! What goes wrong, and when: crashes, pauses, partitions, lost, failing and rolled back disks.

use super::World;
use quorate_membership::machine::Versions;
use quorate_membership::sim::Faults;
use quorate_membership::{NodeId, Rng, Role};
use std::collections::BTreeSet;
use std::time::Duration;

/// The plan of one run.
pub(crate) struct FaultPlan {
    rng: Rng,
    often_ppm: u32,
    /// Nothing else may fail before then: a rolled back acceptor is safe only while the others can tell (R4).
    quiet_until: u64,
    /// Whether newer programs are put on the hosts, one after the other.
    upgrades: bool,
    /// Whether a person may force the quorum.
    forces: bool,
    /// A person is about to force the quorum at this node, which all others died around.
    forcing: Option<(NodeId, Forcing)>,
}

/// What the person does next, at which time in nanoseconds.
#[derive(Clone, Copy)]
enum Forcing {
    /// The others have to be silent first.
    Force(u64),
    /// The record is there: the others may be started again.
    Start(u64),
}

impl FaultPlan {
    pub(crate) fn new(mut rng: Rng, upgrades: bool, forces: bool) -> Self {
        let often_ppm = *rng.pick(&[10_000, 40_000, 100_000]).unwrap();
        Self { rng, often_ppm, quiet_until: 0, upgrades, forces, forcing: None }
    }

    /// Perhaps something happens.
    pub(crate) fn strike(&mut self, world: &mut World) {
        let nodes: Vec<NodeId> = world.cluster.nodes().map(|(n, _)| n).collect();
        if self.force(world, &nodes) {
            return;
        }
        let dead: Vec<NodeId> =
            world.cluster.nodes().filter(|(_, h)| h.member().is_none()).map(|(n, _)| n).collect();
        if let Some(node) = self.rng.pick(&dead).copied()
            && self.rng.chance_ppm(150_000)
        {
            world.cluster.start(node);
            world.look();
        }
        if world.cluster.now().0 < self.quiet_until || !self.rng.chance_ppm(self.often_ppm) {
            return;
        }
        let Some(node) = self.rng.pick(&nodes).copied() else { return };
        let Some(other) = self.rng.pick(&nodes).copied() else { return };
        match self.rng.below(100) {
            0..25 => world.cluster.crash(node),
            25..27 => nodes.iter().for_each(|n| world.cluster.crash(*n)),
            27..37 => {
                world.cluster.crash(node);
                world.cluster.start(node);
            }
            37..55 => {
                let time = self.rng.duration(Duration::from_millis(50), Duration::from_millis(3_000));
                world.cluster.pause(node, time);
            }
            55..63 => {
                let (left, right): (Vec<NodeId>, Vec<NodeId>) =
                    nodes.iter().partition(|_| self.rng.chance_ppm(500_000));
                world.cluster.network.partition(&left, &right);
            }
            63..71 => world.cluster.network.cut(node, other),
            71..86 => world.cluster.network.heal(),
            86..90 => world.cluster.network.faults = Faults::drawn(&mut self.rng),
            90..93 => world.cluster.fail_storage(node),
            93..95 => world.cluster.lose_link(node, other),
            97 if self.forces && self.rng.chance_ppm(400_000) => self.burn_down_around(world, node, &nodes),
            97 if self.upgrades => {
                world.cluster.crash(node);
                world.cluster.set_program(node, Versions::NEXT);
                world.cluster.start(node);
            }
            95..98 => self.lose_disk(world, node, false),
            _ => self.lose_disk(world, node, true),
        }
        world.look();
    }

    /// All but one die, and what that one knows is the newest there is: a person may give it the quorum (and may not, if
    /// somebody could have decided something it does not know).
    fn burn_down_around(&mut self, world: &mut World, node: NodeId, nodes: &[NodeId]) {
        let Some(newest) = world.history.newest().cloned() else { return };
        nodes.iter().filter(|n| **n != node).for_each(|n| world.cluster.crash(*n));
        let (mut knows_all, mut is_voter) = (true, false);
        for (n, host) in world.cluster.nodes() {
            if n == node {
                is_voter = host.member().is_some_and(|m| {
                    m.view().is_some_and(|v| v.epoch == newest.epoch)
                        && newest.voters.voters.get(&n).is_some_and(|v| v.state == m.durable().state)
                });
            } else {
                knows_all &= host.disk.tip() <= newest.epoch
                    && host.disk.accepted.as_ref().is_none_or(|a| a.view.epoch <= newest.epoch);
            }
        }
        if knows_all && is_voter && newest.roster.get(&node).is_some_and(|e| e.role == Role::Voter) {
            world.cluster.network.heal();
            world.cluster.network.faults = Faults::none();
            let now = world.cluster.now();
            self.forcing = Some((node, Forcing::Force((now + Duration::from_millis(1_500)).0)));
            self.quiet_until = (now + Duration::from_secs(10)).0;
        }
    }

    /// The next step of a person who forces the quorum, if one is at it.
    fn force(&mut self, world: &mut World, nodes: &[NodeId]) -> bool {
        let now = world.cluster.now();
        match self.forcing {
            Some((node, Forcing::Force(at))) if at <= now.0 => {
                let off = nodes.iter().copied().filter(|n| *n != node).collect();
                world.cluster.force(node, off, "all others burnt down");
                world.history.forces += 1;
                self.forcing = Some((node, Forcing::Start((now + Duration::from_secs(1)).0)));
                world.look();
            }
            Some((_, Forcing::Start(at))) if at <= now.0 => {
                self.forcing = None;
                world.cluster.start_all();
                world.look();
            }
            _ => (),
        }
        self.forcing.is_some()
    }

    /// A voter's disk is lost or put back, if all others are well: more would be beyond what a majority survives.
    fn lose_disk(&mut self, world: &mut World, node: NodeId, roll_back: bool) {
        let Some(newest) = world.history.newest().cloned() else { return };
        let is_witness = |n: NodeId| newest.roster.get(&n).is_some_and(|e| e.role == Role::Witness);
        let well = world.cluster.nodes().filter(|(n, _)| *n != node).all(|(n, h)| {
            (world.cluster.is_quorate(n) || (is_witness(n) && h.member().is_some()))
                && !h.is_paused()
                && h.disk.tip() == newest.epoch
                // Nor is a record under way that needs the votes of others.
                && h.member().is_none_or(|m| m.durable().accepted.is_none())
                && newest.voters.voters.get(&n).is_none_or(|v| v.state == h.disk.state)
        });
        let rest: BTreeSet<NodeId> = newest.voters.voters.keys().copied().filter(|n| *n != node).collect();
        let states: Vec<_> = newest.voters.voters.iter().filter(|(n, _)| rest.contains(n)).collect();
        // The options may be about to change the votes: what is left has to be a majority of the next set, too.
        let mut next = newest.voters.clone();
        for (n, voter) in &mut next.voters {
            voter.votes = newest.quorum.votes.get(n).copied().unwrap_or(voter.votes);
        }
        next.expected = newest.quorum.expected_votes;
        next.tie_breaker = None;
        if !next.has_majority(states.iter().map(|(n, v)| (*n, &v.state))) {
            return;
        }
        if !well || !newest.voters.has_majority(states.iter().map(|(n, v)| (*n, &v.state))) {
            return;
        }
        world.cluster.network.heal();
        world.cluster.network.faults = Faults::none();
        self.quiet_until = (world.cluster.now() + Duration::from_secs(4)).0;
        world.cluster.crash(node);
        if !roll_back {
            world.cluster.lose_state(node);
        } else if !world.cluster.roll_back_state(node) {
            return;
        }
        world.cluster.start(node);
    }

    /// Everything works again.
    pub(crate) fn stop(&mut self, world: &mut World) {
        world.cluster.network.heal();
        world.cluster.network.faults = Faults::none();
        let nodes: Vec<NodeId> = world.cluster.nodes().map(|(n, _)| n).collect();
        if self.upgrades {
            // Who was left behind by the others is upgraded now.
            for node in &nodes {
                world.cluster.set_program(*node, Versions::NEXT);
                if world.cluster.member(*node).is_some_and(|m| m.speaks() != Versions::NEXT) {
                    world.cluster.crash(*node);
                }
            }
        }
        world.cluster.start_all();
        world.look();
    }
}
