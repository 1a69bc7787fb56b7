//! Scenes: some managers, the real record and its rules, agents that do as they are told, and no chance. What happens to
//! resources is written down in order and compared.

use quorate_failover::machine::{Command, Input, Manager, Output, RETRY_TIME};
use quorate_failover::{
    Action, Agent, CommandError, Domain, Event, Exit, Idle, Outcome, Recovery, ResourceConfig, ServiceConfig,
    ServiceStatus, StateName, Target, Timeouts,
};
use quorate_membership::machine::decide;
use quorate_membership::{
    ClusterId, Identity, Incarnation, Instant, NodeId, Proof, Request, RequestError, Safety, View,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const MONITOR: Duration = Duration::from_secs(10);

fn resource(name: &str, children: Vec<ResourceConfig>) -> ResourceConfig {
    ResourceConfig {
        name: name.into(),
        agent: Agent::Ocf { provider: "scene".into(), kind: "scene".into() },
        params: BTreeMap::new(),
        timeouts: Timeouts::ordinary(),
        monitor_interval: MONITOR,
        children,
    }
}

/// A service of the resources `a` and `b`, in this order.
fn web() -> ServiceConfig {
    ServiceConfig {
        name: "web".into(),
        resources: vec![resource("a", vec![]), resource("b", vec![])],
        domain: None,
        recovery: Recovery::Restart,
        max_restarts: 0,
        restart_expire_time: Duration::ZERO,
        autostart: true,
        safety: Safety::Lease,
        servers: BTreeSet::new(),
    }
}

fn domain(nodes: &[u32]) -> Domain {
    let nodes = (1..).zip(nodes).map(|(priority, node)| (NodeId(*node), priority)).collect();
    Domain { nodes, ordered: true, restricted: false, nofailback: false }
}

fn life(node: u32) -> Identity {
    Identity::new(NodeId(node), Incarnation(1))
}

fn not_there() -> Outcome {
    Outcome { exit: Exit::NotStarted("no such program".into()), reason: None }
}

/// The cluster, and what its agents did.
struct Scene {
    services: Vec<ServiceConfig>,
    now: Instant,
    view: Arc<View>,
    managers: BTreeMap<Identity, Manager>,
    inputs: VecDeque<(Identity, Input)>,
    locks: BTreeMap<String, VecDeque<Identity>>,
    /// What really runs where.
    up: BTreeSet<(u32, String)>,
    /// How an action of a resource on a node ends, if not as it should: `1 start a`.
    told: BTreeMap<String, Outcome>,
    denies_locks: bool,
    /// What an owner says after it gave the service up does not arrive.
    loses_last_words: bool,
    silent: BTreeSet<Identity>,
    log: Vec<String>,
}

impl Scene {
    /// Nodes `1..=nodes` with these services, when nothing happens any more.
    fn new(nodes: u32, services: Vec<ServiceConfig>) -> Self {
        let mut scene = Self::prepared(services);
        for node in 1..=nodes {
            scene.add(node);
        }
        scene.run();
        scene
    }

    fn prepared(services: Vec<ServiceConfig>) -> Self {
        Self {
            services,
            now: Instant(1),
            view: Arc::new(View::empty(ClusterId::from_bytes([1; 16]))),
            managers: BTreeMap::new(),
            inputs: VecDeque::new(),
            locks: BTreeMap::new(),
            up: BTreeSet::new(),
            told: BTreeMap::new(),
            denies_locks: false,
            loses_last_words: false,
            silent: BTreeSet::new(),
            log: Vec::new(),
        }
    }

    fn add(&mut self, node: u32) {
        let me = life(node);
        self.managers.insert(me, Manager::new(me, self.services.clone()).unwrap());
        self.add_member(node);
        self.inputs.push_back((me, Input::Quorum(true)));
    }

    /// A member whose manager does not run yet: it hears nothing.
    fn add_member(&mut self, node: u32) {
        let me = life(node);
        let mut view = View::clone(&self.view);
        view.epoch = view.epoch.next();
        view.members.insert(me.node, me.incarnation);
        view.lives.insert(me.node, me.incarnation);
        self.decided(view);
    }

    fn manager_starts(&mut self, node: u32) {
        let me = life(node);
        self.managers.insert(me, Manager::new(me, self.services.clone()).unwrap());
        self.inputs.push_back((me, Input::View(Arc::clone(&self.view))));
        self.inputs.push_back((me, Input::Quorum(true)));
        self.run();
    }

    fn joins(&mut self, node: u32) {
        self.add(node);
        self.run();
    }

    fn decided(&mut self, view: View) {
        self.view = Arc::new(view);
        for who in self.view.identities() {
            self.inputs.push_back((who, Input::View(Arc::clone(&self.view))));
        }
    }

    fn ask(&mut self, by: Identity, request: &Request) -> Result<(), RequestError> {
        match decide(&self.view, by, 0, request) {
            Ok(Some(view)) => self.decided(view),
            Ok(None) => {}
            Err(refusal) => return Err(RequestError::Refused(refusal)),
        }
        Ok(())
    }

    /// Until nobody has anything to say.
    fn run(&mut self) {
        let mut count = 0;
        while let Some((who, input)) = self.inputs.pop_front() {
            count += 1;
            assert!(count < 10_000, "it goes round in circles:\n{}", self.log.join("\n"));
            let Some(manager) = self.managers.get_mut(&who) else { continue };
            let mut out = Vec::new();
            manager.handle(self.now, input, &mut out);
            self.carry_out(who, out);
        }
    }

    /// Lets time pass, and everything that is due in it happen.
    fn pass(&mut self, time: Duration) {
        self.run();
        let end = self.now + time;
        loop {
            let due = self.managers.values().filter_map(Manager::next_deadline).min();
            let Some(at) = due.filter(|at| *at <= end) else { break };
            self.now = self.now.max(at);
            let late: Vec<Identity> = self.managers.keys().copied().collect();
            for who in late {
                if self.managers[&who].next_deadline().is_some_and(|at| at <= self.now) {
                    self.inputs.push_back((who, Input::Tick));
                }
            }
            self.run();
        }
        self.now = end;
    }

    fn carry_out(&mut self, who: Identity, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Propose { attempt, request } => {
                    let result = self.ask(who, &request);
                    if self.loses_last_words && matches!(request, Request::Detach(_)) {
                        self.silent.insert(who);
                    }
                    self.inputs.push_back((who, Input::Proposed { attempt, result }));
                }
                Output::Lock { service } => {
                    if self.denies_locks {
                        self.inputs.push_back((who, Input::Locked { service, held: false }));
                    } else {
                        self.locks.entry(service.clone()).or_default().push_back(who);
                        self.grant(&service);
                    }
                }
                Output::Unlock { service } => {
                    self.unlock(&service, who);
                    self.inputs.push_back((who, Input::Unlocked { service }));
                }
                Output::Run { attempt, service, resource, config, action } => {
                    assert_eq!(self.owner(&service), Some(who.node.0), "only the attached owner acts");
                    let holder = self.locks.get(&service).and_then(|q| q.front());
                    assert_eq!(holder, Some(&who), "only the holder of the owner lock acts");
                    let name = config.start_order()[resource].name.clone();
                    let outcome = self.agent(who.node.0, &name, action);
                    self.inputs.push_back((who, Input::Done { attempt, outcome }));
                }
                Output::Send { .. } if self.silent.contains(&who) => {}
                Output::Send { to, bytes } => {
                    self.inputs.push_back((to, Input::Message { from: who, bytes }))
                }
                Output::Event(Event::Leftover { resource, .. }) => {
                    self.log.push(format!("{} leftover {resource}", who.node));
                }
                Output::Event(_) => {}
                Output::Left => self.log.push(format!("{} left", who.node)),
            }
        }
    }

    fn agent(&mut self, node: u32, name: &str, action: Action) -> Outcome {
        let word = if action == (Action::Monitor { probe: true }) { "probe" } else { action.name() };
        let line = format!("{node} {word} {name}");
        let told = self.told.get(&line).cloned();
        self.log.push(line);
        let real = (node, name.to_owned());
        match action {
            _ if told.is_some() => {}
            Action::Start => drop(self.up.insert(real)),
            Action::Stop => drop(self.up.remove(&real)),
            Action::Monitor { .. } => return Outcome::code(if self.up.contains(&real) { 0 } else { 7 }),
        }
        told.unwrap_or_else(|| Outcome::code(0))
    }

    fn grant(&mut self, service: &str) {
        let head = self.locks.get(service).and_then(|q| q.front()).copied();
        if let Some(who) = head {
            self.inputs.push_back((who, Input::Locked { service: service.into(), held: true }));
        }
    }

    fn unlock(&mut self, service: &str, who: Identity) {
        if let Some(queue) = self.locks.get_mut(service) {
            queue.retain(|w| *w != who);
        }
        self.grant(service);
    }

    fn owner(&self, service: &str) -> Option<u32> {
        self.view.attachments.iter().find(|a| a.resource.name == service).map(|a| a.owner.node.0)
    }

    /// The node's process and machine are gone; the others removed it.
    fn dies(&mut self, node: u32) {
        self.managers.remove(&life(node));
        self.up.retain(|(n, _)| *n != node);
        let by = self.view.identities().find(|w| *w != life(node)).unwrap();
        self.ask(by, &Request::Evict { who: life(node), reason: "dead".into() }).unwrap();
        self.run();
    }

    fn is_fenced(&mut self, node: u32) {
        let by = self.view.identities().next().unwrap();
        let proof = Proof::PoweredOff { device: "pdu".into() };
        let proof = Request::Prove { debtor: life(node), resources: BTreeSet::new(), proof };
        self.ask(by, &proof).unwrap();
        self.run();
    }

    fn locks_are_rebuilt_without(&mut self, node: u32) {
        for service in self.locks.keys().cloned().collect::<Vec<_>>() {
            self.unlock(&service, life(node));
        }
        self.run();
    }

    fn quorum(&mut self, node: u32, quorate: bool) {
        self.inputs.push_back((life(node), Input::Quorum(quorate)));
        self.run();
    }

    fn command(&mut self, at: u32, command: Command) -> Result<(), CommandError> {
        let mut out = Vec::new();
        let manager = self.managers.get_mut(&life(at)).unwrap();
        let result = manager.command(self.now, "web", command, &mut out);
        self.carry_out(life(at), out);
        self.run();
        result
    }

    fn tell(&mut self, line: &str, outcome: Outcome) {
        self.told.insert(line.into(), outcome);
    }

    /// What was done since this was last called.
    fn did(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    /// The same of one service, as every member knows it.
    fn status(&self) -> ServiceStatus {
        let all: Vec<ServiceStatus> =
            self.managers.values().filter_map(|m| m.status().into_iter().next()).collect();
        let first = all.first().expect("a member").clone();
        assert!(all.iter().all(|s| *s == first), "all know the same: {all:#?}");
        first
    }
}

