//! The session machine: all sessions of one life of one node.

use super::frame::{self, Header, MESSAGE_BYTES_MAX};
use super::peer::{Held, Sent, Session};
use crate::{Epoch, Identity, Incarnation, Instant, NodeId, SendError, ServiceId, View};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How long an acknowledgement may wait for a message to travel with.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(10);
/// A link on which nothing comes for this long although we wait for it is given up; the driver makes another, and a
/// relay is looked for meanwhile. Above any pause that a loaded machine makes, below the time after which R3 removes.
pub(super) const LINK_STALL: Duration = Duration::from_millis(1_500);

/// A connection, as the driver numbers them: never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// Credit: what one peer may have under way towards us, not yet given to its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, frames' headers included. At least one message of the largest size.
    pub credit_bytes: u64,
    /// Messages.
    pub credit_messages: usize,
    /// How many bytes may be under way on a relayed link before the peer says that it has them, at least one message:
    /// what a relay has to keep for one pair and direction.
    pub relay_window_bytes: u64,
}

impl Limits {
    /// 8 MiB and 65,536 messages per peer: 64 peers cannot take more than 512 MiB.
    #[must_use]
    pub fn standard() -> Self {
        Self { credit_bytes: 8 << 20, credit_messages: 65_536, relay_window_bytes: 256 << 10 }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    /// A connection to `peer` is there; both ends accepted it.
    LinkUp {
        /// Its number.
        link: LinkId,
        /// The other end, as the hello and the certificate say.
        peer: Identity,
        /// Whether this node dialled.
        dialled: bool,
        /// Which of the paths between the two it is; both ends say the same.
        path: u8,
    },
    /// The connection is gone. No frame of it follows.
    LinkDown {
        /// Its number.
        link: LinkId,
    },
    /// A frame's content, without its length field, in the order of the connection.
    Frame {
        /// On which connection.
        link: LinkId,
        /// The content.
        frame: &'a [u8],
    },
    /// A service takes nothing for now, or takes messages again. What comes for it is held, and what comes behind it from
    /// the same peer too, until the peer's credit is used up.
    Paused {
        /// Which.
        service: ServiceId,
        /// Whether it takes nothing.
        paused: bool,
    },
    /// A view is installed. Deliveries that follow come after the listeners were told.
    Installed {
        /// The view.
        view: Arc<View>,
    },
    /// The time of `next_deadline` has come. Spurious ticks are no-ops.
    Tick,
}

/// What the driver must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Append these bytes, length field included, to what is written on the link.
    Transmit {
        /// Where.
        link: LinkId,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// As `Transmit`, for others: drop it if much waits to be written on the link already. The two ends repair that.
    Forward {
        /// Where.
        link: LinkId,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// A peer for which [`SessionMachine::send`] said `Full` takes messages again, or never will.
    Ready {
        /// Which.
        peer: Identity,
    },
    /// Give a message to its service.
    Deliver {
        /// From whom.
        from: Identity,
        /// For whom.
        service: ServiceId,
        /// The sender's epoch.
        epoch: Epoch,
        /// The message.
        payload: Vec<u8>,
    },
    /// Close the connection. A `LinkDown` for it may follow and is a no-op.
    Close {
        /// Which.
        link: LinkId,
        /// Why, for the log.
        why: &'static str,
    },
}

/// Deliberate mistakes that the simulation must find.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A message that was taken in already is delivered again.
    DeliversTwice,
    /// After a takeover nothing is sent again.
    ResendsNothing,
    /// What was held back is delivered newest first.
    ReleasesBackwards,
    /// What was held back is dropped.
    DropsHeld,
    /// The epoch of a message is not looked at.
    HoldsNothing,
    /// Messages of removed lives are delivered.
    DeliversTheDead,
    /// What was given to a relay is not kept any more.
    TrustsRelays,
    /// A paused service gets its messages.
    DeliversToThePaused,
    /// Who was told that a peer is full never hears of it again.
    ForgetsToSayReady,
    /// The credit of a peer is not looked at.
    IgnoresCredit,
}

/// All sessions of one life of one node.
#[derive(Debug)]
pub struct SessionMachine {
    pub(super) me: Identity,
    pub(super) limits: Limits,
    pub(super) epoch: Epoch,
    pub(super) view: Option<Arc<View>>,
    pub(super) sessions: BTreeMap<Identity, Session>,
    pub(super) links: BTreeMap<LinkId, Identity>,
    paused: BTreeSet<ServiceId>,
    /// Messages to ourselves for paused services.
    mine: VecDeque<Held>,
    mine_was_full: bool,
    /// Lives up to here are over for good, as far as this node has seen.
    gone: BTreeMap<NodeId, Incarnation>,
    /// How many relayed links this end has named.
    pub(super) relayed_links: u64,
    /// Frames passed on for others.
    pub(super) forwarded: u64,
    #[cfg(any(test, feature = "sim"))]
    pub(super) bug: Option<Bug>,
}

impl SessionMachine {
    /// The sessions of `me`. Nothing can be sent before a view with `me` is installed.
    #[must_use]
    pub fn new(me: Identity, limits: Limits) -> Self {
        Self {
            me,
            limits,
            epoch: Epoch(0),
            view: None,
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            paused: BTreeSet::new(),
            mine: VecDeque::new(),
            mine_was_full: false,
            gone: BTreeMap::new(),
            relayed_links: 0,
            forwarded: 0,
            #[cfg(any(test, feature = "sim"))]
            bug: None,
        }
    }

