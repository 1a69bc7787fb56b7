//! Relayed links (R3): while two members have no direct path, a common peer passes their frames on.
//!
//! A relayed link is a link like any other to the two ends: a generation, a resume, a takeover. It runs over two direct
//! connections, on which its frames travel beside the relay's own; they may get lost when one of these changes, which
//! shows as a gap, as silence, or by the direct connection's end, and then another link follows. What may be under way on
//! it is bounded by a window of its own, so a relay keeps little for each pair. Relays do not pass on to other relays.
//!
//! The relay vouches for where a frame came from: it names the certified peer of its connection. Members are trusted not
//! to lie (`docs/threat-model.md`); frames are encrypted on each of the two hops.

use super::frame::{self, Header};
use super::machine::{LinkId, Output, SessionMachine};
use super::peer::{Link, Via};
use crate::{Identity, Instant};
use core::time::Duration;

/// How long a session has no link before a relay is looked for. A new connection is mostly there earlier.
pub(super) const AFTER: Duration = Duration::from_millis(200);
/// How long the other end may take to answer through a relay before the next one is tried.
const ANSWER: Duration = Duration::from_millis(400);
/// Between two rounds over all relays.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Links between two ends at a time, above which no relayed one is taken; more come only from a peer that goes wrong.
const LINKS_MAX: usize = 4;
/// Numbers of relayed links have this bit; those of the driver's connections do not.
const RELAYED: u64 = 1 << 63;

/// The relay of a link, if it has one.
pub(super) fn relay_of(link: &Link) -> Option<Identity> {
    match link.via {
        Via::Direct { .. } => None,
        Via::Relay { relay, .. } => Some(relay),
    }
}

/// When a link on which the other end has not said where it is gets given up.
fn answer_by(link: &Link) -> Option<Instant> {
    let patience = if link.is_direct() { super::machine::LINK_STALL * 2 } else { ANSWER };
    link.theirs.is_none().then_some(link.since + patience)
}

impl SessionMachine {
    /// The direct connection to a member, if it is the active one.
    fn direct_link(&self, peer: Identity) -> Option<LinkId> {
        let session = self.sessions.get(&peer)?;
        let link = session.active?;
        session.links.get(&link).is_some_and(Link::is_direct).then_some(link)
    }

    fn is_member(&self, who: Identity) -> bool {
        self.view.as_ref().is_some_and(|v| v.contains(who))
    }

    /// Members that may pass frames on to `peer`.
    fn relays_for(&self, peer: Identity) -> Vec<Identity> {
        let members = self.view.iter().flat_map(|v| v.identities());
        members.filter(|m| *m != peer && *m != self.me && self.direct_link(*m).is_some()).collect()
    }

    pub(super) fn relay_deadlines(&self) -> impl Iterator<Item = Instant> {
        let wanted = self.sessions.iter().filter(|(p, s)| s.wants_relay() && self.is_member(**p));
        let wanted = wanted.map(|(_, s)| s.relay_at);
        let unanswered = self.sessions.values().flat_map(|s| s.links.values());
        let unanswered =
            unanswered.filter(|l| !l.is_direct() && l.theirs.is_none()).map(|l| l.since + ANSWER);
        wanted.chain(unanswered)
    }

