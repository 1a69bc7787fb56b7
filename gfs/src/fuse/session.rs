//! A mount that is served: threads that read requests, tasks that wait, interrupts, the end.
//!
//! A request is handled on the thread that read it: what is cached is answered without a task switch. What has to wait
//! becomes a task of the [`Runtime`], and the thread reads on. An interrupt is a matter of the waiting task, see
//! [`super::request`].

use super::codec::{self, Header, Negotiated, Op, OpError, ReaddirPlus, Reply, Unique, negotiate};
use super::device::{Device, Received};
use super::done::Done;
use super::mount::{self, ConnectionId, MountError, MountOptions, UnmountError, UnmountMode};
use super::notify::Notifier;
use super::request::{Answer, Pending, Request, Requests};
use super::serve::Server;
use crate::face::Filesystem;
use quorate_membership::{Instant, Runtime};
use rustix::io::Errno;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

/// The most threads that read requests.
pub const THREADS_MAX: usize = 16;

/// How a mount is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads that read requests, 1 to [`THREADS_MAX`]. Each handles one request at a time up to its first wait; more
    /// than there are processors brings nothing.
    pub threads: usize,
    /// Whether directory listings may bring attributes along.
    pub readdir_plus: ReaddirPlus,
    /// Keep a file's cached pages when it is opened again. Off, each open drops them.
    pub keep_cache: bool,
}

impl SessionOptions {
    /// For a machine of a few processors: two threads.
    #[must_use]
    pub fn local() -> Self {
        Self { threads: 2, readdir_plus: ReaddirPlus::Auto, keep_cache: false }
    }
}

/// What the threads of a mount share.
pub(crate) struct Shared {
    pub(crate) device: Arc<Device>,
    pub(crate) requests: Requests,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) notifier: Arc<Notifier>,
    pub(crate) server: Server,
    options: SessionOptions,
    /// The kernel answered INIT.
    up: Done,
    /// All threads have ended.
    down: Done,
    threads: AtomicUsize,
    end: Mutex<Option<End>>,
}

/// How a mount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was unmounted.
    Unmounted,
    /// The connection was aborted; what was under way failed.
    Aborted,
}

/// A mounted filesystem. At its end the kernel gives back neither lookups nor what it still reads ahead: the filesystem
/// is closed as a whole then.
///
/// It stays mounted when this is dropped: the kernel decides when it ends, or
/// [`Session::unmount`], or the end of the process.
pub struct Session {
    shared: Arc<Shared>,
    mountpoint: PathBuf,
    connection: Option<ConnectionId>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({}, {:?})", self.mountpoint.display(), self.connection)
    }
}

impl Session {
    /// Mounts `filesystem` and serves it. Waits that outlast the first try run on `runtime`. Called within a tokio
    /// runtime, its context is entered by the threads, so that code which needs one finds it.
    ///
    /// # Errors
    /// See [`MountError`]; nothing is mounted then.
    pub fn mount(
        filesystem: Arc<dyn Filesystem>,
        runtime: Arc<dyn Runtime>,
        mount: &MountOptions,
        options: SessionOptions,
    ) -> Result<Self, MountError> {
        let device = Arc::new(Device::new(mount::mount(mount)?));
        let serve = |error| {
            let _ = mount::unmount(&mount.mountpoint, UnmountMode::Lazy);
            MountError::Serve(error)
        };
        let notifier = Arc::new(Notifier::start(Arc::clone(&device)).map_err(serve)?);
        let shared = Arc::new(Shared {
            device,
            requests: Requests::default(),
            runtime,
            server: Server::new(filesystem, Arc::clone(&notifier), options.keep_cache),
            notifier,
            options,
            up: Done::default(),
            down: Done::default(),
            threads: AtomicUsize::new(0),
            end: Mutex::new(None),
        });
        let context = tokio::runtime::Handle::try_current().ok();
        for n in 0..options.threads.clamp(1, THREADS_MAX) {
            let it = Arc::clone(&shared);
            let context = context.clone();
            shared.threads.fetch_add(1, Ordering::SeqCst);
            std::thread::Builder::new()
                .name(format!("fuse-{n}"))
                .spawn(move || {
                    let _entered = context.as_ref().map(tokio::runtime::Handle::enter);
                    let _ended = Ended(&it);
                    it.read_requests();
                })
                .map_err(serve)?;
        }
        let connection = ConnectionId::of_mount(&mount.mountpoint);
        let mountpoint = std::path::absolute(&mount.mountpoint).map_err(serve)?;
        tracing::info!(mountpoint = %mountpoint.display(), ?connection, "mounted");
        Ok(Self { shared, mountpoint, connection })
    }