fn lines(node: u32, words: &str) -> Vec<String> {
    words.split(", ").map(|w| format!("{node} {w}")).collect()
}

const START: &str = "probe b, probe a, start a, monitor a, start b, monitor b";
const STOP: &str = "stop b, stop a";

#[test]
fn a_tree_starts_parents_first_and_stops_in_exactly_the_reverse_order() {
    let tree = vec![
        resource("fs", vec![resource("db", vec![resource("app", vec![])]), resource("log", vec![])]),
        resource("ip", vec![]),
    ];
    let mut s = Scene::new(2, vec![ServiceConfig { resources: tree, ..web() }]);
    let wanted = "probe ip, probe log, probe app, probe db, probe fs, start fs, monitor fs, start db, monitor db, \
                  start app, monitor app, start log, monitor log, start ip, monitor ip";
    assert_eq!(s.did(), lines(1, wanted));
    assert_eq!(s.status().state, StateName::Running);
    s.command(2, Command::Disable).unwrap();
    assert_eq!(s.did(), lines(1, "stop ip, stop log, stop app, stop db, stop fs"));
    assert_eq!(s.status().state, StateName::Stopped(Idle::Disabled));
    assert!(s.up.is_empty() && s.owner("web").is_none());
}

#[test]
fn each_resource_is_monitored_at_its_own_interval() {
    let mut never = resource("b", vec![]);
    never.monitor_interval = Duration::ZERO;
    let mut often = resource("a", vec![]);
    often.monitor_interval = MONITOR / 2;
    let mut s = Scene::new(1, vec![ServiceConfig { resources: vec![often, never], ..web() }]);
    s.did();
    s.pass(MONITOR / 2 - Duration::from_nanos(1));
    assert!(s.did().is_empty());
    s.pass(MONITOR / 2 + Duration::from_nanos(1));
    assert_eq!(s.did(), lines(1, "monitor a, monitor a"));
}

