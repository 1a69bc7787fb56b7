//! The lock cache over several handles of one local lock table: each handle behaves as a node.

use crate::support::TestRuntime;
use quorate_dlm::cache::{AcquireError, AcquireFlags, CacheClient, CacheConfig, CacheMode, Held, LockCache};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockName, LockspaceOptions, ValueBlock};
use quorate_membership::{BoxFuture, Instant, Lease};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const NONE: AcquireFlags =
    AcquireFlags { try_now: false, nudge: false, exact: false, recovery: false, no_cache: false };
const TRY: AcquireFlags = AcquireFlags { try_now: true, ..NONE };

#[derive(Default)]
struct Client {
    log: Mutex<Vec<String>>,
    broken: AtomicBool,
    leave_behind: Mutex<Option<ValueBlock>>,
}

impl Client {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl CacheClient for Client {
    fn granted(&self, name: &LockName, mode: CacheMode, value: Option<&ValueBlock>) {
        let first = value.and_then(|v| v.first());
        self.log.lock().unwrap().push(format!("granted {name} {mode:?} {first:?}"));
    }
    fn demote<'a>(
        &'a self,
        name: &'a LockName,
        from: CacheMode,
        to: Option<CacheMode>,
        value: &'a mut ValueBlock,
    ) -> BoxFuture<'a, Result<(), String>> {
        self.log.lock().unwrap().push(format!("demote {name} {from:?} {to:?}"));
        if let Some(left) = self.leave_behind.lock().unwrap().take() {
            *value = left;
        }
        let broken = self.broken.load(Ordering::SeqCst);
        Box::pin(async move {
            tokio::task::yield_now().await;
            if broken { Err("the device is gone".to_owned()) } else { Ok(()) }
        })
    }
    fn wanted(&self, name: &LockName, by: CacheMode) {
        self.log.lock().unwrap().push(format!("wanted {name} {by:?}"));
    }
}

struct Node {
    cache: LockCache,
    client: Arc<Client>,
    lease: Lease,
}

async fn nodes(count: u32, config: CacheConfig) -> Vec<Node> {
    let options = LockspaceOptions { value_bytes: 4, ..LockspaceOptions::plain("test") };
    let mut out = Vec::new();
    for manager in LocalManager::shared(count) {
        let space = manager.join(&options).await.unwrap();
        let (client, lease) = (Arc::new(Client::default()), Lease::forever());
        let cache = LockCache::new(space, TestRuntime::new(), lease.clone(), client.clone(), config);
        out.push(Node { cache, client, lease });
    }
    out
}

fn name(text: &str) -> LockName {
    LockName::new(text.as_bytes()).unwrap()
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), test).await.expect("a hang") })
}

fn with_values() -> CacheConfig {
    CacheConfig { value_block: |_| true, ..CacheConfig::eager() }
}

#[test]
fn a_released_lock_stays_and_is_taken_again_without_the_master() {
    run(async {
        let n = nodes(1, CacheConfig::glocks()).await;
        let held = n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap();
        let token = held.token();
        drop(held);
        assert_eq!(n[0].client.take(), ["granted a Exclusive None"]);
        let again = n[0].cache.acquire_cached(&name("a"), CacheMode::Shared).unwrap();
        assert_eq!((again.token(), again.mode()), (token, CacheMode::Shared));
        let beside = n[0].cache.acquire(&name("a"), CacheMode::Shared, TRY).await.unwrap();
        let refused = n[0].cache.acquire(&name("a"), CacheMode::Exclusive, TRY).await;
        assert_eq!(refused.unwrap_err(), AcquireError::WouldBlock);
        drop((again, beside));
        assert!(n[0].client.take().is_empty());
    });
}

