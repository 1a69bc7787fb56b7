//! What goes wrong, and when: crashes, pauses, partitions, lost, failing and rolled back disks.

use super::World;
use quorate_membership::sim::Faults;
use quorate_membership::{NodeId, Rng};
use std::collections::BTreeSet;
use std::time::Duration;

/// The plan of one run.
pub(crate) struct FaultPlan {
    rng: Rng,
    often_ppm: u32,
    /// Nothing else may fail before then: a rolled back acceptor is safe only while the others can tell (R4).
    quiet_until: u64,
}

impl FaultPlan {
    pub(crate) fn new(mut rng: Rng) -> Self {
        let often_ppm = *rng.pick(&[10_000, 40_000, 100_000]).unwrap();
        Self { rng, often_ppm, quiet_until: 0 }
    }

    /// Perhaps something happens.
    pub(crate) fn strike(&mut self, world: &mut World) {
        let nodes: Vec<NodeId> = world.cluster.nodes().map(|(n, _)| n).collect();
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
            95..98 => self.lose_disk(world, node, false),
            _ => self.lose_disk(world, node, true),
        }
        world.look();
    }

    /// A voter's disk is lost or put back, if all others are well: more would be beyond what a majority survives.
    fn lose_disk(&mut self, world: &mut World, node: NodeId, roll_back: bool) {
        let Some(newest) = world.history.newest().cloned() else { return };
        let well = world.cluster.nodes().filter(|(n, _)| *n != node).all(|(n, h)| {
            world.cluster.is_quorate(n)
                && !h.is_paused()
                && h.disk.tip() == newest.epoch
                && newest.voters.voters.get(&n).is_none_or(|v| v.state == h.disk.state)
        });
        let rest: BTreeSet<NodeId> = newest.voters.voters.keys().copied().filter(|n| *n != node).collect();
        let states: Vec<_> = newest.voters.voters.iter().filter(|(n, _)| rest.contains(n)).collect();
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
        world.cluster.start_all();
        world.look();
    }
}
