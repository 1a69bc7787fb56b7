//! The client's queue: what is sent when, what is kept until it is durable, and what is sent again (R10 to R12).
//!
//! ```text
//!   Down ──Connected──▶ Resending ──all answered──▶ Running ──Lost──▶ Down
//!     │   same verifier: at once ─────────────────▶   │  ▲
//!     │            new verifier in a flush; a flush fails without one
//!   Refused ──▶ Ended, for ever                       ▼  │
//!                                                Draining ──nothing under way──▶ Resending
//! ```
//!
//! Writes that overlap are sent one after the other, so that "later" has a meaning when they are sent again.

use super::retained::{Content, Retained};
use crate::proto::{Errno, Verifier};
use crate::{Buf, IoError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Operations of one device on the wire at one time.
pub const WINDOW_OPERATIONS_MAX: usize = 256;
/// Bytes of writes and reads of one device on the wire at one time, one operation excepted.
pub const WINDOW_BYTES_MAX: u64 = 48 << 20;
/// Retained bytes at which the queue flushes by itself.
pub const RETAINED_BYTES_FLUSH: u64 = 32 << 20;
/// Retained bytes, with those under way, at which writes wait for that flush.
pub const RETAINED_BYTES_MAX: u64 = 128 << 20;
const _: () = assert!(
    RETAINED_BYTES_FLUSH + WINDOW_BYTES_MAX < RETAINED_BYTES_MAX,
    "a flush is under way before writes wait"
);
/// A flush that fails so often, everything written again each time, is reported to its caller.
pub const FLUSH_ATTEMPTS_MAX: u32 = 3;

/// An operation of the user, numbered by the caller in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// What goes over the wire once: the cookie of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// An operation. Ranges were checked against the device.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Read.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<Buf>,
        /// Answer when durable.
        fua: bool,
    },
    /// Zeros.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// Answer when durable.
        fua: bool,
        /// Leave the range allocated.
        no_hole: bool,
    },
    /// Forget.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make what was answered durable.
    Flush,
}

/// What is sent: an operation, or a part of what is sent again.
#[derive(Clone, Debug)]
pub enum Command {
    /// Read.
    Read {
        /// For which operation.
        op: OpId,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Write `len` bytes of the buffer from `from` on.
    Write {
        /// Where.
        offset: u64,
        /// The buffer.
        data: Arc<Buf>,
        /// Where in it.
        from: usize,
        /// How many bytes.
        len: u64,
        /// Answer when durable.
        fua: bool,
    },
    /// Zeros.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// Answer when durable.
        fua: bool,
        /// Leave the range allocated.
        no_hole: bool,
    },
    /// Forget.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make what was answered durable.
    Flush,
}

/// What happens to the queue.
#[derive(Clone, Debug)]
pub enum Input {
    /// The user wants something.
    Submit(OpId, Operation),
    /// A new generation of connections is up; nothing of older ones is or ever will be under way at the server (R11).
    Connected {
        /// The export's verifier; nothing if the server has none: then everything volatile counts as lost.
        verifier: Option<Verifier>,
    },
    /// The generation is over: all its connections are closed here.
    Lost,
    /// The server has answered.
    Reply {
        /// What.
        tag: Tag,
        /// How.
        result: Result<(), Errno>,
        /// The verifier in the answer to a flush.
        verifier: Option<Verifier>,
    },
    /// This life may not use the device any more (R10), or the device was shut down.
    End(IoError),
    /// The user no longer holds what allowed it to write this range: nothing of it is sent again (R12).
    Revoke {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

/// What the driver does, in this order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send it on any connection of the generation.
    Send(Tag, Command),
    /// Answer the user.
    Complete(OpId, Result<(), IoError>),
    /// Close all connections and open the next generation.
    Reconnect,
}

/// Deliberate mistakes, by which the simulation shows that its checks catch them.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueBug {
    /// A later write does not replace the retained earlier one.
    NoSupersede,
    /// A flush under another verifier counts.
    AnyVerifier,
    /// A flush covers writes that were acknowledged after it was sent.
    CoverLater,
    /// New operations do not wait for what is sent again.
    NoWaitForResend,
    /// Nothing is retained.
    RetainNothing,
    /// What was revoked is sent again.
    IgnoreRevoke,
    /// A resend that was cut off by a lost connection counts as done.
    TrustInterrupted,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Down,
    /// What was not durable may be lost, under this verifier from now on; what is under way is awaited first.
    Draining(Option<Verifier>),
    /// So many answers are awaited.
    Resending(usize),
    Running,
    Ended(IoError),
}

