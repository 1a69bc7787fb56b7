//! The driver: lock managers of several nodes in one process, over a membership and sessions that decide and deliver at
//! once. The record of views is the cluster's own code.

use crate::support::{Recorder, TestRuntime, Told};
use quorate_dlm::cache::{AcquireFlags, CacheClient, CacheConfig, CacheMode, LockCache};
use quorate_dlm::{
    Completion, ConvertRequest, Dlm, Flags, JoinError, LockError, LockId, LockManager, LockName, LockQueue,
    LockRequest, Lockspace, LockspaceOptions, Mode, UnlockRequest, ValueBlock, What,
};
use quorate_membership::machine::{decide, join, remove};
use quorate_membership::{
    BoxFuture, Cause, ClusterId, Decision, Epoch, Identity, Incarnation, Instant, Lease, Membership, NodeId,
    Proof, Request, RequestError, SendError, ServiceId, SessionHandler, Sessions, StateId, View,
    ViewListener, Voter, VoterSet,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is to be delivered: in one order for all, so that no message overtakes the view of its epoch.
enum Work {
    View(Identity, Arc<View>),
    Message(Identity, Identity, Epoch, Vec<u8>),
}

#[derive(Default)]
struct State {
    view: Option<Arc<View>>,
    number: u64,
    work: VecDeque<Work>,
    busy: bool,
    sent: usize,
    listeners: BTreeMap<Identity, Arc<dyn ViewListener>>,
    handlers: BTreeMap<Identity, Arc<dyn SessionHandler>>,
}

#[derive(Default)]
struct Cluster(Mutex<State>);

impl Cluster {
    fn new(count: u32) -> Arc<Self> {
        let voter = |n: u32| Voter { state: StateId::from_bytes([n as u8; 16]), votes: 1 };
        let mut first = View::empty(ClusterId::from_bytes([7; 16]));
        let voters = (1..=count).map(|n| (NodeId(n), voter(n))).collect();
        first.voters = VoterSet { voters, tie_breaker: None, expected: 0 };
        let cluster = Arc::new(Self::default());
        cluster.0.lock().unwrap().view =
            Some(Arc::new(join(&first, &(1..=count).map(|n| (life(n), 1)).collect())));
        cluster
    }

    fn view(&self) -> Arc<View> {
        self.0.lock().unwrap().view.clone().unwrap()
    }

    fn decide(&self, next: View) -> Arc<View> {
        let next = Arc::new(next);
        {
            let mut state = self.0.lock().unwrap();
            state.view = Some(next.clone());
            let members: Vec<Identity> = next.identities().collect();
            state.work.extend(members.into_iter().map(|m| Work::View(m, next.clone())));
        }
        self.run();
        next
    }

    fn propose(&self, by: Identity, request: &Request) -> Result<Arc<View>, RequestError> {
        let (view, number) = {
            let mut state = self.0.lock().unwrap();
            state.number += 1;
            (state.view.clone().unwrap(), state.number)
        };
        match decide(&view, by, number, request) {
            Ok(Some(next)) => Ok(self.decide(next)),
            Ok(None) => Ok(view),
            Err(refusal) => Err(RequestError::Refused(refusal)),
        }
    }

    /// How many messages were sent.
    fn sent(&self) -> usize {
        self.0.lock().unwrap().sent
    }

    fn run(&self) {
        loop {
            let mut state = self.0.lock().unwrap();
            if state.busy {
                return;
            }
            let Some(work) = state.work.pop_front() else { return };
            state.busy = true;
            match work {
                Work::View(to, view) => {
                    let listener = state.listeners.get(&to).cloned();
                    drop(state);
                    listener.inspect(|l| l.on_view(&view));
                }
                Work::Message(from, to, epoch, bytes) => {
                    let alive = state.listeners.contains_key(&from);
                    let handler = state.handlers.get(&to).cloned().filter(|_| alive);
                    drop(state);
                    handler.inspect(|h| h.deliver(from, epoch, &bytes));
                }
            }
            self.0.lock().unwrap().busy = false;
        }
    }

    fn crash(&self, who: Identity) {
        {
            let mut state = self.0.lock().unwrap();
            state.listeners.remove(&who);
            state.handlers.remove(&who);
        }
        let lives = [who].into();
        self.decide(remove(&self.view(), &lives, Cause::Failed(lives.clone())));
    }
}

fn life(node: u32) -> Identity {
    Identity::new(NodeId(node), Incarnation(1))
}

struct Port {
    me: Identity,
    cluster: Arc<Cluster>,
    lease: Lease,
}

impl Membership for Port {
    fn me(&self) -> Identity {
        self.me
    }
    fn view(&self) -> Arc<View> {
        self.cluster.view()
    }
    fn is_quorate(&self) -> bool {
        true
    }
    fn lease(&self) -> Lease {
        self.lease.clone()
    }
    fn subscribe(&self, listener: Arc<dyn ViewListener>) {
        listener.on_view(&self.cluster.view());
        self.cluster.0.lock().unwrap().listeners.insert(self.me, listener);
    }
    fn decisions_since(&self, _: Epoch) -> Vec<Decision> {
        Vec::new()
    }
    fn lease_over_at(&self, _: Identity) -> Option<Instant> {
        None
    }
    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Arc<View>, RequestError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.cluster.propose(self.me, &request)
        })
    }
}

