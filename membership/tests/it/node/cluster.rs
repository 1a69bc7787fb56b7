//! A cluster for a test: its CA, its directories, its nodes, and a recorder of what each of them is told.

use crate::temp::TempDir;
use quorate_membership::driver::pki::{Ca, Credentials, Issued, RevokedKeys};
use quorate_membership::driver::transport::TransportKind;
use quorate_membership::driver::{Node, NodeConfig, create_cluster};
use quorate_membership::{
    ClusterId, Epoch, Identity, Membership, NodeId, Role, RosterEntry, ServiceId, SessionHandler, Sessions,
    View, ViewListener,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// How long anything here may take.
pub(crate) const CEILING: Duration = Duration::from_secs(30);
pub(crate) const SERVICE: ServiceId = ServiceId(200);

#[derive(Default)]
pub(crate) struct Log {
    pub(crate) views: Vec<Arc<View>>,
    pub(crate) quorate: bool,
    pub(crate) messages: Vec<(Identity, Epoch, Vec<u8>)>,
    pub(crate) stopped: Option<String>,
}

/// Records what a node tells its services.
#[derive(Default)]
pub(crate) struct Recorder {
    log: Mutex<Log>,
    changed: Condvar,
}

impl Recorder {
    fn change(&self, change: impl FnOnce(&mut Log)) {
        change(&mut self.log.lock().unwrap());
        self.changed.notify_all();
    }

    pub(crate) fn forget_messages(&self) {
        self.change(|log| log.messages.clear());
    }

    /// Whether `unwanted` does not come true for so many milliseconds.
    pub(crate) fn never(&self, ms: u64, mut unwanted: impl FnMut(&Log) -> bool) -> bool {
        let log = self.log.lock().unwrap();
        let time = std::time::Duration::from_millis(ms);
        let (log, timeout) = self.changed.wait_timeout_while(log, time, |log| !unwanted(log)).unwrap();
        drop(log);
        timeout.timed_out()
    }

    /// Waits until `wanted` gives something.
    pub(crate) fn wait<T>(&self, what: &str, mut wanted: impl FnMut(&Log) -> Option<T>) -> T {
        let mut found = None;
        let log = self.log.lock().unwrap();
        let (log, timeout) = self
            .changed
            .wait_timeout_while(log, CEILING, |log| {
                found = wanted(log);
                found.is_none()
            })
            .unwrap();
        let last = log.views.last().map(|v| (v.epoch, v.members.clone()));
        assert!(
            !timeout.timed_out(),
            "{what}: not within {CEILING:?}; last view {last:?}, stop {:?}",
            log.stopped
        );
        found.unwrap()
    }
}

impl ViewListener for Recorder {
    fn on_view(&self, view: &Arc<View>) {
        self.change(|log| {
            if let Some(last) = log.views.last() {
                assert_eq!(last.epoch.next(), view.epoch, "views have a gap");
            }
            log.views.push(view.clone());
        });
    }

    fn on_quorum(&self, quorate: bool) {
        self.change(|log| log.quorate = quorate);
    }

    fn on_stop(&self, reason: &str) {
        self.change(|log| log.stopped = Some(reason.to_owned()));
    }
}

impl SessionHandler for Recorder {
    fn deliver(&self, from: Identity, epoch: Epoch, payload: &[u8]) {
        self.change(|log| {
            let installed = log.views.last().map_or(Epoch(0), |v| v.epoch);
            assert!(epoch <= installed, "a message of {epoch} at {installed}");
            log.messages.push((from, epoch, payload.to_vec()));
        });
    }
}

/// A node that runs, with its recorder.
pub(crate) struct Running {
    pub(crate) node: Arc<Node>,
    pub(crate) recorder: Arc<Recorder>,
}

impl Running {
    pub(crate) fn start(config: NodeConfig) -> Self {
        let node = Node::start(config).unwrap();
        let recorder = Arc::new(Recorder::default());
        node.register(SERVICE, recorder.clone());
        node.subscribe(recorder.clone());
        node.join();
        Self { node, recorder }
    }

    pub(crate) fn me(&self) -> Identity {
        self.node.me()
    }

    /// Waits for a view with exactly these members.
    pub(crate) fn wait_members(&self, members: &[u32]) -> Arc<View> {
        self.recorder.wait(&format!("members {members:?} at node {}", self.me()), |log| {
            let last = log.views.last()?;
            let fits = log.quorate && last.members.keys().map(|n| n.0).eq(members.iter().copied());
            fits.then(|| last.clone())
        })
    }

    /// Waits for a view with so many voters.
    pub(crate) fn wait_voters(&self, count: usize) -> Arc<View> {
        self.recorder.wait("voters", |log| {
            let last = log.views.last()?;
            (last.voters.voters.len() == count).then(|| last.clone())
        })
    }

    /// Waits until it is quorate, or not.
    pub(crate) fn wait_quorum(&self, quorate: bool) {
        self.recorder.wait("quorum to change", |log| (log.quorate == quorate).then_some(()));
    }

    /// Ends it as a crash would, and waits until its threads are gone.
    pub(crate) fn kill(self) {
        self.node.abort();
        block_on(self.node.ended());
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(CEILING, future).await.expect("in time") })
}