    /// Plants a mistake.
    #[cfg(any(test, feature = "sim"))]
    pub fn plant(&mut self, bug: Bug) {
        self.bug = Some(bug);
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The epoch that messages are numbered with now.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether a session with `peer` has a usable connection.
    #[must_use]
    pub fn is_connected(&self, peer: Identity) -> bool {
        self.sessions.get(&peer).is_some_and(|s| s.active.is_some())
    }

    /// The relay over which the session with `peer` runs at present, if it has no direct path (R3).
    #[must_use]
    pub fn relayed_by(&self, peer: Identity) -> Option<Identity> {
        let session = self.sessions.get(&peer)?;
        session.active.and_then(|a| session.links.get(&a)).and_then(super::relay::relay_of)
    }

    /// How many frames this node has passed on between others.
    #[must_use]
    pub fn forwarded(&self) -> u64 {
        self.forwarded
    }

    /// What is kept for `peer`: bytes sent and not delivered there, and bytes taken in and not delivered here.
    #[must_use]
    pub fn kept_bytes(&self, peer: Identity) -> (u64, u64) {
        self.sessions.get(&peer).map_or((0, 0), |s| (s.unacked_bytes, s.held_bytes))
    }

    /// Queues a message. One to ourselves is delivered at once.
    ///
    /// # Errors
    /// See [`SendError`]; nothing was queued.
    pub fn send(
        &mut self,
        now: Instant,
        to: Identity,
        service: ServiceId,
        payload: Vec<u8>,
        out: &mut Vec<Output>,
    ) -> Result<(), SendError> {
        let view = self.view.as_ref().ok_or(SendError::NotMember(self.me))?;
        for who in [self.me, to] {
            if !view.contains(who) {
                return Err(SendError::NotMember(who));
            }
        }
        if MESSAGE_BYTES_MAX < payload.len() {
            return Err(SendError::TooLarge { size: payload.len(), limit: MESSAGE_BYTES_MAX });
        }
        let epoch = self.epoch;
        if to == self.me {
            return self.send_to_myself(service, payload, out);
        }
        #[cfg(any(test, feature = "sim"))]
        let ignores = self.has(Bug::IgnoresCredit);
        #[cfg(not(any(test, feature = "sim")))]
        let ignores = false;
        let limits = self.limits;
        let relay_at = now + super::relay::AFTER;
        let session = self.sessions.entry(to).or_insert_with(|| Session::new(limits.credit_bytes, relay_at));
        let sequence = session.last_sent + 1;
        let bytes = frame::data(sequence, epoch, service, &payload);
        let size = bytes.len() as u64;
        let full = limits.credit_messages <= session.unacked.len()
            || session.credit_bytes < session.unacked_bytes + size;
        if full && !ignores {
            session.was_full = true;
            return Err(SendError::Full(to.node));
        }
        if session.active.is_some() && !session.is_waiting() {
            session.heard_at = now;
        }
        if session.active.is_none() && session.peer_received == session.last_sent {
            session.relay_at = session.relay_at.max(relay_at);
        }
        session.last_sent = sequence;
        session.unacked_bytes += size;
        session.sent_bytes += size;
        session.unacked.push_back(Sent { sequence, ends_at: session.sent_bytes, bytes });
        self.pump(to, out);
        Ok(())
    }

    fn send_to_myself(
        &mut self,
        service: ServiceId,
        payload: Vec<u8>,
        out: &mut Vec<Output>,
    ) -> Result<(), SendError> {
        let (from, epoch) = (self.me, self.epoch);
        if !self.is_paused(service) {
            out.push(Output::Deliver { from, service, epoch, payload });
            return Ok(());
        }
        let size = payload.len() as u64;
        let bytes = self.mine.iter().map(|h| h.payload.len() as u64).sum::<u64>();
        if self.limits.credit_messages <= self.mine.len() || self.limits.credit_bytes < bytes + size {
            self.mine_was_full = true;
            return Err(SendError::Full(from.node));
        }
        self.mine.push_back(Held { epoch, service, payload });
        Ok(())
    }

    /// Takes one input; all that must be done is in `out` afterwards.
    pub fn handle(&mut self, now: Instant, input: Input<'_>, out: &mut Vec<Output>) {
        match input {
            Input::LinkUp { link, peer, dialled, path } => {
                self.on_link_up(now, link, peer, (dialled, path), out);
            }
            Input::LinkDown { link } => self.on_link_down(now, link, out),
            Input::Frame { link, frame } => {
                if let Err(why) = self.on_frame(now, link, frame, out) {
                    self.close(now, link, why, out);
                }
            }
            Input::Paused { service, paused } => self.on_paused(service, paused, out),
            Input::Installed { view } => self.on_installed(now, view, out),
            Input::Tick => self.on_tick(now, out),
        }
        if cfg!(debug_assertions) {
            self.sessions.values().for_each(Session::check);
        }
    }

    /// When `Tick` is wanted next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let acks = self.sessions.values().filter(|s| s.active.is_some()).filter_map(|s| s.ack_due);
        let stalls = self.sessions.values().filter(|s| s.is_waiting()).map(|s| s.heard_at + LINK_STALL);
        acks.chain(stalls).chain(self.relay_deadlines()).min()
    }

