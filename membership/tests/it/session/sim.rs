//! The simulation: nodes with the production machine, pipes that keep order and break, a list of decided views.

use super::invariants::{bounded, epochs, exactly_once::ExactlyOnce, pauses::Pauses};
use core::time::Duration;
use quorate_membership::session::{Bug, Input, Limits, LinkId, Output, SessionMachine, take_frame};
use quorate_membership::sim::Schedule;
use quorate_membership::{ClusterId, Epoch, Identity, Incarnation, Instant, NodeId, Rng, ServiceId, View};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

const NODES: u32 = 4;
const PHASE_ONE: Instant = Instant(20_000_000_000);
const LINKS_PER_PAIR_MAX: usize = 3;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) sent: u64,
    pub(crate) delivered: u64,
    pub(crate) full: u64,
    pub(crate) held: u64,
    pub(crate) breaks: u64,
    pub(crate) takeovers: u64,
    pub(crate) removals: u64,
    pub(crate) forwarded: u64,
    /// Messages delivered while the session ran through a relay.
    pub(crate) relayed: u64,
    pub(crate) pauses: u64,
    pub(crate) ready: u64,
}

impl Work {
    pub(crate) fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.delivered += other.delivered;
        self.full += other.full;
        self.held += other.held;
        self.breaks += other.breaks;
        self.takeovers += other.takeovers;
        self.removals += other.removals;
        self.forwarded += other.forwarded;
        self.relayed += other.relayed;
        self.pauses += other.pauses;
        self.ready += other.ready;
    }
}

enum Event {
    Up { link: LinkId, end: Identity },
    Down { link: LinkId, end: Identity },
    Arrive { link: LinkId, to: Identity },
    Install { who: Identity },
    Send,
    Dial,
    Break,
    Cut,
    Heal { pair: (NodeId, NodeId) },
    Pause,
    Decide,
    Tick { who: Identity },
}

struct Pipe {
    ends: [Identity; 2],
    dialler: Identity,
    up: [bool; 2],
    broken: bool,
    /// Towards `ends[0]` and `ends[1]`.
    queues: [VecDeque<Arc<[u8]>>; 2],
    /// Frames towards an end arrive in order, so no earlier than this.
    last_at: [Instant; 2],
}

struct Process {
    machine: SessionMachine,
    view: Arc<View>,
    /// How many decided views it has installed.
    installed: usize,
    /// The tick under way.
    tick_at: Option<Instant>,
}

struct World {
    rng: Rng,
    schedule: Schedule<Event>,
    processes: BTreeMap<Identity, Process>,
    pipes: BTreeMap<LinkId, Pipe>,
    views: Vec<Arc<View>>,
    next_link: u64,
    delay_max: Duration,
    faults: bool,
    limits: Limits,
    bug: Option<Bug>,
    /// Pairs of nodes that cannot connect.
    cut: BTreeSet<(NodeId, NodeId)>,
    once: ExactlyOnce,
    pauses: Pauses,
    /// Who was told "full" of whom and waits to hear more.
    waiting: BTreeSet<(Identity, Identity)>,
    work: Work,
}

pub(crate) fn run(seed: u64, bug: Option<Bug>) -> Work {
    let mut rng = Rng::new(seed);
    let delay_max = Duration::from_micros(*rng.pick(&[300, 5_000, 100_000, 800_000]).unwrap());
    let credit_messages = *rng.pick(&[4, 30, 1_000]).unwrap();
    let credit_bytes = *rng.pick(&[2_000, 100_000]).unwrap();
    let relay_window_bytes = *rng.pick(&[1, 300, 5_000]).unwrap();
    let mut world = World {
        rng,
        schedule: Schedule::new(),
        processes: BTreeMap::new(),
        pipes: BTreeMap::new(),
        views: Vec::new(),
        next_link: 0,
        delay_max,
        faults: true,
        limits: Limits { credit_bytes, credit_messages, relay_window_bytes },
        bug,
        cut: BTreeSet::new(),
        once: ExactlyOnce::default(),
        pauses: Pauses::default(),
        waiting: BTreeSet::new(),
        work: Work::default(),
    };
    world.begin();
    world.steps(PHASE_ONE);
    world.heal();
    world.work.delivered = world.once.deliveries();
    world.work
}

impl World {
    fn begin(&mut self) {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        view.epoch = Epoch(1);
        view.members = (1..=NODES).map(|n| (NodeId(n), Incarnation(1))).collect();
        let view = Arc::new(view);
        self.views.push(view.clone());
        for (n, i) in &view.members {
            self.start(Identity::new(*n, *i));
        }
        for event in [Event::Send, Event::Dial, Event::Break, Event::Cut, Event::Pause, Event::Decide] {
            self.schedule.at(Instant(0), event);
        }
    }

