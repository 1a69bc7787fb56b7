//! Connections between nodes: TLS over TCP, QUIC, and one in memory for tests, behind one trait.
//!
//! A transport proves who the peer is by its certificate and carries bytes. It knows neither sessions nor views; what
//! both ends think of each other is told in the hello that follows (`driver::link`).

mod memory;
mod quic;
mod several;
mod tcp;

pub use memory::{MemoryNetwork, MemoryTransport};
pub use quic::QuicTransport;
pub use several::SeveralTransports;
pub use tcp::TcpTransport;

use super::pki::{PeerCertificate, RefusedCertificate};
use crate::{BoxFuture, NodeId};
use core::time::Duration;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};

/// How long a handshake may take, from the first byte on.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(3);
/// How many handshakes of others may be under way; more are turned away, so that strangers cost bounded memory.
pub const HANDSHAKES_MAX: usize = 64;
/// The longest datagram that every transport with datagrams carries, in bytes.
pub const DATAGRAM_BYTES_MAX: usize = 1_100;

/// Which of a node's two kinds of connection it is. Each has a thread of its own, so that a service that computes for
/// long delays no heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Heartbeats, the agreement on views, and nothing else.
    Control,
    /// The sessions of all services.
    Sessions,
}

impl Lane {
    /// The protocol name that TLS negotiates.
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Control => b"quorate-control/1",
            Self::Sessions => b"quorate-sessions/1",
        }
    }

    fn of_alpn(name: &[u8]) -> Option<Self> {
        [Self::Control, Self::Sessions].into_iter().find(|l| l.alpn() == name)
    }
}

/// Which protocol carries a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    /// QUIC over UDP.
    Quic,
    /// TLS 1.3 over TCP.
    Tcp,
}

/// A connection whose peer is proven by its certificate.
pub struct Channel {
    /// What the peer's certificate says.
    pub peer: PeerCertificate,
    /// What it is for.
    pub lane: Lane,
    /// Whether this end dialled.
    pub dialled: bool,
    /// Bytes to the peer, in order.
    pub write: Box<dyn AsyncWrite + Send + Unpin>,
    /// Bytes from the peer, in order.
    pub read: Box<dyn AsyncRead + Send + Unpin>,
    /// Unreliable datagrams, where the transport has them. The connection ends when all three are dropped.
    pub datagrams: Option<Datagrams>,
}

impl core::fmt::Debug for Channel {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Channel")
            .field("peer", &self.peer.subject)
            .field("lane", &self.lane)
            .field("dialled", &self.dialled)
            .finish_non_exhaustive()
    }
}

/// Unreliable datagrams of a connection; cheap to clone.
#[derive(Clone, Debug)]
pub struct Datagrams(DatagramsInner);

#[derive(Clone, Debug)]
enum DatagramsInner {
    Quic(quinn::Connection),
    Memory(memory::Datagrams),
}

impl Datagrams {
    /// Sends one, or drops it: where it is too large or the path is full.
    pub fn send(&self, bytes: Vec<u8>) {
        match &self.0 {
            DatagramsInner::Quic(connection) => {
                if let Err(error) = connection.send_datagram(bytes.into()) {
                    tracing::trace!(target: "quorate_membership", %error, "a datagram was dropped");
                }
            }
            DatagramsInner::Memory(memory) => memory.send(bytes),
        }
    }

    /// The connection's round-trip time as the transport measures it, and the packets it found lost, where it does.
    #[must_use]
    pub fn measured(&self) -> Option<(Duration, u64)> {
        match &self.0 {
            DatagramsInner::Quic(connection) => {
                Some((connection.rtt(), connection.stats().path.lost_packets))
            }
            DatagramsInner::Memory(_) => None,
        }
    }

    /// The next one; `None` once the connection is gone. Dropping the future loses nothing.
    pub async fn receive(&self) -> Option<Vec<u8>> {
        match &self.0 {
            DatagramsInner::Quic(connection) => connection.read_datagram().await.ok().map(Vec::from),
            DatagramsInner::Memory(memory) => memory.receive().await,
        }
    }
}

/// Why there is no connection. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// Nobody listens there: the machine answers, the node does not run. A hint that it died.
    #[error("{address}: nobody listens")]
    Refused {
        /// Where.
        address: SocketAddr,
    },
    /// The network said no.
    #[error("{address}: {source}")]
    Network {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The TLS handshake failed, on either side; for the other side's reason see its log.
    #[error("{address}: {reason}")]
    Handshake {
        /// Where.
        address: SocketAddr,
        /// In the TLS library's words.
        reason: String,
    },
    /// The peer's certificate is refused.
    #[error("{address}: {source}")]
    Certificate {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: RefusedCertificate,
    },
    /// It took too long.
    #[error("{address}: no handshake within {HANDSHAKE_DEADLINE:?}")]
    Deadline {
        /// Where.
        address: SocketAddr,
    },
}

/// Makes and takes connections. What a node's driver needs, and nothing about how one is set up.
pub trait Transport: Send + Sync {
    /// Connects to `node` at `address`; a peer with another node's certificate is refused in the handshake.
    /// Dropping the future gives up.
    fn dial(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Channel, TransportError>>;
    /// The next connection that somebody made to us, its handshake done; `None` after the end. Refused ones are
    /// logged and never seen here. Dropping the future loses nothing.
    fn accept(&self) -> BoxFuture<'_, Option<Channel>>;
    /// Where it listens.
    fn local_address(&self) -> SocketAddr;
}
