//! Every behaviour of a small cluster, one after the other: the production shards of all nodes, every order in which
//! messages arrive, views are installed, users act and a node fails (stateright's breadth-first search).
//!
//! What is small about it: two resources in one shard, users that each lock one of them exclusively and unlock it again,
//! one crash at most, no time (a master keeps resources for ever, nothing times out), sessions in order (R2), decided
//! views as the membership of a correct cluster decides them: removal, fence and rebuild of the crashed node, in any
//! order with everything else that R13 allows.

use super::Bug;
use crate::machine::map::{bucket_of, shard_of};
use crate::machine::shard::{Debtor, Input, Output, Shard, ShardConfig, SpaceView};
use crate::wire::Message;
use crate::{Completion, LockId, LockName, LockRequest, Mode, UnlockRequest};
use core::hash::{Hash, Hasher};
use quorate_membership::{Epoch, Identity, Incarnation, Instant, NodeId};
use stateright::{Checker, Model, Property};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const NOW: Instant = Instant(0);

/// What is explored.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// For each user: the node it is on (from 0), and which of the two resources it locks.
    pub users: Vec<(usize, usize)>,
    /// How many nodes there are.
    pub nodes: usize,
    /// The nodes of which one may crash.
    pub may_crash: Vec<usize>,
    /// A deliberate mistake.
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
    /// Whether everything was seen, not only the first so many states.
    pub is_whole: bool,
}

/// Explores everything, or `states_max` states, on `threads` threads.
#[must_use]
pub fn explore(config: ModelConfig, states_max: usize, threads: usize) -> Explored {
    let cluster = Cluster::new(config);
    let checker = cluster.checker().threads(threads).target_state_count(states_max).spawn_bfs().join();
    let broken = checker.discoveries().into_iter().next().map(|(name, path)| {
        let actions = path.into_actions().iter().map(|a| format!("{a:?}")).collect();
        (name.to_owned(), actions)
    });
    Explored {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        is_whole: broken.is_none() && checker.unique_state_count() < states_max,
        broken,
    }
}

/// How far a user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Asked(LockId),
    Has(LockId),
    Ending(LockId),
    Done,
}

#[derive(Clone, Debug)]
struct Peer {
    shard: Shard,
    /// The newest view it has installed: an index into the chain.
    installed: usize,
    ready: Epoch,
}

/// A message on its way, with the number of the view under which it was sent, and the map.
type Sent = (usize, Epoch, Message);

/// The whole cluster at one moment.
#[derive(Clone, Debug)]
pub(crate) struct World {
    peers: Vec<Option<Peer>>,
    users: Vec<Phase>,
    chain: Vec<Arc<SpaceView>>,
    wires: BTreeMap<(usize, usize), VecDeque<Sent>>,
    crashed: Option<usize>,
    /// What the crashed node could use when it crashed.
    had: Vec<(LockName, Mode)>,
}

impl World {
    /// Everything that decides what can follow.
    fn write(&self, out: &mut impl core::fmt::Write) {
        for peer in &self.peers {
            match peer {
                Some(peer) => {
                    peer.shard.fingerprint(out);
                    // Writing into a string or a hasher cannot fail.
                    let _ = write!(out, "{} {:?}", peer.installed, peer.ready);
                }
                None => drop(out.write_str("-")),
            }
        }
        let _ =
            write!(out, "{:?}{:?}{:?}{:?}{:?}", self.users, self.wires, self.crashed, self.chain, self.had);
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.write(&mut Into(state));
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        let text = |world: &Self| {
            let mut out = String::new();
            world.write(&mut out);
            out
        };
        text(self) == text(other)
    }
}

/// Text into a hasher.
struct Into<'a, H>(&'a mut H);

impl<H: Hasher> core::fmt::Write for Into<'_, H> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The next message from one node to another arrives.
    Deliver(usize, usize),
    /// A node installs its next view.
    Install(usize),
    /// A user does what comes next.
    Act(usize),
    /// A node crashes; what it had on its way is lost, or is not.
    Crash { node: usize, loses: bool },
    /// The view without the crashed node.
    Remove,
    /// It is fenced.
    Fence,
    /// Everybody has rebuilt.
    Rebuilt,
}

#[derive(Clone, Debug)]
struct Cluster {
    config: ModelConfig,
    names: [LockName; 2],
    index: u16,
}

fn identity(node: usize) -> Identity {
    Identity::new(NodeId(u32::try_from(node).unwrap_or(0) + 1), Incarnation(1))
}

fn number(who: Identity) -> usize {
    who.node.0 as usize - 1
}

impl Cluster {
    fn new(config: ModelConfig) -> Self {
        // Two names of one shard, in different buckets if they come so.
        let mut names = (0..).filter_map(|i: u32| LockName::new(format!("r{i}").as_bytes()).ok());
        let first = names.next().unwrap_or_else(|| unreachable!("there are names without end"));
        let index = shard_of(bucket_of(first.as_bytes()));
        let is_near = |n: &LockName| shard_of(bucket_of(n.as_bytes())) == index;
        let second = names.find(is_near).unwrap_or_else(|| unreachable!("there are names without end"));
        Self { config, names: [first, second], index }
    }

