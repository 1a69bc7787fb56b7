//! The whole cluster in virtual time: real membership machines, and beside each of them the production machines of
//! fencing, locks and block queue with a stand-in for a filesystem; one storage server; and what goes wrong.

use super::fs::Fs;
use super::invariants::{debts, exclusion, lease_first};
use super::oracle::{BLOCKS, Oracle, journal_cell};
use super::sessions::Pipe;
use super::storage::{Device, SERVER, Storage, ToClient, ToServer};
use quorate_dlm::sim::Node as LockNode;
use quorate_dlm::{Completion, LockId, LockspaceOptions, Mode, MoveOptions};
use quorate_fencing::machine::{Attempt, Coordinator, Input as FenceIn, Output as FenceOut};
use quorate_fencing::{FencingConfig, FencingTiming, StorageFenceError};
use quorate_gnbd::client::queue::{Command, QueueBug, Tag};
use quorate_gnbd::fence::{ConnectionId, FenceRecord, PersistToken};
use quorate_membership::machine::RequestId;
use quorate_membership::sim::{Cluster, ClusterConfig, Faults, Happening, Schedule};
use quorate_membership::{
    AttachRequest, DebtItem, Decision, Epoch, Identity, Instant, NodeId, Proof, Request, RequestError,
    ResourceId, ResourceKind, Rng, Safety, ServerEntry, View,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const SPACE: &str = "fs";

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    Member(quorate_membership::machine::Bug),
    Coordinator(quorate_fencing::Bug),
    /// Nobody waits for the end of a lease: neither who proves a fence, nor who takes the proof.
    NoLease,
    Locks(quorate_dlm::sim::Bug),
    Fence(quorate_gnbd::fence::Bug),
    Queue(QueueBug),
    Filesystem(super::fs::Bug),
}

/// What is to happen.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    // The storage server and the wires to it.
    ToServer(ConnectionId, ToServer),
    ToClient {
        who: Identity,
        link: ConnectionId,
        message: ToClient,
    },
    Apply(u64, ConnectionId, Tag, Command),
    SyncEnd(u64, bool),
    RecordDurable(u64, PersistToken, Box<FenceRecord>),
    ServerTick(u64),
    StartServer,
    Connect {
        who: Identity,
        attempt: u64,
    },
    Install {
        asked: Option<(Identity, Attempt)>,
        chain: Vec<Decision>,
    },
    // A life.
    InstallEnd {
        who: Identity,
        attempt: Attempt,
        result: Result<Epoch, StorageFenceError>,
    },
    Deliver {
        from: Identity,
        to: Identity,
    },
    LockTick(Identity),
    CoordinatorTick(Identity),
    Setup(Identity),
    Propose(Identity, Request),
    Hear(Identity),
    Act(Identity),
    Go {
        who: Identity,
        block: usize,
        turn: u64,
    },
    /// The process ends a moment after its membership has.
    End(Identity),
    Withdraw(Identity),
    // Faults.
    Start(NodeId),
    Fault,
    HealNetwork,
}

impl Event {
    /// Whose process must run for it.
    fn of(&self) -> Option<Identity> {
        match self {
            Self::ToClient { who, .. }
            | Self::Connect { who, .. }
            | Self::InstallEnd { who, .. }
            | Self::Go { who, .. } => Some(*who),
            Self::Deliver { to, .. } => Some(*to),
            Self::LockTick(who)
            | Self::CoordinatorTick(who)
            | Self::Setup(who)
            | Self::Propose(who, _)
            | Self::Hear(who)
            | Self::Act(who) => Some(*who),
            _ => None,
        }
    }
}

/// What a request was for.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    Fence(Attempt),
    Setup,
    Prove(Request),
}

/// What runs in one life beside membership.
pub(crate) struct App {
    pub(crate) who: Identity,
    pub(crate) view: Arc<View>,
    pub(crate) locks: LockNode,
    pub(crate) lock_tick: Option<Instant>,
    pub(crate) told: VecDeque<(LockId, Completion)>,
    coordinator: Coordinator,
    coordinator_tick: Option<Instant>,
    pub(crate) device: Device,
    pub(crate) fs: Fs,
}