    fn start(&mut self, who: Identity) {
        let mut machine = SessionMachine::new(who, self.limits);
        if let Some(bug) = self.bug {
            machine.plant(bug);
        }
        let view = Arc::new(View::empty(ClusterId::from_bytes([1; 16])));
        self.processes.insert(who, Process { machine, view, installed: 0, tick_at: None });
        let at = self.later();
        self.schedule.at(at, Event::Install { who });
    }

    fn later(&mut self) -> Instant {
        self.schedule.now() + self.rng.duration(Duration::from_micros(20), self.delay_max)
    }

    fn steps(&mut self, until: Instant) {
        while self.schedule.next_at().is_some_and(|at| at < until) {
            let Some((now, event)) = self.schedule.pop() else { return };
            self.step(now, event);
        }
    }

    fn again(&mut self, ms_max: u64, event: Event) {
        if self.faults {
            let at = self.schedule.now()
                + self.rng.duration(Duration::from_micros(10), Duration::from_millis(ms_max));
            self.schedule.at(at, event);
        }
    }

    fn step(&mut self, now: Instant, event: Event) {
        match event {
            Event::Send => {
                self.send(now);
                self.again(20, Event::Send);
            }
            Event::Dial => {
                let (a, b) = (self.any_process(), self.any_process());
                self.dial(a, b);
                self.again(300, Event::Dial);
            }
            Event::Break => {
                self.break_one();
                self.again(900, Event::Break);
            }
            Event::Cut => {
                self.cut_pair();
                self.again(1_500, Event::Cut);
            }
            Event::Heal { pair } => drop(self.cut.remove(&pair)),
            Event::Pause if self.faults => {
                self.pause(now);
                self.again(400, Event::Pause);
            }
            Event::Pause => {}
            Event::Decide => {
                self.decide();
                self.again(3_000, Event::Decide);
            }
            Event::Install { who } => self.install(now, who),
            Event::Up { link, end } => self.up(now, link, end),
            Event::Down { link, end } => self.down(now, link, end),
            Event::Arrive { link, to } => self.arrive(now, link, to),
            Event::Tick { who } => {
                if let Some(process) = self.processes.get_mut(&who).filter(|p| p.tick_at == Some(now)) {
                    process.tick_at = None;
                    self.input(now, who, Input::Tick);
                }
            }
        }
    }

    fn any_process(&mut self) -> Identity {
        let all: Vec<Identity> = self.processes.keys().copied().collect();
        *self.rng.pick(&all).unwrap()
    }

    fn send(&mut self, now: Instant) {
        let from = self.any_process();
        let process = self.processes.get_mut(&from).unwrap();
        let members: Vec<Identity> =
            process.view.members.iter().map(|(n, i)| Identity::new(*n, *i)).collect();
        let Some(to) = self.rng.pick(&members).copied() else { return };
        let service = 1 + self.rng.below(2) as u8;
        for _ in 0..1 + self.rng.below(4) {
            let number = self.once.next((from, to, service));
            let mut payload = number.to_le_bytes().to_vec();
            payload.resize(8 + self.rng.below(100) as usize, 7);
            let mut out = Vec::new();
            let process = self.processes.get_mut(&from).unwrap();
            match process.machine.send(now, to, ServiceId(service), payload, &mut out) {
                Ok(()) => {
                    self.once.on_sent((from, to, service));
                    self.work.sent += 1;
                }
                Err(quorate_membership::SendError::Full(_)) => {
                    self.work.full += 1;
                    self.waiting.insert((from, to));
                }
                Err(_) => {}
            }
            self.carry_out(now, from, out);
        }
    }

    fn dial(&mut self, from: Identity, to: Identity) {
        let between = self.pipes.values().filter(|p| p.ends.contains(&from) && p.ends.contains(&to)).count();
        let pair = (from.node.min(to.node), from.node.max(to.node));
        if from.node == to.node || LINKS_PER_PAIR_MAX <= between || self.cut.contains(&pair) {
            return;
        }
        self.next_link += 1;
        let link = LinkId(self.next_link);
        let pipe = Pipe {
            ends: [from, to],
            dialler: from,
            up: [false; 2],
            broken: false,
            queues: Default::default(),
            last_at: [Instant(0); 2],
        };
        self.pipes.insert(link, pipe);
        for end in [from, to] {
            let at = self.later();
            self.schedule.at(at, Event::Up { link, end });
        }
    }

