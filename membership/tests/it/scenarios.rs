//! Scripted lives of small clusters: bring-up, crash, cold start, leave, and who is refused.

use quorate_membership::machine::{
    ControlMsg, Durable, Event, Heartbeat, JoinRefusal, Peer, StopReason, Versions,
};
use quorate_membership::sim::{Cluster, ClusterConfig, Happening};
use quorate_membership::{
    AttachRequest, Cause, Decision, Delta, Identity, Incarnation, Instant, NodeId, Proof, Refusal, Request,
    RequestError, ResourceId, ResourceKind, Rng, Safety, Step, View,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const N3: NodeId = NodeId(3);

struct World {
    cluster: Cluster,
    log: Vec<(Instant, Happening)>,
}

impl World {
    fn up(config: ClusterConfig) -> Self {
        let mut world = Self { cluster: Cluster::new(config, Rng::new(7)), log: Vec::new() };
        world.cluster.start_all();
        world.until("all are quorate voters", 5_000, |w| {
            w.cluster.nodes().all(|(n, _)| w.cluster.is_quorate(n))
                && w.view(N1).voters.voters.len() == 3
                && w.agreed()
        });
        world
    }

    fn three() -> Self {
        Self::up(ClusterConfig::three())
    }

    fn view(&self, node: NodeId) -> Arc<View> {
        Arc::clone(self.cluster.member(node).unwrap().view().unwrap())
    }

    fn agreed(&self) -> bool {
        let views: BTreeSet<_> = self
            .cluster
            .nodes()
            .filter_map(|(_, h)| h.member().and_then(|m| m.view()).map(|v| v.epoch))
            .collect();
        views.len() == 1
    }

    fn take(&mut self) {
        let now = self.cluster.now();
        self.log.extend(self.cluster.take_happenings().into_iter().map(|h| (now, h)));
    }

    fn run(&mut self, ms: u64) {
        let until = self.cluster.now() + Duration::from_millis(ms);
        let mut log = Vec::new();
        self.cluster.run_until(until, |c| {
            let now = c.now();
            log.extend(c.take_happenings().into_iter().map(|h| (now, h)));
        });
        self.log.extend(log);
    }

    fn until(&mut self, what: &str, ms_max: u64, mut holds: impl FnMut(&Self) -> bool) -> Duration {
        let begin = self.cluster.now();
        let end = begin + Duration::from_millis(ms_max);
        self.take();
        while !holds(self) {
            assert!(
                self.cluster.now() < end,
                "not within {ms_max} ms: {what}\n{:#?}",
                self.log.iter().rev().take(20).collect::<Vec<_>>()
            );
            assert!(self.cluster.step());
            self.take();
        }
        self.cluster.now().since(begin)
    }

    fn ask(&mut self, node: NodeId, request: Request) -> Result<Arc<View>, RequestError> {
        let id = self.cluster.propose(node, request).unwrap();
        let mut result = None;
        self.until("the request ends", 11_000, |w| {
            result = w.log.iter().find_map(|(_, h)| match h {
                Happening::Done { id: done, result, .. } if *done == id => Some(result.clone()),
                _ => None,
            });
            result.is_some()
        });
        result.unwrap()
    }

    fn me(&self, node: NodeId) -> Identity {
        self.cluster.member(node).unwrap().me()
    }

    fn stops(&self) -> Vec<&StopReason> {
        let mut stops = Vec::new();
        for (_, happening) in &self.log {
            if let Happening::Stopped { reason, .. } = happening {
                stops.push(reason);
            }
        }
        stops
    }
}

fn lockspace(name: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Lockspace, name)
}

fn attach(resource: ResourceId) -> Request {
    Request::Attach(AttachRequest {
        resource,
        safety: Safety::Lease,
        servers: BTreeSet::new(),
        journals: None,
        lockspace: None,
        exclusive: false,
    })
}

#[test]
fn three_nodes_come_up_as_three_voters_within_a_second_and_a_half() {
    let world = World::three();
    assert!(
        world.cluster.now().since(Instant(0)) < Duration::from_millis(1_500),
        "{:?}",
        world.cluster.now()
    );
    let view = world.view(N2);
    assert_eq!(view.members.len(), 3);
    assert!(view.debts.is_empty());
}

