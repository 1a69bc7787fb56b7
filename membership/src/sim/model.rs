//! Every behaviour of three voters that propose two records at once, one after the other: the production machines, every
//! order in which messages arrive or are lost, writes become durable, and a node crashes (stateright's depth-first
//! search).
//!
//! It begins with a cluster that came up, in which node 1 is heard by nobody any more and does not know it yet: node 1,
//! which leads, is about to have a user's request decided, and node 2 takes the lead to remove node 1. What is small about it:
//! heartbeats are lost from then on, each message in flight is delivered once at most (repetitions are sent anew),
//! clocks stand still but for a few steps, and records above [`ModelConfig::records`] more are not looked at.

use crate::machine::fingerprint::{large, small};
use crate::machine::{
    Bug, Config, ControlMsg, Durable, Input, Member, Output, Peer, Record, RequestId, Token, Versions,
};
use crate::{
    AttachRequest, Cause, ClusterId, Decision, Epoch, Instant, NodeId, Request, ResourceId, ResourceKind,
    Role, RosterEntry, Safety, StateId, View, verify_chain,
};
use core::hash::{Hash, Hasher};
use core::time::Duration;
use stateright::{Checker, Expectation, Model, Property};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const NODES: usize = 3;
/// As long as a repetition and the back-off of a lost ballot take together, nearly, and too short to be a pause.
const STEP: Duration = Duration::from_millis(190);

/// What is explored.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// So many records beyond those of the beginning.
    pub records: u64,
    /// How often time goes on for 190 ms at a node, all nodes together.
    pub steps: u8,
    /// The nodes (from 0) of which one may crash, and start again.
    pub may_crash: Vec<usize>,
    /// A deliberate mistake of every machine.
    pub bug: Option<Bug>,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Steps, those to known states counted too.
    pub steps: usize,
    /// The longest path.
    pub depth: usize,
    /// The invariant that is broken, and the actions that lead there.
    pub broken: Option<(String, Vec<String>)>,
    /// What was seen to be possible.
    pub reached: BTreeSet<String>,
    /// Whether everything was seen, not only the first so many states.
    pub is_whole: bool,
}

/// Explores everything, or about `states_max` states, on `threads` threads.
#[must_use]
pub fn explore(config: ModelConfig, states_max: usize, threads: usize) -> Explored {
    let voters = Voters { start: World::torn(config.bug), config };
    let names = voters.properties();
    let is_wanted =
        |name: &str| names.iter().any(|p| p.name == name && matches!(p.expectation, Expectation::Sometimes));
    let checker = voters.checker().threads(threads).target_state_count(states_max).spawn_dfs().join();
    let (mut broken, mut reached) = (None, BTreeSet::new());
    for (name, path) in checker.discoveries() {
        if is_wanted(name) {
            reached.insert(name.to_owned());
        } else {
            let actions = path.into_actions().iter().map(|a| format!("{a:?}")).collect();
            broken = Some((name.to_owned(), actions));
        }
    }
    Explored {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        is_whole: broken.is_none() && checker.state_count() < states_max,
        broken,
        reached,
    }
}

/// One host: the process, if one runs, what is on disk, and what is on its way there.
#[derive(Clone, Debug)]
struct Host {
    machine: Option<Member>,
    disk: Durable,
    unsynced: Vec<(Token, Record)>,
    now: Instant,
}

/// A message on its way. Equal ones are one: a second copy would be a repetition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Packet {
    to: usize,
    from: Peer,
    life: Option<crate::Incarnation>,
    bytes: Vec<u8>,
}

/// What was found to be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    TwoRecords,
    NoProof,
    NotDurable,
    Gap,
}

/// The whole cluster at one moment.
#[derive(Clone, Debug)]
pub(crate) struct World {
    hosts: Vec<Arc<Host>>,
    wires: BTreeSet<Packet>,
    /// Every record that anybody installed.
    decided: BTreeMap<Epoch, View>,
    crashed: bool,
    steps: u8,
    fault: Option<Fault>,
}

