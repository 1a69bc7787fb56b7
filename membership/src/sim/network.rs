//! A network that loses, delays, doubles and reorders, with partitions that may be one-way.

use crate::{Instant, NodeId, Rng};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// How bad the network is. All draws are per message.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Least delay.
    pub delay_min: Duration,
    /// Delays are below this. Messages with different delays overtake each other.
    pub delay_max: Duration,
    /// Lost messages in a million.
    pub loss_ppm: u32,
    /// Doubled messages in a million.
    pub duplicate_ppm: u32,
}

impl Faults {
    /// A good local network: 50 to 500 microseconds, nothing lost.
    #[must_use]
    pub fn none() -> Self {
        Self {
            delay_min: Duration::from_micros(50),
            delay_max: Duration::from_micros(500),
            loss_ppm: 0,
            duplicate_ppm: 0,
        }
    }

    /// Drawn from the seed: from a good network to one that loses a fifth and delays by up to 150 milliseconds.
    pub fn drawn(rng: &mut Rng) -> Self {
        let pick = |rng: &mut Rng, from: &[u64]| rng.pick(from).copied().unwrap_or(0);
        Self {
            delay_min: Duration::from_micros(50),
            delay_max: Duration::from_micros(pick(rng, &[500, 500, 2_000, 20_000, 150_000])),
            loss_ppm: pick(rng, &[0, 0, 1_000, 20_000, 200_000]) as u32,
            duplicate_ppm: pick(rng, &[0, 0, 1_000, 50_000]) as u32,
        }
    }
}

/// Decides when, how often and whether a message arrives.
#[derive(Clone, Debug)]
pub struct Network {
    rng: Rng,
    /// May be changed at any time.
    pub faults: Faults,
    cut: BTreeSet<(NodeId, NodeId)>,
    /// Nodes with a bad port: so many in a million of their messages, either way, are lost.
    lossy: BTreeMap<NodeId, u32>,
}

impl Network {
    /// A whole network with these faults.
    #[must_use]
    pub fn new(rng: Rng, faults: Faults) -> Self {
        Self { rng, faults, cut: BTreeSet::new(), lossy: BTreeMap::new() }
    }

    /// The instants at which a message sent now arrives: none if it is lost, two if it is doubled.
    pub fn arrivals(&mut self, now: Instant, from: NodeId, to: NodeId) -> Vec<Instant> {
        if self.cut.contains(&(from, to)) || self.rng.chance_ppm(self.faults.loss_ppm) {
            return Vec::new();
        }
        for end in [from, to] {
            if self.lossy.get(&end).is_some_and(|ppm| self.rng.chance_ppm(*ppm)) {
                return Vec::new();
            }
        }
        let copies = if self.rng.chance_ppm(self.faults.duplicate_ppm) { 2 } else { 1 };
        (0..copies).map(|_| now + self.rng.duration(self.faults.delay_min, self.faults.delay_max)).collect()
    }

    /// Whether nothing from `from` reaches `to`.
    #[must_use]
    pub fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Loses so many in a million of the messages that `node` sends or is sent; zero mends it.
    pub fn set_loss(&mut self, node: NodeId, ppm: u32) {
        if ppm == 0 {
            self.lossy.remove(&node);
        } else {
            self.lossy.insert(node, ppm);
        }
    }

    /// Cuts one direction.
    pub fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cut.insert((from, to));
    }

    /// Cuts both directions between the two sides.
    pub fn partition(&mut self, left: &[NodeId], right: &[NodeId]) {
        for l in left {
            for r in right {
                self.cut(*l, *r);
                self.cut(*r, *l);
            }
        }
    }

    /// Joins everything again.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.lossy.clear();
    }
}
