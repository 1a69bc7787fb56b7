//! Nodes with the production machines, on sessions that delay but keep their order, with views that reach every node at
//! another time. The record of views is the cluster's own code; who decides it is not simulated here.

use quorate_dlm::sim::{Bug, Effect, Node};
use quorate_dlm::{Completion, ConvertRequest, LockId, LockRequest, LockspaceOptions, Mode, UnlockRequest};
use quorate_membership::machine::{decide, join, remove};
use quorate_membership::sim::Schedule;
use quorate_membership::{
    AttachRequest, Cause, ClusterId, Epoch, Identity, Incarnation, Instant, NodeId, Proof, Request,
    ResourceId, ResourceKind, Rng, Safety, StateId, View, Voter, VoterSet,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub(crate) const SPACE: &str = "sim";
pub(crate) const MOUNT: &str = "mount";

pub(crate) fn space_id() -> ResourceId {
    ResourceId::new(ResourceKind::Lockspace, SPACE)
}

pub(crate) fn mount_id() -> ResourceId {
    ResourceId::new(ResourceKind::Filesystem, MOUNT)
}

pub(crate) fn mount() -> Request {
    Request::Attach(AttachRequest {
        resource: mount_id(),
        safety: Safety::Lease,
        servers: Default::default(),
        journals: Some(64),
        lockspace: Some(SPACE.to_owned()),
        exclusive: false,
    })
}

/// What is to happen.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Deliver {
        from: Identity,
        to: Identity,
        epoch: Epoch,
        bytes: Vec<u8>,
    },
    Install {
        to: Identity,
        epoch: Epoch,
    },
    Tick {
        who: Identity,
    },
    Propose {
        by: Identity,
        request: Request,
    },
    Remove {
        who: Identity,
    },
    Join {
        who: Identity,
    },
    Fence {
        who: Identity,
    },
    Replay {
        who: Identity,
    },
    /// An isolated node's process ends.
    End {
        who: Identity,
    },
    /// The workload of a node does something.
    Act {
        who: Identity,
    },
}

/// What a lock of a node was told.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Done(Completion),
    Blocking(Mode),
}

pub(crate) struct SimNode {
    pub(crate) machine: Node,
    installed: Epoch,
    last_install: Instant,
    held_back: Vec<(Identity, Epoch, Vec<u8>)>,
    tick_at: Option<Instant>,
    /// Cut off from the others, but running.
    pub(crate) is_isolated: bool,
    pub(crate) is_leaving: bool,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) schedule: Schedule<Event>,
    /// Every decided view.
    pub(crate) chain: Vec<View>,
    pub(crate) nodes: BTreeMap<Identity, SimNode>,
    /// Until when a life acts on its own, once it is out of the view.
    pub(crate) lease_end: BTreeMap<Identity, Instant>,
    pub(crate) told: Vec<(Identity, LockId, Told)>,
    pub(crate) delay_max: Duration,
    /// Fences and replays are started by hand.
    pub(crate) by_hand: bool,
    pub(crate) messages: u64,
    /// Which nodes hear each other; `None`: all.
    pub(crate) sides: Option<BTreeMap<NodeId, usize>>,
    /// Deadlocks that were found and that nobody may end.
    pub(crate) undecided: Vec<Vec<(Identity, LockId)>>,
    /// Messages between nodes that do not hear each other: sessions keep them.
    severed: Vec<Event>,
    /// What happens to stopped processes later.
    paused: BTreeMap<Identity, Vec<Event>>,
    last_arrival: BTreeMap<(Identity, Identity), Instant>,
    options: LockspaceOptions,
    bug: Option<Bug>,
    number: u64,
}

impl World {
    /// `count` nodes that are members and attached to nothing yet.
    pub(crate) fn new(count: u32, seed: u64, options: LockspaceOptions, bug: Option<Bug>) -> Self {
        let voter = |n: u32| Voter { state: StateId::from_bytes([n as u8; 16]), votes: 1 };
        let voters = (1..=count).map(|n| (NodeId(n), voter(n))).collect();
        let mut first = View::empty(ClusterId::from_bytes([7; 16]));
        first.voters = VoterSet { voters, tie_breaker: None, expected: 0 };
        let lives = (1..=count).map(|n| (Identity::new(NodeId(n), Incarnation(1)), 1)).collect();
        let view = join(&first, &lives);
        let mut world = Self {
            rng: Rng::new(seed),
            schedule: Schedule::new(),
            chain: vec![view],
            nodes: BTreeMap::new(),
            lease_end: BTreeMap::new(),
            told: Vec::new(),
            delay_max: Duration::from_micros(500),
            by_hand: false,
            messages: 0,
            sides: None,
            undecided: Vec::new(),
            severed: Vec::new(),
            paused: BTreeMap::new(),
            last_arrival: BTreeMap::new(),
            options,
            bug,
            number: 0,
        };
        for who in lives.keys() {
            world.start(*who);
        }
        world
    }