    /// Whether this life was removed as far as this node has seen.
    pub(super) fn is_over(&self, peer: Identity) -> bool {
        self.gone.get(&peer.node).is_some_and(|g| peer.incarnation <= *g)
    }

    pub(super) fn on_data(
        &mut self,
        now: Instant,
        peer: Identity,
        sequence: u64,
        (epoch, service): (Epoch, ServiceId),
        payload: &[u8],
        out: &mut Vec<Output>,
    ) -> Result<(), &'static str> {
        #[cfg(any(test, feature = "sim"))]
        let (doubles, early) = (self.has(Bug::DeliversTwice), self.has(Bug::HoldsNothing));
        #[cfg(not(any(test, feature = "sim")))]
        let (doubles, early) = (false, false);
        let installed = self.epoch;
        let deliverable = self.may_deliver(peer);
        let is_paused = self.is_paused(service);
        let limits = self.limits;
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        session.ack_due.get_or_insert(now + ACK_DELAY);
        if sequence <= session.received && !doubles {
            return Ok(());
        }
        if session.received + 1 < sequence {
            return Err("a gap in the numbers of messages");
        }
        let size = payload.len() as u64;
        session.received = session.received.max(sequence);
        session.unreported += 1;
        session.unreported_bytes += size;
        let report_at = match session.active.and_then(|a| session.links.get(&a)) {
            Some(link) if !link.is_direct() => limits.relay_window_bytes / 4,
            _ => limits.credit_bytes / 4,
        };
        let reports =
            report_at < session.unreported_bytes || limits.credit_messages as u64 / 4 < session.unreported;
        let waits = installed < epoch && !early;
        if waits || is_paused || !session.held.is_empty() {
            session.held_bytes += size;
            session.held.push_back(Held { epoch, service, payload: payload.to_vec() });
            let full =
                limits.credit_messages < session.held.len() || limits.credit_bytes < session.held_bytes;
            if full {
                return Err("more messages than it has credit for");
            }
        } else if deliverable {
            out.push(Output::Deliver { from: peer, service, epoch, payload: payload.to_vec() });
        }
        if reports {
            self.acknowledge(peer, out);
        }
        Ok(())
    }

