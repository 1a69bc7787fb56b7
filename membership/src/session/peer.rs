//! One session: what was sent to a peer and is not acknowledged, what came from it, and the links between the two.

use super::machine::LinkId;
use crate::{Epoch, Instant, ServiceId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A message kept until the peer's service has it.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) sequence: u64,
    pub(super) bytes: Arc<[u8]>,
}

/// A message whose epoch is not installed here yet.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) epoch: Epoch,
    pub(super) service: ServiceId,
    pub(super) payload: Vec<u8>,
}

/// A connection to the peer.
#[derive(Debug)]
pub(super) struct Link {
    /// Whether the end with the lower node id made it.
    pub(super) by_lower: bool,
    /// The generation we proposed on it.
    pub(super) ours: u64,
    /// The one the peer proposed, once its first frame is here.
    pub(super) theirs: Option<u64>,
}

impl Link {
    /// The order in which both ends see the links: `None` until both have proposed.
    pub(super) fn rank(&self) -> Option<(u64, bool)> {
        self.theirs.map(|t| (t.max(self.ours), self.by_lower))
    }
}

/// Both directions of a session, as one end sees them.
#[derive(Debug)]
pub(super) struct Session {
    /// The number of the last message sent; zero if none was.
    pub(super) last_sent: u64,
    /// Invariant: consecutive numbers, the last is `last_sent`.
    pub(super) unacked: VecDeque<Sent>,
    pub(super) unacked_bytes: u64,
    /// What the peer takes. Ours until it said.
    pub(super) credit_bytes: u64,
    /// The last of our messages that the peer took in.
    pub(super) peer_received: u64,
    /// The last message taken in.
    pub(super) received: u64,
    /// Invariant: the last of the messages taken in, in order; the first one's epoch is not installed.
    pub(super) held: VecDeque<Held>,
    pub(super) held_bytes: u64,
    pub(super) ack_due: Option<Instant>,
    /// Messages taken in since the last acknowledgement.
    pub(super) unreported: u64,
    pub(super) unreported_bytes: u64,
    /// The highest generation proposed by either end.
    pub(super) generation: u64,
    pub(super) links: BTreeMap<LinkId, Link>,
    /// Invariant: of all links with a rank, the one of the highest.
    pub(super) active: Option<LinkId>,
    /// When something came, or was sent with nothing under way, on the active link.
    pub(super) heard_at: Instant,
}

impl Session {
    pub(super) fn new(credit_bytes: u64) -> Self {
        Self {
            last_sent: 0,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            credit_bytes,
            peer_received: 0,
            received: 0,
            held: VecDeque::new(),
            held_bytes: 0,
            ack_due: None,
            unreported: 0,
            unreported_bytes: 0,
            generation: 0,
            links: BTreeMap::new(),
            active: None,
            heard_at: Instant(0),
        }
    }

    /// The last message given to its service.
    pub(super) fn delivered(&self) -> u64 {
        self.received - self.held.len() as u64
    }

    /// The peer took in and delivered up to here. False: it claims what was never sent.
    pub(super) fn on_progress(&mut self, received: u64, delivered: u64) -> bool {
        if self.last_sent < received || received < delivered {
            return false;
        }
        self.peer_received = self.peer_received.max(received);
        while self.unacked.front().is_some_and(|s| s.sequence <= delivered) {
            if let Some(sent) = self.unacked.pop_front() {
                self.unacked_bytes -= sent.bytes.len() as u64;
            }
        }
        true
    }

    /// Whether something is on its way that the peer has not confirmed to have.
    pub(super) fn is_waiting(&self) -> bool {
        self.active.is_some() && self.peer_received < self.last_sent
    }

    pub(super) fn check(&self) {
        let oldest = self.unacked.front().map_or(self.last_sent + 1, |s| s.sequence);
        assert_eq!(
            self.last_sent + 1 - oldest,
            self.unacked.len() as u64,
            "unacknowledged messages have a gap"
        );
        assert!(self.held.len() as u64 <= self.received, "more is held than was taken in");
        assert!(self.active.is_none_or(|a| self.links.contains_key(&a)), "the active link is gone");
    }
}
