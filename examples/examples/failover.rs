//! Where a service runs: the pure decision, for a cluster that loses its preferred node and gets it back.
//!
//! `cargo run --example failover` prints the plan for each state.

use quorate_failover::{ClusterState, Domain, Recovery, ServiceConfig, Target, place};
use quorate_membership::{NodeId, Safety};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

fn main() {
    let service = ServiceConfig {
        name: "web".into(),
        resources: Vec::new(),
        domain: Some(Domain {
            nodes: BTreeMap::from([(NodeId(1), 1), (NodeId(2), 2)]),
            ordered: true,
            restricted: false,
            nofailback: false,
        }),
        recovery: Recovery::Restart,
        max_restarts: 0,
        restart_expire_time: Duration::ZERO,
        autostart: true,
        safety: Safety::Lease,
        servers: BTreeSet::new(),
    };
    let state = |nodes: &[u32], owner: Option<u32>, unfenced: bool| ClusterState {
        nodes: nodes.iter().map(|n| (NodeId(*n), 0)).collect(),
        target: Target::Enabled(None),
        owner: owner.map(NodeId),
        unfenced,
        failed: BTreeSet::new(),
    };
    for (what, state) in [
        ("everybody is there", state(&[1, 2, 3], None, false)),
        ("node 1 has failed and is not yet fenced", state(&[2, 3], None, true)),
        ("node 1 is fenced", state(&[2, 3], None, false)),
        ("node 1 is back", state(&[1, 2, 3], Some(2), false)),
    ] {
        println!("{what}: {:?}", place(&service, &state));
    }
}
