//! The links of a session: which one is active, what is sent on it again, and what its frames mean (R2).

use super::frame::{self, Header};
use super::machine::{ACK_DELAY, LinkId, Output, SessionMachine};
use super::peer::{Link, Session, Via};
use crate::{Identity, Instant, ServiceId};

impl SessionMachine {
    pub(super) fn on_link_up(
        &mut self,
        now: Instant,
        link: LinkId,
        peer: Identity,
        (dialled, path): (bool, u8),
        out: &mut Vec<Output>,
    ) {
        let is_member = self.view.as_ref().is_some_and(|v| v.contains(peer));
        if peer == self.me || self.is_over(peer) {
            out.push(Output::Close { link, why: "that life is over" });
            return;
        }
        if !is_member {
            self.forget_older_strangers(now, peer, out);
        }
        let by_lower = dialled == (self.me.node < peer.node);
        self.resume(now, link, peer, (Via::Direct { path }, by_lower), out);
    }

    /// Enters a link and says what we have.
    pub(super) fn resume(
        &mut self,
        now: Instant,
        link: LinkId,
        peer: Identity,
        (via, by_lower): (Via, bool),
        out: &mut Vec<Output>,
    ) {
        let credit_bytes = self.limits.credit_bytes;
        let relay_at = now + super::relay::AFTER;
        let session = self.sessions.entry(peer).or_insert_with(|| Session::new(credit_bytes, relay_at));
        let ours = session.generation + 1;
        session.generation = ours;
        session.links.insert(link, Link { via, by_lower, ours, theirs: None, since: now });
        self.links.insert(link, peer);
        let (received, delivered) = (session.received, session.delivered());
        let resume = Header::Resume { generation: ours, received, delivered, credit_bytes };
        self.transmit(peer, link, &frame::encode(resume, b""), out);
    }

    /// A node that is not in the view has one session at most, that of its newest life: what is kept stays bounded.
    fn forget_older_strangers(&mut self, now: Instant, peer: Identity, out: &mut Vec<Output>) {
        let older: Vec<Identity> = self
            .sessions
            .keys()
            .filter(|i| i.node == peer.node && i.incarnation < peer.incarnation)
            .filter(|i| !self.view.as_ref().is_some_and(|v| v.contains(**i)))
            .copied()
            .collect();
        for who in older {
            self.end(now, who, out);
        }
    }

    pub(super) fn on_link_down(&mut self, now: Instant, link: LinkId, out: &mut Vec<Output>) {
        let Some(peer) = self.links.remove(&link) else { return };
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        session.links.remove(&link);
        if session.active == Some(link) {
            session.active = None;
            session.relay_at = now + super::relay::AFTER;
            // What was under way through that peer may be lost.
            self.end_relayed_by(now, peer, out);
        }
    }

    pub(super) fn close(&mut self, now: Instant, link: LinkId, why: &'static str, out: &mut Vec<Output>) {
        let peer = self.links.get(&link).copied();
        let direct = peer
            .and_then(|p| self.sessions.get(&p))
            .and_then(|s| s.links.get(&link))
            .is_none_or(Link::is_direct);
        if let (Some(peer), false) = (peer, direct) {
            self.transmit(peer, link, &frame::encode(Header::Bye, b""), out);
        }
        self.on_link_down(now, link, out);
        if direct {
            out.push(Output::Close { link, why });
        }
    }

    /// Writes a frame on a link, whatever it is.
    pub(super) fn transmit(
        &mut self,
        peer: Identity,
        link: LinkId,
        bytes: &std::sync::Arc<[u8]>,
        out: &mut Vec<Output>,
    ) {
        let Some(l) = self.sessions.get(&peer).and_then(|s| s.links.get(&link)) else { return };
        match l.via {
            Via::Direct { .. } => out.push(Output::Transmit { link, bytes: bytes.clone() }),
            Via::Relay { relay, tag } => self.send_through(relay, peer, tag, frame::content(bytes), out),
        }
    }

