//! Large clusters in one process: from one seed node to all of them, ten crash at one instant, a tenth on bad ports.
//!
//! `QUORATE_SCALE=1000` runs a thousand nodes; `cargo xtask sim scale` does that and prints the table.

use quorate_membership::sim::{Cluster, ClusterConfig, Happening, Traffic};
use quorate_membership::{Cause, Epoch, Identity, Instant, NodeId, Rng, View};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Nodes of the ordinary test.
const NODES_DEFAULT: u32 = 100;
const VOTERS: u32 = 5;
/// They crash at one instant.
const CRASHES: u32 = 10;

/// A cluster without the invariants of the small ones, which look at every node after every step.
struct Large {
    cluster: Cluster,
    views: BTreeMap<Epoch, Arc<View>>,
    nodes: u32,
}

/// What a phase took.
struct Phase {
    name: &'static str,
    took: Duration,
    views: u64,
    traffic: Vec<Traffic>,
}

impl Large {
    fn new(nodes: u32, seed: u64) -> Self {
        let config = ClusterConfig {
            voters: VOTERS,
            observers: nodes - VOTERS,
            contacts: Some(1),
            ..ClusterConfig::three()
        };
        Self { cluster: Cluster::new(config, Rng::new(seed)), views: BTreeMap::new(), nodes }
    }

    fn newest(&self) -> &Arc<View> {
        self.views.last_key_value().unwrap().1
    }