#[test]
fn a_crash_is_a_debt_within_a_second_and_its_lease_is_not_waited_for() {
    let mut world = World::three();
    let dead = world.me(N1);
    world.ask(N1, attach(lockspace("a"))).unwrap();
    world.run(500);
    world.cluster.crash(N1);
    let took = world.until("node 1 is in debt", 1_000, |w| w.view(N2).debts.contains_key(&dead));
    assert!(took < Duration::from_millis(850), "{took:?}");
    world.until("node 3 knows", 100, |w| w.view(N3).debts.contains_key(&dead));
    assert!(world.cluster.lease_is_over(N3, dead), "the whole lease passed before the suspicion");
    let view =
        world.ask(N3, Request::Prove { debtor: dead, resources: BTreeSet::new(), proof: Proof::LeaseOver });
    assert!(view.unwrap().debts.is_empty(), "nobody is attached any more, so nothing is to be rebuilt");
}

#[test]
fn the_leader_serves_a_request_in_one_round_trip_and_one_fsync() {
    let mut world = World::three();
    world.run(1_000);
    let begin = world.cluster.now();
    for n in 0..20 {
        world.ask(N1, attach(lockspace(&format!("l{n}")))).unwrap();
    }
    let each = world.cluster.now().since(begin) / 20;
    // A round trip is at most 1 ms, a sync at most 3 ms here.
    assert!(each < Duration::from_millis(5), "{each:?}");
}

#[test]
fn a_restart_faster_than_detection_is_seen_at_once_and_the_old_life_becomes_a_debt() {
    let mut world = World::three();
    let old = world.me(N2);
    world.ask(N2, attach(lockspace("a"))).unwrap();
    world.ask(N3, attach(lockspace("a"))).unwrap();
    world.cluster.crash(N2);
    world.cluster.start(N2);
    let new = world.me(N2);
    assert!(old < new);
    let took = world.until("the new life is in", 1_000, |w| w.view(N1).contains(new));
    assert!(took < Duration::from_millis(400), "{took:?}");
    assert!(world.view(N1).debts.contains_key(&old));
    world.until("quorate", 500, |w| w.cluster.is_quorate(N2));
    let refused = world.ask(N2, attach(lockspace("a")));
    assert_eq!(
        refused,
        Err(RequestError::Refused(Refusal::OldLife { resource: lockspace("a"), debtor: old })),
    );
    // The last acknowledgement was just before the crash, so the lease has to be waited for, no shorter than that.
    assert!(!world.cluster.lease_is_over(N1, old));
    let proof = Request::Prove { debtor: old, resources: BTreeSet::new(), proof: Proof::LeaseOver };
    world.ask(N1, proof).unwrap();
    assert!(world.cluster.lease_is_over(N1, old), "the leader held the proof back until then");
    let epoch = world.view(N3).epoch;
    let rebuilt = Request::Prove { debtor: old, resources: BTreeSet::new(), proof: Proof::Rebuilt { epoch } };
    assert!(world.ask(N3, rebuilt).unwrap().debts.is_empty());
    world.ask(N2, attach(lockspace("a"))).unwrap();
}

#[test]
fn a_cold_start_removes_everybody_and_forgets_no_debt() {
    let mut world = World::three();
    let old: Vec<Identity> = [N1, N2, N3].into_iter().map(|n| world.me(n)).collect();
    for node in [N1, N2, N3] {
        world.ask(node, attach(lockspace("a"))).unwrap();
        world.cluster.set_waiting(node, true);
    }
    world.run(300);
    for node in [N1, N2, N3] {
        world.cluster.crash(node);
    }
    world.run(5_000);
    world.cluster.start(N3);
    world.run(3_000);
    assert!(!world.cluster.is_quorate(N3), "one of three forms nothing");
    world.cluster.start(N2);
    world.until("two are in", 3_000, |w| w.cluster.is_quorate(N2) && w.cluster.is_quorate(N3));
    for who in &old {
        assert!(world.view(N2).debts.contains_key(who), "{who}");
    }
}

#[test]
fn a_clean_leave_is_refused_while_attached_and_leaves_no_debt_and_the_vote() {
    let mut config = ClusterConfig::three();
    config.supervised = false;
    let mut world = World::up(config);
    world.ask(N3, attach(lockspace("a"))).unwrap();
    let leave = Request::Leave { give_up_vote: false };
    assert_eq!(
        world.ask(N3, leave.clone()),
        Err(RequestError::Refused(Refusal::StillAttached(lockspace("a"))))
    );
    world.ask(N3, Request::Detach(lockspace("a"))).unwrap();
    let view = world.ask(N3, leave).unwrap();
    assert!(!view.members.contains_key(&N3));
    assert!(view.debts.is_empty());
    assert!(view.voters.voters.contains_key(&N3));
    assert!(matches!(world.stops()[..], [StopReason::Left { .. }]));
    assert!(world.cluster.member(N3).is_none());
}