#[test]
fn another_node_gets_it_after_the_last_user_let_go_and_the_client_wrote_back() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        let held = n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap();
        let a = name("a");
        let wait = n[1].cache.acquire(&a, CacheMode::Shared, NONE);
        let mut wait = Box::pin(wait);
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        assert_eq!(n[0].client.take(), ["granted a Exclusive None", "wanted a Shared"]);
        assert!(held.is_wanted());
        drop(held);
        let other = wait.await.unwrap();
        assert_eq!(n[0].client.take(), ["demote a Exclusive Some(Shared)"]);
        // Both share it now.
        let mine = n[0].cache.acquire(&name("a"), CacheMode::Shared, TRY).await.unwrap();
        assert!(mine.token() != other.token());
    });
}

#[test]
fn the_minimum_hold_time_keeps_a_lock_for_a_while_and_no_longer() {
    run(async {
        let config = CacheConfig {
            hold_min: Duration::from_millis(80),
            hold_max: Duration::from_millis(80),
            ..CacheConfig::glocks()
        };
        let n = nodes(2, config).await;
        let start = std::time::Duration::ZERO;
        let clock = TestRuntime::new();
        drop(n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap());
        let a = name("a");
        let mut wait = Box::pin(n[1].cache.acquire(&a, CacheMode::Exclusive, NONE));
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        // Wanted, but within the hold time: local users go on.
        drop(n[0].cache.acquire_cached(&name("a"), CacheMode::Exclusive).unwrap());
        wait.await.unwrap();
        let waited = quorate_membership::Runtime::now(&*clock).since(Instant(0)) - start;
        assert!(Duration::from_millis(40) <= waited, "{waited:?}");
    });
}

#[test]
fn two_nodes_that_want_more_than_they_share_both_get_it_in_turn() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        for node in &n {
            drop(node.cache.acquire(&name("a"), CacheMode::Shared, NONE).await.unwrap());
        }
        let counter = Mutex::new(0);
        let work = |node: &Node| {
            let cache = node.cache.clone();
            let counter = &counter;
            async move {
                for _ in 0..100 {
                    drop(cache.acquire(&name("a"), CacheMode::Shared, NONE).await.unwrap());
                    let held = cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap();
                    let seen = *counter.lock().unwrap();
                    tokio::task::yield_now().await;
                    *counter.lock().unwrap() = seen + 1;
                    drop(held);
                }
            }
        };
        futures_util::future::join(work(&n[0]), work(&n[1])).await;
        assert_eq!(*counter.lock().unwrap(), 200);
    });
}

#[test]
fn a_value_block_travels_with_the_lock_and_survives_it() {
    run(async {
        let n = nodes(2, with_values()).await;
        let held = n[0].cache.acquire(&name("v"), CacheMode::Exclusive, NONE).await.unwrap();
        assert_eq!(held.value(), Some(vec![0; 4]));
        held.set_value(vec![7; 4]);
        drop(held);
        let other = n[1].cache.acquire(&name("v"), CacheMode::Exclusive, NONE).await.unwrap();
        assert_eq!(other.value(), Some(vec![7; 4]));
        // The client may change what is left behind while it writes back.
        *n[1].client.leave_behind.lock().unwrap() = Some(vec![9; 4]);
        drop(other);
        let back = n[0].cache.acquire(&name("v"), CacheMode::Shared, NONE).await.unwrap();
        assert_eq!(back.value(), Some(vec![9; 4]));
    });
}

#[test]
fn a_lock_that_cannot_be_written_back_is_not_given_up() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        n[0].client.broken.store(true, Ordering::SeqCst);
        drop(n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap());
        let a = name("a");
        let mut wait = Box::pin(n[1].cache.acquire(&a, CacheMode::Exclusive, NONE));
        for _ in 0..20 {
            assert!(futures_util::poll!(wait.as_mut()).is_pending());
            tokio::task::yield_now().await;
        }
        let error = n[0].cache.acquire(&name("a"), CacheMode::Shared, NONE).await.unwrap_err();
        assert_eq!(error, AcquireError::Withdrawn("the device is gone".to_owned()));
        n[0].cache.shutdown().await;
    });
}