impl World {
    fn fingerprint(&self, out: &mut impl Hasher) {
        for host in &self.hosts {
            match &host.machine {
                Some(machine) => machine.fingerprint(out),
                None => out.write_u8(0),
            }
            let disk = &host.disk;
            large(&(disk.life, disk.promised, &disk.accepted, disk.chain.tip().map(|v| &**v)), out);
            for (token, record) in &host.unsynced {
                small(token, out);
                large(record, out);
            }
            small(&host.now, out);
        }
        self.wires.hash(out);
        let newest: Vec<&View> = self.decided.values().rev().take(2).collect();
        large(&newest, out);
        small(&(self.crashed, self.steps, self.fault), out);
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.fingerprint(state);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        let digest = |world: &Self| {
            let mut hasher = std::hash::DefaultHasher::new();
            world.fingerprint(&mut hasher);
            hasher.finish()
        };
        digest(self) == digest(other)
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// A message arrives: from, to, which of those in flight, and what it is.
    Deliver(usize, usize, usize, &'static str),
    /// All that a node wrote is durable.
    Sync(usize),
    /// Time goes on at a node.
    Step(usize),
    /// A node crashes; so many of its writes reached the disk.
    Crash(usize, usize),
    /// Its next life starts.
    Start(usize),
}

#[derive(Clone, Debug)]
struct Voters {
    config: ModelConfig,
    start: World,
}

fn id(index: usize) -> NodeId {
    NodeId(u32::try_from(index).unwrap_or(0) + 1)
}

fn index(node: NodeId) -> usize {
    node.0 as usize - 1
}

fn kind(msg: &ControlMsg) -> &'static str {
    match msg {
        ControlMsg::Prepare { .. } => "prepare",
        ControlMsg::Promise { .. } => "promise",
        ControlMsg::Accept { .. } => "accept",
        ControlMsg::Accepted { .. } => "accepted",
        ControlMsg::Preempted { .. } => "preempted",
        ControlMsg::Learn(_) => "learn",
        ControlMsg::Fetch { .. } => "fetch",
        ControlMsg::Chain { .. } => "chain",
        ControlMsg::Forward { .. } => "forward",
        _ => "other",
    }
}

fn decode(bytes: &[u8]) -> ControlMsg {
    ControlMsg::decode(bytes, Versions::CURRENT).unwrap_or(ControlMsg::Probe)
}

impl World {
    /// Three voters that came up; then nobody hears node 1, a user of it asked for something, and node 2 is about to
    /// take the lead.
    fn torn(bug: Option<Bug>) -> Self {
        let cluster = ClusterId::from_bytes([7; 16]);
        let state = |n: usize| StateId::from_bytes([u8::try_from(n).unwrap_or(0) + 1; 16]);
        let entry = |n: usize| {
            let key = core::array::from_fn(|i| if i == 0 { u8::try_from(n).unwrap_or(0) + 1 } else { 0 });
            RosterEntry { name: format!("node{}", id(n)), key, role: Role::Voter, addresses: Vec::new() }
        };
        let roster: BTreeMap<NodeId, RosterEntry> = (0..NODES).map(|n| (id(n), entry(n))).collect();
        let host = |n: usize| {
            let disk = match n {
                0 => Durable::create(cluster, id(n), state(n), roster.clone()),
                _ => Durable::empty(cluster, id(n), state(n)),
            };
            Host { machine: None, disk, unsynced: Vec::new(), now: Instant(1_000_000_000) }
        };
        let mut world = Self {
            hosts: (0..NODES).map(host).map(Arc::new).collect(),
            wires: BTreeSet::new(),
            decided: BTreeMap::new(),
            crashed: false,
            steps: 0,
            fault: None,
        };
        (0..NODES).for_each(|n| world.start(n, bug));
        let up = |w: &Self| {
            w.hosts.iter().all(|h| {
                h.machine.as_ref().is_some_and(|m| {
                    m.is_quorate(h.now)
                        && m.durable().accepted.is_none()
                        && m.view().is_some_and(|v| v.voters.voters.len() == NODES)
                })
            })
        };
        let mut rounds = 0;
        while !up(&world) || rounds < 200 {
            world.round(|_, _| true);
            rounds += 1;
            assert!(rounds < 2_000, "three voters come up");
        }
        let wanted = |msg: &ControlMsg| matches!(msg, ControlMsg::Accept { .. });
        let mut held = BTreeSet::new();
        for round in 0.. {
            assert!(round < 200, "node 2 takes the lead");
            if round == 50 {
                let request = Request::Attach(AttachRequest {
                    resource: ResourceId::new(ResourceKind::Lockspace, "l"),
                    safety: Safety::Lease,
                    servers: BTreeSet::new(),
                    journals: None,
                    lockspace: None,
                    exclusive: false,
                });
                world.feed(0, Input::Request { id: RequestId(1), request });
            }
            let keep = |p: &Packet| index(p.from.node) == 0 && wanted(&decode(&p.bytes));
            held.extend(world.wires.iter().filter(|p| keep(p)).cloned());
            world.tick(|from, _| from != 0);
            let votes = |w: &Self| w.hosts.iter().skip(1).any(|h| !h.unsynced.is_empty());
            if !votes(&world) {
                world.settle(|from, _| from != 0, votes);
            }
            if votes(&world) {
                break;
            }
        }
        world.wires.retain(|p| !decode(&p.bytes).is_periodic());
        world.wires.extend(held);
        world
    }