#[test]
fn two_of_three_go_on_and_one_of_three_stops_and_says_why() {
    let mut world = World::three();
    world.cluster.network.partition(&[N3], &[N1, N2]);
    let lone = world.me(N3);
    world.until("node 3 is out", 1_200, |w| !w.view(N1).contains(lone));
    assert!(!world.cluster.is_quorate(N3));
    let answer = world.ask(N3, attach(lockspace("a")));
    assert!(matches!(answer, Err(RequestError::NotQuorate { .. })), "{answer:?}");
    world.ask(N2, attach(lockspace("a"))).unwrap();
    world.cluster.network.heal();
    world.until("node 3 is back in a new life", 3_000, |w| w.cluster.is_quorate(N3));
    assert!(matches!(world.stops()[..], [StopReason::Removed { .. }]), "{:?}", world.stops());
    assert!(lone < world.me(N3));
}

#[test]
fn a_lost_state_directory_comes_back_as_an_observer_and_votes_only_after_a_decided_change() {
    let mut world = World::three();
    world.cluster.crash(N2);
    world.until("out", 1_500, |w| !w.view(N1).members.contains_key(&N2));
    let before = world.view(N1).voters.voters[&N2].state;
    world.cluster.lose_state(N2);
    world.cluster.start(N2);
    world.until("in again and voting", 8_000, |w| {
        w.cluster.is_quorate(N2) && w.view(N1).voters.voters[&N2].state != before
    });
    assert!(matches!(world.stops()[..], [StopReason::RolledBack { .. }]), "{:?}", world.stops());
    let view = world.view(N1);
    assert_eq!(view.voters.voters[&N2].state, world.cluster.member(N2).unwrap().durable().state);
    assert!(Incarnation(1) < view.lives[&N2], "no life is used twice");
}

#[test]
fn an_empty_state_directory_forms_nothing() {
    let mut config = ClusterConfig::three();
    config.supervised = false;
    let mut cluster = Cluster::new(config, Rng::new(1));
    cluster.start(N2);
    cluster.start(N3);
    cluster.run_until(Instant(20_000_000_000), |_| ());
    assert!(cluster.member(N2).unwrap().view().is_none());
    assert!(cluster.member(N3).unwrap().view().is_none());
    let durable: &Durable = cluster.member(N2).unwrap().durable();
    assert!(durable.chain.is_empty());
}

#[test]
fn a_failed_state_disk_ends_the_voter() {
    let mut config = ClusterConfig::three();
    config.supervised = false;
    let mut world = World::up(config);
    let failed = world.me(N1);
    world.cluster.fail_storage(N1);
    world.until("out", 1_500, |w| !w.view(N2).contains(failed));
    assert!(matches!(world.stops()[..], [StopReason::Storage]));
}

#[test]
fn a_member_that_was_paused_finds_itself_out_before_it_does_anything() {
    let mut world = World::three();
    let paused = world.me(N2);
    world.run(1_000);
    world.cluster.pause(N2, Duration::from_millis(2_400));
    world.until("out", 1_200, |w| !w.view(N1).contains(paused));
    world.until("lease over", 1_000, |w| w.cluster.lease_is_over(N1, paused));
    assert!(!world.cluster.is_quorate(N2));
    world.until("a fresh life is in", 4_000, |w| {
        w.view(N1).contains(Identity::new(N2, Incarnation(paused.incarnation.0 + 1)))
    });
    assert!(matches!(world.stops()[..], [StopReason::Removed { .. }]), "{:?}", world.stops());
}

#[test]
fn a_pair_without_a_path_loses_one_member_after_the_grace_time() {
    let mut world = World::three();
    let out = world.me(N3);
    world.cluster.network.cut(N2, N3);
    world.cluster.network.cut(N3, N2);
    world.run(2_000);
    assert!(world.view(N1).contains(out), "a relay may bridge it for the grace time");
    world.until("one is out", 5_000, |w| !w.view(N1).contains(out));
    let made = world.log.iter().any(|(_, h)| {
        matches!(h, Happening::Installed { view, .. } if matches!(&view.cause, Cause::NoMesh(lives) if lives.contains(&out)))
    });
    assert!(made);
    assert!(world.view(N1).members.contains_key(&N2));
}

#[test]
fn a_participant_that_misses_a_stage_is_removed_unless_it_says_what_it_waits_for() {
    let mut world = World::three();
    for node in [N1, N2, N3] {
        world.ask(node, attach(lockspace("a"))).unwrap();
    }
    let (dead, slow) = (world.me(N3), world.me(N2));
    world.cluster.crash(N3);
    world.until("out", 1_500, |w| !w.view(N1).contains(dead));
    world.cluster.set_waiting(N2, true);
    let epoch = world.view(N1).epoch;
    let rebuilt =
        Request::Prove { debtor: dead, resources: BTreeSet::new(), proof: Proof::Rebuilt { epoch } };
    world.ask(N1, rebuilt).unwrap();
    world.run(45_000);
    assert!(world.view(N1).contains(slow));
    world.cluster.set_waiting(N2, false);
    world.until("removed", 31_000, |w| !w.view(N1).contains(slow));
    assert!(matches!(world.view(N1).cause, Cause::MissedStage(_)) || !world.view(N1).contains(slow));
}

