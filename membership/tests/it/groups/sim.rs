//! The simulation: nodes with the production machine on sessions as R2 promises them, decided views that arrive at
//! different times, partitions, crashes of nodes and of processes.

use super::invariants::membership_order::MembershipOrder;
use super::invariants::no_creation::NoCreation;
use super::invariants::self_delivery::SelfDelivery;
use super::invariants::total_order::TotalOrder;
use super::invariants::virtual_synchrony::VirtualSynchrony;
use core::time::Duration;
use quorate_membership::group::{Bug, Event, GroupMachine, GroupMessage, Output, ProcessId, Reason};
use quorate_membership::sim::Schedule;
use quorate_membership::{ClusterId, Epoch, Identity, Incarnation, Instant, NodeId, Rng, View};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

const PHASE_ONE: Instant = Instant(8_000_000_000);
const GROUPS: [&str; 3] = ["alpha", "beta", "gamma"];

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) sent: u64,
    pub(crate) delivered: u64,
    pub(crate) dropped: u64,
    pub(crate) configurations: u64,
    pub(crate) crashes: u64,
    pub(crate) removed: u64,
    pub(crate) full: u64,
}

impl Work {
    pub(crate) fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.delivered += other.delivered;
        self.dropped += other.dropped;
        self.configurations += other.configurations;
        self.crashes += other.crashes;
        self.removed += other.removed;
        self.full += other.full;
    }
}

enum Ev {
    Act,
    Decide,
    Cut,
    Heal { pair: (NodeId, NodeId) },
    Install { who: Identity },
    Arrive { from: Identity, to: Identity },
}

/// What is under way of a session, with the record that its sender had installed.
type Wire = VecDeque<(Epoch, Vec<u8>)>;

struct Process {
    group: String,
    members: Vec<ProcessId>,
}

struct Node {
    machine: GroupMachine,
    view: Arc<View>,
    installed: usize,
    processes: BTreeMap<u64, Process>,
}

struct World {
    rng: Rng,
    schedule: Schedule<Ev>,
    nodes: BTreeMap<Identity, Node>,
    views: Vec<Arc<View>>,
    wires: BTreeMap<(Identity, Identity), Wire>,
    last_at: BTreeMap<(Identity, Identity), Instant>,
    cut: BTreeSet<(NodeId, NodeId)>,
    delay_max: Duration,
    faults: bool,
    count: u32,
    bug: Option<Bug>,
    total: TotalOrder,
    synchrony: VirtualSynchrony,
    own: SelfDelivery,
    creation: NoCreation,
    membership: MembershipOrder,
    work: Work,
}

pub(crate) fn run(seed: u64, bug: Option<Bug>) -> Work {
    let mut rng = Rng::new(seed);
    let delay_max = Duration::from_micros(*rng.pick(&[300, 5_000, 100_000, 700_000]).unwrap());
    let count = 2 + rng.below(4) as u32;
    let mut world = World {
        rng,
        schedule: Schedule::new(),
        nodes: BTreeMap::new(),
        views: Vec::new(),
        wires: BTreeMap::new(),
        last_at: BTreeMap::new(),
        cut: BTreeSet::new(),
        delay_max,
        faults: true,
        count,
        bug,
        total: TotalOrder::default(),
        synchrony: VirtualSynchrony::default(),
        own: SelfDelivery::default(),
        creation: NoCreation::default(),
        membership: MembershipOrder::default(),
        work: Work::default(),
    };
    world.begin();
    world.steps(PHASE_ONE);
    world.heal();
    world.work.dropped = world.own.dropped;
    world.work
}

impl World {
    fn begin(&mut self) {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        view.epoch = Epoch(1);
        view.members = (1..=self.count).map(|n| (NodeId(n), Incarnation(1))).collect();
        view.lives = view.members.clone();
        let view = Arc::new(view);
        self.views.push(view.clone());
        view.identities().collect::<Vec<_>>().into_iter().for_each(|who| self.start(who));
        for event in [Ev::Act, Ev::Decide, Ev::Cut] {
            self.schedule.at(Instant(0), event);
        }
    }

    fn start(&mut self, who: Identity) {
        let mut machine = GroupMachine::new(who);
        if let Some(bug) = self.bug {
            machine.plant(bug);
        }
        // A newcomer begins with the record that lets it in.
        let installed = self.views.iter().position(|v| v.contains(who)).unwrap_or(self.views.len());
        let view = Arc::new(View::empty(ClusterId::from_bytes([1; 16])));
        let node = Node { machine, view, installed, processes: BTreeMap::new() };
        self.nodes.insert(who, node);
        let at = self.later();
        self.schedule.at(at, Ev::Install { who });
    }

    fn later(&mut self) -> Instant {
        self.schedule.now() + self.rng.duration(Duration::from_micros(20), self.delay_max)
    }