#[test]
fn a_start_that_fails_is_undone_in_reverse_and_tried_on_the_next_node() {
    let mut s = Scene::prepared(vec![web()]);
    s.tell("1 start b", Outcome { exit: Exit::Code(5), reason: Some("no binary".into()) });
    (1..=2).for_each(|n| s.add(n));
    s.run();
    let first = lines(1, "probe b, probe a, start a, monitor a, start b, stop b, stop a");
    assert_eq!(s.did(), [first, lines(2, START)].concat());
    let status = s.status();
    assert_eq!((status.owner, status.state), (Some(life(2)), StateName::Running));
    assert_eq!(status.failed, [(NodeId(1), "b: start: not installed (no binary)".into())].into());
    // Not there again by itself; when a person enables it, it is.
    s.told.clear();
    s.dies(2);
    s.is_fenced(2);
    s.locks_are_rebuilt_without(2);
    assert!(s.did().is_empty());
    assert_eq!(s.status().state, StateName::Stopped(Idle::FailedEverywhere));
    s.command(1, Command::Enable(None)).unwrap();
    assert_eq!(s.did(), lines(1, START));
}

#[test]
fn a_start_counts_only_when_the_monitor_says_so() {
    for said in [7, 1, 9] {
        let mut s = Scene::prepared(vec![web()]);
        s.tell("1 monitor a", Outcome::code(said));
        (1..=2).for_each(|n| s.add(n));
        s.run();
        assert_eq!(
            s.did(),
            [lines(1, "probe b, probe a, start a, monitor a, stop a"), lines(2, START)].concat()
        );
    }
    let mut s = Scene::prepared(vec![web()]);
    s.tell("1 start a", Outcome { exit: Exit::TimedOut, reason: None });
    (1..=2).for_each(|n| s.add(n));
    s.run();
    assert_eq!(s.did(), [lines(1, "probe b, probe a, start a, stop a"), lines(2, START)].concat());
}

