//! The driver over a membership and a storage server of the test's own, in real time.

use quorate_fencing::driver::{FencingDriver, NoSink};
use quorate_fencing::{
    ConfirmError, Fencer, FencingConfig, FencingTiming, How, StorageFence, StorageFenceError, Wait,
};
use quorate_membership::{
    Attachment, BoxFuture, ClusterId, Debt, DebtItem, Decision, Epoch, Identity, Incarnation, Instant, Lease,
    Membership, NodeId, Proof, Request, RequestError, ResourceId, ResourceKind, Runtime, Safety, ServerEntry,
    ServerId, View, ViewListener,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SERVER: ServerId = ServerId::from_bytes([7; 16]);

/// tokio's clock as the runtime of the crates.
struct Clock(tokio::time::Instant);

impl Runtime for Clock {
    fn now(&self) -> Instant {
        Instant(u64::try_from(self.0.elapsed().as_nanos()).expect("a short test"))
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep_until(self.0 + Duration::from_nanos(at.0)))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}

/// A cluster of one's own, quorate, that decides whatever is asked.
struct Cluster {
    view: Mutex<Arc<View>>,
    listeners: Mutex<Vec<Arc<dyn ViewListener>>>,
    proofs: Mutex<Vec<Proof>>,
    is_quorate: bool,
}

impl Membership for Cluster {
    fn me(&self) -> Identity {
        Identity::new(NodeId(1), Incarnation(1))
    }
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.lock().expect("no panic"))
    }
    fn is_quorate(&self) -> bool {
        self.is_quorate
    }
    fn lease(&self) -> Lease {
        Lease::forever()
    }
    fn subscribe(&self, listener: Arc<dyn ViewListener>) {
        listener.on_view(&self.view());
        self.listeners.lock().expect("no panic").push(listener);
    }
    fn decisions_since(&self, _: Epoch) -> Vec<Decision> {
        vec![Decision { view: View::clone(&self.view()), accepts: BTreeMap::new() }]
    }
    fn lease_over_at(&self, _: Identity) -> Option<Instant> {
        Some(Instant(50_000_000))
    }
    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Arc<View>, RequestError>> {
        Box::pin(async move {
            let Request::Prove { debtor, resources, proof } = request else {
                panic!("only proofs are asked for")
            };
            self.proofs.lock().expect("no panic").push(proof);
            let mut view = View::clone(&self.view());
            view.epoch = view.epoch.next();
            let debt = view.debts.get_mut(&debtor).expect("a debtor");
            debt.items.retain(|r, _| !resources.contains(r));
            if debt.items.is_empty() {
                view.debts.remove(&debtor);
            }
            let view = Arc::new(view);
            *self.view.lock().expect("no panic") = Arc::clone(&view);
            for listener in &*self.listeners.lock().expect("no panic") {
                listener.on_view(&view);
            }
            Ok(view)
        })
    }
}

/// Refuses twice, then confirms.
struct Storage(Mutex<u32>);

impl StorageFence for Storage {
    fn install(
        &self,
        server: ServerId,
        entry: &ServerEntry,
        chain: Vec<Decision>,
    ) -> BoxFuture<'_, Result<Epoch, StorageFenceError>> {
        assert_eq!(server, SERVER);
        let address = entry.address.clone();
        Box::pin(async move {
            let mut calls = self.0.lock().expect("no panic");
            *calls += 1;
            if *calls < 3 {
                return Err(StorageFenceError::Unreachable { address, detail: "refused".to_owned() });
            }
            Ok(chain.last().expect("not empty").view.epoch)
        })
    }
}

