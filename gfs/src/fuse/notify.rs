//! Tells the kernel what to forget, from threads of its own.
//!
//! A notice may block in the kernel on a page that a read holds while the read waits for us. Two lanes keep that from
//! spreading: attributes and names, which wait for no page, have a thread; pages have another. And whoever waits for
//! pages to go is let go when an operation on those pages is under way ([`Users`]): that operation may wait for the very
//! lock that is being given up. What the kernel then still shows is caught by the attributes, which are gone already:
//! the next `read` asks for them, and the kernel drops the pages itself if size or time of change differ.

use super::codec::Notice;
use super::device::Device;
use super::done::Done;
use event_listener::Event;
use rustix::io::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A thread with a queue of notices.
#[derive(Debug)]
struct Lane {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    notices: VecDeque<(Notice, Arc<Done>)>,
    closed: bool,
}

impl Lane {
    fn start(device: Arc<Device>, name: &str) -> std::io::Result<Arc<Self>> {
        let lane = Arc::new(Self { queue: Mutex::default(), wake: Condvar::new() });
        let it = Arc::clone(&lane);
        std::thread::Builder::new().name(name.into()).spawn(move || it.run(&device))?;
        Ok(lane)
    }

    fn run(&self, device: &Device) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some((notice, done)) = queue.notices.pop_front() {
                drop(queue);
                match device.notify(&notice) {
                    // Not known to the kernel: nothing is cached. Gone: neither.
                    Ok(()) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::NOTCONN) => {}
                    // An older kernel: it keeps the inode until it needs the memory.
                    Err(_) if matches!(notice, Notice::Prune { .. }) => {}
                    Err(errno) => tracing::warn!(?notice, %errno, "the kernel refused a notice"),
                }
                done.raise();
                queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            } else if queue.closed {
                return;
            } else {
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Queues a notice. What is returned is raised when the kernel took it, or at once if the mount is gone.
    fn send(&self, notice: Notice) -> Arc<Done> {
        let done = Arc::new(Done::default());
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.closed {
            done.raise();
        } else {
            queue.notices.push_back((notice, Arc::clone(&done)));
            self.wake.notify_one();
        }
        done
    }

    fn close(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        for (_, done) in queue.notices.drain(..) {
            done.raise();
        }
        self.wake.notify_one();
    }
}

/// Which inodes have operations under way that may hold their pages in the kernel.
#[derive(Debug, Default)]
pub(crate) struct Users {
    counts: Mutex<BTreeMap<u64, usize>>,
    came: Event,
}

/// An operation under way; ends when dropped.
#[derive(Debug)]
pub(crate) struct User {
    users: Arc<Users>,
    node: u64,
}

impl Users {
    /// Counts an operation on the pages of `node`.
    pub(crate) fn enter(self: &Arc<Self>, node: u64) -> User {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(node).or_default() += 1;
        self.came.notify(usize::MAX);
        User { users: Arc::clone(self), node }
    }

    fn has(&self, node: u64) -> bool {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&node)
    }

    /// Resolves when an operation on the pages of `node` is under way.
    async fn wait_for(&self, node: u64) {
        while !self.has(node) {
            let listener = self.came.listen();
            if self.has(node) {
                return;
            }
            listener.await;
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut counts = self.users.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.node);
            }
        }
    }
}

/// Both lanes of a mount.
#[derive(Debug)]
pub(crate) struct Notifier {
    fast: Arc<Lane>,
    pages: Arc<Lane>,
    device: Arc<Device>,
    /// Whether the kernel can drop all names without taking a lock; without it names are not cached at all.
    names: AtomicBool,
    pub(crate) users: Arc<Users>,
}

impl Notifier {
    pub(crate) fn start(device: Arc<Device>) -> std::io::Result<Self> {
        Ok(Self {
            fast: Lane::start(Arc::clone(&device), "fuse-attributes")?,
            pages: Lane::start(Arc::clone(&device), "fuse-pages")?,
            device,
            names: AtomicBool::new(false),
            users: Arc::default(),
        })
    }

    /// Finds out what the kernel can do. Called once INIT is answered.
    pub(crate) fn probe(&self) {
        let can = self.device.notify(&Notice::Names).is_ok();
        self.names.store(can, Ordering::Release);
        tracing::debug!(names_cached = can, "FUSE connection is up");
    }

    /// Whether names may be cached, because they can be taken back.
    pub(crate) fn caches_names(&self) -> bool {
        self.names.load(Ordering::Acquire)
    }

    /// Takes the attributes of an inode back, and its pages, where nobody is busy with them.
    pub(crate) async fn inode(&self, node: u64, data: bool) {
        let attributes = self.fast.send(Notice::Inode { node, offset: -1, len: 0 });
        let pages = data.then(|| self.pages.send(Notice::Inode { node, offset: 0, len: 0 }));
        attributes.wait().await;
        if let Some(pages) = pages {
            let done = pages.wait();
            let busy = self.users.wait_for(node);
            futures_util::pin_mut!(done, busy);
            futures_util::future::select(done, busy).await;
        }
    }

    /// Takes every name back.
    pub(crate) async fn all_names(&self) {
        if self.caches_names() {
            self.fast.send(Notice::Names).wait().await;
        }
    }

    /// Asks the kernel to let go of an inode that nobody uses.
    pub(crate) fn prune(&self, node: u64) {
        self.pages.send(Notice::Prune { node });
    }

    pub(crate) fn close(&self) {
        self.fast.close();
        self.pages.close();
    }
}