#[test]
fn an_agent_that_is_not_installed_sends_the_service_to_the_next_node() {
    let mut s = Scene::prepared(vec![web()]);
    for action in ["probe", "start", "monitor", "stop"] {
        s.tell(&format!("1 {action} b"), not_there());
    }
    (1..=2).for_each(|n| s.add(n));
    s.run();
    // What could not even be started needs no stop, and there is none who could.
    let first = lines(1, "probe b, probe a, start a, monitor a, start b, stop a");
    assert_eq!(s.did(), [first, lines(2, START)].concat());
    assert_eq!(s.status().failed[&NodeId(1)], "b: start: cannot be started: no such program");
}

#[test]
fn a_resource_that_fails_is_restarted_in_place_after_a_look_for_leftovers() {
    let mut s = Scene::new(2, vec![web()]);
    s.did();
    s.up.remove(&(1, "a".into()));
    s.pass(MONITOR);
    assert_eq!(s.did(), [lines(1, "monitor a"), lines(1, STOP), lines(1, START)].concat());
    let status = s.status();
    assert_eq!((status.owner, status.restarts, status.state), (Some(life(1)), 1, StateName::Running));
    // A restart that fails goes elsewhere.
    s.up.remove(&(1, "b".into()));
    s.tell("1 start a", Outcome::code(1));
    s.pass(MONITOR);
    let there = lines(1, "monitor a, monitor b, stop b, stop a, probe b, probe a, start a, stop a");
    assert_eq!(s.did(), [there, lines(2, START)].concat());
}

