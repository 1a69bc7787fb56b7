//! The task around the fence machine: its inputs, its disk, and the gates it shuts.

use super::gate::{ConnectionGate, LifeCounter};
use super::{FenceConfig, TrustListener};
use crate::fence::wire::{FenceStatus, Hello, HelloRefusal, InstallError, LIVES_MAX, LifeCounts};
use crate::fence::{
    CallId, ConnectionId, FenceRecord, FenceServer, Input, Output, PersistToken, RecordError,
};
use quorate_membership::{Decision, Epoch, Identity, Instant, NodeId, ServerId, Trust};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

const RECORD_FILE: &str = "fence";

/// Why a server's state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceOpenError {
    /// It cannot be made, read, locked or written.
    #[error("the state directory {path}: {source}", path = path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another server runs on it.
    #[error("the state directory {path} is in use by another server", path = path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(String),
}

/// 16 random bytes.
pub(crate) fn random() -> Result<[u8; 16], FenceOpenError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| FenceOpenError::Random(e.to_string()))?;
    Ok(bytes)
}

/// The record's file, under the lock of its directory.
#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    // Held for the lock.
    _lock: OwnedFd,
}

impl Disk {
    fn open(dir: &Path) -> Result<Self, FenceOpenError> {
        let fail = |source: std::io::Error| FenceOpenError::Directory { path: dir.into(), source };
        std::fs::create_dir_all(dir).map_err(fail)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(dir, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { dir: dir.into(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(FenceOpenError::InUse { path: dir.into() }),
            Err(e) => Err(fail(e.into())),
        }
    }

    /// The record, or a fresh one where there is none or it is lost: the server is then another one (R9).
    fn load(&self) -> Result<FenceRecord, FenceOpenError> {
        let path = self.dir.join(RECORD_FILE);
        let lost = match std::fs::read(&path).map(|bytes| FenceRecord::decode(&bytes)) {
            Ok(Ok(record)) => return Ok(record),
            Ok(Err(e)) => Some(e),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(FenceOpenError::Directory { path, source }),
        };
        let record = FenceRecord::fresh(ServerId::from_bytes(random()?));
        let server = record.server;
        match lost {
            Some(RecordError::Checksum { .. } | RecordError::Format) => {
                tracing::error!(target: "quorate_gnbd", %server, "the fence record is lost; this is another server now");
            }
            None => tracing::info!(target: "quorate_gnbd", %server, "a new storage server"),
        }
        self.store(&record).map_err(|source| FenceOpenError::Directory { path, source })?;
        Ok(record)
    }

    /// Replaces the record as a whole: after a crash there is the old one or the new one.
    fn store(&self, record: &FenceRecord) -> std::io::Result<()> {
        let (path, fresh) = (self.dir.join(RECORD_FILE), self.dir.join("fence.new"));
        let mut file = File::create(&fresh)?;
        file.write_all(&record.encode())?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        File::open(&self.dir)?.sync_all()
    }
}

type Answer = Result<(ServerId, Epoch), HelloRefusal>;
type Installed = Result<(ServerId, Epoch), InstallError>;

enum Event {
    Install(Vec<Decision>, oneshot::Sender<Installed>),
    Hello(ConnectionId, NodeId, Hello, Arc<ConnectionGate>, oneshot::Sender<Answer>),
    Machine(Input),
    Status(oneshot::Sender<FenceStatus>),
    Stop,
}

/// The fence of a running server.
#[derive(Clone)]
pub(crate) struct Fence {
    events: mpsc::UnboundedSender<Event>,
    drained: mpsc::UnboundedSender<ConnectionId>,
    /// Never sent on: it ends when the task has, and with it the lock on the directory.
    ended: watch::Receiver<()>,
    lives: Arc<Mutex<BTreeMap<Identity, Arc<LifeCounter>>>>,
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fence")
    }
}

impl Fence {
    /// Loads the record and starts the task. It ends when the last clone is gone.
    pub(crate) fn open(config: &FenceConfig) -> Result<(Self, ServerId), FenceOpenError> {
        let (cluster, trust) = (config.cluster, config.trust.clone());
        let disk = Disk::open(&config.state_dir)?;
        let record = disk.load()?;
        let server = record.server;
        let machine = FenceServer::new(record, ServerId::from_bytes(random()?), cluster);
        let (events, inbox) = mpsc::unbounded_channel();
        let (drained, drains) = mpsc::unbounded_channel();
        let lives = Arc::new(Mutex::new(BTreeMap::new()));
        let mut task = Task {
            machine,
            trust,
            believed: None,
            disk: Arc::new(disk),
            writing: None,
            events: events.downgrade(),
            gates: BTreeMap::new(),
            answers: BTreeMap::new(),
            calls: BTreeMap::new(),
            call: 0,
            lives: Arc::clone(&lives),
        };
        // Before the first handshake.
        task.tell_trust();
        let (running, ended) = watch::channel(());
        tokio::spawn(async move {
            task.run(inbox, drains).await;
            drop(running);
        });
        Ok((Self { events, drained, ended, lives }, server))
    }

