//! What a node is started with, and why it may not start.

use super::pki::{Credentials, PkiError, Subject, TlsError};
use super::progress::Progress;
use super::state::{StateDir, StateDirError};
use super::transport::TransportKind;
use crate::machine::{Config, ConfigError, Durable};
use crate::{NodeId, QuorumOptions, RosterEntry, StateId};
use core::fmt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Further addresses to listen on, one for each further path: over each the others keep a connection of its own, and
    /// while one is left no view changes. The n-th is the one that others have in the (n+1)-th place of this node's list.
    pub listen_also: Vec<SocketAddr>,
    /// Where other nodes are, beside what the roster says: the first contact of a node that has no roster yet.
    pub peers: BTreeMap<NodeId, Vec<SocketAddr>>,
    /// The machine's times.
    pub timing: Config,
    /// The kill time of the nodes' supervisors (R8). Membership does not use it; it sees that all nodes have the same.
    pub kill_time: Duration,
    /// What carries heartbeats and the agreement on views.
    pub control: TransportKind,
    /// What carries the sessions. TCP answers in 0.56 of QUIC's time (docs of the design), so it is the usual choice.
    pub sessions: TransportKind,
    /// How long the session loop looks for the next message before it goes to sleep, 0 (never, the default) to
    /// [`BUSY_POLL_MAX`](super::BUSY_POLL_MAX), which more counts as: a CPU given for latency. Each node for itself.
    pub busy_poll: Duration,
    /// The node program's event loops, which must turn for the node to count as alive.
    pub progress: Progress,
}

impl NodeConfig {
    /// The usual settings on one network: QUIC for control, TCP for sessions, [`Config::lan`], a kill time of 0.5 s, no
    /// known peers.
    #[must_use]
    pub fn lan(state_dir: impl Into<PathBuf>, credentials: Credentials, listen: SocketAddr) -> Self {
        Self {
            state_dir: state_dir.into(),
            supervised: false,
            credentials,
            listen,
            listen_also: Vec::new(),
            peers: BTreeMap::new(),
            timing: Config::lan(),
            kill_time: Duration::from_millis(500),
            control: TransportKind::Quic,
            sessions: TransportKind::Tcp,
            busy_poll: Duration::ZERO,
            progress: Progress::new(),
        }
    }
}

/// The times that every node of a cluster must have alike, in milliseconds.
///
/// Who removes a node waits for the end of its lease as long as its own times say (R8): with longer ones at the removed
/// node the wait would be too short. So nodes that differ do not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgreedTimes {
    /// [`Config::heartbeat_interval`].
    pub heartbeat_ms: u32,
    /// [`Config::detection`].
    pub detection_ms: u32,
    /// [`Config::drift_margin`].
    pub drift_margin_ms: u32,
    /// [`NodeConfig::kill_time`].
    pub kill_ms: u32,
}

impl AgreedTimes {
    /// Those of a node with this configuration.
    #[must_use]
    pub fn of(timing: &Config, kill_time: Duration) -> Self {
        let ms = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        Self {
            heartbeat_ms: ms(timing.heartbeat_interval),
            detection_ms: ms(timing.detection),
            drift_margin_ms: ms(timing.drift_margin),
            kill_ms: ms(kill_time),
        }
    }
}

impl fmt::Display for AgreedTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heartbeat_ms, detection_ms, drift_margin_ms, kill_ms } = self;
        write!(
            f,
            "heartbeat_ms = {heartbeat_ms}, detection_ms = {detection_ms}, drift_margin_ms = {drift_margin_ms}, \
             kill_ms = {kill_ms}"
        )
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
    create_cluster_with(state_dir, credentials, roster, QuorumOptions::default())
}

/// As [`create_cluster`], with quorum options that hold from view 1 on.
///
/// # Errors
/// See [`CreateError`]; nothing was written then.
pub fn create_cluster_with(
    state_dir: &Path,
    credentials: &Credentials,
    roster: BTreeMap<NodeId, RosterEntry>,
    quorum: QuorumOptions,
) -> Result<(), CreateError> {
    if let Some(fault) = quorum.fault() {
        return Err(CreateError::Quorum(fault));
    }
    let subject = credentials.me().subject.clone();
    let node = credentials.me().node().ok_or(CreateError::NotANode { subject })?;
    match roster.get(&node) {
        None => return Err(CreateError::NotInRoster(node)),
        Some(entry) if entry.key != credentials.me().key => return Err(CreateError::OtherKey(node)),
        Some(_) => {}
    }
    let state = StateId::from_bytes(random().map_err(CreateError::Random)?);
    let durable = Durable::create_with(credentials.cluster(), node, state, roster, quorum);
    Ok(StateDir::create(state_dir, &durable)?)
}

/// Why a cluster was not created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The quorum options contradict themselves.
    #[error("quorum options: {0}")]
    Quorum(&'static str),
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
