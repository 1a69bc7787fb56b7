//! The session loop: the session machine's connections, and the one thread on which listeners and services are called.

use super::boottime;
use super::busy::BusyPoll;
use super::control::{Command, Reply, targets};
use super::link::{Established, FrameReader, Mesh, MeshEvent, OutQueue, RosterCheck, write_out};
use super::node::Shared;
use super::pki::{Credentials, PeerCertificate};
use super::progress::LoopBeat;
use super::transport::Channel;
use crate::session::{FRAME_BYTES_MAX, Input, LinkId, Output, SessionMachine};
use crate::{
    Epoch, Identity, Instant, NodeId, RequestError, SendError, ServiceId, SessionHandler, View, ViewListener,
};
use core::time::Duration;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::AsyncRead;
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// The loop turns at least this often, to show that it does.
const TURN_MAX: Duration = Duration::from_millis(100);
/// A path must have been there for so long before the sessions go back to it.
const FAIL_BACK_AFTER: Duration = Duration::from_secs(2);
/// Messages to ourselves that may wait.
const SELF_QUEUE_MAX: usize = 65_536;
/// What may wait on a connection when a frame between two others is to be passed on over it; more is dropped, and the
/// two ends repair it. Their windows keep it far below this unless dozens of pairs use one relay.
const RELAY_QUEUE_BYTES_MAX: usize = 8 << 20;

/// What other threads give to the loop.
pub(super) enum LaneInput {
    Installed(Arc<View>),
    Quorum(bool),
    Done {
        reply: Reply,
        result: Result<Arc<View>, RequestError>,
    },
    Subscribe {
        listener: Arc<dyn ViewListener>,
        told: std::sync::mpsc::SyncSender<()>,
    },
    Pause {
        service: ServiceId,
        paused: bool,
    },
    ToMyself {
        service: ServiceId,
        epoch: Epoch,
        payload: Vec<u8>,
    },
    CloseKey([u8; 32]),
    /// Other CAs are trusted than before.
    CloseDisbelieved(Credentials),
    /// Nothing comes over this path, but over another one to that node.
    PathSilent {
        node: NodeId,
        path: u8,
    },
    Stop(String),
}

struct State {
    machine: SessionMachine,
    links: BTreeMap<LinkId, Arc<OutQueue>>,
    stopped: bool,
}

/// The part of the sessions that every thread may enter.
pub(super) struct SessionShared {
    me: Identity,
    state: Mutex<State>,
    handlers: Mutex<BTreeMap<ServiceId, Arc<dyn SessionHandler>>>,
    listeners: Mutex<Vec<Arc<dyn ViewListener>>>,
    /// When the loop looks at its deadlines next.
    wakes_at: AtomicU64,
    wake: Notify,
    to_myself: AtomicUsize,
    pub(super) busy: BusyPoll,
}

impl SessionShared {
    pub(super) fn new(machine: SessionMachine, me: Identity, busy: BusyPoll) -> Self {
        let state = State { machine, links: BTreeMap::new(), stopped: false };
        Self {
            me,
            state: Mutex::new(state),
            handlers: Mutex::default(),
            listeners: Mutex::default(),
            wakes_at: AtomicU64::new(u64::MAX),
            wake: Notify::new(),
            to_myself: AtomicUsize::new(0),
            busy,
        }
    }

    pub(super) fn relayed_by(&self, peer: Identity) -> Option<Identity> {
        self.state().machine.relayed_by(peer)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn register(&self, service: ServiceId, handler: Arc<dyn SessionHandler>) {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner).insert(service, handler);
    }

    /// Queues a message on the caller's thread, encoded and in the connection's buffer when this returns.
    pub(super) fn send(
        &self,
        shared: &Shared,
        to: Identity,
        service: ServiceId,
        payload: Vec<u8>,
    ) -> Result<(), SendError> {
        if to == self.me && SELF_QUEUE_MAX <= self.to_myself.load(Ordering::Relaxed) {
            return Err(SendError::Full(to.node));
        }
        let mut out = Vec::new();
        let mut state = self.state();
        if state.stopped {
            return Err(SendError::Stopped);
        }
        state.machine.send(boottime(), to, service, payload, &mut out)?;
        for output in transmit(&mut state, out) {
            if let Output::Deliver { service, epoch, payload, .. } = output {
                self.to_myself.fetch_add(1, Ordering::Relaxed);
                shared.to_lane(LaneInput::ToMyself { service, epoch, payload });
            }
        }
        self.note_deadline(&state);
        drop(state);
        self.busy.active();
        Ok(())
    }

