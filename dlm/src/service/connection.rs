//! One program at the other end of a socket: its locks, and what it is told.

use super::access::Peer;
use super::protocol::{
    LOCKS_MAX, MAGIC, OUT_BYTES_MAX, SPACES_MAX, ToClient, ToServer, VERSION, is_value_within_limit,
    push_frame, short, take_frame,
};
use super::server::Shared;
use crate::deliver::lock;
use crate::{
    Completion, ConvertRequest, Flags, LockCallbacks, LockError, LockId, LockRequest, Lockspace, Mode,
    UnlockRequest,
};
use core::time::Duration;
use quorate_membership::Instant;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

/// How much is read at once, in bytes.
const READ_BYTES: usize = 64 * 1024;
/// How long to wait before a client that did not read is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// A lock of the program.
struct Entry {
    space: Arc<dyn Lockspace>,
    /// The lock manager's number; `None` while it is being asked for.
    id: Option<LockId>,
    is_granted: bool,
    uses_value: bool,
    is_persistent: bool,
    /// As the lock manager knows it; 0: the lock stands for itself.
    owner: u64,
}

#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    /// More will come before this must be sent.
    is_corked: bool,
    /// The client does not read as fast as it is told; somebody tries again soon.
    is_retrying: bool,
    is_broken: bool,
}

pub(super) struct Connection {
    /// Itself, for what outlives a call.
    this: Weak<Self>,
    shared: Arc<Shared>,
    stream: UnixStream,
    pub(super) peer: Peer,
    pub(super) command: String,
    pub(super) since: Instant,
    locks: Mutex<BTreeMap<u64, Entry>>,
    /// The owners that the program names, and what the lock manager knows them by.
    owners: Mutex<BTreeMap<u64, u64>>,
    out: Mutex<Out>,
}

/// What a lock of the program is told goes to its socket.
struct Served {
    connection: Arc<Connection>,
    number: u64,
}

impl LockCallbacks for Served {
    fn completion(&self, _id: LockId, completion: Completion) {
        {
            let mut locks = lock(&self.connection.locks);
            let Some(entry) = locks.get_mut(&self.number) else { return };
            entry.is_granted |= matches!(completion, Completion::Granted(_));
            let is_over =
                matches!(completion, Completion::Unlocked | Completion::Stopped) || !entry.is_granted;
            if is_over {
                locks.remove(&self.number);
            }
        }
        self.connection.tell(&ToClient::Done { lock: self.number, completion });
    }
    fn blocking(&self, _id: LockId, mode: Mode) {
        self.connection.tell(&ToClient::Blocking { lock: self.number, mode });
    }
}

/// Why a connection ends.
type End = io::Error;

