//! A simulated cluster of managers: the real record and its rules, delayed views and messages, agents that fail and hang,
//! crashes, pauses longer than the lease, and a supervisor that ends what a dead or frozen node runs.

use quorate_failover::machine::{Attempt, Bug, Command, Input, Manager, Output, SYNC_TIME};
use quorate_failover::{
    Action, Agent, Domain, Event, Outcome, Recovery, ResourceConfig, ServiceConfig, StateName, Timeouts,
};
use quorate_membership::machine::decide;
use quorate_membership::sim::Schedule;
use quorate_membership::{
    Cause, ClusterId, Identity, Incarnation, Instant, NodeId, Proof, Request, RequestError, ResourceKind,
    Rng, Safety, View,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const LEASE: Duration = Duration::from_millis(700);
const DETECTION: Duration = Duration::from_millis(900);
const KILL_TIME: Duration = Duration::from_millis(500);

/// A resource that really runs on a machine.
pub(crate) type Real = (NodeId, String, usize);

/// An agent was asked to act.
pub(crate) struct Act {
    pub(crate) who: Identity,
    pub(crate) service: String,
    pub(crate) resource: usize,
    pub(crate) action: Action,
    /// Whether the node had a lease then.
    pub(crate) quorate: bool,
}

/// One process: a life of a node.
struct Process {
    me: Identity,
    manager: Manager,
    /// Views and messages wait here while it is paused.
    inbox: VecDeque<Input>,
    is_paused: bool,
    quorate: bool,
    tick: Option<Instant>,
}

#[derive(Clone, Debug)]
enum What {
    /// Delivered to a life, in the order it was sent.
    Deliver(Identity, Input),
    Tick(Identity),
    /// An agent ends.
    AgentEnds {
        who: Identity,
        attempt: Attempt,
        service: String,
        resource: usize,
        action: Action,
        fails: bool,
    },
    Crash(NodeId),
    Pause(NodeId),
    Resume(NodeId),
    /// A node loses its lease for less than the kill time, and works on without it.
    Freeze(NodeId),
    Thaw(Identity),
    /// The others noticed.
    Detect(Identity),
    /// The lease of a paused life ended.
    Lapse(Identity),
    /// The supervisor ends everything a life runs.
    Kill(Identity),
    /// The coordinator proves that a removed life is fenced.
    Fence(Identity),
    /// Its locks are rebuilt without it.
    Rebuilt(Identity),
    Boot(NodeId),
    /// A resource dies by itself.
    Die,
    Order,
    FaultsEnd,
}

/// The cluster and the truth about it.
pub(crate) struct World {
    pub(crate) rng: Rng,
    schedule: Schedule<What>,
    processes: BTreeMap<NodeId, Process>,
    view: Arc<View>,
    services: Vec<ServiceConfig>,
    /// What runs on which machine, whatever anybody believes.
    pub(crate) real: BTreeSet<Real>,
    /// Which life runs it.
    pub(crate) runner: BTreeMap<Real, Identity>,
    /// What each life has started and not stopped since, whether or not it died by itself.
    pub(crate) started: BTreeSet<(Identity, String, usize)>,
    /// Owner locks: held by, and who waits.
    pub(crate) locks: BTreeMap<String, VecDeque<Identity>>,
    /// Agents that were asked to act in this step.
    pub(crate) acts: Vec<Act>,
    pub(crate) starts: usize,
    pub(crate) failovers: usize,
    pub(crate) leftovers: usize,
    /// Last scheduled delivery to a life: keeps order.
    last: BTreeMap<Identity, Instant>,
    faults: bool,
    bug: Option<Bug>,
}

fn services(rng: &mut Rng) -> Vec<ServiceConfig> {
    let resource = |name: &str, children: Vec<ResourceConfig>| ResourceConfig {
        name: name.into(),
        agent: Agent::Ocf { provider: "sim".into(), kind: "sim".into() },
        params: BTreeMap::new(),
        timeouts: Timeouts::ordinary(),
        monitor_interval: Duration::from_millis(400),
        children,
    };
    (0..1 + rng.below(3))
        .map(|n| {
            let ordered = rng.chance_ppm(500_000);
            let domain = rng.chance_ppm(500_000).then(|| Domain {
                nodes: [(NodeId(1), 1), (NodeId(2), 2)].into(),
                ordered,
                restricted: false,
                nofailback: rng.chance_ppm(500_000),
            });
            let policies = [Recovery::Restart, Recovery::Relocate, Recovery::Disable];
            ServiceConfig {
                name: format!("s{n}"),
                resources: vec![resource("a", vec![resource("b", vec![])]), resource("c", vec![])],
                domain,
                recovery: *rng.pick(&policies).unwrap(),
                max_restarts: rng.below(3) as u32,
                restart_expire_time: Duration::from_secs(5),
                autostart: true,
                safety: Safety::Lease,
                servers: BTreeSet::new(),
            }
        })
        .collect()
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = Rng::new(seed);
        let services = services(&mut rng);
        let mut world = Self {
            schedule: Schedule::new(),
            processes: BTreeMap::new(),
            view: Arc::new(View::empty(ClusterId::from_bytes([1; 16]))),
            services,
            real: BTreeSet::new(),
            runner: BTreeMap::new(),
            started: BTreeSet::new(),
            locks: BTreeMap::new(),
            acts: Vec::new(),
            starts: 0,
            failovers: 0,
            leftovers: 0,
            last: BTreeMap::new(),
            faults: true,
            bug,
            rng,
        };
        let nodes = 2 + world.rng.below(3) as u32;
        for n in 1..=nodes {
            let at = Instant(0) + world.rng.duration(Duration::ZERO, Duration::from_secs(1));
            world.schedule.at(at, What::Boot(NodeId(n)));
        }
        let phase = Duration::from_secs(30);
        for _ in 0..world.rng.below(8) {
            let at = Instant(0) + world.rng.duration(Duration::from_secs(2), phase);
            let n = NodeId(1 + world.rng.below(u64::from(nodes)) as u32);
            let what = if world.rng.chance_ppm(500_000) { What::Crash(n) } else { What::Pause(n) };
            world.schedule.at(at, what);
        }
        for _ in 0..world.rng.below(6) {
            let at = Instant(0) + world.rng.duration(Duration::from_secs(2), phase);
            world.schedule.at(at, What::Die);
            let at = Instant(0) + world.rng.duration(Duration::from_secs(2), phase);
            world.schedule.at(at, What::Order);
        }
        for _ in 0..world.rng.below(6) {
            // The first while services start.
            let at = Instant(0) + world.rng.duration(Duration::from_millis(200), Duration::from_secs(3));
            let n = NodeId(1 + world.rng.below(u64::from(nodes)) as u32);
            world.schedule.at(at, What::Freeze(n));
            let at = Instant(0) + world.rng.duration(Duration::from_secs(3), phase);
            world.schedule.at(at, What::Freeze(n));
        }
        world.schedule.at(Instant(0) + phase, What::FaultsEnd);
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.schedule.now()
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    fn is_quorate(&self, who: Identity) -> bool {
        self.processes.get(&who.node).is_some_and(|p| p.me == who && p.quorate)
    }

    fn later(&mut self, low_ms: u64, high_ms: u64) -> Instant {
        let (low, high) = (Duration::from_millis(low_ms), Duration::from_millis(high_ms));
        self.now() + self.rng.duration(low, high)
    }

    /// Sends in order: never before what was sent earlier to the same life.
    fn send(&mut self, to: Identity, input: Input) {
        let at = self.later(1, 20).max(self.last.get(&to).copied().unwrap_or_default());
        self.last.insert(to, at);
        self.schedule.at(at, What::Deliver(to, input));
    }

    fn decided(&mut self, view: View) {
        let before = std::mem::replace(&mut self.view, Arc::new(view));
        for who in before.identities().filter(|who| !self.view.contains(*who)).collect::<Vec<_>>() {
            // The lease is over one lease after the removal at the latest, and the supervisor has its kill time.
            let at = self.now() + LEASE + KILL_TIME + Duration::from_millis(50);
            self.schedule.at(at, What::Fence(who));
        }
        for who in self.view.identities().collect::<Vec<_>>() {
            self.send(who, Input::View(Arc::clone(&self.view)));
        }
    }

    fn grant(&mut self) {
        let heads: Vec<(String, Identity)> =
            self.locks.iter().filter_map(|(s, q)| Some((s.clone(), *q.front()?))).collect();
        for (service, who) in heads {
            // Granted again and again: only the waiting manager listens.
            self.send(who, Input::Locked { service, held: true });
        }
    }

    fn ask(&mut self, by: Identity, request: &Request) -> Result<(), RequestError> {
        if !self.view.contains(by) {
            return Err(RequestError::NotMember(by));
        }
        match decide(&self.view, by, 0, request) {
            Ok(Some(view)) => {
                self.decided(view);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(refusal) => Err(RequestError::Refused(refusal)),
        }
    }

    fn feed(&mut self, who: Identity, input: Input) {
        let now = self.now();
        let Some(process) = self.processes.get_mut(&who.node).filter(|p| p.me == who) else { return };
        if process.is_paused {
            process.inbox.push_back(input);
            return;
        }
        let mut out = Vec::new();
        process.manager.handle(now, input, &mut out);
        self.carry_out(who, out);
    }

    fn carry_out(&mut self, who: Identity, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Propose { attempt, request } => {
                    let result = if self.faults && self.rng.chance_ppm(100_000) {
                        Err(RequestError::Unknown("lost".into()))
                    } else {
                        Ok(())
                    };
                    // Lost before or after it was decided.
                    if result.is_ok() || self.rng.chance_ppm(500_000) {
                        let decided = self.ask(who, &request);
                        let result = result.and(decided);
                        self.send(who, Input::Proposed { attempt, result });
                    } else {
                        self.send(who, Input::Proposed { attempt, result });
                    }
                }
                Output::Lock { service } => {
                    self.locks.entry(service).or_default().push_back(who);
                    self.grant();
                }
                Output::Unlock { service } => {
                    if let Some(queue) = self.locks.get_mut(&service) {
                        queue.retain(|w| *w != who);
                    }
                    self.send(who, Input::Unlocked { service });
                    self.grant();
                }
                Output::Run { attempt, service, resource, action, .. } => {
                    let quorate = self.is_quorate(who);
                    self.acts.push(Act { who, service: service.clone(), resource, action, quorate });
                    let fails = self.faults && self.rng.chance_ppm(40_000);
                    let at = self.later(5, 60);
                    self.schedule.at(at, What::AgentEnds { who, attempt, service, resource, action, fails });
                }
                Output::Send { to, bytes } => {
                    if self.view.contains(to) {
                        self.send(to, Input::Message { from: who, bytes });
                    }
                }
                Output::Event(event) => match event {
                    Event::Started { .. } => self.starts += 1,
                    Event::Leftover { .. } => self.leftovers += 1,
                    _ => {}
                },
                Output::Left => {}
            }
        }
        let Some(process) = self.processes.get_mut(&who.node).filter(|p| p.me == who) else { return };
        let due = process.manager.next_deadline();
        if due != process.tick {
            process.tick = due;
            if let Some(at) = due {
                self.schedule.at(at, What::Tick(who));
            }
        }
    }

    fn agent_ends(
        &mut self,
        who: Identity,
        service: String,
        resource: usize,
        action: Action,
        fails: bool,
    ) -> Outcome {
        let real = (who.node, service.clone(), resource);
        match action {
            Action::Start if fails => Outcome::code(1),
            Action::Start => {
                self.started.insert((who, service, resource));
                self.real.insert(real.clone());
                self.runner.insert(real, who);
                Outcome::code(0)
            }
            Action::Stop if fails => Outcome::code(1),
            Action::Stop => {
                self.started.remove(&(who, service, resource));
                self.real.remove(&real);
                Outcome::code(0)
            }
            Action::Monitor { .. } => Outcome::code(if self.real.contains(&real) { 0 } else { 7 }),
        }
    }

    /// One event; false at the end of time.
    pub(crate) fn step(&mut self, end: Instant) -> bool {
        self.acts.clear();
        if self.schedule.next_at().is_none_or(|at| end < at) {
            return false;
        }
        let Some((_, what)) = self.schedule.pop() else { return false };
        match what {
            // A node that froze on its way up is told when it thaws.
            What::Deliver(who, Input::Quorum(true)) if !self.is_quorate(who) => {}
            What::Deliver(who, input) => self.feed(who, input),
            What::Tick(who) => {
                if let Some(p) = self.processes.get_mut(&who.node).filter(|p| p.me == who) {
                    p.tick = None;
                }
                self.feed(who, Input::Tick);
            }
            What::AgentEnds { who, attempt, service, resource, action, fails } => {
                // Agents die with their node's process; a paused one's go on.
                if self.processes.get(&who.node).is_some_and(|p| p.me == who) {
                    let outcome = self.agent_ends(who, service, resource, action, fails);
                    self.feed(who, Input::Done { attempt, outcome });
                }
            }
            What::Boot(node) => self.boot(node),
            What::Crash(node) => {
                if let Some(me) = self.processes.get(&node).map(|p| p.me).filter(|_| self.faults) {
                    self.processes.remove(&node);
                    let (detect, kill) = (self.now() + DETECTION, self.now() + KILL_TIME);
                    self.schedule.at(detect, What::Detect(me));
                    self.schedule.at(kill, What::Kill(me));
                }
            }
            What::Pause(node) => self.pause(node),
            What::Resume(node) => self.resume(node),
            What::Freeze(node) => {
                let running = self.processes.get_mut(&node).filter(|p| !p.is_paused && p.quorate);
                if let Some(p) = running.filter(|_| self.faults) {
                    p.quorate = false;
                    let me = p.me;
                    let thaw = self.later(50, 400);
                    self.schedule.at(thaw, What::Thaw(me));
                    self.feed(me, Input::Quorum(false));
                }
            }
            What::Thaw(who) => {
                if let Some(p) = self.processes.get_mut(&who.node).filter(|p| p.me == who && !p.is_paused) {
                    p.quorate = true;
                    self.feed(who, Input::Quorum(true));
                }
            }
            What::Lapse(who) => {
                let alive = self.processes.get_mut(&who.node).filter(|p| p.me == who && p.is_paused);
                if let Some(p) = alive {
                    p.quorate = false;
                    let kill = self.now() + KILL_TIME;
                    self.schedule.at(kill, What::Kill(who));
                }
            }
            What::Kill(who) => {
                let back = self.processes.get(&who.node).is_some_and(|p| p.me == who && p.quorate);
                if !back {
                    self.processes.retain(|_, p| p.me != who);
                    self.real.retain(|(n, ..)| *n != who.node);
                    let boot = self.later(500, 3000);
                    self.schedule.at(boot, What::Boot(who.node));
                }
            }
            What::Detect(who) => {
                let silent = self.processes.get(&who.node).is_none_or(|p| p.me != who || p.is_paused);
                let other = self.view.identities().find(|w| *w != who);
                if let Some(by) = other.filter(|_| silent) {
                    let _ = self.ask(by, &Request::Evict { who, reason: "silent".into() });
                } else if silent && self.view.contains(who) {
                    // The last one: it comes back as a new life, which removes the old one.
                    let at = self.later(500, 1000);
                    self.schedule.at(at, What::Detect(who));
                }
            }
            What::Fence(who) => self.fence(who),
            What::Rebuilt(who) => {
                for queue in self.locks.values_mut() {
                    queue.retain(|w| *w != who);
                }
                self.grant();
            }
            What::Die => {
                let all: Vec<Real> = self.real.iter().cloned().collect();
                if let Some(real) = self.rng.pick(&all).cloned() {
                    self.real.remove(&real);
                }
            }
            What::Order => self.order(),
            What::FaultsEnd => self.heal(),
        }
        true
    }

    fn boot(&mut self, node: NodeId) {
        if self.processes.contains_key(&node) {
            return;
        }
        let life = self.view.lives.get(&node).map_or(1, |i| i.0 + 1);
        let me = Identity::new(node, Incarnation(life));
        let mut view = View::clone(&self.view);
        view.epoch = view.epoch.next();
        if let Some(old) = view.identity(node) {
            // A newer life shortens the detection of the old one (R1).
            let by = view.identities().find(|w| *w != old).unwrap_or(old);
            let evict = Request::Evict { who: old, reason: "a newer life".into() };
            if let Ok(Some(without)) = decide(&self.view, by, 0, &evict) {
                self.decided(without);
            }
            view = View::clone(&self.view);
            view.epoch = view.epoch.next();
        }
        view.members.insert(node, me.incarnation);
        view.lives.insert(node, me.incarnation);
        view.cause = Cause::Joined([me].into());
        let mut manager = Manager::new(me, self.services.clone()).unwrap();
        if let Some(bug) = self.bug {
            manager.set_bug(bug);
        }
        let process =
            Process { me, manager, inbox: VecDeque::new(), is_paused: false, quorate: true, tick: None };
        self.processes.insert(node, process);
        // Something of an earlier life may have escaped its supervisor; only the probe can find it.
        if self.faults && self.rng.chance_ppm(300_000) {
            let service = self.rng.pick(&self.services).map(|s| s.name.clone()).unwrap();
            if !self.real.iter().any(|(_, s, _)| *s == service) && self.attached(&service).is_none() {
                let real = (node, service, 2);
                self.real.insert(real.clone());
                self.runner.insert(real, Identity::new(node, Incarnation(0)));
            }
        }
        self.decided(view);
        self.send(me, Input::Quorum(true));
    }

    pub(crate) fn attached(&self, service: &str) -> Option<Identity> {
        let all = self.view.attachments.iter();
        let mut mine = all.filter(|a| a.resource.kind == ResourceKind::Service && a.resource.name == service);
        mine.next().map(|a| a.owner)
    }

    fn pause(&mut self, node: NodeId) {
        if !self.faults {
            return;
        }
        let Some(p) = self.processes.get_mut(&node).filter(|p| !p.is_paused) else { return };
        p.is_paused = true;
        let me = p.me;
        let now = self.now();
        self.schedule.at(now + LEASE, What::Lapse(me));
        self.schedule.at(now + DETECTION, What::Detect(me));
        let back = self.later(100, 3000);
        self.schedule.at(back, What::Resume(node));
    }

    fn resume(&mut self, node: NodeId) {
        let Some(p) = self.processes.get_mut(&node).filter(|p| p.is_paused) else { return };
        p.is_paused = false;
        let (me, lapsed) = (p.me, !p.quorate);
        let inbox = std::mem::take(&mut p.inbox);
        let member = self.view.contains(me);
        if lapsed {
            self.feed(me, Input::Quorum(false));
        }
        // What it is told of quorum on resuming is newer than what waits.
        for input in inbox.into_iter().filter(|i| !matches!(i, Input::Quorum(_))) {
            self.feed(me, input);
        }
        if member {
            // Acknowledgements return: it goes on.
            if let Some(p) = self.processes.get_mut(&node).filter(|p| p.me == me) {
                p.quorate = true;
            }
            self.feed(me, Input::Quorum(true));
        } else if let Some(p) = self.processes.get_mut(&node).filter(|p| p.me == me) {
            // Nothing is delivered any more; its supervisor ends it.
            p.quorate = false;
            let kill = self.now();
            self.schedule.at(kill, What::Kill(me));
        }
    }

    fn fence(&mut self, who: Identity) {
        let rebuilt = self.later(0, 300);
        if !self.view.debts.contains_key(&who) {
            return self.schedule.at(rebuilt, What::Rebuilt(who));
        }
        let Some(by) = self.view.identities().next() else {
            let at = self.later(200, 400);
            return self.schedule.at(at, What::Fence(who));
        };
        let proof = Request::Prove { debtor: who, resources: BTreeSet::new(), proof: Proof::LeaseOver };
        let _ = self.ask(by, &proof);
        self.schedule.at(rebuilt, What::Rebuilt(who));
        self.failovers += 1;
    }

    fn order(&mut self) {
        let who: Vec<Identity> = self.processes.values().filter(|p| !p.is_paused).map(|p| p.me).collect();
        let (Some(who), Some(service)) =
            (self.rng.pick(&who).copied(), self.rng.pick(&self.services).map(|s| s.name.clone()))
        else {
            return;
        };
        let commands = [Command::Relocate(None), Command::Disable, Command::Enable(None)];
        let command = self.rng.pick(&commands).cloned().unwrap();
        self.command(who, &service, command);
    }

    fn command(&mut self, who: Identity, service: &str, command: Command) {
        let now = self.now();
        let Some(p) = self.processes.get_mut(&who.node).filter(|p| p.me == who) else { return };
        let mut out = Vec::new();
        let _ = p.manager.command(now, service, command, &mut out);
        self.carry_out(who, out);
    }

    fn heal(&mut self) {
        self.faults = false;
        let paused: Vec<NodeId> =
            self.processes.iter().filter(|(_, p)| p.is_paused).map(|(n, _)| *n).collect();
        for node in paused {
            self.resume(node);
        }
    }

    /// Everything wanted is enabled again, and stops that had failed are tried once more.
    pub(crate) fn enable_all(&mut self) {
        // At any one member: the order reaches the owner wherever it is.
        let some = self.processes.values().map(|p| p.me).next_back();
        for service in self.services.iter().map(|s| s.name.clone()).collect::<Vec<_>>() {
            if let Some(who) = some {
                self.command(who, &service, Command::Disable);
            }
        }
    }

    pub(crate) fn start_all(&mut self) {
        let first = self.processes.values().map(|p| p.me).next();
        for service in self.services.iter().map(|s| s.name.clone()).collect::<Vec<_>>() {
            if let Some(who) = first {
                self.command(who, &service, Command::Enable(None));
            }
        }
    }

    /// After faults: every service runs, all of it, on its owner, and every member knows.
    pub(crate) fn check_healed(&self) {
        let debts: Vec<_> = self.view.debts.keys().map(ToString::to_string).collect();
        let members: Vec<_> = self.view.identities().map(|i| i.to_string()).collect();
        assert!(debts.is_empty(), "debts are left: {debts:?} of members {members:?}");
        for service in &self.services {
            let owner =
                self.attached(&service.name).unwrap_or_else(|| panic!("{} has no owner", service.name));
            for resource in 0..3 {
                let real = (owner.node, service.name.clone(), resource);
                assert!(
                    self.real.contains(&real),
                    "{real:?} does not run; {:?}",
                    self.statuses(&service.name)
                );
            }
            for (node, state) in self.statuses(&service.name) {
                assert_eq!(state, StateName::Running, "node {node} of {}", service.name);
            }
        }
    }

    fn statuses(&self, service: &str) -> Vec<(NodeId, StateName)> {
        let all = self.processes.values();
        all.flat_map(|p| p.manager.status().into_iter().map(|s| (p.me.node, s)))
            .filter(|(_, s)| s.service == service)
            .map(|(n, s)| (n, s.state))
            .collect()
    }

    /// Long enough for everything to settle.
    pub(crate) fn settle_time() -> Duration {
        SYNC_TIME + Duration::from_secs(10)
    }
}
