//! One session: what was sent to a peer and is not acknowledged, what came from it, and the links between the two.

use super::machine::LinkId;
use crate::{Epoch, Identity, Instant, ServiceId};
use core::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A message kept until the peer's service has it.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) sequence: u64,
    /// The bytes of all messages of the session's direction up to and with this one.
    pub(super) ends_at: u64,
    pub(super) bytes: Arc<[u8]>,
}

/// A message whose epoch is not installed here yet, whose service is paused, or that follows such a one.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) epoch: Epoch,
    pub(super) service: ServiceId,
    pub(super) payload: Vec<u8>,
}

/// How a link's frames travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    /// A connection of the driver.
    Direct {
        /// Over which of the paths between the two.
        path: u8,
    },
    /// A common peer passes them on (R3).
    Relay { relay: Identity, tag: u64 },
}

/// A connection to the peer.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) via: Via,
    /// Whether the end with the lower node id made it.
    pub(super) by_lower: bool,
    /// The generation we proposed on it.
    pub(super) ours: u64,
    /// The one the peer proposed, once its first frame is here.
    pub(super) theirs: Option<u64>,
    /// When it came up here.
    pub(super) since: Instant,
}

impl Link {
    /// The order in which both ends see the links: `None` until both have proposed. A direct one beats a relayed one,
    /// then the newer wins; of two that came up at once the one with the better path.
    pub(super) fn rank(&self) -> Option<(bool, u64, bool, Reverse<u8>)> {
        let path = if let Via::Direct { path } = self.via { path } else { 0 };
        self.theirs.map(|t| (self.is_direct(), t.max(self.ours), self.by_lower, Reverse(path)))
    }

    pub(super) fn is_direct(&self) -> bool {
        matches!(self.via, Via::Direct { .. })
    }
}

/// Both directions of a session, as one end sees them.
#[derive(Debug)]
pub(super) struct Session {
    /// The number of the last message sent; zero if none was.
    pub(super) last_sent: u64,
    /// The last one written on the active link.
    pub(super) transmitted: u64,
    /// Invariant: consecutive numbers, the last is `last_sent`.
    pub(super) unacked: VecDeque<Sent>,
    pub(super) unacked_bytes: u64,
    pub(super) sent_bytes: u64,
    /// What the peer takes. Ours until it said.
    pub(super) credit_bytes: u64,
    /// Somebody was told that the peer takes no more, and must be told when it does.
    pub(super) was_full: bool,
    /// The last of our messages that the peer took in.
    pub(super) peer_received: u64,
    /// The last message taken in.
    pub(super) received: u64,
    /// Invariant: the last of the messages taken in, in order; the first one waits for its epoch or its service.
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
    /// When a relay is looked for, if there is no link until then and something waits to be sent.
    pub(super) relay_at: Instant,
    /// How many relays were tried since the last active link.
    pub(super) relay_tries: u64,
}

impl Session {
    pub(super) fn new(credit_bytes: u64, relay_at: Instant) -> Self {
        Self {
            last_sent: 0,
            transmitted: 0,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            sent_bytes: 0,
            credit_bytes,
            was_full: false,
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
            relay_at,
            relay_tries: 0,
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
        self.active.is_some() && self.peer_received < self.transmitted
    }

    /// Whether messages wait for a link and none is being made.
    pub(super) fn wants_relay(&self) -> bool {
        self.links.is_empty() && self.peer_received < self.last_sent
    }

    /// The bytes of all messages up to this one, which was not delivered before the oldest kept one.
    fn end_of(&self, sequence: u64) -> u64 {
        let Some(front) = self.unacked.front() else { return self.sent_bytes };
        let index = (sequence + 1).saturating_sub(front.sequence);
        match usize::try_from(index).ok().and_then(|i| i.checked_sub(1)) {
            None => front.ends_at - front.bytes.len() as u64,
            Some(i) => self.unacked.get(i).map_or(self.sent_bytes, |s| s.ends_at),
        }
    }

    /// The next message to be written on the active link, if `window` bytes may be under way on it.
    pub(super) fn next_to_transmit(&mut self, window: u64) -> Option<Arc<[u8]>> {
        let front = self.unacked.front()?.sequence;
        let next = (self.transmitted + 1).max(front);
        let sent = self.unacked.get(usize::try_from(next - front).ok()?)?;
        let (bytes, ends_at) = (sent.bytes.clone(), sent.ends_at);
        let under_way = self.peer_received < self.transmitted;
        if under_way && window < ends_at - self.end_of(self.peer_received) {
            return None;
        }
        self.transmitted = next;
        Some(bytes)
    }

    pub(super) fn check(&self) {
        let oldest = self.unacked.front().map_or(self.last_sent + 1, |s| s.sequence);
        assert_eq!(
            self.last_sent + 1 - oldest,
            self.unacked.len() as u64,
            "unacknowledged messages have a gap"
        );
        assert!(self.transmitted <= self.last_sent, "more was transmitted than sent");
        assert!(self.held.len() as u64 <= self.received, "more is held than was taken in");
        assert!(self.active.is_none_or(|a| self.links.contains_key(&a)), "the active link is gone");
    }
}