    fn note_deadline(&self, state: &State) {
        let at = state.machine.next_deadline().map_or(u64::MAX, |d| d.0);
        if at < self.wakes_at.load(Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Feeds the machine, then calls the services. On the loop's thread alone, so that deliveries keep their order.
    fn feed(&self, input: Input<'_>) {
        let deliveries = self.feed_silently(input);
        self.deliver(deliveries);
    }

    /// Feeds the machine and leaves the deliveries to the caller.
    fn feed_silently(&self, input: Input<'_>) -> Vec<Output> {
        let mut out = Vec::new();
        let mut state = self.state();
        state.machine.handle(boottime(), input, &mut out);
        let deliveries = transmit(&mut state, out);
        self.note_deadline(&state);
        deliveries
    }

    fn deliver(&self, deliveries: Vec<Output>) {
        for output in deliveries {
            match output {
                Output::Deliver { from, service, epoch, payload } => {
                    self.call(from, service, epoch, &payload);
                }
                Output::Ready { peer } => self.call_ready(peer),
                Output::Transmit { .. } | Output::Forward { .. } | Output::Close { .. } => {}
            }
        }
    }

    fn call_ready(&self, peer: Identity) {
        let handlers = self.handlers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        handlers.values().for_each(|h| h.on_ready(peer));
    }

    fn call(&self, from: Identity, service: ServiceId, epoch: Epoch, payload: &[u8]) {
        let handler = self.handlers.lock().unwrap_or_else(PoisonError::into_inner).get(&service).cloned();
        match handler {
            Some(handler) => handler.deliver(from, epoch, payload),
            None => {
                tracing::warn!(target: "quorate_membership", %from, service = service.0, "no such service here")
            }
        }
    }

    fn listeners(&self) -> Vec<Arc<dyn ViewListener>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Carries out everything but the deliveries, which are returned. Under the lock, so that frames keep their order.
fn transmit(state: &mut State, out: Vec<Output>) -> Vec<Output> {
    let mut deliveries = Vec::new();
    for output in out {
        match output {
            Output::Transmit { link, bytes } => {
                if let Some(queue) = state.links.get(&link) {
                    queue.push(&bytes);
                }
            }
            Output::Close { link, why } => {
                tracing::debug!(target: "quorate_membership", link = link.0, why, "a session connection is closed");
                if let Some(queue) = state.links.remove(&link) {
                    queue.close();
                }
            }
            Output::Forward { link, bytes } => {
                if let Some(queue) = state.links.get(&link) {
                    queue.push_below(&bytes, RELAY_QUEUE_BYTES_MAX);
                }
            }
            told @ (Output::Deliver { .. } | Output::Ready { .. }) => deliveries.push(told),
        }
    }
    deliveries
}

/// What the loop is made with.
pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) mesh: Mesh,
    pub(super) mesh_events: mpsc::Receiver<MeshEvent>,
    pub(super) inputs: mpsc::UnboundedReceiver<LaneInput>,
    pub(super) roster: RosterCheck,
    pub(super) peers: BTreeMap<NodeId, Vec<SocketAddr>>,
    pub(super) beat: LoopBeat,
    /// Turns true when the node joins; connections are made from then on.
    pub(super) go: watch::Receiver<bool>,
    /// Connections that the control lane's transport took for us, where both lanes share one.
    pub(super) accepted: Option<mpsc::Receiver<Channel>>,
}

enum FromLink {
    Ended {
        link: LinkId,
        /// The other end or the network ended it.
        lost: bool,
    },
    /// A spare is to be used from now on: this end told it to, or the other one did and speaks on it.
    Start { link: LinkId, established: Box<Established> },
}

struct LinkInfo {
    peer: Identity,
    certificate: PeerCertificate,
    path: u8,
    since: Instant,
    /// Of a spare: says that it is needed. Dropped, it ends it.
    spare: Option<oneshot::Sender<()>>,
}

impl LinkInfo {
    /// Its task ends with its end of the channel.
    fn close_spare(&mut self) {
        if let Some(start) = self.spare.take() {
            let (other, _) = oneshot::channel();
            self.spare = Some(other);
            drop(start);
        }
    }
}

/// Both ends know that a session moves when the first frame comes on a connection that was spare. So a spare is one of
/// which the session machine does not know, and a change of paths is an ordinary takeover (R2).
async fn keep_spare(
    link: LinkId,
    mut established: Box<Established>,
    needed: oneshot::Receiver<()>,
    to: mpsc::UnboundedSender<FromLink>,
) {
    let Established { frames, read, .. } = &mut *established;
    let starts = tokio::select! {
        needed = needed => needed.is_ok(),
        filled = frames.fill(&mut **read) => filled.is_ok(),
    };
    drop(to.send(if starts {
        FromLink::Start { link, established }
    } else {
        FromLink::Ended { link, lost: false }
    }));
}

impl Lane {
    /// Runs until it is told to stop.
    pub(super) async fn run(mut self) {
        let (to_lane, mut from_links) = mpsc::unbounded_channel();
        let mut links: BTreeMap<LinkId, LinkInfo> = BTreeMap::new();
        let mut next_link = 0;
        let mut joined = false;
        if self.shared.sessions.busy.is_on() {
            let shared = self.shared.clone();
            tokio::spawn(async move { shared.sessions.busy.spin().await });
        }
        loop {
            self.beat.turned();
            let wait = self.prepare_wait();
            tokio::select! {
                biased;
                input = self.inputs.recv() => match input {
                    None => return,
                    Some(LaneInput::Stop(reason)) => return self.stop(&reason),
                    Some(LaneInput::CloseKey(key)) => self.close_where(&mut links, |l| l.certificate.key == key),
                    Some(LaneInput::CloseDisbelieved(credentials)) => {
                        self.close_where(&mut links, |l| !credentials.still_believes(&l.certificate));
                    }
                    Some(LaneInput::PathSilent { node, path }) => self.leave_path(&mut links, node, path),
                    Some(LaneInput::Installed(view)) => {
                        self.install(view);
                        let roster = self.roster.clone();
                        self.close_where(&mut links, |l| roster.check(l.peer.node, &l.certificate.key).is_err());
                    }
                    Some(other) => self.on_input(other),
                },
                Some(event) = self.mesh_events.recv() => {
                    if let MeshEvent::Up(established) = event {
                        next_link += 1;
                        self.on_established(LinkId(next_link), established, &mut links, &to_lane);
                    }
                }
                Some(event) = from_links.recv() => match event {
                    FromLink::Ended { link, lost } => self.on_ended(link, lost, &mut links),
                    FromLink::Start { link, established } => {
                        if let Some(info) = links.get_mut(&link) {
                            info.spare = None;
                            self.link_up(link, *established, to_lane.clone());
                        }
                    }
                },
                true = wait_for(&mut self.go), if !joined => {
                    joined = true;
                    match self.accepted.take() {
                        Some(accepted) => self.mesh.accept_from(accepted),
                        None => self.mesh.accept(None),
                    }
                }
                () = self.shared.sessions.wake.notified() => {}
                () = tokio::time::sleep(wait) => self.shared.sessions.feed(Input::Tick),
            }
            self.fail_back(&mut links);
        }
    }

