//! TLS 1.3 over TCP.

use super::{Channel, HANDSHAKE_DEADLINE, HANDSHAKES_MAX, Lane, Transport, TransportError};
use crate::driver::pki::{Credentials, TlsError, node_tls_name};
use crate::{BoxFuture, NodeId};
use rustls::pki_types::{CertificateDer, ServerName};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A listening socket and the means to dial.
pub struct TcpTransport {
    credentials: Credentials,
    address: SocketAddr,
    accepted: Mutex<mpsc::Receiver<Channel>>,
    listener: tokio::task::JoinHandle<()>,
}

impl core::fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("TcpTransport").field("address", &self.address).finish_non_exhaustive()
    }
}

impl TcpTransport {
    /// Listens on `socket` (bound and listening) for these lanes. Called on the runtime that shall serve it.
    ///
    /// # Errors
    /// The credentials do not fit, or the socket cannot be used.
    pub fn new(
        socket: std::net::TcpListener,
        credentials: Credentials,
        lanes: &[Lane],
    ) -> Result<Self, TcpError> {
        let mut config = credentials.server_config()?;
        config.alpn_protocols = lanes.iter().map(|l| l.alpn().to_vec()).collect();
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        let socket = TcpListener::from_std(socket)?;
        let (sender, receiver) = mpsc::channel(HANDSHAKES_MAX);
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = tokio::spawn(listen(socket, acceptor, credentials.clone(), sender));
        Ok(Self { credentials, address, accepted: Mutex::new(receiver), listener })
    }

    async fn connect(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> Result<Channel, TransportError> {
        let network = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::ConnectionRefused => TransportError::Refused { address },
            _ => TransportError::Network { address, source },
        };
        let handshake = |reason: String| TransportError::Handshake { address, reason };
        let mut config = self.credentials.client_config().map_err(|e| handshake(e.to_string()))?;
        config.alpn_protocols = vec![lane.alpn().to_vec()];
        let name = ServerName::try_from(node_tls_name(self.credentials.cluster(), node))
            .map_err(|e| handshake(e.to_string()))?;
        let stream = TcpStream::connect(address).await.map_err(network)?;
        stream.set_nodelay(true).map_err(network)?;
        let stream = TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|e| handshake(e.to_string()))?;
        let certificates = stream.get_ref().1.peer_certificates();
        let peer = identify(&self.credentials, certificates, address)?;
        let (read, write) = tokio::io::split(stream);
        Ok(Channel {
            peer,
            lane,
            dialled: true,
            write: Box::new(write),
            read: Box::new(read),
            datagrams: None,
        })
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// Why a transport over TCP cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TcpError {
    /// Key and certificate do not fit.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] std::io::Error),
}

pub(super) fn identify(
    credentials: &Credentials,
    certificates: Option<&[CertificateDer<'_>]>,
    address: SocketAddr,
) -> Result<crate::driver::pki::PeerCertificate, TransportError> {
    let first = certificates.and_then(|c| c.first()).map_or(&[][..], |c| c.as_ref());
    credentials.identify(first).map_err(|source| TransportError::Certificate { address, source })
}

async fn listen(
    socket: TcpListener,
    acceptor: TlsAcceptor,
    credentials: Credentials,
    accepted: mpsc::Sender<Channel>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let (stream, address) = match socket.accept().await {
            Ok(both) => both,
            Err(error) => {
                // Out of descriptors, most likely: those that are open must close first.
                tracing::warn!(target: "quorate_membership", %error, "a connection cannot be taken");
                tokio::time::sleep(HANDSHAKE_DEADLINE / 30).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(target: "quorate_membership", %address, "too many handshakes are under way");
            continue;
        };
        let (acceptor, credentials, accepted) = (acceptor.clone(), credentials.clone(), accepted.clone());
        tokio::spawn(async move {
            let result =
                tokio::time::timeout(HANDSHAKE_DEADLINE, take(stream, address, acceptor, &credentials))
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
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    credentials: &Credentials,
) -> Result<Channel, TransportError> {
    let handshake = |e: std::io::Error| TransportError::Handshake { address, reason: e.to_string() };
    stream.set_nodelay(true).map_err(handshake)?;
    let stream = acceptor.accept(stream).await.map_err(handshake)?;
    let connection = stream.get_ref().1;
    let lane = connection.alpn_protocol().and_then(Lane::of_alpn);
    let peer = identify(credentials, connection.peer_certificates(), address)?;
    let Some(lane) = lane else {
        return Err(TransportError::Handshake { address, reason: "it asks for no lane of ours".into() });
    };
    let (read, write) = tokio::io::split(stream);
    Ok(Channel { peer, lane, dialled: false, write: Box::new(write), read: Box::new(read), datagrams: None })
}

impl Transport for TcpTransport {
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