    fn up(&mut self, now: Instant, link: LinkId, end: Identity) {
        let Some(pipe) = self.pipes.get_mut(&link).filter(|p| !p.broken) else { return };
        let [a, b] = pipe.ends;
        let side = usize::from(end == b);
        pipe.up[side] = true;
        let waiting = pipe.queues[side].len();
        let dialled = pipe.dialler == end;
        let peer = if end == a { b } else { a };
        self.input(now, end, Input::LinkUp { link, peer, dialled, path: 0 });
        for _ in 0..waiting {
            self.schedule_arrival(link, side, end);
        }
    }

    fn schedule_arrival(&mut self, link: LinkId, side: usize, to: Identity) {
        let at = self.later();
        let Some(pipe) = self.pipes.get_mut(&link) else { return };
        let at = at.max(pipe.last_at[side]);
        pipe.last_at[side] = at;
        self.schedule.at(at, Event::Arrive { link, to });
    }

    /// A pair loses its direct path for a while.
    fn cut_pair(&mut self) {
        let (a, b) = (self.any_process().node, self.any_process().node);
        let pair = (a.min(b), a.max(b));
        if a == b || !self.cut.insert(pair) {
            return;
        }
        let between = |p: &&Pipe| p.ends.iter().all(|e| e.node == a || e.node == b);
        let links: Vec<LinkId> = self.pipes.iter().filter(|(_, p)| between(p)).map(|(l, _)| *l).collect();
        links.into_iter().for_each(|l| self.break_link(l));
        let at =
            self.schedule.now() + self.rng.duration(Duration::from_millis(50), Duration::from_millis(6_000));
        self.schedule.at(at, Event::Heal { pair });
    }

    /// A service of a process stops taking messages, or goes on.
    fn pause(&mut self, now: Instant) {
        let who = self.any_process();
        let service = ServiceId(1 + self.rng.below(2) as u8);
        let paused = self.pauses.turn(who, service);
        self.work.pauses += u64::from(paused);
        self.input(now, who, Input::Paused { service, paused });
    }

    fn break_one(&mut self) {
        let all: Vec<LinkId> = self.pipes.iter().filter(|(_, p)| !p.broken).map(|(l, _)| *l).collect();
        if let Some(link) = self.rng.pick(&all).copied() {
            self.work.breaks += 1;
            self.break_link(link);
        }
    }

    /// Each direction loses a tail of what is under way; each end hears of it at another time.
    fn break_link(&mut self, link: LinkId) {
        let Some(pipe) = self.pipes.get_mut(&link).filter(|p| !p.broken) else { return };
        pipe.broken = true;
        let ends = pipe.ends;
        for queue in &mut pipe.queues {
            let keep = self.rng.below(queue.len() as u64 + 1) as usize;
            queue.truncate(keep);
        }
        for (side, end) in ends.into_iter().enumerate() {
            let last = self.pipes.get(&link).map_or(Instant(0), |p| p.last_at[side]);
            let at = self.later().max(last);
            self.schedule.at(at, Event::Down { link, end });
        }
    }

    fn down(&mut self, now: Instant, link: LinkId, end: Identity) {
        let Some(pipe) = self.pipes.get_mut(&link) else { return };
        let side = usize::from(end == pipe.ends[1]);
        let was_up = std::mem::replace(&mut pipe.up[side], false);
        let [a, b] = pipe.up;
        if !a && !b {
            self.pipes.remove(&link);
        }
        if was_up {
            self.input(now, end, Input::LinkDown { link });
        }
    }

    fn arrive(&mut self, now: Instant, link: LinkId, to: Identity) {
        let Some(pipe) = self.pipes.get_mut(&link) else { return };
        let side = usize::from(to == pipe.ends[1]);
        if !pipe.up[side] {
            return;
        }
        let Some(bytes) = pipe.queues[side].pop_front() else { return };
        let (frame, used) = take_frame(&bytes).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        self.input(now, to, Input::Frame { link, frame });
    }

    /// The next record: nothing changes, a life is removed (its process may go on unaware), or a new life comes in.
    fn decide(&mut self) {
        let mut view = View::clone(self.views.last().unwrap());
        view.epoch = view.epoch.next();
        let node = NodeId(1 + self.rng.below(u64::from(NODES)) as u32);
        match (view.members.get(&node).copied(), self.rng.below(3)) {
            (Some(_), 0) if 1 < view.members.len() => {
                view.members.remove(&node);
                self.work.removals += 1;
            }
            (None, 0 | 1) => {
                let newest = self.processes.keys().filter(|i| i.node == node).map(|i| i.incarnation.0).max();
                let who = Identity::new(node, Incarnation(newest.unwrap_or(0) + 1));
                if self.rng.chance_ppm(500_000) {
                    self.processes.retain(|i, _| i.node != node);
                }
                view.members.insert(node, who.incarnation);
                self.start(who);
            }
            _ => {}
        }
        self.views.push(Arc::new(view));
        let all: Vec<Identity> = self.processes.keys().copied().collect();
        for who in all {
            let at = self.later();
            self.schedule.at(at, Event::Install { who });
        }
    }

