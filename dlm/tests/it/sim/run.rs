//! One simulated run: a drawn workload on drawn faults, checked after every step; then the faults stop and it must heal.

use super::world::{Event, SPACE, Told, World, mount, space_id};
use crate::invariants::{Checks, Watched};
use quorate_dlm::sim::Bug;
use quorate_dlm::sim::history::History;
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockId, LockName, LockRequest, LockspaceOptions, Mode, MoveOptions,
    UnlockRequest,
};
use quorate_membership::{Identity, Incarnation, Instant, NodeId, Rng};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The size of value blocks: one number.
const VALUE_BYTES: usize = 8;

/// A lock of the workload.
#[derive(Clone, Debug)]
struct Lock {
    name: LockName,
    granted: Option<Mode>,
    is_pending: bool,
    uses_value: bool,
    /// Keeps the name and its value block.
    is_keeper: bool,
    /// Nobody else uses the name.
    is_private: bool,
}

/// What one run did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) grants: u64,
    pub(crate) crashes: u64,
    pub(crate) held_grants: u64,
    pub(crate) values: u64,
    pub(crate) messages: u64,
    pub(crate) private: u64,
    pub(crate) leaves: u64,
    /// Reads and writes of value blocks that the history puts in order.
    pub(crate) ordered: u64,
    /// Resources that moved to the node that used them.
    pub(crate) moves: u64,
}

struct Run {
    world: World,
    rng: Rng,
    nodes: u32,
    names: Vec<LockName>,
    locks: BTreeMap<(Identity, LockId), Lock>,
    checks: Checks,
    history: History,
    /// Lives that act, as far as the history knows.
    acting: BTreeSet<Identity>,
    judge: Judge,
    writes: u64,
    faulty: bool,
    summary: Summary,
}

fn options(holds: bool, moves: MoveOptions) -> LockspaceOptions {
    LockspaceOptions {
        value_bytes: VALUE_BYTES,
        holds: holds.then_some(Mode::EX),
        moves,
        ..LockspaceOptions::plain(SPACE)
    }
}

fn private_name(who: Identity) -> LockName {
    LockName::new(format!("private {who}").as_bytes()).unwrap()
}

/// Who looks at a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judge {
    /// The invariants after every step, and the history at the end.
    All,
    /// The history alone: what users can see.
    History,
}

/// Runs one seed.
///
/// # Panics
/// If an invariant is broken; the message says which.
pub(crate) fn run(seed: u64, bug: Option<Bug>, judge: Judge) -> Summary {
    let mut rng = Rng::new(seed);
    let nodes = 2 + rng.below(4) as u32;
    let holds = rng.chance_ppm(500_000);
    let after = *rng.pick(&[0, 1, 1, 2, 3]).unwrap();
    let moves = MoveOptions { after, rest_ms: *rng.pick(&[0, 0, 30]).unwrap() };
    let mut world = World::new(nodes, rng.next_u64(), options(holds, moves), bug);
    world.delay_max = Duration::from_micros(*rng.pick(&[300, 2_000, 20_000, 100_000]).unwrap());
    let names = (0..=rng.below(6)).map(|i| LockName::new(format!("name {i}").as_bytes()).unwrap()).collect();
    let checks = Checks::new(holds);
    let mut run = Run {
        world,
        rng,
        nodes,
        names,
        locks: BTreeMap::new(),
        checks,
        history: History::default(),
        acting: BTreeSet::new(),
        judge,
        writes: 0,
        faulty: true,
        summary: Summary::default(),
    };
    let lives: Vec<Identity> = run.world.nodes.keys().copied().collect();
    for who in lives {
        run.settle_in(who);
    }
    run.faults();
    run.until(Instant(4_000_000_000));
    if judge == Judge::History {
        run.judge_history();
    }
    run.heal();
    run.judge_history();
    run.summary.messages = run.world.messages;
    run.summary.moves = run.world.nodes.values().map(|n| n.machine.moved_in()).sum();
    run.summary
}

impl Run {
    /// A life of a node starts to work, and mounts the filesystem if there are holds.
    fn settle_in(&mut self, who: Identity) {
        if self.checks.has_holds {
            self.world.after(2, Event::Propose { by: who, request: mount() });
        }
        let ms = 3 + self.rng.below(50);
        self.world.after(ms, Event::Act { who });
    }

    /// Draws when which node fails, and how.
    fn faults(&mut self) {
        let count = self.rng.below(u64::from(self.nodes) + 1);
        for _ in 0..count {
            let node = NodeId(1 + self.rng.below(u64::from(self.nodes)) as u32);
            let ms = 300 + self.rng.below(2_500);
            // The life is known when the time has come.
            let who = Identity::new(node, Incarnation(0));
            self.world.after(ms, Event::Act { who });
        }
    }