    /// A host, copied first if another state has it too.
    fn host(&mut self, node: usize) -> Option<&mut Host> {
        self.hosts.get_mut(node).map(Arc::make_mut)
    }

    /// Ten milliseconds in which everything arrives that `passes`.
    fn round(&mut self, passes: impl Fn(usize, usize) -> bool) {
        self.tick(&passes);
        self.settle(passes, |_| false);
    }

    fn tick(&mut self, passes: impl Fn(usize, usize) -> bool) {
        self.wires.retain(|p| passes(index(p.from.node), p.to));
        for n in 0..NODES {
            if let Some(host) = self.host(n) {
                host.now = host.now + Duration::from_millis(10);
            }
            self.feed(n, Input::Tick);
        }
    }

    fn settle(&mut self, passes: impl Fn(usize, usize) -> bool, until: impl Fn(&Self) -> bool) {
        loop {
            (0..NODES).for_each(|n| self.sync(n));
            self.wires.retain(|p| passes(index(p.from.node), p.to));
            let Some(packet) = self.wires.pop_first() else { break };
            self.deliver(&packet);
            if until(self) {
                break;
            }
        }
    }

    fn start(&mut self, node: usize, bug: Option<Bug>) {
        let Some(host) = self.host(node) else { return };
        host.disk.next_life();
        let contacts = (0..NODES).map(id).collect();
        let (nonce, seed) = (host.disk.life.0 * 100 + node as u64, node as u64);
        let started = Member::new(Config::lan(), host.disk.clone(), nonce, contacts, seed, host.now);
        host.machine = started.ok();
        if let Some(machine) = &mut host.machine {
            machine.plant(bug);
        }
        self.feed(node, Input::Tick);
    }

    fn deliver(&mut self, packet: &Packet) {
        let life = self.hosts.get(packet.to).and_then(|h| h.machine.as_ref()).map(|m| m.me().incarnation);
        if packet.life.is_none() || packet.life == life {
            self.feed(packet.to, Input::Packet { from: packet.from, msg: decode(&packet.bytes) });
        }
    }

    fn sync(&mut self, node: usize) {
        let Some(host) = self.host(node) else { return };
        let Some((token, _)) = host.unsynced.last() else { return };
        let token = *token;
        for (_, record) in host.unsynced.drain(..) {
            host.disk.apply(record);
        }
        self.feed(node, Input::Persisted(token));
    }

