//! The coordinator, one input at a time.

use super::*;
use crate::{Action, FencingTiming, Method};
use quorate_membership::{
    Attachment, Cause, ClusterId, Debt, DebtItem, Incarnation, Proof, ResourceId, ResourceKind, Safety,
};
use std::collections::BTreeSet;

const RETRY: Duration = Duration::from_millis(100);
const KILL: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

fn ms(n: u64) -> Instant {
    Instant(n * 1_000_000)
}

fn life(node: u32, incarnation: u64) -> Identity {
    Identity::new(NodeId(node), Incarnation(incarnation))
}

fn server(n: u8) -> ServerId {
    ServerId::from_bytes([n; 16])
}

fn resource(kind: ResourceKind, name: &str) -> ResourceId {
    ResourceId::new(kind, name)
}

/// A method of steps such as `a off`.
fn method(name: &str, steps: &[&str]) -> Method {
    let steps = steps.iter().map(|text| {
        let (device, action) = text.split_once(' ').unwrap();
        let action = match action {
            "off" => Action::Off,
            "on" => Action::On,
            _ => Action::Reboot,
        };
        Step { device: device.into(), action, options: BTreeMap::new() }
    });
    Method { name: name.into(), steps: steps.collect() }
}

fn config(methods: &[Method]) -> FencingConfig {
    let mut config = FencingConfig::new(FencingTiming::lan());
    for step in methods.iter().flat_map(|m| &m.steps) {
        let timeout = Duration::from_secs(60);
        let device = FenceDevice { agent: "x".into(), options: BTreeMap::new(), timeout };
        config.devices.insert(step.device.clone(), device);
    }
    if !methods.is_empty() {
        config.methods.insert(NodeId(9), methods.to_vec());
    }
    config
}

/// Members 1, 2 and 3 and the storage servers 1 and 2.
fn view(epoch: u64) -> View {
    let entry = || ServerEntry { name: "s".into(), address: "192.0.2.1:1".into() };
    View {
        epoch: Epoch(epoch),
        members: (1..=3).map(|n| (NodeId(n), Incarnation(1))).collect(),
        servers: [(server(1), entry()), (server(2), entry())].into(),
        ..View::empty(ClusterId::from_bytes([1; 16]))
    }
}

/// `who` was removed in this view and left these behind; what needs storage needs both servers.
fn owes(mut view: View, who: Identity, items: &[(ResourceId, Safety)]) -> View {
    let item = |(resource, safety): &(ResourceId, Safety)| {
        let servers =
            if *safety == Safety::Storage { [server(1), server(2)].into() } else { BTreeSet::new() };
        let attachment = Attachment {
            owner: who,
            resource: resource.clone(),
            safety: *safety,
            servers,
            journal: None,
            lockspace: None,
            exclusive: false,
        };
        (
            resource.clone(),
            DebtItem { attachment, fenced: false, rebuilt: false, rebuilt_by: BTreeMap::new() },
        )
    };
    let debt = Debt { removed: view.epoch, items: items.iter().map(item).collect() };
    view.debts.insert(who, debt);
    view
}

fn device() -> ResourceId {
    resource(ResourceKind::BlockDevice, "d")
}

fn service() -> ResourceId {
    resource(ResourceKind::Service, "s")
}

/// Node 9's first life failed and what it had needs power.
fn powered() -> View {
    owes(view(5), life(9, 1), &[(service(), Safety::Power)])
}

/// A coordinator and what it asked for, in words, in order.
struct Bench {
    it: Coordinator,
    now: Instant,
    said: Vec<String>,
    last: BTreeMap<String, Attempt>,
    proofs: Vec<(Identity, BTreeSet<ResourceId>, Proof)>,
}

impl Bench {
    fn new(node: u32, config: FencingConfig) -> Self {
        let it = Coordinator::new(life(node, 1), config).unwrap();
        Self { it, now: ms(0), said: Vec::new(), last: BTreeMap::new(), proofs: Vec::new() }
    }

    /// Quorate, at a view, with the lease of whoever is asked about over at `lease`.
    fn at(node: u32, config: FencingConfig, view: View, lease: Instant) -> Self {
        let mut bench = Self::new(node, config);
        bench.feed(Input::Quorum(true));
        bench.view(view);
        bench.lease(lease);
        bench
    }

