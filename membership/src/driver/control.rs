//! The control loop: the membership machine on a thread of its own, its connections, its timers (R8).
//!
//! Nothing of a service runs here, and no fsync, so that neither can delay a heartbeat.

use super::boottime;
use super::link::{Established, FrameReader, Mesh, MeshEvent, OutQueue, Paths, RosterCheck, write_out};
use super::node::{Ended, NodeEnd, Shared};
use super::pki::{Credentials, PeerCertificate};
use super::progress::Progress;
use super::sessions::LaneInput;
use super::storage::{Done, Order, Orders};
use super::transport::{DATAGRAM_BYTES_MAX, Datagrams};
use crate::machine::{
    CONTROL_BYTES_MAX, ControlMsg, Event, Input, Output, Peer, RequestId, StopReason, Versions,
};
use crate::{Incarnation, Instant, NodeId, Request, RequestError, StateId, View};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// What may wait to be written to one peer. Control messages are repeated by the machine, so more are dropped.
const QUEUE_BYTES_MAX: usize = 8 << 20;
/// A control message up to this length goes over all paths to a node.
const ALL_PATHS_BYTES_MAX: usize = 16 << 10;
/// While a loop of the node is stuck, how often it is looked at again.
const STUCK_POLL: Duration = Duration::from_millis(20);
/// Between two looks at our certificate's validity.
const VALIDITY_POLL: Duration = Duration::from_secs(86_400);
/// How long the last messages of a life may take to leave.
const DRAIN_MAX: Duration = Duration::from_millis(200);

pub(super) type Reply = oneshot::Sender<Result<Arc<View>, RequestError>>;

/// What other threads ask of the loop.
pub(super) enum Command {
    Request {
        id: RequestId,
        request: Request,
        reply: Reply,
    },
    Waiting(bool),
    /// A person takes `wait_for_all` back.
    CancelWaitForAll,
    /// A person declares that nodes are off and gives the rest the quorum.
    Force {
        id: RequestId,
        off: BTreeSet<NodeId>,
        word: String,
        reply: Reply,
    },
    LinkLost(NodeId),
    CloseKey([u8; 32]),
    Abort,
    /// The session thread is gone without having been told to go.
    Panicked,
}

enum FromLink {
    Packet { from: Peer, path: u8, msg: ControlMsg },
    Down { link: u64 },
}

struct Link {
    peer: Peer,
    path: u8,
    certificate: PeerCertificate,
    out: Arc<OutQueue>,
    datagrams: Option<Datagrams>,
}

/// What the loop is made with.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) mesh: Mesh,
    pub(super) mesh_events: mpsc::Receiver<MeshEvent>,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) orders: Orders,
    pub(super) done: mpsc::UnboundedReceiver<Done>,
    pub(super) roster: RosterCheck,
    pub(super) peers: BTreeMap<NodeId, Vec<SocketAddr>>,
    pub(super) progress: Progress,
    pub(super) credentials: Credentials,
}

pub(super) struct Control {
    parts: Parts,
    links: BTreeMap<u64, Link>,
    next_link: u64,
    from_links: mpsc::Sender<FromLink>,
    replies: BTreeMap<RequestId, Reply>,
    stuck: bool,
}

impl Control {
    /// Runs until the life ends; returns why.
    pub(super) async fn run(parts: Parts) -> NodeEnd {
        let (from_links, mut packets) = mpsc::channel(1_024);
        let mut control = Self {
            parts,
            links: BTreeMap::new(),
            next_link: 0,
            from_links,
            replies: BTreeMap::new(),
            stuck: false,
        };
        control.on_roster();
        let mut validity = tokio::time::interval(VALIDITY_POLL);
        let end = loop {
            let wait = control.wait();
            let input = tokio::select! {
                Some(event) = control.parts.mesh_events.recv() => control.on_mesh(event),
                Some(packet) = packets.recv() => control.on_link(packet),
                Some(command) = control.parts.commands.recv() => match command {
                    Command::Abort => break NodeEnd::Aborted,
                    Command::Panicked => break NodeEnd::Panicked,
                    other => control.on_command(other),
                },
                Some(done) = control.parts.done.recv() => Some(match done {
                    Done::Persisted(token) => Input::Persisted(token),
                    Done::Failed => Input::StorageFailed,
                }),
                () = pause(wait) => control.on_deadline(),
                _ = validity.tick() => {
                    if let Err(error) = control.parts.credentials.check_validity() {
                        tracing::error!(target: "quorate_membership", %error, "peers will refuse this node");
                    }
                    None
                }
            };
            if let Some(reason) = input.and_then(|i| control.feed(i)) {
                break NodeEnd::Life(reason);
            }
        };
        control.finish(&end).await;
        end
    }

