//! Requests that wait: who they are, and what an interrupt does to them.
//!
//! The kernel interrupts a request when its process gets a signal, any signal, and only once. A wait for a file lock
//! ends then with EINTR, as POSIX wants it. Everything else behaves as on a local disk and ends only for a process that
//! is being killed: that is looked up in `/proc`, again and again if the first signal was not the deadly one. The answer
//! EINTR lets the process go (until then nothing can kill it). What only reads is dropped; what changes something, or
//! takes something, is not left half done: it goes on without its caller, and what it took is given back.

use super::codec::{Header, Op, Reply, Unique};
use super::done::Done;
use super::session::Shared;
use crate::face::{Handle, Ino, Withdraw};
use core::time::Duration;
use futures_util::future::{Either, select};
use quorate_membership::BoxFuture;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How often a process that got a signal is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The answer to a request, with what has to be given back if nobody takes it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    /// Lookups the reply counts.
    pub(crate) looked_up: Vec<Ino>,
    /// What it opened.
    pub(crate) opened: Option<(Ino, Handle, OpenKind)>,
}

/// What an opened handle belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenKind {
    File,
    Directory,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, looked_up: Vec::new(), opened: None }
    }
}

/// An answer to come.
pub(crate) type Pending = BoxFuture<'static, Answer>;

/// What an interrupt does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnInterrupt {
    /// Any signal ends it.
    End,
    /// A deadly signal ends it.
    EndIfKilled,
    /// A deadly signal sends the caller away, the operation goes on.
    LeaveIfKilled,
}

/// What is remembered of a request while it waits.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) unique: Unique,
    pid: u32,
    on_interrupt: OnInterrupt,
    /// Raised by an interrupt; the operation itself says then how it ended.
    pub(crate) withdraw: Option<Withdraw>,
}

impl Request {
    pub(crate) fn new(header: &Header, op: &Op<'_>) -> Self {
        let on_interrupt = match op {
            Op::Setlk { wait: true, lock } if lock.flock => OnInterrupt::End,
            // Not simply dropped: a lock that was granted just then must not stay unknown to its owner.
            Op::Setlk { wait: true, .. } => OnInterrupt::EndIfKilled,
            Op::Getattr { .. }
            | Op::Readlink
            | Op::Read { .. }
            | Op::Statfs
            | Op::Getxattr { .. }
            | Op::Listxattr { .. }
            | Op::Getlk(_)
            | Op::Lseek { .. }
            | Op::Readdir { plus: false, .. } => OnInterrupt::EndIfKilled,
            _ => OnInterrupt::LeaveIfKilled,
        };
        let is_posix_wait = matches!(op, Op::Setlk { wait: true, lock } if !lock.flock);
        let withdraw = is_posix_wait.then(Withdraw::default);
        Self { unique: header.unique, pid: header.pid, on_interrupt, withdraw }
    }
}

/// Requests that wait, by number.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    waiting: Mutex<BTreeMap<Unique, Arc<Done>>>,
    ended: AtomicBool,
}

impl Requests {
    pub(crate) fn len(&self) -> usize {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Remembers a request; what is returned is raised by an interrupt.
    pub(crate) fn register(&self, unique: Unique) -> Arc<Done> {
        let done = Arc::new(Done::default());
        let before =
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(unique, Arc::clone(&done));
        assert!(before.is_none(), "the kernel never uses the number of an unanswered request again");
        done
    }

    fn remove(&self, unique: Unique) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&unique);
    }

    /// The mount is gone: nobody waits for any answer.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        for done in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).values() {
            done.raise();
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Whether there was such a request.
    pub(crate) fn interrupt(&self, unique: Unique) -> bool {
        match self.waiting.lock().unwrap_or_else(PoisonError::into_inner).get(&unique) {
            Some(done) => {
                done.raise();
                true
            }
            None => false,
        }
    }
}

/// A request nobody has answered yet. Dropped, it is answered EIO, so that no process waits for a task that is gone.
struct Unanswered {
    shared: Arc<Shared>,
    unique: Unique,
    open: bool,
}

impl Unanswered {
    /// Takes the request out: it is answered now. Before the reply is written, since its number is free after that.
    fn close(&mut self) {
        self.open = false;
        self.shared.requests.remove(self.unique);
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if self.open {
            self.close();
            self.shared.reply(self.unique, &Reply::Error(Errno::IO));
        }
    }
}

/// Waits for an answer, and for an interrupt.
pub(crate) async fn wait(shared: Arc<Shared>, request: Request, mut future: Pending, interrupted: Arc<Done>) {
    let mut unanswered = Unanswered { shared: Arc::clone(&shared), unique: request.unique, open: true };
    let interrupt = interrupted.wait();
    futures_util::pin_mut!(interrupt);
    let mut answer = match select(&mut future, interrupt).await {
        Either::Left((answer, _)) => Some(answer),
        Either::Right(_) => None,
    };
    if let (None, Some(withdraw)) = (&answer, &request.withdraw) {
        withdraw.raise();
    }
    while answer.is_none() {
        let ended = shared.requests.has_ended();
        if ended || request.on_interrupt == OnInterrupt::End || is_being_killed(request.pid) {
            unanswered.close();
            shared.reply(request.unique, &Reply::Error(Errno::INTR));
            if request.on_interrupt == OnInterrupt::LeaveIfKilled {
                let late = future.await;
                shared.undo(late);
            }
            return;
        }
        let again = shared.runtime.sleep_until(shared.runtime.now() + LOOK_AGAIN);
        if let Either::Left((a, _)) = select(&mut future, again).await {
            answer = Some(a);
        }
    }
    unanswered.close();
    if let Some(answer) = answer {
        shared.answer(&request, answer);
    }
}

/// Whether a thread has SIGKILL pending: so does every thread of a process that a deadly signal has hit.
fn is_being_killed(pid: u32) -> bool {
    // In another process namespace: it cannot be looked at, and must not become unkillable.
    if pid == 0 {
        return true;
    }
    match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => has_sigkill(&status),
        Err(_) => true,
    }
}

fn has_sigkill(status: &str) -> bool {
    const SIGKILL: u32 = 9;
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & 1 << (SIGKILL - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_sigkill_is_told_from_other_signals() {
        assert!(has_sigkill("Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(has_sigkill("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000101\n"));
        assert!(!has_sigkill("SigPnd:\t0000000000004000\nShdPnd:\t0000000000002000\n"));
        assert!(!is_being_killed(std::process::id()));
    }
}
