//! The running store: the replica behind a mutex, its file on a thread of its own, sessions and views as inputs.

mod file;
mod outgoing;

use crate::machine::{Input, Output, Replica, Token, UpdateError};
use crate::{ConfigStore, Entry, ForeignHistory, StoreError, Stored};
pub use file::{FileError, load};
use quorate_membership::{
    BoxFuture, Identity, Membership, ServiceId, SessionHandler, Sessions, StateId, View, ViewListener,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// How long an update is waited for.
const UPDATE_DEADLINE: Duration = Duration::from_secs(15);

/// Why the store did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The file cannot be read, or is of another cluster.
    #[error(transparent)]
    File(#[from] FileError),
    /// The thread that writes could not be started.
    #[error("cannot start the configuration's writer: {0}")]
    Thread(std::io::Error),
}

/// The cluster configuration on this node.
#[derive(Debug)]
pub struct Ccs {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    sessions: Arc<dyn Sessions>,
    writer: mpsc::Sender<(Token, Stored)>,
    newest: watch::Sender<Option<Entry>>,
    /// Set when the store has stopped.
    stopped: watch::Sender<Option<Stopped>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("newest", &self.newest.borrow().as_ref().map(|e| e.version)).finish()
    }
}

struct Inner {
    replica: Replica,
    outgoing: outgoing::Outgoing,
    next: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Result<u64, UpdateError>>>,
}

/// Why the store has stopped.
#[derive(Clone, Debug)]
enum Stopped {
    Foreign(ForeignHistory),
    Disk(String),
}

impl Stopped {
    fn error(&self) -> StoreError {
        match self {
            Self::Foreign(foreign) => StoreError::Foreign(foreign.clone()),
            Self::Disk(text) => StoreError::Stopped(text.clone()),
        }
    }
}

impl Ccs {
    /// Starts the store of this node in `dir`; `state` is the acceptor's state directory, `cluster` the cluster.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(
        membership: &dyn Membership,
        sessions: Arc<dyn Sessions>,
        state: StateId,
        dir: &Path,
    ) -> Result<Self, StartError> {
        let cluster = membership.view().cluster;
        let path: PathBuf = dir.join("configuration");
        let stored = load(&path, cluster)?;
        let newest = stored.history.last().cloned();
        let (writer, writes) = mpsc::channel();
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                replica: Replica::new(membership.me(), state, stored),
                outgoing: outgoing::Outgoing::default(),
                next: 0,
                waiting: BTreeMap::new(),
            }),
            sessions: Arc::clone(&sessions),
            writer,
            newest: watch::Sender::new(newest),
            stopped: watch::Sender::new(None),
        });
        let back = Arc::downgrade(&shared);
        std::thread::Builder::new()
            .name("ccs-writer".into())
            .spawn(move || write_all(&path, &writes, &back))
            .map_err(StartError::Thread)?;
        let listener = Arc::new(Listener(Arc::downgrade(&shared)));
        sessions.register(ServiceId::CCS, Arc::clone(&listener) as Arc<dyn SessionHandler>);
        membership.subscribe(listener);
        Ok(Self { shared })
    }

    /// Resolves when the store has stopped by itself, with the reason: the node must stop too.
    pub async fn failed(&self) -> StoreError {
        let mut stopped = self.shared.stopped.subscribe();
        let outcome = stopped.wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
        outcome.map_or_else(|| StoreError::Stopped("dropped".into()), |s| s.error())
    }
}