impl Sessions for Port {
    fn send(&self, to: Identity, _: ServiceId, payload: Vec<u8>) -> Result<(), SendError> {
        let mut state = self.cluster.0.lock().unwrap();
        let epoch = state.view.as_ref().unwrap().epoch;
        state.sent += 1;
        state.work.push_back(Work::Message(self.me, to, epoch, payload));
        Ok(())
    }
    fn register(&self, _: ServiceId, handler: Arc<dyn SessionHandler>) {
        self.cluster.0.lock().unwrap().handlers.insert(self.me, handler);
    }
}

struct Node {
    port: Arc<Port>,
    dlm: Arc<Dlm>,
    space: Arc<dyn Lockspace>,
    told: Arc<Recorder>,
}

impl Node {
    fn request(&self, name: &LockName, mode: Mode, flags: Flags) -> quorate_dlm::LockId {
        let id = self.space.request(LockRequest::new(name.clone(), mode).flags(flags), self.told.clone());
        self.port.cluster.run();
        id.unwrap()
    }
    fn granted(&self) -> Vec<Mode> {
        let modes = self.told.take().into_iter().filter_map(|(_, told)| match told {
            Told::Done(Completion::Granted(grant)) => Some(grant.mode),
            _ => None,
        });
        modes.collect()
    }
}

fn start(cluster: &Arc<Cluster>, node: u32) -> (Arc<Port>, Arc<Dlm>) {
    let port = Arc::new(Port { me: life(node), cluster: cluster.clone(), lease: Lease::forever() });
    let dlm = Dlm::new(port.clone(), port.clone(), TestRuntime::new());
    (port, dlm)
}

async fn nodes(cluster: &Arc<Cluster>, count: u32, options: &LockspaceOptions) -> Vec<Node> {
    let mut out = Vec::new();
    for n in 1..=count {
        let (port, dlm) = start(cluster, n);
        let space = dlm.join(options).await.unwrap();
        out.push(Node { port, dlm, space, told: Arc::default() });
    }
    out
}

/// Pumps messages while a future runs.
async fn pump(cluster: Arc<Cluster>) {
    loop {
        cluster.run();
        tokio::task::yield_now().await;
    }
}

fn test<T>(cluster: &Arc<Cluster>, test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::spawn(pump(cluster.clone()));
        tokio::time::timeout(Duration::from_secs(20), test).await.expect("a hang")
    })
}

fn name(text: &str) -> LockName {
    LockName::new(text.as_bytes()).unwrap()
}

async fn until(mut ready: impl FnMut() -> bool) {
    while !ready() {
        tokio::task::yield_now().await;
    }
}

