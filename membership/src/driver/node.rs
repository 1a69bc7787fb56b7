//! A running node: its threads, and the faces it shows to the other crates.

use super::busy::BusyPoll;
use super::config::{AgreedTimes, NodeConfig, StartError, random};
use super::control::{Command, Control, Parts};
use super::link::{Me, Mesh, RosterCheck};
use super::paths::{LinkStatus, LinkTable};
use super::sessions::{Lane as SessionLane, LaneInput, SessionShared, wait_for};
use super::state::StateDir;
use super::transport::{Lane, QuicTransport, SeveralTransports, TcpTransport, Transport, TransportKind};
use super::{boottime, storage};
use crate::machine::{Durable, Event, Member, RequestId, StopReason};
use crate::session::{Limits, SessionMachine};
use crate::{
    BoxFuture, Decision, Epoch, Identity, Instant, Lease, Membership, NodeId, Request, RequestError,
    SendError, ServiceId, SessionHandler, Sessions, StateId, Tally, View, ViewListener,
};
use core::time::Duration;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use tokio::sync::{mpsc, oneshot, watch};

/// A port that the system chose for TCP may be taken for UDP; then another is tried.
const PORT_TRIES: usize = 32;
/// How many of the machine's events are kept for `quorate why`.
const EVENTS_MAX: usize = 128;
/// The session loop may be silent this long before the node stops counting as alive: a service computes for too long.
const SESSION_SILENCE_MAX: Duration = Duration::from_secs(5);

/// Why a node ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeEnd {
    /// The machine says that this life is over.
    #[error("{0}")]
    Life(StopReason),
    /// [`Node::abort`], or the node was dropped.
    #[error("aborted")]
    Aborted,
    /// A broken invariant, or a mistake of a service that was called: nothing here may be relied on.
    #[error("a thread of the node panicked")]
    Panicked,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    No,
    /// No lease any more; threads are still ending.
    Ending(NodeEnd),
    /// Every thread is gone, the state directory is unlocked.
    Over(NodeEnd),
}

/// What the threads share.
pub(super) struct Shared {
    pub(super) me: Identity,
    pub(super) lease: Lease,
    pub(super) sessions: SessionShared,
    member: Mutex<Member>,
    view: Mutex<Arc<View>>,
    quorate: AtomicBool,
    events: Mutex<VecDeque<(Instant, Event)>>,
    commands: mpsc::UnboundedSender<Command>,
    lane: mpsc::UnboundedSender<LaneInput>,
    lane_thread: OnceLock<ThreadId>,
    ended: watch::Sender<Ended>,
    pub(super) links: LinkTable,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn member(&self) -> MutexGuard<'_, Member> {
        lock(&self.member)
    }

    /// After the loop's end nobody listens, which is as good as a message lost with the node.
    pub(super) fn to_lane(&self, input: LaneInput) {
        drop(self.lane.send(input));
    }

    pub(super) fn command(&self, command: Command) {
        drop(self.commands.send(command));
    }

    pub(super) fn set_view(&self, view: &Arc<View>) {
        *lock(&self.view) = view.clone();
    }

    pub(super) fn set_quorate(&self, quorate: bool) {
        self.quorate.store(quorate, Ordering::Release);
    }

    pub(super) fn set_ended(&self, ended: Ended) {
        self.ended.send_replace(ended);
    }

    pub(super) fn remember(&self, event: Event) {
        let mut events = lock(&self.events);
        if EVENTS_MAX <= events.len() {
            events.pop_front();
        }
        events.push_back((boottime(), event));
    }

    /// On the session loop's thread: tells a listener what holds, and adds it.
    pub(super) fn tell_newcomer(&self, listener: &Arc<dyn ViewListener>) {
        let view = lock(&self.view).clone();
        if Epoch(0) < view.epoch {
            listener.on_view(&view);
        }
        if self.quorate.load(Ordering::Acquire) {
            listener.on_quorum(true);
        }
        self.sessions.add_listener(listener.clone());
    }
}

/// A node of a cluster, with its machine, its connections and its state directory.
///
/// [`Node::start`] opens the directory, raises the incarnation and listens; the services register and subscribe; then
/// [`Node::join`] lets the machine run. `shutdown` leaves cleanly, `abort` and dropping do not.
pub struct Node {
    shared: Arc<Shared>,
    /// Never empty.
    addresses: Vec<SocketAddr>,
    next_request: AtomicU64,
    go: Mutex<Option<watch::Sender<bool>>>,
}