    /// The first connection to a life is used, and a newer one of the same path; one over another path is a spare.
    fn on_established(
        &self,
        link: LinkId,
        established: Box<Established>,
        links: &mut BTreeMap<LinkId, LinkInfo>,
        to_lane: &mpsc::UnboundedSender<FromLink>,
    ) {
        let (peer, path) = (established.peer.identity(), established.path);
        let mut used = links.values().filter(|l| l.peer == peer && l.spare.is_none());
        let is_spare = used.next().is_some_and(|first| first.path != path && used.all(|l| l.path != path));
        let (start, needed) = oneshot::channel();
        let spare = is_spare.then_some(start);
        let certificate = established.certificate.clone();
        links.insert(link, LinkInfo { peer, certificate, path, since: boottime(), spare });
        if is_spare {
            tokio::spawn(keep_spare(link, established, needed, to_lane.clone()));
        } else {
            self.link_up(link, *established, to_lane.clone());
        }
    }

    /// The spare with the best path takes over at once.
    fn on_ended(&self, link: LinkId, lost: bool, links: &mut BTreeMap<LinkId, LinkInfo>) {
        let Some(LinkInfo { peer, path, spare, .. }) = links.remove(&link) else { return };
        self.mesh.lost(peer.node, path);
        if links.values().any(|l| l.peer == peer && l.spare.is_none()) {
            return;
        }
        let table = &self.shared.links;
        let spares = links.values_mut().filter(|l| l.peer == peer);
        match spares.min_by_key(|l| (!table.speaks(peer.node, l.path, boottime()), l.path)) {
            Some(next) => {
                if let Some(start) = next.spare.take() {
                    tracing::info!(target: "quorate_membership", %peer, path = next.path, "the sessions change to this path");
                    let _ = start.send(());
                }
            }
            None if lost && spare.is_none() => self.shared.command(Command::LinkLost(peer.node)),
            None => {}
        }
    }

