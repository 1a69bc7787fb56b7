//! The program's end of the service.

use super::protocol::{LOCKS_MAX, MAGIC, ToClient, ToServer, VERSION, push_frame, take_frame};
use crate::deliver::lock;
use crate::machine::{check_convert, check_request, check_unlock};
use crate::{
    Completion, ConvertRequest, Flags, JoinError, LockCallbacks, LockError, LockId, LockManager, LockRequest,
    Lockspace, LockspaceOptions, Mode, Range, UnlockRequest,
};
use core::task::{Poll, Waker};
use quorate_membership::{BoxFuture, Identity, NodeId, Safety};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How much is read at once, in bytes.
const READ_BYTES: usize = 64 * 1024;

/// Why the service is not there, or does not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens there, or the socket may not be used.
    #[error("no lock service at {path}: {source}")]
    Connect {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The service does not listen to us, or not any more; every lock is gone.
    #[error("the lock service ended the connection: {0}")]
    Ended(String),
    /// The lockspace is not to be had.
    #[error("{0}")]
    NotOpened(String),
}

/// A connection to the lock service of this host's node. A lock manager like the node's own, with the lockspaces of
/// plain users.
///
/// Dropping it, and every lockspace that came from it, ends the connection and with it all locks. Calls are made on a
/// thread of the client's own. A call to a lockspace may block for a while when the node takes no more.
#[derive(Clone)]
pub struct Client(Arc<Connected>);

impl core::fmt::Debug for Client {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Client").field("node", &self.node()).finish_non_exhaustive()
    }
}

/// Ends the connection when the last user goes; the reading thread has the inner part only.
struct Connected(Arc<Inner>);

impl Drop for Connected {
    fn drop(&mut self) {
        let _ = self.0.stream.shutdown(Shutdown::Both);
    }
}

struct Inner {
    stream: UnixStream,
    /// Held while a frame is written, so that frames stay whole.
    writing: Mutex<Vec<u8>>,
    state: Mutex<State>,
    changed: Condvar,
    next_lock: AtomicU64,
}

#[derive(Default)]
struct State {
    node: Option<Identity>,
    locks: BTreeMap<u64, ClientLock>,
    spaces: BTreeMap<u32, Opening>,
    next_space: u32,
    ended: Option<String>,
}

struct Opening {
    name: String,
    answer: Option<Result<u16, String>>,
    wakers: Vec<Waker>,
}

struct ClientLock {
    space: u32,
    callbacks: Arc<dyn LockCallbacks>,
    granted: Option<Mode>,
    is_pending: bool,
    is_ending: bool,
    is_persistent: bool,
    owner: u64,
    /// What it covers, and what it will when what is pending is granted.
    range: Range,
    wanted: Range,
    /// Its owner has ended; as an orphan it is told nothing.
    is_closed: bool,
}

impl Client {
    /// Connects to the service at `path`, and waits until it answers.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(failed)?;
        let reading = stream.try_clone().map_err(failed)?;
        let inner = Arc::new(Inner {
            stream,
            writing: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            next_lock: AtomicU64::new(1),
        });
        let reader = inner.clone();
        let thread = std::thread::Builder::new().name("lock-calls".into());
        thread.spawn(move || reader.read(&reading)).map_err(failed)?;
        let client = Self(Arc::new(Connected(inner)));
        client.inner().send(&ToServer::Hello { magic: MAGIC, version: VERSION });
        let mut state = lock(&client.inner().state);
        while state.node.is_none() {
            if let Some(reason) = &state.ended {
                return Err(ClientError::Ended(reason.clone()));
            }
            state = client.inner().changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Ok(client)
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.0.0
    }

    /// The node that serves.
    #[must_use]
    pub fn node(&self) -> Option<Identity> {
        lock(&self.inner().state).node
    }