    pub(crate) fn now(&self) -> Instant {
        self.schedule.now()
    }

    pub(crate) fn tip(&self) -> &View {
        self.chain.last().unwrap()
    }

    fn start(&mut self, who: Identity) {
        let mut machine = Node::new(who, &self.options, self.bug);
        let view = self.tip().clone();
        let effects = machine.view(self.now(), &view);
        assert!(effects.is_empty());
        let node = SimNode {
            machine,
            installed: view.epoch,
            last_install: self.now(),
            held_back: Vec::new(),
            tick_at: None,
            is_isolated: false,
            is_leaving: false,
        };
        self.nodes.insert(who, node);
        self.after(1, Event::Propose { by: who, request: self.attach() });
    }

    pub(crate) fn attach(&self) -> Request {
        Request::Attach(AttachRequest {
            resource: space_id(),
            safety: Safety::Lease,
            servers: BTreeSet::new(),
            journals: None,
            lockspace: None,
            exclusive: false,
        })
    }

    pub(crate) fn after(&mut self, ms: u64, event: Event) {
        let at = self.now() + Duration::from_millis(ms);
        self.schedule.at(at, event);
    }

    /// Whether a life is attached, by the newest view.
    pub(crate) fn is_attached(&self, who: Identity) -> bool {
        self.tip().attached(&space_id()).any(|a| a.owner == who)
    }

    /// Whether a life may use what it was granted at this moment.
    pub(crate) fn may_act(&self, who: Identity) -> bool {
        self.nodes.contains_key(&who)
            && (self.tip().contains(who) || self.lease_end.get(&who).is_some_and(|end| self.now() < *end))
    }

    fn decide(&mut self, next: View) {
        self.chain.push(next);
        let epoch = self.tip().epoch;
        let members: Vec<Identity> = self.tip().identities().collect();
        for who in members {
            let delay = self.rng.duration(Duration::from_micros(50), self.delay_max);
            let Some(node) = self.nodes.get_mut(&who) else { continue };
            let at = (self.schedule.now() + delay).max(node.last_install);
            node.last_install = at;
            self.schedule.at(at, Event::Install { to: who, epoch });
        }
        if self.by_hand {
            return;
        }
        // The fencing coordinator and the recovery participant, in short.
        let debts: Vec<_> = self.tip().debts.clone().into_iter().collect();
        for (who, debt) in debts {
            if debt.items.get(&mount_id()).is_some_and(|item| item.fenced && item.rebuilt) {
                let ms = self.rng.below(200);
                self.after(ms, Event::Replay { who });
            }
        }
    }