#[test]
fn locks_conflict_between_nodes_and_a_dead_nodes_lock_waits_for_the_fence() {
    let cluster = Cluster::new(3);
    test(&cluster, async {
        let n = nodes(&cluster, 3, &LockspaceOptions::plain("test")).await;
        n[1].request(&name("r"), Mode::EX, Flags::NONE);
        assert_eq!(n[1].granted(), [Mode::EX]);
        n[0].request(&name("r"), Mode::EX, Flags::NONE);
        assert_eq!(n[1].told.take().len(), 1, "a blocking call");
        cluster.crash(life(2));
        cluster.run();
        // Both survivors prove that they have rebuilt; that alone releases nothing.
        until(|| cluster.view().debts.values().all(|d| d.items.values().all(|i| i.rebuilt))).await;
        assert!(n[0].granted().is_empty());
        let fenced =
            Request::Prove { debtor: life(2), resources: Default::default(), proof: Proof::LeaseOver };
        cluster.propose(life(1), &fenced).unwrap();
        until(|| n[0].granted() == [Mode::EX]).await;
        assert!(cluster.view().debts.is_empty());
    });
}

#[test]
fn a_node_that_leaves_passes_value_blocks_on_and_a_busy_one_may_not() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let n = nodes(&cluster, 2, &LockspaceOptions::plain("test")).await;
        // Mastered by the one that leaves.
        let first = n[0].request(&name("v"), Mode::EX, Flags::VALBLK);
        n[1].request(&name("v"), Mode::NL, Flags::VALBLK);
        let busy = n[0].dlm.leave("test").await;
        assert_eq!(busy, Err(JoinError::Busy { name: "test".to_owned(), locks: 1 }));
        let unlock = UnlockRequest { flags: Flags::VALBLK, value: Some(vec![5; 32]) };
        n[0].space.unlock(first, unlock).unwrap();
        n[0].dlm.leave("test").await.unwrap();
        assert_eq!(
            n[0].space.request(LockRequest::new(name("v"), Mode::NL), n[0].told.clone()),
            Err(LockError::Stopped)
        );
        n[1].told.take();
        n[1].request(&name("v"), Mode::PR, Flags::VALBLK);
        until(|| {
            n[1].told.take().into_iter().any(|(_, told)| match told {
                Told::Done(Completion::Granted(g)) => g.value == Some(vec![5; 32]) && !g.value_invalid,
                _ => false,
            })
        })
        .await;
        let dump = n[1].dlm.dump();
        assert_eq!((dump[0].members.as_slice(), dump[0].resources.len()), ([life(2)].as_slice(), 1));
        n[0].dlm.join(&LockspaceOptions::plain("test")).await.unwrap();
    });
}

#[test]
fn other_options_are_refused_with_both_sides_named() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let _one = nodes(&cluster, 1, &LockspaceOptions::plain("test")).await;
        let (_, dlm) = start(&cluster, 2);
        let other = LockspaceOptions { value_bytes: 16, ..LockspaceOptions::plain("test") };
        let Err(error) = dlm.join(&other).await else { panic!("joined") };
        let text = error.to_string();
        assert!(text.contains("32 bytes") && text.contains("16 bytes"), "{text}");
        assert!(cluster.view().attachments.iter().all(|a| a.owner == life(1)));
    });
}

#[test]
fn a_frozen_node_answers_nothing_until_its_lease_is_back() {
    let cluster = Cluster::new(1);
    test(&cluster, async {
        let n = nodes(&cluster, 1, &LockspaceOptions::plain("test")).await;
        n[0].port.lease.set(Instant(0));
        n[0].request(&name("r"), Mode::EX, Flags::NONE);
        tokio::task::yield_now().await;
        assert!(n[0].told.take().is_empty());
        n[0].port.lease.set(Instant(u64::MAX));
        until(|| n[0].granted() == [Mode::EX]).await;
        let listener = cluster.0.lock().unwrap().listeners.get(&life(1)).cloned().unwrap();
        listener.on_stop("removed");
        assert!(matches!(n[0].told.take().as_slice(), [(_, Told::Done(Completion::Stopped))]));
        let after = n[0].space.request(LockRequest::new(name("r"), Mode::EX), n[0].told.clone());
        assert_eq!(after, Err(LockError::Stopped));
    });
}