    fn until(&mut self, end: Instant) {
        while self.world.schedule.next_at().is_some_and(|at| at <= end) {
            self.step();
        }
    }

    fn step(&mut self) {
        if let Some(Some(Event::Act { who })) = self.world.step() {
            if who.incarnation == Incarnation(0) {
                self.fail(who.node);
            } else {
                self.act(who);
            }
        }
        self.listen();
        self.check();
    }

    fn check(&mut self) {
        if self.judge == Judge::History {
            return;
        }
        let watched = Watched { world: &self.world };
        self.checks.check(&watched);
    }

    fn judge_history(&mut self) {
        match self.history.judge() {
            Ok(found) => self.summary.ordered = found.reads + found.writes,
            Err(text) => panic!("{text}"),
        }
    }

    /// Lives whose time is over use nothing any more.
    fn bury(&mut self) {
        for who in &self.acting {
            if self.world.tip().identity(who.node) != Some(*who) {
                self.history.removed(*who);
            }
        }
        let gone: Vec<Identity> = self.acting.iter().filter(|w| !self.world.may_act(**w)).copied().collect();
        for who in gone {
            self.acting.remove(&who);
            self.history.died(who);
        }
    }

    /// Takes what locks were told.
    fn listen(&mut self) {
        self.bury();
        for (who, id, told) in std::mem::take(&mut self.world.told) {
            let Told::Done(completion) = told else { continue };
            let key = (who, id);
            let Some(lock) = self.locks.get_mut(&key) else { continue };
            if std::env::var("QUORATE_TRACE").is_ok_and(|n| lock.name.to_string() == n) {
                println!("{:?} {who} {id:?} {completion:?} tip {}", self.world.now(), self.world.tip().epoch);
            }
            lock.is_pending = false;
            match completion {
                Completion::Granted(grant) => {
                    self.summary.grants += 1;
                    lock.granted = Some(grant.mode);
                    let number =
                        grant.value.as_ref().map(|v| u64::from_le_bytes(v.as_slice().try_into().unwrap()));
                    self.history.granted(key, grant.mode, number.filter(|_| !grant.value_invalid));
                    if let Some(value) = &grant.value
                        && !grant.value_invalid
                    {
                        self.summary.values += 1;
                        let number = u64::from_le_bytes(value.as_slice().try_into().unwrap());
                        if self.judge == Judge::All {
                            self.checks.value.read(&lock.name, grant.token, number);
                        }
                    }
                    let name = lock.name.clone();
                    if self.judge == Judge::History {
                        continue;
                    }
                    self.checks.tokens.granted(&name, key, grant.mode, grant.token);
                    if self.checks.held.granted(&self.world, who, &name, grant.mode) {
                        self.summary.held_grants += 1;
                    }
                }
                Completion::Unlocked | Completion::Stopped => {
                    self.history.unlocked(key);
                    self.locks.remove(&key);
                }
                _ if lock.granted.is_none() => {
                    self.history.refused(key);
                    self.locks.remove(&key);
                }
                _ => self.history.refused(key),
            }
        }
    }

    fn fail(&mut self, node: NodeId) {
        let Some(who) = self.world.tip().identity(node).filter(|_| self.faulty) else { return };
        if std::env::var("QUORATE_TRACE").is_ok() {
            println!("{:?} fault at {who}", self.world.now());
        }
        let Some(sim) = self.world.nodes.get(&who) else { return };
        if sim.is_isolated {
            return;
        }
        if self.rng.chance_ppm(200_000) && !sim.is_leaving && self.world.is_attached(who) {
            return self.leave(who);
        }
        self.summary.crashes += 1;
        let detect = 20 + self.rng.below(200);
        if self.rng.chance_ppm(400_000) {
            let lease = detect + self.rng.below(200);
            self.checks.held.failed(&self.world, who, true);
            self.world.isolate(who, detect, lease);
        } else {
            self.checks.held.failed(&self.world, who, false);
            self.world.crash(who, detect);
            self.locks.retain(|(w, _), _| *w != who);
        }
        let ms = detect + self.rng.below(800);
        let next = Identity::new(who.node, Incarnation(who.incarnation.0 + 1));
        self.world.after(ms, Event::Join { who: next });
        self.settle_later(next, ms);
    }

    fn settle_later(&mut self, who: Identity, ms: u64) {
        if self.checks.has_holds {
            self.world.after(ms + 60, Event::Propose { by: who, request: mount() });
        }
        self.world.after(ms + 100, Event::Act { who });
    }

    /// Gives all locks up and leaves the lockspace.
    fn leave(&mut self, who: Identity) {
        self.summary.leaves += 1;
        if let Some(node) = self.world.nodes.get_mut(&who) {
            node.is_leaving = true;
        }
        self.give_up(who);
    }

