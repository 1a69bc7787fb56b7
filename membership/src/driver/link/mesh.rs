//! Keeps one lane connected to every peer: accepts, dials, and dials again with a growing delay.

use super::hello::{Established, HelloError, HelloRefusal, Me, RosterCheck, exchange};
use crate::NodeId;
use crate::driver::transport::{Channel, Lane, Transport, TransportError};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

/// The first delay after a failed attempt; it doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest delay.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The end with the higher node id lets the other dial first, so that two connections are the exception.
const POLITENESS: Duration = Duration::from_millis(100);
/// Connections to one node, all its lives and both directions together.
const LINKS_PER_NODE_MAX: usize = 8;

/// What the mesh tells its lane.
pub(crate) enum MeshEvent {
    /// A connection that both ends accepted. Once it ends, [`Mesh::lost`] is called.
    Up(Box<Established>),
    /// The machine of that node answers that nobody listens.
    Unreachable(NodeId),
}

#[derive(Default)]
struct Counts {
    links: Mutex<BTreeMap<NodeId, usize>>,
    changed: Notify,
}

impl Counts {
    fn of(&self, node: NodeId) -> usize {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied().unwrap_or(0)
    }

    /// Counts one more unless there are too many.
    fn take(&self, node: NodeId) -> bool {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let count = links.entry(node).or_default();
        let fits = *count < LINKS_PER_NODE_MAX;
        *count += usize::from(fits);
        fits
    }

    fn give_back(&self, node: NodeId) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = links.get_mut(&node) {
            *count = count.saturating_sub(1);
        }
        drop(links);
        self.changed.notify_waiters();
    }
}

#[derive(Clone)]
struct Common {
    me: Me,
    lane: Lane,
    transport: Arc<dyn Transport>,
    roster: RosterCheck,
    counts: Arc<Counts>,
    events: mpsc::Sender<MeshEvent>,
}

/// One lane's connections.
pub(crate) struct Mesh {
    common: Common,
    dialers: BTreeMap<NodeId, (Vec<SocketAddr>, JoinHandle<()>)>,
    acceptor: Option<JoinHandle<()>>,
}

impl Mesh {
    /// Without targets. Called on the lane's runtime.
    pub(crate) fn new(
        me: Me,
        lane: Lane,
        transport: Arc<dyn Transport>,
        roster: RosterCheck,
        events: mpsc::Sender<MeshEvent>,
    ) -> Self {
        let common = Common { me, lane, transport, roster, counts: Arc::default(), events };
        Self { common, dialers: BTreeMap::new(), acceptor: None }
    }

    /// Takes connections from the lane's own transport. Those of other lanes go to `others`.
    pub(crate) fn accept(&mut self, others: Option<mpsc::Sender<Channel>>) {
        let common = self.common.clone();
        self.acceptor = Some(tokio::spawn(async move {
            while let Some(channel) = common.transport.accept().await {
                if channel.lane == common.lane {
                    tokio::spawn(greet(common.clone(), channel));
                } else if let Some(others) = &others {
                    drop(others.send(channel).await);
                }
            }
        }));
    }

    /// Takes connections that another lane's transport accepted.
    pub(crate) fn accept_from(&mut self, mut channels: mpsc::Receiver<Channel>) {
        let common = self.common.clone();
        self.acceptor = Some(tokio::spawn(async move {
            while let Some(channel) = channels.recv().await {
                tokio::spawn(greet(common.clone(), channel));
            }
        }));
    }

    /// Whom to keep a connection with, and where they are.
    pub(crate) fn set_targets(&mut self, targets: &BTreeMap<NodeId, Vec<SocketAddr>>) {
        self.dialers.retain(|node, (addresses, task)| {
            let stays = targets.get(node) == Some(addresses);
            if !stays {
                task.abort();
            }
            stays
        });
        for (node, addresses) in
            targets.iter().filter(|(n, a)| **n != self.common.me.identity.node && !a.is_empty())
        {
            self.dialers.entry(*node).or_insert_with(|| {
                let task = tokio::spawn(dial(self.common.clone(), *node, addresses.clone()));
                (addresses.clone(), task)
            });
        }
    }

    /// A connection that was `Up` has ended.
    pub(crate) fn lost(&self, node: NodeId) {
        self.common.counts.give_back(node);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.acceptor.iter().for_each(JoinHandle::abort);
        self.dialers.values().for_each(|(_, task)| task.abort());
    }
}

/// The accepting side of a hello.
async fn greet(common: Common, channel: Channel) {
    let subject = channel.peer.subject.clone();
    match establish(&common, channel, None).await {
        Ok(()) => {}
        Err(error) => {
            tracing::warn!(target: "quorate_membership", peer = %subject, %error, "a peer was not connected");
        }
    }
}

async fn establish(common: &Common, channel: Channel, dialled: Option<NodeId>) -> Result<(), HelloError> {
    let mut taken = None;
    let accepts = |node: NodeId, key: &[u8; 32]| {
        common.roster.check(node, key)?;
        if !common.counts.take(node) {
            return Err(HelloRefusal::TooMany(node));
        }
        taken = Some(node);
        Ok(())
    };
    let result = exchange(channel, &common.me, common.lane, dialled, accepts).await;
    let sent = match result {
        Ok(established) => {
            let sent = common.events.send(MeshEvent::Up(Box::new(established))).await;
            sent.map_err(|_| HelloError::Broken(std::io::ErrorKind::BrokenPipe.into()))
        }
        Err(error) => Err(error),
    };
    if let (Err(_), Some(node)) = (&sent, taken) {
        common.counts.give_back(node);
    }
    sent
}

/// Keeps a connection to one node, forever.
async fn dial(common: Common, node: NodeId, addresses: Vec<SocketAddr>) {
    let mut backoff = BACKOFF_MIN;
    let mut last = String::new();
    loop {
        connected(&common.counts, node).await;
        if node < common.me.identity.node {
            tokio::time::sleep(POLITENESS).await;
            if 0 < common.counts.of(node) {
                continue;
            }
        }
        match attempt(&common, node, &addresses).await {
            Ok(()) => {
                backoff = BACKOFF_MIN;
                last.clear();
                continue;
            }
            Err(error) if error != last => {
                tracing::warn!(target: "quorate_membership", %node, error, "a peer cannot be reached");
                last = error;
            }
            Err(_) => {}
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Waits until there is no connection to `node`.
async fn connected(counts: &Counts, node: NodeId) {
    loop {
        let changed = counts.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if counts.of(node) == 0 {
            return;
        }
        changed.await;
    }
}

async fn attempt(common: &Common, node: NodeId, addresses: &[SocketAddr]) -> Result<(), String> {
    let mut errors = Vec::new();
    for address in addresses {
        match common.transport.dial(node, *address, common.lane).await {
            Ok(channel) => match establish(common, channel, Some(node)).await {
                Ok(()) => return Ok(()),
                Err(error) => errors.push(format!("{address}: {error}")),
            },
            Err(error) => {
                if matches!(error, TransportError::Refused { .. }) {
                    drop(common.events.send(MeshEvent::Unreachable(node)).await);
                }
                errors.push(error.to_string());
            }
        }
    }
    Err(errors.join("; "))
}