fn heartbeat(world: &World, as_node: NodeId) -> ControlMsg {
    ControlMsg::Heartbeat(Heartbeat {
        sent_ns: 1,
        epoch: world.view(as_node).epoch,
        stored: world.view(as_node).epoch,
        state: world.cluster.member(as_node).unwrap().durable().state,
        wants_in: true,
        hears: BTreeSet::from([N1, N2, N3]),
        reports: BTreeMap::new(),
        leader: Some(N1),
        waits: false,
        speaks: Versions::CURRENT,
        version: 1,
    })
}

fn refusals(world: &World) -> BTreeSet<String> {
    let refused = |h: &Happening| match h {
        Happening::Noticed { event: Event::Refused { refusal, .. }, .. } => Some(refusal.to_string()),
        _ => None,
    };
    world.log.iter().filter_map(|(_, h)| refused(h)).collect()
}

#[test]
fn a_copied_state_directory_is_refused_as_a_double_identity_with_the_same_and_with_a_newer_life() {
    for ahead in [0, 1] {
        let mut world = World::three();
        let real = world.me(N2);
        let life = Incarnation(real.incarnation.0 + ahead);
        let copy = Peer { node: N2, incarnation: life, nonce: 4711 };
        for _ in 0..40 {
            for to in [N1, N3] {
                let beat = heartbeat(&world, N2);
                world.cluster.inject(to, copy, beat);
            }
            world.run(100);
        }
        assert!(world.view(N1).contains(real), "the real one stays");
        assert!(world.cluster.is_quorate(N2));
        assert!(world.stops().is_empty());
        assert_eq!(refusals(&world), BTreeSet::from([JoinRefusal::DoubleIdentity(N2).to_string()]));
    }
}

#[test]
fn a_node_outside_the_roster_is_refused_and_named() {
    let mut world = World::three();
    let stranger = Peer { node: NodeId(9), incarnation: Incarnation(1), nonce: 1 };
    let beat = heartbeat(&world, N2);
    world.cluster.inject(N1, stranger, beat);
    world.run(10);
    assert_eq!(refusals(&world), BTreeSet::from([JoinRefusal::NotInRoster(NodeId(9)).to_string()]));
}

#[test]
fn messages_changed_at_random_never_panic_a_machine() {
    let mut world = World::three();
    let mut rng = Rng::new(99);
    let view = world.view(N2);
    let decision = world.cluster.decision(N2, view.epoch).unwrap();
    let from = world.cluster.member(N2).unwrap().peer();
    let next = View { epoch: view.epoch.next(), ..(*view).clone() };
    let ballot = quorate_membership::Ballot { round: 2, node: 2 };
    let state = world.cluster.member(N2).unwrap().durable().state;
    let step = Step::between(&view, &Decision { view: next.clone(), accepts: decision.accepts.clone() });
    let samples = [
        heartbeat(&world, N2),
        ControlMsg::Prepare { epoch: next.epoch, ballot },
        ControlMsg::Promise {
            epoch: next.epoch,
            ballot,
            state,
            accepted: Some((ballot, Box::new(next.clone()))),
        },
        ControlMsg::Accept { ballot, delta: Box::new(Delta::between(&view, &next)) },
        ControlMsg::Accepted { epoch: next.epoch, accept: decision.accepts.values().next().unwrap().clone() },
        ControlMsg::Learn(Box::new(step.clone())),
        ControlMsg::Chain { whole: Some(Box::new(decision)), steps: vec![step] },
        ControlMsg::Fetch { from: view.epoch },
        ControlMsg::Forward { number: 1, at: view.epoch, request: attach(lockspace("a")) },
        ControlMsg::Refused(JoinRefusal::RolledBack { known: Incarnation(1) }),
    ];
    let mut taken = 0;
    for round in 0..20_000 {
        let mut bytes = samples[round % samples.len()].encode(Versions::FIRST);
        for _ in 0..=rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(3) {
                0 => bytes[at] = rng.next_u64() as u8,
                1 => bytes[at] ^= 1 << rng.below(8),
                _ => bytes.truncate(at.max(1)),
            }
        }
        if let Ok(msg) = ControlMsg::decode(&bytes, Versions::CURRENT) {
            taken += 1;
            world.cluster.inject(N1, from, msg);
        }
    }
    assert!(1_000 < taken, "{taken}");
    world.run(50);
}
