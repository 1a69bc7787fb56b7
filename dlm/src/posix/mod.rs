//! POSIX file locks between nodes: what `fcntl` with `F_SETLK`, `F_SETLKW` and `F_GETLK` needs, on range locks of a
//! lockspace.
//!
//! ```text
//!  fcntl ─▶ PosixLocks ─▶ Lockspace::request(POSIX)   master here: answered on the caller's thread
//!                             └─▶ master of the file's name: merge, split and change of mode in one step (R16)
//! ```
//! The rules are those of Linux: an owner's locks never stand against each other, a new lock replaces what its owner had
//! in the range, neighbours of one kind become one lock, an unlock may leave two. A request is held up by locks that
//! others *have*, not by those that others wait for; when something ends, waiters are served in the order in which they
//! came, across all nodes. So a stream of readers can keep a writer waiting, as on a local disk.
//!
//! A wait ends with the lock, with [`PosixError::Deadlock`] where the lock manager finds one, or because the caller
//! withdraws it. What a node had when it failed is free when it is fenced, write locks in a lockspace with holds when its
//! journal is replayed.

use crate::deliver::lock;
use crate::{
    Completion, Flags, Holder, LockCallbacks, LockError, LockId, LockName, LockRequest, Lockspace, Mode,
    Range,
};
use core::task::{Context, Poll, Waker};
use event_listener::Event;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex};

/// Who has locks on a node: a process, or an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Tells owners of one node apart.
    pub id: u64,
    /// The process, for `F_GETLK` and displays; 0 if unknown.
    pub pid: u32,
}

/// A kind of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shared: `F_RDLCK`.
    Read,
    /// Exclusive: `F_WRLCK`.
    Write,
    /// None: `F_UNLCK`.
    Unlock,
}

impl Kind {
    fn mode(self) -> Mode {
        match self {
            Self::Read => Mode::PR,
            Self::Write => Mode::EX,
            Self::Unlock => Mode::NL,
        }
    }
}

/// Why there is no lock. What the owner had is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PosixError {
    /// Another owner has a lock in the range.
    #[error("another owner has a lock in the range")]
    WouldBlock,
    /// The wait was withdrawn.
    #[error("the wait for the lock was withdrawn")]
    Withdrawn,
    /// Waiting would never end.
    #[error("waiting for the lock would be a deadlock")]
    Deadlock,
    /// The lockspace was stopped.
    #[error("the lockspace is stopped on this node")]
    Stopped,
    /// A range that ends before it starts.
    #[error("invalid request: {0}")]
    Invalid(&'static str),
}

impl From<LockError> for PosixError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Invalid(why) => Self::Invalid(why),
            _ => Self::Stopped,
        }
    }
}

/// Ends a wait from outside. Cloning shares it.
///
/// Other than dropping the future of a wait, it leaves no doubt: the future resolves to the lock, if that came first, or
/// to [`PosixError::Withdrawn`], and then nothing has changed.
#[derive(Clone, Debug, Default)]
pub struct Withdraw(Arc<(std::sync::atomic::AtomicBool, Event)>);

impl Withdraw {
    /// Ends the wait.
    pub fn raise(&self) {
        self.0.0.store(true, std::sync::atomic::Ordering::SeqCst);
        self.0.1.notify(usize::MAX);
    }

    fn is_raised(&self) -> bool {
        self.0.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// How long to wait for a lock.
#[derive(Clone, Debug)]
pub enum Wait {
    /// Not at all: `F_SETLK`.
    No,
    /// Until it is granted, or somebody raises this: `F_SETLKW`.
    Until(Withdraw),
}

/// One answer, waited for by one task.
#[derive(Debug, Default)]
struct Answer(Mutex<(Option<Completion>, Option<Waker>)>);

impl LockCallbacks for Answer {
    fn completion(&self, _id: LockId, completion: Completion) {
        let mut state = lock(&self.0);
        state.0 = Some(completion);
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
    fn blocking(&self, _id: LockId, _mode: Mode) {}
}

impl Answer {
    fn poll(&self, cx: &Context<'_>) -> Poll<Completion> {
        let mut state = lock(&self.0);
        if let Some(completion) = state.0.take() {
            return Poll::Ready(completion);
        }
        state.1 = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// A request under way; dropped, it is withdrawn.
struct Underway<'a> {
    space: &'a dyn Lockspace,
    id: LockId,
    answer: Arc<Answer>,
    is_over: bool,
}

impl Underway<'_> {
    async fn answered(&mut self) -> Completion {
        let completion = core::future::poll_fn(|cx| self.answer.poll(cx)).await;
        self.is_over = true;
        completion
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // It may be granted already: then its owner has it, until it is closed.
            let _ = self.space.cancel(self.id);
        }
    }
}

/// Owners that may have locks: a close by anybody else costs nothing.
#[derive(Debug, Default)]
struct Owners {
    /// The lock manager's numbers for them, with the process in the low half, and on how many files they may have some.
    numbers: BTreeMap<u64, (u64, usize)>,
    files: BTreeSet<(LockName, u64)>,
    count: u32,
}

impl Owners {
    /// The number of an owner that asks for a lock.
    fn number(&mut self, owner: Owner) -> u64 {
        if let Some((number, _)) = self.numbers.get(&owner.id) {
            return *number;
        }
        // From 1: number 0 would be nobody.
        self.count = self.count.wrapping_add(1).max(1);
        u64::from(self.count) << 32 | u64::from(owner.pid)
    }

    fn enter(&mut self, name: &LockName, id: u64, number: u64) {
        let entry = self.numbers.entry(id).or_insert((number, 0));
        if self.files.insert((name.clone(), id)) {
            entry.1 += 1;
        }
    }

    fn leave(&mut self, name: &LockName, id: u64) -> Option<u64> {
        if !self.files.remove(&(name.clone(), id)) {
            return None;
        }
        let (number, files) = self.numbers.get_mut(&id)?;
        let number = *number;
        *files -= 1;
        if *files == 0 {
            self.numbers.remove(&id);
        }
        Some(number)
    }
}

/// The POSIX locks of this node in one lockspace.
pub struct PosixLocks {
    space: Arc<dyn Lockspace>,
    owners: Mutex<Owners>,
}

impl core::fmt::Debug for PosixLocks {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PosixLocks").field("space", &self.space.name()).finish_non_exhaustive()
    }
}

impl PosixLocks {
    /// On a lockspace; files are named by resources that nobody uses for anything else.
    #[must_use]
    pub fn new(space: Arc<dyn Lockspace>) -> Self {
        Self { space, owners: Mutex::default() }
    }