#[test]
fn exact_goes_down_and_no_cache_gives_back() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        drop(n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap());
        let exact = AcquireFlags { exact: true, ..NONE };
        drop(n[0].cache.acquire(&name("a"), CacheMode::Deferred, exact).await.unwrap());
        assert_eq!(n[0].client.take()[1..], ["demote a Exclusive Some(Deferred)"]);
        let no_cache = AcquireFlags { no_cache: true, ..NONE };
        let held = n[0].cache.acquire(&name("a"), CacheMode::Shared, no_cache).await.unwrap();
        drop(held);
        n[0].cache.drop_lock(&name("a")).await;
        let all = n[0].client.take();
        assert_eq!(all, ["demote a Deferred None", "granted a Shared None", "demote a Shared None"]);
        assert!(n[1].cache.acquire(&name("a"), CacheMode::Exclusive, TRY).await.is_ok());
    });
}

#[test]
fn a_try_that_nudges_makes_the_holder_give_up() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        drop(n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap());
        assert_eq!(
            n[1].cache.acquire(&name("a"), CacheMode::Shared, TRY).await.unwrap_err(),
            AcquireError::WouldBlock
        );
        assert!(n[0].cache.acquire_cached(&name("a"), CacheMode::Exclusive).is_some());
        let nudge = AcquireFlags { nudge: true, ..TRY };
        let mut tries = 0;
        let held = loop {
            match n[1].cache.acquire(&name("a"), CacheMode::Shared, nudge).await {
                Ok(held) => break held,
                Err(error) => assert_eq!(error, AcquireError::WouldBlock),
            }
            tries += 1;
            assert!(tries < 1000);
            tokio::task::yield_now().await;
        };
        assert!(0 < tries);
        drop(held);
    });
}

#[test]
fn without_a_lease_nothing_is_answered() {
    run(async {
        let n = nodes(1, CacheConfig::eager()).await;
        drop(n[0].cache.acquire(&name("a"), CacheMode::Shared, NONE).await.unwrap());
        n[0].lease.set(Instant(0));
        assert!(n[0].cache.acquire_cached(&name("a"), CacheMode::Shared).is_none());
        let refused = n[0].cache.acquire(&name("a"), CacheMode::Shared, TRY).await;
        assert!(matches!(refused, Err(AcquireError::Stopped(_))), "{refused:?}");
        let a = name("a");
        let mut wait = Box::pin(n[0].cache.acquire(&a, CacheMode::Shared, NONE));
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        n[0].lease.set(Instant(u64::MAX));
        wait.await.unwrap();
    });
}

#[test]
fn a_wait_that_is_dropped_leaves_nothing_behind() {
    run(async {
        let n = nodes(2, CacheConfig::eager()).await;
        let held = n[0].cache.acquire(&name("a"), CacheMode::Exclusive, NONE).await.unwrap();
        let a = name("a");
        let mut wait = Box::pin(n[1].cache.acquire(&a, CacheMode::Exclusive, NONE));
        assert!(futures_util::poll!(wait.as_mut()).is_pending());
        drop(wait);
        n[1].cache.shutdown().await;
        assert!(n[1].cache.is_empty());
        drop(held);
        n[0].cache.shutdown().await;
        assert!(n[0].cache.is_empty());
        let refused: Result<Held, _> = n[0].cache.acquire(&name("a"), CacheMode::Shared, NONE).await;
        assert!(matches!(refused, Err(AcquireError::Stopped(_))));
    });
}

#[test]
fn shrinking_gives_up_the_least_recently_used() {
    run(async {
        let n = nodes(1, CacheConfig::glocks()).await;
        for i in 0..10 {
            drop(n[0].cache.acquire(&name(&format!("l{i}")), CacheMode::Shared, NONE).await.unwrap());
        }
        assert!(n[0].cache.acquire_cached(&name("l0"), CacheMode::Shared).is_some());
        assert_eq!(n[0].cache.shrink(4), 6);
        while n[0].cache.len() != 4 {
            tokio::task::yield_now().await;
        }
        assert!(n[0].cache.acquire_cached(&name("l0"), CacheMode::Shared).is_some());
        assert!(n[0].cache.acquire_cached(&name("l1"), CacheMode::Shared).is_none());
    });
}
