//! The listening end: accepts programs, one thread for each.

use super::access::{AccessRules, Peer};
use super::connection::Connection;
use super::spaces::Spaces;
use crate::deliver::lock;
use crate::{LockManager, ProcessInfo};
use core::time::Duration;
use quorate_membership::{Identity, Runtime};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How many programs may be connected. Each costs a thread.
pub const CONNECTIONS_MAX: usize = 1_024;
/// The stack of a connection's thread, in bytes.
const STACK_BYTES: usize = 512 * 1024;
/// The longest path of a socket (`sun_path` of Linux, with room to spare).
const PATH_BYTES_MAX: usize = 100;
/// How many locks of one process are named in [`ProcessInfo`].
const LOCKS_SHOWN_MAX: usize = 4_096;

/// How a service is run.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where the socket is. One that is there is replaced: its directory belongs to the node.
    pub path: PathBuf,
    /// Who may open what.
    pub access: AccessRules,
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) node: Identity,
    pub(super) uid: u32,
    pub(super) access: AccessRules,
    pub(super) spaces: Arc<Spaces>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) next_owner: AtomicU64,
    connections: Mutex<Connections>,
    changed: Condvar,
}

#[derive(Default)]
struct Connections {
    by_number: BTreeMap<u64, Arc<Connection>>,
    next: u64,
    is_stopped: bool,
}

/// The service. Dropping it stops it.
pub struct LockServer {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
}

impl core::fmt::Debug for LockServer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LockServer").field("node", &self.shared.node).finish_non_exhaustive()
    }
}

impl LockServer {
    /// Listens, and serves in threads of its own. `runtime` runs what joins and leaves lockspaces.
    ///
    /// # Errors
    /// The path is too long or cannot be used, or there is no thread to be had.
    pub fn start(
        config: ServerConfig,
        node: Identity,
        manager: Arc<dyn LockManager>,
        runtime: Arc<dyn Runtime>,
    ) -> io::Result<Self> {
        let len = config.path.as_os_str().len();
        if PATH_BYTES_MAX < len {
            let text = format!("{}: {len} bytes are too long for a socket", config.path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        match std::fs::remove_file(&config.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = Arc::new(UnixListener::bind(&config.path)?);
        // Who may do what is decided by the peer's credentials; the mode keeps out those to whom nothing is open.
        let mode = if config.access.admits_others() { 0o666 } else { 0o600 };
        std::fs::set_permissions(&config.path, std::fs::Permissions::from_mode(mode))?;
        let shared = Arc::new(Shared {
            node,
            uid: rustix::process::geteuid().as_raw(),
            access: config.access,
            spaces: Spaces::new(manager, runtime.clone()),
            runtime,
            next_owner: AtomicU64::new(1),
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let (accepting, to) = (listener.clone(), shared.clone());
        std::thread::Builder::new().name("lock-server".into()).spawn(move || accept(&accepting, &to))?;
        Ok(Self { shared, listener })
    }

    /// The programs that are connected, in the order they came.
    #[must_use]
    pub fn processes(&self) -> Vec<ProcessInfo> {
        let now = self.shared.runtime.now();
        let connections: Vec<_> = lock(&self.shared.connections).by_number.values().cloned().collect();
        let info = |c: &Arc<Connection>| ProcessInfo {
            pid: c.peer.pid,
            uid: c.peer.uid,
            command: c.command.clone(),
            connected: now.since(c.since),
            locks: c.lock_ids(LOCKS_SHOWN_MAX),
        };
        connections.iter().map(info).collect()
    }

    /// Cuts everybody off, and waits until their locks are given up, for `deadline` at most; false if some are left.
    pub fn shutdown(&self, deadline: Duration) -> bool {
        self.stop();
        let connections = lock(&self.shared.connections);
        let left = self.shared.changed.wait_timeout_while(connections, deadline, |c| !c.by_number.is_empty());
        !left.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// The same for a node that leaves in order: then the lockspaces of programs are left too. False if some are not.
    pub async fn leave(&self, deadline: Duration) -> bool {
        self.stop();
        let until = self.shared.runtime.now() + deadline;
        loop {
            let is_empty = lock(&self.shared.connections).by_number.is_empty();
            if is_empty && self.shared.spaces.leave_all().await {
                return true;
            }
            if until <= self.shared.runtime.now() {
                return false;
            }
            self.shared.runtime.sleep_until(self.shared.runtime.now() + Duration::from_millis(10)).await;
        }
    }

    fn stop(&self) {
        let mut connections = lock(&self.shared.connections);
        connections.is_stopped = true;
        connections.by_number.values().for_each(|c| c.cut_off());
        // Ends the wait of the accepting thread.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
    }
}

impl Drop for LockServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = shared.admit(stream) {
                    tracing::warn!(target: "quorate_dlm", %error, "a program is not served");
                }
            }
            Err(_) if lock(&shared.connections).is_stopped => return,
            Err(error) => {
                // Out of descriptors, say: others may give some back.
                tracing::warn!(target: "quorate_dlm", %error, "cannot accept");
                std::thread::park_timeout(Duration::from_millis(100));
            }
        }
    }
}

impl Shared {
    fn admit(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
        let peer = Peer {
            uid: credentials.uid.as_raw(),
            gid: credentials.gid.as_raw(),
            pid: u32::try_from(credentials.pid.as_raw_nonzero().get()).unwrap_or(0),
        };
        let connection = Connection::new(self.clone(), stream, peer);
        let number = {
            let mut connections = lock(&self.connections);
            if connections.is_stopped {
                return Ok(());
            }
            if CONNECTIONS_MAX <= connections.by_number.len() {
                return Err(io::Error::other("too many programs are connected"));
            }
            connections.next += 1;
            let number = connections.next;
            connections.by_number.insert(number, connection.clone());
            number
        };
        let shared = self.clone();
        let thread = std::thread::Builder::new().name("lock-client".into()).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            // The last of it also when a callback panics.
            let _end = End(&shared, number);
            connection.run();
        });
        if spawned.is_err() {
            self.forget(number);
        }
        spawned.map(drop)
    }

    fn forget(&self, number: u64) {
        lock(&self.connections).by_number.remove(&number);
        self.changed.notify_all();
    }
}

struct End<'a>(&'a Arc<Shared>, u64);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}