    fn feed(&mut self, node: usize, input: Input) {
        let Some(host) = self.host(node) else { return };
        let Some(machine) = host.machine.as_mut() else { return };
        let (mut out, from) = (Vec::new(), machine.peer());
        if machine.handle(host.now, input, &mut out).is_err() {
            return;
        }
        for output in out {
            match output {
                Output::Send { to, life, msg } => {
                    let Some(host) = self.hosts.get(node) else { continue };
                    if !is_backed(&host.disk, &msg) {
                        self.fault = Some(Fault::NotDurable);
                    }
                    let bytes = msg.encode(Versions::FIRST);
                    self.wires.insert(Packet { to: index(to), from, life, bytes });
                }
                Output::Persist { token, record, .. } => {
                    if let Some(host) = self.host(node) {
                        host.unsynced.push((token, record));
                    }
                }
                Output::Installed { view, jumped } => self.installed(node, &view, jumped),
                Output::Stop { .. } => {
                    if let Some(host) = self.host(node) {
                        host.machine = None;
                        host.unsynced.clear();
                    }
                    break;
                }
                _ => (),
            }
        }
    }

    fn installed(&mut self, node: usize, view: &View, jumped: bool) {
        let known = self.decided.entry(view.epoch).or_insert_with(|| view.clone());
        if known != view {
            self.fault = Some(Fault::TwoRecords);
        }
        let machine = self.hosts.get(node).and_then(|h| h.machine.as_ref());
        let decision: Option<Decision> = machine.and_then(|m| m.durable().chain.get(view.epoch));
        if let (Some(before), Some(decision)) = (self.decided.get(&Epoch(view.epoch.0 - 1)), decision)
            && verify_chain(view.cluster, before.epoch, &before.voters, &[decision]).is_err()
        {
            self.fault = Some(Fault::NoProof);
        }
        // Whoever was a member before has been given every record.
        let was = self
            .decided
            .get(&Epoch(view.epoch.0 - 1))
            .is_some_and(|v| machine.is_some_and(|m| v.contains(m.me())));
        if jumped && was {
            self.fault = Some(Fault::Gap);
        }
    }

    /// Whether a record beyond epoch `base` was made for `cause`.
    fn has(&self, base: Epoch, cause: impl Fn(&Cause) -> bool) -> bool {
        self.decided.range(base.next()..).any(|(_, v)| cause(&v.cause))
    }
}

/// Whether what a vote says is on disk when it leaves.
fn is_backed(disk: &Durable, msg: &ControlMsg) -> bool {
    match msg {
        ControlMsg::Promise { ballot, .. } => *ballot <= disk.promised,
        ControlMsg::Accepted { epoch, accept } => {
            *epoch <= disk.chain.epoch()
                || disk.accepted.as_ref().filter(|a| a.view.epoch == *epoch).is_some_and(|a| {
                    // A write takes all before it along: an earlier yes may be told after a later one is on disk.
                    accept.ballot < a.accept.ballot || *accept == a.accept
                })
        }
        _ => true,
    }
}

impl Voters {
    /// The newest record of the beginning.
    fn base(&self) -> Epoch {
        self.start.decided.keys().next_back().copied().unwrap_or(Epoch(0))
    }

