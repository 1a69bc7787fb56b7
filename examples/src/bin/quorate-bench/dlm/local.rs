//! Locks whose master is this node: beside the kernel's own record locks.

use crate::Options;
use crate::node::{self, BenchNode, TempDir};
use crate::sample::{Sample, mean, nanos, percentile};
use crate::table::{Bar, Better, Row, Table};
use quorate_dlm::cache::{AcquireFlags, CacheClient, CacheConfig, CacheMode, LockCache};
use quorate_dlm::{
    Completion, LockCallbacks, LockId, LockManager, LockName, LockRequest, Lockspace, LockspaceOptions, Mode,
    UnlockRequest, ValueBlock,
};
use quorate_membership::driver::transport::TransportKind;
use quorate_membership::{BoxFuture, Membership};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::error::Error;
use std::fs::File;
use std::future::Future;
use std::pin::pin;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Pairs per run: about a tenth of a second.
const PAIRS: u32 = 200_000;
/// Locks of the memory row.
const LOCKS: u32 = 1_000_000;

struct Nobody;

impl CacheClient for Nobody {
    fn granted(&self, _: &LockName, _: CacheMode, _: Option<&ValueBlock>) {}
    fn demote<'a>(
        &'a self,
        _: &'a LockName,
        _: CacheMode,
        _: Option<CacheMode>,
        _: &'a mut ValueBlock,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

impl LockCallbacks for Nobody {
    fn completion(&self, _: LockId, completion: Completion) {
        assert!(matches!(completion, Completion::Granted(_) | Completion::Unlocked), "{completion:?}");
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

/// A name as GFS2 forms them: 24 bytes.
pub(crate) fn name(number: u64) -> LockName {
    LockName::new(format!("{:8x}{number:16x}", 2).as_bytes()).unwrap_or_else(|_| unreachable!("24 bytes"))
}

fn pair(space: &dyn Lockspace, name: &LockName, callbacks: &Arc<Nobody>) {
    let id = space.request(LockRequest::new(name.clone(), Mode::EX), callbacks.clone());
    let id = id.unwrap_or_else(|e| panic!("a lock: {e}"));
    space.unlock(id, UnlockRequest::default()).unwrap_or_else(|e| panic!("an unlock: {e}"));
}

/// What is done without waiting.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a cached lock is not waited for"),
    }
}

/// A node alone in its cluster, and its lockspace.
type Alone = (tokio::runtime::Runtime, TempDir, BenchNode, Arc<dyn Lockspace>);

fn alone() -> Result<Alone, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let dir = TempDir::new()?;
    node::create(dir.path(), 1)?;
    let (node, space) = runtime.block_on(async {
        let node = BenchNode::start(dir.path(), 1, &[], TransportKind::Tcp, std::time::Duration::ZERO)?;
        node.wait_members(1).await;
        let space = node.dlm.join(&LockspaceOptions::plain("bench")).await?;
        Ok::<_, Box<dyn Error>>((node, space))
    })?;
    Ok((runtime, dir, node, space))
}

/// An uncontended record lock, taken and given back: two system calls.
fn fcntl_pair(file: &File) {
    let locked = fcntl_lock(file, FlockOperation::NonBlockingLockExclusive);
    let unlocked = fcntl_lock(file, FlockOperation::NonBlockingUnlock);
    assert!(locked.is_ok() && unlocked.is_ok(), "{locked:?} {unlocked:?}");
}