impl App {
    /// The journal it was given when it mounted: the life's for as long as it runs, whatever later records say.
    pub(crate) fn journal(&self) -> Option<u32> {
        self.fs.journal
    }
}

/// What one run did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) commits: u64,
    pub(crate) reads: u64,
    pub(crate) fences: u64,
    pub(crate) debts: u64,
    pub(crate) replays: u64,
    pub(crate) replayed_blocks: u64,
    pub(crate) crashes: u64,
    pub(crate) pauses: u64,
    pub(crate) server_crashes: u64,
}

impl Summary {
    pub(crate) fn counts(&self) -> [u64; 9] {
        [
            self.commits,
            self.reads,
            self.fences,
            self.debts,
            self.replays,
            self.replayed_blocks,
            self.crashes,
            self.pauses,
            self.server_crashes,
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.commits += other.commits;
        self.reads += other.reads;
        self.fences += other.fences;
        self.debts += other.debts;
        self.replays += other.replays;
        self.replayed_blocks += other.replayed_blocks;
        self.crashes += other.crashes;
        self.pauses += other.pauses;
        self.server_crashes += other.server_crashes;
    }
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) cluster: Cluster,
    pub(crate) events: Schedule<Event>,
    pub(crate) planted: Option<Planted>,
    pub(crate) faulty: bool,
    pub(crate) oracle: Oracle,
    pub(crate) storage: Storage,
    pub(crate) apps: BTreeMap<NodeId, App>,
    pub(crate) pipes: BTreeMap<(Identity, Identity), Pipe>,
    /// Every decided record that somebody installed.
    pub(crate) chain: BTreeMap<Epoch, Arc<View>>,
    pub(crate) requests: BTreeMap<RequestId, (Identity, Asked)>,
    pub(crate) locks_changed: bool,
    pub(crate) summary: Summary,
    /// Operations in a million that take the server long.
    pub(crate) slow_ppm: u32,
    traces: bool,
    paused: BTreeMap<NodeId, Instant>,
    nodes: u32,
    faults: Faults,
}

pub(crate) fn space_id() -> ResourceId {
    ResourceId::new(ResourceKind::Lockspace, SPACE)
}

pub(crate) fn mount_id() -> ResourceId {
    ResourceId::new(ResourceKind::Filesystem, "shared")
}

fn device_id() -> ResourceId {
    ResourceId::new(ResourceKind::BlockDevice, "shared")
}

fn attach(resource: ResourceId) -> Request {
    let is_mount = resource.kind == ResourceKind::Filesystem;
    Request::Attach(AttachRequest {
        resource,
        safety: Safety::Storage,
        servers: BTreeSet::from([SERVER]),
        journals: is_mount.then_some(super::oracle::JOURNALS),
        lockspace: is_mount.then(|| SPACE.to_owned()),
        exclusive: false,
    })
}