    /// Gives up relays that do not answer, and looks for one where a session waits for a link.
    pub(super) fn relay_tick(&mut self, now: Instant, out: &mut Vec<Output>) {
        let silent: Vec<LinkId> = self
            .sessions
            .values()
            .flat_map(|s| s.links.iter())
            .filter(|(_, l)| answer_by(l).is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for link in silent {
            self.close(now, link, "the other end does not answer", out);
        }
        let waiting: Vec<Identity> = self
            .sessions
            .iter()
            .filter(|(p, s)| s.wants_relay() && s.relay_at <= now && self.is_member(**p))
            .map(|(p, _)| *p)
            .collect();
        for peer in waiting {
            self.open_relayed(now, peer, out);
        }
    }

    fn open_relayed(&mut self, now: Instant, peer: Identity, out: &mut Vec<Output>) {
        let relays = self.relays_for(peer);
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let rounds = session.relay_tries / (relays.len().max(1) as u64);
        session.relay_at = now + (AFTER * u32::try_from(1 + rounds).unwrap_or(u32::MAX)).min(BACKOFF_MAX);
        // Pairs spread over the relays, and each pair goes through all of them.
        let turn = session.relay_tries + u64::from(self.me.node.0) + u64::from(peer.node.0);
        let index = usize::try_from(turn % (relays.len().max(1) as u64)).unwrap_or(0);
        let Some(relay) = relays.get(index).copied() else { return };
        session.relay_tries += 1;
        self.relayed_links += 1;
        // Both ends may name one at once: the lowest bit tells who did.
        let lower = self.me.node < peer.node;
        let tag = self.relayed_links << 1 | u64::from(lower);
        let link = LinkId(RELAYED | self.relayed_links);
        self.resume(now, link, peer, (Via::Relay { relay, tag }, lower), out);
    }

    /// Hands a frame for `to` to the relay; without a direct link to it the frame is lost, and that link's end follows.
    pub(super) fn send_through(
        &self,
        relay: Identity,
        to: Identity,
        tag: u64,
        content: &[u8],
        out: &mut Vec<Output>,
    ) {
        if let Some(link) = self.direct_link(relay) {
            let bytes = frame::encode(Header::Relay { to, tag }, content);
            out.push(Output::Transmit { link, bytes });
        }
    }

    /// As the relay: passes a frame of `from` on, if there is a direct way.
    pub(super) fn on_relay(
        &mut self,
        from: Identity,
        link: LinkId,
        to: Identity,
        tag: u64,
        content: &[u8],
        out: &mut Vec<Output>,
    ) {
        let members = self.is_member(from) && self.is_member(to) && to != from;
        match self.direct_link(to).filter(|_| members) {
            Some(onward) => {
                self.forwarded += 1;
                let bytes = frame::encode(Header::Relayed { from, tag }, content);
                out.push(Output::Forward { link: onward, bytes });
            }
            None => {
                let bytes = frame::encode(Header::NoRelay { to, tag }, b"");
                out.push(Output::Transmit { link, bytes });
            }
        }
    }

    fn relayed_link(&self, peer: Identity, relay: Identity, tag: u64) -> Option<LinkId> {
        let via = Via::Relay { relay, tag };
        let session = self.sessions.get(&peer)?;
        session.links.iter().find(|(_, l)| l.via == via).map(|(id, _)| *id)
    }

    /// As an end: a frame of `from` came through `relay`.
    pub(super) fn on_relayed(
        &mut self,
        now: Instant,
        relay: Identity,
        from: Identity,
        tag: u64,
        content: &[u8],
        out: &mut Vec<Output>,
    ) {
        if from == self.me || self.is_over(from) || !self.is_member(from) {
            return;
        }
        let link = match self.relayed_link(from, relay, tag) {
            Some(link) => link,
            None => match frame::decode(content) {
                Ok((Header::Resume { .. }, _)) => {
                    let links = self.sessions.get(&from).map_or(0, |s| s.links.len());
                    if LINKS_MAX <= links {
                        return;
                    }
                    self.relayed_links += 1;
                    let link = LinkId(RELAYED | self.relayed_links);
                    let by_lower = from.node < self.me.node;
                    self.resume(now, link, from, (Via::Relay { relay, tag }, by_lower), out);
                    link
                }
                Ok((Header::Bye, _)) => return,
                // The rest of a link that is over here: its other end may not know.
                _ => {
                    return self.send_through(
                        relay,
                        from,
                        tag,
                        frame::content(&frame::encode(Header::Bye, b"")),
                        out,
                    );
                }
            },
        };
        if let Err(why) = self.on_frame(now, link, content, out) {
            self.close(now, link, why, out);
        }
    }

    pub(super) fn on_no_relay(
        &mut self,
        now: Instant,
        relay: Identity,
        to: Identity,
        tag: u64,
        out: &mut Vec<Output>,
    ) {
        if let Some(link) = self.relayed_link(to, relay, tag) {
            self.on_link_down(now, link, out);
        }
    }

    /// The way to `relay` has changed: what ran through it starts anew.
    pub(super) fn end_relayed_by(&mut self, now: Instant, relay: Identity, out: &mut Vec<Output>) {
        let links: Vec<LinkId> = self
            .sessions
            .values()
            .flat_map(|s| s.links.iter())
            .filter(|(_, l)| relay_of(l) == Some(relay))
            .map(|(id, _)| *id)
            .collect();
        for link in links {
            self.close(now, link, "the way to the relay changed", out);
        }
    }
}