    /// Whether what comes for this service waits.
    fn is_paused(&self, service: ServiceId) -> bool {
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::DeliversToThePaused) {
            return false;
        }
        self.paused.contains(&service)
    }

    fn on_paused(&mut self, service: ServiceId, paused: bool, out: &mut Vec<Output>) {
        if paused {
            self.paused.insert(service);
        } else if self.paused.remove(&service) {
            let peers: Vec<Identity> = self.sessions.keys().copied().collect();
            peers.into_iter().for_each(|peer| self.release(peer, out));
            let (now, later) =
                core::mem::take(&mut self.mine).into_iter().partition(|h| h.service == service);
            self.mine = later;
            let now: VecDeque<Held> = now;
            for Held { epoch, service, payload } in now {
                out.push(Output::Deliver { from: self.me, service, epoch, payload });
            }
            if core::mem::take(&mut self.mine_was_full) {
                out.push(Output::Ready { peer: self.me });
            }
        }
    }

    /// Whether messages of epochs up to the installed one are delivered: the sender's life is a member of it.
    fn may_deliver(&self, peer: Identity) -> bool {
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::DeliversTheDead) {
            return true;
        }
        self.view.as_ref().is_some_and(|v| v.contains(peer))
    }

    pub(super) fn acknowledge(&mut self, peer: Identity, out: &mut Vec<Output>) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        session.ack_due = None;
        session.unreported = 0;
        session.unreported_bytes = 0;
        if let Some(link) = session.active {
            let ack = Header::Ack { received: session.received, delivered: session.delivered() };
            self.transmit(peer, link, &frame::encode(ack, b""), out);
        }
    }

    fn on_installed(&mut self, now: Instant, view: Arc<View>, out: &mut Vec<Output>) {
        assert!(self.epoch < view.epoch, "views come in order");
        let before = self.view.replace(view.clone());
        self.epoch = view.epoch;
        for who in before.iter().flat_map(|v| v.members.iter()).map(|(n, i)| Identity::new(*n, *i)) {
            if !view.contains(who) {
                let gone = self.gone.entry(who.node).or_insert(who.incarnation);
                *gone = (*gone).max(who.incarnation);
            }
        }
        // A member that is newer than a life ends that life too.
        for (node, incarnation) in &view.members {
            if 0 < incarnation.0 {
                let gone = self.gone.entry(*node).or_insert(Incarnation(incarnation.0 - 1));
                *gone = (*gone).max(Incarnation(incarnation.0 - 1));
            }
        }
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::DeliversTheDead) {
            self.gone.clear();
        }
        let over: Vec<Identity> = self.sessions.keys().filter(|w| self.is_over(**w)).copied().collect();
        for who in over {
            self.end(now, who, out);
        }
        let peers: Vec<Identity> = self.sessions.keys().copied().collect();
        for peer in peers {
            self.release(peer, out);
        }
    }

    /// Delivers what was held for the epoch that is installed now.
    fn release(&mut self, peer: Identity, out: &mut Vec<Output>) {
        let (epoch, deliverable) = (self.epoch, self.may_deliver(peer));
        #[cfg(any(test, feature = "sim"))]
        let (backwards, deliverable) =
            (self.has(Bug::ReleasesBackwards), deliverable && !self.has(Bug::DropsHeld));
        let paused = core::mem::take(&mut self.paused);
        let Some(session) = self.sessions.get_mut(&peer) else {
            self.paused = paused;
            return;
        };
        #[cfg(any(test, feature = "sim"))]
        if backwards && session.held.iter().all(|h| h.epoch <= epoch) {
            session.held.make_contiguous().reverse();
        }
        let mut released = false;
        while session.held.front().is_some_and(|h| h.epoch <= epoch && !paused.contains(&h.service)) {
            let Some(held) = session.held.pop_front() else { break };
            session.held_bytes -= held.payload.len() as u64;
            released = true;
            if deliverable {
                let Held { epoch, service, payload } = held;
                out.push(Output::Deliver { from: peer, service, epoch, payload });
            }
        }
        self.paused = paused;
        if released {
            // The sender waits for credit, and nothing else may remind us of it.
            self.acknowledge(peer, out);
        }
    }

    pub(super) fn end(&mut self, now: Instant, who: Identity, out: &mut Vec<Output>) {
        let Some(session) = self.sessions.get(&who) else { return };
        let links: Vec<LinkId> = session.links.keys().copied().collect();
        for link in links {
            self.close(now, link, "that life is over", out);
        }
        if self.sessions.remove(&who).is_some_and(|s| s.was_full) {
            out.push(Output::Ready { peer: who });
        }
    }

    fn on_tick(&mut self, now: Instant, out: &mut Vec<Output>) {
        let peers: Vec<Identity> = self.sessions.keys().copied().collect();
        for peer in peers {
            let Some(session) = self.sessions.get(&peer) else { continue };
            if session.active.is_some() && session.ack_due.is_some_and(|due| due <= now) {
                self.acknowledge(peer, out);
            }
            let Some(session) = self.sessions.get(&peer) else { continue };
            if let Some(link) = session.active
                && session.is_waiting()
                && session.heard_at + LINK_STALL <= now
            {
                self.close(now, link, "nothing came for too long", out);
            }
        }
        self.relay_tick(now, out);
    }
}