    /// The sessions leave a silent path if there is a spare.
    fn leave_path(&self, links: &mut BTreeMap<LinkId, LinkInfo>, node: NodeId, path: u8) {
        let has_spare = links.values().any(|l| l.peer.node == node && l.path != path && l.spare.is_some());
        if has_spare {
            self.close_where(links, |l| l.peer.node == node && l.path == path);
        }
    }

    /// The end with the lower id moves the sessions back to a better path once that has been there for a while.
    fn fail_back(&self, links: &mut BTreeMap<LinkId, LinkInfo>) {
        let now = boottime();
        let me = self.shared.me.node;
        let used: Vec<(Identity, u8)> = links
            .values()
            .filter(|l| l.spare.is_none() && me < l.peer.node)
            .map(|l| (l.peer, l.path))
            .collect();
        for (peer, path) in used {
            let better = links.values_mut().find(|l| {
                l.peer == peer && l.path < path && l.spare.is_some() && l.since + FAIL_BACK_AFTER <= now
            });
            let Some(better) = better.filter(|l| self.shared.links.speaks(peer.node, l.path, now)) else {
                continue;
            };
            if let Some(start) = better.spare.take() {
                tracing::info!(target: "quorate_membership", %peer, path = better.path, "the sessions go back to this path");
                let _ = start.send(());
            }
        }
    }

    /// Announces when this loop looks at the machine's deadline, so that a nearer one wakes it.
    fn prepare_wait(&self) -> Duration {
        let sessions = &self.shared.sessions;
        let state = sessions.state();
        let now = boottime();
        let latest = now + TURN_MAX;
        let at = state.machine.next_deadline().map_or(latest, |d: Instant| d.min(latest));
        sessions.wakes_at.store(at.0, Ordering::Relaxed);
        at.since(now)
    }

    fn on_input(&mut self, input: LaneInput) {
        let sessions = &self.shared.sessions;
        match input {
            LaneInput::Quorum(quorate) => {
                self.shared.set_quorate(quorate);
                sessions.listeners().iter().for_each(|l| l.on_quorum(quorate));
            }
            LaneInput::Done { reply, result } => drop(reply.send(result)),
            LaneInput::Subscribe { listener, told } => {
                self.shared.tell_newcomer(&listener);
                let _ = told.send(());
            }
            LaneInput::ToMyself { service, epoch, payload } => {
                sessions.to_myself.fetch_sub(1, Ordering::Relaxed);
                sessions.call(sessions.me, service, epoch, &payload);
            }
            LaneInput::Pause { service, paused } => sessions.feed(Input::Paused { service, paused }),
            LaneInput::Installed(_)
            | LaneInput::CloseKey(_)
            | LaneInput::PathSilent { .. }
            | LaneInput::CloseDisbelieved(_)
            | LaneInput::Stop(_) => {}
        }
    }