    fn feed(&mut self, input: Input) {
        let mut out = Vec::new();
        self.it.handle(self.now, input, &mut out).unwrap();
        for output in out {
            let (text, attempt) = match output {
                Output::AskLease(who) => (format!("lease {who}"), None),
                Output::Install { attempt, server, .. } => (format!("install {server}"), Some(attempt)),
                Output::Step { attempt, victim, step, .. } => {
                    self.last.insert("step".into(), attempt);
                    (format!("{} {} {victim}", step.device, step.action), Some(attempt))
                }
                Output::Propose { attempt, request } => {
                    let Request::Prove { debtor, resources, proof } = request else { panic!("{request:?}") };
                    self.proofs.push((debtor, resources, proof));
                    ("prove".into(), Some(attempt))
                }
                Output::Record(_) => continue,
                Output::Confirmed { result, .. } => (format!("confirmed {result:?}"), None),
            };
            if let Some(attempt) = attempt {
                self.last.insert(text.clone(), attempt);
            }
            self.said.push(text);
        }
    }

    fn view(&mut self, view: View) {
        self.feed(Input::View(Arc::new(view)));
    }

    /// Answers every question about a lease that was asked.
    fn lease(&mut self, over_at: Instant) {
        let asked: Vec<Identity> =
            self.it.incidents.iter().filter(|(_, i)| i.lease_asked).map(|(w, _)| *w).collect();
        for who in asked {
            self.feed(Input::Lease { who, over_at: Some(over_at) });
        }
    }

    fn tick(&mut self, now: Instant) {
        self.now = now;
        self.feed(Input::Tick);
    }

    /// The last step ends.
    fn step(&mut self, is_done: bool) {
        let failed =
            || AgentError::Failed { agent: "x".into(), action: Action::Off, detail: "exit 1".into() };
        let result = if is_done { Ok(()) } else { Err(failed()) };
        let attempt = self.last["step"];
        self.feed(Input::Stepped { attempt, result });
    }

    fn installed(&mut self, n: u8, result: Result<Epoch, StorageFenceError>) {
        let attempt = self.last[&format!("install {}", server(n))];
        self.feed(Input::Installed { attempt, result });
    }

    fn proposed(&mut self, result: Result<(), RequestError>) {
        let attempt = self.last["prove"];
        self.feed(Input::Proposed { attempt, result });
    }

    /// What was asked for since this was last called, questions about leases and installations left out.
    fn did(&mut self) -> Vec<String> {
        let is_fence = |text: &String| !text.starts_with("lease ") && !text.starts_with("install ");
        std::mem::take(&mut self.said).into_iter().filter(is_fence).collect()
    }

    fn history(&self) -> Vec<String> {
        let text = |r: &HistoryRecord| {
            let by = r.by.map_or("-".into(), |b| b.to_string());
            let result = r.result.as_ref().map_or_else(String::as_str, |()| "ok");
            format!("{} {} by {by}: {}: {result}", r.at.0 / 1_000_000, r.victim, r.how)
        };
        self.it.history().map(text).collect()
    }
}

fn unreachable() -> Result<Epoch, StorageFenceError> {
    Err(StorageFenceError::Unreachable { address: "a".into(), detail: "no route".into() })
}