    fn give_up(&mut self, who: Identity) {
        let mine: Vec<LockId> = self.locks.keys().filter(|(w, _)| *w == who).map(|(_, id)| *id).collect();
        for id in mine {
            if self.world.unlock(who, id, UnlockRequest::default()).is_ok() {
                self.history.unlock((who, id), None);
            }
            self.listen();
        }
    }

    /// One deed of a node's users; then the next is planned.
    fn act(&mut self, who: Identity) {
        let exists = self.world.nodes.contains_key(&who);
        let later = self.world.now() < Instant(4_000_000_000);
        if !exists {
            if later && self.world.tip().lives.get(&who.node).is_none_or(|l| *l < who.incarnation) {
                // It has not joined yet.
                self.world.after(50, Event::Act { who });
            }
            return;
        }
        let (is_leaving, is_isolated) =
            self.world.nodes.get(&who).map_or((false, false), |n| (n.is_leaving, n.is_isolated));
        if is_leaving {
            let idle = self.world.nodes.get(&who).is_some_and(|n| n.machine.is_idle());
            if idle && !is_isolated && self.world.is_attached(who) {
                let now = self.world.now();
                let effects = self.world.nodes.get_mut(&who).map(|n| n.machine.leave(now));
                self.world.carry_out(who, effects.unwrap_or_default());
            }
            if self.world.is_attached(who) {
                self.world.after(20, Event::Act { who });
            }
            return;
        }
        if self.faulty && self.world.may_act(who) {
            self.use_private(who);
            self.do_something(who);
        }
        if self.faulty {
            let ms = 1 + self.rng.below(40);
            self.world.after(ms, Event::Act { who });
        }
    }

    /// A name that nobody else uses, mastered here: nothing may ever make its user wait.
    fn use_private(&mut self, who: Identity) {
        let name = private_name(who);
        let mine = self.locks.iter().find(|((w, _), l)| *w == who && l.is_private);
        let Some((key, lock)) = mine.map(|(k, l)| (*k, l.clone())) else {
            return self.request(who, name, Mode::NL, Flags::NONE, (false, true));
        };
        if lock.is_pending || lock.granted.is_none() {
            return;
        }
        // Begun in a bucket that a failed node may know more of, it is no name that recovery must leave alone.
        let dump = self.world.nodes[&who].machine.dump();
        let is_here = dump.resources.iter().any(|r| r.name == name && r.assumed.is_empty());
        let mode = if lock.granted == Some(Mode::EX) { Mode::NL } else { Mode::EX };
        let request = ConvertRequest::new(mode);
        self.world.convert(who, key.1, request).unwrap();
        self.history.convert(key, mode, false, None);
        if let Some(lock) = self.locks.get_mut(&key) {
            lock.is_pending = true;
        }
        self.listen();
        if is_here && self.judge == Judge::All {
            self.summary.private += 1;
            self.checks.untouched(&name, self.locks.get(&key).is_some_and(|l| !l.is_pending));
        }
    }

    fn request(&mut self, who: Identity, name: LockName, mode: Mode, flags: Flags, kind: (bool, bool)) {
        let request = LockRequest::new(name.clone(), mode).flags(flags);
        if let Ok(id) = self.world.request(who, request) {
            let (is_keeper, is_private) = kind;
            let uses_value = flags.has(Flags::VALBLK);
            self.acting.insert(who);
            self.history.request((who, id), &name, mode, uses_value);
            let lock = Lock { name, granted: None, is_pending: true, uses_value, is_keeper, is_private };
            self.locks.insert((who, id), lock);
        }
        self.listen();
    }

