//! The distributed lock manager in a simulated cluster: no delays to speak of, failures and fences by hand.

use crate::format::Told;
use crate::player::{Fault, NotHere, Setup, World};
use crate::world::{Event, Told as WorldTold, World as Sim, mount};
use quorate_dlm::{
    Completion, ConvertRequest, LockError, LockId, LockName, LockRequest, LockspaceOptions, MoveOptions,
    ResourceDump, UnlockRequest,
};
use quorate_membership::{Identity, Incarnation, NodeId};
use std::collections::BTreeMap;
use std::time::Duration;

/// What happens within this long after an event is its consequence; what comes later, time brings.
const QUIET: Duration = Duration::from_millis(10);
/// After this long without a majority a node's lease is over: it answers nothing.
const LEASE: Duration = Duration::from_millis(300);
/// After this long a majority takes those that it does not hear out of the view.
const DETECTION: Duration = Duration::from_millis(400);

pub(crate) struct Distributed {
    sim: Sim,
    /// The newest life of each node.
    lives: BTreeMap<u32, Identity>,
    /// Told to locks of a node that may not answer.
    withheld: Vec<(u32, LockId, Told)>,
    /// Ended by `exit` or `purge`: nobody is left to be told.
    is_silent: bool,
    voters: u32,
}

impl Distributed {
    pub(crate) fn new(setup: Setup) -> Self {
        let moves = MoveOptions { after: setup.moves, rest_ms: 0 };
        let options =
            LockspaceOptions { holds: setup.holds, moves, ..LockspaceOptions::plain(crate::world::SPACE) };
        let voters = setup.nodes.max(2);
        let mut sim = Sim::new(voters, 1, options, None);
        sim.by_hand = true;
        let life = |n| Identity::new(NodeId(n), Incarnation(1));
        let lives: BTreeMap<u32, Identity> = (1..=voters).map(|n| (n, life(n))).collect();
        if setup.holds.is_some() {
            for who in lives.values() {
                sim.after(5, Event::Propose { by: *who, request: mount() });
            }
        }
        let mut world = Self { sim, lives, withheld: Vec::new(), is_silent: false, voters };
        world.settle();
        assert!(world.sim.nodes.values().all(|n| n.machine.is_ready()));
        world
    }

    fn life(&self, node: u32) -> Identity {
        self.lives.get(&node).copied().unwrap_or(Identity::new(NodeId(node), Incarnation(0)))
    }

    fn partition(&mut self, sides: &[Vec<u32>]) {
        let side_of: BTreeMap<NodeId, usize> = sides
            .iter()
            .enumerate()
            .flat_map(|(at, nodes)| nodes.iter().map(move |n| (NodeId(*n), at)))
            .collect();
        let majority = sides.iter().position(|side| {
            let alive = side.iter().filter(|n| self.sim.nodes.contains_key(&self.life(**n)));
            self.voters < 2 * alive.count() as u32
        });
        self.sim.sides = Some(side_of.clone());
        let cut: Vec<Identity> = self
            .sim
            .nodes
            .keys()
            .copied()
            .filter(|w| majority.is_none() || side_of.get(&w.node).copied() != majority)
            .collect();
        for who in cut {
            self.sim.lease_end.insert(who, self.sim.now() + LEASE);
            if majority.is_some() {
                self.sim.schedule.at(self.sim.now() + DETECTION, Event::Remove { who });
            }
        }
    }

    fn heal(&mut self) {
        self.sim.schedule.retain(|e| !matches!(e, Event::Remove { .. }));
        self.sim.sides = None;
        // Who was taken out has ended: its supervisor saw to that.
        let out: Vec<Identity> =
            self.sim.nodes.keys().copied().filter(|w| !self.sim.tip().contains(*w)).collect();
        for who in out {
            self.sim.nodes.remove(&who);
        }
        let here: Vec<Identity> = self.sim.nodes.keys().copied().collect();
        for who in here {
            self.sim.lease_end.remove(&who);
        }
        self.sim.release_severed();
    }

    /// Whether a node's lease is over.
    fn is_frozen(&self, node: u32) -> bool {
        let who = self.life(node);
        self.sim.lease_end.get(&who).is_some_and(|end| *end <= self.sim.now())
    }

