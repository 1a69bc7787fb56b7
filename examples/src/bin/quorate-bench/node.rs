//! Nodes as the benchmarks run them: membership, fencing at lease level and the lock manager, in a directory of tmpfs.

use quorate_dlm::Dlm;
use quorate_fencing::driver::{FencingDriver, NoSink};
use quorate_fencing::{FencingConfig, FencingTiming, StorageFence, StorageFenceError};
use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::driver::transport::TransportKind;
use quorate_membership::driver::{Node, NodeConfig, TokioRuntime, create_cluster, random};
use quorate_membership::{
    BoxFuture, ClusterId, Decision, Epoch, Membership, NodeId, Role, RosterEntry, Runtime, ServerEntry,
    ServerId, Sessions,
};
use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A directory that goes when this does.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    /// A new one on tmpfs, so that no disk is measured.
    pub(crate) fn new() -> std::io::Result<Self> {
        let base =
            if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let tag = u64::from_le_bytes(random()?);
        let path = base.join(format!("quorate-bench-{tag:016x}"));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes certificates for nodes 1 to `count` and the first record, with all of them in the roster.
pub(crate) fn create(dir: &Path, count: u32) -> Result<(), Box<dyn Error>> {
    let ca = Ca::create("bench", ClusterId::from_bytes(random()?))?;
    let mut roster = BTreeMap::new();
    for n in 1..=count {
        let issued = ca.issue_node(&format!("node{n}"), NodeId(n), &[])?;
        issued.save(&dir.join(format!("pki{n}")))?;
        let entry = RosterEntry {
            name: format!("node{n}"),
            key: issued.key_sha256,
            role: Role::Voter,
            addresses: Vec::new(),
        };
        roster.insert(NodeId(n), entry);
    }
    create_cluster(&dir.join("state1"), &credentials(dir, 1)?, roster)?;
    Ok(())
}

/// The certificate of node `id`.
pub(crate) fn credentials(dir: &Path, id: u32) -> Result<Credentials, Box<dyn Error>> {
    Ok(Credentials::load(&dir.join(format!("pki{id}")))?)
}

/// Safety at lease level needs no storage server.
#[derive(Debug)]
struct NoStorage;

impl StorageFence for NoStorage {
    fn install(
        &self,
        _: ServerId,
        entry: &ServerEntry,
        _: Vec<Decision>,
    ) -> BoxFuture<'_, Result<Epoch, StorageFenceError>> {
        let error = StorageFenceError::Failed(format!("no storage in this benchmark: {entry:?}"));
        Box::pin(std::future::ready(Err(error)))
    }
}

/// A running node.
pub(crate) struct BenchNode {
    pub(crate) node: Arc<Node>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) dlm: Arc<Dlm>,
    _fencing: Arc<FencingDriver>,
}

impl BenchNode {
    /// Starts node `id` of the cluster in `dir` and lets it join. Within a tokio runtime.
    pub(crate) fn start(
        dir: &Path,
        id: u32,
        contacts: &[(u32, SocketAddr)],
        sessions: TransportKind,
        busy_poll: Duration,
    ) -> Result<Self, Box<dyn Error>> {
        let listen = "127.0.0.1:0".parse()?;
        let mut config = NodeConfig::lan(dir.join(format!("state{id}")), credentials(dir, id)?, listen);
        config.sessions = sessions;
        config.busy_poll = busy_poll;
        for (other, address) in contacts {
            config.peers.insert(NodeId(*other), vec![*address]);
        }
        let node = Node::start(config)?;
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
        let membership: Arc<dyn Membership> = node.clone();
        let dlm = Dlm::new(membership.clone(), node.clone() as Arc<dyn Sessions>, runtime.clone());
        let fencing = FencingDriver::start(
            membership,
            runtime.clone(),
            Arc::new(NoStorage),
            FencingConfig::new(FencingTiming::lan()),
            Arc::new(NoSink),
        )?;
        node.join();
        Ok(Self { node, runtime, dlm, _fencing: fencing })
    }

    /// Waits until the node holds a lease and `count` nodes are members.
    pub(crate) async fn wait_members(&self, count: usize) {
        while !self.node.is_quorate() || self.node.view().members.len() < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