impl core::fmt::Debug for Node {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Node")
            .field("me", &self.shared.me)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// Why a node did not leave cleanly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShutdownError {
    /// The cluster refuses it, most likely because of an attachment that is left. The node still runs.
    #[error("cannot leave: {0}")]
    Refused(RequestError),
    /// It took too long, or there is no quorum. The node was aborted: the others will find it failed.
    #[error("no clean leave within the deadline: {0}")]
    Aborted(String),
}

/// Ends the life when a thread that it needs ends, however it does.
struct EndsWith(Arc<Shared>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.sessions.set_stopped();
        self.0.command(Command::Panicked);
        if std::thread::panicking() {
            self.0.lease.set(Instant(0));
        }
    }
}

struct Sockets {
    udp: Option<UdpSocket>,
    tcp: Option<TcpListener>,
    address: SocketAddr,
}

fn bind_once(config: &NodeConfig, mut address: SocketAddr) -> io::Result<Sockets> {
    let uses = |kind| config.control == kind || config.sessions == kind;
    let mut tcp = None;
    if uses(TransportKind::Tcp) {
        let socket = TcpListener::bind(address)?;
        address = socket.local_addr()?;
        tcp = Some(socket);
    }
    let mut udp = None;
    if uses(TransportKind::Quic) {
        let socket = UdpSocket::bind(address)?;
        address = socket.local_addr()?;
        udp = Some(socket);
    }
    Ok(Sockets { udp, tcp, address })
}

fn bind(config: &NodeConfig) -> Result<Vec<Sockets>, StartError> {
    let mut all = Vec::new();
    for address in core::iter::once(config.listen).chain(config.listen_also.iter().copied()) {
        let mut result = bind_once(config, address);
        for _ in 1..PORT_TRIES {
            if result.is_ok() || address.port() != 0 {
                break;
            }
            result = bind_once(config, address);
        }
        all.push(result.map_err(|source| StartError::Bind { address, source })?);
    }
    Ok(all)
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::System { what, source }
}

fn runtime() -> Result<tokio::runtime::Runtime, StartError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(system("a runtime"))
}

/// A transport for these lanes, served by the runtime that is entered.
fn transport(
    kind: TransportKind,
    sockets: &mut [Sockets],
    config: &NodeConfig,
    lanes: &[Lane],
) -> Result<Arc<dyn Transport>, StartError> {
    let each = sockets.iter_mut().map(|s| one_transport(kind, s, config, lanes));
    let mut each = each.collect::<Result<Vec<_>, _>>()?;
    Ok(match (each.pop(), each.is_empty()) {
        (Some(only), true) => only,
        (last, _) => Arc::new(SeveralTransports::new(each.into_iter().chain(last).collect())),
    })
}

fn one_transport(
    kind: TransportKind,
    sockets: &mut Sockets,
    config: &NodeConfig,
    lanes: &[Lane],
) -> Result<Arc<dyn Transport>, StartError> {
    let address = sockets.address;
    let taken = move || StartError::Bind { address, source: io::ErrorKind::AddrInUse.into() };
    let failed = move |e: String| StartError::Bind { address, source: io::Error::other(e) };
    let credentials = config.credentials.clone();
    Ok(match kind {
        TransportKind::Quic => {
            let socket = sockets.udp.take().ok_or_else(taken)?;
            Arc::new(QuicTransport::new(socket, credentials, lanes).map_err(|e| failed(e.to_string()))?)
        }
        TransportKind::Tcp => {
            let socket = sockets.tcp.take().ok_or_else(taken)?;
            Arc::new(TcpTransport::new(socket, credentials, lanes).map_err(|e| failed(e.to_string()))?)
        }
    })
}