pub(crate) fn measure(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    let keys = ["local", "create", "cached", "threads", "memory"];
    if keys.iter().all(|k| !options.wants(k)) {
        return Ok(());
    }
    let (_runtime, dir, node, space) = alone()?;
    let callbacks = Arc::new(Nobody);
    if options.wants("local") {
        let file = File::create(dir.path().join("file"))?;
        let one = name(1);
        let (mut ours, mut fcntl) = (Sample::default(), Sample::default());
        for _ in 0..options.runs {
            fcntl.add(mean(PAIRS, || fcntl_pair(&file)));
            ours.add(mean(PAIRS, || pair(&*space, &one, &callbacks)));
        }
        table.add(Row {
            key: "local",
            what: "lock + unlock, mastered here, one thread".into(),
            unit: "ns",
            better: Better::Less,
            ours,
            peer: Some(("fcntl F_SETLK lock + unlock on tmpfs".into(), fcntl)),
            bar: Bar::Faster(1.5),
        });
    }
    if options.wants("create") {
        let mut ours = Sample::default();
        let mut next = 1_000;
        for _ in 0..options.runs {
            ours.add(mean(PAIRS / 4, || {
                next += 1;
                pair(&*space, &name(next), &callbacks);
            }));
        }
        table.add(Row {
            key: "create",
            what: "the same on a name nobody has used: with creating the resource".into(),
            unit: "ns",
            better: Better::Less,
            ours,
            peer: None,
            bar: Bar::None,
        });
    }
    if options.wants("cached") {
        cached(options, table, &node, &space);
    }
    if options.wants("threads") {
        threads(options, table, &space);
    }
    drop((space, node));
    if options.wants("memory") {
        memory(options, table)?;
    }
    Ok(())
}

fn cached(options: &Options, table: &mut Table, node: &BenchNode, space: &Arc<dyn Lockspace>) {
    const BATCH: u32 = 100;
    let lease = node.node.lease();
    let config = CacheConfig::glocks();
    let cache = LockCache::new(space.clone(), node.runtime.clone(), lease, Arc::new(Nobody), config);
    let one = name(2);
    let acquire = || at_once(cache.acquire(&one, CacheMode::Exclusive, AcquireFlags::default()));
    let mut ours = Sample::default();
    for _ in 0..options.runs {
        let mut batches: Vec<f64> = (0..2_000).map(|_| mean(BATCH, || drop(acquire()))).collect();
        ours.add(percentile(&mut batches, 50.0));
    }
    table.add(Row {
        key: "cached",
        what: "cached lock, acquire + release, lease check included, p50".into(),
        unit: "ns",
        better: Better::Less,
        ours,
        peer: None,
        bar: Bar::AtMost(100.0),
    });
}

fn threads(options: &Options, table: &mut Table, space: &Arc<dyn Lockspace>) {
    let rate = |count: u64| {
        let spent = nanos(|| {
            std::thread::scope(|scope| {
                for t in 0..count {
                    scope.spawn(move || {
                        let callbacks = Arc::new(Nobody);
                        let names: Vec<_> = (0..64).map(|n| name(100 + 64 * t + n)).collect();
                        for n in 0..PAIRS as usize {
                            pair(&**space, &names[n % names.len()], &callbacks);
                        }
                    });
                }
            });
        });
        count as f64 * f64::from(PAIRS) / spent * 1e9
    };
    let (mut four, mut one) = (Sample::default(), Sample::default());
    for _ in 0..options.runs {
        one.add(rate(1));
        four.add(rate(4));
    }
    table.add(Row {
        key: "threads",
        what: "four threads, each lock + unlock on 64 resources of its own".into(),
        unit: "pairs/s",
        better: Better::More,
        ours: four,
        peer: Some(("one thread".into(), one)),
        bar: Bar::Faster(1.7),
    });
}

/// Bytes of memory that this process has in use.
fn resident_bytes() -> Result<f64, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = text.split(' ').nth(1).unwrap_or("0").parse()?;
    Ok(pages * rustix::param::page_size() as f64)
}

fn memory(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    let mut ours = Sample::default();
    for _ in 0..options.runs {
        let output = Command::new(std::env::current_exe()?).args(["child", "memory"]).output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
        ours.add(String::from_utf8(output.stdout)?.trim().parse()?);
    }
    table.add(Row {
        key: "memory",
        what: "memory of a granted lock with its resource (a million; resident set)".into(),
        unit: "bytes",
        better: Better::Less,
        ours,
        peer: None,
        bar: Bar::AtMost(400.0),
    });
    Ok(())
}

/// Takes a million locks and prints what each costs.
pub(crate) fn memory_child() -> Result<(), Box<dyn Error>> {
    let (_runtime, _dir, _node, space) = alone()?;
    let callbacks: Arc<Nobody> = Arc::new(Nobody);
    let before = resident_bytes()?;
    for n in 0..LOCKS {
        space.request(LockRequest::new(name(u64::from(n)), Mode::EX), callbacks.clone())?;
    }
    println!("{}", (resident_bytes()? - before) / f64::from(LOCKS));
    Ok(())
}
