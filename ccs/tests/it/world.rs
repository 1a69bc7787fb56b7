//! The world of the simulation: replicas with disks, sessions with delays, and a membership that decides views.

use crate::invariants::{
    apply_once::ApplyOnce, committed_stays::CommittedStays, durable_majority, one_document::OneDocument,
};
use core::time::Duration;
use quorate_ccs::{Bug, Input, Output, Replica, Stored, Token};
use quorate_membership::sim::Schedule;
use quorate_membership::{
    ClusterId, Epoch, Identity, Incarnation, NodeId, Rng, StateId, View, Voter, VoterSet,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

#[derive(Debug)]
enum Event {
    /// The next view in the node's queue is installed.
    Install(Identity),
    /// The next message of a session arrives.
    Arrive {
        from: Identity,
        to: Identity,
    },
    /// A write ends.
    Written {
        at: Identity,
        token: Token,
        stored: Box<Stored>,
    },
    /// A user somewhere wants an update.
    Ask,
    /// A node dies, and comes back later.
    Crash,
    Restart(NodeId),
    /// The voter set changes.
    Vote,
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    replica: Replica,
    /// Views decided and not yet installed here.
    views: VecDeque<Arc<View>>,
    installed: Epoch,
    voters: VoterSet,
    written: Token,
    asked: u64,
}

/// Messages under way, each with the epoch it was sent in.
type Queue = VecDeque<(Epoch, Vec<u8>)>;

/// One run.
#[derive(Debug)]
pub(crate) struct World {
    schedule: Schedule<Event>,
    rng: Rng,
    delay_max: Duration,
    write_max: Duration,
    bug: Option<Bug>,
    view: Arc<View>,
    nodes: BTreeMap<NodeId, Node>,
    disks: BTreeMap<NodeId, Stored>,
    lives: BTreeMap<NodeId, u64>,
    /// Messages by session, with the epoch they were sent in.
    sessions: BTreeMap<(Identity, Identity), Queue>,
    /// Sessions that are slow all their life.
    lagging: BTreeMap<(Identity, Identity), bool>,
    one_document: OneDocument,
    committed_stays: CommittedStays,
    apply_once: ApplyOnce,
    faults: bool,
    trace: u64,
    /// Updates that were answered with a version.
    pub(crate) done: u64,
}

fn state(node: NodeId) -> StateId {
    StateId::from_bytes([node.0 as u8; 16])
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = Rng::new(seed);
        let count = 3 + rng.below(3) as u32;
        let delay_max = Duration::from_millis(1 + rng.below(30));
        let write_max = Duration::from_millis(*rng.pick(&[1, 30, 400]).unwrap_or(&1));
        let mut view = View::empty(CLUSTER);
        for n in 1..=count {
            view.members.insert(NodeId(n), Incarnation(1));
            if n <= 3 {
                view.voters.voters.insert(NodeId(n), Voter { state: state(NodeId(n)), votes: 1 });
            }
        }
        view.epoch = Epoch(1);
        let mut world = Self {
            schedule: Schedule::new(),
            rng,
            delay_max,
            write_max,
            bug,
            view: Arc::new(view),
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            lives: (1..=count).map(|n| (NodeId(n), 1)).collect(),
            sessions: BTreeMap::new(),
            lagging: BTreeMap::new(),
            one_document: OneDocument::default(),
            committed_stays: CommittedStays::default(),
            apply_once: ApplyOnce::default(),
            faults: true,
            trace: 0,
            done: 0,
        };
        for n in 1..=count {
            world.boot(NodeId(n));
        }
        for _ in 0..60 {
            let at = world.later(Duration::from_millis(3000));
            let event = match world.rng.below(10) {
                0 | 1 => Event::Crash,
                2 => Event::Vote,
                _ => Event::Ask,
            };
            world.schedule.at(at, event);
        }
        world
    }

    /// Runs faults for three seconds, then heals and runs to quiescence; gives a hash of all that happened.
    pub(crate) fn run(&mut self) -> u64 {
        let end = quorate_membership::Instant(4_000_000_000);
        let mut steps = 0;
        while let Some((now, event)) = self.schedule.pop() {
            if self.faults && end <= now {
                self.heal();
            }
            self.step(event);
            steps += 1;
            assert!(steps < 200_000, "liveness: the replicas do not come to rest");
        }
        self.heal();
        while let Some((_, event)) = self.schedule.pop() {
            self.step(event);
        }
        self.settled();
        self.trace
    }

    fn heal(&mut self) {
        if !self.faults {
            return;
        }
        self.faults = false;
        let dead: Vec<NodeId> = self.lives.keys().filter(|n| !self.nodes.contains_key(n)).copied().collect();
        for node in dead {
            self.restart(node);
        }
        self.schedule.at(self.schedule.now(), Event::Ask);
    }

    /// After quiescence: one coordinator serves, and every member has the newest version.
    fn settled(&mut self) {
        let newest = self.committed_stays.newest();
        assert!(0 < newest && 0 < self.done, "liveness: nothing was committed");
        let serving: Vec<_> =
            self.nodes.values().filter(|n| n.replica.serves()).map(|n| n.identity).collect();
        assert_eq!(serving.len(), 1, "liveness: these serve: {serving:?}");
        for node in self.nodes.values() {
            let here = node.replica.committed().map_or(0, |e| e.version);
            assert_eq!(here, newest, "liveness: {} does not have the newest version", node.identity);
        }
    }

    fn later(&mut self, within: Duration) -> quorate_membership::Instant {
        self.schedule.now() + self.rng.duration(Duration::from_micros(10), within)
    }

    fn boot(&mut self, node: NodeId) {
        let identity = Identity::new(node, Incarnation(self.lives[&node]));
        let stored = self.disks.get(&node).cloned().unwrap_or_else(|| Stored::empty(CLUSTER));
        let replica = Replica::new(identity, state(node), stored).with_bug(self.bug);
        let views = VecDeque::from([Arc::clone(&self.view)]);
        self.nodes.insert(
            node,
            Node {
                identity,
                replica,
                views,
                installed: Epoch(0),
                voters: VoterSet::default(),
                written: Token(0),
                asked: 0,
            },
        );
        let at = self.later(self.delay_max);
        self.schedule.at(at, Event::Install(identity));
    }

    fn decide(&mut self, change: impl FnOnce(&mut View)) {
        let mut view = (*self.view).clone();
        view.epoch = view.epoch.next();
        change(&mut view);
        self.view = Arc::new(view);
        let lives: Vec<Identity> =
            self.nodes.values().map(|n| n.identity).filter(|i| self.view.contains(*i)).collect();
        for identity in lives {
            if let Some(node) = self.nodes.get_mut(&identity.node) {
                node.views.push_back(Arc::clone(&self.view));
            }
            let at = self.later(self.delay_max);
            self.schedule.at(at, Event::Install(identity));
        }
    }

    fn restart(&mut self, node: NodeId) {
        if let Some(life) = self.lives.get_mut(&node) {
            *life += 1;
        }
        let incarnation = Incarnation(self.lives[&node]);
        // The newcomer hears of the record that takes it in first.
        self.decide(|v| {
            v.members.insert(node, incarnation);
        });
        self.boot(node);
    }

    fn step(&mut self, event: Event) {
        self.trace = self.trace.wrapping_mul(31).wrapping_add(format!("{event:?}").len() as u64);
        match event {
            Event::Install(identity) => self.install(identity),
            Event::Arrive { from, to } => self.arrive(from, to),
            Event::Written { at, token, stored } => {
                // The writer writes in order: a state that was overtaken by a newer one is in it.
                let alive = self.nodes.get_mut(&at.node).filter(|n| n.identity == at && n.written < token);
                if let Some(node) = alive {
                    node.written = token;
                    self.disks.insert(at.node, *stored);
                    self.feed(at, Input::Persisted(token));
                }
            }
            Event::Ask => self.ask(),
            Event::Crash if self.faults => self.crash(),
            Event::Vote if self.faults => self.vote(),
            Event::Restart(node) if !self.nodes.contains_key(&node) => self.restart(node),
            Event::Crash | Event::Vote | Event::Restart(_) => (),
        }
        for node in self.nodes.values() {
            self.committed_stays.check(&node.replica);
        }
    }

    fn install(&mut self, identity: Identity) {
        let Some(node) = self.nodes.get_mut(&identity.node).filter(|n| n.identity == identity) else {
            return;
        };
        let Some(view) = node.views.pop_front() else { return };
        node.installed = view.epoch;
        node.voters = view.voters.clone();
        self.feed(identity, Input::View(view));
        // What was held back may go on.
        let waiting: Vec<Identity> = self
            .sessions
            .iter()
            .filter(|((_, to), queue)| *to == identity && !queue.is_empty())
            .flat_map(|((from, _), queue)| queue.iter().map(|_| *from))
            .collect();
        for from in waiting {
            let at = self.later(self.delay_max);
            self.schedule.at(at, Event::Arrive { from, to: identity });
        }
    }

    fn arrive(&mut self, from: Identity, to: Identity) {
        let Some(installed) = self.nodes.get(&to.node).filter(|n| n.identity == to).map(|n| n.installed)
        else {
            return;
        };
        let Some(queue) = self.sessions.get_mut(&(from, to)) else { return };
        // Held back until its epoch is installed (R2).
        if queue.front().is_none_or(|(epoch, _)| installed < *epoch) {
            return;
        }
        if let Some((_, bytes)) = queue.pop_front()
            && self.view.contains(from)
        {
            self.feed(to, Input::Message { from, bytes });
        }
    }

    fn ask(&mut self) {
        let all: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(node) = self.rng.pick(&all).copied() else { return };
        let text = format!(
            "name = \"c{}\"\n[[node]]\nid = 1\nname = \"a\"\naddress = \"127.0.0.1:1\"\n",
            self.rng.below(1_000_000_000)
        );
        let Some(node) = self.nodes.get_mut(&node) else { return };
        node.asked += 1;
        let input =
            Input::Update { number: node.asked, expected: None, author: "sim".into(), written_at: 0, text };
        let identity = node.identity;
        self.feed(identity, input);
    }

    /// Only so many die that a majority of the voters stays a member: without one no view would be decided.
    fn crash(&mut self) {
        let all: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(victim) = self.rng.pick(&all).copied() else { return };
        let left = self.view.voters.voters.keys().filter(|n| **n != victim && self.nodes.contains_key(n));
        let left: Vec<(NodeId, StateId)> = left.map(|n| (*n, state(*n))).collect();
        if !self.view.voters.has_majority(left.iter().map(|(n, s)| (n, s))) {
            return;
        }
        self.nodes.remove(&victim);
        self.decide(|v| {
            v.members.remove(&victim);
        });
        let at = self.later(Duration::from_millis(300));
        self.schedule.at(at, Event::Restart(victim));
    }

    /// Another voter set: only once a coordinator has committed under the present one (R17).
    fn vote(&mut self) {
        let members: Vec<NodeId> = self.nodes.keys().copied().collect();
        let mut voters = VoterSet::default();
        // Sometimes those who did not vote so far: the two sets have the fewest nodes in common.
        let turn_over = self.rng.chance_ppm(400_000);
        for node in members {
            let newcomer = !self.view.voters.voters.contains_key(&node);
            if (turn_over && newcomer) || (!turn_over && self.rng.chance_ppm(700_000)) {
                voters.voters.insert(node, Voter { state: state(node), votes: 1 });
            }
        }
        let served = self.nodes.values().any(|n| n.replica.serves() && n.installed == self.view.epoch);
        if voters.voters.len() >= 2 && served {
            self.decide(|v| v.voters = voters);
        }
    }

    fn feed(&mut self, at: Identity, input: Input) {
        let Some(node) = self.nodes.get_mut(&at.node).filter(|n| n.identity == at) else { return };
        let mut out = Vec::new();
        node.replica.handle(input, &mut out);
        let (epoch, voters) = (node.installed, node.voters.clone());
        for output in out {
            match output {
                Output::Send { to, bytes } => {
                    self.sessions.entry((at, to)).or_default().push_back((epoch, bytes));
                    // Some sessions lag far behind the others: a new voter may not have what was committed before it.
                    let drawn = self.rng.chance_ppm(300_000);
                    let lags = *self.lagging.entry((at, to)).or_insert(drawn) && self.faults;
                    let arrival = self.later(if lags { 30 * self.delay_max } else { self.delay_max });
                    self.schedule.at(arrival, Event::Arrive { from: at, to });
                }
                Output::Persist { token, stored } => {
                    let end = self.later(self.write_max);
                    self.schedule.at(end, Event::Written { at, token, stored });
                }
                Output::Committed(entry) => {
                    if self.committed_stays.newest() < entry.version {
                        durable_majority::check(&entry, &voters, &self.disks);
                    }
                    self.one_document.committed(&entry);
                    self.apply_once.committed(&entry);
                    self.committed_stays.told(entry.version);
                }
                Output::UpdateDone { result, .. } => {
                    if let Ok(version) = result {
                        self.committed_stays.told(version);
                        self.done += 1;
                        // The worst moment for new voters: others may not have heard of the entry.
                        if self.rng.chance_ppm(200_000) {
                            self.schedule.at(self.schedule.now(), Event::Vote);
                        }
                    }
                }
                Output::Foreign(foreign) => panic!("foreign: {at} was told that {foreign}"),
            }
        }
    }
}
