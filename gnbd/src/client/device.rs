//! A block device over NBD that outlives its connections: while the server is away, I/O waits (R10 to R12).

use super::connect::{ConnectError, Negotiated, Opened, Stream, open};
use super::link::{self, Answer, Job, LinkError, Table};
use super::queue::{ClientQueue, Command, Input, OpId, Operation, Output};
use crate::driver::ClientTls;
use crate::fence::wire::{ControlAnswer, Hello, HelloRefusal, VERSION};
use crate::proto::consts::*;
use crate::proto::{STRING_BYTES_MAX, Verifier};
use crate::{BlockDevice, Buf, Geometry, IoError, WriteFlags, ZeroFlags};
use quorate_membership::{ClusterId, Decision, Epoch, Identity};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;

/// The first pause before another attempt to connect; doubled up to the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// A negotiation that takes longer is given up. It includes the draining of the older generation at the server.
const NEGOTIATION_DEADLINE: Duration = Duration::from_secs(15);
/// Attempts of [`NbdDevice::connect`] at things that may take a moment: a chain to push, a generation to pass.
const FIRST_ATTEMPTS_MAX: u32 = 8;
/// The most connections of one device.
pub(super) const CONNECTIONS_MAX: u8 = 16;

/// Where a member's device finds proofs of the newest view, to bring a server up to date that does not know it yet (R9).
pub trait ChainSource: Send + Sync {
    /// The epoch this node has installed.
    fn epoch(&self) -> Epoch;
    /// The decided records above `epoch`, oldest first; empty if this node no longer has the one that follows it. For a
    /// server that is new, `epoch` is 0, and the newest record alone is enough.
    fn chain_since(&self, epoch: Epoch) -> Vec<Decision>;
}

/// A member of a cluster, as a client of storage servers.
#[derive(Clone)]
pub struct Member {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its life, which must be a member already. The device dies with it (R10).
    pub who: Identity,
    /// Proofs of views.
    pub chain: Arc<dyn ChainSource>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member")
            .field("cluster", &self.cluster)
            .field("who", &self.who)
            .finish_non_exhaustive()
    }
}

/// Which device.
#[derive(Clone, Debug)]
pub struct NbdConfig {
    /// `HOST:PORT` of the server.
    pub address: String,
    /// The export's name.
    pub export: String,
    /// TLS, where the server wants it.
    pub tls: Option<ClientTls>,
    /// Who asks, for exports of a cluster.
    pub member: Option<Member>,
    /// Connections, 1 to 16, where the server shares one cache between them. Two keep two cores busy with encryption.
    pub connections: u8,
}

/// A device over NBD.
///
/// I/O waits without an error while the server is away, and goes on when it is back: what was acknowledged and not yet
/// flushed is written again if the server may have lost it. Use one device per export in one life of a node: a second one
/// takes the connections away from the first. Dropping it closes the connections; what was not flushed may be lost then.
#[derive(Debug)]
pub struct NbdDevice {
    shared: Arc<Shared>,
    geometry: Geometry,
    /// The transmission flags of the server.
    flags: u16,
}

struct Shared {
    config: NbdConfig,
    state: Mutex<State>,
    /// The generation is to end, or the device.
    wake: Notify,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

type Done = (Result<(), IoError>, Option<Buf>);

struct State {
    queue: ClientQueue,
    ops: u64,
    waiting: BTreeMap<OpId, oneshot::Sender<Done>>,
    /// Buffers of reads, on their way out empty and on their way back full.
    bufs: BTreeMap<OpId, Buf>,
    links: Vec<mpsc::UnboundedSender<Job>>,
    next_link: usize,
    reconnect: bool,
    closed: bool,
    connected: bool,
}

impl State {
    fn handle(&mut self, input: Input) -> bool {
        let mut out = Vec::new();
        self.queue.handle(input, &mut out);
        let mut wake = false;
        for output in out {
            match output {
                Output::Send(tag, command) => {
                    let buf = match &command {
                        Command::Read { op, .. } => self.bufs.remove(op),
                        _ => None,
                    };
                    self.next_link = (self.next_link + 1) % self.links.len().max(1);
                    if let Some(link) = self.links.get(self.next_link) {
                        // A connection that has just ended: the generation will, and then it is sent again.
                        let _ = link.send(Job { tag, command, buf });
                    }
                }
                Output::Complete(id, result) => {
                    let buf = self.bufs.remove(&id);
                    if let Some(tell) = self.waiting.remove(&id) {
                        let _ = tell.send((result, buf));
                    }
                }
                Output::Reconnect => {
                    self.reconnect = true;
                    wake = true;
                }
            }
        }
        wake
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, input: Input) {
        if self.lock().handle(input) {
            self.wake.notify_one();
        }
    }