impl World {
    pub(crate) fn new(seed: u64, planted: Option<Planted>) -> Self {
        let mut rng = Rng::new(seed);
        let nodes = 3 + rng.below(2) as u32;
        let faults = Faults {
            delay_min: Duration::from_micros(50),
            delay_max: Duration::from_micros(*rng.pick(&[500, 2_000, 20_000]).unwrap()),
            loss_ppm: *rng.pick(&[0, 1_000, 50_000]).unwrap(),
            duplicate_ppm: *rng.pick(&[0, 1_000, 50_000]).unwrap(),
        };
        let mut config = ClusterConfig { voters: nodes, slow_sync_ppm: 5_000, ..ClusterConfig::three() };
        config.faults = faults.clone();
        config.bug = match planted {
            Some(Planted::Member(bug)) => Some(bug),
            Some(Planted::NoLease) => Some(quorate_membership::machine::Bug::FencesEarly),
            _ => None,
        };
        let slow_ppm = *rng.pick(&[5_000, 30_000, 150_000]).unwrap();
        let cluster = Cluster::new(config, rng.child());
        let mut world = Self {
            rng,
            cluster,
            events: Schedule::new(),
            planted,
            faulty: true,
            oracle: Oracle::default(),
            storage: Storage::new(),
            apps: BTreeMap::new(),
            pipes: BTreeMap::new(),
            chain: BTreeMap::new(),
            requests: BTreeMap::new(),
            locks_changed: false,
            summary: Summary::default(),
            slow_ppm,
            traces: std::env::var_os("QUORATE_TRACE").is_some(),
            paused: BTreeMap::new(),
            nodes,
            faults,
        };
        world.start_server();
        world.cluster.start_all();
        let count = if world.rng.chance_ppm(200_000) { 20 } else { 1 + world.rng.below(6) };
        for _ in 0..count {
            let ms = 1_500 + world.rng.below(5_000);
            world.after_ms(ms, Event::Fault);
        }
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.cluster.now().max(self.events.now())
    }

    /// Tells a reader of one seed what happens (`QUORATE_TRACE=1`).
    pub(crate) fn trace(&self, what: impl FnOnce() -> String) {
        if self.traces {
            println!("{:>12} {}", self.now().0 / 1_000, what());
        }
    }

    pub(crate) fn after(&mut self, wait: Duration, event: Event) {
        let at = self.now() + wait;
        self.events.at(at, event);
    }

    pub(crate) fn after_ms(&mut self, ms: u64, event: Event) {
        self.after(Duration::from_millis(ms), event);
    }

    /// The process of this life, if it runs.
    pub(crate) fn app(&mut self, who: Identity) -> Option<&mut App> {
        self.apps.get_mut(&who.node).filter(|a| a.who == who)
    }

    /// Whether this life acts under a valid lease at this instant, if it looks.
    pub(crate) fn acts(&self, who: Identity) -> bool {
        self.cluster.member(who.node).is_some_and(|m| m.me() == who) && self.cluster.is_quorate(who.node)
    }

    /// The instant of the simulation at which a node's clock shows `local`.
    pub(crate) fn global(&self, node: NodeId, local: Instant) -> Instant {
        let host = self.cluster.nodes().find(|(n, _)| *n == node);
        host.map_or(local, |(_, h)| h.clock.global(local)).max(self.now())
    }

    pub(crate) fn newest(&self) -> Option<&Arc<View>> {
        self.chain.last_key_value().map(|(_, v)| v)
    }

    // --- time ---

    pub(crate) fn step(&mut self) -> bool {
        match (self.cluster.next_at(), self.events.next_at()) {
            (Some(c), e) if e.is_none_or(|e| c <= e) => {
                self.cluster.step();
            }
            (_, Some(e)) => {
                self.cluster.advance_to(e);
                if let Some((_, event)) = self.events.pop() {
                    self.on_event(event);
                }
            }
            _ => return false,
        }
        self.events.advance_to(self.cluster.now());
        self.listen();
        self.check_locks();
        true
    }

    pub(crate) fn run_for(&mut self, time: Duration, mut until: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now() + time;
        let mut steps = 0_u32;
        while self.now() < end {
            if !self.step() {
                break;
            }
            steps += 1;
            if steps.is_multiple_of(16) && until(self) {
                return true;
            }
        }
        until(self)
    }