    pub(crate) fn propose(&mut self, by: Identity, request: &Request) -> bool {
        if !self.tip().contains(by) {
            return false;
        }
        self.number += 1;
        match decide(self.tip(), by, self.number, request) {
            Ok(Some(next)) => {
                self.decide(next);
                true
            }
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// The process ends at once; what it sent and has not arrived may be lost.
    pub(crate) fn crash(&mut self, who: Identity, detect_ms: u64) {
        if self.nodes.remove(&who).is_none() {
            return;
        }
        if self.rng.chance_ppm(500_000) {
            self.schedule.retain(|e| !matches!(e, Event::Deliver { from, .. } if *from == who));
        }
        self.lease_end.insert(who, self.now());
        self.after(detect_ms, Event::Remove { who });
    }

    /// The node runs on, alone, until its lease is over.
    pub(crate) fn isolate(&mut self, who: Identity, detect_ms: u64, lease_ms: u64) {
        let end = self.now() + Duration::from_millis(lease_ms);
        if let Some(node) = self.nodes.get_mut(&who) {
            node.is_isolated = true;
            self.lease_end.insert(who, end);
            self.after(detect_ms, Event::Remove { who });
            self.after(lease_ms, Event::End { who });
        }
    }

    fn remove(&mut self, who: Identity) {
        if !self.tip().contains(who) {
            return;
        }
        let lives = [who].into();
        let next = remove(self.tip(), &lives, Cause::Failed(lives.clone()));
        self.decide(next);
        if !self.by_hand {
            let over = self.lease_end.get(&who).copied().unwrap_or_default().since(self.now());
            let ms = over.as_millis() as u64 + 1 + self.rng.below(300);
            self.after(ms, Event::Fence { who });
        }
    }

    pub(crate) fn fence(&mut self, who: Identity) {
        assert!(
            self.lease_end.get(&who).is_none_or(|end| *end <= self.now()),
            "a fence before the lease is over"
        );
        let request = Request::Prove { debtor: who, resources: BTreeSet::new(), proof: Proof::LeaseOver };
        self.by_anybody(&request, Event::Fence { who });
    }

    fn by_anybody(&mut self, request: &Request, again: Event) {
        let by = self
            .nodes
            .iter()
            .find(|(w, n)| {
                !n.is_isolated
                    && self.tip().contains(**w)
                    && !self.is_cut_off(**w)
                    && !self.paused.contains_key(w)
            })
            .map(|(w, _)| *w);
        match by {
            Some(by) => {
                self.propose(by, request);
            }
            None => self.after(50, again),
        }
    }

    fn replay(&mut self, who: Identity) {
        // A survivor with the filesystem mounted; without one the lockspace stays dirty until somebody mounts.
        let by = self.tip().attached(&mount_id()).map(|a| a.owner).find(|w| self.nodes.contains_key(w));
        let request = Request::Prove { debtor: who, resources: [mount_id()].into(), proof: Proof::Replayed };
        match by {
            Some(by) => {
                self.propose(by, &request);
            }
            None if self.tip().debts.contains_key(&who) => self.after(50, Event::Replay { who }),
            None => {}
        }
    }

    /// Carries out what a machine wants.
    pub(crate) fn carry_out(&mut self, who: Identity, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send { to, bytes } => {
                    let epoch = self.nodes.get(&who).map_or(Epoch(0), |n| n.installed);
                    let delay = self.rng.duration(Duration::from_micros(50), self.delay_max);
                    let last = self.last_arrival.entry((who, to)).or_default();
                    let at = (self.schedule.now() + delay).max(*last);
                    *last = at;
                    self.messages += 1;
                    self.schedule.at(at, Event::Deliver { from: who, to, epoch, bytes });
                }
                Effect::Done { id, completion } => self.told.push((who, id, Told::Done(completion))),
                Effect::Blocking { id, mode } => self.told.push((who, id, Told::Blocking(mode))),
                Effect::Rebuilt { epoch } => {
                    let view = self.nodes.get(&who).map(|n| n.installed).unwrap_or_default();
                    let view = self.chain.iter().find(|v| v.epoch == view).unwrap().clone();
                    for (debtor, debt) in &view.debts {
                        if debt.removed <= epoch && debt.items.get(&space_id()).is_some_and(|i| !i.rebuilt) {
                            let proof = Proof::Rebuilt { epoch };
                            let request =
                                Request::Prove { debtor: *debtor, resources: [space_id()].into(), proof };
                            let ms = self.rng.below(5);
                            self.after(ms, Event::Propose { by: who, request });
                        }
                    }
                }
                Effect::Undecided { waits } => self.undecided.push(waits),
                Effect::Quiet => {
                    self.after(1, Event::Propose { by: who, request: Request::Detach(space_id()) });
                }
            }
        }
        let now = self.now();
        if let Some(node) = self.nodes.get_mut(&who)
            && let Some(at) = node.machine.next_deadline()
            && node.tick_at.is_none_or(|t| t <= now || at < t)
        {
            node.tick_at = Some(at);
            self.schedule.at(at, Event::Tick { who });
        }
    }

    /// Does the next thing; `None` when nothing is left. Workload events are handed back.
    pub(crate) fn step(&mut self) -> Option<Option<Event>> {
        let (now, event) = self.schedule.pop()?;
        let Some(event) = self.hold_back(event) else { return Some(None) };
        match event {
            Event::Deliver { from, to, epoch, bytes } => self.deliver(from, to, epoch, bytes),
            Event::Install { to, epoch } => self.install(to, epoch),
            Event::Tick { who } => {
                if let Some(node) = self.nodes.get_mut(&who) {
                    node.tick_at = None;
                    let effects = node.machine.tick(now);
                    self.carry_out(who, effects);
                }
            }
            Event::Propose { by, request } => {
                let is_cut =
                    |n: &SimNode| n.is_isolated || self.paused.contains_key(&by) || self.is_cut_off(by);
                if self.nodes.get(&by).is_some_and(is_cut) {
                    return Some(None);
                }
                let done = self.propose(by, &request);
                let again = matches!(request, Request::Attach(_));
                if !done && again && self.nodes.contains_key(&by) {
                    self.after(20, Event::Propose { by, request });
                }
            }
            Event::Remove { who } => self.remove(who),
            Event::Join { who } => {
                if self.tip().members.contains_key(&who.node) {
                    self.after(50, Event::Join { who });
                } else {
                    let next = join(self.tip(), &[(who, 1)].into());
                    self.decide(next);
                    self.start(who);
                }
            }
            Event::Fence { who } => self.fence(who),
            Event::Replay { who } => self.replay(who),
            Event::End { who } => {
                self.nodes.remove(&who);
            }
            Event::Act { .. } => return Some(Some(event)),
        }
        Some(None)
    }