    fn steps(&mut self, until: Instant) {
        while self.schedule.next_at().is_some_and(|at| at < until) {
            let Some((_, event)) = self.schedule.pop() else { return };
            self.step(event);
        }
    }

    fn again(&mut self, ms_max: u64, event: Ev) {
        let at =
            self.schedule.now() + self.rng.duration(Duration::from_micros(10), Duration::from_millis(ms_max));
        self.schedule.at(at, event);
    }

    fn step(&mut self, event: Ev) {
        match event {
            Ev::Act | Ev::Decide | Ev::Cut if !self.faults => {}
            Ev::Act => {
                self.act();
                self.again(8, Ev::Act);
            }
            Ev::Decide => {
                self.decide();
                self.again(2_500, Ev::Decide);
            }
            Ev::Cut => {
                self.cut_pair();
                self.again(2_000, Ev::Cut);
            }
            Ev::Heal { pair } => {
                self.cut.remove(&pair);
                self.flow(|from, to| (from.node.min(to.node), from.node.max(to.node)) == pair);
            }
            Ev::Install { who } => self.install(who),
            Ev::Arrive { from, to } => self.arrive(from, to),
        }
    }

    /// What waits on these sessions arrives once more.
    fn flow(&mut self, of: impl Fn(Identity, Identity) -> bool) {
        let pairs: Vec<_> = self.wires.iter().map(|((f, t), q)| (*f, *t, q.len())).collect();
        for (from, to, count) in pairs.into_iter().filter(|(f, t, _)| of(*f, *t)) {
            (0..count).for_each(|_| self.plan(from, to));
        }
    }

    fn plan(&mut self, from: Identity, to: Identity) {
        let last = self.last_at.get(&(from, to)).copied().unwrap_or(Instant(0));
        let at = self.later().max(last);
        self.last_at.insert((from, to), at);
        self.schedule.at(at, Ev::Arrive { from, to });
    }

    fn act(&mut self) {
        let all: Vec<Identity> = self.nodes.keys().copied().collect();
        let Some(who) = self.rng.pick(&all).copied() else { return };
        let Some(node) = self.nodes.get_mut(&who) else { return };
        let mut out = Vec::new();
        let here: Vec<u64> = node.processes.keys().copied().collect();
        let process = self.rng.pick(&here).copied();
        match (self.rng.below(60), process) {
            (0..3, _) | (_, None) => {
                let group = self.rng.pick(&GROUPS).copied().unwrap_or("alpha");
                if here.len() < 3
                    && let Ok(number) = node.machine.join(group, &mut out)
                {
                    let process = Process { group: group.to_owned(), members: Vec::new() };
                    node.processes.insert(number, process);
                }
            }
            (3, Some(process)) => node.machine.leave(process, Reason::Left, &mut out),
            (4, Some(process)) => {
                // It dies: nobody listens to its events any more.
                self.work.crashes += 1;
                node.processes.remove(&process);
                node.machine.leave(process, Reason::Crashed, &mut out);
            }
            (_, Some(process)) => {
                let group = node.processes[&process].group.clone();
                let epoch = node.machine.view();
                for _ in 0..1 + self.rng.below(5) {
                    let payload = self.rng.next_u64().to_le_bytes().to_vec();
                    let node = self.nodes.get_mut(&who).unwrap();
                    let mut out = Vec::new();
                    let from = ProcessId { node: who, number: process };
                    // What is delivered at once comes before the number is known.
                    match node.machine.multicast(process, payload.clone(), &mut out) {
                        Ok(number) => {
                            self.work.sent += 1;
                            self.own.on_sent(from, number);
                            self.creation.on_sent(&group, from, number, &payload, epoch);
                        }
                        Err(error) => {
                            self.work.full += u64::from(error == quorate_membership::group::GroupError::Full);
                        }
                    }
                    self.carry_out(who, out);
                }
            }
        }
        self.carry_out(who, out);
    }

    fn cut_pair(&mut self) {
        let (a, b) = (1 + self.rng.below(u64::from(self.count)), 1 + self.rng.below(u64::from(self.count)));
        let pair = (NodeId(a.min(b) as u32), NodeId(a.max(b) as u32));
        if a != b && self.cut.insert(pair) {
            let at = self.schedule.now()
                + self.rng.duration(Duration::from_millis(20), Duration::from_millis(3_000));
            self.schedule.at(at, Ev::Heal { pair });
        }
    }