#[derive(Debug)]
struct Op {
    operation: Operation,
    sent: bool,
    revoked: bool,
    attempts: u32,
}

#[derive(Debug)]
enum Sent {
    Op(OpId),
    /// A flush of the queue's own, or of a user; with the newest acknowledgement it covers.
    Flush(Option<OpId>, u64),
    Again,
}

/// The machine.
#[derive(Debug)]
pub struct ClientQueue {
    phase: Phase,
    verifier: Option<Verifier>,
    ops: BTreeMap<OpId, Op>,
    /// Those not sent. Invariant: exactly the ops with `sent == false`.
    unsent: BTreeSet<OpId>,
    /// Ranges of operations that change the device and are not answered.
    changes: BTreeMap<OpId, (u64, u64)>,
    wire: BTreeMap<Tag, Sent>,
    wire_bytes: u64,
    tags: u64,
    acknowledged: u64,
    retained: Retained,
    own_flush: bool,
    own_failures: u32,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<QueueBug>,
}

impl Default for ClientQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl Operation {
    /// The range it changes.
    fn change(&self) -> Option<(u64, u64)> {
        match self {
            Self::Write { offset, data, .. } => Some((*offset, offset + data.len() as u64)),
            Self::WriteZeroes { offset, len, .. } | Self::Discard { offset, len } => {
                Some((*offset, offset + len))
            }
            Self::Read { .. } | Self::Flush => None,
        }
    }

    fn wire_bytes(&self) -> u64 {
        match self {
            Self::Write { data, .. } => data.len() as u64,
            Self::Read { len, .. } => *len,
            Self::WriteZeroes { .. } | Self::Discard { .. } | Self::Flush => 0,
        }
    }
}

fn meet(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.1 && b.0 < a.1
}

impl ClientQueue {
    /// A queue without a connection.
    #[must_use]
    pub fn new() -> Self {
        Self {
            phase: Phase::Down,
            verifier: None,
            ops: BTreeMap::new(),
            unsent: BTreeSet::new(),
            changes: BTreeMap::new(),
            wire: BTreeMap::new(),
            wire_bytes: 0,
            tags: 0,
            acknowledged: 0,
            retained: Retained::default(),
            own_flush: false,
            own_failures: 0,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        }
    }

    /// Plants a mistake.
    #[cfg(any(test, feature = "sim"))]
    pub fn plant(&mut self, bug: Option<QueueBug>) {
        self.bug = bug;
    }

    #[cfg(any(test, feature = "sim"))]
    fn has(&self, bug: QueueBug) -> bool {
        self.bug == Some(bug)
    }