    fn answered(&self, answer: Answer) {
        let Answer { tag, result, verifier, data } = answer;
        let mut state = self.lock();
        if let Some((op, buf)) = data
            && state.waiting.contains_key(&op)
        {
            state.bufs.insert(op, buf);
        }
        if state.handle(Input::Reply { tag, result, verifier }) {
            self.wake.notify_one();
        }
    }

    async fn submit(&self, operation: Operation, buf: Option<Buf>) -> Done {
        let told = {
            let mut state = self.lock();
            if state.closed {
                return (Err(IoError::Stopped), None);
            }
            state.ops += 1;
            let id = OpId(state.ops);
            let (tell, told) = oneshot::channel();
            state.waiting.insert(id, tell);
            if let Some(buf) = buf {
                state.bufs.insert(id, buf);
            }
            if state.handle(Input::Submit(id, operation)) {
                self.wake.notify_one();
            }
            told
        };
        told.await.unwrap_or((Err(IoError::Stopped), None))
    }
}

/// One generation of connections.
struct Generation {
    links: Vec<(Box<dyn Stream>, Negotiated)>,
    verifier: Option<Verifier>,
}

/// What an attempt to connect came to.
enum Attempt {
    Up(Generation),
    /// Try again, with this generation at least.
    Again(ConnectError, u64),
    /// This life is out, for ever.
    Fenced(String),
}

impl NbdDevice {
    /// Connects, on the tokio runtime of the caller.
    ///
    /// # Errors
    /// The first connection fails. Later ones are tried again for ever.
    pub async fn connect(config: NbdConfig) -> Result<Self, ConnectError> {
        if STRING_BYTES_MAX < config.export.len() {
            return Err(ConnectError::Protocol("an export's name has at most 4096 bytes"));
        }
        let state = State {
            queue: ClientQueue::new(),
            ops: 0,
            waiting: BTreeMap::new(),
            bufs: BTreeMap::new(),
            links: Vec::new(),
            next_link: 0,
            reconnect: false,
            closed: false,
            connected: false,
        };
        let shared = Arc::new(Shared { config, state: Mutex::new(state), wake: Notify::new() });
        let mut number = generation_after(0);
        let mut attempts = 0;
        let generation = loop {
            attempts += 1;
            match shared.attempt(number).await {
                Attempt::Up(generation) => break generation,
                Attempt::Fenced(detail) => {
                    tracing::error!(target: "quorate_gnbd", detail, "fenced");
                    return Err(ConnectError::Fenced(detail));
                }
                Attempt::Again(error, next) if number < next && attempts < FIRST_ATTEMPTS_MAX => {
                    tracing::debug!(target: "quorate_gnbd", %error, "connecting again");
                    number = next;
                    tokio::time::sleep(PAUSE_MIN).await;
                }
                Attempt::Again(error, _) => return Err(error),
            }
        };
        let negotiated = &generation.links[0].1;
        let (geometry, flags) = (geometry_of(negotiated)?, negotiated.flags);
        tokio::spawn(run(Arc::clone(&shared), generation, number, geometry));
        Ok(Self { shared, geometry, flags })
    }

    /// Nothing of this range is written again by this device: to be called when the lock under which it was written is
    /// given up, after a flush (R12). Unflushed writes of it are forgotten, unsent ones fail.
    pub fn revoke(&self, offset: u64, len: u64) {
        self.shared.handle(Input::Revoke { offset, len });
    }

    /// Whether the server is connected now. For people: I/O works either way.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.lock().connected
    }