    /// The next record: nothing of the members, a removal (the node may run on unaware), or a new life.
    fn decide(&mut self) {
        let mut view = View::clone(self.views.last().unwrap());
        view.epoch = view.epoch.next();
        let node = NodeId(1 + self.rng.below(u64::from(self.count)) as u32);
        let mut starts = None;
        match (view.members.get(&node).copied(), self.rng.below(3)) {
            (Some(life), 0) if 1 < view.members.len() => {
                view.members.remove(&node);
                self.work.removed += 1;
                if self.rng.chance_ppm(600_000) {
                    self.nodes.remove(&Identity::new(node, life));
                }
            }
            (None, 0 | 1) => {
                let newest = self.views.iter().filter_map(|v| v.members.get(&node)).max().map_or(0, |i| i.0);
                self.nodes.retain(|i, _| i.node != node);
                view.members.insert(node, Incarnation(newest + 1));
                view.lives.insert(node, Incarnation(newest + 1));
                starts = Some(Identity::new(node, Incarnation(newest + 1)));
            }
            _ => {}
        }
        self.views.push(Arc::new(view));
        if let Some(who) = starts {
            self.start(who);
        }
        for who in self.nodes.keys().copied().collect::<Vec<_>>() {
            let at = self.later();
            self.schedule.at(at, Ev::Install { who });
        }
    }

    fn install(&mut self, who: Identity) {
        let Some(node) = self.nodes.get_mut(&who) else { return };
        let Some(view) = self.views.get(node.installed).cloned() else { return };
        if !view.contains(who) {
            // Removed, and does not learn it here.
            return;
        }
        node.installed += 1;
        node.view = view.clone();
        let mut out = Vec::new();
        node.machine.on_view(&view, &mut out);
        self.carry_out(who, out);
        self.flow(|_, to| to == who);
        if self.nodes[&who].installed < self.views.len() {
            let at = self.later();
            self.schedule.at(at, Ev::Install { who });
        }
    }

    /// R2: in order, held back until the sender's record is installed, dropped once the sender is removed.
    fn arrive(&mut self, from: Identity, to: Identity) {
        let pair = (from.node.min(to.node), from.node.max(to.node));
        let Some(node) = self.nodes.get_mut(&to) else { return };
        let Some(wire) = self.wires.get_mut(&(from, to)) else { return };
        if self.cut.contains(&pair) || wire.front().is_none_or(|(epoch, _)| node.view.epoch < *epoch) {
            return;
        }
        let Some((_, bytes)) = wire.pop_front() else { return };
        if !node.view.contains(from) {
            return;
        }
        let message = GroupMessage::decode(&bytes).expect("what is encoded decodes");
        let mut out = Vec::new();
        node.machine.on_message(from, message, &mut out);
        assert_eq!(node.machine.gaps(), 0, "a gap: {to} lacks what came before a message of {from}");
        self.carry_out(to, out);
    }

    fn carry_out(&mut self, who: Identity, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Send { to, message } => {
                    let Some(node) = self.nodes.get(&who).filter(|n| n.view.contains(to)) else { continue };
                    let bytes = message.encode();
                    self.wires.entry((who, to)).or_default().push_back((node.view.epoch, bytes));
                    self.plan(who, to);
                }
                Output::Event { process, event } => self.on_event(who, process, event),
            }
        }
    }

    fn on_event(&mut self, who: Identity, process: u64, event: Event) {
        let id = ProcessId { node: who, number: process };
        let Some(local) = self.nodes.get_mut(&who).and_then(|n| n.processes.get_mut(&process)) else {
            return;
        };
        let group = local.group.clone();
        match &event {
            Event::Configuration { at, members, .. } => {
                local.members = members.clone();
                self.work.configurations += 1;
                self.membership.on_configuration(&group, id, *at, &event);
                self.total.on_place(id, *at);
                self.synchrony.on_configuration(&group, id, *at);
            }
            Event::Message { at, from, number, payload } => {
                self.work.delivered += 1;
                self.creation.on_message((&group, id), *at, (*from, *number), payload);
                self.total.on_message(&group, *at, (*from, *number));
                self.total.on_place(id, *at);
                self.synchrony.on_message(id, (*from, *number));
                if *from == id {
                    self.own.on_own(id, *number);
                }
            }
            Event::Dropped { first, last } => self.own.on_dropped(id, *first, *last),
            Event::Left => {
                self.nodes.get_mut(&who).unwrap().processes.remove(&process);
            }
        }
    }

    fn heal(&mut self) {
        self.faults = false;
        self.steps(PHASE_ONE + Duration::from_secs(300));
        let last = self.views.last().cloned().unwrap();
        for group in GROUPS {
            let members = self.nodes.iter().filter(|(who, _)| last.contains(**who)).flat_map(|(who, n)| {
                let here = n.processes.iter().filter(|(_, p)| p.group == group);
                here.map(|(number, p)| (ProcessId { node: *who, number: *number }, p.members.clone()))
            });
            let members: BTreeMap<ProcessId, Vec<ProcessId>> = members.collect();
            let run: Vec<ProcessId> = members.keys().copied().collect();
            for (process, seen) in &members {
                self.own.at_end(*process);
                MembershipOrder::at_end(group, seen, &run);
            }
        }
    }
}
