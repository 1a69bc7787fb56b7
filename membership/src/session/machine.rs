//! The session machine: all sessions of one life of one node.

use super::frame::{self, Header, MESSAGE_BYTES_MAX};
use super::peer::{Held, Link, Sent, Session};
use crate::{Epoch, Identity, Incarnation, Instant, NodeId, SendError, ServiceId, View};
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long an acknowledgement may wait for a message to travel with.
const ACK_DELAY: Duration = Duration::from_millis(10);
/// A link on which nothing comes for this long although we wait for it is given up; the driver makes another.
const LINK_STALL: Duration = Duration::from_secs(3);

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
}

impl Limits {
    /// 8 MiB and 65,536 messages per peer: 64 peers cannot take more than 512 MiB.
    #[must_use]
    pub fn standard() -> Self {
        Self { credit_bytes: 8 << 20, credit_messages: 65_536 }
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
}

/// All sessions of one life of one node.
#[derive(Debug)]
pub struct SessionMachine {
    me: Identity,
    limits: Limits,
    epoch: Epoch,
    view: Option<Arc<View>>,
    sessions: BTreeMap<Identity, Session>,
    links: BTreeMap<LinkId, Identity>,
    /// Lives up to here are over for good, as far as this node has seen.
    gone: BTreeMap<NodeId, Incarnation>,
    #[cfg(any(test, feature = "sim"))]
    bug: Option<Bug>,
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
            gone: BTreeMap::new(),
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
    fn has(&self, bug: Bug) -> bool {
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
            out.push(Output::Deliver { from: to, service, epoch, payload });
            return Ok(());
        }
        let limits = self.limits;
        let session = self.sessions.entry(to).or_insert_with(|| Session::new(limits.credit_bytes));
        let sequence = session.last_sent + 1;
        let bytes = frame::data(sequence, epoch, service, &payload);
        let used = session.unacked_bytes + bytes.len() as u64;
        if limits.credit_messages <= session.unacked.len() || session.credit_bytes < used {
            return Err(SendError::Full(to.node));
        }
        if !session.is_waiting() {
            session.heard_at = now;
        }
        session.last_sent = sequence;
        session.unacked_bytes = used;
        session.unacked.push_back(Sent { sequence, bytes: bytes.clone() });
        if let Some(link) = session.active {
            out.push(Output::Transmit { link, bytes });
        }
        Ok(())
    }

    /// Takes one input; all that must be done is in `out` afterwards.
    pub fn handle(&mut self, now: Instant, input: Input<'_>, out: &mut Vec<Output>) {
        match input {
            Input::LinkUp { link, peer, dialled } => self.on_link_up(link, peer, dialled, out),
            Input::LinkDown { link } => self.on_link_down(link),
            Input::Frame { link, frame } => {
                if let Err(why) = self.on_frame(now, link, frame, out) {
                    self.close(link, why, out);
                }
            }
            Input::Installed { view } => self.on_installed(view, out),
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
        acks.chain(stalls).min()
    }

    /// Whether this life was removed as far as this node has seen.
    fn is_over(&self, peer: Identity) -> bool {
        self.gone.get(&peer.node).is_some_and(|g| peer.incarnation <= *g)
    }

    fn on_link_up(&mut self, link: LinkId, peer: Identity, dialled: bool, out: &mut Vec<Output>) {
        let is_member = self.view.as_ref().is_some_and(|v| v.contains(peer));
        if peer == self.me || self.is_over(peer) {
            out.push(Output::Close { link, why: "that life is over" });
            return;
        }
        if !is_member {
            self.forget_older_strangers(peer, out);
        }
        let credit_bytes = self.limits.credit_bytes;
        let by_lower = dialled == (self.me.node < peer.node);
        let session = self.sessions.entry(peer).or_insert_with(|| Session::new(credit_bytes));
        let ours = session.generation + 1;
        session.generation = ours;
        session.links.insert(link, Link { by_lower, ours, theirs: None });
        self.links.insert(link, peer);
        let (received, delivered) = (session.received, session.delivered());
        let resume = Header::Resume { generation: ours, received, delivered, credit_bytes };
        out.push(Output::Transmit { link, bytes: frame::encode(resume, b"") });
    }

    /// A node that is not in the view has one session at most, that of its newest life: what is kept stays bounded.
    fn forget_older_strangers(&mut self, peer: Identity, out: &mut Vec<Output>) {
        let older: Vec<Identity> = self
            .sessions
            .keys()
            .filter(|i| i.node == peer.node && i.incarnation < peer.incarnation)
            .filter(|i| !self.view.as_ref().is_some_and(|v| v.contains(**i)))
            .copied()
            .collect();
        for who in older {
            self.end(who, out);
        }
    }

    fn on_link_down(&mut self, link: LinkId) {
        let Some(peer) = self.links.remove(&link) else { return };
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.links.remove(&link);
            if session.active == Some(link) {
                session.active = None;
            }
        }
    }

    fn close(&mut self, link: LinkId, why: &'static str, out: &mut Vec<Output>) {
        self.on_link_down(link);
        out.push(Output::Close { link, why });
    }