#[test]
fn a_queue_takes_batches_and_a_release_needs_no_answer() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let n = nodes(&cluster, 2, &LockspaceOptions::plain("test")).await;
        let names: Vec<LockName> = (0..100).map(|i| name(&format!("r{i}"))).collect();
        // Mastered by the first node, as long as it has them.
        for one in &names {
            n[0].space.request(LockRequest::new(one.clone(), Mode::NL), n[0].told.clone()).unwrap();
        }
        let mut granted = 0;
        until(|| {
            granted += n[0].granted().len();
            granted == names.len()
        })
        .await;
        let queue = LockQueue::new(n[1].space.clone());
        for round in 0..3 {
            let sent = cluster.sent();
            let ids: Vec<LockId> = queue.batch(|batch| {
                let ask = |one: &LockName| batch.request(LockRequest::new(one.clone(), Mode::EX));
                names.iter().map(ask).collect::<Result<_, _>>().unwrap()
            });
            let mut told = Vec::new();
            while told.len() < ids.len() {
                queue.wait(&mut told).await;
                tokio::task::yield_now().await;
            }
            assert!(told.iter().all(|t| matches!(t.what, What::Done(Completion::Granted(_)))));
            // Of all shards, there and back; the first round asks for the masters before.
            assert!(round == 0 || cluster.sent() - sent <= 2 * 16, "{} messages", cluster.sent() - sent);
            // Who is refused now would be granted had a release been lost.
            n[0].told.take();
            n[0].request(&names[7], Mode::PR, Flags::NOQUEUE);
            assert_eq!(n[0].told.take().pop().unwrap().1, Told::Done(Completion::Again));
            told.clear();
            queue.batch(|batch| {
                for id in &ids {
                    batch.unlock(*id, UnlockRequest::release()).unwrap();
                }
            });
            assert!(queue.reap(&mut told));
            assert!(
                told.len() == ids.len() && told.iter().all(|t| t.what == What::Done(Completion::Unlocked))
            );
            until(|| {
                let held = |l: &quorate_dlm::LockDump| l.node == life(2);
                !n[0].dlm.dump()[0].resources.iter().any(|r| r.granted.iter().any(held))
            })
            .await;
        }
        assert!(n[1].dlm.dump()[0].elsewhere.is_empty());
    });
}

#[test]
fn hostile_bytes_are_dropped() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let n = nodes(&cluster, 2, &LockspaceOptions::plain("test")).await;
        let handler = cluster.0.lock().unwrap().handlers.get(&life(1)).cloned().unwrap();
        for bytes in [&[][..], &[1], &[1, 255, 255, 255, 255], &[9, 9, 9], &[0; 1000]] {
            handler.deliver(life(2), Epoch(1), bytes);
        }
        n[0].request(&name("r"), Mode::EX, Flags::NONE);
        assert_eq!(n[0].granted(), [Mode::EX]);
        let id = n[0].request(&name("s"), Mode::PR, Flags::NONE);
        n[0].space.convert(id, ConvertRequest::new(Mode::EX)).unwrap();
        cluster.run();
        assert_eq!(n[0].granted(), [Mode::PR, Mode::EX]);
    });
}

struct Writer;

