//! Several listening sockets as one transport: a node with more than one address.

use super::{Channel, HANDSHAKES_MAX, Lane, Transport, TransportError};
use crate::{BoxFuture, NodeId};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

/// Takes connections on all sockets, and dials from the one whose address is nearest to the other end's, so that each path
/// uses its own interface.
pub struct SeveralTransports {
    each: Vec<Arc<dyn Transport>>,
    accepted: Mutex<mpsc::Receiver<Channel>>,
    tasks: Vec<JoinHandle<()>>,
}

impl core::fmt::Debug for SeveralTransports {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.each.iter().map(|t| t.local_address())).finish()
    }
}

impl SeveralTransports {
    /// The first one is the node's main address. Called on the runtime that shall serve it.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(each: Vec<Arc<dyn Transport>>) -> Self {
        assert!(!each.is_empty(), "a node listens somewhere");
        let (sender, accepted) = mpsc::channel(HANDSHAKES_MAX);
        let tasks = each.iter().map(|transport| {
            let (transport, sender) = (Arc::clone(transport), sender.clone());
            tokio::spawn(async move {
                while let Some(channel) = transport.accept().await {
                    if sender.send(channel).await.is_err() {
                        return;
                    }
                }
            })
        });
        let tasks = tasks.collect();
        Self { each, accepted: Mutex::new(accepted), tasks }
    }
}

/// How many leading bits two addresses share.
fn shared_bits(a: IpAddr, b: IpAddr) -> u32 {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    }
}

impl Drop for SeveralTransports {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Transport for SeveralTransports {
    fn dial(
        &self,
        node: NodeId,
        address: SocketAddr,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Channel, TransportError>> {
        let near = |t: &&Arc<dyn Transport>| shared_bits(t.local_address().ip(), address.ip());
        // Of equally near ones the first, as in the node's own order.
        let best = self.each.iter().rev().max_by_key(near).or_else(|| self.each.first());
        best.map_or_else(
            || Box::pin(async move { Err(TransportError::Refused { address }) }) as BoxFuture<'_, _>,
            |transport| transport.dial(node, address, lane),
        )
    }

    fn accept(&self) -> BoxFuture<'_, Option<Channel>> {
        Box::pin(async move { self.accepted.lock().await.recv().await })
    }

    fn local_address(&self) -> SocketAddr {
        self.each.first().map_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)), |t| t.local_address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_address_is_the_one_in_the_same_network() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(shared_bits(ip("10.0.1.7"), ip("10.0.1.9")) > shared_bits(ip("10.0.1.7"), ip("10.0.2.9")));
        assert_eq!(shared_bits(ip("10.0.1.7"), ip("::1")), 0);
        assert_eq!(shared_bits(ip("::1"), ip("::1")), 128);
    }
}