#[test]
fn a_monitor_that_fails_or_hangs_is_a_failure_and_a_degraded_one_is_not() {
    let timed_out = Outcome { exit: Exit::TimedOut, reason: None };
    let signal = Outcome { exit: Exit::Signal(9), reason: None };
    for outcome in [Outcome::code(1), Outcome::code(7), Outcome::code(9), not_there(), timed_out, signal] {
        let mut s = Scene::new(2, vec![ServiceConfig { recovery: Recovery::Relocate, ..web() }]);
        s.did();
        s.tell("1 monitor a", outcome.clone());
        s.pass(MONITOR);
        assert_eq!(s.did(), [lines(1, "monitor a, stop b, stop a"), lines(2, START)].concat(), "{outcome}");
    }
    for code in [0, 8, 190, 191] {
        let mut s = Scene::new(2, vec![web()]);
        s.did();
        s.tell("1 monitor a", Outcome::code(code));
        s.pass(MONITOR);
        assert_eq!(s.did(), lines(1, "monitor a, monitor b"), "{code}");
    }
}

#[test]
fn the_policy_relocate_moves_it_and_stays_where_there_is_no_other_node() {
    let relocate = ServiceConfig { recovery: Recovery::Relocate, ..web() };
    let mut s = Scene::new(2, vec![relocate.clone()]);
    s.did();
    s.up.remove(&(1, "b".into()));
    s.pass(MONITOR);
    assert_eq!(s.did(), [lines(1, "monitor a, monitor b, stop b, stop a"), lines(2, START)].concat());
    let mut s = Scene::new(1, vec![relocate]);
    s.did();
    s.up.remove(&(1, "b".into()));
    s.pass(MONITOR);
    assert_eq!(s.did(), [lines(1, "monitor a, monitor b, stop b, stop a"), lines(1, START)].concat());
}

#[test]
fn the_policy_disable_leaves_it_stopped_everywhere_until_a_person_enables_it() {
    let mut s = Scene::new(3, vec![ServiceConfig { recovery: Recovery::Disable, ..web() }]);
    s.did();
    s.up.remove(&(1, "b".into()));
    s.pass(MONITOR);
    assert_eq!(s.did(), lines(1, "monitor a, monitor b, stop b, stop a"), "nobody else starts it meanwhile");
    let status = s.status();
    assert_eq!((status.owner, status.target), (None, Target::Disabled));
    // Also not when the cluster changes.
    s.dies(1);
    s.joins(4);
    s.pass(MONITOR);
    assert!(s.did().is_empty());
    assert_eq!(s.status().state, StateName::Stopped(Idle::Disabled));
    s.command(3, Command::Enable(None)).unwrap();
    assert_eq!(s.did(), lines(2, START));
}

#[test]
fn the_policy_disable_holds_also_against_a_better_node() {
    let nofailback = Domain { nofailback: true, ..domain(&[2, 1]) };
    let service = ServiceConfig { recovery: Recovery::Disable, domain: Some(nofailback), ..web() };
    let mut s = Scene::new(1, vec![service]);
    s.joins(2);
    s.did();
    s.loses_last_words = true;
    s.up.remove(&(1, "b".into()));
    s.pass(MONITOR);
    // Node 2 is free to take it, were it not told why it stopped before the owner gives it up.
    assert_eq!(s.did(), lines(1, "monitor a, monitor b, stop b, stop a"));
    assert_eq!(s.status().state, StateName::Stopped(Idle::Disabled));
}

