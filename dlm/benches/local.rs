//! What a lock costs on the node that has it: `cargo bench -p quorate-dlm --no-default-features`.

use quorate_dlm::cache::{AcquireFlags, CacheClient, CacheConfig, CacheMode, LockCache};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{
    Completion, LockCallbacks, LockId, LockManager, LockName, LockRequest, LockspaceOptions, Mode,
    UnlockRequest, ValueBlock,
};
use quorate_membership::{BoxFuture, Instant, Lease, Runtime};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

struct Clock(std::time::Instant);

impl Runtime for Clock {
    fn now(&self) -> Instant {
        Instant(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
    fn sleep_until(&self, _: Instant) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
    fn spawn(&self, _: BoxFuture<'static, ()>) {}
}

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
    fn completion(&self, _: LockId, _: Completion) {}
    fn blocking(&self, _: LockId, _: Mode) {}
}

fn now<T>(future: impl Future<Output = T>) -> T {
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut cx) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn measure(what: &str, mut work: impl FnMut()) {
    const BATCH: u32 = 1_000;
    let mut batches: Vec<f64> = (0..1_000)
        .map(|_| {
            let start = std::time::Instant::now();
            (0..BATCH).for_each(|_| work());
            start.elapsed().as_nanos() as f64 / f64::from(BATCH)
        })
        .collect();
    batches.sort_by(f64::total_cmp);
    println!("{what}: p50 {:.0} ns, p99 {:.0} ns (of means of {BATCH})", batches[500], batches[990]);
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn main() {
    let manager = LocalManager::new();
    let space = now(manager.join(&LockspaceOptions::plain("bench"))).expect("joins");
    let name = LockName::new(b"       2           1c7a3").expect("short");
    let runtime = Arc::new(Clock(std::time::Instant::now()));
    let cache =
        LockCache::new(space.clone(), runtime, Lease::forever(), Arc::new(Nobody), CacheConfig::glocks());
    drop(now(cache.acquire(&name, CacheMode::Exclusive, AcquireFlags::default())));
    measure("cached lock, acquire and release", || {
        drop(now(cache.acquire(&name, CacheMode::Exclusive, AcquireFlags::default())));
    });
    let keeper = LockName::new(b"a name with a keeper").expect("short");
    let nobody: Arc<Nobody> = Arc::new(Nobody);
    let _keeper = space.request(LockRequest::new(keeper.clone(), Mode::NL), nobody.clone());
    measure("lock and unlock at the local master", || {
        if let Ok(id) = space.request(LockRequest::new(keeper.clone(), Mode::EX), nobody.clone()) {
            let _ = space.unlock(id, UnlockRequest::default());
        }
    });
}
