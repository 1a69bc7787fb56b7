//! Managers of three nodes in one process, over a record of the test's own, real agents and a real lock manager.

use crate::agents::{TempDir, resource, script};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{
    Completion, Flags, LockCallbacks, LockId, LockManager, LockName, LockRequest, Lockspace,
    LockspaceOptions, Mode, UnlockRequest,
};
use quorate_failover::driver::{Failover, NoSink, OcfRunner};
use quorate_failover::{CommandError, Recovery, ServiceConfig, ServiceStatus, StateName, Target};
use quorate_membership::machine::decide;
use quorate_membership::{
    BoxFuture, ClusterId, Decision, Epoch, Identity, Incarnation, Instant, Lease, Membership, NodeId, Proof,
    Request, RequestError, Runtime, Safety, SendError, ServiceId, SessionHandler, Sessions, View,
    ViewListener,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

struct Clock(tokio::time::Instant);

impl Runtime for Clock {
    fn now(&self) -> Instant {
        Instant(self.0.elapsed().as_nanos() as u64)
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep_until(self.0 + Duration::from_nanos(at.0)))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}

type Listeners = BTreeMap<NodeId, Arc<dyn ViewListener>>;
type Handlers = BTreeMap<NodeId, Arc<dyn SessionHandler>>;

/// The record, and everybody who is told of it.
#[derive(Default)]
struct Hub {
    view: Mutex<Option<Arc<View>>>,
    listeners: Mutex<Listeners>,
    handlers: Mutex<Handlers>,
    /// Held from the decision until everybody was told: views come in order.
    deciding: Mutex<()>,
}

impl Hub {
    fn view(&self) -> Arc<View> {
        Arc::clone(self.view.lock().unwrap().as_ref().unwrap())
    }

    fn decided(&self, view: View) {
        let view = Arc::new(view);
        *self.view.lock().unwrap() = Some(Arc::clone(&view));
        // The dead hear nothing.
        let listeners = self.listeners.lock().unwrap().clone();
        for (_, listener) in listeners.iter().filter(|(n, _)| view.members.contains_key(n)) {
            listener.on_view(&view);
        }
    }

    fn ask(&self, by: Identity, request: &Request) -> Result<(), RequestError> {
        let _one_at_a_time = self.deciding.lock().unwrap();
        match decide(&self.view(), by, 0, request) {
            Ok(Some(view)) => self.decided(view),
            Ok(None) => {}
            Err(refusal) => return Err(RequestError::Refused(refusal)),
        }
        Ok(())
    }
}

struct Node {
    me: Identity,
    hub: Arc<Hub>,
}

impl Membership for Node {
    fn me(&self) -> Identity {
        self.me
    }
    fn view(&self) -> Arc<View> {
        self.hub.view()
    }
    fn is_quorate(&self) -> bool {
        true
    }
    fn lease(&self) -> Lease {
        Lease::forever()
    }
    fn subscribe(&self, listener: Arc<dyn ViewListener>) {
        let _one_at_a_time = self.hub.deciding.lock().unwrap();
        listener.on_view(&self.view());
        self.hub.listeners.lock().unwrap().insert(self.me.node, listener);
    }
    fn decisions_since(&self, _: Epoch) -> Vec<Decision> {
        Vec::new()
    }
    fn lease_over_at(&self, _: Identity) -> Option<Instant> {
        None
    }
    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Arc<View>, RequestError>> {
        Box::pin(async move { self.hub.ask(self.me, &request).map(|()| self.hub.view()) })
    }
}

impl Sessions for Node {
    fn send(&self, to: Identity, _: ServiceId, payload: Vec<u8>) -> Result<(), SendError> {
        let handler = self.hub.handlers.lock().unwrap().get(&to.node).cloned();
        let from = self.me;
        let epoch = self.hub.view().epoch;
        match handler {
            Some(handler) => {
                tokio::spawn(async move { handler.deliver(from, epoch, &payload) });
                Ok(())
            }
            None => Err(SendError::NotMember(to)),
        }
    }
    fn register(&self, _: ServiceId, handler: Arc<dyn SessionHandler>) {
        self.hub.handlers.lock().unwrap().insert(self.me.node, handler);
    }
}

/// An agent that keeps a file per node, and records every action.
fn agent(dir: &Path) -> quorate_failover::Agent {
    script(
        dir,
        "state=\"$OCF_RESKEY_dir/$OCF_RESKEY_CRM_meta_on_node-$OCF_RESOURCE_INSTANCE\"\n\
         echo \"$OCF_RESKEY_CRM_meta_on_node $1\" >> \"$OCF_RESKEY_dir/log\"\n\
         case $1 in\n\
         start) [ -e \"$OCF_RESKEY_dir/broken-$OCF_RESKEY_CRM_meta_on_node\" ] && exit 1; touch \"$state\";;\n\
         stop) rm -f \"$state\";;\n\
         monitor) [ -e \"$state\" ] || exit 7;;\n\
         *) exit 3;;\n\
         esac",
    )
}

fn service(dir: &Path) -> ServiceConfig {
    let mut only = resource(agent(dir), &[("dir", dir.to_str().unwrap())]);
    only.monitor_interval = Duration::from_millis(100);
    ServiceConfig {
        name: "web".into(),
        resources: vec![only],
        domain: None,
        recovery: Recovery::Restart,
        max_restarts: 0,
        restart_expire_time: Duration::ZERO,
        autostart: true,
        safety: Safety::Lease,
        servers: BTreeSet::new(),
    }
}

struct Cluster {
    hub: Arc<Hub>,
    nodes: Vec<Arc<Failover>>,
    locks: Vec<LocalManager>,
    spaces: Vec<Arc<dyn Lockspace>>,
    clock: Arc<Clock>,
    dir: TempDir,
}

fn life(n: u32) -> Identity {
    Identity::new(NodeId(n), Incarnation(1))
}

impl Cluster {
    async fn start() -> Self {
        let dir = TempDir::new();
        let clock = Arc::new(Clock(tokio::time::Instant::now()));
        let hub = Arc::new(Hub::default());
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        for n in 1..=3 {
            view.members.insert(NodeId(n), Incarnation(1));
            view.lives.insert(NodeId(n), Incarnation(1));
        }
        *hub.view.lock().unwrap() = Some(Arc::new(view));
        let locks = LocalManager::shared(3);
        let (mut nodes, mut spaces) = (Vec::new(), Vec::new());
        for (n, manager) in (1..).zip(&locks) {
            let lockspace = manager.join(&LockspaceOptions::plain("failover")).await.unwrap();
            spaces.push(Arc::clone(&lockspace));
            let node = Arc::new(Node { me: life(n), hub: Arc::clone(&hub) });
            let agents = Arc::new(OcfRunner::new(format!("node-{n}")));
            let services = vec![service(&dir.0)];
            let failover = Failover::start(
                node.clone(),
                node,
                lockspace,
                clock.clone(),
                services,
                agents,
                Arc::new(NoSink),
            );
            nodes.push(failover.unwrap());
        }
        Self { hub, nodes, locks, spaces, clock, dir }
    }

    fn soon(&self) -> Instant {
        self.clock.now() + Duration::from_secs(20)
    }

    async fn until(
        &self,
        at: usize,
        what: &str,
        wanted: impl Fn(&ServiceStatus) -> bool + Send,
    ) -> ServiceStatus {
        let found = self.nodes[at].wait_for("web", self.soon(), wanted).await;
        found.unwrap_or_else(|| panic!("never {what}: {:?}\n{}", self.nodes[at].status(), self.log()))
    }

    async fn runs_on(&self, at: usize, node: u32) -> ServiceStatus {
        let wanted = |s: &ServiceStatus| s.owner == Some(life(node)) && s.state == StateName::Running;
        self.until(at, &format!("on node {node}"), wanted).await
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.0.join("log")).unwrap_or_default()
    }

    fn is_up(&self, node: u32) -> bool {
        self.dir.0.join(format!("node-{node}-web-r")).exists()
    }
}