    fn on_frame(
        &mut self,
        now: Instant,
        link: LinkId,
        frame: &[u8],
        out: &mut Vec<Output>,
    ) -> Result<(), &'static str> {
        // A link that was closed here may still have frames in the driver's hands.
        let Some(peer) = self.links.get(&link).copied() else { return Ok(()) };
        let (header, payload) = frame::decode(frame).map_err(|_| "a frame that does not decode")?;
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        let is_first = session.links.get(&link).is_some_and(|l| l.theirs.is_none());
        match header {
            Header::Resume { generation, received, delivered, credit_bytes } => {
                if !is_first {
                    return Err("a second resume");
                }
                if !session.on_progress(received, delivered) {
                    return Err("an acknowledgement of what was never sent");
                }
                session.credit_bytes = credit_bytes;
                session.generation = session.generation.max(generation);
                if let Some(l) = session.links.get_mut(&link) {
                    l.theirs = Some(generation);
                }
                self.take_over(now, peer, link, received, out);
                Ok(())
            }
            _ if is_first => Err("a frame before the resume"),
            // Of an older generation: its sender has switched over, or will, and sends it again.
            _ if session.active != Some(link) => Ok(()),
            Header::Ack { received, delivered } => {
                session.heard_at = now;
                if session.on_progress(received, delivered) {
                    return Ok(());
                }
                Err("an acknowledgement of what was never sent")
            }
            Header::Data { sequence, epoch, service } => {
                session.heard_at = now;
                self.on_data(now, peer, sequence, (epoch, ServiceId(service)), payload, out)
            }
        }
    }

    /// `link` has a rank now. If it is the highest, it becomes the active one and what the peer misses is sent again.
    fn take_over(
        &mut self,
        now: Instant,
        peer: Identity,
        link: LinkId,
        received: u64,
        out: &mut Vec<Output>,
    ) {
        #[cfg(any(test, feature = "sim"))]
        let resends = !self.has(Bug::ResendsNothing);
        #[cfg(not(any(test, feature = "sim")))]
        let resends = true;
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let best = session.links.iter().filter_map(|(id, l)| l.rank().map(|r| (r, *id))).max();
        let losers: Vec<LinkId> = session
            .links
            .iter()
            .filter(|(id, l)| l.rank().is_some() && best.is_some_and(|(_, b)| b != **id))
            .map(|(id, _)| *id)
            .collect();
        if best.is_some_and(|(_, b)| b == link) {
            session.active = Some(link);
            session.heard_at = now;
            if session.ack_due.is_none() && 0 < session.unreported {
                session.ack_due = Some(now + ACK_DELAY);
            }
            for sent in session.unacked.iter().filter(|s| resends && received < s.sequence) {
                out.push(Output::Transmit { link, bytes: sent.bytes.clone() });
            }
        }
        for loser in losers {
            self.close(loser, "superseded by a newer connection", out);
        }
    }

    fn on_data(
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
        if (installed < epoch || !session.held.is_empty()) && !early {
            session.held_bytes += size;
            session.held.push_back(Held { epoch, service, payload: payload.to_vec() });
            let full =
                limits.credit_messages < session.held.len() || limits.credit_bytes < session.held_bytes;
            return if full { Err("more messages than it has credit for") } else { Ok(()) };
        }
        if deliverable {
            out.push(Output::Deliver { from: peer, service, epoch, payload: payload.to_vec() });
        }
        if limits.credit_bytes / 4 < session.unreported_bytes
            || limits.credit_messages as u64 / 4 < session.unreported
        {
            Self::acknowledge(session, out);
        }
        Ok(())
    }

    /// Whether messages of epochs up to the installed one are delivered: the sender's life is a member of it.
    fn may_deliver(&self, peer: Identity) -> bool {
        #[cfg(any(test, feature = "sim"))]
        if self.has(Bug::DeliversTheDead) {
            return true;
        }
        self.view.as_ref().is_some_and(|v| v.contains(peer))
    }

    fn acknowledge(session: &mut Session, out: &mut Vec<Output>) {
        session.ack_due = None;
        session.unreported = 0;
        session.unreported_bytes = 0;
        if let Some(link) = session.active {
            let ack = Header::Ack { received: session.received, delivered: session.delivered() };
            out.push(Output::Transmit { link, bytes: frame::encode(ack, b"") });
        }
    }

    fn on_installed(&mut self, view: Arc<View>, out: &mut Vec<Output>) {
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
            self.end(who, out);
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
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        #[cfg(any(test, feature = "sim"))]
        if backwards && session.held.iter().all(|h| h.epoch <= epoch) {
            session.held.make_contiguous().reverse();
        }
        let mut released = false;
        while session.held.front().is_some_and(|h| h.epoch <= epoch) {
            let Some(held) = session.held.pop_front() else { return };
            session.held_bytes -= held.payload.len() as u64;
            released = true;
            if deliverable {
                let Held { epoch, service, payload } = held;
                out.push(Output::Deliver { from: peer, service, epoch, payload });
            }
        }
        if released {
            // The sender waits for credit, and nothing else may remind us of it.
            Self::acknowledge(session, out);
        }
    }

    fn end(&mut self, who: Identity, out: &mut Vec<Output>) {
        let Some(session) = self.sessions.remove(&who) else { return };
        for link in session.links.into_keys() {
            self.links.remove(&link);
            out.push(Output::Close { link, why: "that life is over" });
        }
    }

    fn on_tick(&mut self, now: Instant, out: &mut Vec<Output>) {
        let mut stalled = Vec::new();
        for session in self.sessions.values_mut() {
            if session.active.is_some() && session.ack_due.is_some_and(|due| due <= now) {
                Self::acknowledge(session, out);
            }
            if session.is_waiting() && session.heard_at + LINK_STALL <= now {
                stalled.extend(session.active);
            }
        }
        for link in stalled {
            self.close(link, "nothing came for too long", out);
        }
    }
}