fn violation(text: &str) -> End {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, stream: UnixStream, peer: Peer) -> Arc<Self> {
        let since = shared.runtime.now();
        let (locks, owners, out) = (Mutex::default(), Mutex::default(), Mutex::default());
        let command = command_of(peer.pid);
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            shared,
            stream,
            peer,
            command,
            since,
            locks,
            owners,
            out,
        })
    }

    /// Serves until the program goes, or is cut off; then everything it had is given up.
    pub(super) fn run(self: &Arc<Self>) {
        let mut spaces = BTreeMap::new();
        if let Err(error) = self.serve(&mut spaces)
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            tracing::debug!(target: "quorate_dlm", pid = self.peer.pid, %error, "a program is cut off");
            self.tell(&ToClient::Refused { reason: short(&error.to_string()) });
        }
        self.end(&spaces);
        for (_, (name, _)) in spaces {
            self.shared.spaces.close(&name);
        }
    }

    pub(super) fn cut_off(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The numbers that the lock manager knows the program's locks by, with their lockspaces, up to `limit`.
    pub(super) fn lock_ids(&self, limit: usize) -> Vec<(String, u64)> {
        let locks = lock(&self.locks);
        locks.values().filter_map(|e| Some((e.space.name().to_owned(), e.id?.0))).take(limit).collect()
    }

    fn serve(self: &Arc<Self>, spaces: &mut OpenSpaces) -> Result<(), End> {
        let mut buffer = vec![0; READ_BYTES];
        let (mut filled, mut is_known) = (0, false);
        loop {
            let room = buffer.get_mut(filled..).unwrap_or_default();
            match (&self.stream).read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            lock(&self.out).is_corked = true;
            let taken = self.take_all(buffer.get(..filled).unwrap_or_default(), &mut is_known, spaces);
            self.flush(|out| out.is_corked = false);
            let taken = taken?;
            buffer.copy_within(taken..filled, 0);
            filled -= taken;
        }
    }

    /// Carries out all whole frames; how many bytes they were.
    fn take_all(
        self: &Arc<Self>,
        bytes: &[u8],
        is_known: &mut bool,
        spaces: &mut OpenSpaces,
    ) -> Result<usize, End> {
        let mut at = 0;
        while let Some((message, len)) = take_frame::<ToServer>(bytes.get(at..).unwrap_or_default())? {
            at += len;
            match message {
                ToServer::Hello { magic, version } if !*is_known => {
                    if magic != MAGIC {
                        return Err(violation("not a client of this service"));
                    }
                    if version != VERSION {
                        let text = format!("protocol version {version}, this node speaks {VERSION}");
                        return Err(violation(&text));
                    }
                    *is_known = true;
                    self.tell(&ToClient::Welcome { version: VERSION, node: self.shared.node });
                }
                _ if !*is_known => return Err(violation("`Hello` comes first, and once")),
                message => self.carry_out(message, spaces)?,
            }
        }
        Ok(at)
    }

    fn carry_out(self: &Arc<Self>, message: ToServer, spaces: &mut OpenSpaces) -> Result<(), End> {
        match message {
            ToServer::Hello { .. } => Err(violation("`Hello` comes first, and once")),
            ToServer::Open { space, name, value_bytes } => self.open(space, name, value_bytes, spaces),
            ToServer::Close { space } => {
                if let Some((name, _)) = spaces.remove(&space) {
                    self.shared.spaces.close(&name);
                }
                Ok(())
            }
            ToServer::Request { space, lock: number, name, mode, range, flags, owner, timeout, priority } => {
                let (_, space) =
                    spaces.get(&space).ok_or_else(|| violation("a lockspace that is not open"))?;
                let owner = if owner == 0 { 0 } else { self.owner(owner) };
                let request = LockRequest { name, mode, range, flags, owner, timeout, priority };
                self.request(space, number, request)
            }
            ToServer::Convert { lock: number, mode, range, flags, value, timeout, priority } => {
                let request = ConvertRequest { mode, range, flags, value, timeout, priority };
                self.with(number, flags, request.value.as_ref(), |space, id| {
                    space.convert(id, request.clone())
                })
            }
            ToServer::Unlock { lock: number, flags, value } => {
                let request = UnlockRequest { flags, value };
                self.with(number, Flags::NONE, request.value.as_ref(), |space, id| {
                    match space.unlock(id, request.clone()) {
                        // The same unlock is under way.
                        Err(LockError::Busy) => Ok(()),
                        other => other,
                    }
                })
            }
            ToServer::Cancel { lock: number } => {
                self.with(number, Flags::NONE, None, |space, id| space.cancel(id))
            }
            ToServer::CloseOwner { space, owner } => {
                let (_, space) =
                    spaces.get(&space).ok_or_else(|| violation("a lockspace that is not open"))?;
                let owner = self.owner(owner);
                space.close_owner(owner);
                self.forget_orphans(space.name(), owner);
                Ok(())
            }
            ToServer::Purge { space, node, pid } => {
                let (_, space) =
                    spaces.get(&space).ok_or_else(|| violation("a lockspace that is not open"))?;
                space.purge(node, pid);
                Ok(())
            }
        }
    }

    fn open(
        &self,
        number: u32,
        name: String,
        value_bytes: Option<u16>,
        spaces: &mut OpenSpaces,
    ) -> Result<(), End> {
        if spaces.contains_key(&number) || SPACES_MAX <= spaces.len() {
            return Err(violation("a lockspace number that is in use, or too many lockspaces"));
        }
        let allowed = self.shared.access.check(self.peer, &name, self.shared.uid);
        // Joining may take as long as a recovery: what was said so far goes out first.
        self.flush(|_| ());
        let opened = allowed.and_then(|()| self.shared.spaces.open(&name, value_bytes));
        match opened {
            Ok(space) => {
                let value_bytes = u16::try_from(space.value_bytes()).unwrap_or(0);
                spaces.insert(number, (name, space));
                self.tell(&ToClient::Opened { space: number, value_bytes });
            }
            Err(reason) => self.tell(&ToClient::NotOpened { space: number, reason: short(&reason) }),
        }
        Ok(())
    }

    fn request(
        self: &Arc<Self>,
        space: &Arc<dyn Lockspace>,
        number: u64,
        request: LockRequest,
    ) -> Result<(), End> {
        {
            let mut locks = lock(&self.locks);
            if locks.contains_key(&number) || LOCKS_MAX <= locks.len() {
                return Err(violation("a lock number that is in use, or too many locks"));
            }
            let entry = Entry {
                space: space.clone(),
                id: None,
                is_granted: false,
                uses_value: request.flags.has(Flags::VALBLK),
                is_persistent: request.flags.has(Flags::PERSISTENT),
                owner: request.owner,
            };
            locks.insert(number, entry);
        }
        let served = Arc::new(Served { connection: self.clone(), number });
        match space.request(request, served) {
            Ok(id) => {
                // It may have ended already.
                if let Some(entry) = lock(&self.locks).get_mut(&number) {
                    entry.id = Some(id);
                }
                Ok(())
            }
            // These depend on more than the client sees.
            Err(error @ (LockError::Stopped | LockError::NotFound | LockError::OtherMode)) => {
                lock(&self.locks).remove(&number);
                let completion = match error {
                    LockError::Stopped => Completion::Stopped,
                    _ => Completion::Again,
                };
                self.tell(&ToClient::Done { lock: number, completion });
                Ok(())
            }
            Err(error) => {
                lock(&self.locks).remove(&number);
                Err(violation(&error.to_string()))
            }
        }
    }

    /// An operation on a lock; none on one that is gone, of which the client hears soon.
    fn with(
        &self,
        number: u64,
        flags: Flags,
        value: Option<&crate::ValueBlock>,
        work: impl FnOnce(&dyn Lockspace, LockId) -> Result<(), LockError>,
    ) -> Result<(), End> {
        if !is_value_within_limit(value) {
            return Err(violation("a value block above the limit"));
        }
        let found = lock(&self.locks).get_mut(&number).and_then(|entry| {
            entry.uses_value |= flags.has(Flags::VALBLK);
            Some((entry.space.clone(), entry.id?))
        });
        let Some((space, id)) = found else { return Ok(()) };
        match work(&*space, id) {
            Ok(()) | Err(LockError::NotFound | LockError::Stopped) => Ok(()),
            // The client knows its locks and checks as we do: one that asks this is none of ours.
            Err(error) => Err(violation(&error.to_string())),
        }
    }

    /// What the lock manager knows one of the program's owners by: no two programs have one in common, and the low half
    /// is the process id.
    fn owner(&self, named: u64) -> u64 {
        let mut owners = lock(&self.owners);
        let number = || self.shared.next_owner.fetch_add(1, Ordering::Relaxed);
        *owners.entry(named).or_insert_with(|| (number() << 32) | u64::from(self.peer.pid))
    }

    /// Orphans are the program's no more.
    fn forget_orphans(&self, space: &str, owner: u64) {
        let orphans: Vec<u64> = {
            let mut locks = lock(&self.locks);
            let is_orphan =
                |e: &Entry| e.owner == owner && e.is_persistent && e.is_granted && e.space.name() == space;
            let orphans: Vec<u64> = locks.iter().filter(|(_, e)| is_orphan(e)).map(|(n, _)| *n).collect();
            orphans.iter().for_each(|number| drop(locks.remove(number)));
            orphans
        };
        for number in orphans {
            self.tell(&ToClient::Done { lock: number, completion: Completion::Unlocked });
        }
    }

    /// The program is gone: pending requests are withdrawn, locks unlocked; what it may have been writing is not valid.
    fn end(&self, spaces: &OpenSpaces) {
        lock(&self.out).is_broken = true;
        let owners: Vec<u64> = lock(&self.owners).values().copied().collect();
        for (_, space) in spaces.values() {
            owners.iter().for_each(|owner| space.close_owner(*owner));
        }
        let left: Vec<(Arc<dyn Lockspace>, LockId, bool)> = lock(&self.locks)
            .values()
            .filter(|e| e.owner == 0)
            .filter_map(|e| Some((e.space.clone(), e.id?, e.uses_value)))
            .collect();
        for (space, id, uses_value) in left {
            let invalid = if uses_value { Flags::IVVALBLK } else { Flags::NONE };
            let request = UnlockRequest { flags: Flags::FORCEUNLOCK | invalid, value: None };
            match space.unlock(id, request) {
                // Gone, or its unlock is under way.
                Ok(()) | Err(LockError::NotFound | LockError::Busy | LockError::Stopped) => {}
                Err(error) => {
                    tracing::error!(target: "quorate_dlm", ?id, %error, "a dead program's lock is not given up");
                }
            }
        }
        self.cut_off();
    }

    /// Puts a message on its way. Never blocks.
    fn tell(&self, message: &ToClient) {
        self.flush(|out| push_frame(&mut out.bytes, message));
    }

    /// Changes what is to be sent, and sends what can be, unless more is to come.
    fn flush(&self, change: impl FnOnce(&mut Out)) {
        let mut out = lock(&self.out);
        if out.is_broken {
            return;
        }
        change(&mut out);
        if !out.is_corked && !out.is_retrying {
            self.push(&mut out);
        }
        if OUT_BYTES_MAX < out.bytes.len() {
            out.is_broken = true;
            out.bytes = Vec::new();
            tracing::warn!(target: "quorate_dlm", pid = self.peer.pid, "a program that does not read is cut off");
            self.cut_off();
        }
    }

    fn push(&self, out: &mut Out) {
        while !out.bytes.is_empty() {
            match rustix::net::send(&self.stream, &out.bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent == out.bytes.len() => out.bytes.clear(),
                Ok(sent) => drop(out.bytes.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !out.is_retrying {
                        out.is_retrying = true;
                        self.retry();
                    }
                    return;
                }
                Err(_) => {
                    // The reader notices, and gives everything up.
                    out.is_broken = true;
                    out.bytes = Vec::new();
                    self.cut_off();
                }
            }
        }
    }

    fn retry(&self) {
        let (this, runtime) = (self.this.clone(), self.shared.runtime.clone());
        self.shared.runtime.spawn(Box::pin(async move {
            loop {
                runtime.sleep_until(runtime.now() + RETRY).await;
                if !this.upgrade().is_some_and(|connection| connection.try_again()) {
                    return;
                }
            }
        }));
    }

    /// Tries to send what the client did not take before; true if some is left.
    fn try_again(&self) -> bool {
        let mut out = lock(&self.out);
        if !out.is_broken {
            self.push(&mut out);
        }
        // Under the guard: whoever adds something later begins anew.
        out.is_retrying = !out.is_broken && !out.bytes.is_empty();
        out.is_retrying
    }
}

/// The lockspaces that the program has open, by its own numbers.
type OpenSpaces = BTreeMap<u32, (String, Arc<dyn Lockspace>)>;

/// What a process is, for people: its command line, cut short.
fn command_of(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&line).replace('\0', " ");
    words.trim_end().chars().filter(|c| !c.is_control()).take(120).collect()
}