fn test(body: impl Future<Output = ()>) {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    tokio.block_on(async { tokio::time::timeout(Duration::from_secs(60), body).await.unwrap() });
}

#[test]
fn a_service_starts_moves_and_stops_as_ordered() {
    test(async {
        let c = Cluster::start().await;
        c.runs_on(2, 1).await;
        assert!(c.is_up(1));
        // Everybody can see in the lock manager who owns it.
        let dump = c.locks[2].dump();
        assert!(format!("{dump:?}").contains("service/web"), "{dump:?}");
        c.nodes[1].relocate("web", Some(NodeId(3))).unwrap();
        c.runs_on(0, 3).await;
        assert!(!c.is_up(1) && c.is_up(3));
        c.nodes[0].disable("web").unwrap();
        let off = c.until(1, "stopped", |s| matches!(s.state, StateName::Stopped(_))).await;
        assert_eq!((off.owner, off.target), (None, Target::Disabled));
        assert!(!c.is_up(3));
        assert_eq!(c.nodes[0].relocate("web", None), Err(CommandError::Disabled));
        assert_eq!(c.nodes[0].enable("web", Some(NodeId(9))), Err(CommandError::NotThere(NodeId(9))));
        assert_eq!(c.nodes[0].enable("mail", None), Err(CommandError::NoService("mail".into())));
        c.nodes[2].enable("web", None).unwrap();
        c.runs_on(2, 1).await;
        // The order of every start: a look, the start, a look.
        assert!(c.log().starts_with("node-1 monitor\nnode-1 start\nnode-1 monitor\n"), "{}", c.log());
    });
}