    /// Opens a lockspace, and blocks this thread until it is open: the node joins it if it is the first to want it.
    /// `value_bytes`: the size of its value blocks; any if `None` (32 for a new lockspace).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn open(&self, lockspace: &str, value_bytes: Option<u16>) -> Result<Arc<dyn Lockspace>, ClientError> {
        let number = self.inner().begin_open(lockspace, value_bytes)?;
        let mut state = lock(&self.inner().state);
        loop {
            if let Some(answer) = state.take_answer(number) {
                drop(state);
                return self.opened(number, lockspace, answer);
            }
            state = self.inner().changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The same for asynchronous code. Dropping the future leaves the lockspace open, of no use to anybody.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open_async(
        &self,
        lockspace: &str,
        value_bytes: Option<u16>,
    ) -> Result<Arc<dyn Lockspace>, ClientError> {
        let number = self.inner().begin_open(lockspace, value_bytes)?;
        let answer = core::future::poll_fn(|cx| {
            let mut state = lock(&self.inner().state);
            if let Some(answer) = state.take_answer(number) {
                return Poll::Ready(answer);
            }
            if let Some(opening) = state.spaces.get_mut(&number) {
                opening.wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        self.opened(number, lockspace, answer)
    }

    fn opened(
        &self,
        number: u32,
        name: &str,
        answer: Result<u16, ClientError>,
    ) -> Result<Arc<dyn Lockspace>, ClientError> {
        let value_bytes = usize::from(answer?);
        Ok(Arc::new(ClientSpace { connected: self.0.clone(), number, name: name.to_owned(), value_bytes }))
    }
}

impl State {
    /// The answer to an opening, once; an error if there will be none.
    fn take_answer(&mut self, number: u32) -> Option<Result<u16, ClientError>> {
        match self.spaces.get(&number).and_then(|o| o.answer.clone()) {
            Some(Ok(value_bytes)) => Some(Ok(value_bytes)),
            Some(Err(reason)) => {
                self.spaces.remove(&number);
                Some(Err(ClientError::NotOpened(reason)))
            }
            None => self.ended.clone().map(|reason| Err(ClientError::Ended(reason))),
        }
    }
}

impl Inner {
    /// Writes a frame. If that fails the reader notices.
    fn send(&self, message: &ToServer) {
        let mut buffer = lock(&self.writing);
        buffer.clear();
        push_frame(&mut buffer, message);
        if (&self.stream).write_all(&buffer).is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    fn begin_open(&self, name: &str, value_bytes: Option<u16>) -> Result<u32, ClientError> {
        let number = {
            let mut state = lock(&self.state);
            if let Some(reason) = &state.ended {
                return Err(ClientError::Ended(reason.clone()));
            }
            state.next_space += 1;
            let number = state.next_space;
            let opening = Opening { name: name.to_owned(), answer: None, wakers: Vec::new() };
            state.spaces.insert(number, opening);
            number
        };
        self.send(&ToServer::Open {
            space: number,
            name: crate::service::protocol::short(name),
            value_bytes,
        });
        Ok(number)
    }

    /// Reads until the end, and tells locks what becomes of them.
    fn read(&self, mut stream: &UnixStream) {
        let mut buffer = vec![0; READ_BYTES];
        let mut filled = 0;
        let reason = loop {
            match stream.read(buffer.get_mut(filled..).unwrap_or_default()) {
                Ok(0) => break "it closed".to_owned(),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => break error.to_string(),
            }
            let mut at = 0;
            let stop = loop {
                match take_frame::<ToClient>(buffer.get(at..filled).unwrap_or_default()) {
                    Ok(Some((ToClient::Refused { reason }, _))) => break Some(reason),
                    Ok(Some((message, len))) => {
                        at += len;
                        self.receive(message);
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error.to_string()),
                }
            };
            if let Some(reason) = stop {
                break reason;
            }
            buffer.copy_within(at..filled, 0);
            filled -= at;
        };
        let _ = self.stream.shutdown(Shutdown::Both);
        let (locks, wakers) = {
            let mut state = lock(&self.state);
            state.ended = Some(reason);
            let wakers: Vec<Waker> =
                state.spaces.values_mut().flat_map(|o| core::mem::take(&mut o.wakers)).collect();
            (core::mem::take(&mut state.locks), wakers)
        };
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
        for (id, gone) in locks {
            gone.callbacks.completion(LockId(id), Completion::Stopped);
        }
    }

    fn receive(&self, message: ToClient) {
        match message {
            ToClient::Welcome { node, .. } => {
                lock(&self.state).node = Some(node);
                self.changed.notify_all();
            }
            ToClient::Opened { space, value_bytes } => self.answer(space, Ok(value_bytes)),
            ToClient::NotOpened { space, reason } => self.answer(space, Err(reason)),
            ToClient::Done { lock, completion } => self.done(lock, completion),
            ToClient::Blocking { lock: id, mode } => {
                let callbacks = lock(&self.state).locks.get(&id).map(|l| l.callbacks.clone());
                callbacks.inspect(|c| c.blocking(LockId(id), mode));
            }
            ToClient::Refused { .. } => {}
        }
    }

    fn answer(&self, space: u32, answer: Result<u16, String>) {
        let wakers = {
            let mut state = lock(&self.state);
            let Some(opening) = state.spaces.get_mut(&space) else { return };
            opening.answer = Some(answer);
            core::mem::take(&mut opening.wakers)
        };
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn done(&self, id: u64, completion: Completion) {
        let told = {
            let mut state = lock(&self.state);
            let Some(this) = state.locks.get_mut(&id) else { return };
            if let Completion::Granted(grant) = &completion {
                (this.granted, this.range) = (Some(grant.mode), this.wanted);
            }
            let is_end = matches!(completion, Completion::Unlocked | Completion::Stopped);
            let is_over = is_end || this.granted.is_none();
            let callbacks = this.callbacks.clone();
            let is_orphan = this.is_closed && this.is_persistent && this.granted.is_some();
            let told = match (this.is_ending && !is_end, is_over) {
                _ if is_orphan && completion == Completion::Unlocked => None,
                (false, _) => Some(completion),
                // What an unlock has overtaken is not told; if nothing is left to unlock, that was its end.
                (true, true) => Some(Completion::Unlocked),
                (true, false) => None,
            };
            this.is_pending = false;
            if is_over {
                state.locks.remove(&id);
            }
            told.map(|completion| (callbacks, completion))
        };
        if let Some((callbacks, completion)) = told {
            callbacks.completion(LockId(id), completion);
        }
    }
}

/// A lockspace of the node, in this program's hands.
struct ClientSpace {
    connected: Arc<Connected>,
    number: u32,
    name: String,
    value_bytes: usize,
}

impl ClientSpace {
    fn inner(&self) -> &Inner {
        &self.connected.0
    }
}

impl Lockspace for ClientSpace {
    fn name(&self) -> &str {
        &self.name
    }

    fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    fn request(&self, request: LockRequest, callbacks: Arc<dyn LockCallbacks>) -> Result<LockId, LockError> {
        check_request(&request)?;
        let id = self.inner().next_lock.fetch_add(1, Ordering::Relaxed);
        {
            let mut state = lock(&self.inner().state);
            if state.ended.is_some() || !state.spaces.contains_key(&self.number) {
                return Err(LockError::Stopped);
            }
            if LOCKS_MAX <= state.locks.len() {
                return Err(LockError::Invalid("more locks than one program may have"));
            }
            let this = ClientLock {
                space: self.number,
                callbacks,
                granted: None,
                is_pending: true,
                is_ending: false,
                is_persistent: request.flags.has(Flags::PERSISTENT),
                owner: request.owner,
                range: request.range,
                wanted: request.range,
                is_closed: false,
            };
            state.locks.insert(id, this);
        }
        let LockRequest { name, mode, range, flags, owner, timeout, priority } = request;
        let space = self.number;
        self.inner().send(&ToServer::Request {
            space,
            lock: id,
            name,
            mode,
            range,
            flags,
            owner,
            timeout,
            priority,
        });
        Ok(LockId(id))
    }

    fn corked(&self, work: &mut dyn FnMut(&dyn Lockspace)) {
        work(self);
    }

    fn convert(&self, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        {
            let mut state = lock(&self.inner().state);
            let this = state.locks.get_mut(&id.0).ok_or(LockError::NotFound)?;
            let is_idle = !this.is_pending && !this.is_ending;
            let granted = this.granted.filter(|_| is_idle).ok_or(LockError::Busy)?;
            check_convert(granted, this.range, &request, self.value_bytes)?;
            this.is_pending = true;
            this.wanted = request.range.unwrap_or(this.range);
        }
        let ConvertRequest { mode, range, flags, value, timeout, priority } = request;
        self.inner().send(&ToServer::Convert { lock: id.0, mode, range, flags, value, timeout, priority });
        Ok(())
    }

    fn unlock(&self, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        {
            let mut state = lock(&self.inner().state);
            let this = state.locks.get_mut(&id.0).ok_or(LockError::NotFound)?;
            check_unlock(this.granted, &request, self.value_bytes)?;
            if this.is_ending {
                return Err(LockError::Busy);
            }
            this.is_ending = true;
        }
        let UnlockRequest { flags, value } = request;
        self.inner().send(&ToServer::Unlock { lock: id.0, flags, value });
        Ok(())
    }

    fn close_owner(&self, owner: u64) {
        if owner == 0 {
            return;
        }
        {
            let mut state = lock(&self.inner().state);
            for this in state.locks.values_mut().filter(|l| (l.space, l.owner) == (self.number, owner)) {
                this.is_closed = true;
            }
        }
        self.inner().send(&ToServer::CloseOwner { space: self.number, owner });
    }

    fn purge(&self, node: NodeId, pid: u32) {
        self.inner().send(&ToServer::Purge { space: self.number, node, pid });
    }

    fn cancel(&self, id: LockId) -> Result<(), LockError> {
        {
            let state = lock(&self.inner().state);
            let this = state.locks.get(&id.0).ok_or(LockError::NotFound)?;
            if !this.is_pending || this.is_ending {
                return Ok(());
            }
        }
        self.inner().send(&ToServer::Cancel { lock: id.0 });
        Ok(())
    }
}

impl LockManager for Client {
    /// Opens a lockspace of plain users: lease safety, no servers, no holds. Others are within the node alone.
    fn join<'a>(
        &'a self,
        options: &'a LockspaceOptions,
    ) -> BoxFuture<'a, Result<Arc<dyn Lockspace>, JoinError>> {
        Box::pin(async move {
            if options.safety != Safety::Lease || !options.servers.is_empty() || options.holds.is_some() {
                return Err(JoinError::Invalid(
                    "a program has lockspaces with lease safety and without holds only",
                ));
            }
            let value_bytes = u16::try_from(options.value_bytes)
                .map_err(|_| JoinError::Invalid("a value block has 1 to 256 bytes"))?;
            let opened = self.open_async(&options.name, Some(value_bytes)).await;
            opened
                .map_err(|error| JoinError::Service { name: options.name.clone(), reason: error.to_string() })
        })
    }

    fn leave<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), JoinError>> {
        Box::pin(async move {
            let numbers: Vec<u32> = {
                let mut state = lock(&self.inner().state);
                let is_open = |o: &Opening| o.name == name && matches!(o.answer, Some(Ok(_)));
                let numbers: Vec<u32> =
                    state.spaces.iter().filter(|(_, o)| is_open(o)).map(|(n, _)| *n).collect();
                if numbers.is_empty() {
                    return Err(JoinError::NotJoined(name.to_owned()));
                }
                let locks = state.locks.values().filter(|l| numbers.contains(&l.space)).count();
                if locks != 0 {
                    return Err(JoinError::Busy { name: name.to_owned(), locks });
                }
                for number in &numbers {
                    state.spaces.remove(number);
                }
                numbers
            };
            for space in numbers {
                self.inner().send(&ToServer::Close { space });
            }
            Ok(())
        })
    }
}