    fn on_event(&mut self, event: Event) {
        if let Some(who) = event.of() {
            if self.app(who).is_none() && !matches!(event, Event::Deliver { .. }) {
                return;
            }
            // A stopped process takes it up when it goes on, in the same order.
            if let Some(at) = self.paused.get(&who.node).copied().filter(|at| self.now() < *at) {
                return self.events.at(at, event);
            }
        }
        match event {
            Event::InstallEnd { who, attempt, result } => {
                self.coordinate(who, FenceIn::Installed { attempt, result });
            }
            Event::CoordinatorTick(who) => {
                if let Some(app) = self.app(who) {
                    app.coordinator_tick = None;
                }
                self.coordinate(who, FenceIn::Tick);
            }
            Event::Deliver { from, to } => self.deliver(from, to),
            Event::LockTick(who) => self.tick_locks(who),
            Event::Setup(who) => self.set_up(who),
            Event::Propose(who, request) => self.propose(who, request),
            Event::Hear(who) => self.hear(who),
            Event::Act(who) => self.act(who),
            Event::Go { who, block, turn } => self.go_on(who, block, turn),
            Event::End(who) => self.end(who),
            Event::Withdraw(who) => self.withdraw(who),
            Event::Start(node) => self.cluster.start(node),
            Event::Fault => self.fault(),
            Event::HealNetwork => self.cluster.network.heal(),
            other => self.on_storage_event(other),
        }
    }

    // --- membership ---

    fn listen(&mut self) {
        for happening in self.cluster.take_happenings() {
            match happening {
                Happening::Installed { node, life, view, .. } => {
                    self.decided(&view);
                    self.installed(node, life, view);
                }
                Happening::Done { life, id, result } => {
                    if let Some((_, asked)) = self.requests.remove(&id) {
                        self.on_done(life, asked, result.map(|_| ()));
                    }
                }
                Happening::Quorum { life, quorate } => {
                    self.locks_changed = true;
                    self.coordinate(life, FenceIn::Quorum(quorate));
                }
                Happening::Stopped { life, .. } => {
                    let wait = Duration::from_micros(self.rng.below(40_000));
                    self.after(wait, Event::End(life));
                }
                Happening::Noticed { .. } => {}
            }
        }
    }

    /// A record is seen for the first time.
    fn decided(&mut self, view: &Arc<View>) {
        if self.chain.contains_key(&view.epoch) {
            return;
        }
        self.chain.insert(view.epoch, view.clone());
        self.trace(|| {
            let owes = |(r, i): (&ResourceId, &DebtItem)| format!("{r} {} {}", i.fenced, i.rebuilt);
            let debts = view.debts.iter().map(|(w, d)| (*w, d.items.iter().map(owes).collect::<Vec<_>>()));
            let attached: Vec<_> =
                view.attachments.iter().map(|a| format!("{} {}", a.owner, a.resource)).collect();
            format!(
                "record {} {:?} {:?} debts {:?} {attached:?}",
                view.epoch,
                view.cause,
                view.members,
                debts.collect::<Vec<_>>()
            )
        });
        let before = view.epoch.0.checked_sub(1).and_then(|e| self.chain.get(&Epoch(e)));
        if let Some(old) = before.cloned() {
            lease_first::on_record(&old, view, |who| self.acts(who));
            debts::on_record(&old, view, self);
            self.pause_removed(&old, view);
            self.summary.debts += old.debts.keys().filter(|w| !view.debts.contains_key(w)).count() as u64;
        }
    }

    fn installed(&mut self, node: NodeId, life: Identity, view: Arc<View>) {
        let now = self.cluster.local_now(node);
        if self.app(life).is_none() {
            if !view.contains(life) || self.cluster.member(node).is_none_or(|m| m.me() != life) {
                return;
            }
            self.end_app(node);
            let app = self.new_app(life, view.clone());
            self.apps.insert(node, app);
            self.after_ms(1, Event::Setup(life));
        }
        let Some(app) = self.app(life) else { return };
        app.view = view.clone();
        let given = view.attached(&mount_id()).find(|a| a.owner == life).and_then(|a| a.journal);
        app.fs.journal = app.fs.journal.or(given);
        let effects = app.locks.view(now, &view);
        self.locks_changed = true;
        self.carry_out(life, effects);
        self.coordinate(life, FenceIn::View(view));
        let quorate = self.acts(life);
        self.coordinate(life, FenceIn::Quorum(quorate));
        self.look_for_replays(life);
    }

