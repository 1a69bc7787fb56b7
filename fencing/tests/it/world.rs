//! A simulated cluster around the coordinators: views, quorum, leases, storage servers and power devices, with faults.

use core::time::Duration;
use quorate_fencing::machine::{Attempt, Coordinator, Input, Output};
use quorate_fencing::{
    Action, AgentError, Bug, FenceDevice, FencingConfig, FencingTiming, Method, Step, StorageFenceError,
};
use quorate_membership::sim::Schedule;
use quorate_membership::{
    Attachment, ClusterId, Debt, DebtItem, Epoch, Identity, Incarnation, Instant, NodeId, Proof, Refusal,
    Request, RequestError, ResourceId, ResourceKind, Rng, Safety, ServerEntry, ServerId, View,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The supervisors' kill time in the simulation.
pub(crate) const KILL_TIME: Duration = Duration::from_secs(1);

/// What the invariants look at.
#[derive(Debug)]
pub(crate) enum Event {
    /// Something happened that no invariant speaks of.
    Other,
    /// A coordinator starts an installation.
    Installs { node: NodeId },
    /// A coordinator starts a step of a method.
    Steps { node: NodeId, victim: Identity, action: Action },
    /// A coordinator proves.
    Proves { debtor: Identity, resources: BTreeSet<ResourceId>, proof: Proof },
}

#[derive(Debug)]
enum Happening {
    View(NodeId, usize),
    Tick(NodeId),
    InstallAtServer {
        node: NodeId,
        life: u64,
        attempt: Attempt,
        server: ServerId,
        epoch: Epoch,
    },
    Input(NodeId, u64, Box<Input>),
    StepAtDevice {
        node: NodeId,
        life: u64,
        attempt: Attempt,
        victim: Identity,
        device: String,
        action: Action,
    },
    ProposalArrives {
        node: NodeId,
        life: u64,
        attempt: Attempt,
        request: Request,
    },
    Fail(NodeId),
    Remove(Identity),
    Rejoin(NodeId),
    Quorum(NodeId, bool),
    Heal,
    Person,
}

/// One node.
pub(crate) struct Node {
    coordinator: Option<Coordinator>,
    pub(crate) life: u64,
    /// Index of the view it has installed.
    pub(crate) installed: usize,
    pub(crate) quorate: bool,
}

/// One storage server.
pub(crate) struct Server {
    pub(crate) epoch: Epoch,
    reachable: bool,
    stuck: bool,
}

/// The whole simulation.
pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) views: Vec<Arc<View>>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) servers: BTreeMap<ServerId, Server>,
    /// The real end of each removed life's lease.
    pub(crate) lease_end: BTreeMap<Identity, Instant>,
    /// Lives whose machine really was off after they were removed.
    pub(crate) was_off: BTreeSet<Identity>,
    /// (coordinator, its life, victim): it was told that the last "off" succeeded.
    pub(crate) seen_off: BTreeSet<(NodeId, u64, Identity)>,
    pub(crate) steps_done: u64,
    pub(crate) proofs: u64,
    pub(crate) installs: u64,
    feeds: BTreeMap<(NodeId, String), bool>,
    offs: BTreeMap<Attempt, (Identity, bool)>,
    config: FencingConfig,
    schedule: Schedule<Happening>,
    rng: Rng,
    faults: bool,
    trouble_ppm: u32,
    bug: Option<Bug>,
    ticks: BTreeMap<NodeId, Instant>,
    trace: u64,
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = Rng::new(seed);
        let nodes = 3 + rng.below(3) as u32;
        let servers = rng.below(3) as u8 + 1;
        let trouble_ppm = *rng.pick(&[0, 20_000, 200_000, 400_000]).unwrap_or(&0);
        let config = config(&mut rng, nodes);
        let mut world = Self {
            now: Instant(0),
            views: Vec::new(),
            nodes: BTreeMap::new(),
            servers: BTreeMap::new(),
            lease_end: BTreeMap::new(),
            was_off: BTreeSet::new(),
            seen_off: BTreeSet::new(),
            steps_done: 0,
            proofs: 0,
            installs: 0,
            feeds: BTreeMap::new(),
            offs: BTreeMap::new(),
            config,
            schedule: Schedule::new(),
            rng,
            faults: true,
            trouble_ppm,
            bug,
            ticks: BTreeMap::new(),
            trace: seed,
        };
        let ids: Vec<ServerId> = (1..=servers).map(|i| ServerId::from_bytes([i; 16])).collect();
        for id in &ids {
            world.servers.insert(*id, Server { epoch: Epoch(0), reachable: true, stuck: false });
        }
        world.views.push(Arc::new(first_view(nodes, &ids)));
        for node in (1..=nodes).map(NodeId) {
            world.start(node);
            world.attach(node);
        }
        let failures = 1 + world.rng.below(4);
        for _ in 0..failures {
            let node = NodeId(1 + world.rng.below(u64::from(nodes)) as u32);
            let at = world.soon(0, 20_000);
            world.schedule.at(at, Happening::Fail(node));
        }
        for _ in 0..world.rng.below(6) {
            let node = NodeId(1 + world.rng.below(u64::from(nodes)) as u32);
            let at = world.soon(0, 20_000);
            world.schedule.at(at, Happening::Quorum(node, false));
            let back = at + world.rng.duration(Duration::from_millis(10), Duration::from_secs(5));
            world.schedule.at(back, Happening::Quorum(node, true));
        }
        world.schedule.at(Instant(30_000_000_000), Happening::Heal);
        world.schedule.at(Instant(60_000_000_000), Happening::Person);
        world
    }

    pub(crate) fn newest(&self) -> &Arc<View> {
        self.views.last().expect("there is a first view")
    }

    /// A number that two runs of one seed must agree on.
    pub(crate) fn trace(&self) -> u64 {
        self.trace
    }

    fn soon(&mut self, from_ms: u64, to_ms: u64) -> Instant {
        self.now + self.rng.duration(Duration::from_millis(from_ms), Duration::from_millis(to_ms))
    }

    fn trouble(&mut self) -> bool {
        self.faults && self.rng.chance_ppm(self.trouble_ppm)
    }

    fn start(&mut self, node: NodeId) {
        let life = self.nodes.get(&node).map_or(1, |n| n.life + 1);
        let me = Identity::new(node, Incarnation(life));
        let mut coordinator = Coordinator::new(me, self.config.clone()).expect("the configuration is right");
        if let Some(bug) = self.bug {
            coordinator.plant(bug);
        }
        let installed = self.views.len() - 1;
        let state = Node { coordinator: Some(coordinator), life, installed, quorate: false };
        self.nodes.insert(node, state);
        // A machine without any power does not start: a person turns it on. One with some power starts as it is.
        let devices = self.feeds_of(node);
        if !devices.iter().any(|d| self.feeds.get(&(node, d.clone())).copied().unwrap_or(false)) {
            for device in devices {
                self.feeds.insert((node, device), true);
            }
        }
        self.schedule.at(self.now, Happening::View(node, installed));
        self.schedule.at(self.now, Happening::Quorum(node, true));
    }

    /// Gives a member some attachments.
    fn attach(&mut self, node: NodeId) {
        let mut view = View::clone(self.newest());
        let Some(owner) = view.identity(node) else { return };
        let servers: Vec<ServerId> = self.servers.keys().copied().collect();
        let some: BTreeSet<ServerId> = servers.into_iter().filter(|_| self.rng.chance_ppm(700_000)).collect();
        let all = [
            (ResourceKind::BlockDevice, Safety::Storage),
            (ResourceKind::Lockspace, Safety::Lease),
            (ResourceKind::Service, Safety::Lease),
            (ResourceKind::Service, Safety::Power),
        ];
        for (i, (kind, safety)) in all.into_iter().enumerate() {
            if self.rng.chance_ppm(600_000) {
                view.attachments.insert(Attachment {
                    owner,
                    resource: ResourceId::new(kind, format!("r{i}")),
                    safety,
                    servers: if safety == Safety::Storage { some.clone() } else { BTreeSet::new() },
                    journal: None,
                    lockspace: None,
                    exclusive: false,
                });
            }
        }
        self.decide(view);
    }

    fn decide(&mut self, mut view: View) {
        view.epoch = self.newest().epoch.next();
        self.views.push(Arc::new(view));
        let index = self.views.len() - 1;
        let members: Vec<NodeId> = self.newest().members.keys().copied().collect();
        for node in members {
            let at = if self.trouble() { self.soon(0, 1_000) } else { self.soon(0, 3) };
            self.schedule.at(at, Happening::View(node, index));
        }
    }

    /// Does the next thing; `None` at the end.
    pub(crate) fn step(&mut self) -> Option<Result<(), String>> {
        let (now, happening) = self.schedule.pop()?;
        self.now = now;
        self.trace = (self.trace ^ now.0).wrapping_mul(0x0100_0000_01B3);
        Some(self.happen(happening))
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::View(node, index) => {
                let mut at = self.nodes[&node].installed;
                while at <= index {
                    self.nodes.get_mut(&node).expect("known").installed = at;
                    let view = Arc::clone(&self.views[at]);
                    self.feed(node, Input::View(view))?;
                    at += 1;
                }
                Ok(())
            }
            Happening::Tick(node) => {
                self.ticks.remove(&node);
                self.feed(node, Input::Tick)
            }
            Happening::Quorum(node, quorate) => {
                // A dead node stays without quorum.
                let quorate = quorate && self.nodes[&node].coordinator.is_some();
                self.nodes.get_mut(&node).expect("known").quorate = quorate;
                self.feed(node, Input::Quorum(quorate))
            }
            Happening::Input(node, life, input) => {
                if self.nodes[&node].life != life {
                    return Ok(());
                }
                if let Input::Stepped { attempt, result } = &*input
                    && let Some((victim, true)) = self.offs.get(attempt)
                    && result.is_ok()
                {
                    self.seen_off.insert((node, life, *victim));
                }
                self.feed(node, *input)
            }
            Happening::InstallAtServer { node, life, attempt, server, epoch } => {
                let state = self.servers.get_mut(&server).expect("known");
                let result = if !state.reachable {
                    let (address, detail) = ("x".to_owned(), "unreachable".to_owned());
                    Err(StorageFenceError::Unreachable { address, detail })
                } else if state.stuck {
                    Err(StorageFenceError::Undrained { connections: 1 })
                } else {
                    state.epoch = state.epoch.max(epoch);
                    Ok(state.epoch)
                };
                self.installs += 1;
                self.answer(node, life, Input::Installed { attempt, result });
                Ok(())
            }
            Happening::StepAtDevice { node, life, attempt, victim, device, action } => {
                // Agents die with their node: its supervisor kills them.
                if self.nodes[&node].life != life || self.nodes[&node].coordinator.is_none() {
                    return Ok(());
                }
                self.step_at_device(node, life, attempt, victim, device, action);
                Ok(())
            }
            Happening::ProposalArrives { node, life, attempt, request } => {
                let result = self.propose(node, &request);
                self.answer(node, life, Input::Proposed { attempt, result });
                Ok(())
            }
            Happening::Fail(node) => {
                self.fail(node);
                Ok(())
            }
            Happening::Remove(who) => {
                self.remove(who);
                Ok(())
            }
            Happening::Rejoin(node) => self.rejoin(node),
            Happening::Heal => {
                self.faults = false;
                for server in self.servers.values_mut() {
                    server.reachable = true;
                    server.stuck = false;
                }
                let alive: Vec<NodeId> =
                    self.nodes.iter().filter(|(_, n)| n.coordinator.is_some()).map(|(n, _)| *n).collect();
                for node in alive {
                    self.schedule.at(self.now, Happening::Quorum(node, true));
                }
                Ok(())
            }
            Happening::Person => {
                // What only a person can say, one says: on the highest member, to show that any will do.
                let view = Arc::clone(self.newest());
                let needs = |who: &Identity, debt: &Debt| {
                    let unreachable =
                        view.members.contains_key(&who.node) || !self.config.methods.contains_key(&who.node);
                    unreachable && debt.items.values().any(|i| i.attachment.safety == Safety::Power)
                };
                let owing: BTreeSet<NodeId> =
                    view.debts.iter().filter(|(w, d)| needs(w, d)).map(|(w, _)| w.node).collect();
                let Some(node) = self.newest().members.keys().next_back().copied() else { return Ok(()) };
                for victim in owing {
                    self.feed(node, Input::Confirm { question: 1, node: victim, by: "root".to_owned() })?;
                }
                Ok(())
            }
        }
    }

    fn answer(&mut self, node: NodeId, life: u64, input: Input) {
        let at = if self.trouble() { self.soon(0, 3_000) } else { self.soon(0, 2) };
        self.schedule.at(at, Happening::Input(node, life, Box::new(input)));
    }

    fn feed(&mut self, node: NodeId, input: Input) -> Result<(), String> {
        let state = self.nodes.get_mut(&node).expect("known");
        let Some(coordinator) = &mut state.coordinator else { return Ok(()) };
        let mut out = Vec::new();
        coordinator.handle(self.now, input, &mut out).map_err(|e| e.to_string())?;
        let deadline = coordinator.next_deadline();
        self.steps_done += 1;
        if let Some(at) = deadline
            && self.ticks.get(&node).is_none_or(|t| at < *t)
        {
            self.ticks.insert(node, at);
            self.schedule.at(at, Happening::Tick(node));
        }
        for output in out {
            let event = self.carry_out(node, output);
            crate::invariants::check(self, &event)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, node: NodeId, output: Output) -> Event {
        let life = self.nodes[&node].life;
        match output {
            Output::AskLease(who) => {
                let hidden = self.trouble();
                let slack = self.rng.duration(Duration::ZERO, Duration::from_millis(50));
                let over_at = if hidden { None } else { self.lease_end.get(&who).map(|at| *at + slack) };
                self.answer(node, life, Input::Lease { who, over_at });
                Event::Other
            }
            Output::Install { attempt, server, .. } => {
                let epoch = self.views[self.nodes[&node].installed].epoch;
                let at = if self.trouble() { self.soon(0, 2_000) } else { self.soon(0, 3) };
                self.schedule.at(at, Happening::InstallAtServer { node, life, attempt, server, epoch });
                Event::Installs { node }
            }
            Output::Step { attempt, victim, step, .. } => {
                let methods = &self.config.methods[&victim.node];
                let last = methods
                    .iter()
                    .find(|m| m.steps.contains(&step))
                    .and_then(|m| m.steps.get(m.off_steps() - 1).cloned());
                self.offs.insert(attempt, (victim, last.as_ref() == Some(&step)));
                let at = self.soon(1, 500);
                let (device, action) = (step.device, step.action);
                self.schedule.at(at, Happening::StepAtDevice { node, life, attempt, victim, device, action });
                Event::Steps { node, victim, action }
            }
            Output::Propose { attempt, request } => {
                let at = self.soon(0, 5);
                let event = match &request {
                    Request::Prove { debtor, resources, proof } => {
                        Event::Proves { debtor: *debtor, resources: resources.clone(), proof: proof.clone() }
                    }
                    _ => Event::Other,
                };
                self.schedule.at(at, Happening::ProposalArrives { node, life, attempt, request });
                event
            }
            Output::Record(_) | Output::Confirmed { .. } => Event::Other,
        }
    }

    fn step_at_device(
        &mut self,
        node: NodeId,
        life: u64,
        attempt: Attempt,
        victim: Identity,
        device: String,
        action: Action,
    ) {
        let fails = self.trouble();
        let is_done = !fails || self.rng.chance_ppm(500_000);
        if is_done {
            let on = match action {
                Action::Off => false,
                Action::On => true,
                Action::Reboot => {
                    self.note_off(victim.node);
                    true
                }
            };
            self.feeds.insert((victim.node, device), on);
            let feeds: Vec<bool> =
                self.feeds_of(victim.node).iter().map(|d| self.feeds[&(victim.node, d.clone())]).collect();
            if feeds.iter().all(|on| !on) {
                self.note_off(victim.node);
            }
        }
        let agent = "sim".to_owned();
        let result = if fails {
            Err(AgentError::Failed { agent, action, detail: "exit code 1".to_owned() })
        } else {
            Ok(())
        };
        self.answer(node, life, Input::Stepped { attempt, result });
    }

    /// All lives of a machine that failed before now were off now.
    fn note_off(&mut self, node: NodeId) {
        let lives: Vec<Identity> = self.lease_end.keys().copied().filter(|w| w.node == node).collect();
        let view = Arc::clone(self.newest());
        self.was_off.extend(lives.into_iter().filter(|w| !view.contains(*w)));
    }

    /// The power supplies of a node: those that its first method turns off.
    fn feeds_of(&self, node: NodeId) -> Vec<String> {
        let methods = self.config.methods.get(&node);
        let method = methods.and_then(|m| m.first());
        method
            .map_or_else(Vec::new, |m| m.steps.iter().take(m.off_steps()).map(|s| s.device.clone()).collect())
    }

    fn propose(&mut self, node: NodeId, request: &Request) -> Result<(), RequestError> {
        if !self.nodes[&node].quorate {
            return Err(RequestError::NotQuorate { have: 1, all: 3 });
        }
        if self.trouble() {
            return Err(RequestError::Unknown("lost".to_owned()));
        }
        let Request::Prove { debtor, resources, .. } = request else { return Ok(()) };
        let mut view = View::clone(self.newest());
        let Some(debt) = view.debts.get_mut(debtor) else {
            return Err(RequestError::Refused(Refusal::NoDebt(*debtor)));
        };
        let mut changed = false;
        for resource in resources {
            changed |= debt.items.remove(resource).is_some();
        }
        if debt.items.is_empty() {
            view.debts.remove(debtor);
        }
        if changed {
            self.proofs += 1;
            self.decide(view);
        }
        Ok(())
    }

    fn fail(&mut self, node: NodeId) {
        if !self.faults || self.newest().members.len() < 2 || self.nodes[&node].coordinator.is_none() {
            return;
        }
        let Some(who) = self.newest().identity(node) else { return };
        let lease = *self.rng.pick(&[0, 0, 300, 2_000]).unwrap_or(&0);
        self.lease_end.insert(who, self.now + Duration::from_millis(lease));
        let state = self.nodes.get_mut(&node).expect("known");
        state.coordinator = None;
        state.quorate = false;
        if self.rng.chance_ppm(300_000) {
            let stuck = self.rng.chance_ppm(500_000);
            if let Some(server) = self.servers.values_mut().next() {
                server.stuck = stuck;
                server.reachable = stuck;
            }
        }
        let at = self.soon(100, 1_000);
        self.schedule.at(at, Happening::Remove(who));
    }

    fn remove(&mut self, who: Identity) {
        let mut view = View::clone(self.newest());
        if !view.contains(who) {
            return;
        }
        view.members.remove(&who.node);
        let (gone, kept): (BTreeSet<_>, BTreeSet<_>) =
            view.attachments.into_iter().partition(|a| a.owner == who);
        view.attachments = kept;
        let items: BTreeMap<_, _> = gone
            .into_iter()
            .map(|a| {
                (
                    a.resource.clone(),
                    DebtItem { attachment: a, fenced: false, rebuilt: false, rebuilt_by: BTreeMap::new() },
                )
            })
            .collect();
        if !items.is_empty() {
            view.debts.insert(who, Debt { removed: view.epoch.next(), items });
        }
        self.decide(view);
        let at = self.soon(500, 20_000);
        self.schedule.at(at, Happening::Rejoin(who.node));
    }

    fn rejoin(&mut self, node: NodeId) -> Result<(), String> {
        self.start(node);
        let mut view = View::clone(self.newest());
        view.members.insert(node, Incarnation(self.nodes[&node].life));
        self.decide(view);
        self.attach(node);
        Ok(())
    }
}