    fn look(&mut self) {
        for happening in self.cluster.take_happenings() {
            if let Happening::Installed { view, .. } = happening {
                let first = self.views.entry(view.epoch).or_insert_with(|| Arc::clone(&view));
                assert_eq!(*first, view, "two records of one epoch");
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let until = self.cluster.now() + time;
        while self.cluster.next_at().is_some_and(|at| at <= until) {
            self.cluster.step();
            self.look();
        }
        self.cluster.advance_to(until);
    }

    fn traffic(&self) -> Vec<Traffic> {
        (1..=self.nodes).map(|n| self.cluster.traffic(NodeId(n))).collect()
    }

    /// Runs until `holds`, at most `max`.
    fn phase(&mut self, name: &'static str, max: Duration, mut holds: impl FnMut(&Self) -> bool) -> Phase {
        let (begin, before) = (self.cluster.now(), self.traffic());
        let first = self.views.len();
        while !holds(self) {
            assert!(self.cluster.now() < begin + max, "{name}: not within {max:?}: {}", self.state());
            self.run(Duration::from_millis(10));
        }
        let traffic = self.traffic().into_iter().zip(before).map(|(a, b)| minus(a, b)).collect();
        let views = (self.views.len() - first) as u64;
        Phase { name, took: self.cluster.now().since(begin), views, traffic }
    }

    fn state(&self) -> String {
        let newest = self.newest();
        format!("record {} of {:?}, {} members", newest.epoch, newest.cause, newest.members.len())
    }

    /// Whether everybody who should be in is, knows it, and may act.
    fn all_in(&self, out: &BTreeSet<NodeId>) -> bool {
        let newest = self.newest();
        newest.members.len() + out.len() == self.nodes as usize
            && newest.voters.voters.len() == VOTERS as usize
            && self.cluster.nodes().filter(|(n, _)| !out.contains(n)).all(|(n, _)| {
                self.cluster.is_quorate(n)
                    && self.cluster.member(n).and_then(|m| m.view()).is_some_and(|v| v.epoch == newest.epoch)
            })
    }
}

fn minus(a: Traffic, b: Traffic) -> Traffic {
    Traffic {
        sent: a.sent - b.sent,
        sent_bytes: a.sent_bytes - b.sent_bytes,
        received: a.received - b.received,
        received_bytes: a.received_bytes - b.received_bytes,
    }
}

impl Phase {
    /// One row: messages and bytes per node and second, received and sent: mean, 99th percentile, largest.
    fn print(&self) {
        let seconds = self.took.as_secs_f64().max(0.001);
        let three = |of: fn(&Traffic) -> u64, unit: f64| {
            let mut all: Vec<u64> = self.traffic.iter().map(of).collect();
            all.sort_unstable();
            let rate = |v: u64| v as f64 / unit / seconds;
            let mean = all.iter().sum::<u64>() / all.len() as u64;
            let p99 = all[(all.len() * 99 / 100).min(all.len() - 1)];
            format!("{:.1}/{:.1}/{:.1}", rate(mean), rate(p99), rate(*all.last().unwrap()))
        };
        println!(
            "{:<34} {:>8.2} s {:>4} views  received {:>22} KB/s {:>22} msg/s  sent {:>22} KB/s {:>22} msg/s",
            self.name,
            self.took.as_secs_f64(),
            self.views,
            three(|t| t.received_bytes, 1_000.0),
            three(|t| t.received, 1.0),
            three(|t| t.sent_bytes, 1_000.0),
            three(|t| t.sent, 1.0),
        );
    }
}

#[test]
fn scale_from_one_seed_node_to_all_ten_crash_and_a_tenth_loses_most() {
    let nodes = std::env::var("QUORATE_SCALE").map_or(NODES_DEFAULT, |n| n.trim().parse().unwrap());
    let mut large = Large::new(nodes, 1);
    let mut rng = Rng::new(2);
    println!("{nodes} nodes, {VOTERS} of them voters; per node: mean/p99/largest");

    // One seed node, then all others within a second.
    large.cluster.start(NodeId(1));
    large.phase("the seed node alone", Duration::from_secs(3), |l| l.cluster.is_quorate(NodeId(1))).print();
    let mut starts: Vec<(Instant, NodeId)> = (2..=nodes)
        .map(|n| (large.cluster.now() + rng.duration(Duration::ZERO, Duration::from_secs(1)), NodeId(n)))
        .collect();
    starts.sort_unstable();
    let begin = large.views.len();
    let boot = large.cluster.now();
    for (at, node) in starts {
        let wait = at.since(large.cluster.now());
        large.run(wait);
        large.cluster.start(node);
    }
    large.phase("the rest of the bring-up", Duration::from_secs(30), |l| l.all_in(&BTreeSet::new())).print();
    let views = large.views.len() - begin;
    println!("from 1 to {nodes}: {:?} and {views} views", large.cluster.now().since(boot));
    assert!(views <= 25, "{views} views: joins are not taken together");

    let mut quiet = 0;
    large
        .phase("nothing happens", Duration::from_secs(11), |_| {
            quiet += 1;
            200 < quiet
        })
        .print();

    // Ten crash at once, a voter among them: one record.
    let dead: BTreeSet<NodeId> =
        (0..CRASHES).map(|n| NodeId(VOTERS + n * (nodes - VOTERS) / CRASHES)).collect();
    let lives: BTreeSet<Identity> = dead.iter().map(|n| large.cluster.member(*n).unwrap().me()).collect();
    let before = large.newest().epoch;
    for node in &dead {
        large.cluster.crash(*node);
    }
    let gone = large.phase("ten crash at one instant", Duration::from_secs(4), |l| l.all_in(&dead));
    gone.print();
    assert_eq!(large.newest().epoch, before.next(), "one record: {}", large.state());
    assert_eq!(large.newest().cause, Cause::Failed(lives));
    assert!(gone.took < Duration::from_millis(1_500), "{:?}", gone.took);

    for node in &dead {
        large.cluster.start(*node);
    }
    large.phase("they come back", Duration::from_secs(15), |l| l.all_in(&BTreeSet::new())).print();

    // A tenth of the nodes, no voters, loses 80 % of everything.
    let bad: BTreeSet<NodeId> = (0..nodes / 10).map(|n| NodeId(nodes - n)).collect();
    let before = large.newest().epoch;
    for node in &bad {
        large.cluster.network.set_loss(*node, 800_000);
    }
    let mut steps = 0;
    large
        .phase("a tenth loses 80 %, 15 s", Duration::from_secs(31), |_| {
            steps += 1;
            1_500 < steps
        })
        .print();
    let (mut ill, mut well) = (0, 0);
    for view in large.views.range(before.next()..).map(|(_, v)| v) {
        if let Cause::Failed(lives) | Cause::NoMesh(lives) = &view.cause {
            ill += lives.iter().filter(|w| bad.contains(&w.node)).count();
            well += lives.iter().filter(|w| !bad.contains(&w.node)).count();
        }
    }
    println!(
        "{ill} removals of {} bad nodes, {well} of healthy ones, in {} views",
        bad.len(),
        large.newest().epoch.0 - before.0
    );
    assert_eq!(well, 0, "healthy nodes were removed");
    assert!(ill <= 2 * bad.len(), "bad nodes flap: {ill}");
    let middle = large.newest().epoch;
    let mut steps = 0;
    large
        .phase("and 8 s more", Duration::from_secs(21), |_| {
            steps += 1;
            800 < steps
        })
        .print();
    let more = large.newest().epoch.0 - middle.0;
    assert!(more <= 2, "{more} further records: it oscillates");
}