    /// Everybody attached and ready, nothing asked yet.
    fn settled(&self) -> World {
        let members = (0..self.config.nodes).map(identity).collect();
        let view = SpaceView { epoch: Epoch(1), members, debtors: BTreeMap::new() };
        let peer = |node| {
            let mut shard = Shard::new(ShardConfig {
                me: identity(node),
                index: self.index,
                value_bytes: 1,
                weakest_hold: None,
                moves: crate::MoveOptions::NEVER,
            });
            shard.set_bug(self.config.bug);
            Some(Peer { shard, installed: 0, ready: Epoch(0) })
        };
        let mut world = World {
            peers: (0..self.config.nodes).map(peer).collect(),
            users: vec![Phase::Idle; self.config.users.len()],
            chain: vec![Arc::new(view)],
            wires: BTreeMap::new(),
            crashed: None,
            had: Vec::new(),
        };
        for node in 0..self.config.nodes {
            world.install(node, 0);
        }
        while let Some((from, to)) = world.wires.iter().find(|(_, q)| !q.is_empty()).map(|(k, _)| *k) {
            world.deliver(from, to);
        }
        world
    }
}

impl World {
    fn carry_out(&mut self, node: usize, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Send { to, message } => {
                    let Some(peer) = self.peers.get(node).and_then(Option::as_ref) else { continue };
                    let sent = (peer.installed, peer.shard.map(), message);
                    let to = number(to);
                    if self.peers.get(to).is_some_and(Option::is_some) {
                        self.wires.entry((node, to)).or_default().push_back(sent);
                    }
                }
                Output::Done { id, completion } => {
                    for user in &mut self.users {
                        match (*user, &completion) {
                            (Phase::Asked(mine), Completion::Granted(_)) if mine == id => {
                                *user = Phase::Has(id)
                            }
                            (Phase::Ending(mine), Completion::Unlocked) if mine == id => *user = Phase::Done,
                            _ => {}
                        }
                    }
                }
                Output::Ready { map } => {
                    if let Some(peer) = self.peers.get_mut(node).and_then(Option::as_mut) {
                        peer.ready = map;
                    }
                }
                Output::Blocking { .. } | Output::Orphaned { .. } | Output::Quiet | Output::Suspect => {}
            }
        }
    }

    fn with(&mut self, node: usize, work: impl FnOnce(&mut Shard, &mut Vec<Output>)) {
        let mut out = Vec::new();
        if let Some(peer) = self.peers.get_mut(node).and_then(Option::as_mut) {
            work(&mut peer.shard, &mut out);
        }
        self.carry_out(node, out);
    }

    fn install(&mut self, node: usize, index: usize) {
        let Some(view) = self.chain.get(index).cloned() else { return };
        if let Some(peer) = self.peers.get_mut(node).and_then(Option::as_mut) {
            peer.installed = index;
        }
        self.with(node, |shard, out| shard.handle(NOW, Input::View(&view), out));
    }

    fn deliver(&mut self, from: usize, to: usize) {
        let Some(queue) = self.wires.get_mut(&(from, to)) else { return };
        let Some((_, map, message)) = queue.pop_front() else { return };
        if queue.is_empty() {
            self.wires.remove(&(from, to));
        }
        let input = Input::Message { from: identity(from), map, message };
        self.with(to, |shard, out| shard.handle(NOW, input, out));
    }

    fn tip(&self) -> &SpaceView {
        self.chain.last().unwrap_or_else(|| unreachable!("there is a first view"))
    }

    fn decide(&mut self, change: impl FnOnce(&mut SpaceView)) {
        let mut next = self.tip().clone();
        next.epoch = next.epoch.next();
        change(&mut next);
        self.chain.push(Arc::new(next));
    }

    fn usable(&self) -> Vec<(usize, LockName, Mode)> {
        let mut out = Vec::new();
        for (node, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            out.extend(peer.shard.usable().into_iter().map(|(_, name, mode, _)| (node, name, mode)));
        }
        out
    }

    fn is_exclusive(&self) -> bool {
        let usable = self.usable();
        usable.iter().enumerate().all(|(i, (_, name, mode))| {
            usable.iter().skip(i + 1).all(|(_, n, m)| n != name || m.is_compatible(*mode))
        })
    }

    /// What the crashed node had is nobody's before its debt is paid.
    fn is_held(&self) -> bool {
        let is_paid = self.crashed.is_none_or(|node| {
            !self.tip().members.contains(&identity(node)) && self.tip().debtors.is_empty()
        });
        is_paid
            || self
                .usable()
                .iter()
                .all(|(_, name, mode)| self.had.iter().all(|(n, m)| n != name || m.is_compatible(*mode)))
    }

    fn has_one_master(&self) -> bool {
        let mut seen: BTreeMap<(usize, &LockName), usize> = BTreeMap::new();
        for (node, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            for name in peer.shard.mastered() {
                if seen.insert((peer.installed, name), node).is_some() {
                    return false;
                }
            }
        }
        true
    }
}

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.settled()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for ((from, to), queue) in &world.wires {
            let installed = world.peers.get(*to).and_then(Option::as_ref).map(|p| p.installed);
            if queue.front().is_some_and(|(epoch, ..)| installed.is_some_and(|i| *epoch <= i)) {
                actions.push(Action::Deliver(*from, *to));
            }
        }
        for (node, peer) in world.peers.iter().enumerate() {
            if peer.as_ref().is_some_and(|p| p.installed + 1 < world.chain.len()) {
                actions.push(Action::Install(node));
            }
        }
        for (user, phase) in world.users.iter().enumerate() {
            let runs = self
                .config
                .users
                .get(user)
                .is_some_and(|(n, _)| world.peers.get(*n).is_some_and(Option::is_some));
            if runs && matches!(phase, Phase::Idle | Phase::Has(_)) {
                actions.push(Action::Act(user));
            }
        }
        match world.crashed {
            None => {
                for node in &self.config.may_crash {
                    let node = *node;
                    actions.extend([true, false].map(|loses| Action::Crash { node, loses }));
                }
            }
            Some(node) if world.tip().members.contains(&identity(node)) => actions.push(Action::Remove),
            Some(node) => {
                let tip = world.tip();
                let debt = tip.debtors.get(&identity(node));
                if debt.is_some_and(|d| !d.fenced) {
                    actions.push(Action::Fence);
                }
                let map = world.chain.iter().find(|v| !v.members.contains(&identity(node))).map(|v| v.epoch);
                let everybody = world.peers.iter().flatten().all(|p| Some(p.ready) == map);
                if debt.is_some_and(|d| !d.rebuilt) && everybody {
                    actions.push(Action::Rebuilt);
                }
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Deliver(from, to) => world.deliver(from, to),
            Action::Install(node) => {
                let next = world.peers.get(node)?.as_ref()?.installed + 1;
                world.install(node, next);
            }
            Action::Act(user) => {
                let (node, resource) = *self.config.users.get(user)?;
                let phase = *world.users.get(user)?;
                match phase {
                    Phase::Idle => {
                        // The same user has the same number in every order of events: fewer states.
                        let id = LockId((user as u64 + 1) * 16 + u64::from(self.index));
                        *world.users.get_mut(user)? = Phase::Asked(id);
                        let request = LockRequest::new(self.names.get(resource)?.clone(), Mode::EX);
                        world.with(node, |shard, out| {
                            let asked = shard.request(NOW, id, request, out);
                            assert_eq!(asked, Ok(id), "a member may ask");
                        });
                    }
                    Phase::Has(id) => {
                        *world.users.get_mut(user)? = Phase::Ending(id);
                        world.with(node, |shard, out| {
                            let asked = shard.unlock(NOW, id, UnlockRequest::default(), out);
                            assert_eq!(asked, Ok(()), "a lock that is had may be unlocked");
                        });
                    }
                    _ => return None,
                }
            }
            Action::Crash { node, loses } => {
                world.had =
                    world.usable().into_iter().filter(|(n, ..)| *n == node).map(|(_, n, m)| (n, m)).collect();
                *world.peers.get_mut(node)? = None;
                world.crashed = Some(node);
                world.wires.retain(|(from, to), _| *to != node && !(loses && *from == node));
                for (user, (n, _)) in self.config.users.iter().enumerate() {
                    if *n == node {
                        *world.users.get_mut(user)? = Phase::Done;
                    }
                }
            }
            Action::Remove => {
                let who = identity(world.crashed?);
                world.decide(|view| {
                    view.members.remove(&who);
                    view.debtors.insert(who, Debtor { fenced: false, rebuilt: false });
                });
            }
            Action::Fence | Action::Rebuilt => {
                let who = identity(world.crashed?);
                world.decide(|view| {
                    if let Some(debt) = view.debtors.get_mut(&who) {
                        debt.fenced |= action == Action::Fence;
                        debt.rebuilt |= action == Action::Rebuilt;
                        if debt.fenced && debt.rebuilt {
                            view.debtors.remove(&who);
                        }
                    }
                });
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("exclusion", |_, world: &World| world.is_exclusive()),
            Property::always("held", |_, world: &World| world.is_held()),
            Property::always("one master", |_, world: &World| world.has_one_master()),
            Property::always("finishes", |model: &Self, world: &World| {
                let mut actions = Vec::new();
                model.actions(world, &mut actions);
                // A crash can always come; what can go on without one must.
                actions.retain(|a| !matches!(a, Action::Crash { .. }));
                !actions.is_empty() || world.users.iter().all(|u| *u == Phase::Done)
            }),
        ]
    }
}