    fn start(
        &self,
        name: &LockName,
        owner: u64,
        (mode, range): (Mode, Range),
        flags: Flags,
    ) -> Result<Underway<'_>, PosixError> {
        let request =
            LockRequest { range, owner, ..LockRequest::new(name.clone(), mode).flags(flags | Flags::POSIX) };
        let answer = Arc::new(Answer::default());
        let id = self.space.request(request, answer.clone())?;
        Ok(Underway { space: &*self.space, id, answer, is_over: false })
    }

    /// Takes, changes or ends locks of `owner` on the file `name`.
    ///
    /// Dropping the future withdraws the request. If the grant was under way, the owner has the lock all the same:
    /// [`Self::close`] it, or use [`Withdraw`].
    ///
    /// # Errors
    /// See [`PosixError`]; an unlock fails only with `Stopped` or `Invalid`.
    pub async fn set(
        &self,
        name: &LockName,
        owner: Owner,
        (kind, range): (Kind, Range),
        wait: &Wait,
    ) -> Result<(), PosixError> {
        let number = {
            let mut owners = lock(&self.owners);
            let number = owners.number(owner);
            if kind != Kind::Unlock {
                // Before it is asked for: a close may come before the answer.
                owners.enter(name, owner.id, number);
            } else if !owners.files.contains(&(name.clone(), owner.id)) {
                return Ok(());
            }
            number
        };
        let flags = if matches!(wait, Wait::No) { Flags::NOQUEUE } else { Flags::NONE };
        let mut underway = self.start(name, number, (kind.mode(), range), flags)?;
        let completion = match wait {
            Wait::Until(withdraw) => answered_or_withdrawn(&mut underway, withdraw).await,
            Wait::No => underway.answered().await,
        };
        match completion {
            Completion::Granted(_) => {
                if kind != Kind::Unlock {
                    // Another thread may have closed the file meanwhile, which ended what there was until then.
                    lock(&self.owners).enter(name, owner.id, number);
                }
                Ok(())
            }
            Completion::Again | Completion::Recovering => Err(PosixError::WouldBlock),
            Completion::Deadlock => Err(PosixError::Deadlock),
            Completion::Stopped => Err(PosixError::Stopped),
            _ => Err(PosixError::Withdrawn),
        }
    }

    /// The lock that stands against `kind` on `range`, if any: the one that begins first. Dropping the future has no effect.
    ///
    /// # Errors
    /// `Stopped` or `Invalid`.
    pub async fn test(
        &self,
        name: &LockName,
        owner: Owner,
        (kind, range): (Kind, Range),
    ) -> Result<Option<Holder>, PosixError> {
        let number = lock(&self.owners).number(owner);
        let mut underway = self.start(name, number, (kind.mode(), range), Flags::TEST | Flags::NOQUEUE)?;
        match underway.answered().await {
            Completion::Held(holder) => Ok(Some(holder)),
            Completion::Granted(_) => Ok(None),
            _ => Err(PosixError::Stopped),
        }
    }

    /// Whether a holder is not on this node.
    #[must_use]
    pub fn is_elsewhere(&self, holder: &Holder) -> bool {
        self.space.me() != Some(holder.node)
    }

    /// Ends all locks of an owner on a file: it closed a descriptor of it. Costs nothing if it has none. Dropping the
    /// future does not stop it.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn close(&self, name: &LockName, owner: u64) -> Result<(), PosixError> {
        let Some(number) = lock(&self.owners).leave(name, owner) else { return Ok(()) };
        let mut underway = self.start(name, number, (Mode::NL, Range::ALL), Flags::NONE)?;
        // The master carries it out at once, there is nothing to withdraw.
        underway.is_over = true;
        match underway.answered().await {
            Completion::Granted(_) => Ok(()),
            _ => Err(PosixError::Stopped),
        }
    }

    /// Ends all locks of all owners of this node, before it leaves the lockspace.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn close_all(&self) -> Result<(), PosixError> {
        loop {
            let next = lock(&self.owners).files.first().cloned();
            let Some((name, owner)) = next else { return Ok(()) };
            self.close(&name, owner).await?;
        }
    }
}

/// Waits for the answer; once withdrawn, for what the withdrawal leads to.
async fn answered_or_withdrawn(underway: &mut Underway<'_>, withdraw: &Withdraw) -> Completion {
    let (space, id) = (underway.space, underway.id);
    let mut answered = core::pin::pin!(underway.answered());
    loop {
        let raised = withdraw.0.1.listen();
        if withdraw.is_raised() {
            let _ = space.cancel(id);
            return answered.await;
        }
        let mut raised = core::pin::pin!(raised);
        let first = core::future::poll_fn(|cx| match answered.as_mut().poll(cx) {
            Poll::Ready(completion) => Poll::Ready(Some(completion)),
            Poll::Pending => raised.as_mut().poll(cx).map(|()| None),
        });
        if let Some(completion) = first.await {
            return completion;
        }
    }
}