    /// Writes what waits on the active link, as far as its window allows.
    pub(super) fn pump(&mut self, peer: Identity, out: &mut Vec<Output>) {
        let relay_window = self.limits.relay_window_bytes;
        loop {
            let Some(session) = self.sessions.get_mut(&peer) else { return };
            let Some(link) = session.active else { return };
            let direct = session.links.get(&link).is_some_and(Link::is_direct);
            let window = if direct { u64::MAX } else { relay_window };
            let Some(bytes) = session.next_to_transmit(window) else { return };
            #[cfg(any(test, feature = "sim"))]
            if !direct && self.bug == Some(super::Bug::TrustsRelays) {
                let all = session.transmitted;
                session.on_progress(all, all);
            }
            self.transmit(peer, link, &bytes, out);
        }
    }

    pub(super) fn on_frame(
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
        let Some(this) = session.links.get(&link) else { return Ok(()) };
        let (is_first, direct) = (this.theirs.is_none(), this.is_direct());
        let by_peer = this.by_lower != (self.me.node < peer.node);
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
                if !direct && by_peer {
                    self.end_older(now, peer, (link, generation), out);
                }
                self.take_over(now, peer, link, received, out);
                self.say_ready(peer, out);
                Ok(())
            }
            Header::Bye => {
                // Of a relayed link: the other end has given it up already.
                if direct {
                    return Err("a farewell on a connection");
                }
                self.on_link_down(now, link, out);
                Ok(())
            }
            _ if is_first => Err("a frame before the resume"),
            // Of an older generation: its sender has switched over, or will, and sends it again.
            _ if session.active != Some(link) => Ok(()),
            Header::Ack { received, delivered } => {
                session.heard_at = now;
                if !session.on_progress(received, delivered) {
                    return Err("an acknowledgement of what was never sent");
                }
                self.pump(peer, out);
                self.say_ready(peer, out);
                Ok(())
            }
            Header::Data { sequence, epoch, service } => {
                session.heard_at = now;
                self.on_data(now, peer, sequence, (epoch, ServiceId(service)), payload, out)
            }
            Header::Relay { .. } | Header::Relayed { .. } | Header::NoRelay { .. } if !direct => {
                Err("a relay of relays")
            }
            Header::Relay { to, tag } => {
                self.on_relay(peer, link, to, tag, payload, out);
                Ok(())
            }
            Header::Relayed { from, tag } => {
                self.on_relayed(now, peer, from, tag, payload, out);
                Ok(())
            }
            Header::NoRelay { to, tag } => {
                self.on_no_relay(now, peer, to, tag, out);
                Ok(())
            }
        }
    }

    /// The peer looked for a relay because it had no link, so those on which it proposed earlier have ended there.
    fn end_older(
        &mut self,
        now: Instant,
        peer: Identity,
        (link, generation): (LinkId, u64),
        out: &mut Vec<Output>,
    ) {
        let Some(session) = self.sessions.get(&peer) else { return };
        let older =
            session.links.iter().filter(|(id, l)| **id != link && l.theirs.is_some_and(|t| t < generation));
        let older: Vec<LinkId> = older.map(|(id, _)| *id).collect();
        for id in older {
            self.close(now, id, "the peer has no connection any more", out);
        }
    }

    /// A quarter of the credit is free again.
    fn say_ready(&mut self, peer: Identity, out: &mut Vec<Output>) {
        #[cfg(any(test, feature = "sim"))]
        if self.has(super::Bug::ForgetsToSayReady) {
            return;
        }
        let messages = self.limits.credit_messages;
        let Some(session) = self.sessions.get_mut(&peer).filter(|s| s.was_full) else { return };
        if session.unacked_bytes <= session.credit_bytes / 4 * 3 && session.unacked.len() <= messages / 4 * 3
        {
            session.was_full = false;
            out.push(Output::Ready { peer });
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
        let resends = !self.has(super::Bug::ResendsNothing);
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
            let before = session.active.replace(link);
            session.heard_at = now;
            session.relay_tries = 0;
            if session.ack_due.is_none() && 0 < session.unreported {
                session.ack_due = Some(now + ACK_DELAY);
            }
            session.transmitted = if resends { received } else { session.last_sent };
            self.pump(peer, out);
            if before.is_some() {
                // What others had under way through that peer may have been on the old connection.
                self.end_relayed_by(now, peer, out);
            }
        }
        for loser in losers {
            self.close(now, loser, "superseded by a newer connection", out);
        }
    }
}