    fn run(&mut self, until: Option<quorate_membership::Instant>) {
        while let Some(at) = self.sim.schedule.next_at() {
            if at > until.unwrap_or(self.sim.now() + QUIET) {
                break;
            }
            self.sim.step();
        }
    }
}

impl World for Distributed {
    const HAS_MASTERS: bool = true;
    fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError> {
        self.sim.request(self.life(node), request)
    }
    fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.sim.convert(self.life(node), id, request)
    }
    fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.sim.unlock(self.life(node), id, request)
    }
    fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError> {
        self.sim.cancel(self.life(node), id)
    }
    fn exit(&mut self, node: u32, owner: u64) {
        let who = self.life(node);
        let now = self.sim.now();
        let effects = self.sim.nodes.get_mut(&who).map(|n| n.machine.close_owner(now, owner));
        self.sim.carry_out(who, effects.unwrap_or_default());
        self.is_silent = true;
    }
    fn purge(&mut self, node: u32, of: u32, pid: u32) {
        let who = self.life(node);
        let now = self.sim.now();
        let effects = self.sim.nodes.get_mut(&who).map(|n| n.machine.purge(now, NodeId(of), pid));
        self.sim.carry_out(who, effects.unwrap_or_default());
        self.is_silent = true;
    }
    fn has(&self, node: u32) -> bool {
        self.sim.nodes.contains_key(&self.life(node))
    }
    fn settle(&mut self) {
        self.run(None);
    }
    fn advance(&mut self, time: Duration) {
        let until = self.sim.now() + time;
        self.run(Some(until));
        self.sim.schedule.advance_to(until);
        self.run(None);
    }
    fn told(&mut self) -> Vec<(u32, LockId, Told)> {
        let is_silent = std::mem::take(&mut self.is_silent);
        let news = std::mem::take(&mut self.sim.told).into_iter().map(|(who, id, told)| {
            let told = match told {
                WorldTold::Done(completion) => Told::Done(completion),
                WorldTold::Blocking(mode) => Told::Blocking(mode),
            };
            (who.node.0, id, told)
        });
        self.withheld.extend(news.filter(|(.., t)| !is_silent || *t != Told::Done(Completion::Unlocked)));
        let all = std::mem::take(&mut self.withheld);
        let (withheld, out) = all.into_iter().partition(|(node, ..)| self.is_frozen(*node));
        self.withheld = withheld;
        out
    }
    fn undecided(&mut self) -> Vec<Vec<(u32, LockId)>> {
        let all = std::mem::take(&mut self.sim.undecided);
        all.into_iter().map(|c| c.into_iter().map(|(w, id)| (w.node.0, id)).collect()).collect()
    }
    fn show(&self, name: &LockName) -> Option<ResourceDump> {
        self.sim.nodes.values().flat_map(|n| n.machine.dump().resources).find(|r| r.name == *name)
    }
    fn fault(&mut self, fault: Fault) -> Result<(), NotHere> {
        match fault {
            Fault::Crash(node) => self.sim.crash(self.life(node), 1),
            Fault::Restart(node) => {
                let old = self.life(node);
                self.sim.crash(old, 1);
                let who = Identity::new(old.node, Incarnation(old.incarnation.0 + 1));
                self.lives.insert(node, who);
                self.sim.after(3, Event::Join { who });
            }
            Fault::Pause(node) => self.sim.pause(self.life(node)),
            Fault::Resume(node) => self.sim.resume(self.life(node)),
            Fault::Partition(sides) => self.partition(&sides),
            Fault::Heal => self.heal(),
            Fault::Fence(node, true) => {
                // A life that goes on alone is over with its lease; the fence waits for that.
                let who = self.life(node);
                let old = Identity::new(who.node, Incarnation(who.incarnation.0.saturating_sub(1)));
                let who = if self.sim.tip().debts.contains_key(&who) { who } else { old };
                self.sim.after(1, Event::Fence { who });
            }
            // A fence that failed proves nothing.
            Fault::Fence(_, false) => {}
            Fault::Replay(node) => {
                let who = self.life(node);
                let old = Identity::new(who.node, Incarnation(who.incarnation.0.saturating_sub(1)));
                let who = if self.sim.tip().debts.contains_key(&who) { who } else { old };
                self.sim.after(1, Event::Replay { who });
            }
        }
        Ok(())
    }
}
