//! A cluster of real membership machines in virtual time: crash, pause, partition, lose disks, and look.
//!
//! The simulations of other crates put their own machines beside these: step the cluster, take its [`Happening`]s,
//! feed the views to their machines, and ask it for the lease and the time of each host.

use super::network::{Faults, Network};
use super::node::{Clock, SimNode, sync_time};
use super::schedule::Schedule;
use crate::machine::{
    Bug, Config, ControlMsg, Durable, Event, Input, Member, Output, Peer, RequestId, StopReason, Token,
    Versions,
};
use crate::{
    ClusterId, Decision, Epoch, Identity, Incarnation, Instant, NodeId, QuorumOptions, Request, RequestError,
    Rng, Role, RosterEntry, StateId, View,
};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// So many records are shared between hosts.
const POOL_EPOCHS: u64 = 8;

/// What a simulated cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Times of the machines.
    pub machine: Config,
    /// Nodes 1 to `voters` are meant to vote.
    pub voters: u32,
    /// So many more never vote.
    pub observers: u32,
    /// So many more vote and never become members.
    pub witnesses: u32,
    /// The quorum options of the first record.
    pub quorum: QuorumOptions,
    /// The network.
    pub faults: Faults,
    /// Syncs in a million that take long.
    pub slow_sync_ppm: u32,
    /// So many of the lowest nodes a process is told of when it starts; all of them if this is not set.
    pub contacts: Option<u32>,
    /// Whether a supervisor starts a new life after a stop, a while later.
    pub supervised: bool,
    /// A deliberate mistake of every machine.
    pub bug: Option<Bug>,
}

impl ClusterConfig {
    /// Three voters on a good network, supervised.
    #[must_use]
    pub fn three() -> Self {
        Self {
            machine: Config::lan(),
            voters: 3,
            observers: 0,
            witnesses: 0,
            quorum: QuorumOptions::default(),
            faults: Faults::none(),
            slow_sync_ppm: 0,
            contacts: None,
            supervised: true,
            bug: None,
        }
    }
}

/// What the machines said to their surroundings.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A process installed a record.
    Installed {
        /// On which node.
        node: NodeId,
        /// In which life.
        life: Identity,
        /// In which process: a lost state directory counts its lives from one again.
        process: u64,
        /// The record.
        view: Arc<View>,
        /// Whether records before it were left out.
        jumped: bool,
    },
    /// A request ended.
    Done {
        /// Whose.
        life: Identity,
        /// Which; as [`Cluster::propose`] returned.
        id: RequestId,
        /// How.
        result: Result<Arc<View>, RequestError>,
    },
    /// A process gained or lost quorum.
    Quorum {
        /// Which.
        life: Identity,
        /// Gained.
        quorate: bool,
    },
    /// A process ended by itself.
    Stopped {
        /// Which.
        life: Identity,
        /// Why.
        reason: StopReason,
    },
    /// A machine noticed something.
    Noticed {
        /// Which.
        life: Identity,
        /// What.
        event: Event,
    },
}

#[derive(Debug)]
enum Ev {
    Deliver {
        to: NodeId,
        life: Option<Incarnation>,
        from: Peer,
        version: u8,
        msg: Box<ControlMsg>,
        size: u64,
    },
    Synced {
        node: NodeId,
        process: u64,
        token: Token,
    },
    Tick {
        node: NodeId,
        process: u64,
        at: Instant,
    },
    LazySync {
        node: NodeId,
        process: u64,
    },
    Resume {
        node: NodeId,
        process: u64,
    },
    Start {
        node: NodeId,
        process: u64,
    },
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    config: ClusterConfig,
    rng: Rng,
    schedule: Schedule<Ev>,
    /// May be changed at any time.
    pub network: Network,
    nodes: BTreeMap<NodeId, SimNode>,
    happenings: Vec<Happening>,
    requests: u64,
    id: ClusterId,
    /// The versions that the program on a host speaks, where they differ from the configuration's.
    programs: BTreeMap<NodeId, Versions>,
    /// Taken steps.
    pub steps: u64,
    /// What each host sent and received.
    traffic: BTreeMap<NodeId, Traffic>,
    /// One copy of each record, for all hosts.
    pool: BTreeMap<Epoch, Arc<View>>,
    /// What was sent and put on disk since [`Cluster::record`] was called.
    recorded: Option<Recorded>,
}