    /// How long until the machine wants its tick.
    fn wait(&self) -> Option<Duration> {
        if self.stuck {
            return Some(STUCK_POLL);
        }
        let at = self.parts.shared.member().next_deadline();
        at.map(|a| a.since(boottime()))
    }

    /// Ticks only while the loops of the node turn: without ticks no heartbeats are sent (R7).
    fn on_deadline(&mut self) -> Option<Input> {
        let stuck = self.parts.progress.stuck();
        match (&stuck, self.stuck) {
            (Some(name), false) => {
                tracing::error!(target: "quorate_membership", name, "an event loop is stuck: no heartbeats");
            }
            (None, true) => tracing::warn!(target: "quorate_membership", "the stuck event loop turns again"),
            _ => {}
        }
        self.stuck = stuck.is_some();
        for (node, path) in self.parts.shared.links.newly_silent(boottime()) {
            tracing::warn!(target: "quorate_membership", %node, path, "nothing comes over this path");
            self.parts.shared.to_lane(LaneInput::PathSilent { node, path });
        }
        (!self.stuck).then_some(Input::Tick)
    }

    fn on_mesh(&mut self, event: MeshEvent) -> Option<Input> {
        match event {
            MeshEvent::Unreachable(node) => {
                let connected = self.links.values().any(|l| l.peer.node == node);
                (!connected).then_some(Input::LinkLost { node })
            }
            MeshEvent::Up(established) => {
                self.next_link += 1;
                let link = self.next_link;
                let Established { peer, certificate, dialled, path, mut write, read, frames, datagrams } =
                    *established;
                tracing::info!(target: "quorate_membership", peer = %peer.identity(), path, dialled, "connected");
                self.parts.shared.links.connected(peer.node, path, boottime());
                let out = Arc::new(OutQueue::default());
                self.links.insert(
                    link,
                    Link { peer, path, certificate, out: out.clone(), datagrams: datagrams.clone() },
                );
                let to = self.from_links.clone();
                let speaks = self.parts.shared.member().speaks();
                let from = (peer, path);
                tokio::spawn(async move {
                    let why = tokio::select! {
                        result = write_out(&out, &mut *write) => result.err(),
                        error = read_packets(from, speaks, read, frames, &to) => Some(error),
                        () = read_datagrams(from, speaks, datagrams, &to) => None,
                    };
                    let why = why.map_or_else(|| "closed".to_owned(), |e| e.to_string());
                    tracing::info!(target: "quorate_membership", peer = %peer.identity(), why, "disconnected");
                    drop(to.send(FromLink::Down { link }).await);
                });
                None
            }
        }
    }

    fn on_link(&mut self, packet: FromLink) -> Option<Input> {
        match packet {
            FromLink::Packet { from, path, msg } => {
                self.parts.shared.links.heard(from.node, path, boottime());
                Some(Input::Packet { from, msg })
            }
            FromLink::Down { link } => {
                let Link { peer: Peer { node, .. }, path, .. } = self.links.remove(&link)?;
                self.parts.mesh.lost(node, path);
                self.parts.shared.links.disconnected(node, path);
                let connected = self.links.values().any(|l| l.peer.node == node);
                (!connected).then_some(Input::LinkLost { node })
            }
        }
    }

    fn on_command(&mut self, command: Command) -> Option<Input> {
        match command {
            Command::Request { id, request, reply } => {
                self.replies.insert(id, reply);
                Some(Input::Request { id, request })
            }
            Command::Waiting(waits) => Some(Input::Waiting(waits)),
            Command::CancelWaitForAll => Some(Input::CancelWaitForAll),
            Command::Force { id, off, word, reply } => {
                self.replies.insert(id, reply);
                Some(Input::Force { id, off, word })
            }
            Command::LinkLost(node) => Some(Input::LinkLost { node }),
            Command::CloseKey(key) => {
                self.links.values().filter(|l| l.certificate.key == key).for_each(|l| l.out.close());
                None
            }
            Command::Abort | Command::Panicked => None,
        }
    }