    /// Loses what changes nothing any more: heartbeats and what belongs to them, help for whoever is behind, and all that
    /// is for a node that is gone or has the last record that is looked at, or for a record after that.
    fn lose(&self, world: &mut World) {
        let last = Epoch(self.base().0 + self.config.records);
        let works = |n: usize| {
            let host = world.hosts.get(n);
            host.is_some_and(|h| {
                let machine = h.machine.as_ref();
                machine
                    .map_or(self.config.may_crash.contains(&n), |m| m.view().is_none_or(|v| v.epoch < last))
            })
        };
        let working: Vec<bool> = (0..NODES).map(works).collect();
        world.wires.retain(|p| {
            let matters = match decode(&p.bytes) {
                ControlMsg::Prepare { epoch, .. }
                | ControlMsg::Promise { epoch, .. }
                | ControlMsg::Accepted { epoch, .. } => epoch <= last,
                ControlMsg::Accept { delta, .. } => delta.epoch() <= last,
                ControlMsg::Learn(step) => step.delta.epoch() < last,
                ControlMsg::Fetch { .. } | ControlMsg::Chain { .. } => false,
                other => !other.is_periodic(),
            };
            matters && working.get(p.to) == Some(&true)
        });
    }
}

impl Model for Voters {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.start.clone()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (i, packet) in world.wires.iter().enumerate() {
            if world.hosts.get(packet.to).is_some_and(|h| h.machine.is_some()) {
                let what = kind(&decode(&packet.bytes));
                actions.push(Action::Deliver(index(packet.from.node), packet.to, i, what));
            }
        }
        for (node, host) in world.hosts.iter().enumerate() {
            let last = self.base().0 + self.config.records;
            let is_done = host.machine.as_ref().and_then(|m| m.view()).is_some_and(|v| last <= v.epoch.0);
            if is_done {
                // It helps nobody any more: the others have to come to the same record, or to none.
                continue;
            }
            if !host.unsynced.is_empty() {
                actions.push(Action::Sync(node));
            }
            if host.machine.is_some() && world.steps < self.config.steps {
                actions.push(Action::Step(node));
            }
            if host.machine.is_some() && !world.crashed && self.config.may_crash.contains(&node) {
                actions.extend((0..=host.unsynced.len()).map(|kept| Action::Crash(node, kept)));
            }
            if host.machine.is_none() && world.crashed && self.config.may_crash.contains(&node) {
                actions.push(Action::Start(node));
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Deliver(_, _, nth, _) => {
                let packet = last.wires.iter().nth(nth)?;
                world.wires.remove(packet);
                world.deliver(packet);
            }
            Action::Sync(node) => world.sync(node),
            Action::Step(node) => {
                let host = world.host(node)?;
                host.now = host.now + STEP;
                world.steps += 1;
                world.feed(node, Input::Tick);
            }
            Action::Crash(node, kept) => {
                let host = world.host(node)?;
                host.machine = None;
                for (_, record) in host.unsynced.drain(..).take(kept) {
                    host.disk.apply(record);
                }
                world.crashed = true;
            }
            Action::Start(node) => world.start(node, self.config.bug),
        }
        self.lose(&mut world);
        Some(world)
    }

    fn within_boundary(&self, world: &World) -> bool {
        let last = self.base().0 + self.config.records;
        world.decided.keys().next_back().is_none_or(|e| e.0 <= last)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn asked(model: &Voters, world: &World) -> bool {
            world.has(model.base(), |c| matches!(c, Cause::Request { .. }))
        }
        fn removed(model: &Voters, world: &World) -> bool {
            world.has(model.base(), |c| matches!(c, Cause::Failed(_)))
        }
        vec![
            Property::always("one view", |_, w: &World| w.fault != Some(Fault::TwoRecords)),
            Property::always("majority", |_, w: &World| w.fault != Some(Fault::NoProof)),
            Property::always("durable votes", |_, w: &World| w.fault != Some(Fault::NotDurable)),
            Property::always("no gaps", |_, w: &World| w.fault != Some(Fault::Gap)),
            Property::sometimes("the request is decided", asked),
            Property::sometimes("the removal is decided", removed),
            Property::sometimes("two ballots at once", |_, w: &World| {
                let ballot = |p: &Packet| match decode(&p.bytes) {
                    ControlMsg::Accept { ballot, .. } => Some(ballot),
                    _ => None,
                };
                1 < w.wires.iter().filter_map(ballot).collect::<BTreeSet<_>>().len()
            }),
        ]
    }
}