fn cluster(items: &[(ResourceKind, Safety)], is_quorate: bool) -> Arc<Cluster> {
    let victim = Identity::new(NodeId(2), Incarnation(5));
    let item = |(kind, safety): &(ResourceKind, Safety)| {
        let attachment = Attachment {
            owner: victim,
            resource: ResourceId::new(*kind, "r"),
            safety: *safety,
            servers: if *safety == Safety::Storage { [SERVER].into() } else { BTreeSet::new() },
            journal: None,
            lockspace: None,
            exclusive: false,
        };
        (
            attachment.resource.clone(),
            DebtItem { attachment, fenced: false, rebuilt: false, rebuilt_by: BTreeMap::new() },
        )
    };
    let view = View {
        epoch: Epoch(9),
        members: [(NodeId(1), Incarnation(1)), (NodeId(3), Incarnation(1))].into(),
        servers: [(SERVER, ServerEntry { name: "s".to_owned(), address: "192.0.2.7:1".to_owned() })].into(),
        debts: [(victim, Debt { removed: Epoch(9), items: items.iter().map(item).collect() })].into(),
        ..View::empty(ClusterId::from_bytes([1; 16]))
    };
    Arc::new(Cluster {
        view: Mutex::new(Arc::new(view)),
        listeners: Mutex::default(),
        proofs: Mutex::default(),
        is_quorate,
    })
}

fn start(cluster: &Arc<Cluster>) -> Arc<FencingDriver> {
    let clock = Arc::new(Clock(tokio::time::Instant::now()));
    let config = FencingConfig::new(FencingTiming::lan());
    let storage = Arc::new(Storage(Mutex::new(0)));
    let cluster: Arc<dyn Membership> = Arc::clone(cluster) as Arc<dyn Membership>;
    FencingDriver::start(cluster, clock, storage, config, Arc::new(NoSink)).expect("it starts")
}

/// Resolves when nothing is open any more.
struct Closed(tokio::sync::Notify);

impl ViewListener for Closed {
    fn on_view(&self, view: &Arc<View>) {
        if view.debts.is_empty() {
            self.0.notify_one();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_victim_is_fenced_at_the_storage_and_proven() {
    let cluster = cluster(&[(ResourceKind::BlockDevice, Safety::Storage)], true);
    let fencing = start(&cluster);
    let closed = Arc::new(Closed(tokio::sync::Notify::new()));
    cluster.subscribe(Arc::clone(&closed) as Arc<dyn ViewListener>);
    closed.0.notified().await;
    let proofs = cluster.proofs.lock().expect("no panic").clone();
    assert_eq!(proofs, [Proof::StorageFence { confirmed: [(SERVER, Epoch(9))].into() }]);
    // The driver learns of the last view through its queue.
    tokio::task::yield_now().await;
    let history = fencing.history();
    let results: Vec<bool> = history.iter().map(|r| r.result.is_ok()).collect();
    assert!(
        matches!(history[0].how, How::Storage { .. }) && !results[0],
        "the refusal comes first: {history:?}"
    );
    assert!(history.iter().any(|r| matches!(r.how, How::Storage { .. }) && r.result.is_ok()), "{history:?}");
    assert!(history.iter().all(|r| 0 < r.unix_ms));
    fencing.shutdown();
}

#[tokio::test(start_paused = true)]
async fn only_a_person_can_confirm_where_no_method_is() {
    let cluster = cluster(&[(ResourceKind::Service, Safety::Power)], true);
    let fencing = start(&cluster);
    assert_eq!(fencing.confirm(NodeId(3), "root").await, Err(ConfirmError::NothingOpen(NodeId(3))));
    let status = fencing.status();
    assert!(status[0].waits.contains(&Wait::Person), "{status:?}");
    assert_eq!(fencing.confirm(NodeId(2), "root").await, Ok(()));
    assert_eq!(*cluster.proofs.lock().expect("no panic"), [Proof::Confirmed { by: "root".to_owned() }]);
    assert!(fencing.history().iter().any(|r| r.how == How::Person { by: "root".to_owned() }));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_quorum_fences_nobody_and_takes_nobodys_word() {
    let cluster = cluster(&[(ResourceKind::BlockDevice, Safety::Storage)], false);
    let fencing = start(&cluster);
    assert_eq!(fencing.confirm(NodeId(2), "root").await, Err(ConfirmError::NotQuorate));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(cluster.proofs.lock().expect("no panic").is_empty());
    assert_eq!(fencing.status()[0].waits, [Wait::Quorum]);
}