    /// Feeds one input and carries out what comes of it. `Some` ends the life.
    fn feed(&mut self, input: Input) -> Option<StopReason> {
        let mut out = Vec::new();
        {
            let mut member = self.parts.shared.member();
            if let Err(error) = member.handle(boottime(), input, &mut out) {
                tracing::error!(target: "quorate_membership", %error, "the machine refused an input");
            }
        }
        let mut end = None;
        for output in out {
            end = self.carry_out(output).or(end);
        }
        end
    }

    fn carry_out(&mut self, output: Output) -> Option<StopReason> {
        match output {
            Output::Send { to, life, msg } => self.send(to, life, &msg),
            Output::Persist { token, record, lazy } => {
                // The thread is gone only after it reported its failure.
                drop(self.parts.orders.send(Order::Append { token, record, lazy }));
            }
            Output::Installed { view, jumped } => {
                tracing::info!(target: "quorate_membership", epoch = %view.epoch, jumped, cause = ?view.cause, "view");
                self.on_roster();
                self.parts.shared.to_lane(LaneInput::Installed(view));
            }
            Output::RequestDone { id, result } => {
                if let Some(reply) = self.replies.remove(&id) {
                    self.parts.shared.to_lane(LaneInput::Done { reply, result });
                }
            }
            Output::Lease { until } => self.parts.shared.lease.set(until),
            Output::Quorum(quorate) => {
                tracing::info!(target: "quorate_membership", quorate, "quorum");
                self.parts.shared.to_lane(LaneInput::Quorum(quorate));
            }
            Output::Stop { reason } => return Some(reason),
            Output::Event(event) => self.on_event(event),
        }
        None
    }

    fn on_event(&self, event: Event) {
        match &event {
            Event::Refused { .. } | Event::NotAdmitted(_) | Event::Dropped { .. } => {
                tracing::warn!(target: "quorate_membership", ?event, "refused");
            }
            _ => tracing::info!(target: "quorate_membership", ?event, "event"),
        }
        self.parts.shared.remember(event);
    }

    /// To each process of the node, over the newest connection of every path: the machine takes a message twice as well
    /// as once, and none waits for a path to be found silent. Long ones go over one path.
    fn send(&self, to: NodeId, life: Option<Incarnation>, msg: &ControlMsg) {
        let bytes = msg.encode(self.parts.shared.member().version_to(to));
        let fits = msg.is_periodic() && bytes.len() <= DATAGRAM_BYTES_MAX;
        let mut served: BTreeSet<(Peer, u8)> = BTreeSet::new();
        let table = &self.parts.shared.links;
        let only = if ALL_PATHS_BYTES_MAX < bytes.len() { table.best(to, boottime()) } else { None };
        let links = self.links.values().rev().filter(|l| l.peer.node == to);
        for link in links.filter(|l| life.is_none_or(|i| l.peer.incarnation == i)) {
            if only.is_some_and(|path| path != link.path) || !served.insert((link.peer, link.path)) {
                continue;
            }
            table.sent(to, link.path, link.datagrams.as_ref().and_then(Datagrams::measured));
            match &link.datagrams {
                Some(datagrams) if fits => datagrams.send(bytes.clone()),
                _ => link.out.push_frame_below(&bytes, QUEUE_BYTES_MAX),
            }
        }
    }

    /// The roster may have changed: who may connect, whom to dial, and who must go.
    fn on_roster(&mut self) {
        let view = self.parts.shared.member().view().cloned();
        if let Some(view) = &view {
            let keys = view.roster.iter().map(|(n, e)| (*n, e.key)).collect();
            self.parts.roster.set(keys, view.trust.renewals.clone());
            match self.parts.credentials.believe(&view.trust) {
                Ok(false) => {}
                Ok(true) => self.close_disbelieved(),
                Err(error) => {
                    tracing::error!(target: "quorate_membership", %error, "the record's CAs are not believed");
                }
            }
        }
        for link in self.links.values() {
            if let Err(refusal) = self.parts.roster.check(link.peer.node, &link.certificate.key) {
                tracing::warn!(target: "quorate_membership", %refusal, "a connection is closed");
                link.out.close();
            }
        }
        let targets = targets(view.as_deref(), &self.parts.peers);
        self.parts.mesh.set_targets(&targets);
    }

