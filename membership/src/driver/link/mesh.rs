//! Keeps one lane connected to every peer: accepts, dials, and dials again with a growing delay. A peer with several
//! addresses has a connection over each: a *path*, named by the address's place in the peer's list.

use super::hello::{Established, HelloError, HelloRefusal, Me, RosterCheck, exchange};
use crate::NodeId;
use crate::driver::transport::{Channel, Lane, Transport, TransportError};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
const LINKS_PER_NODE_MAX: usize = 16;
/// Addresses of one node that are dialled.
pub(crate) const PATHS_MAX: usize = 4;

/// Where a node is: for each path the addresses that lead there, best first.
pub(crate) type Paths = Vec<Vec<SocketAddr>>;

/// What the mesh tells its lane.
pub(crate) enum MeshEvent {
    /// A connection that both ends accepted. Once it ends, [`Mesh::lost`] is called.
    Up(Box<Established>),
    /// The machine of that node answers that nobody listens.
    Unreachable(NodeId),
}

#[derive(Default)]
struct Counts {
    links: Mutex<Links>,
    changed: Notify,
}

#[derive(Default)]
struct Links {
    /// With those whose hello is under way.
    all: BTreeMap<NodeId, usize>,
    up: BTreeMap<(NodeId, u8), usize>,
}

impl Counts {
    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, node: NodeId, path: u8) -> usize {
        self.lock().up.get(&(node, path)).copied().unwrap_or(0)
    }

    fn up(&self, node: NodeId, path: u8) {
        *self.lock().up.entry((node, path)).or_default() += 1;
    }

    /// Counts one more unless there are too many.
    fn take(&self, node: NodeId) -> bool {
        let mut links = self.lock();
        let count = links.all.entry(node).or_default();
        let fits = *count < LINKS_PER_NODE_MAX;
        *count += usize::from(fits);
        fits
    }

    /// One less, which was up on a path or never came up.
    fn give_back(&self, node: NodeId, path: Option<u8>) {
        let mut links = self.lock();
        if let Some(count) = links.all.get_mut(&node) {
            *count = count.saturating_sub(1);
        }
        if let Some(count) = path.and_then(|p| links.up.get_mut(&(node, p))) {
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
    dialers: BTreeMap<(NodeId, u8), (Vec<SocketAddr>, JoinHandle<()>)>,
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
    pub(crate) fn set_targets(&mut self, targets: &BTreeMap<NodeId, Paths>) {
        self.dialers.retain(|(node, path), (addresses, task)| {
            let stays = targets.get(node).and_then(|p| p.get(usize::from(*path))) == Some(addresses);
            if !stays {
                task.abort();
            }
            stays
        });
        for (node, paths) in targets.iter().filter(|(n, _)| **n != self.common.me.identity.node) {
            for (path, addresses) in (0..).zip(paths.iter().take(PATHS_MAX)).filter(|(_, a)| !a.is_empty()) {
                self.dialers.entry((*node, path)).or_insert_with(|| {
                    let common = self.common.clone();
                    let common = Common { me: Me { path, ..common.me }, ..common };
                    (addresses.clone(), tokio::spawn(dial(common, *node, addresses.clone())))
                });
            }
        }
    }

    /// A connection that was `Up` has ended.
    pub(crate) fn lost(&self, node: NodeId, path: u8) {
        self.common.counts.give_back(node, Some(path));
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
    let mut up = None;
    let sent = match result {
        Ok(established) => {
            up = Some(established.path);
            common.counts.up(established.peer.node, established.path);
            let sent = common.events.send(MeshEvent::Up(Box::new(established))).await;
            sent.map_err(|_| HelloError::Broken(std::io::ErrorKind::BrokenPipe.into()))
        }
        Err(error) => Err(error),
    };
    if let (Err(_), Some(node)) = (&sent, taken) {
        common.counts.give_back(node, up);
    }
    sent
}

/// Keeps a connection to one node over one path, forever.
async fn dial(common: Common, node: NodeId, addresses: Vec<SocketAddr>) {
    let mut backoff = BACKOFF_MIN;
    let mut last = String::new();
    let path = common.me.path;
    loop {
        connected(&common.counts, node, path).await;
        if node < common.me.identity.node {
            tokio::time::sleep(POLITENESS).await;
            if 0 < common.counts.of(node, path) {
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
                tracing::warn!(target: "quorate_membership", %node, path, error, "a peer cannot be reached");
                last = error;
            }
            Err(_) => {}
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Waits until there is no connection to `node` over this path.
async fn connected(counts: &Counts, node: NodeId, path: u8) {
    loop {
        let changed = counts.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if counts.of(node, path) == 0 {
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