    /// Ends the task and releases the directory.
    pub(crate) async fn stop(&self) {
        let _ = self.events.send(Event::Stop);
        let _ = self.ended.clone().changed().await;
    }

    pub(crate) async fn install(&self, chain: Vec<Decision>) -> Installed {
        let (tell, told) = oneshot::channel();
        let stopped = || Err(InstallError::NotDurable("the server is stopping".into()));
        if self.events.send(Event::Install(chain, tell)).is_err() {
            return stopped();
        }
        told.await.unwrap_or_else(|_| stopped())
    }

    pub(crate) async fn status(&self) -> Option<FenceStatus> {
        let (tell, told) = oneshot::channel();
        self.events.send(Event::Status(tell)).ok()?;
        told.await.ok()
    }

    /// Announces a connection. After `Ok` the gate is in the fence's hands; it must be shut when the connection ends.
    pub(crate) async fn hello(
        &self,
        id: ConnectionId,
        certified: NodeId,
        hello: Hello,
    ) -> (Answer, Arc<ConnectionGate>) {
        // A member cannot make others' counters.
        let life = if hello.who.node == certified { self.life(hello.who) } else { Arc::default() };
        let gate = ConnectionGate::new(id, Arc::clone(&life), self.drained.clone());
        let (tell, told) = oneshot::channel();
        // If the connection goes away while it waits, the gate is shut and the fence forgets it.
        let guard = ShutOnDrop(Some(Arc::clone(&gate)));
        let event = Event::Hello(id, certified, hello, Arc::clone(&gate), tell);
        let answer = match self.events.send(event) {
            Ok(()) => told.await.unwrap_or(Err(HelloRefusal::Busy)),
            Err(_) => Err(HelloRefusal::Busy),
        };
        match &answer {
            Ok(_) => {
                guard.keep();
                LifeCounter::add(&life.connections);
            }
            Err(HelloRefusal::NotAdmitted { .. }) => LifeCounter::add(&life.hellos_refused),
            Err(_) => {}
        }
        (answer, gate)
    }

