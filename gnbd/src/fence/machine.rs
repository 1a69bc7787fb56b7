//! The fence: installs proven records, admits lives, and lets a generation of connections begin when the last has ended.
//!
//! ```text
//!  Install ─▶ verify ─▶ Close what it does not admit ─▶ Persist ─▶ (Persisted, all Closed) ─▶ Installed
//!  Hello   ─▶ admitted? ─▶ generation: Close the older ones ─▶ (all Closed) ─▶ Answer
//! ```

use super::wire::{Hello, HelloRefusal, InstallError, VERSION};
use super::{Enrolment, FenceRecord};
use core::time::Duration;
use quorate_membership::{
    ClusterId, Decision, Epoch, Identity, Instant, NodeId, ServerId, View, verify_chain,
};
use std::collections::{BTreeMap, VecDeque};

/// An installation whose connections are not drained after this time is answered "not drained" (R9).
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// Installations that may wait at one time.
pub const CALLS_MAX: usize = 64;
/// Hellos that may wait at one time.
pub const WAITING_MAX: usize = 256;
/// Pairs of life and export whose generation is remembered; forgotten from the oldest on, when without connections.
const GENERATIONS_MAX: usize = 4096;

/// A connection, numbered by the driver, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// A call of the fence service, numbered by the driver, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// A record on its way to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PersistToken(pub u64);

/// What happens to the fence.
#[derive(Clone, Debug)]
pub enum Input {
    /// Somebody with a certificate of the cluster pushes a chain.
    Install {
        /// Answered by [`Output::Installed`].
        call: CallId,
        /// Oldest record first.
        chain: Vec<Decision>,
    },
    /// The disk has the record.
    Persisted(PersistToken),
    /// The disk may or may not have the record.
    PersistFailed {
        /// Which.
        token: PersistToken,
        /// What went wrong.
        detail: String,
    },
    /// A connection announces itself. The export was found to be a cluster export.
    Hello {
        /// Answered by [`Output::Answer`].
        connection: ConnectionId,
        /// The node of its certificate.
        certified: NodeId,
        /// What it says.
        hello: Hello,
    },
    /// A connection that said hello is closed, and no I/O of it is under way or will be.
    Closed(ConnectionId),
    /// Time has passed.
    Tick,
}

/// What the driver does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Make the record durable, replacing the older one as a whole; answer with `Persisted` or `PersistFailed`.
    Persist {
        /// For the answer.
        token: PersistToken,
        /// What to write.
        record: FenceRecord,
    },
    /// Start no more I/O of the connection, from now on; say `Closed` when what was started has ended.
    Close(ConnectionId),
    /// Answer a hello: from now on its requests are served, or it was refused.
    Answer {
        /// Whom.
        connection: ConnectionId,
        /// The installed epoch, or why not.
        answer: Result<(ServerId, Epoch), HelloRefusal>,
    },
    /// Answer a call.
    Installed {
        /// Which.
        call: CallId,
        /// The confirmed epoch, or why not.
        result: Result<(ServerId, Epoch), InstallError>,
    },
}

/// Deliberate mistakes, by which the simulation shows that its checks catch them.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// An installation is confirmed while refused connections still have I/O.
    ConfirmBeforeDrain,
    /// An installation is confirmed before the disk has it.
    ConfirmBeforePersist,
    /// A node is admitted in any of its lives.
    AnyIncarnation,
    /// A new generation begins beside the older one.
    NoGenerationDrain,
    /// A removed life's connections are left open.
    LeaveOpen,
}

/// The machine. See the module.
#[derive(Debug)]
pub struct FenceServer {
    /// What the disk has.
    record: FenceRecord,
    /// What the disk is about to have.
    installing: Option<(PersistToken, FenceRecord)>,
    /// The only cluster whose records are taken, if the server was told.
    cluster: Option<ClusterId>,
    /// Who the server is after it was retired for the first time in this run.
    spare: ServerId,
    /// Ids taken from `spare` so far.
    spares: u64,
    tokens: u64,
    /// Chains that came while another was on its way to the disk.
    queued: VecDeque<(CallId, Vec<Decision>)>,
    /// Calls whose record is durable or on its way.
    calls: Vec<Call>,
    connections: BTreeMap<ConnectionId, Connection>,
    generations: BTreeMap<(Identity, String), u64>,
    confirmed: Option<Epoch>,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<Bug>,
}

#[derive(Debug)]
struct Call {
    id: CallId,
    /// Confirmed once this or a later epoch is durable and drained.
    epoch: Epoch,
    deadline: Instant,
}

