//! The deadlock search, simulated: processes that take locks one after another and give them up all at once, on nodes that
//! fail. The oracle looks at the queues of all masters at one moment and knows every real cycle.
//!
//! * Never a false one: whoever is refused was part of a real cycle while it waited.
//! * Every real cycle ends within a second in which nothing fails.

use super::world::{Event, SPACE, Told, World};
use quorate_dlm::sim::Bug;
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockDump, LockId, LockName, LockRequest, LockspaceOptions, Mode,
    ResourceDump, UnlockRequest,
};
use quorate_membership::{Identity, Incarnation, Instant, NodeId, Rng};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a cycle may last while nothing fails, on a network without delays; each message on the way (suspicion, two
/// walks there and back, refusal, cancel, answer) may add its own.
const FOUND_WITHIN: Duration = Duration::from_secs(1);
const MESSAGES: u32 = 8;
/// When the faults end, and when everything must have.
const FAULTS_END: Instant = Instant(6_000_000_000);
const END: Instant = Instant(40_000_000_000);

/// A wait: which lock, and how often it waited before.
type Waiting = (Identity, LockId, u64);
/// Which process waits, with which wait, for which.
type Edges = BTreeMap<(Identity, u64), Vec<(Waiting, (Identity, u64))>>;

#[derive(Debug, Default)]
struct Process {
    /// Locks, and whether an operation is under way.
    locks: BTreeMap<LockId, (LockName, Option<Mode>, bool)>,
    /// What it takes still.
    wanted: Vec<(LockName, Mode, bool)>,
    /// It has all it wants.
    is_working: bool,
    rests_until: Instant,
}

/// What one run did.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    pub(super) grants: u64,
    pub(super) refused: u64,
    pub(super) cycles: u64,
    pub(super) crashes: u64,
}

struct Run {
    world: World,
    rng: Rng,
    owners: u64,
    names: Vec<LockName>,
    processes: BTreeMap<(Identity, u64), Process>,
    /// How often each lock has begun an operation, which numbers its waits.
    begun: BTreeMap<(Identity, LockId), u64>,
    /// Waits that were in a real cycle at some moment.
    doomed: BTreeSet<Waiting>,
    /// Since when a cycle of these waits is there.
    cycles: BTreeMap<Vec<Waiting>, Instant>,
    last_fault: Instant,
    summary: Summary,
}

fn name(i: u64) -> LockName {
    LockName::new(format!("name {i}").as_bytes()).unwrap()
}

/// Runs one seed.
///
/// # Panics
/// If an invariant is broken; the message says which.
pub(super) fn run(seed: u64, bug: Option<Bug>) -> Summary {
    let mut rng = Rng::new(seed ^ 0xDEAD_10C4);
    let nodes = 2 + rng.below(3) as u32;
    let mut world = World::new(nodes, rng.next_u64(), LockspaceOptions::plain(SPACE), bug);
    world.delay_max = Duration::from_micros(*rng.pick(&[300, 5_000, 40_000, 150_000]).unwrap());
    let names = (0..3 + rng.below(4)).map(name).collect();
    let owners = 1 + rng.below(3);
    let mut run = Run {
        world,
        rng,
        owners,
        names,
        processes: BTreeMap::new(),
        begun: BTreeMap::new(),
        doomed: BTreeSet::new(),
        cycles: BTreeMap::new(),
        last_fault: Instant(0),
        summary: Summary::default(),
    };
    let lives: Vec<Identity> = run.world.nodes.keys().copied().collect();
    for who in lives {
        run.world.after(30, Event::Act { who });
    }
    for _ in 0..run.rng.below(3) {
        let who = Identity::new(NodeId(1 + run.rng.below(u64::from(nodes)) as u32), Incarnation(0));
        let ms = 500 + run.rng.below(5_000);
        run.world.after(ms, Event::Act { who });
    }
    while run.world.schedule.next_at().is_some_and(|at| at <= END) {
        run.step();
    }
    let left: Vec<_> = run.processes.iter().filter(|(_, p)| !p.locks.is_empty()).collect();
    assert!(left.is_empty(), "liveness: processes that never end: {left:?}");
    run.summary
}

impl Run {
    fn step(&mut self) {
        if let Some(Some(Event::Act { who })) = self.world.step() {
            if who.incarnation == Incarnation(0) {
                self.fail(who.node);
            } else {
                self.act(who);
            }
        }
        // Refusals are judged by what was there before they took effect.
        self.listen();
        self.look();
    }