    fn life(&self, who: Identity) -> Arc<LifeCounter> {
        let mut lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        if LIVES_MAX <= lives.len() && !lives.contains_key(&who) {
            lives.pop_first();
        }
        Arc::clone(lives.entry(who).or_default())
    }
}

struct ShutOnDrop(Option<Arc<ConnectionGate>>);

impl ShutOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for ShutOnDrop {
    fn drop(&mut self) {
        if let Some(gate) = &self.0 {
            gate.shut();
        }
    }
}

struct Task {
    machine: FenceServer,
    trust: Option<TrustListener>,
    /// What the listener was told last.
    believed: Option<Trust>,
    disk: Arc<Disk>,
    /// The last record on its way to the disk: one at a time, as the machine has it.
    writing: Option<JoinHandle<()>>,
    events: mpsc::WeakUnboundedSender<Event>,
    gates: BTreeMap<ConnectionId, (Identity, Arc<ConnectionGate>)>,
    answers: BTreeMap<ConnectionId, oneshot::Sender<Answer>>,
    calls: BTreeMap<CallId, oneshot::Sender<Installed>>,
    call: u64,
    lives: Arc<Mutex<BTreeMap<Identity, Arc<LifeCounter>>>>,
}

/// The time for the machine.
fn now() -> Instant {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    Instant(seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(t.tv_nsec).unwrap_or(0)))
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Event>,
        mut drains: mpsc::UnboundedReceiver<ConnectionId>,
    ) {
        loop {
            let deadline = self.machine.next_deadline().map(|at| at.since(now()));
            let tick = async {
                match deadline {
                    Some(left) => tokio::time::sleep(left).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                event = inbox.recv() => match event {
                    Some(Event::Stop) | None => break,
                    Some(event) => event,
                },
                Some(id) = drains.recv() => Event::Machine(Input::Closed(id)),
                () = tick => Event::Machine(Input::Tick),
            };
            self.on_event(event);
        }
        if let Some(writing) = self.writing.take() {
            // What it holds of the directory ends with it, whatever came of it.
            let _ = writing.await;
        }
    }

    /// Tells whose certificates the installed record believes, if that changed.
    fn tell_trust(&mut self) {
        let Some(enrolment) = &self.machine.record().enrolment else { return };
        if self.believed.as_ref() != Some(&enrolment.trust) {
            self.believed = Some(enrolment.trust.clone());
            if let Some(tell) = &self.trust {
                tell(&enrolment.trust);
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        let input = match event {
            Event::Stop => return,
            Event::Machine(input) => input,
            Event::Install(chain, tell) => {
                self.call += 1;
                let call = CallId(self.call);
                self.calls.insert(call, tell);
                Input::Install { call, chain }
            }
            Event::Hello(connection, certified, hello, gate, tell) => {
                self.gates.insert(connection, (hello.who, gate));
                self.answers.insert(connection, tell);
                Input::Hello { connection, certified, hello }
            }
            Event::Status(tell) => {
                // Whoever asked may be gone.
                let _ = tell.send(self.status());
                return;
            }
        };
        if let Input::Closed(id) = &input {
            self.gates.remove(id);
            self.answers.remove(id);
        }
        let mut out = Vec::new();
        self.machine.handle(now(), input, &mut out);
        for output in out {
            self.carry_out(output);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Persist { token, record } => self.persist(token, record),
            Output::Close(id) => {
                if let Some((_, gate)) = self.gates.get(&id) {
                    gate.shut();
                }
            }
            Output::Answer { connection, answer } => {
                if answer.is_err() {
                    self.gates.remove(&connection);
                }
                if let Some(tell) = self.answers.remove(&connection) {
                    let _ = tell.send(answer);
                }
            }
            Output::Installed { call, result } => {
                if result.is_ok() {
                    self.tell_trust();
                    let record = self.machine.record();
                    for (_, gate) in self.gates.values().filter(|(who, _)| !record.admits(*who)) {
                        gate.confirm_fence();
                    }
                }
                if let Some(tell) = self.calls.remove(&call) {
                    let _ = tell.send(result);
                }
            }
        }
    }

    fn persist(&mut self, token: PersistToken, record: FenceRecord) {
        let (disk, events) = (Arc::clone(&self.disk), self.events.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let input = match disk.store(&record) {
                Ok(()) => Input::Persisted(token),
                Err(e) => Input::PersistFailed { token, detail: e.to_string() },
            };
            // Before anybody hears of it: whoever stops the server then may open the directory at once.
            drop(disk);
            if let Some(events) = events.upgrade() {
                let _ = events.send(Event::Machine(input));
            }
        });
        self.writing = Some(writing);
    }

    fn status(&self) -> FenceStatus {
        let record = self.machine.record();
        let lives = self.lives.lock().unwrap_or_else(PoisonError::into_inner);
        let lives: BTreeMap<Identity, LifeCounts> = lives.iter().map(|(who, l)| (*who, l.counts())).collect();
        FenceStatus {
            server: record.server,
            cluster: record.enrolment.as_ref().map(|e| e.cluster),
            epoch: record.epoch(),
            confirmed: self.machine.confirmed(),
            admitted: record.enrolment.as_ref().map(|e| e.admitted.clone()).unwrap_or_default(),
            lives,
            exports: Vec::new(),
        }
    }
}