impl Node {
    /// Prepares a node; it says nothing to anybody before [`Node::join`].
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: NodeConfig) -> Result<Arc<Self>, StartError> {
        config.timing.check()?;
        config.credentials.check_validity()?;
        let subject = config.credentials.me().subject.clone();
        let node = config.credentials.me().node().ok_or(StartError::NotANode { subject })?;
        let cluster = config.credentials.cluster();
        let fresh = StateId::from_bytes(random().map_err(system("randomness"))?);
        let empty = Durable::empty(cluster, node, fresh);
        let mut dir = StateDir::open(&config.state_dir, &empty, config.supervised)?;
        let mut sockets = bind(&config)?;
        let addresses: Vec<SocketAddr> = sockets.iter().map(|s| s.address).collect();
        let nonce = u64::from_le_bytes(random().map_err(system("randomness"))?);
        let seed = u64::from_le_bytes(random().map_err(system("randomness"))?);
        let incarnation = dir.next_life()?;
        let identity = Identity::new(node, incarnation);
        let durable = dir.durable().clone();
        let speaks = config.timing.speaks;
        let times = AgreedTimes::of(&config.timing, config.kill_time);
        let me = Me { cluster, identity, nonce, state: durable.state, speaks, times, path: 0 };
        let contacts: BTreeSet<NodeId> = config.peers.keys().copied().collect();
        let member = Member::new(config.timing.clone(), durable, nonce, contacts, seed, boottime())?;
        let view = member.view().cloned().unwrap_or_else(|| Arc::new(View::empty(cluster)));

        let (commands, commands_in) = mpsc::unbounded_channel();
        let (lane, lane_in) = mpsc::unbounded_channel();
        let sessions = SessionShared::new(
            SessionMachine::new(identity, Limits::standard()),
            identity,
            BusyPoll::new(config.busy_poll),
        );
        let shared = Arc::new(Shared {
            me: identity,
            lease: Lease::new(),
            sessions,
            member: Mutex::new(member),
            view: Mutex::new(view),
            quorate: AtomicBool::new(false),
            events: Mutex::default(),
            commands,
            lane,
            lane_thread: OnceLock::new(),
            ended: watch::Sender::new(Ended::No),
            links: LinkTable::new(config.timing.heartbeat_interval),
        });
        let control_rt = runtime()?;
        let lane_rt = BusyPoll::runtime(config.busy_poll).map_err(system("a runtime"))?;
        let same = config.control == config.sessions;
        let roster = RosterCheck::default();
        let (control_transport, lane_transport) = {
            let lanes: &[Lane] = if same { &[Lane::Control, Lane::Sessions] } else { &[Lane::Control] };
            let control = {
                let _context = control_rt.enter();
                transport(config.control, &mut sockets, &config, lanes)?
            };
            let _context = lane_rt.enter();
            let lane = if same {
                control.clone()
            } else {
                transport(config.sessions, &mut sockets, &config, &[Lane::Sessions])?
            };
            (control, lane)
        };
        let (go, mut go_control) = watch::channel(false);
        let go_lane = go_control.clone();
        let (others, from_control) = mpsc::channel(64);
        let (orders, orders_in) = std::sync::mpsc::channel();
        let (done, done_in) = mpsc::unbounded_channel();

        watch_revoked(&config, &shared);
        let storage = std::thread::Builder::new()
            .name("quorate-state".into())
            .spawn(move || storage::run(dir, &orders_in, &done))
            .map_err(system("a thread"))?;

        let lane_parts = (shared.clone(), roster.clone(), config.peers.clone());
        let beat = config.progress.watch("sessions", SESSION_SILENCE_MAX);
        let lane_thread = std::thread::Builder::new()
            .name("quorate-sessions".into())
            .spawn(move || {
                let (shared, roster, peers) = lane_parts;
                let _ = shared.lane_thread.set(std::thread::current().id());
                let _ends = EndsWith(shared.clone());
                lane_rt.block_on(async move {
                    let (events, mesh_events) = mpsc::channel(64);
                    let mesh = Mesh::new(me, Lane::Sessions, lane_transport, roster.clone(), events);
                    let accepted = same.then_some(from_control);
                    let inputs = lane_in;
                    let go = go_lane;
                    SessionLane { shared, mesh, mesh_events, inputs, roster, peers, beat, go, accepted }
                        .run()
                        .await;
                });
            })
            .map_err(system("a thread"))?;

        let parts_shared = shared.clone();
        std::thread::Builder::new()
            .name("quorate-control".into())
            .spawn(move || {
                let shared = parts_shared;
                let run = async {
                    let (events, mesh_events) = mpsc::channel(64);
                    let mut mesh = Mesh::new(me, Lane::Control, control_transport, roster.clone(), events);
                    if !wait_for(&mut go_control).await {
                        shared.to_lane(LaneInput::Stop(NodeEnd::Aborted.to_string()));
                        return NodeEnd::Aborted;
                    }
                    mesh.accept(same.then_some(others));
                    Control::run(Parts {
                        shared: shared.clone(),
                        mesh,
                        mesh_events,
                        commands: commands_in,
                        orders,
                        done: done_in,
                        roster,
                        peers: config.peers,
                        progress: config.progress,
                        credentials: config.credentials,
                    })
                    .await
                };
                let run = std::panic::AssertUnwindSafe(|| control_rt.block_on(run));
                let end = std::panic::catch_unwind(run).unwrap_or(NodeEnd::Panicked);
                // After a panic of the loop nothing else did these.
                shared.lease.set(Instant(0));
                shared.to_lane(LaneInput::Stop(end.to_string()));
                drop(control_rt);
                let _ = storage.join();
                let _ = lane_thread.join();
                shared.set_ended(Ended::Over(end));
            })
            .map_err(system("a thread"))?;
        Ok(Arc::new(Self { shared, addresses, next_request: AtomicU64::new(1), go: Mutex::new(Some(go)) }))
    }

    /// Lets the machine run: it connects, asks to be let in, or forms the cluster it is the voter of. Once is enough.
    pub fn join(&self) {
        if let Some(go) = lock(&self.go).as_ref() {
            go.send_replace(true);
        }
    }

    /// Where it listens, with the port that the system chose.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.addresses.first().copied().unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))
    }

    /// All addresses on which it listens, in the order of the paths.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The member through which the session with `peer` runs at present, if there is no direct path (R3).
    #[must_use]
    pub fn relayed_by(&self, peer: Identity) -> Option<Identity> {
        self.shared.sessions.relayed_by(peer)
    }

    /// What this node knows of its connections to the others, by node and path.
    #[must_use]
    pub fn links(&self) -> Vec<LinkStatus> {
        self.shared.links.all(boottime())
    }

    /// Whether this life is a member of the newest record it knows.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.shared.member().is_member()
    }

    /// The node that leads, as far as this one can tell.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.shared.member().leader()
    }

    /// Nodes that are heard at present, this one included.
    #[must_use]
    pub fn hears(&self) -> BTreeSet<NodeId> {
        self.shared.member().hears()
    }

    /// This acceptor: the state directory's own name.
    #[must_use]
    pub fn state_id(&self) -> StateId {
        self.shared.member().durable().state
    }

    /// What the machine noticed lately, oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<(Instant, Event)> {
        lock(&self.shared.events).iter().cloned().collect()
    }

    /// Says whether this node's part of a recovery waits for storage, a fence or quorum, so that no stage deadline
    /// counts (R7).
    pub fn set_waiting(&self, waits: bool) {
        self.shared.command(Command::Waiting(waits));
    }

    /// Gives this side the quorum by a person's word that the nodes of `off` are off: every voter and member that is not
    /// heard must be named. Outside the guarantees; the record says so (`docs/quorum.md`).
    ///
    /// # Errors
    /// [`Refusal::Force`](crate::Refusal::Force) says why not.
    pub async fn force_quorum(&self, off: BTreeSet<NodeId>, word: String) -> Result<Arc<View>, RequestError> {
        let (reply, answer) = oneshot::channel();
        let id = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
        self.shared.command(Command::Force { id, off, word, reply });
        answer.await.unwrap_or_else(|_| Err(RequestError::Unknown("the node stopped".into())))
    }

    /// Takes `wait_for_all` back at this node, until its process ends.
    pub fn cancel_wait_for_all(&self) {
        self.shared.command(Command::CancelWaitForAll);
    }

    /// Votes of the voter set that answer here at present, counted.
    #[must_use]
    pub fn tally(&self) -> Option<Tally> {
        self.shared.member().tally()
    }

    /// Why this life ended, if it did.
    #[must_use]
    pub fn end(&self) -> Option<NodeEnd> {
        match &*self.shared.ended.borrow() {
            Ended::No => None,
            Ended::Ending(end) | Ended::Over(end) => Some(end.clone()),
        }
    }

    /// Resolves once this life is over and its threads are gone.
    pub async fn ended(&self) -> NodeEnd {
        let mut ended = self.shared.ended.subscribe();
        loop {
            if let Ended::Over(end) = &*ended.borrow_and_update() {
                return end.clone();
            }
            if ended.changed().await.is_err() {
                return NodeEnd::Aborted;
            }
        }
    }

    /// Ends this life without leaving: the others find it failed.
    pub fn abort(&self) {
        self.shared.command(Command::Abort);
        // A node that never joined waits for this.
        lock(&self.go).take();
    }

    /// Leaves the cluster cleanly within `deadline`; the vote stays (R5). All attachments must be given up before.
    ///
    /// Dropping the future leaves the outcome open.
    ///
    /// # Errors
    /// See [`ShutdownError`].
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), ShutdownError> {
        self.shutdown_with(deadline, false).await
    }

    /// As [`Node::shutdown`], and the vote goes along if `give_up_vote` says so: the others need fewer from then on.
    ///
    /// # Errors
    /// See [`ShutdownError`].
    pub async fn shutdown_with(&self, deadline: Duration, give_up_vote: bool) -> Result<(), ShutdownError> {
        let until = boottime() + deadline;
        let leave = self.propose(Request::Leave { give_up_vote });
        let timer = tokio::time::timeout(deadline, leave);
        let why = match timer.await {
            Ok(Err(error @ RequestError::Refused(_))) => return Err(ShutdownError::Refused(error)),
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer".to_owned()),
        };
        // The end of the life may come before the answer to the request.
        let left = until.since(boottime());
        if let Ok(NodeEnd::Life(StopReason::Left { .. })) = tokio::time::timeout(left, self.ended()).await {
            return Ok(());
        }
        self.abort();
        self.ended().await;
        Err(ShutdownError::Aborted(why.unwrap_or_else(|| "the leave was not heard of".to_owned())))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.abort();
    }
}