    /// Stops a process; it knows nothing of that.
    pub(crate) fn pause(&mut self, who: Identity) {
        self.paused.entry(who).or_default();
    }

    /// It goes on: what came meanwhile, in order.
    pub(crate) fn resume(&mut self, who: Identity) {
        for event in self.paused.remove(&who).unwrap_or_default() {
            self.schedule.at(self.schedule.now(), event);
        }
    }

    /// Everybody hears everybody again.
    pub(crate) fn release_severed(&mut self) {
        for event in std::mem::take(&mut self.severed) {
            self.schedule.at(self.schedule.now(), event);
        }
    }

    /// Whether a node is on a side that decides nothing.
    fn is_cut_off(&self, who: Identity) -> bool {
        self.sides.is_some() && self.lease_end.contains_key(&who)
    }

    fn is_severed(&self, a: Identity, b: Identity) -> bool {
        self.sides.as_ref().is_some_and(|s| s.get(&a.node) != s.get(&b.node))
    }

    /// What cannot happen now happens later: to a stopped process, and between nodes that do not hear each other.
    fn hold_back(&mut self, event: Event) -> Option<Event> {
        let (Event::Deliver { to, .. } | Event::Install { to, .. } | Event::Tick { who: to }) = &event else {
            return Some(event);
        };
        if let Some(held) = self.paused.get_mut(to) {
            held.push(event);
            return None;
        }
        match &event {
            Event::Deliver { from, to, .. } if self.is_severed(*from, *to) => {
                self.severed.push(event);
                None
            }
            _ => Some(event),
        }
    }

    fn deliver(&mut self, from: Identity, to: Identity, epoch: Epoch, bytes: Vec<u8>) {
        let cut = |w: &Self, who| w.nodes.get(&who).is_some_and(|n: &SimNode| n.is_isolated);
        if cut(self, from) || cut(self, to) {
            // Lost with the session: an isolated node is on its way out.
            return;
        }
        let now = self.now();
        let Some(node) = self.nodes.get_mut(&to) else { return };
        if node.installed < epoch || !node.held_back.is_empty() {
            node.held_back.push((from, epoch, bytes));
            return;
        }
        let view = self.chain.iter().find(|v| v.epoch == node.installed).unwrap();
        // A buggy machine shall hear the dead, if it wants to.
        if view.contains(from) || self.bug == Some(Bug::HearTheDead) {
            let effects = node.machine.deliver(now, from, &bytes);
            self.carry_out(to, effects);
        }
    }

    fn install(&mut self, to: Identity, epoch: Epoch) {
        let now = self.now();
        let view = self.chain.iter().find(|v| v.epoch == epoch).unwrap().clone();
        let Some(node) = self.nodes.get_mut(&to).filter(|n| !n.is_isolated) else { return };
        assert_eq!(node.installed.next(), epoch, "views come without gaps");
        node.installed = epoch;
        let effects = node.machine.view(now, &view);
        let held = std::mem::take(&mut node.held_back);
        self.carry_out(to, effects);
        for (from, epoch, bytes) in held {
            self.deliver(from, to, epoch, bytes);
        }
    }

    pub(crate) fn installed(&self, who: Identity) -> Epoch {
        self.nodes.get(&who).map_or(Epoch(0), |n| n.installed)
    }

    pub(crate) fn request(
        &mut self,
        who: Identity,
        request: LockRequest,
    ) -> Result<LockId, quorate_dlm::LockError> {
        let now = self.now();
        let node = self.nodes.get_mut(&who).unwrap();
        let (result, effects) = node.machine.request(now, request);
        self.carry_out(who, effects);
        result
    }

    pub(crate) fn convert(
        &mut self,
        who: Identity,
        id: LockId,
        request: ConvertRequest,
    ) -> Result<(), quorate_dlm::LockError> {
        let now = self.now();
        let node = self.nodes.get_mut(&who).unwrap();
        let (result, effects) = node.machine.convert(now, id, request);
        self.carry_out(who, effects);
        result
    }

    pub(crate) fn unlock(
        &mut self,
        who: Identity,
        id: LockId,
        request: UnlockRequest,
    ) -> Result<(), quorate_dlm::LockError> {
        let now = self.now();
        let node = self.nodes.get_mut(&who).unwrap();
        let (result, effects) = node.machine.unlock(now, id, request);
        self.carry_out(who, effects);
        result
    }

    pub(crate) fn cancel(&mut self, who: Identity, id: LockId) -> Result<(), quorate_dlm::LockError> {
        let now = self.now();
        let node = self.nodes.get_mut(&who).unwrap();
        let (result, effects) = node.machine.cancel(now, id);
        self.carry_out(who, effects);
        result
    }
}