#[test]
fn after_too_many_restarts_within_their_time_it_relocates() {
    let window = MONITOR * 3;
    let limited = ServiceConfig { max_restarts: 2, restart_expire_time: window, ..web() };
    let mut s = Scene::new(2, vec![limited]);
    let fails = |s: &mut Scene| {
        s.up.remove(&(s.owner("web").unwrap(), "a".into()));
        s.pass(MONITOR);
        s.owner("web")
    };
    assert_eq!([fails(&mut s), fails(&mut s), fails(&mut s)], [Some(1), Some(1), Some(2)]);
    // Restarts that are long ago do not count.
    assert_eq!([fails(&mut s), fails(&mut s)], [Some(2), Some(2)]);
    s.pass(window);
    assert_eq!([fails(&mut s), fails(&mut s)], [Some(2), Some(2)]);
}

#[test]
fn leftovers_are_stopped_before_the_first_start_and_what_cannot_be_stopped_starts_nowhere() {
    // It runs, or nobody knows what it does: either is stopped.
    for said in [0, 1, 8, 9] {
        let mut s = Scene::prepared(vec![web()]);
        s.tell("1 probe b", Outcome::code(said));
        (1..=2).for_each(|n| s.add(n));
        s.run();
        let wanted = "probe b, leftover b, stop b, probe a, start a, monitor a, start b, monitor b";
        assert_eq!(s.did(), lines(1, wanted), "{said}");
    }
    let mut s = Scene::prepared(vec![web()]);
    s.up.insert((1, "b".into()));
    s.tell("1 stop b", Outcome { exit: Exit::TimedOut, reason: None });
    (1..=2).for_each(|n| s.add(n));
    s.run();
    s.pass(Duration::from_secs(600));
    assert_eq!(s.did(), lines(1, "probe b, leftover b, stop b"));
    assert_eq!((s.owner("web"), s.status().state), (Some(1), StateName::StopFailed));
    // A person looks at it; disabling tries once more.
    s.command(2, Command::Disable).unwrap();
    assert_eq!(s.did(), lines(1, "stop b"));
    s.told.clear();
    s.command(2, Command::Disable).unwrap();
    assert_eq!(s.did(), lines(1, STOP));
    assert_eq!((s.owner("web"), s.status().state), (None, StateName::Stopped(Idle::Disabled)));
    assert!(s.locks["web"].is_empty());
}

#[test]
fn a_service_that_does_not_stop_is_not_started_elsewhere() {
    for outcome in
        [Outcome::code(1), Outcome::code(7), not_there(), Outcome { exit: Exit::Signal(9), reason: None }]
    {
        let mut s = Scene::new(2, vec![web()]);
        s.did();
        s.tell("1 stop a", outcome.clone());
        s.command(1, Command::Relocate(Some(NodeId(2)))).unwrap();
        s.pass(Duration::from_secs(600));
        assert_eq!(s.did(), lines(1, STOP), "{outcome}");
        assert_eq!((s.owner("web"), s.status().state), (Some(1), StateName::StopFailed), "{outcome}");
        assert_eq!(s.locks["web"], [life(1)], "the owner lock stays too");
    }
}

#[test]
fn without_the_owner_lock_nothing_runs() {
    let other = Identity::new(NodeId(7), Incarnation(1));
    let mut s = Scene::prepared(vec![web()]);
    s.locks.insert("web".into(), [other].into());
    (1..=2).for_each(|n| s.add(n));
    s.run();
    s.pass(Duration::from_secs(600));
    assert!(s.did().is_empty());
    assert_eq!((s.owner("web"), s.status().state), (Some(1), StateName::Starting));
    s.unlock("web", other);
    s.run();
    assert_eq!(s.did(), lines(1, START));

    let mut s = Scene::prepared(vec![web()]);
    s.denies_locks = true;
    (1..=2).for_each(|n| s.add(n));
    // It gives the attachment up and tries again, without an agent being called.
    s.pass(RETRY_TIME * 5);
    assert!(s.did().is_empty());
    s.denies_locks = false;
    s.pass(RETRY_TIME * 2);
    assert_eq!(s.did().len(), START.split(", ").count());
}

