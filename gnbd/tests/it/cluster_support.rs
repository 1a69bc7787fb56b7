//! A cluster on paper: certificates, decided records, and servers and clients that believe them.

use crate::common::*;
use quorate_gnbd::client::{ChainSource, ConnectError, FenceClient, Member, NbdConfig, NbdDevice};
use quorate_gnbd::driver::{ClientTls, ServerTls};
use quorate_gnbd::server::{Export, FenceConfig, Listen, Server, ServerConfig};
use quorate_gnbd::{Device, MemoryDevice};
use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::{
    Accept, Ballot, ClusterId, Decision, Epoch, Identity, Incarnation, NodeId, ServerEntry, ServerId,
    StateId, View, Voter, VoterSet,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// An export of the cluster in memory.
pub(crate) fn memory(size: u64) -> Export {
    let device = Device::new(MemoryDevice::new(size));
    Export { name: "shared".into(), description: String::new(), device, cluster: true }
}

pub(crate) const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);

/// Three voters; whoever is named is a member.
pub(crate) fn decision(epoch: u64, members: &[(u32, u64)], servers: &[ServerId]) -> Decision {
    let state = |n: u32| StateId::from_bytes([n as u8; 16]);
    let voters = (1..=3).map(|n| (NodeId(n), Voter { state: state(n), votes: 1 })).collect();
    let entry = ServerEntry { name: "storage".into(), address: "127.0.0.1:1".into() };
    let view = View {
        epoch: Epoch(epoch),
        members: members.iter().map(|(n, i)| (NodeId(*n), Incarnation(*i))).collect(),
        voters: VoterSet { voters, tie_breaker: None, expected: 0 },
        servers: servers.iter().map(|s| (*s, entry.clone())).collect(),
        ..View::empty(CLUSTER)
    };
    let ballot = Ballot { round: epoch, node: 1 };
    let accept = |n| Accept { state: state(n), ballot, acknowledged_ns_ago: BTreeMap::new() };
    Decision { view, accepts: (1..=2).map(|n| (NodeId(n), accept(n))).collect() }
}

/// What a node has installed; the test decides.
#[derive(Default)]
pub(crate) struct Chain(Mutex<Vec<Decision>>);

impl Chain {
    pub(crate) fn decide(&self, decision: Decision) {
        self.0.lock().unwrap().push(decision);
    }

    pub(crate) fn all(&self) -> Vec<Decision> {
        self.0.lock().unwrap().clone()
    }
}

impl ChainSource for Chain {
    fn epoch(&self) -> Epoch {
        self.0.lock().unwrap().last().map_or(Epoch(0), |d| d.view.epoch)
    }
    fn chain_since(&self, epoch: Epoch) -> Vec<Decision> {
        let mut chain = self.all();
        chain.retain(|d| epoch < d.view.epoch);
        chain
    }
}

pub(crate) struct Cluster {
    pub(crate) temp: Temp,
    pub(crate) chain: Arc<Chain>,
    ca: Ca,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let cluster =
            Self { temp: Temp::new(), chain: Arc::default(), ca: Ca::create("test", CLUSTER).unwrap() };
        let ip = ["127.0.0.1".parse().unwrap()];
        cluster.ca.issue_server("storage", &ip).unwrap().save(&cluster.dir("storage")).unwrap();
        for n in 1..=3 {
            let issued = cluster.ca.issue_node(&format!("n{n}"), NodeId(n), &ip).unwrap();
            issued.save(&cluster.dir(&format!("n{n}"))).unwrap();
        }
        cluster.ca.issue_client("tool").unwrap().save(&cluster.dir("tool")).unwrap();
        cluster
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.temp.0.join("pki").join(name)
    }

    pub(crate) fn credentials(&self, name: &str) -> Credentials {
        Credentials::load(&self.dir(name)).unwrap()
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.temp.0.join("state")
    }

    pub(crate) async fn server(&self, address: SocketAddr, exports: Vec<Export>) -> Server {
        start_server(address, &self.dir("storage"), &self.state_dir(), exports).await
    }

    pub(crate) fn tls(&self, name: &str) -> ClientTls {
        ClientTls::from_credentials(&self.credentials(name), "storage").unwrap()
    }

    pub(crate) fn fence_client(&self, node: u32) -> FenceClient {
        FenceClient::new(self.tls(&format!("n{node}")))
    }

    pub(crate) fn config(&self, address: SocketAddr, certificate: &str, who: (u32, u64)) -> NbdConfig {
        let who = Identity::new(NodeId(who.0), Incarnation(who.1));
        let chain = Arc::clone(&self.chain) as Arc<dyn ChainSource>;
        NbdConfig {
            address: address.to_string(),
            export: "shared".into(),
            tls: Some(self.tls(certificate)),
            member: Some(Member { cluster: CLUSTER, who, chain }),
            connections: 2,
        }
    }

    pub(crate) async fn member(
        &self,
        address: SocketAddr,
        who: (u32, u64),
    ) -> Result<NbdDevice, ConnectError> {
        NbdDevice::connect(self.config(address, &format!("n{}", who.0), who)).await
    }
}

pub(crate) fn entry(address: SocketAddr) -> ServerEntry {
    ServerEntry { name: "storage".into(), address: address.to_string() }
}

pub(crate) async fn start_server(
    address: SocketAddr,
    pki: &Path,
    state_dir: &Path,
    exports: Vec<Export>,
) -> Server {
    let credentials = Credentials::load(pki).unwrap();
    let config = |exports: &[Export]| ServerConfig {
        listen: vec![Listen { address, tls: true }],
        tls: Some(ServerTls::from_credentials(&credentials).unwrap()),
        exports: exports.to_vec(),
        fence: Some(FenceConfig { state_dir: state_dir.into(), cluster: Some(CLUSTER), trust: None }),
        connections_max: 64,
    };
    Server::start(config(&exports)).await.unwrap()
}