fn first_view(nodes: u32, servers: &[ServerId]) -> View {
    let entry = |id: &ServerId| (*id, ServerEntry { name: "s".to_owned(), address: "x".to_owned() });
    View {
        epoch: Epoch(1),
        members: (1..=nodes).map(|n| (NodeId(n), Incarnation(1))).collect(),
        servers: servers.iter().map(entry).collect(),
        ..View::empty(ClusterId::from_bytes([1; 16]))
    }
}

fn config(rng: &mut Rng, nodes: u32) -> FencingConfig {
    let mut config = FencingConfig::new(FencingTiming { kill_time: KILL_TIME, ..FencingTiming::lan() });
    for name in ["a", "b"] {
        let timeout = Duration::from_secs(60);
        let device = FenceDevice { agent: "sim".to_owned(), options: BTreeMap::new(), timeout };
        config.devices.insert(name.to_owned(), device);
    }
    let step = |device: &str, action| Step { device: device.to_owned(), action, options: BTreeMap::new() };
    for node in (1..=nodes).map(NodeId) {
        let steps = match rng.below(4) {
            0 => continue,
            1 => vec![step("a", Action::Off)],
            2 => vec![step("a", Action::Reboot)],
            _ => vec![
                step("a", Action::Off),
                step("b", Action::Off),
                step("a", Action::On),
                step("b", Action::On),
            ],
        };
        config.methods.insert(node, vec![Method { name: "power".to_owned(), steps }]);
    }
    config
}