#[test]
fn a_dead_owners_service_waits_for_the_fence_then_for_the_lock_then_looks_for_leftovers() {
    for safety in [Safety::Lease, Safety::Power] {
        let mut s = Scene::new(3, vec![ServiceConfig { safety, ..web() }]);
        s.did();
        s.dies(1);
        s.pass(Duration::from_secs(600));
        assert!(s.did().is_empty(), "not before the fence");
        assert_eq!((s.owner("web"), s.status().state), (None, StateName::WaitingForFence));
        s.is_fenced(1);
        assert!(s.did().is_empty(), "not before its lock is rebuilt");
        assert_eq!((s.owner("web"), s.status().state), (Some(2), StateName::Starting));
        s.up.insert((2, "b".into()));
        s.locks_are_rebuilt_without(1);
        let wanted = "probe b, leftover b, stop b, probe a, start a, monitor a, start b, monitor b";
        assert_eq!(s.did(), lines(2, wanted));
        assert!(s.view.debts.is_empty(), "and the debt is closed");
    }
    let mut s = Scene::new(2, vec![ServiceConfig { safety: Safety::Power, ..web() }]);
    s.did();
    s.dies(1);
    // The owner lock is free again after the lease; the record is what keeps the level.
    s.locks_are_rebuilt_without(1);
    let proof = Request::Prove { debtor: life(1), resources: BTreeSet::new(), proof: Proof::LeaseOver };
    assert!(s.ask(life(2), &proof).is_err(), "the end of a lease is not enough for it");
    s.run();
    assert!(s.did().is_empty());
}

#[test]
fn a_better_node_takes_it_back_after_it_stopped_unless_that_is_not_wanted() {
    let ordered = ServiceConfig { domain: Some(domain(&[2, 1])), ..web() };
    let mut s = Scene::new(1, vec![ordered.clone()]);
    assert_eq!(s.did(), lines(1, START));
    s.joins(2);
    assert_eq!(s.did(), [lines(1, STOP), lines(2, START)].concat());
    let nofailback = Domain { nofailback: true, ..domain(&[2, 1]) };
    let mut s = Scene::new(1, vec![ServiceConfig { domain: Some(nofailback), ..ordered.clone() }]);
    s.did();
    s.joins(2);
    s.pass(MONITOR / 2);
    assert!(s.did().is_empty());
    // Unordered: one member of the domain is as good as another.
    let unordered = Domain { ordered: false, ..domain(&[2, 1]) };
    let mut s = Scene::new(1, vec![ServiceConfig { domain: Some(unordered), ..ordered }]);
    s.did();
    s.joins(2);
    assert!(s.did().is_empty());
}

#[test]
fn a_member_gets_services_as_soon_as_its_manager_speaks_and_not_before() {
    let mut s = Scene::new(1, vec![ServiceConfig { domain: Some(domain(&[2, 1])), ..web() }]);
    s.did();
    s.add_member(2);
    s.run();
    s.pass(MONITOR / 2);
    assert!(s.did().is_empty(), "it would be stopped, and started nowhere");
    s.manager_starts(2);
    assert_eq!(s.did(), [lines(1, STOP), lines(2, START)].concat(), "at once: it is told all it has to know");
    // One that has no manager is not waited for when an owner dies.
    s.add_member(3);
    s.run();
    s.dies(2);
    s.is_fenced(2);
    s.locks_are_rebuilt_without(2);
    assert_eq!(s.did(), lines(1, START));
}

#[test]
fn a_manager_that_starts_late_learns_what_was_ordered_before_it() {
    let mut s = Scene::new(1, vec![web()]);
    s.command(1, Command::Disable).unwrap();
    s.did();
    // What the others said when the node became a member found nobody there.
    s.add_member(2);
    s.run();
    s.manager_starts(2);
    assert_eq!(s.status().target, Target::Disabled);
    s.pass(Duration::from_secs(600));
    assert!(s.did().is_empty(), "nobody starts it but a person");
}