    fn new_app(&self, who: Identity, view: Arc<View>) -> App {
        let options = LockspaceOptions {
            safety: Safety::Storage,
            servers: BTreeSet::from([SERVER]),
            holds: Some(Mode::EX),
            // Resources move often, so that failures meet moves.
            moves: MoveOptions { after: 2, rest_ms: 20 },
            ..LockspaceOptions::plain(SPACE)
        };
        let locks_bug = if let Some(Planted::Locks(bug)) = self.planted { Some(bug) } else { None };
        let mut coordinator = Coordinator::new(who, FencingConfig::new(FencingTiming::lan())).unwrap();
        match self.planted {
            Some(Planted::Coordinator(bug)) => coordinator.plant(bug),
            Some(Planted::NoLease) => coordinator.plant(quorate_fencing::Bug::IgnoresLease),
            _ => {}
        }
        App {
            who,
            view,
            locks: LockNode::new(who, &options, locks_bug),
            lock_tick: None,
            told: VecDeque::new(),
            coordinator,
            coordinator_tick: None,
            device: Device::default(),
            fs: Fs::default(),
        }
    }

    pub(crate) fn propose_as(&mut self, who: Identity, request: Request, asked: Asked) {
        if self.cluster.member(who.node).is_some_and(|m| m.me() == who)
            && let Some(id) = self.cluster.propose(who.node, request)
        {
            self.requests.insert(id, (who, asked));
        }
    }

    fn propose(&mut self, who: Identity, request: Request) {
        if self.is_owed(who, &request) {
            self.propose_as(who, request.clone(), Asked::Prove(request));
        }
    }

    /// Whether what the request proves is open by the life's own view.
    fn is_owed(&mut self, who: Identity, request: &Request) -> bool {
        let Request::Prove { debtor, resources, proof } = request else { return false };
        let Some(app) = self.app(who) else { return false };
        let item = |r| app.view.debts.get(debtor).and_then(|d| d.items.get(r));
        let is_rebuilt = matches!(proof, Proof::Rebuilt { .. });
        resources.iter().filter_map(item).any(|i| !(is_rebuilt && i.rebuilt))
    }

    fn on_done(&mut self, who: Identity, asked: Asked, result: Result<(), RequestError>) {
        match asked {
            Asked::Fence(attempt) => self.coordinate(who, FenceIn::Proposed { attempt, result }),
            Asked::Setup => {
                if let Some(app) = self.app(who) {
                    app.fs.is_asking = false;
                }
            }
            Asked::Prove(request) => {
                if matches!(result, Err(RequestError::NotQuorate { .. } | RequestError::Unknown(_))) {
                    self.after_ms(100, Event::Propose(who, request));
                }
            }
        }
    }

    /// Enrols the server and attaches, one after the other, as often as it takes.
    fn set_up(&mut self, who: Identity) {
        let Some(app) = self.app(who) else { return };
        let has = |r: &ResourceId| app.view.attached(r).any(|a| a.owner == who);
        let request = if !app.view.servers.contains_key(&SERVER) {
            let entry = ServerEntry { name: "server".into(), address: "server:1".into() };
            Some(Request::Enrol(SERVER, entry))
        } else {
            [device_id(), space_id(), mount_id()].into_iter().find(|r| !has(r)).map(attach)
        };
        let is_open = has(&device_id());
        let Some(request) = request else {
            self.open_device(who);
            self.after_ms(1, Event::Act(who));
            self.look_for_replays(who);
            return;
        };
        let is_asking = std::mem::replace(&mut app.fs.is_asking, true);
        if is_open {
            self.open_device(who);
        }
        if !is_asking {
            self.propose_as(who, request, Asked::Setup);
        }
        self.after_ms(25, Event::Setup(who));
    }

    // --- fencing ---

