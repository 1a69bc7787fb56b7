//! One lock of the lock manager at a time, as futures; names and value blocks as lvmlockd has them.

use quorate_dlm::{
    Completion, ConvertRequest, Flags, Grant, LockCallbacks, LockError, LockId, LockName, LockRequest,
    Lockspace, Mode, NAME_BYTES_MAX, UnlockRequest, ValueBlock,
};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Version of the value block's layout (lvmlockd): u16 version, u16 flags, u32 sequence number, little-endian.
const VALUE_VERSION: u16 = 0x0101;

/// How a lock was not got, converted or given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LockFailure {
    /// Somebody else has it in a mode that does not go with ours.
    #[error("somebody else holds the lock")]
    Held,
    /// The lock manager withdrew it (deadlock, cancel).
    #[error("the lock manager withdrew the request")]
    Withdrawn,
    /// This life of the node is over, or the lockspace was left.
    #[error("the lockspace is stopped on this node")]
    Stopped,
    /// The name of the group is too long for a lock.
    #[error("the name has more than {limit} bytes", limit = NAME_BYTES_MAX - 2)]
    Name,
    /// The lock manager refused the request.
    #[error(transparent)]
    Refused(#[from] LockError),
}

/// The name of a lock: `V:` and the group's name, `L:` and the volume's identifier, or `G` for all.
pub(crate) fn lock_name(kind: char, name: &str) -> Result<LockName, LockFailure> {
    LockName::new(format!("{kind}:{name}").as_bytes()).map_err(|_| LockFailure::Name)
}

/// The value block of a group's lock: the sequence number of its newest metadata.
pub(crate) fn value_of(seqno: u32, bytes: usize) -> ValueBlock {
    let mut value = Vec::from(VALUE_VERSION.to_le_bytes());
    value.extend([0, 0]);
    value.extend(seqno.to_le_bytes());
    value.resize(bytes, 0);
    value
}

/// The sequence number in a value block; `None` if it says nothing.
pub(crate) fn seqno_of(grant: &Grant) -> Option<u32> {
    let value = grant.value.as_ref().filter(|_| !grant.value_invalid)?;
    let version = u16::from_le_bytes(*value.first_chunk()?);
    let seqno = u32::from_le_bytes(*value.get(4..)?.first_chunk()?);
    (version == VALUE_VERSION && 0 < seqno).then_some(seqno)
}

#[derive(Default)]
struct Slot {
    state: Mutex<(Option<Completion>, Option<Waker>)>,
}

impl LockCallbacks for Slot {
    fn completion(&self, _: LockId, completion: Completion) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = Some(completion);
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Locks of groups are held for one change only, and those of volumes as long as the user wants.
    fn blocking(&self, _: LockId, _: Mode) {}
}

/// Resolves with the completion of the operation under way.
struct Completed<'a>(&'a Slot);

impl Future for Completed<'_> {
    type Output = Completion;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Completion> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.0.take() {
            Some(completion) => Poll::Ready(completion),
            None => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// A lock that is held. One operation at a time; dropping a future of it in the middle leaves it unusable.
pub(crate) struct Lock {
    lockspace: Arc<dyn Lockspace>,
    id: LockId,
    slot: Arc<Slot>,
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lock").field(&self.id).finish()
    }
}

fn granted(completion: Completion) -> Result<Grant, LockFailure> {
    match completion {
        Completion::Granted(grant) => Ok(grant),
        Completion::Again | Completion::Recovering => Err(LockFailure::Held),
        Completion::Stopped | Completion::Unlocked => Err(LockFailure::Stopped),
        Completion::Deadlock | Completion::Cancelled | Completion::TimedOut | Completion::Held(_) => {
            Err(LockFailure::Withdrawn)
        }
    }
}

impl Lock {
    pub(crate) async fn request(
        lockspace: &Arc<dyn Lockspace>,
        name: LockName,
        mode: Mode,
        flags: Flags,
    ) -> Result<Self, LockFailure> {
        let slot = Arc::new(Slot::default());
        let callbacks: Arc<dyn LockCallbacks> = Arc::clone(&slot) as Arc<dyn LockCallbacks>;
        let id = lockspace.request(LockRequest::new(name, mode).flags(flags), callbacks)?;
        granted(Completed(&slot).await)?;
        Ok(Self { lockspace: Arc::clone(lockspace), id, slot })
    }

    pub(crate) async fn convert(
        &self,
        mode: Mode,
        flags: Flags,
        value: Option<ValueBlock>,
    ) -> Result<Grant, LockFailure> {
        self.lockspace.convert(self.id, ConvertRequest::new(mode).flags(flags).value(value))?;
        granted(Completed(&self.slot).await)
    }

    pub(crate) async fn unlock(self) -> Result<(), LockFailure> {
        self.lockspace.unlock(self.id, UnlockRequest::default())?;
        match Completed(&self.slot).await {
            Completion::Unlocked | Completion::Stopped => Ok(()),
            other => granted(other).map(|_| ()),
        }
    }
}