    fn do_something(&mut self, who: Identity) {
        let Some(name) = self.rng.pick(&self.names).cloned() else { return };
        let mine: Vec<(LockId, Lock)> = self
            .locks
            .iter()
            .filter(|((w, _), l)| *w == who && l.name == name)
            .map(|((_, id), l)| (*id, l.clone()))
            .collect();
        if !mine.iter().any(|(_, l)| l.is_keeper) {
            return self.request(who, name, Mode::NL, Flags::VALBLK, (true, false));
        }
        let Some((id, lock)) = self.rng.pick(&mine).cloned() else { return };
        let modes = [Mode::NL, Mode::CR, Mode::CW, Mode::PR, Mode::PW, Mode::EX, Mode::EX];
        let mode = *self.rng.pick(&modes).unwrap();
        if mine.len() < 3 && self.rng.chance_ppm(200_000) {
            let mut flags = if self.rng.chance_ppm(700_000) { Flags::VALBLK } else { Flags::NONE };
            if self.rng.chance_ppm(150_000) {
                flags = flags | Flags::NOQUEUE;
            }
            if self.rng.chance_ppm(100_000) {
                flags = flags | Flags::NORECOVERYWAIT;
            }
            return self.request(who, name, mode, flags, (false, false));
        }
        if lock.is_pending {
            if self.rng.chance_ppm(100_000) {
                let _ = self.world.cancel(who, id);
                self.listen();
            } else if !lock.is_keeper && self.rng.chance_ppm(50_000) {
                if self.world.unlock(who, id, UnlockRequest::default()).is_ok() {
                    self.history.unlock((who, id), None);
                }
                self.listen();
            }
            return;
        }
        let granted = lock.granted.unwrap();
        let writes = Mode::PW <= granted && self.rng.chance_ppm(700_000);
        let mut flags = if lock.uses_value { Flags::VALBLK } else { Flags::NONE };
        let value = (writes && lock.uses_value).then(|| {
            self.writes += 1;
            self.writes.to_le_bytes().to_vec()
        });
        if Mode::PW <= granted && value.is_none() {
            flags = Flags::NONE;
        }
        if !lock.is_keeper && self.rng.chance_ppm(250_000) {
            if value.is_none() && self.rng.chance_ppm(500_000) {
                flags = flags | Flags::RELEASE;
            }
            let written = value.as_ref().map(|_| self.writes);
            if self.world.unlock(who, id, UnlockRequest { flags, value }).is_ok() {
                self.history.unlock((who, id), written);
            }
        } else {
            // Holders come down again, or nobody gets anywhere.
            let mode =
                if Mode::CR < granted { *self.rng.pick(&[Mode::NL, Mode::NL, mode]).unwrap() } else { mode };
            if mode == granted {
                return;
            }
            let written = value.as_ref().map(|_| self.writes);
            if self.world.convert(who, id, ConvertRequest::new(mode).flags(flags).value(value)).is_ok() {
                self.history.convert((who, id), mode, flags.has(Flags::VALBLK), written);
            }
        }
        if let Some(lock) = self.locks.get_mut(&(who, id)) {
            lock.is_pending = true;
        }
        self.listen();
    }

    /// No more faults: everybody comes back, debts are paid, everything asked for is answered, nothing is left.
    fn heal(&mut self) {
        self.faulty = false;
        let end = self.world.now() + Duration::from_secs(20);
        while !self.is_whole() {
            let at = self.world.schedule.next_at();
            assert!(at.is_some_and(|at| at <= end), "liveness: it does not heal: {}", self.complain());
            self.step();
        }
        let lives: Vec<Identity> = self.world.nodes.keys().copied().collect();
        self.locks.retain(|(who, _), _| lives.contains(who));
        for who in &lives {
            self.give_up(*who);
        }
        self.until(self.world.now() + Duration::from_secs(5));
        assert!(self.locks.is_empty(), "liveness: operations without an end: {:?}", self.locks);
        // One that has left keeps what was frozen, for nobody.
        for who in lives.iter().filter(|who| self.world.is_attached(**who)) {
            let dump = self.world.nodes[who].machine.dump();
            assert!(self.world.nodes[who].machine.is_idle(), "leak: {who} is not idle: {dump:?}");
            assert!(dump.resources.is_empty(), "leak: at {who}: {dump:?}");
        }
        // And each can have everything.
        let names = self.names.clone();
        for (who, name) in lives.iter().flat_map(|w| names.iter().map(move |n| (*w, n.clone()))) {
            if !self.world.is_attached(who) {
                continue;
            }
            self.request(who, name.clone(), Mode::EX, Flags::VALBLK, (false, false));
            self.until(self.world.now() + Duration::from_secs(1));
            let got = self.locks.values().filter(|l| l.granted == Some(Mode::EX)).count();
            assert_eq!(got, 1, "liveness: {who} does not get {name}: {}", self.complain());
            self.give_up(who);
            self.until(self.world.now() + Duration::from_secs(1));
        }
    }

    fn is_whole(&self) -> bool {
        let tip = self.world.tip();
        tip.debts.is_empty()
            && self.world.nodes.iter().all(|(who, n)| {
                !n.is_isolated
                    && tip.contains(*who)
                    && self.world.installed(*who) == tip.epoch
                    && (n.is_leaving && !self.world.is_attached(*who)
                        || self.world.is_attached(*who) && !n.is_leaving && n.machine.is_ready())
            })
            && tip.identities().all(|who| self.world.nodes.contains_key(&who))
    }

    fn complain(&self) -> String {
        let dumps: Vec<_> = self.world.nodes.iter().map(|(w, n)| (w, n.machine.dump().recovery)).collect();
        let attached: Vec<_> = self.world.tip().attached(&space_id()).map(|a| a.owner).collect();
        format!("debts {:?}, attached {attached:?}, {dumps:?}", self.world.tip().debts)
    }
}
