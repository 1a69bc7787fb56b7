//! The child process `member`: one node of a cluster, which does what its parent tells it in lines.
//!
//! | order | what it does |
//! |---|---|
//! | `join N` | waits for N members and joins the lockspace |
//! | `hold FROM TO MODE` | takes and keeps a lock on each of these names |
//! | `ping N` | N times lock and unlock of name 0, each started by the completion of the one before |
//! | `block N` | the same from a thread that sleeps until each is done |
//! | `queue FLIGHT MS` | as many pairs as a completion queue can keep under way |
//! | `plain FLIGHT MS` | the same with a callback and a message for each |
//! | `watch FROM TO MS` | lock and unlock of these names in turn; how long each took, and when |
//! | `serve` | opens the lock service for programs, on `lock.sock` in its directory |
//! | `wait FROM TO` | asks for these in EX; when the last one was granted |

use super::local::name;
use crate::child::{pin, say};
use crate::node::BenchNode;
use crate::sample::percentile;
use quorate_dlm::service::{AccessRules, Client, LockServer, ServerConfig};
use quorate_dlm::{
    Completion, LockCallbacks, LockId, LockManager, LockQueue, LockRequest, Lockspace, LockspaceOptions,
    Mode, MoveOptions, UnlockRequest, What,
};
use quorate_membership::driver::boottime;
use quorate_membership::driver::transport::TransportKind;
use quorate_membership::{Membership, ResourceId, ResourceKind, View, ViewListener};
use std::error::Error;
use std::io::BufRead;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The lockspace of all measurements.
const SPACE: &str = "bench";

/// How long nodes of the kind `tcp-busy` look for the next message.
pub(crate) const BUSY_POLL: Duration = Duration::from_micros(200);

/// Names that the throughput rows go round through.
pub(crate) const NAMES: u64 = 4_096;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts completions, and wakes who waits for them.
#[derive(Default)]
struct Counter {
    granted: AtomicU64,
    done: AtomicU64,
    last_at: AtomicU64,
    mutex: Mutex<()>,
    wake: Condvar,
}

