//! QUIC: one stream in each direction, and datagrams for heartbeats.
//!
//! The packets stay at or below [`MTU_MAX`]: quinn sends up to ten of them in one call, and above 6,550 bytes each the
//! kernel refuses such a batch, which quinn takes for success.

use super::tcp::identify;
use super::{
    Channel, Datagrams, DatagramsInner, HANDSHAKE_DEADLINE, HANDSHAKES_MAX, Lane, Transport, TransportError,
};
use crate::driver::pki::{Credentials, TlsError, node_tls_name};
use crate::{BoxFuture, NodeId};
use core::time::Duration;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, Endpoint, EndpointConfig, MtuDiscoveryConfig, VarInt};
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::{Mutex, Semaphore, mpsc};

/// The largest UDP payload, in bytes.
const MTU_MAX: u16 = 6_500;
/// A connection is given up after this much silence. Membership decides earlier; this only frees what is left.
const IDLE: Duration = Duration::from_secs(10);
/// Between two signs of life of an idle connection.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// How much of datagrams may wait to be read: a few hundred heartbeats.
const DATAGRAM_BUFFER_BYTES: usize = 256 << 10;
/// How much a peer may have under way on its stream.
const WINDOW_BYTES: u32 = 8 << 20;

/// A UDP socket that takes and makes connections.
pub struct QuicTransport {
    credentials: Credentials,
    endpoint: Endpoint,
    address: SocketAddr,
    settings: Arc<quinn::TransportConfig>,
    accepted: Mutex<mpsc::Receiver<Channel>>,
    listener: tokio::task::JoinHandle<()>,
}

impl core::fmt::Debug for QuicTransport {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("QuicTransport").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Why a transport over QUIC cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuicError {
    /// Key and certificate do not fit.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] std::io::Error),
    /// The provider lacks the cipher that QUIC starts with.
    #[error("the TLS provider cannot do QUIC")]
    Cipher,
}

fn settings() -> Arc<quinn::TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    let mut settings = quinn::TransportConfig::default();
    settings
        .mtu_discovery_config(Some(mtu))
        .max_idle_timeout(IDLE.try_into().ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(u64::from(WINDOW_BYTES))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES);
    Arc::new(settings)
}

impl QuicTransport {
    /// Serves a bound socket for these lanes. Called on the runtime that shall serve it.
    ///
    /// # Errors
    /// The credentials do not fit, or the socket cannot be used.
    pub fn new(
        socket: std::net::UdpSocket,
        credentials: Credentials,
        lanes: &[Lane],
    ) -> Result<Self, QuicError> {
        let settings = settings();
        let mut tls = credentials.server_config()?;
        tls.alpn_protocols = lanes.iter().map(|l| l.alpn().to_vec()).collect();
        let tls = QuicServerConfig::try_from(tls).map_err(|_| QuicError::Cipher)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(settings.clone());
        server.max_incoming(HANDSHAKES_MAX);
        let address = socket.local_addr()?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = Endpoint::new(EndpointConfig::default(), Some(server), socket, runtime)?;
        let (sender, receiver) = mpsc::channel(HANDSHAKES_MAX);
        let listener = tokio::spawn(listen(endpoint.clone(), credentials.clone(), sender));
        Ok(Self { credentials, endpoint, address, settings, accepted: Mutex::new(receiver), listener })
    }

    async fn connect(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> Result<Channel, TransportError> {
        let handshake = |reason: String| TransportError::Handshake { address, reason };
        let mut tls = self.credentials.client_config().map_err(|e| handshake(e.to_string()))?;
        tls.alpn_protocols = vec![lane.alpn().to_vec()];
        let tls = QuicClientConfig::try_from(tls).map_err(|e| handshake(e.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(self.settings.clone());
        let name = node_tls_name(self.credentials.cluster(), node);
        let connecting =
            self.endpoint.connect_with(config, address, &name).map_err(|e| handshake(e.to_string()))?;
        let connection = connecting.await.map_err(|e| failed(address, e))?;
        let peer = certificate(&self.credentials, &connection, address)?;
        let (write, read) = connection.open_bi().await.map_err(|e| failed(address, e))?;
        Ok(channel(peer, lane, true, connection, write, read))
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.listener.abort();
        self.endpoint.close(VarInt::from_u32(0), b"the node stops");
    }
}

fn failed(address: SocketAddr, error: ConnectionError) -> TransportError {
    match error {
        ConnectionError::TimedOut => TransportError::Deadline { address },
        other => TransportError::Handshake { address, reason: other.to_string() },
    }
}

fn channel(
    peer: crate::driver::pki::PeerCertificate,
    lane: Lane,
    dialled: bool,
    connection: quinn::Connection,
    write: quinn::SendStream,
    read: quinn::RecvStream,
) -> Channel {
    let datagrams = Some(Datagrams(DatagramsInner::Quic(connection)));
    Channel { peer, lane, dialled, write: Box::new(write), read: Box::new(read), datagrams }
}

fn certificate(
    credentials: &Credentials,
    connection: &quinn::Connection,
    address: SocketAddr,
) -> Result<crate::driver::pki::PeerCertificate, TransportError> {
    let chain =
        connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    identify(credentials, chain.as_deref().map(Vec::as_slice), address)
}

async fn listen(endpoint: Endpoint, credentials: Credentials, accepted: mpsc::Sender<Channel>) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let address = incoming.remote_address();
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(target: "quorate_membership", %address, "too many handshakes are under way");
            incoming.refuse();
            continue;
        };
        let (credentials, accepted) = (credentials.clone(), accepted.clone());
        tokio::spawn(async move {
            let result = tokio::time::timeout(HANDSHAKE_DEADLINE, take(incoming, address, &credentials))
                .await
                .unwrap_or(Err(TransportError::Deadline { address }));
            drop(slot);
            match result {
                Ok(channel) => drop(accepted.send(channel).await),
                Err(error) => tracing::warn!(target: "quorate_membership", %error, "a peer was refused"),
            }
        });
    }
}

async fn take(
    incoming: quinn::Incoming,
    address: SocketAddr,
    credentials: &Credentials,
) -> Result<Channel, TransportError> {
    let connection = incoming.await.map_err(|e| failed(address, e))?;
    let peer = certificate(credentials, &connection, address)?;
    let lane = connection
        .handshake_data()
        .and_then(|any| any.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .and_then(|name| Lane::of_alpn(&name));
    let Some(lane) = lane else {
        return Err(TransportError::Handshake { address, reason: "it asks for no lane of ours".into() });
    };
    let (write, read) = connection.accept_bi().await.map_err(|e| failed(address, e))?;
    Ok(channel(peer, lane, false, connection, write, read))
}

impl Transport for QuicTransport {
    fn dial(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Channel, TransportError>> {
        Box::pin(async move {
            tokio::time::timeout(HANDSHAKE_DEADLINE, self.connect(node, address, lane))
                .await
                .unwrap_or(Err(TransportError::Deadline { address }))
        })
    }

    fn accept(&self) -> BoxFuture<'_, Option<Channel>> {
        Box::pin(async move { self.accepted.lock().await.recv().await })
    }

    fn local_address(&self) -> SocketAddr {
        self.address
    }
}