    fn coordinate(&mut self, who: Identity, input: FenceIn) {
        let now = self.cluster.local_now(who.node);
        let Some(app) = self.app(who) else { return };
        let mut out = Vec::new();
        app.coordinator.handle(now, input, &mut out).unwrap();
        let deadline = app.coordinator.next_deadline();
        if let Some(at) = deadline
            && app.coordinator_tick.is_none_or(|t| at < t)
        {
            app.coordinator_tick = Some(at);
            let at = self.global(who.node, at);
            self.events.at(at, Event::CoordinatorTick(who));
        }
        for output in out {
            match output {
                FenceOut::AskLease(debtor) => {
                    let member = self.cluster.member(who.node).filter(|m| m.me() == who);
                    let over_at = member.and_then(|m| m.lease_over_at(debtor));
                    self.coordinate(who, FenceIn::Lease { who: debtor, over_at });
                }
                FenceOut::Install { attempt, since, .. } => {
                    let member = self.cluster.member(who.node).filter(|m| m.me() == who);
                    let chain = member.map(|m| m.decisions_since(since)).unwrap_or_default();
                    let wait = self.wire_delay();
                    self.after(wait, Event::Install { asked: Some((who, attempt)), chain });
                }
                FenceOut::Propose { attempt, request } => {
                    self.propose_as(who, request, Asked::Fence(attempt));
                }
                FenceOut::Step { .. } => unreachable!("no devices are configured"),
                FenceOut::Record(_) | FenceOut::Confirmed { .. } => {}
            }
        }
    }

    // --- faults ---

    fn end(&mut self, who: Identity) {
        if self.app(who).is_some() {
            self.end_app(who.node);
        }
    }

    /// Everything of the process beside membership is gone.
    fn end_app(&mut self, node: NodeId) {
        let Some(app) = self.apps.get(&node) else { return };
        let who = app.who;
        let links = self.links_of(who);
        self.trace(|| format!("{who} ends"));
        self.apps.remove(&node);
        self.close_links(&links);
        self.locks_changed = true;
        let lost = self.rng.chance_ppm(500_000);
        self.pipes.retain(|(from, to), _| *to != who && !(lost && *from == who));
    }

    fn crash(&mut self, node: NodeId) {
        if self.cluster.member(node).is_none() {
            return;
        }
        self.summary.crashes += 1;
        self.paused.remove(&node);
        self.cluster.crash(node);
        self.end_app(node);
        let ms = if self.rng.chance_ppm(500_000) { self.rng.below(500) } else { self.rng.below(4_000) };
        self.after_ms(50 + ms, Event::Start(node));
    }

    /// The filesystem cannot go on: the life ends itself.
    fn withdraw(&mut self, who: Identity) {
        if self.app(who).is_some() && self.cluster.member(who.node).is_some_and(|m| m.me() == who) {
            self.crash(who.node);
        }
    }

    fn fault(&mut self) {
        if !self.faulty {
            return;
        }
        let node = NodeId(1 + self.rng.below(u64::from(self.nodes)) as u32);
        let others: Vec<NodeId> = (1..=self.nodes).map(NodeId).filter(|n| *n != node).collect();
        match self.rng.below(20) {
            0 => (1..=self.nodes).for_each(|n| self.crash(NodeId(n))),
            1..=5 => self.crash(node),
            6..=10 => {
                let ms = *self.rng.pick(&[200, 900, 1_200, 2_500, 4_000]).unwrap();
                let time = Duration::from_millis(ms + self.rng.below(300));
                self.pause(node, time);
            }
            11..=14 => {
                let mut ms = 300 + self.rng.below(3_000);
                match self.rng.below(10) {
                    0..=2 => others.iter().for_each(|other| self.cluster.network.cut(node, *other)),
                    // Two that do not hear each other while all others hear both: long enough, one goes with its lease
                    // in force (R3).
                    3..=4 => {
                        self.cluster.network.partition(&[node], &others[..1]);
                        ms += 3_000;
                    }
                    _ => self.cluster.network.partition(&[node], &others),
                }
                self.after_ms(ms, Event::HealNetwork);
            }
            15..=17 => self.crash_server(),
            _ => {
                if let Some(who) = self.apps.get(&node).map(|a| a.who) {
                    self.disconnect(who);
                }
            }
        }
        // What is paused is over at some time; a pause that is over is none.
        let now = self.now();
        self.paused.retain(|_, at| now < *at);
        if self.rng.chance_ppm(300_000) {
            let ms = self.rng.below(1_500);
            self.after_ms(ms, Event::Fault);
        }
    }