impl Counter {
    fn wait(&self, count: u64) {
        let mut guard = lock(&self.mutex);
        while self.done.load(Ordering::Acquire) < count {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl LockCallbacks for Counter {
    fn completion(&self, _: LockId, completion: Completion) {
        if matches!(completion, Completion::Granted(_)) {
            self.granted.fetch_add(1, Ordering::Relaxed);
        }
        self.last_at.store(boottime().0, Ordering::Release);
        let guard = lock(&self.mutex);
        self.done.fetch_add(1, Ordering::Release);
        drop(guard);
        self.wake.notify_one();
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

/// Lock and unlock again and again, each from the completion of the one before.
struct Ping {
    space: Arc<dyn Lockspace>,
    state: Mutex<PingState>,
    wake: Condvar,
}

struct PingState {
    left: u32,
    since: u64,
    lock_ns: Vec<f64>,
    unlock_ns: Vec<f64>,
}

/// What a measurement of single operations gives: the callbacks need themselves to go on.
struct PingCallbacks(Arc<Ping>);

impl Ping {
    fn start(self: &Arc<Self>) {
        lock(&self.state).since = boottime().0;
        let request = LockRequest::new(name(0), Mode::EX);
        let started = self.space.request(request, Arc::new(PingCallbacks(self.clone())));
        started.unwrap_or_else(|e| panic!("a lock: {e}"));
    }
}

impl LockCallbacks for PingCallbacks {
    fn completion(&self, id: LockId, completion: Completion) {
        let ping = &self.0;
        let now = boottime().0;
        let mut state = lock(&ping.state);
        let spent = (now - state.since) as f64;
        match completion {
            Completion::Granted(_) => {
                state.lock_ns.push(spent);
                state.since = boottime().0;
                drop(state);
                ping.space.unlock(id, UnlockRequest::default()).unwrap_or_else(|e| panic!("an unlock: {e}"));
            }
            _ => {
                state.unlock_ns.push(spent);
                state.left -= 1;
                let is_over = state.left == 0;
                drop(state);
                if is_over { ping.wake.notify_all() } else { ping.start() }
            }
        }
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

/// Notes when the debts of the lockspace were fenced and closed.
#[derive(Default)]
struct Watch {
    removed_at: AtomicU64,
    fenced_at: AtomicU64,
    closed_at: AtomicU64,
}

impl ViewListener for Watch {
    fn on_view(&self, view: &Arc<View>) {
        let resource = ResourceId::new(ResourceKind::Lockspace, SPACE);
        let mut owing = view.owing(&resource).peekable();
        let note = |at: &AtomicU64| {
            let _ = at.compare_exchange(0, boottime().0, Ordering::AcqRel, Ordering::Acquire);
        };
        if owing.peek().is_none() {
            if self.removed_at.load(Ordering::Acquire) != 0 {
                note(&self.fenced_at);
                note(&self.closed_at);
            }
            return;
        }
        note(&self.removed_at);
        if owing.all(|(_, item)| item.fenced) {
            note(&self.fenced_at);
        }
    }
}

fn transport(kind: &str) -> TransportKind {
    if kind == "quic" { TransportKind::Quic } else { TransportKind::Tcp }
}

/// `DIR ID CPU TRANSPORT [OTHER@ADDRESS]...`
pub(crate) fn run(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu, kind, contacts @ ..] = args else { return Err("member: arguments".into()) };
    pin(cpu)?;
    let contacts: Vec<(u32, SocketAddr)> = contacts
        .iter()
        .filter_map(|c| c.split_once('@'))
        .filter_map(|(id, address)| Some((id.parse().ok()?, address.parse().ok()?)))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let node = {
        let _context = runtime.enter();
        let busy = if kind == "tcp-busy" { BUSY_POLL } else { Duration::ZERO };
        BenchNode::start(Path::new(dir), id.parse()?, &contacts, transport(kind), busy)?
    };
    let watch = Arc::new(Watch::default());
    node.node.subscribe(watch.clone());
    say(&format!("ready {}", node.node.local_address()));
    let mut space: Option<Arc<dyn Lockspace>> = None;
    let kept: Arc<Counter> = Arc::default();
    let mut kept_count = 0;
    let mut _service = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| -> Result<u64, Box<dyn Error>> {
            Ok(words.get(at).ok_or("an order without its numbers")?.parse()?)
        };
        if words.first() == Some(&"join") {
            let count = usize::try_from(number(1)?)?;
            space = Some(runtime.block_on(async {
                node.wait_members(count).await;
                // What is measured here is a master elsewhere.
                let options =
                    LockspaceOptions { moves: MoveOptions::NEVER, ..LockspaceOptions::plain(SPACE) };
                node.dlm.join(&options).await
            })?);
            say("ok");
            continue;
        }
        if words.first() == Some(&"serve") {
            let config = ServerConfig { path: socket(Path::new(dir)), access: AccessRules::default() };
            let (me, manager) = (node.node.me(), node.dlm.clone());
            _service = Some(LockServer::start(config, me, manager, node.runtime.clone())?);
            say("ok");
            continue;
        }
        let space = space.clone().ok_or("not joined yet")?;
        match words.first().copied().unwrap_or_default() {
            "hold" => {
                let mode = if words.get(3) == Some(&"EX") { Mode::EX } else { Mode::PR };
                let mode = if words.get(3) == Some(&"NL") { Mode::NL } else { mode };
                // In parts, so that no queue is filled beyond its bounds.
                let all: Vec<u64> = (number(1)?..number(2)?).collect();
                for part in all.chunks(2_000) {
                    space.corked(&mut |space| {
                        for n in part {
                            let request = LockRequest::new(name(*n), mode);
                            space.request(request, kept.clone()).unwrap_or_else(|e| panic!("a lock: {e}"));
                        }
                    });
                    kept_count += part.len() as u64;
                    kept.wait(kept_count);
                }
                say("ok");
            }
            "ping" => say(&ping(&space, u32::try_from(number(1)?)?)),
            "block" => say(&block(&space, number(1)?)),
            "queue" => say(&queue(&space, number(1)?, Duration::from_millis(number(2)?))),
            "plain" => say(&plain(&space, number(1)?, Duration::from_millis(number(2)?))),
            "watch" => {
                let answer = watch_names(&space, number(1)?..number(2)?, Duration::from_millis(number(3)?));
                let load = |at: &AtomicU64| at.load(Ordering::Acquire);
                let (removed, fenced, closed) =
                    (load(&watch.removed_at), load(&watch.fenced_at), load(&watch.closed_at));
                let turn = node.dlm.stats().get(SPACE).map_or(0, |s| s.turn_max_ns);
                say(&format!("ok {removed} {fenced} {closed} {turn} {answer}"));
            }
            "wait" => {
                let waits: Arc<Counter> = Arc::default();
                for n in number(1)?..number(2)? {
                    space.request(LockRequest::new(name(n), Mode::EX), waits.clone())?;
                }
                say("ok");
                waits.wait(number(2)? - number(1)?);
                let turn = node.dlm.stats().get(SPACE).map_or(0, |s| s.turn_max_ns);
                say(&format!("ok {} {turn}", waits.last_at.load(Ordering::Acquire)));
            }
            other => return Err(format!("no such order: {other}").into()),
        }
    }
    Ok(())
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("lock.sock")
}

/// `DIR CPU COUNT`: a program that locks through the service of the member in that directory, as `ping` does.
pub(crate) fn program(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, cpu, count] = args else { return Err("program: arguments".into()) };
    pin(cpu)?;
    let client = Client::connect(&socket(Path::new(dir)))?;
    let space = client.open("programs", None)?;
    // A keeper: the resource stays, as it does where another node's lock is measured.
    let kept: Arc<Counter> = Arc::default();
    space.request(LockRequest::new(name(0), Mode::NL), kept.clone())?;
    kept.wait(1);
    ping(&space, 500);
    say(&ping(&space, count.parse()?));
    Ok(())
}

fn ping(space: &Arc<dyn Lockspace>, count: u32) -> String {
    let state = PingState { left: count, since: 0, lock_ns: Vec::new(), unlock_ns: Vec::new() };
    let ping = Arc::new(Ping { space: space.clone(), state: Mutex::new(state), wake: Condvar::new() });
    ping.start();
    let mut state = lock(&ping.state);
    while state.left != 0 {
        state = ping.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    let p = |v: &mut Vec<f64>, q| percentile(v, q);
    let PingState { lock_ns, unlock_ns, .. } = &mut *state;
    format!("ok {} {} {}", p(lock_ns, 50.0), p(lock_ns, 99.0), p(unlock_ns, 50.0))
}

fn block(space: &Arc<dyn Lockspace>, count: u64) -> String {
    let counter: Arc<Counter> = Arc::default();
    let mut lock_ns = Vec::new();
    for n in 0..count {
        let since = boottime().0;
        let id = space.request(LockRequest::new(name(0), Mode::EX), counter.clone());
        counter.wait(2 * n + 1);
        lock_ns.push((boottime().0 - since) as f64);
        let id = id.unwrap_or_else(|e| panic!("a lock: {e}"));
        space.unlock(id, UnlockRequest::default()).unwrap_or_else(|e| panic!("an unlock: {e}"));
        counter.wait(2 * n + 2);
    }
    format!("ok {} {}", percentile(&mut lock_ns, 50.0), percentile(&mut lock_ns, 99.0))
}

fn queue(space: &Arc<dyn Lockspace>, flight: u64, time: Duration) -> String {
    let queue = LockQueue::new(space.clone());
    let (mut next, mut pairs, mut under_way, mut told) = (0, 0u64, 0, Vec::new());
    let start = boottime();
    let is_over = || time <= boottime().since(start);
    let mut over = false;
    queue.batch(|batch| {
        for n in 0..flight {
            batch.request(LockRequest::new(name(n), Mode::EX)).unwrap_or_else(|e| panic!("a lock: {e}"));
        }
    });
    next += flight;
    under_way += flight;
    let mut end = start;
    while under_way != 0 {
        queue.wait_blocking(&mut told);
        over = over || is_over();
        queue.batch(|batch| {
            for one in told.drain(..) {
                if !matches!(one.what, What::Done(Completion::Granted(_))) {
                    continue;
                }
                batch.unlock(one.id, UnlockRequest::release()).unwrap_or_else(|e| panic!("an unlock: {e}"));
                pairs += 1;
                under_way -= 1;
                if !over {
                    let request = LockRequest::new(name(next % NAMES), Mode::EX);
                    batch.request(request).unwrap_or_else(|e| panic!("a lock: {e}"));
                    next += 1;
                    under_way += 1;
                }
            }
        });
        end = boottime();
    }
    format!("ok {}", pairs as f64 / end.since(start).as_secs_f64())
}

/// Goes on with the next pair from each completion.
struct Plain {
    space: Arc<dyn Lockspace>,
    next: AtomicU64,
    pairs: AtomicU64,
    until: u64,
    under_way: Mutex<u64>,
    wake: Condvar,
}

struct PlainCallbacks(Arc<Plain>);

impl Plain {
    fn start(self: &Arc<Self>) {
        let n = self.next.fetch_add(1, Ordering::Relaxed) % NAMES;
        let started =
            self.space.request(LockRequest::new(name(n), Mode::EX), Arc::new(PlainCallbacks(self.clone())));
        started.unwrap_or_else(|e| panic!("a lock: {e}"));
    }
}

impl LockCallbacks for PlainCallbacks {
    fn completion(&self, id: LockId, completion: Completion) {
        let plain = &self.0;
        match completion {
            Completion::Granted(_) => {
                plain.space.unlock(id, UnlockRequest::default()).unwrap_or_else(|e| panic!("an unlock: {e}"));
            }
            _ if boottime().0 < plain.until => {
                plain.pairs.fetch_add(1, Ordering::Relaxed);
                plain.start();
            }
            _ => {
                plain.pairs.fetch_add(1, Ordering::Relaxed);
                *lock(&plain.under_way) -= 1;
                plain.wake.notify_all();
            }
        }
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

fn plain(space: &Arc<dyn Lockspace>, flight: u64, time: Duration) -> String {
    let start = boottime();
    let plain = Arc::new(Plain {
        space: space.clone(),
        next: AtomicU64::new(0),
        pairs: AtomicU64::new(0),
        until: (start + time).0,
        under_way: Mutex::new(flight),
        wake: Condvar::new(),
    });
    (0..flight).for_each(|_| plain.start());
    let mut under_way = lock(&plain.under_way);
    while *under_way != 0 {
        under_way = plain.wake.wait(under_way).unwrap_or_else(PoisonError::into_inner);
    }
    let rate = plain.pairs.load(Ordering::Relaxed) as f64 / boottime().since(start).as_secs_f64();
    format!("ok {rate}")
}

/// p50, p99.9 and the longest, in nanoseconds, of lock operations by a thread that waits for each.
fn watch_names(space: &Arc<dyn Lockspace>, names: std::ops::Range<u64>, time: Duration) -> String {
    let counter: Arc<Counter> = Arc::default();
    let (mut spent, mut done) = (Vec::new(), 0);
    let start = boottime();
    for n in names.cycle() {
        if time <= boottime().since(start) {
            break;
        }
        let since = boottime().0;
        let id = space.request(LockRequest::new(name(n), Mode::EX), counter.clone());
        counter.wait(done + 1);
        spent.push((boottime().0 - since) as f64);
        let id = id.unwrap_or_else(|e| panic!("a lock: {e}"));
        space.unlock(id, UnlockRequest::release()).unwrap_or_else(|e| panic!("an unlock: {e}"));
        counter.wait(done + 2);
        done += 2;
    }
    let longest = spent.iter().copied().fold(0.0, f64::max);
    format!("{} {} {longest} {}", percentile(&mut spent, 50.0), percentile(&mut spent, 99.9), spent.len())
}