    /// Listeners first, then what was held back for this view.
    fn install(&mut self, view: Arc<View>) {
        let deliveries = self.shared.sessions.feed_silently(Input::Installed { view: view.clone() });
        self.shared.set_view(&view);
        let mut targets = targets(Some(&view), &self.peers);
        targets.retain(|node, _| view.members.contains_key(node));
        if !view.contains(self.shared.me) {
            targets.clear();
        }
        self.mesh.set_targets(&targets);
        self.shared.sessions.listeners().iter().for_each(|l| l.on_view(&view));
        self.shared.sessions.deliver(deliveries);
    }

    fn close_where(&self, links: &mut BTreeMap<LinkId, LinkInfo>, wanted: impl Fn(&LinkInfo) -> bool) {
        let state = self.shared.sessions.state();
        for (link, info) in links.iter_mut().filter(|(_, info)| wanted(info)) {
            info.close_spare();
            if let Some(queue) = state.links.get(link) {
                queue.close();
            }
        }
    }

    fn link_up(&self, link: LinkId, established: Established, to_lane: mpsc::UnboundedSender<FromLink>) {
        let Established { peer, dialled, path, mut write, read, mut frames, datagrams, .. } = established;
        let queue = Arc::new(OutQueue::default());
        self.shared.sessions.state().links.insert(link, queue.clone());
        self.shared.links.sessions(peer.node, path, true);
        self.shared.sessions.feed(Input::LinkUp { link, peer: peer.identity(), dialled, path });
        let shared = self.shared.clone();
        tokio::spawn(async move {
            // A service that panics does so in this task, and tokio would go on as if nothing had happened.
            let _guard = PanicGuard(shared.clone());
            frames.set_limit(FRAME_BYTES_MAX);
            let lost = tokio::select! {
                () = queue.closed() => false,
                written = write_out(&queue, &mut *write) => written.is_err(),
                error = read_frames(&shared.sessions, link, frames, read) => {
                    tracing::debug!(target: "quorate_membership", peer = %peer.identity(), %error, "a session connection ended");
                    true
                }
            };
            drop(datagrams);
            shared.sessions.state().links.remove(&link);
            shared.sessions.feed(Input::LinkDown { link });
            shared.links.sessions(peer.node, path, false);
            drop(to_lane.send(FromLink::Ended { link, lost }));
        });
    }

    fn stop(&self, reason: &str) {
        self.shared.set_quorate(false);
        self.shared.sessions.set_stopped();
        self.shared.sessions.listeners().iter().for_each(|l| l.on_stop(reason));
    }
}

/// Ends the life when the task that holds it panics.
struct PanicGuard(Arc<Shared>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lease.set(Instant(0));
            self.0.command(Command::Panicked);
        }
    }
}

/// Until the node joins; false if it is gone before.
pub(super) async fn wait_for(go: &mut watch::Receiver<bool>) -> bool {
    go.wait_for(|go| *go).await.is_ok()
}

impl SessionShared {
    /// Nothing is taken any more.
    pub(super) fn set_stopped(&self) {
        self.state().stopped = true;
    }

    pub(super) fn add_listener(&self, listener: Arc<dyn ViewListener>) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }
}

/// One reader: what a read brings is delivered before the next read, so a slow service slows its peers down and
/// nothing piles up.
async fn read_frames(
    sessions: &SessionShared,
    link: LinkId,
    mut frames: FrameReader,
    mut read: Box<dyn AsyncRead + Send + Unpin>,
) -> std::io::Error {
    loop {
        loop {
            match frames.next() {
                Ok(Some(frame)) => sessions.feed(Input::Frame { link, frame }),
                Ok(None) => break,
                Err(error) => return error,
            }
        }
        if let Err(error) = frames.fill(&mut *read).await {
            return error;
        }
        sessions.busy.active();
    }
}