    fn install(&mut self, now: Instant, who: Identity) {
        let Some(process) = self.processes.get_mut(&who) else { return };
        let Some(view) = self.views.get(process.installed).cloned() else { return };
        // A removed life does not learn of it here: it goes on sending, as a node on the wrong side of a partition.
        let before = process.view.contains(who);
        if before && !view.contains(who) {
            return;
        }
        process.installed += 1;
        process.view = view.clone();
        self.input(now, who, Input::Installed { view });
        if self.processes[&who].installed < self.views.len() {
            let at = self.later();
            self.schedule.at(at, Event::Install { who });
        }
    }

    fn input(&mut self, now: Instant, who: Identity, input: Input<'_>) {
        let Some(process) = self.processes.get_mut(&who) else { return };
        let mut out = Vec::new();
        process.machine.handle(now, input, &mut out);
        let peers = self.views.last().unwrap().members.iter().map(|(n, i)| Identity::new(*n, *i));
        bounded::after_step(&process.machine, peers, self.limits);
        if let Some(at) = process.machine.next_deadline().map(|at| at.max(now))
            && process.tick_at.is_none_or(|planned| at < planned)
        {
            process.tick_at = Some(at);
            self.schedule.at(at, Event::Tick { who });
        }
        self.carry_out(now, who, out);
    }

    fn carry_out(&mut self, now: Instant, who: Identity, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Ready { peer } => {
                    self.work.ready += 1;
                    self.waiting.remove(&(who, peer));
                }
                Output::Forward { .. } if self.rng.chance_ppm(20_000) => {}
                Output::Transmit { link, bytes } | Output::Forward { link, bytes } => {
                    let Some(pipe) = self.pipes.get_mut(&link).filter(|p| !p.broken) else { continue };
                    let side = usize::from(who == pipe.ends[0]);
                    pipe.queues[side].push_back(bytes);
                    if pipe.up[side] {
                        let to = pipe.ends[side];
                        self.schedule_arrival(link, side, to);
                    }
                }
                Output::Deliver { from, service, epoch, payload } => {
                    let view = self.processes[&who].view.clone();
                    epochs::on_delivered(who, &view, from, epoch);
                    self.pauses.on_delivered(who, service);
                    self.work.relayed += u64::from(self.processes[&who].machine.relayed_by(from).is_some());
                    let number = u64::from_le_bytes(*payload.first_chunk().unwrap());
                    self.once.on_delivered((from, who, service.0), number);
                    self.work.held += u64::from(epoch < view.epoch);
                }
                Output::Close { link, why } => {
                    self.work.takeovers += u64::from(why.starts_with("superseded"));
                    let Some(pipe) = self.pipes.get_mut(&link) else { continue };
                    let side = usize::from(who == pipe.ends[1]);
                    pipe.up[side] = false;
                    self.break_link(link);
                }
            }
        }
        let _ = now;
    }

    /// Phase two: no more faults; connections are made again; everything that was sent must arrive.
    fn heal(&mut self) {
        self.faults = false;
        for (who, service) in self.pauses.all() {
            let paused = self.pauses.turn(who, service);
            self.input(PHASE_ONE, who, Input::Paused { service, paused });
        }
        let links: Vec<LinkId> = self.pipes.keys().copied().collect();
        links.into_iter().for_each(|l| self.break_link(l));
        self.steps(PHASE_ONE + Duration::from_secs(10));
        let last = self.views.last().cloned().unwrap();
        let members: Vec<Identity> = last.members.iter().map(|(n, i)| Identity::new(*n, *i)).collect();
        // A driver dials as long as there is no connection.
        for second in 11..60 {
            for (i, a) in members.iter().enumerate() {
                for b in members.iter().skip(i + 1) {
                    let between = |p: &Pipe| !p.broken && p.ends.contains(a) && p.ends.contains(b);
                    if !self.pipes.values().any(between) {
                        self.dial(*a, *b);
                    }
                }
            }
            self.steps(PHASE_ONE + Duration::from_secs(second));
        }
        self.steps(PHASE_ONE + Duration::from_secs(200));
        self.once.at_end(|who| last.contains(who));
        for (who, peer) in &self.waiting {
            let both = last.contains(*who) && last.contains(*peer);
            assert!(!both, "ready: {who} still waits to send to {peer}");
        }
        self.work.forwarded = self.processes.values().map(|p| p.machine.forwarded()).sum();
    }
}