    /// A process may stand still just when it is removed, with its lease in force and without hearing of it.
    fn pause_removed(&mut self, old: &View, new: &View) {
        let removed = new.debts.keys().filter(|w| !old.debts.contains_key(w) && self.acts(**w));
        for node in removed.map(|w| w.node).collect::<Vec<_>>() {
            if self.faulty && self.rng.chance_ppm(800_000) {
                let ms = 100 + self.rng.below(900);
                self.pause(node, Duration::from_millis(ms));
            }
        }
    }

    fn pause(&mut self, node: NodeId, time: Duration) {
        if self.cluster.member(node).is_some() && !self.paused.contains_key(&node) {
            self.summary.pauses += 1;
            self.paused.insert(node, self.now() + time);
            self.cluster.pause(node, time);
        }
    }

    pub(crate) fn stop_faults(&mut self) {
        self.faulty = false;
        self.faults = Faults::none();
        self.cluster.network.faults = Faults::none();
        self.cluster.network.heal();
        self.cluster.start_all();
        self.start_server();
    }

    // --- what must hold ---

    fn check_locks(&mut self) {
        if !std::mem::take(&mut self.locks_changed) {
            return;
        }
        let mut usable: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for app in self.apps.values().filter(|a| self.acts(a.who)) {
            for (_, name, mode, _) in app.locks.usable() {
                usable.entry(name).or_default().push((app.who, mode));
            }
        }
        exclusion::check(&usable);
    }

    /// Whether everybody is in, mounted and idle, and nothing is owed.
    pub(crate) fn is_whole(&self) -> bool {
        let Some(newest) = self.newest() else { return false };
        newest.debts.is_empty()
            && newest.members.len() == self.nodes as usize
            && newest.identities().all(|who| {
                self.apps.get(&who.node).is_some_and(|a| {
                    a.who == who
                        && a.view.epoch == newest.epoch
                        && a.journal().is_some()
                        && a.locks.is_ready()
                        && a.fs.is_idle()
                        && a.device.is_idle()
                        && self.acts(who)
                        && self.server_admits(who.node)
                })
            })
    }

    /// Why it is not whole.
    pub(crate) fn complaint(&self) -> String {
        let Some(newest) = self.newest() else { return "there is no record".into() };
        let apps: Vec<String> = self
            .apps
            .values()
            .map(|a| {
                format!(
                    "{}: epoch {} acts {} journal {:?} ready {} idle {} fs {:?} device {:?} fencing {:?} locks {:?}",
                    a.who,
                    a.view.epoch,
                    self.acts(a.who),
                    a.journal(),
                    a.locks.is_ready(),
                    a.locks.is_idle(),
                    a.fs,
                    a.device,
                    a.coordinator.status(self.cluster.local_now(a.who.node)),
                    a.locks.dump(),
                )
            })
            .collect();
        format!(
            "at {:?}, epoch {}, members {:?}, debts {:?}\n{}",
            self.now(),
            newest.epoch,
            newest.members,
            newest.debts,
            apps.join("\n")
        )
    }
}

impl debts::Facts for World {
    fn is_fenced(&self, who: Identity) -> bool {
        self.oracle.fenced.contains(&who)
    }

    fn unreplayed(&self, journal: u32) -> Option<usize> {
        (0..BLOCKS).find(|block| {
            let logged = self.storage.durable[journal_cell(journal, *block)];
            self.oracle.version_of(self.storage.durable[*block]) < self.oracle.version_of(logged)
        })
    }
}