/// A revoked key's live connections are closed (revocation alone ends none).
fn watch_revoked(config: &NodeConfig, shared: &Arc<Shared>) {
    let shared = Arc::downgrade(shared);
    config.credentials.revoked().watch(Arc::new(move |key| {
        if let Some(shared) = shared.upgrade() {
            shared.command(Command::CloseKey(*key));
            shared.to_lane(LaneInput::CloseKey(*key));
        }
    }));
}

impl Membership for Node {
    fn me(&self) -> Identity {
        self.shared.me
    }

    fn view(&self) -> Arc<View> {
        lock(&self.shared.view).clone()
    }

    fn is_quorate(&self) -> bool {
        let member = self.shared.member();
        let now = boottime();
        // The lease is the one that the end of a life takes away at once.
        member.is_quorate(now) && self.shared.lease.is_valid(now)
    }

    fn lease(&self) -> Lease {
        self.shared.lease.clone()
    }

    fn subscribe(&self, listener: Arc<dyn ViewListener>) {
        if self.shared.lane_thread.get() == Some(&std::thread::current().id()) {
            return self.shared.tell_newcomer(&listener);
        }
        let (told, wait) = std::sync::mpsc::sync_channel(1);
        self.shared.to_lane(LaneInput::Subscribe { listener, told });
        // An error says that the loop is gone; there is nothing to be told then.
        let _ = wait.recv();
    }

    fn decisions_since(&self, epoch: Epoch) -> Vec<Decision> {
        self.shared.member().decisions_since(epoch)
    }

    fn lease_over_at(&self, who: Identity) -> Option<Instant> {
        self.shared.member().lease_over_at(who)
    }

    fn propose(&self, request: Request) -> BoxFuture<'_, Result<Arc<View>, RequestError>> {
        let (reply, answer) = oneshot::channel();
        let id = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
        self.shared.command(Command::Request { id, request, reply });
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| Err(RequestError::Unknown("the node stopped".into())))
        })
    }
}

impl Sessions for Node {
    fn send(&self, to: Identity, service: ServiceId, payload: Vec<u8>) -> Result<(), SendError> {
        self.shared.sessions.send(&self.shared, to, service, payload)
    }

    fn register(&self, service: ServiceId, handler: Arc<dyn SessionHandler>) {
        self.shared.sessions.register(service, handler);
    }

    fn pause(&self, service: ServiceId, paused: bool) {
        self.shared.to_lane(LaneInput::Pause { service, paused });
    }
}