    /// Flushes, then closes the connections. Waits for the server up to `deadline`.
    ///
    /// # Errors
    /// The flush failed or took longer: what was not flushed may be lost.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), IoError> {
        let flushed = tokio::time::timeout(deadline, self.flush()).await.unwrap_or(Err(IoError::Stopped));
        self.close();
        flushed
    }

    /// Ends every operation, now and later, with an error: this life of the node is over (R10).
    pub fn fence(&self, detail: &str) {
        self.shared.handle(Input::End(IoError::Fenced { detail: detail.into() }));
        self.close();
    }

    fn close(&self) {
        self.shared.handle(Input::End(IoError::Stopped));
        let mut state = self.shared.lock();
        state.closed = state.queue.ended() == Some(&IoError::Stopped);
        state.reconnect = true;
        drop(state);
        self.shared.wake.notify_one();
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.geometry.check(offset, len)
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), IoError> {
        if self.geometry.read_only {
            return Err(IoError::ReadOnly);
        }
        self.check(offset, len)
    }

    fn check_transfer(&self, offset: u64, len: usize) -> Result<(), IoError> {
        let max = self.geometry.transfer_bytes_max;
        if max as usize >= len {
            return Ok(());
        }
        let detail = format!("{len} bytes are more than the {max} of one transfer");
        Err(IoError::Failed { offset, detail })
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.close();
    }
}

pub(super) fn geometry_of(negotiated: &Negotiated) -> Result<Geometry, ConnectError> {
    if negotiated.flags & TX_HAS_FLAGS == 0 {
        return Err(ConnectError::Protocol("its transmission flags are none"));
    }
    let read_only = negotiated.flags & TX_READ_ONLY != 0;
    if !read_only && negotiated.flags & TX_SEND_FLUSH == 0 {
        return Err(ConnectError::Protocol("it has no FLUSH, so nothing written to it can be made durable"));
    }
    let block = u64::from(negotiated.block_bytes);
    Ok(Geometry {
        size_bytes: negotiated.size_bytes - negotiated.size_bytes % block,
        block_bytes: negotiated.block_bytes,
        preferred_bytes: negotiated.preferred_bytes,
        transfer_bytes_max: negotiated.payload_bytes_max,
        read_only,
        can_discard: negotiated.flags & TX_SEND_TRIM != 0,
    })
}

/// The number of a generation after `number`. Every device of one life must begin above those before it, or the server
/// would take its connections for more paths of an older one, and not drain that first (R11). The clock of the host since
/// it started, which outlives the process, does that without anything the devices would have to share.
fn generation_after(number: u64) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0));
    nanos.max(number.saturating_add(1))
}

/// Keeps generations of connections up until the device ends.
async fn run(shared: Arc<Shared>, first: Generation, mut number: u64, geometry: Geometry) {
    let mut next = Some(first);
    while let Some(generation) = next {
        transmit(&shared, generation).await;
        number = generation_after(number);
        next = reconnect(&shared, &mut number, geometry).await;
    }
}

/// Runs a generation to its end; afterwards its connections are closed.
async fn transmit(shared: &Arc<Shared>, generation: Generation) {
    let mut tasks: JoinSet<Result<(), LinkError>> = JoinSet::new();
    let mut links = Vec::new();
    for (stream, negotiated) in generation.links {
        let (reader, writer) = tokio::io::split(stream);
        let table = Table::default();
        let (jobs, inbox) = mpsc::unbounded_channel();
        tasks.spawn(link::write(inbox, table.clone(), negotiated.flags, writer));
        let shared = Arc::clone(shared);
        tasks.spawn(link::read(table, reader, negotiated, move |answer| shared.answered(answer)));
        links.push(jobs);
    }
    {
        let mut state = shared.lock();
        state.links = links;
        // Closed while the connections came up: then they end at once.
        state.reconnect = state.queue.ended().is_some();
        state.connected = true;
        if state.handle(Input::Connected { verifier: generation.verifier }) || state.reconnect {
            shared.wake.notify_one();
        }
    }
    loop {
        tokio::select! {
            ended = tasks.join_next() => {
                if let Some(Ok(Err(error))) = ended {
                    tracing::info!(target: "quorate_gnbd", address = shared.config.address, %error, "connection ended");
                }
                break;
            }
            () = shared.wake.notified() => {
                if shared.lock().reconnect {
                    break;
                }
            }
        }
    }
    let closed = {
        let mut state = shared.lock();
        state.links.clear();
        state.connected = false;
        state.closed
    };
    if closed {
        // The writers say goodbye and end.
        let _ = tokio::time::timeout(Duration::from_millis(500), tasks.join_next()).await;
    }
    // The sockets are closed when this returns: nothing of this generation is sent any more.
    tasks.shutdown().await;
    shared.handle(Input::Lost);
}