    /// Where it is mounted, absolute.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The kernel's connection, for a supervisor that must abort it when this process cannot (R8).
    #[must_use]
    pub fn connection(&self) -> Option<ConnectionId> {
        self.connection
    }

    /// Requests that wait for something now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.requests.len()
    }

    /// Resolves when the mount is served no more. Dropping it has no effect.
    pub async fn ended(&self) -> End {
        self.shared.down.wait().await;
        self.shared.end.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(End::Aborted)
    }

    /// Unmounts, and waits until the last request is answered. Dropping the future gives up waiting.
    ///
    /// # Errors
    /// `Busy`: somebody has a file open or stands in a directory; it stays mounted (except when [`UnmountMode::Lazy`]
    /// was asked for, which hides it at once). `Deadline`: it is hidden, but still in use.
    pub async fn unmount(&self, mode: UnmountMode, deadline: Instant) -> Result<(), UnmountError> {
        let outcome = Arc::new((Done::default(), Mutex::new(None)));
        let (told, path) = (Arc::clone(&outcome), self.mountpoint.clone());
        // A thread of its own: the call sends requests that our threads answer.
        std::thread::Builder::new()
            .name("fuse-unmount".into())
            .spawn(move || {
                let result = mount::unmount(&path, mode);
                *told.1.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
                told.0.raise();
            })
            .map_err(|e| UnmountError::Fusermount(e.to_string()))?;
        let late = || UnmountError::Deadline(self.mountpoint.clone());
        if !self.before(outcome.0.wait(), deadline).await {
            return Err(late());
        }
        outcome.1.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or(Ok(()))?;
        if self.before(self.shared.down.wait(), deadline).await { Ok(()) } else { Err(late()) }
    }

    /// Ends the connection without waiting for anything: every operation fails, now and later.
    pub fn abort(&self) {
        let aborted = self.connection.is_some_and(|c| c.abort().is_ok());
        if !aborted {
            // Without the control filesystem: a forced unmount aborts too, whether or not it then finds it busy.
            let _ = mount::unmount(&self.mountpoint, UnmountMode::Force);
        }
    }

    async fn before(&self, future: impl Future<Output = ()>, deadline: Instant) -> bool {
        let sleep = self.shared.runtime.sleep_until(deadline);
        futures_util::pin_mut!(future);
        matches!(futures_util::future::select(future, sleep).await, futures_util::future::Either::Left(_))
    }
}

/// Counts a thread out, also when it panics.
struct Ended<'a>(&'a Arc<Shared>);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // An assertion of the filesystem failed: answering on could do harm, and the kernel ends the mount with us.
            tracing::error!("a thread that serves a mount panicked");
            std::process::abort();
        }
        let last = self.0.threads.fetch_sub(1, Ordering::SeqCst) == 1;
        if last {
            self.0.requests.end();
            self.0.notifier.close();
            self.0.up.raise();
            self.0.down.raise();
        }
    }
}

impl Shared {
    fn read_requests(self: &Arc<Self>) {
        let mut buffer = vec![0; codec::READ_BUFFER_BYTES];
        loop {
            let end = match self.device.receive(&mut buffer) {
                Received::Message(len) => {
                    self.take(buffer.get(..len).unwrap_or_default());
                    continue;
                }
                Received::Unmounted => End::Unmounted,
                Received::Aborted(errno) => {
                    tracing::warn!(%errno, "the FUSE connection was aborted");
                    End::Aborted
                }
            };
            self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
            return;
        }
    }