pub(crate) struct TestCluster {
    dir: TempDir,
    ca: Ca,
    revoked: BTreeMap<u32, RevokedKeys>,
    issued: BTreeMap<u32, Issued>,
    addresses: BTreeMap<NodeId, Vec<SocketAddr>>,
    control: TransportKind,
    sessions: TransportKind,
}

impl TestCluster {
    /// A created cluster whose roster has `count` voters; none runs yet.
    pub(crate) fn new(count: u32, control: TransportKind, sessions: TransportKind) -> Self {
        let dir = TempDir::new("cluster");
        let id = ClusterId::from_bytes(quorate_membership::driver::random().unwrap());
        let ca = Ca::create("test", id).unwrap();
        let mut issued = BTreeMap::new();
        for n in 1..=count {
            let one = ca.issue_node(&format!("node{n}"), NodeId(n), &[]).unwrap();
            one.save(&dir.path().join(format!("pki{n}"))).unwrap();
            issued.insert(n, one);
        }
        let revoked = (1..=count).map(|n| (n, RevokedKeys::new())).collect();
        let cluster = Self { dir, ca, revoked, issued, addresses: BTreeMap::new(), control, sessions };
        let roster = cluster
            .issued
            .iter()
            .map(|(n, i)| {
                let name = format!("node{n}");
                (NodeId(*n), RosterEntry { name, key: i.key_sha256, role: Role::Voter, addresses: vec![] })
            })
            .collect();
        create_cluster(&cluster.state_dir(1), &cluster.credentials(1), roster).unwrap();
        cluster
    }

    pub(crate) fn state_dir(&self, node: u32) -> PathBuf {
        self.dir.path().join(format!("state{node}"))
    }

    pub(crate) fn credentials(&self, node: u32) -> Credentials {
        let credentials = Credentials::load(&self.dir.path().join(format!("pki{node}"))).unwrap();
        credentials.with_revoked(self.revoked(node))
    }

    /// The keys that this node refuses.
    pub(crate) fn revoked(&self, node: u32) -> RevokedKeys {
        self.revoked.get(&node).unwrap().clone()
    }

    /// The settings of a node: where it was before, and whom else we know.
    pub(crate) fn config(&self, node: u32) -> NodeConfig {
        let before = self.addresses.get(&NodeId(node)).and_then(|a| a.first().copied());
        let listen = before.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
        let mut config = NodeConfig::lan(self.state_dir(node), self.credentials(node), listen);
        config.peers =
            self.addresses.iter().filter(|(n, _)| n.0 != node).map(|(n, a)| (*n, a.clone())).collect();
        config.control = self.control;
        config.sessions = self.sessions;
        config
    }

    /// The cluster's CA.
    pub(crate) fn ca(&self) -> &Ca {
        &self.ca
    }

    /// A second certificate of the node, with a key of its own.
    pub(crate) fn renewed(&self, node: u32, ca: &Ca) -> Credentials {
        let dir = TempDir::new("renewed");
        ca.issue_node(&format!("node{node}"), NodeId(node), &[]).unwrap().save(dir.path()).unwrap();
        Credentials::load(dir.path()).unwrap()
    }

    pub(crate) fn start(&mut self, node: u32) -> Running {
        self.start_with(node, self.config(node))
    }

    pub(crate) fn start_with(&mut self, node: u32, config: NodeConfig) -> Running {
        let running = Running::start(config);
        self.runs_at(node, running.node.local_address());
        running
    }

    /// Where the others find this node.
    pub(crate) fn runs_at(&mut self, node: u32, address: SocketAddr) {
        self.addresses.insert(NodeId(node), vec![address]);
    }
}