/// The next generation; nothing once the device has ended.
async fn reconnect(shared: &Arc<Shared>, number: &mut u64, geometry: Geometry) -> Option<Generation> {
    let mut pause = PAUSE_MIN;
    loop {
        if shared.lock().queue.ended().is_some() {
            return None;
        }
        let attempt = tokio::select! {
            attempt = shared.attempt(*number) => attempt,
            () = ended(shared) => return None,
        };
        match attempt {
            Attempt::Up(generation) => {
                if geometry_of(&generation.links[0].1).is_ok_and(|g| g == geometry) {
                    return Some(generation);
                }
                let detail = "the server came back with a device of another size or kind".into();
                shared.handle(Input::End(IoError::Failed { offset: 0, detail }));
            }
            Attempt::Fenced(detail) => {
                tracing::error!(target: "quorate_gnbd", detail, "fenced");
                shared.handle(Input::End(IoError::Fenced { detail }));
            }
            Attempt::Again(error, next) => {
                tracing::debug!(target: "quorate_gnbd", %error, "connecting again");
                *number = next.max(*number);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

async fn ended(shared: &Shared) {
    while shared.lock().queue.ended().is_none() {
        shared.wake.notified().await;
    }
}

impl Shared {
    /// Tries once to bring up all connections of generation `number`.
    async fn attempt(&self, number: u64) -> Attempt {
        match tokio::time::timeout(NEGOTIATION_DEADLINE, self.try_generation(number)).await {
            Ok(attempt) => attempt,
            // The server may have begun it: the next attempt is another generation.
            Err(_) => {
                let address = self.config.address.clone();
                Attempt::Again(ConnectError::Timeout { address }, number + 1)
            }
        }
    }

    async fn try_generation(&self, number: u64) -> Attempt {
        let mut generation = Generation { links: Vec::new(), verifier: None };
        let mut wanted = self.config.connections.clamp(1, CONNECTIONS_MAX);
        while generation.links.len() < usize::from(wanted) {
            let (link, verifier) = match self.try_link(number).await {
                Ok(link) => link,
                Err(attempt) => return attempt,
            };
            if link.1.flags & TX_CAN_MULTI_CONN == 0 {
                wanted = 1;
            }
            if generation.links.is_empty() {
                generation.verifier = verifier;
            } else if generation.verifier != verifier {
                // It changed in between: only what is written again under the newest one counts.
                return Attempt::Again(ConnectError::Protocol("its verifier changed meanwhile"), number + 1);
            }
            generation.links.push(link);
        }
        Attempt::Up(generation)
    }

    async fn try_link(&self, number: u64) -> Result<Link, Attempt> {
        let again = |e: ConnectError| Attempt::Again(e, number);
        let mut opened = open(&self.config.address, self.config.tls.as_ref()).await.map_err(again)?;
        let mut verifier = None;
        if let Some(member) = &self.config.member {
            let hello = Hello {
                version: VERSION,
                cluster: member.cluster,
                who: member.who,
                epoch: member.chain.epoch(),
                generation: number,
                export: self.config.export.clone(),
            };
            match opened.hello(&hello).await.map_err(again)? {
                Ok((_, _, v)) => verifier = Some(v),
                Err(refusal) => return Err(self.refused(member, refusal, &mut opened, number).await),
            }
        }
        let link = opened.go(&self.config.export).await.map_err(again)?;
        Ok((link, verifier))
    }

    /// What a refusal means: bring the server up to date, pass the generation, or that this life is over.
    async fn refused(
        &self,
        member: &Member,
        refusal: HelloRefusal,
        opened: &mut Opened,
        number: u64,
    ) -> Attempt {
        let since = match &refusal {
            HelloRefusal::NotEnrolled(_) => Epoch(0),
            HelloRefusal::NotAdmitted { epoch, .. } if *epoch < member.chain.epoch() => *epoch,
            HelloRefusal::NotAdmitted { server, epoch } => {
                return Attempt::Fenced(format!(
                    "storage server {server} has installed epoch {epoch}, which does not admit {}",
                    member.who
                ));
            }
            HelloRefusal::Stale(newer) => {
                return Attempt::Again(ConnectError::Hello(refusal.clone()), newer + 1);
            }
            _ => return Attempt::Again(ConnectError::Hello(refusal), number),
        };
        let chain = member.chain.chain_since(since);
        if chain.is_empty() {
            return Attempt::Again(ConnectError::Hello(refusal), number);
        }
        match super::fence::push(opened, chain).await {
            Ok(ControlAnswer::Installed { .. }) => {}
            Ok(answer) => {
                tracing::info!(target: "quorate_gnbd", ?answer, "the storage server does not take the chain");
                return Attempt::Again(ConnectError::Hello(refusal), number);
            }
            Err(e) => return Attempt::Again(e, number),
        }
        Attempt::Again(ConnectError::Hello(refusal), number + 1)
    }
}

type Link = ((Box<dyn Stream>, Negotiated), Option<Verifier>);

impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        let len = buf.len();
        self.check(offset, len as u64)?;
        self.check_transfer(offset, len)?;
        if len == 0 {
            return Ok(buf);
        }
        let operation = Operation::Read { offset, len: len as u64 };
        let (result, data) = self.shared.submit(operation, Some(buf)).await;
        result?;
        let lost = || IoError::Failed { offset, detail: "the data of a read went astray".into() };
        data.filter(|d| d.len() == len).ok_or_else(lost)
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.check_change(offset, buf.len() as u64)?;
        self.check_transfer(offset, buf.len())?;
        if buf.is_empty() {
            return Ok(buf);
        }
        let data = Arc::new(buf);
        let fua = flags.fua && self.has(TX_SEND_FUA);
        let operation = Operation::Write { offset, data: Arc::clone(&data), fua };
        self.shared.submit(operation, None).await.0?;
        if flags.fua && !fua {
            self.flush().await?;
        }
        // What must be kept until a flush is kept as it is; the caller gets a copy then.
        Ok(Arc::try_unwrap(data).unwrap_or_else(|shared| Buf::clone(&shared)))
    }

    async fn flush(&self) -> Result<(), IoError> {
        if self.geometry.read_only {
            return Ok(());
        }
        self.shared.submit(Operation::Flush, None).await.0
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check_change(offset, len)?;
        if !self.geometry.can_discard {
            return Ok(());
        }
        for (offset, len) in pieces(offset, len, REQUEST_PIECE_BYTES) {
            self.shared.submit(Operation::Discard { offset, len }, None).await.0?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.check_change(offset, len)?;
        let fua = flags.fua && self.has(TX_SEND_FUA);
        if !self.has(TX_SEND_WRITE_ZEROES) {
            // Written out, for servers that know nothing better.
            for (offset, len) in pieces(offset, len, u64::from(self.geometry.transfer_bytes_max.min(1 << 20)))
            {
                self.write(offset, Buf::zeroed(len as usize), WriteFlags { fua: flags.fua }).await?;
            }
            return Ok(());
        }
        for (offset, len) in pieces(offset, len, REQUEST_PIECE_BYTES) {
            let operation = Operation::WriteZeroes { offset, len, fua, no_hole: flags.no_hole };
            self.shared.submit(operation, None).await.0?;
        }
        if flags.fua && !fua { self.flush().await } else { Ok(()) }
    }
}

/// Requests have 32-bit lengths; longer ones are cut into pieces of this size.
const REQUEST_PIECE_BYTES: u64 = 1 << 30;

fn pieces(offset: u64, len: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(piece)).map(move |i| (offset + i * piece, piece.min(len - i * piece)))
}