#[test]
fn a_dead_node_s_service_starts_elsewhere_only_when_it_is_fenced() {
    test(async {
        let c = Cluster::start().await;
        c.runs_on(1, 1).await;
        let (dead, survivor) = (life(1), life(2));
        c.hub.ask(survivor, &Request::Evict { who: dead, reason: "dead".into() }).unwrap();
        let waits = c.until(1, "waiting", |s| s.state == StateName::WaitingForFence).await;
        assert_eq!(waits.owner, None);
        assert!(!c.is_up(2) && !c.is_up(3));
        let proof = Request::Prove { debtor: dead, resources: BTreeSet::new(), proof: Proof::LeaseOver };
        c.locks[0].crash();
        c.hub.ask(survivor, &proof).unwrap();
        c.runs_on(2, 2).await;
        let deadline = c.soon();
        while !c.hub.view().debts.is_empty() {
            assert!(c.clock.now() < deadline, "the debt is not closed");
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_failed_resource_is_restarted_and_a_failed_start_goes_elsewhere() {
    test(async {
        let c = Cluster::start().await;
        c.runs_on(0, 1).await;
        std::fs::remove_file(c.dir.0.join("node-1-web-r")).unwrap();
        let again = c.until(2, "restarted", |s| s.restarts == 1 && s.state == StateName::Running).await;
        assert_eq!(again.owner, Some(life(1)));
        std::fs::write(c.dir.0.join("broken-node-1"), "").unwrap();
        std::fs::remove_file(c.dir.0.join("node-1-web-r")).unwrap();
        let elsewhere = c.runs_on(0, 2).await;
        assert!(elsewhere.failed.contains_key(&NodeId(1)), "{elsewhere:?}");
        assert!(elsewhere.failed[&NodeId(1)].contains("generic error"), "{elsewhere:?}");
    });
}

#[test]
fn a_node_that_leaves_gives_its_services_away_first() {
    test(async {
        let c = Cluster::start().await;
        c.runs_on(0, 1).await;
        assert!(c.nodes[0].shutdown(c.soon()).await);
        assert!(!c.is_up(1));
        c.runs_on(1, 2).await;
        let mine = c.hub.view().attachments.iter().filter(|a| a.owner == life(1)).count();
        assert_eq!(mine, 0, "nothing bars the leave");
    });
}

/// A program that knows only the lock manager; passes on what its locks come to.
struct Outsider(tokio::sync::mpsc::UnboundedSender<(LockId, Completion)>);

impl LockCallbacks for Outsider {
    fn completion(&self, id: LockId, completion: Completion) {
        self.0.send((id, completion)).unwrap();
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

#[test]
fn the_owner_lock_says_who_runs_it_and_whoever_holds_it_keeps_it_from_running() {
    test(async {
        let c = Cluster::start().await;
        c.runs_on(2, 1).await;
        let (told, mut answers) = tokio::sync::mpsc::unbounded_channel();
        let outsider = Arc::new(Outsider(told));
        let name = || LockName::new(b"service/web").unwrap();
        let ask = |mode, flags| {
            let request = LockRequest::new(name(), mode).flags(flags);
            c.spaces[2].request(request, outsider.clone()).unwrap()
        };
        ask(Mode::PR, Flags::NOQUEUE);
        assert_eq!(answers.recv().await.unwrap().1, Completion::Again, "it is held exclusively");
        let look = ask(Mode::NL, Flags::VALBLK);
        let (_, Completion::Granted(grant)) = answers.recv().await.unwrap() else { panic!("not granted") };
        let value = grant.value.unwrap();
        assert_eq!(value[..12], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], "node 1 in its first life");
        c.spaces[2].unlock(look, UnlockRequest::default()).unwrap();
        assert_eq!(answers.recv().await.unwrap(), (look, Completion::Unlocked));

        c.nodes[0].disable("web").unwrap();
        c.until(1, "stopped", |s| matches!(s.state, StateName::Stopped(_)) && s.owner.is_none()).await;
        let held = ask(Mode::EX, Flags::NOQUEUE);
        assert!(matches!(answers.recv().await.unwrap().1, Completion::Granted(_)), "it was given up");
        let before = c.log();
        c.nodes[0].enable("web", None).unwrap();
        c.until(1, "attached", |s| s.owner == Some(life(1)) && s.state == StateName::Starting).await;
        assert_eq!(c.log(), before, "no agent runs before the lock is held");
        c.spaces[2].unlock(held, UnlockRequest::default()).unwrap();
        c.runs_on(1, 1).await;
    });
}
