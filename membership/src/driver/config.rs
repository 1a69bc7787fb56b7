//! What a node is started with, and why it may not start.

use super::pki::{Credentials, PkiError, Subject, TlsError};
use super::progress::Progress;
use super::state::{StateDir, StateDirError};
use super::transport::TransportKind;
use crate::machine::{Config, ConfigError, Durable};
use crate::{NodeId, RosterEntry, StateId};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Everything a node is started with.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The state directory. An empty one is filled with a state that knows nothing.
    pub state_dir: PathBuf,
    /// Whether a parent process, the supervisor, holds the directory's lock already (R1).
    pub supervised: bool,
    /// The node's certificate; its cluster and node id are read from there.
    pub credentials: Credentials,
    /// Where to listen, for UDP and TCP alike. Port 0 lets the system choose one that is free in both.
    pub listen: SocketAddr,
    /// Where other nodes are, beside what the roster says: the first contact of a node that has no roster yet.
    pub peers: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// The machine's times.
    pub timing: Config,
    /// What carries heartbeats and the agreement on views.
    pub control: TransportKind,
    /// What carries the sessions. TCP answers in 0.56 of QUIC's time (docs of the design), so it is the usual choice.
    pub sessions: TransportKind,
    /// The node program's event loops, which must turn for the node to count as alive.
    pub progress: Progress,
}

impl NodeConfig {
    /// The usual settings on one network: QUIC for control, TCP for sessions, [`Config::lan`], no known peers.
    #[must_use]
    pub fn lan(state_dir: impl Into<PathBuf>, credentials: Credentials, listen: SocketAddr) -> Self {
        Self {
            state_dir: state_dir.into(),
            supervised: false,
            credentials,
            listen,
            peers: BTreeMap::new(),
            timing: Config::lan(),
            control: TransportKind::Quic,
            sessions: TransportKind::Tcp,
            progress: Progress::new(),
        }
    }
}

/// Why a node did not start. No packet was sent; the counter of lives may have been raised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// The certificate.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The certificate is not one of a node.
    #[error("the certificate is of {subject}, a node's is needed")]
    NotANode {
        /// Whose it is.
        subject: Subject,
    },
    /// The TLS library.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The machine's times contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system gives no thread, timer or randomness.
    #[error("{what}: {source}")]
    System {
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Makes the state directory of a new cluster's first node: view 1, with that node as the one voter (R4).
///
/// Cluster and node are those of the certificate; `roster` must hold the node.
///
/// # Errors
/// See [`CreateError`]; nothing was written then.
pub fn create_cluster(
    state_dir: &Path,
    credentials: &Credentials,
    roster: BTreeMap<NodeId, RosterEntry>,
) -> Result<(), CreateError> {
    let subject = credentials.me().subject.clone();
    let node = credentials.me().node().ok_or(CreateError::NotANode { subject })?;
    match roster.get(&node) {
        None => return Err(CreateError::NotInRoster(node)),
        Some(entry) if entry.key != credentials.me().key => return Err(CreateError::OtherKey(node)),
        Some(_) => {}
    }
    let state = StateId::from_bytes(random().map_err(CreateError::Random)?);
    let durable = Durable::create(credentials.cluster(), node, state, roster);
    Ok(StateDir::create(state_dir, &durable)?)
}

/// Why a cluster was not created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The certificate is not one of a node.
    #[error("the certificate is of {subject}, a node's is needed")]
    NotANode {
        /// Whose it is.
        subject: Subject,
    },
    /// The first node would not be allowed in.
    #[error("node {0} is not in the roster")]
    NotInRoster(NodeId),
    /// The roster has another key for the first node than its certificate.
    #[error("the roster's key of node {0} is not the certificate's")]
    OtherKey(NodeId),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// The system gives no randomness.
    #[error("no randomness: {0}")]
    Random(io::Error),
}

/// Random bytes from the system, for ids.
///
/// # Errors
/// The system has none.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}