/// Real messages and disk records, for tests of their decoders.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Messages.
    pub messages: Vec<ControlMsg>,
    /// Entries of the nodes' logs.
    pub records: Vec<crate::machine::Record>,
}

/// What one host sent and received, in messages and in bytes of their encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Messages sent, lost ones included.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages that arrived at a process.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

impl Cluster {
    /// Hosts with the state that `cluster create` and `cluster join` leave; no process runs yet.
    #[must_use]
    pub fn new(config: ClusterConfig, mut rng: Rng) -> Self {
        let id = ClusterId::from_bytes(bytes(&mut rng));
        let members = config.voters + config.observers;
        let count = members + config.witnesses;
        let roster: BTreeMap<NodeId, RosterEntry> = (1..=count)
            .map(|n| {
                let role = match n {
                    n if n <= config.voters => Role::Voter,
                    n if n <= members => Role::Observer,
                    _ => Role::Witness,
                };
                let key = core::array::from_fn(|i| if i == 0 { n as u8 } else { 0 });
                (NodeId(n), RosterEntry { name: format!("node{n}"), key, role, addresses: Vec::new() })
            })
            .collect();
        let nodes = roster
            .keys()
            .map(|node| {
                let state = StateId::from_bytes(bytes(&mut rng));
                let disk = if *node == NodeId(1) {
                    Durable::create_with(id, *node, state, roster.clone(), config.quorum.clone())
                } else {
                    Durable::empty(id, *node, state)
                };
                (*node, SimNode::new(Clock::drawn(&mut rng), disk))
            })
            .collect();
        let network = Network::new(rng.child(), config.faults.clone());
        let schedule = Schedule::new();
        Self {
            config,
            rng,
            schedule,
            network,
            nodes,
            happenings: Vec::new(),
            requests: 0,
            id,
            programs: BTreeMap::new(),
            steps: 0,
            traffic: BTreeMap::new(),
            pool: BTreeMap::new(),
            recorded: None,
        }
    }