    /// Whether every answered write is known to be durable.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.retained.is_empty()
    }

    /// Whether it is over for good.
    #[must_use]
    pub fn ended(&self) -> Option<&IoError> {
        match &self.phase {
            Phase::Ended(e) => Some(e),
            _ => None,
        }
    }

    /// The user's operations that are not answered.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.ops.len()
    }

    /// Takes an input; everything to do is in `out` afterwards.
    pub fn handle(&mut self, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Submit(id, operation) => self.on_submit(id, operation, out),
            Input::Connected { verifier } => self.on_connected(verifier, out),
            Input::Lost => self.on_lost(out),
            Input::Reply { tag, result, verifier } => self.on_reply(tag, result, verifier, out),
            Input::End(error) => self.end(error, out),
            Input::Revoke { offset, len } => self.on_revoke(offset, len, out),
        }
        self.pump(out);
        self.check();
    }

    fn on_submit(&mut self, id: OpId, operation: Operation, out: &mut Vec<Output>) {
        if let Phase::Ended(e) = &self.phase {
            return out.push(Output::Complete(id, Err(e.clone())));
        }
        if let Some(range) = operation.change() {
            self.changes.insert(id, range);
        }
        let op = Op { operation, sent: false, revoked: false, attempts: 0 };
        let before = self.ops.insert(id, op);
        assert!(before.is_none(), "operations have numbers of their own");
        self.unsent.insert(id);
    }

    fn on_connected(&mut self, verifier: Option<Verifier>, out: &mut Vec<Output>) {
        if self.ended().is_some() {
            return;
        }
        assert_eq!(self.phase, Phase::Down, "a generation begins after the last was lost");
        if verifier.is_some() && verifier == self.verifier {
            self.phase = Phase::Running;
        } else {
            self.verifier = verifier;
            self.resend(out);
        }
    }

    fn on_lost(&mut self, out: &mut Vec<Output>) {
        if self.ended().is_some() {
            return;
        }
        // What was being sent again may not have arrived, all or in part: the verifier it was sent under proves nothing.
        // (Found by the simulation: the same server came back between the two losses.)
        let interrupted = matches!(self.phase, Phase::Resending(_));
        #[cfg(any(test, feature = "sim"))]
        let interrupted = interrupted && !self.has(QueueBug::TrustInterrupted);
        if interrupted {
            self.verifier = None;
        }
        self.phase = Phase::Down;
        self.wire.clear();
        self.wire_bytes = 0;
        self.own_flush = false;
        let revoked: Vec<OpId> = self.ops.iter().filter(|(_, op)| op.revoked).map(|(id, _)| *id).collect();
        for id in revoked {
            self.complete(id, Err(revoked_error()), out);
        }
        for (id, op) in &mut self.ops {
            op.sent = false;
            self.unsent.insert(*id);
        }
    }

    fn on_revoke(&mut self, offset: u64, len: u64, out: &mut Vec<Output>) {
        #[cfg(any(test, feature = "sim"))]
        if self.has(QueueBug::IgnoreRevoke) {
            return;
        }
        let range = (offset, offset.saturating_add(len));
        self.retained.remove(range.0, range.1);
        let mut unsent = Vec::new();
        for (id, _) in self.changes.iter().filter(|(_, r)| meet(**r, range)) {
            let op = self.ops.get_mut(id).expect("every change is of an operation");
            op.revoked = true;
            if !op.sent {
                unsent.push(*id);
            }
        }
        for id in unsent {
            self.complete(id, Err(revoked_error()), out);
        }
    }

    fn on_reply(
        &mut self,
        tag: Tag,
        result: Result<(), Errno>,
        verifier: Option<Verifier>,
        out: &mut Vec<Output>,
    ) {
        // An answer nobody waits for belongs to a generation that is over.
        let Some(sent) = self.wire.remove(&tag) else { return };
        if result == Err(Errno::Shutdown) {
            // The server is going away, or has shut this connection; nothing was done.
            out.push(Output::Reconnect);
            return self.on_lost(out);
        }
        match sent {
            Sent::Again => self.on_again(result, out),
            Sent::Flush(id, covers) => self.on_flushed(id, covers, result, verifier, out),
            Sent::Op(id) => {
                let Some(op) = self.ops.get(&id) else { return };
                self.wire_bytes -= op.operation.wire_bytes();
                if result.is_ok() {
                    self.acknowledge(id);
                }
                let result = result.map_err(|e| to_io_error(e, self.ops.get(&id)));
                self.complete(id, result, out);
            }
        }
    }

    /// A write of some kind was answered: from now on it is owed to the user until it is durable.
    fn acknowledge(&mut self, id: OpId) {
        let (Some(op), Some((start, end))) = (self.ops.get(&id), self.changes.get(&id)) else { return };
        self.acknowledged += 1;
        #[cfg(any(test, feature = "sim"))]
        match self.bug {
            Some(QueueBug::RetainNothing) => return,
            Some(QueueBug::NoSupersede)
                if self.retained.iter().any(|(at, p)| meet((at, p.end), (*start, *end))) =>
            {
                return;
            }
            _ => {}
        }
        let content = match &op.operation {
            Operation::Write { data, fua: false, .. } => Content::Data(Arc::clone(data), 0),
            Operation::WriteZeroes { fua: false, no_hole, .. } => Content::Zeroes { no_hole: *no_hole },
            // Durable already, or worth nothing: but what was there before must not come back.
            _ => return self.retained.remove(*start, *end),
        };
        if op.revoked {
            return self.retained.remove(*start, *end);
        }
        self.retained.insert(*start, *end, content, self.acknowledged);
    }

    fn on_again(&mut self, result: Result<(), Errno>, out: &mut Vec<Output>) {
        let Phase::Resending(left) = &mut self.phase else {
            unreachable!("what is sent again is awaited before anything else");
        };
        *left -= 1;
        let over = *left == 0;
        if let Err(e) = result {
            // Acknowledged bytes cannot be written any more: going on would show the user older ones.
            let detail = format!("acknowledged writes were lost and cannot be written again: {e}");
            return self.end(IoError::Failed { offset: 0, detail }, out);
        }
        if over {
            self.phase = Phase::Running;
        }
    }

    fn on_flushed(
        &mut self,
        id: Option<OpId>,
        covers: u64,
        result: Result<(), Errno>,
        verifier: Option<Verifier>,
        out: &mut Vec<Output>,
    ) {
        if id.is_none() {
            self.own_flush = false;
        }
        let may_be_lost = match verifier {
            Some(_) => verifier != self.verifier,
            // A server without verifiers says no more than this: a kernel forgets what it could not write, and the next
            // flush succeeds.
            None => result.is_err(),
        };
        #[cfg(any(test, feature = "sim"))]
        let may_be_lost = may_be_lost && !self.has(QueueBug::AnyVerifier);
        let attempts = id.and_then(|id| self.ops.get_mut(&id)).map_or(0, |op| {
            op.attempts += 1;
            op.attempts
        });
        if may_be_lost {
            if self.phase == Phase::Running {
                self.phase = Phase::Draining(verifier);
            }
            if let Some(id) = id {
                if result.is_err() && FLUSH_ATTEMPTS_MAX <= attempts {
                    return self.complete(id, result.map_err(|e| to_io_error(e, None)), out);
                }
                // Again, after what it should have made durable was written again.
                if let Some(op) = self.ops.get_mut(&id) {
                    op.sent = false;
                    self.unsent.insert(id);
                }
            }
            return self.count_own(id, result, out);
        }
        if result.is_ok() {
            self.retained.remove_acknowledged(covers);
        }
        match id {
            Some(id) => self.complete(id, result.map_err(|e| to_io_error(e, None)), out),
            None => self.count_own(id, result, out),
        }
    }

    /// A device that cannot flush takes no more writes than may be retained; if it never can, that is the end.
    fn count_own(&mut self, id: Option<OpId>, result: Result<(), Errno>, out: &mut Vec<Output>) {
        if id.is_some() {
            return;
        }
        self.own_failures = if result.is_ok() { 0 } else { self.own_failures + 1 };
        if let Err(e) = result
            && FLUSH_ATTEMPTS_MAX <= self.own_failures
        {
            let detail = format!("the device cannot make writes durable: {e}");
            self.end(IoError::Failed { offset: 0, detail }, out);
        }
    }

    fn complete(&mut self, id: OpId, result: Result<(), IoError>, out: &mut Vec<Output>) {
        if self.ops.remove(&id).is_some() {
            self.unsent.remove(&id);
            self.changes.remove(&id);
            out.push(Output::Complete(id, result));
        }
    }

    fn end(&mut self, error: IoError, out: &mut Vec<Output>) {
        if self.ended().is_some() {
            return;
        }
        let all: Vec<OpId> = self.ops.keys().copied().collect();
        for id in all {
            self.complete(id, Err(error.clone()), out);
        }
        self.wire.clear();
        self.wire_bytes = 0;
        self.retained.clear();
        self.phase = Phase::Ended(error);
    }

    fn send(&mut self, sent: Sent, command: Command, out: &mut Vec<Output>) {
        self.tags += 1;
        let tag = Tag(self.tags);
        self.wire.insert(tag, sent);
        out.push(Output::Send(tag, command));
    }

    /// Writes everything retained again. The pieces do not overlap, so their order among each other is free.
    fn resend(&mut self, out: &mut Vec<Output>) {
        let pieces: Vec<Command> = self
            .retained
            .iter()
            .map(|(start, piece)| {
                let len = piece.end - start;
                match &piece.content {
                    Content::Data(data, from) => {
                        Command::Write { offset: start, data: Arc::clone(data), from: *from, len, fua: false }
                    }
                    Content::Zeroes { no_hole } => {
                        Command::WriteZeroes { offset: start, len, fua: false, no_hole: *no_hole }
                    }
                }
            })
            .collect();
        self.phase = if pieces.is_empty() { Phase::Running } else { Phase::Resending(pieces.len()) };
        for command in pieces {
            self.send(Sent::Again, command, out);
        }
    }

    /// Sends what may be sent now.
    fn pump(&mut self, out: &mut Vec<Output>) {
        if let Phase::Draining(new) = self.phase
            && self.wire.is_empty()
        {
            self.verifier = new;
            self.resend(out);
        }
        let open = self.phase == Phase::Running;
        #[cfg(any(test, feature = "sim"))]
        let open = open || (self.has(QueueBug::NoWaitForResend) && matches!(self.phase, Phase::Resending(_)));
        if !open {
            return;
        }
        if RETAINED_BYTES_FLUSH <= self.retained.cost() && !self.own_flush {
            self.own_flush = true;
            self.send(Sent::Flush(None, self.acknowledged), Command::Flush, out);
        }
        let waiting: Vec<OpId> = self.unsent.iter().copied().collect();
        for id in waiting {
            if WINDOW_OPERATIONS_MAX <= self.wire.len() {
                break;
            }
            if self.may_send(id) {
                self.send_op(id, out);
            }
        }
    }

    fn may_send(&self, id: OpId) -> bool {
        let Some(op) = self.ops.get(&id) else { return false };
        let bytes = op.operation.wire_bytes();
        if 0 < self.wire_bytes && WINDOW_BYTES_MAX < self.wire_bytes + bytes {
            return false;
        }
        let Some(range) = self.changes.get(&id) else { return true };
        if RETAINED_BYTES_MAX < self.retained.cost() + self.wire_bytes + bytes {
            return false;
        }
        !self.changes.range(..id).any(|(_, earlier)| meet(*earlier, *range))
    }

    fn send_op(&mut self, id: OpId, out: &mut Vec<Output>) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        op.sent = true;
        self.wire_bytes += op.operation.wire_bytes();
        let command = match &op.operation {
            Operation::Read { offset, len } => Command::Read { op: id, offset: *offset, len: *len },
            Operation::Write { offset, data, fua } => Command::Write {
                offset: *offset,
                data: Arc::clone(data),
                from: 0,
                len: data.len() as u64,
                fua: *fua,
            },
            Operation::WriteZeroes { offset, len, fua, no_hole } => {
                Command::WriteZeroes { offset: *offset, len: *len, fua: *fua, no_hole: *no_hole }
            }
            Operation::Discard { offset, len } => Command::Discard { offset: *offset, len: *len },
            Operation::Flush => Command::Flush,
        };
        self.unsent.remove(&id);
        let sent = match command {
            Command::Flush => {
                let covers = self.acknowledged;
                #[cfg(any(test, feature = "sim"))]
                let covers = if self.has(QueueBug::CoverLater) { u64::MAX } else { covers };
                Sent::Flush(Some(id), covers)
            }
            _ => Sent::Op(id),
        };
        self.send(sent, command, out);
    }

    fn check(&self) {
        #[cfg(any(test, feature = "sim"))]
        if self.bug.is_some() {
            return;
        }
        if self.phase == Phase::Down {
            assert!(self.wire.is_empty(), "nothing is on the wire without a connection");
        }
        if let Phase::Resending(left) = self.phase {
            assert_eq!(left, self.wire.len(), "nothing new is sent before what is sent again is answered");
        }
        debug_assert!(
            self.ops.iter().all(|(id, op)| op.sent != self.unsent.contains(id)),
            "an operation is either sent or not"
        );
    }
}

fn revoked_error() -> IoError {
    IoError::Failed { offset: 0, detail: "the right to write this range was given up".into() }
}

fn to_io_error(e: Errno, op: Option<&Op>) -> IoError {
    let offset = match op.map(|o| &o.operation) {
        Some(Operation::Read { offset, .. }) => *offset,
        Some(other) => other.change().map_or(0, |(start, _)| start),
        None => 0,
    };
    match e {
        Errno::NoSpc => IoError::NoSpace,
        Errno::Perm => IoError::ReadOnly,
        e => IoError::Failed { offset, detail: format!("the server says: {e}") },
    }
}

#[cfg(test)]
mod tests;