#[derive(Debug)]
struct Connection {
    who: Identity,
    export: String,
    generation: u64,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Its hello is not answered.
    Waiting,
    /// Its requests are served.
    Active,
    /// The driver was told to close it.
    Closing,
}

impl FenceServer {
    /// A server that has just started with this record. `spare` is a fresh random id for the case that the server is
    /// retired; `cluster` restricts whose records it takes.
    #[must_use]
    pub fn new(record: FenceRecord, spare: ServerId, cluster: Option<ClusterId>) -> Self {
        Self {
            record,
            installing: None,
            cluster,
            spare,
            spares: 0,
            tokens: 0,
            queued: VecDeque::new(),
            calls: Vec::new(),
            connections: BTreeMap::new(),
            generations: BTreeMap::new(),
            confirmed: None,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        }
    }

    /// Plants a mistake.
    #[cfg(any(test, feature = "sim"))]
    pub fn plant(&mut self, bug: Option<Bug>) {
        self.bug = bug;
    }

    /// The durable record.
    #[must_use]
    pub fn record(&self) -> &FenceRecord {
        &self.record
    }

    /// The newest epoch confirmed in this run.
    #[must_use]
    pub fn confirmed(&self) -> Option<Epoch> {
        self.confirmed
    }

    /// When it wants a `Tick`.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.calls.iter().map(|c| c.deadline).min()
    }

    /// Takes an input; everything to do is in `out` afterwards.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Install { call, chain } => self.on_install(now, call, chain, out),
            Input::Persisted(token) => self.on_persisted(token),
            Input::PersistFailed { token, detail } => self.on_persist_failed(token, &detail, out),
            Input::Hello { connection, certified, hello } => self.on_hello(connection, certified, hello, out),
            Input::Closed(connection) => {
                self.connections.remove(&connection);
            }
            Input::Tick => {}
        }
        self.settle(now, out);
        self.check();
    }

    /// What is or will be durable: the stricter rule while the disk is at work.
    fn newest(&self) -> &FenceRecord {
        self.installing.as_ref().map_or(&self.record, |(_, r)| r)
    }

    fn admits(&self, record: &FenceRecord, who: Identity) -> bool {
        #[cfg(any(test, feature = "sim"))]
        if self.bug == Some(Bug::AnyIncarnation) {
            return record.enrolment.as_ref().is_some_and(|e| e.admitted.contains_key(&who.node));
        }
        record.admits(who)
    }

    #[cfg(any(test, feature = "sim"))]
    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    fn on_install(&mut self, now: Instant, call: CallId, chain: Vec<Decision>, out: &mut Vec<Output>) {
        if CALLS_MAX <= self.calls.len() + self.queued.len() {
            return out.push(Output::Installed { call, result: Err(InstallError::Busy) });
        }
        let asked = chain.last().map_or(Epoch(0), |d| d.view.epoch);
        if self.installing.is_some() && self.newest().epoch() < Some(asked) {
            return self.queued.push_back((call, chain));
        }
        match self.verified(&chain) {
            Err(e) => out.push(Output::Installed { call, result: Err(e) }),
            Ok(None) => self.calls.push(Call { id: call, epoch: asked, deadline: now + DRAIN_DEADLINE }),
            Ok(Some(next)) => {
                self.calls.push(Call { id: call, epoch: asked, deadline: now + DRAIN_DEADLINE });
                self.tokens += 1;
                let token = PersistToken(self.tokens);
                // Closing begins at once: it takes as long as the disk does, and a record that is proven is true.
                self.installing = Some((token, next.clone()));
                out.push(Output::Persist { token, record: next });
            }
        }
    }

    /// The record to install, or nothing if the chain ends at what is (about to be) installed.
    fn verified(&mut self, chain: &[Decision]) -> Result<Option<FenceRecord>, InstallError> {
        let Some(last) = chain.last() else {
            return Err(InstallError::Chain("it is empty".into()));
        };
        let server = self.newest().server;
        let Some(enrolment) = &self.newest().enrolment else {
            return self.verified_first(chain, &last.view).map(Some);
        };
        let installed = enrolment.epoch;
        if last.view.epoch < installed {
            return Err(InstallError::Older { asked: last.view.epoch, installed });
        }
        if chain.iter().map(|d| d.view.epoch).find(|e| installed < *e).is_some_and(|e| e != installed.next())
        {
            return Err(InstallError::Gap { installed });
        }
        let Some(view) = verify_chain(enrolment.cluster, installed, &enrolment.voters, chain)? else {
            return Ok(None);
        };
        if !view.servers.contains_key(&server) {
            // Retired: nobody is admitted, and only a record that enrols the new id will be taken.
            return Ok(Some(FenceRecord::fresh(self.next_spare())));
        }
        Ok(Some(FenceRecord { server, enrolment: Some(Enrolment::from(view)) }))
    }

    /// An id that this server never had: of an id it had before, older chains would be proofs again.
    fn next_spare(&mut self) -> ServerId {
        let mut bytes = *self.spare.as_bytes();
        for (byte, number) in bytes.iter_mut().zip(self.spares.to_le_bytes()) {
            *byte ^= number;
        }
        self.spares += 1;
        ServerId::from_bytes(bytes)
    }

    /// The first record: the chain's beginning is believed because a member of the cluster brings it, the rest must follow
    /// from it, and its end must enrol this very server (R9).
    fn verified_first(&self, chain: &[Decision], newest: &View) -> Result<FenceRecord, InstallError> {
        let server = self.newest().server;
        let Some(first) = chain.first() else { return Err(InstallError::DoesNotEnrol { server }) };
        let cluster = self.cluster.unwrap_or(first.view.cluster);
        if first.view.cluster != cluster {
            return Err(InstallError::Chain(format!(
                "the chain is of cluster {}, this server is of {cluster}",
                first.view.cluster
            )));
        }
        verify_chain(cluster, first.view.epoch, &first.view.voters, &chain[1..])?;
        if !newest.servers.contains_key(&server) {
            return Err(InstallError::DoesNotEnrol { server });
        }
        Ok(FenceRecord { server, enrolment: Some(Enrolment::from(newest)) })
    }

    fn on_persisted(&mut self, token: PersistToken) {
        if let Some((_, record)) = self.installing.take_if(|(t, _)| *t == token) {
            self.record = record;
        }
    }

    fn on_persist_failed(&mut self, token: PersistToken, detail: &str, out: &mut Vec<Output>) {
        if self.installing.take_if(|(t, _)| *t == token).is_none() {
            return;
        }
        // Whatever the disk has, nothing was confirmed; the calls that wanted it are told, and may be made again.
        let durable = self.record.epoch();
        let failed = |c: &mut Call| durable < Some(c.epoch);
        for call in self.calls.extract_if(.., failed) {
            let result = Err(InstallError::NotDurable(detail.into()));
            out.push(Output::Installed { call: call.id, result });
        }
    }

    fn on_hello(&mut self, connection: ConnectionId, certified: NodeId, hello: Hello, out: &mut Vec<Output>) {
        let refusal = if hello.version != VERSION {
            Some(HelloRefusal::Version(VERSION))
        } else if hello.who.node != certified {
            Some(HelloRefusal::OtherNode(certified))
        } else if !hello.is_sound() {
            Some(HelloRefusal::UnknownExport)
        } else if WAITING_MAX <= self.connections.values().filter(|c| c.is_waiting()).count() {
            Some(HelloRefusal::Busy)
        } else {
            match &self.newest().enrolment {
                Some(e) if e.cluster != hello.cluster => Some(HelloRefusal::OtherCluster(e.cluster)),
                _ => None,
            }
        };
        if let Some(refusal) = refusal {
            return out.push(Output::Answer { connection, answer: Err(refusal) });
        }
        let entry = Connection {
            who: hello.who,
            export: hello.export,
            generation: hello.generation,
            state: State::Waiting,
        };
        let before = self.connections.insert(connection, entry);
        assert!(before.is_none(), "a connection says hello once while it lives");
    }

    /// Closes, admits and confirms what can be, until nothing changes.
    fn settle(&mut self, now: Instant, out: &mut Vec<Output>) {
        self.close_refused(out);
        self.answer_hellos(out);
        self.confirm(now, out);
        // The disk is free: the next chain that waited.
        while self.installing.is_none()
            && let Some((call, chain)) = self.queued.pop_front()
        {
            self.on_install(now, call, chain, out);
            self.close_refused(out);
            self.confirm(now, out);
        }
    }

    fn close_refused(&mut self, out: &mut Vec<Output>) {
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::LeaveOpen) {
            return;
        }
        let refused: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, c)| c.state == State::Active && !self.admits(self.newest(), c.who))
            .map(|(id, _)| *id)
            .collect();
        for id in refused {
            self.close(id, out);
        }
    }

    fn close(&mut self, id: ConnectionId, out: &mut Vec<Output>) {
        if let Some(c) = self.connections.get_mut(&id)
            && c.state == State::Active
        {
            c.state = State::Closing;
            out.push(Output::Close(id));
        }
    }

    fn answer_hellos(&mut self, out: &mut Vec<Output>) {
        let waiting: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| c.is_waiting()).map(|(id, _)| *id).collect();
        for id in waiting {
            let Some(answer) = self.judge(id, out) else { continue };
            match &answer {
                Ok(_) => {
                    let c = self.connections.get_mut(&id).expect("it was just judged");
                    c.state = State::Active;
                }
                Err(_) => {
                    self.connections.remove(&id);
                }
            }
            out.push(Output::Answer { connection: id, answer });
        }
    }

    /// The answer to a waiting hello, if it can be given now.
    fn judge(
        &mut self,
        id: ConnectionId,
        out: &mut Vec<Output>,
    ) -> Option<Result<(ServerId, Epoch), HelloRefusal>> {
        let c = self.connections.get(&id)?;
        let (who, generation, export) = (c.who, c.generation, c.export.clone());
        let server = self.newest().server;
        let Some(epoch) = self.newest().epoch() else {
            return Some(Err(HelloRefusal::NotEnrolled(server)));
        };
        if !self.admits(self.newest(), who) {
            return Some(Err(HelloRefusal::NotAdmitted { server, epoch }));
        }
        // Admitted by what the disk is about to have, but not yet by what it has.
        let installed = self.record.epoch().filter(|_| self.admits(&self.record, who))?;
        let current = self.generations.entry((who, export.clone())).or_insert(generation);
        if generation < *current {
            return Some(Err(HelloRefusal::Stale(*current)));
        }
        *current = generation;
        let older: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, o)| {
                o.who == who && o.export == export && o.generation < generation && !o.is_waiting()
            })
            .map(|(id, _)| *id)
            .collect();
        for old in &older {
            self.close(*old, out);
        }
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::NoGenerationDrain) {
            return Some(Ok((self.record.server, installed)));
        }
        older.is_empty().then_some(Ok((self.record.server, installed)))
    }

    fn confirm(&mut self, now: Instant, out: &mut Vec<Output>) {
        let undrained = self
            .connections
            .values()
            .filter(|c| !c.is_waiting() && !self.admits(&self.record, c.who))
            .count();
        #[cfg(any(test, feature = "sim"))]
        let undrained =
            if self.has(Bug::ConfirmBeforeDrain) || self.has(Bug::LeaveOpen) { 0 } else { undrained };
        let durable = self.record.clone();
        #[cfg(any(test, feature = "sim"))]
        let durable = if self.has(Bug::ConfirmBeforePersist) { self.newest().clone() } else { durable };
        let busy = self.installing.is_some();
        let server = durable.server;
        let mut confirmed = self.confirmed;
        self.calls.retain(|call| {
            let result = match durable.epoch() {
                Some(epoch) if call.epoch <= epoch && undrained == 0 => {
                    confirmed = confirmed.max(Some(epoch));
                    Ok((server, epoch))
                }
                // The only way to no epoch is retirement.
                None if !busy && undrained == 0 => Err(InstallError::Retired { server }),
                _ if now < call.deadline => return true,
                _ => Err(InstallError::NotDrained { connections: undrained as u32 }),
            };
            out.push(Output::Installed { call: call.id, result });
            false
        });
        self.confirmed = confirmed;
    }

    /// Asserts the invariants, and bounds what is remembered.
    fn check(&mut self) {
        #[cfg(any(test, feature = "sim"))]
        if self.bug.is_some() {
            return;
        }
        for c in self.connections.values().filter(|c| c.state == State::Active) {
            assert!(self.newest().admits(c.who), "{} is served and not admitted", c.who);
            let current = self.generations.get(&(c.who, c.export.clone()));
            assert_eq!(current, Some(&c.generation), "a connection of an older generation is served");
        }
        assert!(self.calls.len() + self.queued.len() <= CALLS_MAX, "calls are bounded");
        if GENERATIONS_MAX < self.generations.len() {
            // Lives that are not admitted never will be again: their generations need not be known.
            let (record, connections) = (self.newest().clone(), &self.connections);
            self.generations.retain(|(who, export), _| {
                record.admits(*who) || connections.values().any(|c| c.who == *who && c.export == *export)
            });
        }
    }
}

impl Connection {
    fn is_waiting(&self) -> bool {
        self.state == State::Waiting
    }
}

#[cfg(test)]
mod tests;