    /// Virtual time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.schedule.now()
    }

    /// All hosts.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &SimNode)> {
        self.nodes.iter().map(|(n, node)| (*n, node))
    }

    /// The machine of the process on this host.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.nodes.get(&node).and_then(|n| n.machine.as_ref())
    }

    /// What a host's clock shows.
    ///
    /// # Panics
    /// If there is no such host.
    #[must_use]
    pub fn local_now(&self, node: NodeId) -> Instant {
        self.nodes[&node].clock.local(self.now())
    }

    /// Whether the process on this host is a member under a valid lease at present, as it would find if it looked.
    #[must_use]
    pub fn is_quorate(&self, node: NodeId) -> bool {
        self.member(node).is_some_and(|m| m.stopped().is_none() && m.is_quorate(self.local_now(node)))
    }

    /// Whether the lease of a removed life is over as this host sees it.
    #[must_use]
    pub fn lease_is_over(&self, node: NodeId, who: Identity) -> bool {
        let at = self.member(node).and_then(|m| m.lease_over_at(who));
        at.is_some_and(|at| at <= self.local_now(node))
    }

    /// What happened since this was asked last.
    pub fn take_happenings(&mut self) -> Vec<Happening> {
        core::mem::take(&mut self.happenings)
    }

    /// What happened since it was taken last; it stays there.
    #[must_use]
    pub fn peek_happenings(&self) -> &[Happening] {
        &self.happenings
    }

    /// What a host sent and received since the beginning.
    #[must_use]
    pub fn traffic(&self, node: NodeId) -> Traffic {
        self.traffic.get(&node).copied().unwrap_or_default()
    }

    /// When the next event happens.
    #[must_use]
    pub fn next_at(&self) -> Option<Instant> {
        self.schedule.next_at()
    }

    /// Moves virtual time to `at` if nothing is to happen before.
    pub fn advance_to(&mut self, at: Instant) {
        if self.schedule.next_at().is_none_or(|next| at <= next) {
            self.schedule.advance_to(at);
        }
    }

    /// The decision of one epoch as kept on this host's machine or disk.
    #[must_use]
    pub fn decision(&self, node: NodeId, epoch: Epoch) -> Option<Decision> {
        let host = self.nodes.get(&node)?;
        let disk = host.machine.as_ref().map_or(&host.disk, Member::durable);
        disk.chain.get(epoch)
    }

    /// The chain that is kept on this host's machine or disk.
    #[must_use]
    pub fn chain(&self, node: NodeId) -> Vec<Decision> {
        let Some(host) = self.nodes.get(&node) else { return Vec::new() };
        let disk = host.machine.as_ref().map_or(&host.disk, Member::durable);
        disk.chain.since(Epoch(0))
    }

    /// Starts a process on every host that has none.
    pub fn start_all(&mut self) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for node in nodes {
            self.start(node);
        }
    }

    /// Starts the next life of a node; without effect if a process runs.
    ///
    /// # Panics
    /// If there is no such host, or the configuration is wrong.
    pub fn start(&mut self, node: NodeId) {
        let nonce = self.rng.next_u64();
        let seed = self.rng.next_u64();
        let told = self.config.contacts.map_or(usize::MAX, |n| n as usize);
        let contacts = self.nodes.keys().take(told).copied().collect();
        let now = self.local_now(node);
        let (mut machine, bug) = (self.config.machine.clone(), self.config.bug);
        machine.speaks = self.program(node);
        let Some(host) = self.nodes.get_mut(&node).filter(|h| h.machine.is_none()) else { return };
        host.process += 1;
        host.old_disk.get_or_insert_with(|| host.disk.clone());
        host.disk.next_life();
        let started = Member::new(machine, host.disk.clone(), nonce, contacts, seed, now);
        let mut member = started.expect("the simulation's configuration holds");
        member.plant(bug);
        host.machine = Some(member);
        self.feed(node, Input::Tick);
    }

    /// Another version of the program is put on a host; the next process there runs it.
    pub fn set_program(&mut self, node: NodeId, speaks: Versions) {
        self.programs.insert(node, speaks);
    }

    /// The versions that the program on a host speaks.
    #[must_use]
    pub fn program(&self, node: NodeId) -> Versions {
        self.programs.get(&node).copied().unwrap_or(self.config.machine.speaks)
    }

    /// SIGKILL or loss of power: what was not synced is lost, or some of it.
    pub fn crash(&mut self, node: NodeId) {
        let mut rng = self.rng.child();
        if let Some(host) = self.nodes.get_mut(&node) {
            host.die(&mut rng);
        }
    }

    /// SIGSTOP for a time; what arrives meanwhile is handed over at the end.
    pub fn pause(&mut self, node: NodeId, time: Duration) {
        let at = self.now() + time;
        if let Some(host) = self.nodes.get_mut(&node).filter(|h| h.machine.is_some() && !h.paused) {
            host.paused = true;
            let process = host.process;
            self.schedule.at(at, Ev::Resume { node, process });
        }
    }

    /// The state directory is gone: the next life starts on an empty one. Only for a host without a process.
    pub fn lose_state(&mut self, node: NodeId) {
        let state = StateId::from_bytes(bytes(&mut self.rng));
        let id = self.id;
        if let Some(host) = self.nodes.get_mut(&node).filter(|h| h.machine.is_none()) {
            host.disk = Durable::empty(id, node, state);
            host.old_disk = None;
        }
    }

    /// The state directory is put back to what it was an unknown number of lives ago, if it is that old. Only for a
    /// host without a process. Returns whether anything was put back.
    pub fn roll_back_state(&mut self, node: NodeId) -> bool {
        let Some(host) = self.nodes.get_mut(&node).filter(|h| h.machine.is_none()) else { return false };
        match host.old_disk.take() {
            Some(old) if old.life < host.disk.life => {
                host.disk = old;
                true
            }
            _ => false,
        }
    }

    /// Begins to record what is sent and put on disk.
    pub fn record(&mut self) {
        self.recorded = Some(Recorded::default());
    }

    /// What was recorded since the last call.
    pub fn take_recorded(&mut self) -> Recorded {
        self.recorded.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Delivers a message of somebody's choice, as a second process with a node's certificate could send it.
    pub fn inject(&mut self, to: NodeId, from: Peer, msg: ControlMsg) {
        self.feed(to, Input::Packet { from, msg });
    }

    /// The disk reports an error to the process.
    pub fn fail_storage(&mut self, node: NodeId) {
        self.feed(node, Input::StorageFailed);
    }

    /// The transport reports a lost connection.
    pub fn lose_link(&mut self, node: NodeId, to: NodeId) {
        self.feed(node, Input::LinkLost { node: to });
    }

    /// Says whether the node's part in a recovery waits for something.
    pub fn set_waiting(&mut self, node: NodeId, waits: bool) {
        self.feed(node, Input::Waiting(waits));
    }

    /// A user on `node` asks for a change. `None` if no process runs there to ask.
    pub fn propose(&mut self, node: NodeId, request: Request) -> Option<RequestId> {
        let host = self.nodes.get(&node)?;
        host.machine.as_ref().filter(|m| m.stopped().is_none())?;
        self.requests += 1;
        let id = RequestId(self.requests);
        self.feed(node, Input::Request { id, request });
        Some(id)
    }

    /// A person at `node` declares that the nodes of `off` are off and gives the rest the quorum.
    pub fn force(&mut self, node: NodeId, off: BTreeSet<NodeId>, word: &str) -> Option<RequestId> {
        let host = self.nodes.get(&node)?;
        host.machine.as_ref().filter(|m| m.stopped().is_none())?;
        self.requests += 1;
        let id = RequestId(self.requests);
        self.feed(node, Input::Force { id, off, word: word.into() });
        Some(id)
    }

    /// A person at `node` takes `wait_for_all` back.
    pub fn cancel_wait_for_all(&mut self, node: NodeId) {
        self.feed(node, Input::CancelWaitForAll);
    }

    /// Does what happens next; false if nothing is to come.
    pub fn step(&mut self) -> bool {
        let Some((_, event)) = self.schedule.pop() else { return false };
        self.steps += 1;
        match event {
            Ev::Deliver { to, life, from, version, msg, size } => {
                let member = self.nodes.get(&to).and_then(|h| h.machine.as_ref());
                let there = member.map(|m| m.me().incarnation);
                let understood = member.is_some_and(|m| m.speaks().speaks(version));
                if member.is_some() {
                    let traffic = self.traffic.entry(to).or_default();
                    traffic.received += 1;
                    traffic.received_bytes += size;
                }
                if understood && (life.is_none() || life == there) {
                    self.feed(to, Input::Packet { from, msg: *msg });
                }
            }
            Ev::Synced { node, process, token } => self.synced(node, process, token),
            Ev::Tick { node, process, at } => {
                let planned = |h: &&mut SimNode| h.process == process && h.tick_at == Some(at);
                if let Some(host) = self.nodes.get_mut(&node).filter(planned) {
                    host.tick_at = None;
                    self.feed(node, Input::Tick);
                }
            }
            Ev::LazySync { node, process } => {
                if let Some(host) = self.nodes.get_mut(&node).filter(|h| h.process == process) {
                    host.urgent |= !host.unsynced.is_empty();
                    self.start_sync(node);
                }
            }
            Ev::Resume { node, process } => {
                if let Some(host) = self.nodes.get_mut(&node).filter(|h| h.process == process) {
                    host.paused = false;
                    for input in core::mem::take(&mut host.held) {
                        self.feed(node, input);
                    }
                    self.feed(node, Input::Tick);
                }
            }
            Ev::Start { node, process } => {
                if self.nodes.get(&node).is_some_and(|h| h.process == process) {
                    self.start(node);
                }
            }
        }
        true
    }

    /// Steps until `until`, calling `look` after each step.
    pub fn run_until(&mut self, until: Instant, mut look: impl FnMut(&mut Self)) {
        while self.schedule.next_at().is_some_and(|at| at <= until) {
            self.step();
            look(self);
        }
    }

    fn synced(&mut self, node: NodeId, process: u64, token: Token) {
        let Some(host) = self.nodes.get_mut(&node).filter(|h| h.process == process) else { return };
        host.sync(token);
        host.disk.chain.share(&mut self.pool);
        host.syncing = false;
        self.feed(node, Input::Persisted(token));
        self.start_sync(node);
    }

    /// One sync at a time takes everything written so far, as a group commit does.
    fn start_sync(&mut self, node: NodeId) {
        let time = sync_time(&mut self.rng, self.config.slow_sync_ppm);
        let at = self.now() + time;
        let Some(host) = self.nodes.get_mut(&node).filter(|h| !h.syncing && h.urgent) else { return };
        host.urgent = false;
        if let Some((token, _)) = host.unsynced.back() {
            host.syncing = true;
            let (token, process) = (*token, host.process);
            self.schedule.at(at, Ev::Synced { node, process, token });
        }
    }

    fn feed(&mut self, node: NodeId, input: Input) {
        let now = self.now();
        let Some(host) = self.nodes.get_mut(&node) else { return };
        let Some(machine) = host.machine.as_mut() else { return };
        if host.paused {
            host.held.push(input);
            return;
        }
        let (life, peer) = (machine.me(), machine.peer());
        let mut out = Vec::new();
        // A stopped machine takes nothing more; the process is about to end.
        if machine.handle(host.clock.local(now), input, &mut out).is_err() {
            return;
        }
        for output in out {
            self.carry_out(node, life, peer, output);
        }
        self.start_sync(node);
        self.plan_tick(node);
    }

    fn plan_tick(&mut self, node: NodeId) {
        let now = self.now();
        let Some(host) = self.nodes.get_mut(&node) else { return };
        let Some(at) = host.machine.as_ref().and_then(Member::next_deadline) else { return };
        let at = host.clock.global(at).max(now);
        if host.tick_at.is_none_or(|planned| at < planned) {
            host.tick_at = Some(at);
            let process = host.process;
            self.schedule.at(at, Ev::Tick { node, process, at });
        }
    }

    fn carry_out(&mut self, node: NodeId, life: Identity, from: Peer, output: Output) {
        match output {
            Output::Send { to, life, msg } => {
                // Through the encoding, as in life.
                let version = self.member(node).map_or(Versions::FIRST, |m| m.version_to(to));
                let all = Versions { oldest: version, newest: version };
                let bytes = msg.encode(version);
                let size = bytes.len() as u64;
                let traffic = self.traffic.entry(node).or_default();
                traffic.sent += 1;
                traffic.sent_bytes += size;
                let msg = ControlMsg::decode(&bytes, all).expect("what is encoded decodes");
                if let Some(recorded) = &mut self.recorded {
                    recorded.messages.push(msg.clone());
                }
                for at in self.network.arrivals(self.schedule.now(), node, to) {
                    let msg = Box::new(msg.clone());
                    self.schedule.at(at, Ev::Deliver { to, life, from, version, msg, size });
                }
            }
            Output::Persist { token, record, lazy } => {
                let at = self.now() + Duration::from_millis(30);
                if let Some(recorded) = &mut self.recorded {
                    recorded.records.push(record.clone());
                }
                if let Some(host) = self.nodes.get_mut(&node) {
                    host.unsynced.push_back((token, record));
                    host.urgent |= !lazy;
                    if lazy {
                        let process = host.process;
                        self.schedule.at(at, Ev::LazySync { node, process });
                    }
                }
            }
            Output::Installed { view, jumped } => {
                self.pool.retain(|epoch, _| view.epoch.0 <= epoch.0 + POOL_EPOCHS || *epoch < Epoch(3));
                if let Some(machine) = self.nodes.get_mut(&node).and_then(|h| h.machine.as_mut()) {
                    machine.share(&mut self.pool);
                }
                let process = self.nodes.get(&node).map_or(0, |h| h.process);
                self.happenings.push(Happening::Installed { node, life, process, view, jumped });
            }
            Output::RequestDone { id, result } => {
                self.happenings.push(Happening::Done { life, id, result });
            }
            Output::Lease { .. } => (),
            Output::Quorum(quorate) => self.happenings.push(Happening::Quorum { life, quorate }),
            Output::Stop { reason } => self.stopped(node, life, reason),
            Output::Event(event) => self.happenings.push(Happening::Noticed { life, event }),
        }
    }

    /// The process ends; the supervisor starts the next life, on a renounced state if the machine asked for that.
    fn stopped(&mut self, node: NodeId, life: Identity, reason: StopReason) {
        self.crash(node);
        let state = StateId::from_bytes(bytes(&mut self.rng));
        let at = self.now() + self.rng.duration(Duration::from_millis(50), Duration::from_millis(500));
        if let Some(host) = self.nodes.get_mut(&node) {
            if let StopReason::RolledBack { known } = reason {
                host.disk.renounce(state, known);
            }
            let process = host.process;
            if self.config.supervised {
                self.schedule.at(at, Ev::Start { node, process });
            }
        }
        self.happenings.push(Happening::Stopped { life, reason });
    }
}

fn bytes(rng: &mut Rng) -> [u8; 16] {
    let mut out = [0; 16];
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&rng.next_u64().to_le_bytes());
    }
    out
}