/// Writes one state after another; of those that wait only the newest, which includes the others.
fn write_all(path: &Path, writes: &mpsc::Receiver<(Token, Stored)>, back: &Weak<Shared>) {
    while let Ok(first) = writes.recv() {
        let (token, stored) = writes.try_iter().last().unwrap_or(first);
        let outcome = file::save(path, &stored);
        let Some(shared) = back.upgrade() else { return };
        match outcome {
            Ok(()) => shared.feed(Input::Persisted(token)),
            Err(error) => {
                shared.stopped.send_replace(Some(Stopped::Disk(error.to_string())));
                return;
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, input: Input) {
        let mut inner = self.lock();
        let mut out = Vec::new();
        inner.replica.handle(input, &mut out);
        for output in out {
            self.carry_out(output, &mut inner);
        }
    }

    fn carry_out(&self, output: Output, inner: &mut Inner) {
        match output {
            Output::Send { to, bytes } => {
                inner.outgoing.send(&*self.sessions, to, bytes);
            }
            // The writer ends only after it has told why.
            Output::Persist { token, stored } => drop(self.writer.send((token, *stored))),
            Output::Committed(entry) => {
                self.newest.send_replace(Some(entry));
            }
            Output::UpdateDone { number, result } => {
                if let Some(waiter) = inner.waiting.remove(&number) {
                    let _nobody_waits = waiter.send(result);
                }
            }
            Output::Foreign(foreign) => {
                self.stopped.send_replace(Some(Stopped::Foreign(foreign)));
            }
        }
    }

    fn running(&self) -> Result<(), StoreError> {
        match &*self.stopped.borrow() {
            Some(stopped) => Err(stopped.error()),
            None => Ok(()),
        }
    }

    async fn update(&self, expected: Option<u64>, author: String, text: String) -> Result<u64, StoreError> {
        self.running()?;
        let (sender, receiver) = oneshot::channel();
        let number = {
            let mut inner = self.lock();
            inner.next += 1;
            let number = inner.next;
            inner.waiting.insert(number, sender);
            number
        };
        self.feed(Input::Update { number, expected, author, written_at: unix_now(), text });
        let answer = tokio::time::timeout(UPDATE_DEADLINE, receiver).await;
        match answer {
            Ok(Ok(result)) => Ok(result?),
            _ => {
                self.lock().waiting.remove(&number);
                self.feed(Input::GiveUp { number });
                self.running()?;
                Err(StoreError::Unknown { seconds: UPDATE_DEADLINE.as_secs() })
            }
        }
    }
}

/// Seconds since 1970, for the history that people read.
fn unix_now() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "the driver may read the wall clock; nothing is decided by it"
    )]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

struct Listener(Weak<Shared>);

impl SessionHandler for Listener {
    fn deliver(&self, from: Identity, _epoch: quorate_membership::Epoch, payload: &[u8]) {
        if let Some(shared) = self.0.upgrade() {
            shared.feed(Input::Message { from, bytes: payload.to_vec() });
        }
    }

    fn on_ready(&self, to: Identity) {
        if let Some(shared) = self.0.upgrade() {
            shared.lock().outgoing.on_ready(&*shared.sessions, to);
        }
    }
}

impl ViewListener for Listener {
    fn on_view(&self, view: &Arc<View>) {
        if let Some(shared) = self.0.upgrade() {
            shared.lock().outgoing.on_view(view);
            shared.feed(Input::View(Arc::clone(view)));
        }
    }
}

impl ConfigStore for Ccs {
    fn get(&self) -> Option<Entry> {
        self.shared.newest.borrow().clone()
    }

    fn history(&self) -> Vec<Entry> {
        self.shared.lock().replica.history().to_vec()
    }

    fn update(
        &self,
        expected: Option<u64>,
        author: String,
        text: String,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(self.shared.update(expected, author, text))
    }

    fn rollback(&self, to: u64, author: String) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move {
            let history = self.history();
            let old = history.iter().find(|e| e.version == to).ok_or(StoreError::NoVersion(to))?;
            let newest = history.last().map(|e| e.version);
            self.shared.update(newest, author, old.text.clone()).await
        })
    }

    fn changed(&self, version: u64) -> BoxFuture<'_, Entry> {
        let mut newest = self.shared.newest.subscribe();
        Box::pin(async move {
            loop {
                let found = newest.wait_for(|e| e.as_ref().is_some_and(|e| version < e.version)).await;
                match found.ok().and_then(|e| e.clone()) {
                    Some(entry) => return entry,
                    None => std::future::pending().await,
                }
            }
        })
    }
}