    /// Other CAs are trusted than before: whose certificate is of none of them is not talked to any more.
    fn close_disbelieved(&self) {
        let credentials = &self.parts.credentials;
        for link in self.links.values().filter(|l| !credentials.still_believes(&l.certificate)) {
            let peer = link.peer.identity();
            tracing::warn!(target: "quorate_membership", %peer, "a connection is closed: no trusted CA issued its certificate");
            link.out.close();
        }
        self.parts.shared.to_lane(LaneInput::CloseDisbelieved(credentials.clone()));
    }

    async fn finish(&mut self, end: &NodeEnd) {
        tracing::info!(target: "quorate_membership", %end, "this life ends");
        self.parts.shared.lease.set(Instant(0));
        self.parts.shared.set_ended(Ended::Ending(end.clone()));
        if let NodeEnd::Life(StopReason::RolledBack { known }) = end
            && let Ok(bytes) = super::config::random()
        {
            let state = StateId::from_bytes(bytes);
            drop(self.parts.orders.send(Order::Renounce { state, known: *known }));
        }
        for (_, reply) in std::mem::take(&mut self.replies) {
            drop(reply.send(Err(RequestError::Unknown(end.to_string()))));
        }
        self.parts.shared.to_lane(LaneInput::Stop(end.to_string()));
        if matches!(end, NodeEnd::Life(_)) {
            let drained = async {
                while self.links.values().any(|l| !l.out.is_idle()) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let _ = tokio::time::timeout(DRAIN_MAX, drained).await;
            // QUIC forgets what it has not sent when its endpoint is closed.
            tokio::time::sleep(DRAIN_MAX / 10).await;
        }
    }
}

async fn pause(wait: Option<Duration>) {
    match wait {
        Some(Duration::ZERO) => {}
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Where the nodes are: the n-th address that the roster has is the n-th path, and the n-th that the configuration has leads
/// there too.
pub(super) fn targets(
    view: Option<&View>,
    peers: &BTreeMap<NodeId, Vec<SocketAddr>>,
) -> BTreeMap<NodeId, Paths> {
    let mut targets: BTreeMap<NodeId, Paths> = BTreeMap::new();
    for (node, entry) in view.iter().flat_map(|v| v.roster.iter()) {
        let known = targets.entry(*node).or_default();
        for text in &entry.addresses {
            match text.parse() {
                Ok(address) => known.push(vec![address]),
                Err(_) => {
                    tracing::warn!(target: "quorate_membership", %node, text, "the roster has an address that is none");
                }
            }
        }
    }
    for (node, addresses) in peers {
        // A node that was struck from the roster is dialled no more.
        if view.is_some_and(|v| !v.roster.contains_key(node)) {
            continue;
        }
        let known = targets.entry(*node).or_default();
        for (path, address) in addresses.iter().enumerate() {
            if known.iter().flatten().any(|a| a == address) {
                continue;
            }
            match known.get_mut(path) {
                Some(path) => path.push(*address),
                None => known.push(vec![*address]),
            }
        }
    }
    targets
}

async fn read_packets(
    from: (Peer, u8),
    speaks: Versions,
    mut read: Box<dyn tokio::io::AsyncRead + Send + Unpin>,
    mut frames: FrameReader,
    to: &mpsc::Sender<FromLink>,
) -> std::io::Error {
    frames.set_limit(CONTROL_BYTES_MAX);
    loop {
        match frames.one(&mut *read).await {
            Ok(bytes) => pass_on(from, speaks, &bytes, to).await,
            Err(error) => return error,
        }
    }
}

async fn read_datagrams(
    from: (Peer, u8),
    speaks: Versions,
    datagrams: Option<Datagrams>,
    to: &mpsc::Sender<FromLink>,
) {
    let Some(datagrams) = datagrams else { return std::future::pending().await };
    while let Some(bytes) = datagrams.receive().await {
        pass_on(from, speaks, &bytes, to).await;
    }
}

async fn pass_on((from, path): (Peer, u8), speaks: Versions, bytes: &[u8], to: &mpsc::Sender<FromLink>) {
    match ControlMsg::decode(bytes, speaks) {
        Ok(msg) => drop(to.send(FromLink::Packet { from, path, msg }).await),
        Err(error) => {
            tracing::warn!(target: "quorate_membership", peer = %from.identity(), %error, "a message was dropped");
        }
    }
}