#[test]
fn levels_run_in_order_each_step_after_the_one_before_it() {
    let levels = [method("power", &["a off", "b off"]), method("backup", &["c off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(0));
    assert_eq!(b.did(), ["a off 9#1"], "one step at a time, the best level first");
    b.step(true);
    assert_eq!(b.did(), ["b off 9#1"], "one supply off is no fence");
    b.step(false);
    assert_eq!(b.did(), ["c off 9#1"], "the next level at once");
    b.step(true);
    assert_eq!(b.did(), ["prove"]);
    let proof = Proof::PoweredOff { device: "c".into() };
    assert_eq!(b.proofs, [(life(9, 1), [service()].into(), proof)]);
}

#[test]
fn after_the_last_level_the_first_comes_again_after_pauses_that_grow_to_their_limit() {
    let levels = [method("power", &["a off"]), method("backup", &["c off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(0));
    let mut pause = RETRY;
    for round in 0..10 {
        assert_eq!(b.did(), ["a off 9#1"], "round {round}");
        b.step(false);
        assert_eq!(b.did(), ["c off 9#1"], "round {round}");
        b.step(false);
        assert!(b.did().is_empty(), "a pause first");
        let at = b.now + pause;
        assert!(b.it.next_deadline().is_some_and(|wake| wake <= at), "round {round}");
        b.tick(Instant(at.0 - 1));
        assert!(b.did().is_empty(), "not before the pause is over");
        b.tick(at);
        pause = (pause * 2).min(FencingTiming::lan().retry_max);
    }
    assert_eq!(pause, FencingTiming::lan().retry_max);
}

#[test]
fn what_is_off_is_turned_on_again_in_order_and_a_failure_of_that_undoes_nothing() {
    let levels = [method("power", &["a off", "b off", "a on", "b on"]), method("backup", &["c off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(0));
    b.step(true);
    b.step(true);
    assert_eq!(b.did(), ["a off 9#1", "b off 9#1", "a on 9#1", "prove"]);
    b.step(false);
    assert_eq!(b.did(), ["b on 9#1"]);
    b.proposed(Ok(()));
    b.view(view(6));
    b.step(true);
    assert!(b.did().is_empty());
    assert_eq!(b.proofs[0].2, Proof::PoweredOff { device: "b".into() });
}

#[test]
fn a_victim_that_was_seen_off_is_not_turned_off_again_whatever_comes() {
    let levels = [method("power", &["a off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(0));
    b.step(true);
    assert_eq!(b.did(), ["a off 9#1", "prove"]);
    // The proof is asked for until it is decided; the device is left alone, through views, a lost quorum and the rest.
    for round in 0..5 {
        b.proposed(Err(RequestError::Unknown("lost".into())));
        b.feed(Input::Quorum(false));
        b.feed(Input::Quorum(true));
        let next = View { epoch: Epoch(6 + round), ..powered() };
        b.view(next);
        b.tick(b.now + FencingTiming::lan().retry_max);
        assert_eq!(b.did(), ["prove"], "round {round}");
    }
    b.proposed(Ok(()));
    b.view(view(20));
    b.tick(b.now + Duration::from_secs(60));
    assert!(b.did().is_empty());
    // The next life fails: that is another incident.
    b.view(owes(view(21), life(9, 2), &[(service(), Safety::Power)]));
    assert_eq!(b.did(), ["a off 9#2"]);
}

#[test]
fn turning_off_the_latest_life_serves_all_before_it() {
    let levels = [method("power", &["a off"])];
    let both = owes(powered(), life(9, 2), &[(service(), Safety::Power)]);
    let mut b = Bench::at(1, config(&levels), both, ms(0));
    assert_eq!(b.did(), ["a off 9#2"]);
    b.step(true);
    assert_eq!(b.did(), ["prove", "prove"]);
    let debtors: Vec<Identity> = b.proofs.iter().map(|p| p.0).collect();
    assert_eq!(debtors, [life(9, 1), life(9, 2)]);
}

#[test]
fn without_quorum_nothing_is_started_and_a_level_begins_anew_when_it_returns() {
    let levels = [method("power", &["a off", "b off"])];
    let mut b = Bench::new(1, config(&levels));
    b.view(owes(view(5), life(9, 1), &[(service(), Safety::Power), (device(), Safety::Storage)]));
    b.tick(ms(60_000));
    assert!(b.said.is_empty() && b.it.next_deadline().is_none(), "{:?}", b.said);
    assert_eq!(b.it.status(b.now)[0].waits, [Wait::Quorum]);
    b.feed(Input::Quorum(true));
    assert!(b.said.contains(&format!("install {}", server(1))), "{:?}", b.said);
    assert_eq!(b.did(), ["a off 9#1"]);
    // Lost in the middle of the level.
    b.feed(Input::Quorum(false));
    b.step(true);
    b.tick(ms(70_000));
    assert!(b.did().is_empty());
    b.feed(Input::Quorum(true));
    assert_eq!(b.did(), ["a off 9#1"], "what the machine did meanwhile nobody knows");
}

#[test]
fn only_the_lowest_member_fences_and_the_next_takes_over() {
    let levels = [method("power", &["a off"])];
    let mut b = Bench::at(2, config(&levels), powered(), ms(0));
    b.tick(ms(60_000));
    assert!(b.said.is_empty(), "{:?}", b.said);
    let without_first = |epoch| {
        let mut view = View { epoch: Epoch(epoch), ..powered() };
        view.members.remove(&NodeId(1));
        view
    };
    b.view(without_first(6));
    assert_eq!(b.did(), ["a off 9#1"]);
}

#[test]
fn who_saw_the_victim_off_says_so_also_when_a_lower_member_came_meanwhile() {
    let levels = [method("power", &["a off"])];
    let mut before = powered();
    before.members.remove(&NodeId(1));
    let mut b = Bench::at(2, config(&levels), before, ms(0));
    assert_eq!(b.did(), ["a off 9#1"]);
    b.view(View { epoch: Epoch(6), ..powered() });
    assert!(!b.it.is_coordinating());
    b.step(true);
    assert_eq!(b.did(), ["prove"], "or the victim would be turned off a second time");
    // It is as patient with that as a coordinator.
    b.proposed(Err(RequestError::Unknown("lost".into())));
    assert_eq!(b.it.next_deadline(), Some(b.now + RETRY));
    b.tick(b.now + RETRY);
    assert_eq!(b.did(), ["prove"]);
    // And no more than that: what it has not seen itself is the other's.
    b.view(owes(View { epoch: Epoch(7), ..powered() }, life(8, 1), &[(service(), Safety::Power)]));
    b.tick(b.now + Duration::from_secs(60));
    assert!(b.did().is_empty());
}

#[test]
fn every_enrolled_server_gets_the_view_and_the_proof_needs_all_of_them() {
    let failed = owes(view(5), life(9, 1), &[(device(), Safety::Storage)]);
    let mut b = Bench::at(1, config(&[]), failed, ms(0));
    let installs: Vec<String> = b.said.iter().filter(|s| s.starts_with("install")).cloned().collect();
    assert_eq!(installs, [1, 2].map(|n| format!("install {}", server(n))));
    b.installed(1, Ok(Epoch(5)));
    assert!(b.did().is_empty(), "one of two");
    b.installed(2, Ok(Epoch(4)));
    assert!(b.did().is_empty(), "an epoch in which the victim is a member");
    b.tick(ms(1));
    b.installed(2, unreachable());
    assert!(b.did().is_empty());
    assert_eq!(b.it.next_deadline(), Some(ms(1) + RETRY), "it is tried again");
    b.tick(ms(1) + RETRY);
    b.installed(2, Ok(Epoch(5)));
    assert_eq!(b.did(), ["prove"]);
    let confirmed = [(server(1), Epoch(5)), (server(2), Epoch(5))].into();
    assert_eq!(b.proofs, [(life(9, 1), [device()].into(), Proof::StorageFence { confirmed })]);
}

#[test]
fn a_server_that_cannot_drain_brings_the_next_level_at_once_and_a_silent_one_after_the_patience() {
    let levels = [method("power", &["a off"])];
    let failed = || owes(view(5), life(9, 1), &[(device(), Safety::Storage)]);
    let mut b = Bench::at(1, config(&levels), failed(), ms(0));
    b.installed(1, Ok(Epoch(5)));
    b.installed(2, Err(StorageFenceError::Undrained { connections: 1 }));
    assert_eq!(b.did(), ["a off 9#1"]);
    b.step(true);
    assert_eq!(b.did(), ["prove"]);
    assert_eq!(b.proofs[0].2, Proof::PoweredOff { device: "a".into() });

    let mut b = Bench::at(1, config(&levels), failed(), ms(0));
    b.installed(1, Ok(Epoch(5)));
    b.installed(2, unreachable());
    let patient = ms(0) + PATIENCE;
    while b.now < patient {
        assert!(b.did().is_empty(), "at {:?}", b.now);
        let next = b.it.next_deadline().unwrap().min(patient);
        b.tick(next);
        if b.said.iter().any(|s| s.starts_with("install")) {
            b.installed(2, unreachable());
        }
    }
    assert_eq!(b.did(), ["a off 9#1"]);
}

#[test]
fn nothing_is_proven_before_the_end_of_the_lease_and_a_service_waits_for_the_kill_time_too() {
    let space = resource(ResourceKind::Lockspace, "l");
    let items = [(device(), Safety::Storage), (space.clone(), Safety::Lease), (service(), Safety::Lease)];
    let mut b = Bench::at(1, config(&[]), owes(view(5), life(9, 1), &items), ms(500));
    b.installed(1, Ok(Epoch(5)));
    b.installed(2, Ok(Epoch(5)));
    assert!(b.did().is_empty());
    b.tick(ms(499));
    assert!(b.did().is_empty());
    b.tick(ms(500));
    assert_eq!(b.did(), ["prove"]);
    b.proposed(Ok(()));
    assert_eq!(b.did(), ["prove"]);
    b.proposed(Ok(()));
    assert_eq!(b.it.next_deadline(), Some(ms(500) + KILL));
    b.tick(ms(500) + KILL);
    assert_eq!(b.did(), ["prove"]);
    let order: Vec<ResourceId> = b.proofs.iter().flat_map(|p| p.1.clone()).collect();
    assert_eq!(order, [device(), space, service()]);
}

#[test]
fn a_service_of_storage_safety_with_no_server_left_waits_for_the_kill_time() {
    let failed = owes(view(5), life(9, 1), &[(service(), Safety::Storage), (device(), Safety::Storage)]);
    let mut b = Bench::at(1, config(&[]), View { servers: BTreeMap::new(), ..failed }, ms(500));
    b.tick(ms(500));
    assert_eq!(b.did(), ["prove"]);
    assert_eq!(b.proofs[0].1, [device()].into(), "no storage cuts the service off: the supervisor must have");
    b.proposed(Ok(()));
    b.tick(ms(499) + KILL);
    assert!(b.did().is_empty());
    b.tick(ms(500) + KILL);
    assert_eq!(b.did(), ["prove"]);
    assert_eq!(b.proofs[1].1, [service()].into());
}

#[test]
fn a_lease_that_nobody_knows_yet_is_asked_for_again() {
    let failed = owes(view(5), life(9, 1), &[(service(), Safety::Lease)]);
    let mut b = Bench::new(1, config(&[]));
    b.feed(Input::Quorum(true));
    b.view(failed);
    for _ in 0..3 {
        assert!(std::mem::take(&mut b.said).contains(&"lease 9#1".to_owned()));
        b.feed(Input::Lease { who: life(9, 1), over_at: None });
        assert!(!b.said.contains(&"lease 9#1".to_owned()), "not in a loop");
        b.tick(b.now + RETRY);
    }
    assert_eq!(b.it.status(b.now)[0].waits, [Wait::Lease(None)]);
}

#[test]
fn the_history_says_who_did_what_when_how_and_with_what_result() {
    let levels = [method("power", &["a off"]), method("backup", &["c off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(20_000));
    b.tick(ms(40));
    b.step(false);
    b.tick(ms(70));
    b.step(true);
    b.proposed(Ok(()));
    let by = Cause::Request { by: life(1, 1), number: 7 };
    b.tick(ms(75));
    b.view(View { cause: by.clone(), ..view(6) });
    let wanted = [
        "40 9#1 by 1#1: off by device a of method power: x Off failed: exit 1",
        "70 9#1 by 1#1: off by device c of method backup: ok",
        "75 9#1 by 1#1: record 6: fenced from service s: ok",
    ];
    assert_eq!(b.history(), wanted);
    let after: Vec<u128> = b.it.history().map(|r| r.after.as_millis()).collect();
    assert_eq!(after, [40, 70, 75], "since the removal");
    // Those who did nothing have the end of it, with the name of the one who proved it.
    let mut other = Bench::at(3, config(&levels), powered(), ms(20_000));
    other.tick(ms(80));
    other.view(View { cause: by, ..view(6) });
    assert_eq!(other.history(), ["80 9#1 by 1#1: record 6: fenced from service s: ok"]);
    assert!(other.said.is_empty(), "{:?}", other.said);
}

#[test]
fn a_failure_that_repeats_is_recorded_once_and_the_history_is_bounded() {
    let mut b = Bench::at(1, config(&[method("power", &["a off"])]), powered(), ms(0));
    for _ in 0..50 {
        b.step(false);
        b.tick(b.now + FencingTiming::lan().retry_max);
    }
    let failures = b.history().iter().filter(|line| line.ends_with("exit 1")).count();
    assert_eq!(failures, 1, "{:?}", b.history());
    for epoch in 0..2_000 {
        b.view(owes(view(10 + 2 * epoch), life(8, epoch + 1), &[(service(), Safety::Power)]));
        b.view(view(11 + 2 * epoch));
    }
    assert_eq!(b.it.history().count(), HISTORY_RECORDS_MAX);
    assert_eq!(b.it.history().last().map(|r| r.victim), Some(life(8, 2_000)), "the oldest go first");
}

#[test]
fn a_persons_word_counts_for_every_life_at_every_level_and_on_every_quorate_member() {
    let items = [(service(), Safety::Power), (device(), Safety::Storage)];
    let both = owes(owes(view(5), life(9, 1), &items), life(9, 2), &[(service(), Safety::Lease)]);
    let mut b = Bench::at(3, config(&[]), both, ms(60_000));
    let confirm = |node| Input::Confirm { question: 4, node: NodeId(node), by: "uid 0".into() };
    b.feed(confirm(8));
    assert_eq!(b.did(), ["confirmed Err(NothingOpen(NodeId(8)))"]);
    b.feed(Input::Quorum(false));
    b.feed(confirm(9));
    assert_eq!(b.did(), ["confirmed Err(NotQuorate)"]);
    assert!(b.history().is_empty() && b.proofs.is_empty());
    b.feed(Input::Quorum(true));
    b.feed(confirm(9));
    assert_eq!(b.did(), ["prove", "prove"]);
    let proof = Proof::Confirmed { by: "uid 0".into() };
    let wanted =
        [(life(9, 1), [device(), service()].into(), proof.clone()), (life(9, 2), [service()].into(), proof)];
    assert_eq!(b.proofs, wanted);
    assert_eq!(b.history(), [1, 2].map(|n| format!("0 9#{n} by 3#1: the word of uid 0: ok")));
    let last = b.last["prove"];
    b.feed(Input::Proposed { attempt: Attempt(last.0 - 1), result: Ok(()) });
    assert!(b.did().is_empty(), "both must be decided");
    b.feed(Input::Proposed { attempt: last, result: Ok(()) });
    assert_eq!(b.did(), ["confirmed Ok(())"]);
}

#[test]
fn a_node_that_is_back_is_not_turned_off_for_its_former_life() {
    let mut back = powered();
    back.members.insert(NodeId(9), Incarnation(2));
    let mut b = Bench::at(1, config(&[method("power", &["a off"])]), back, ms(0));
    b.tick(ms(60_000));
    assert!(b.did().is_empty());
    assert_eq!(b.it.status(b.now)[0].waits, [Wait::Person]);
    assert!(b.history()[0].contains("a later life of it is a member"), "{:?}", b.history());
}

#[test]
fn a_device_that_the_configuration_loses_in_the_middle_of_a_level_fails_the_level() {
    let levels = [method("power", &["a off", "b off"]), method("backup", &["c off"])];
    let mut b = Bench::at(1, config(&levels), powered(), ms(0));
    assert_eq!(b.did(), ["a off 9#1"]);
    b.feed(Input::Config(config(&levels[1..])));
    b.step(true);
    assert_eq!(b.did(), Vec::<String>::new(), "b is no device any more");
    b.tick(b.now + FencingTiming::lan().retry_max);
    b.step(true);
    assert!(b.proofs.iter().all(|p| p.2 == Proof::PoweredOff { device: "c".into() }), "{:?}", b.proofs);
    assert_eq!(b.proofs.len(), 1);
    let wrong = FencingConfig { devices: BTreeMap::new(), ..config(&levels) };
    assert!(b.it.handle(b.now, Input::Config(wrong), &mut Vec::new()).is_err(), "and a wrong one is refused");
}