    fn take(self: &Arc<Self>, message: &[u8]) {
        let (header, body) = match Header::parse(message) {
            Ok(found) => found,
            Err(malformed) => {
                tracing::error!(%malformed, "dropped what the kernel sent");
                return;
            }
        };
        let op = match Op::parse(header.opcode, body) {
            Ok(op) => op,
            Err(OpError::Unknown(_)) => return self.reply(header.unique, &Reply::Error(Errno::NOSYS)),
            Err(malformed) => {
                tracing::error!(%malformed, "cannot serve what the kernel asked for");
                return self.reply(header.unique, &Reply::Error(Errno::IO));
            }
        };
        match op {
            Op::Init(offer) => self.init(header.unique, &offer),
            Op::Forget { count } => self.server.forget(header.node, count),
            Op::BatchForget(forgets) => {
                for (node, count) in forgets.iter() {
                    self.server.forget(node, count);
                }
            }
            Op::Interrupt { unique } => self.interrupt(header.unique, unique),
            Op::Destroy => self.reply(header.unique, &Reply::Empty),
            op => {
                let request = Request::new(&header, &op);
                let future = self.server.handle(&header, op, request.withdraw.clone());
                self.handle(request, future);
            }
        }
    }

    fn init(&self, unique: Unique, offer: &codec::InitOp) {
        match negotiate(offer, self.options.readdir_plus) {
            Ok(negotiated) => {
                let Negotiated { minor, flags, .. } = negotiated;
                tracing::debug!(minor, flags, offered = offer.minor, "FUSE version agreed");
                self.reply(unique, &Reply::Init(negotiated));
                self.notifier.probe();
                self.up.raise();
            }
            Err(error) => {
                tracing::error!(%error, "cannot serve the mount");
                self.reply(unique, &Reply::Error(Errno::PROTO));
            }
        }
    }

    fn interrupt(&self, own: Unique, unique: Unique) {
        if self.requests.interrupt(unique) {
            return;
        }
        // Answered already, or another thread is about to register it. "Again" makes the kernel send the interrupt
        // once more if the request still waits, and does nothing otherwise.
        std::thread::yield_now();
        let _ = self.device.reply(own, &Reply::Error(Errno::AGAIN));
    }

    /// Polls once here; what has to wait becomes a task.
    fn handle(self: &Arc<Self>, request: Request, mut future: Pending) {
        // Nobody listens to this waker: the task polls again before it waits.
        let mut context = Context::from_waker(std::task::Waker::noop());
        match future.as_mut().poll(&mut context) {
            Poll::Ready(answer) => self.answer(&request, answer),
            Poll::Pending => {
                let interrupted = self.requests.register(request.unique);
                let task = super::request::wait(Arc::clone(self), request, future, interrupted);
                self.runtime.spawn(Box::pin(task));
            }
        }
    }

    /// Sends an answer; undoes it if the kernel does not want it any more.
    pub(crate) fn answer(self: &Arc<Self>, request: &Request, answer: Answer) {
        match self.device.reply(request.unique, &answer.reply) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => self.undo(answer),
            Err(errno) => {
                tracing::error!(?request, reply = ?answer.reply, %errno, "the kernel refused a reply");
                self.undo(answer);
                let _ = self.device.reply(request.unique, &Reply::Error(Errno::IO));
            }
        }
    }

    /// Gives back what an unwanted answer holds.
    pub(crate) fn undo(self: &Arc<Self>, answer: Answer) {
        if let Some(undo) = self.server.undo(answer) {
            self.runtime.spawn(undo);
        }
    }

    pub(crate) fn reply(&self, unique: Unique, reply: &Reply) {
        if let Err(errno) = self.device.reply(unique, reply)
            && errno != Errno::NOENT
        {
            tracing::debug!(?reply, %errno, "a reply was not taken");
        }
    }
}