    fn fail(&mut self, node: NodeId) {
        let Some(who) = self.world.tip().identity(node).filter(|w| self.world.nodes.contains_key(w)) else {
            return;
        };
        self.summary.crashes += 1;
        self.last_fault = self.world.now();
        let detect = 20 + self.rng.below(200);
        self.world.crash(who, detect);
        self.processes.retain(|(w, _), _| *w != who);
        let next = Identity::new(who.node, Incarnation(who.incarnation.0 + 1));
        self.world.after(detect + 500, Event::Join { who: next });
        self.world.after(detect + 700, Event::Act { who: next });
    }

    fn act(&mut self, who: Identity) {
        if !self.world.nodes.contains_key(&who) || !self.world.is_attached(who) {
            if self.world.now() < FAULTS_END {
                self.world.after(50, Event::Act { who });
            }
            return;
        }
        for owner in 1..=self.owners {
            self.go_on((who, owner));
            self.listen();
        }
        let is_over = FAULTS_END <= self.world.now()
            && self.processes.iter().all(|((w, _), p)| *w != who || p.locks.is_empty());
        if !is_over {
            let ms = 1 + self.rng.below(30);
            self.world.after(ms, Event::Act { who });
        }
    }

    /// The next deed of a process that does not wait.
    fn go_on(&mut self, key: (Identity, u64)) {
        let now = self.world.now();
        let process = self.processes.entry(key).or_default();
        if now < process.rests_until || process.locks.values().any(|(.., under_way)| *under_way) {
            return;
        }
        if let Some((name, mode, convert)) = process.wanted.pop() {
            let held = process.locks.iter().find(|(_, (n, ..))| *n == name).map(|(id, _)| *id);
            match held {
                Some(id) => {
                    if convert {
                        process.locks.get_mut(&id).unwrap().2 = true;
                        *self.begun.entry((key.0, id)).or_default() += 1;
                        let flags = if self.rng.chance_ppm(300_000) { Flags::QUECVT } else { Flags::NONE };
                        let request = ConvertRequest::new(mode);
                        if self.world.convert(key.0, id, request.clone().flags(flags)).is_err() {
                            // A conversion down does not queue.
                            self.world.convert(key.0, id, request).unwrap();
                        }
                    }
                }
                None => {
                    let priority = self.rng.below(3) as i8;
                    let request =
                        LockRequest { priority, ..LockRequest::new(name.clone(), mode).owner(key.1) };
                    if let Ok(id) = self.world.request(key.0, request) {
                        *self.begun.entry((key.0, id)).or_default() += 1;
                        let process = self.processes.get_mut(&key).unwrap();
                        process.locks.insert(id, (name, None, true));
                    }
                }
            }
            return;
        }
        if !process.locks.is_empty() {
            // It works for a while with what it has, then gives it up.
            if !std::mem::replace(&mut process.is_working, true) {
                process.rests_until = now + Duration::from_millis(self.rng.below(400));
                return;
            }
            return self.give_up(key);
        }
        if now < FAULTS_END {
            for _ in 0..1 + self.rng.below(4) {
                let modes = [Mode::CR, Mode::CW, Mode::PR, Mode::PR, Mode::PW, Mode::EX, Mode::EX];
                let mode = *self.rng.pick(&modes).unwrap();
                let name = self.rng.pick(&self.names).cloned().unwrap();
                let process = self.processes.get_mut(&key).unwrap();
                if self.rng.chance_ppm(700_000) {
                    process.wanted.push((name, mode, false));
                } else {
                    process.wanted.push((name.clone(), mode, true));
                    process.wanted.push((name, Mode::PR, false));
                }
            }
        }
    }

    /// All at once: a process that has what it wanted, or was refused.
    fn give_up(&mut self, key: (Identity, u64)) {
        let Some(process) = self.processes.get_mut(&key) else { return };
        process.wanted.clear();
        process.is_working = false;
        process.rests_until = self.world.now() + Duration::from_millis(self.rng.below(10));
        let mut ids = Vec::new();
        for (id, (.., under_way)) in &mut process.locks {
            if !*under_way {
                *under_way = true;
                ids.push(*id);
            }
        }
        for id in ids {
            self.world.unlock(key.0, id, UnlockRequest::default()).unwrap();
        }
    }