impl CacheClient for Writer {
    fn granted(&self, _: &LockName, _: CacheMode, _: Option<&ValueBlock>) {}
    fn demote<'a>(
        &'a self,
        _: &'a LockName,
        _: CacheMode,
        _: Option<CacheMode>,
        _: &'a mut ValueBlock,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

#[test]
fn caches_of_three_nodes_count_together() {
    let cluster = Cluster::new(3);
    test(&cluster, async {
        let n = nodes(&cluster, 3, &LockspaceOptions::plain("test")).await;
        let counter = Mutex::new(0);
        let work = |node: &Node| {
            let config = CacheConfig::eager();
            let runtime = TestRuntime::new();
            let cache =
                LockCache::new(node.space.clone(), runtime, Lease::forever(), Arc::new(Writer), config);
            let counter = &counter;
            async move {
                let c = name("c");
                for i in 0..50 {
                    if i % 3 == 0 {
                        let shared = cache.acquire(&c, CacheMode::Shared, AcquireFlags::default());
                        drop(shared.await.unwrap());
                    }
                    let held = cache.acquire(&c, CacheMode::Exclusive, AcquireFlags::default());
                    let held = held.await.unwrap();
                    let seen = *counter.lock().unwrap();
                    tokio::task::yield_now().await;
                    *counter.lock().unwrap() = seen + 1;
                    drop(held);
                }
                cache.shutdown().await;
            }
        };
        futures_util::future::join3(work(&n[0]), work(&n[1]), work(&n[2])).await;
        assert_eq!(*counter.lock().unwrap(), 150);
        for node in &n {
            node.dlm.leave("test").await.unwrap();
        }
        assert!(cluster.view().attachments.is_empty());
    });
}

#[test]
fn a_deadlock_over_two_lockspaces_and_two_nodes_is_found_within_a_second() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let n = nodes(&cluster, 2, &LockspaceOptions::plain("one")).await;
        let other = LockspaceOptions::plain("two");
        let two = [n[0].dlm.join(&other).await.unwrap(), n[1].dlm.join(&other).await.unwrap()];
        let ex = |text: &str| LockRequest::new(name(text), Mode::EX).owner(7);
        n[0].space.request(ex("r"), n[0].told.clone()).unwrap();
        two[1].request(ex("r"), n[1].told.clone()).unwrap();
        let mut granted = [0, 0];
        until(|| {
            granted = [granted[0] + n[0].granted().len(), granted[1] + n[1].granted().len()];
            granted == [1, 1]
        })
        .await;
        let began = tokio::time::Instant::now();
        // Each owner waits in the lockspace in which the other holds.
        two[0].request(ex("r"), n[0].told.clone()).unwrap();
        let victim = n[1].space.request(LockRequest { priority: -1, ..ex("r") }, n[1].told.clone()).unwrap();
        let refused = || n[1].told.take().contains(&(victim, Told::Done(Completion::Deadlock)));
        until(refused).await;
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert!(!n[0].told.take().iter().any(|(_, t)| matches!(t, Told::Done(_))), "the other waits on");
    });
}

#[test]
fn timeouts_and_orphans_work_in_the_driver() {
    let cluster = Cluster::new(2);
    test(&cluster, async {
        let n = nodes(&cluster, 2, &LockspaceOptions::plain("test")).await;
        let request = LockRequest::new(name("r"), Mode::EX).owner(7).flags(Flags::PERSISTENT);
        n[0].space.request(request.clone(), n[0].told.clone()).unwrap();
        until(|| n[0].granted() == [Mode::EX]).await;
        let limited =
            LockRequest { timeout: Some(Duration::from_millis(50)), ..LockRequest::new(name("r"), Mode::PR) };
        let late = n[1].space.request(limited, n[1].told.clone()).unwrap();
        until(|| n[1].told.take().contains(&(late, Told::Done(Completion::TimedOut)))).await;
        n[0].space.close_owner(7);
        n[0].told.take();
        let adopt = LockRequest::new(name("r"), Mode::EX).owner(8).flags(Flags::ORPHAN);
        n[0].space.request(adopt.clone(), n[0].told.clone()).unwrap();
        assert_eq!(n[0].granted(), [Mode::EX]);
        assert_eq!(n[0].space.request(adopt, n[0].told.clone()), Err(LockError::NotFound));
        // Not persistent any more: it ends with its owner.
        n[0].space.close_owner(8);
        n[1].request(&name("r"), Mode::PR, Flags::NOQUEUE);
        until(|| n[1].granted() == [Mode::PR]).await;
    });
}
