//! A transport inside one process, for tests: pipes of bytes, and datagrams that are never lost.

use super::{Channel, Datagrams as AnyDatagrams, DatagramsInner, Lane, Transport, TransportError};
use crate::driver::pki::PeerCertificate;
use crate::{BoxFuture, NodeId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use tokio::sync::{Mutex, mpsc};

/// How many bytes a pipe holds.
const PIPE_BYTES: usize = 64 << 10;
/// How many datagrams and connections wait; more are dropped, or refused.
const QUEUE_MAX: usize = 64;

type Listeners = BTreeMap<SocketAddr, (PeerCertificate, mpsc::Sender<Channel>)>;

/// The wires between the transports of one process.
#[derive(Clone, Debug, Default)]
pub struct MemoryNetwork(Arc<StdMutex<Listeners>>);

impl MemoryNetwork {
    /// Without anybody on it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens at `address` as the holder of `certificate`. A former listener there is replaced.
    #[must_use]
    pub fn listen(&self, address: SocketAddr, certificate: PeerCertificate) -> MemoryTransport {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address, (certificate.clone(), sender));
        MemoryTransport { network: self.clone(), address, certificate, accepted: Mutex::new(receiver) }
    }
}

/// One end on a [`MemoryNetwork`].
#[derive(Debug)]
pub struct MemoryTransport {
    network: MemoryNetwork,
    address: SocketAddr,
    certificate: PeerCertificate,
    accepted: Mutex<mpsc::Receiver<Channel>>,
}

impl MemoryTransport {
    fn connect(&self, node: NodeId, address: SocketAddr, lane: Lane) -> Result<Channel, TransportError> {
        let listeners = self.network.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((peer, accept)) = listeners.get(&address) else {
            return Err(TransportError::Refused { address });
        };
        let wrong = |reason: String| TransportError::Handshake { address, reason };
        if peer.node() != Some(node) {
            return Err(wrong(format!("the certificate is of {}, not of node {node}", peer.subject)));
        }
        let (here, there) = tokio::io::duplex(PIPE_BYTES);
        let (to, from_us) = mpsc::channel(QUEUE_MAX);
        let (to_us, from) = mpsc::channel(QUEUE_MAX);
        let theirs = end(self.certificate.clone(), lane, false, there, to_us, from_us);
        accept.try_send(theirs).map_err(|_| TransportError::Refused { address })?;
        Ok(end(peer.clone(), lane, true, here, to, from))
    }
}

fn end(
    peer: PeerCertificate,
    lane: Lane,
    dialled: bool,
    pipe: tokio::io::DuplexStream,
    to: mpsc::Sender<Vec<u8>>,
    from: mpsc::Receiver<Vec<u8>>,
) -> Channel {
    let (read, write) = tokio::io::split(pipe);
    let datagrams = Datagrams { to, from: Arc::new(Mutex::new(from)) };
    let datagrams = Some(AnyDatagrams(DatagramsInner::Memory(datagrams)));
    Channel { peer, lane, dialled, write: Box::new(write), read: Box::new(read), datagrams }
}

#[derive(Clone, Debug)]
pub(super) struct Datagrams {
    to: mpsc::Sender<Vec<u8>>,
    from: Arc<Mutex<mpsc::Receiver<Vec<u8>>>>,
}

impl Datagrams {
    pub(super) fn send(&self, bytes: Vec<u8>) {
        // Full or gone: a lost datagram, as on any network.
        drop(self.to.try_send(bytes));
    }

    pub(super) async fn receive(&self) -> Option<Vec<u8>> {
        self.from.lock().await.recv().await
    }
}

impl Transport for MemoryTransport {
    fn dial(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Channel, TransportError>> {
        let result = self.connect(node, address, lane);
        Box::pin(async move { result })
    }

    fn accept(&self) -> BoxFuture<'_, Option<Channel>> {
        Box::pin(async move { self.accepted.lock().await.recv().await })
    }

    fn local_address(&self) -> SocketAddr {
        self.address
    }
}