    fn listen(&mut self) {
        for (who, id, told) in std::mem::take(&mut self.world.told) {
            let Told::Done(completion) = told else { continue };
            let found = self.processes.iter_mut().find(|((w, _), p)| *w == who && p.locks.contains_key(&id));
            let Some((key, process)) = found else { continue };
            let key = *key;
            let lock = process.locks.get_mut(&id).unwrap();
            lock.2 = false;
            match completion {
                Completion::Granted(grant) => {
                    lock.1 = Some(grant.mode);
                    self.summary.grants += 1;
                }
                Completion::Deadlock => {
                    let is_conversion = lock.1.is_some();
                    let name = lock.0.clone();
                    if !is_conversion {
                        process.locks.remove(&id);
                    }
                    self.summary.refused += 1;
                    let wait = (who, id, self.begun[&(who, id)]);
                    // A conversion deadlock is refused before it ever waits; the master knows that one by itself.
                    assert!(
                        is_conversion || self.doomed.contains(&wait),
                        "false deadlock: {who} {id:?} on {name} is refused and never was in a cycle"
                    );
                    self.give_up(key);
                }
                _ => {
                    process.locks.remove(&id);
                }
            }
        }
    }

    /// Every real cycle there is now.
    fn look(&mut self) {
        let mut edges = Edges::new();
        for (who, node) in &self.world.nodes {
            if !self.world.is_attached(*who) || !self.world.tip().contains(*who) {
                continue;
            }
            for resource in node.machine.dump().resources {
                self.edges_of(&resource, &mut edges);
            }
        }
        let now = self.world.now();
        let mut found: BTreeSet<Vec<Waiting>> = BTreeSet::new();
        for start in edges.keys() {
            // The shortest way back to it, if there is one.
            let mut from: BTreeMap<(Identity, u64), ((Identity, u64), Waiting)> = BTreeMap::new();
            let mut next = std::collections::VecDeque::from([*start]);
            while let Some(user) = next.pop_front() {
                for (wait, to) in edges.get(&user).into_iter().flatten() {
                    if *to != user && !from.contains_key(to) {
                        from.insert(*to, (user, *wait));
                        next.push_back(*to);
                    }
                }
            }
            let mut cycle = Vec::new();
            let mut at = *start;
            while let Some((before, wait)) = from.get(&at) {
                cycle.push(*wait);
                at = *before;
                if at == *start {
                    break;
                }
            }
            if !cycle.is_empty() {
                self.doomed.extend(cycle.iter().copied());
                cycle.sort_unstable();
                found.insert(cycle);
            }
        }
        self.cycles.retain(|c, _| found.contains(c));
        for cycle in found {
            let since = *self.cycles.entry(cycle.clone()).or_insert_with(|| {
                self.summary.cycles += 1;
                now
            });
            // A failure is over when its view has reached everybody and everything is rebuilt.
            let quiet = self.last_fault + Duration::from_secs(2);
            let since = since.max(quiet.min(now));
            let within = FOUND_WITHIN + self.world.delay_max * MESSAGES;
            assert!(now.since(since) < within, "late: a cycle lasts since {since:?}: {cycle:?}");
        }
    }

    fn edges_of(&self, resource: &ResourceDump, edges: &mut Edges) {
        let user = |l: &LockDump| (l.node, l.owner);
        let queues = [(&resource.converting, true), (&resource.waiting, false)];
        for (queue, is_conversion) in queues {
            for (at, lock) in queue.iter().enumerate() {
                let Some(wanted) = lock.requested else { continue };
                let begun = self.begun.get(&(lock.node, LockId(lock.id))).copied().unwrap_or(0);
                let wait = (lock.node, LockId(lock.id), begun);
                let held = resource.granted.iter().chain(&resource.converting);
                let in_mode = held.filter(|o| (o.node, o.id) != (lock.node, lock.id) && !o.dead);
                let in_mode = in_mode.filter(|o| o.granted.is_some_and(|g| !g.is_compatible(wanted)));
                let ahead = queue[..at].iter();
                let before = resource.converting.iter().filter(|_| !is_conversion);
                for other in in_mode.chain(ahead).chain(before) {
                    edges.entry(user(lock)).or_default().push((wait, user(other)));
                }
            }
        }
    }
}