#[test]
fn outside_a_restricted_domain_it_does_not_run() {
    let restricted = Domain { restricted: true, ..domain(&[3]) };
    let mut s = Scene::new(2, vec![ServiceConfig { domain: Some(restricted), ..web() }]);
    assert!(s.did().is_empty());
    assert_eq!(s.status().state, StateName::Stopped(Idle::NoNode));
    assert_eq!(s.command(1, Command::Enable(Some(NodeId(1)))), Err(CommandError::NotThere(NodeId(1))));
    s.joins(3);
    assert_eq!(s.did(), lines(3, START));
    assert_eq!(s.command(1, Command::Relocate(None)), Err(CommandError::NoOther));
    s.dies(3);
    s.is_fenced(3);
    s.locks_are_rebuilt_without(3);
    assert!(s.did().is_empty());
}

#[test]
fn orders_of_a_person_are_taken_at_any_member() {
    let mut s = Scene::new(3, vec![web()]);
    s.did();
    s.command(3, Command::Relocate(None)).unwrap();
    assert_eq!(s.did(), [lines(1, STOP), lines(2, START)].concat());
    s.command(1, Command::Relocate(Some(NodeId(3)))).unwrap();
    assert_eq!(s.did(), [lines(2, STOP), lines(3, START)].concat());
    s.command(1, Command::Disable).unwrap();
    assert_eq!(s.did(), lines(3, STOP));
    assert_eq!(s.command(1, Command::Relocate(None)), Err(CommandError::Disabled));
    s.command(2, Command::Enable(Some(NodeId(2)))).unwrap();
    assert_eq!(s.did(), lines(2, START));
}

#[test]
fn without_quorum_nothing_is_started_and_no_order_taken() {
    let mut s = Scene::prepared(vec![web()]);
    s.add(1);
    s.inputs.pop_back();
    s.run();
    s.pass(MONITOR);
    assert!(s.did().is_empty() && s.owner("web").is_none());
    assert_eq!(s.command(1, Command::Enable(None)), Err(CommandError::NotQuorate));
    s.quorum(1, true);
    assert_eq!(s.did(), lines(1, START));
    // While it has no lease, nothing is decided on what a monitor says.
    s.up.remove(&(1, "a".into()));
    s.quorum(1, false);
    s.pass(MONITOR * 3);
    assert!(s.did().is_empty());
    s.quorum(1, true);
    s.pass(Duration::ZERO);
    assert_eq!(s.did(), [lines(1, "monitor a"), lines(1, STOP), lines(1, START)].concat());
}

#[test]
fn a_changed_service_is_stopped_as_it_was_started_and_a_removed_one_stops() {
    let mut s = Scene::new(2, vec![web()]);
    s.did();
    let changed = ServiceConfig { resources: vec![resource("c", vec![resource("d", vec![])])], ..web() };
    for node in [1, 2] {
        s.inputs.push_back((life(node), Input::Config(vec![changed.clone()])));
    }
    s.run();
    s.pass(RETRY_TIME);
    let new = "probe d, probe c, start c, monitor c, start d, monitor d";
    assert_eq!(s.did(), [lines(1, STOP), lines(1, new)].concat());
    for node in [1, 2] {
        s.inputs.push_back((life(node), Input::Config(vec![])));
    }
    s.run();
    assert_eq!(s.did(), lines(1, "stop d, stop c"));
    assert_eq!(s.owner("web"), None);
}

#[test]
fn a_node_that_leaves_stops_its_services_before_another_starts_them() {
    let mut s = Scene::new(2, vec![web()]);
    s.did();
    s.inputs.push_back((life(1), Input::Leave));
    s.run();
    let log = s.did();
    let mut rest = log.clone();
    rest.retain(|line| line != "1 left");
    assert_eq!(rest, [lines(1, STOP), lines(2, START)].concat());
    assert!(log.contains(&"1 left".to_owned()));
}
