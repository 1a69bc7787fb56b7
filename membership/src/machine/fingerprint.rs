//! What tells two moments of a machine apart, for the exhaustive exploration.

use super::member::Member;
use crate::Epoch;
use core::fmt::{Debug, Write};
use core::hash::Hasher;

/// Text into a hasher: what has no `Hash` has `Debug`.
struct Text<'a, H>(&'a mut H);

impl<H: Hasher> Write for Text<'_, H> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Something small.
pub(crate) fn small(what: &impl Debug, out: &mut impl Hasher) {
    // Writing into a hasher cannot fail.
    let _ = write!(Text(out), "{what:?};");
}

/// Something with many parts, by its encoding.
pub(crate) fn large(what: &impl serde::Serialize, out: &mut impl Hasher) {
    let bytes = postcard::to_stdvec(what).expect("plain data into memory always encodes");
    out.write_usize(bytes.len());
    out.write(&bytes);
}

impl Member {
    /// Everything that decides what this machine can do from here on. Of the chain its ends stand for all: there is one
    /// record of each epoch, which is what an exploration checks first.
    pub(crate) fn fingerprint(&self, out: &mut impl Hasher) {
        let disk = &self.disk;
        small(&(self.me, &self.rng, self.now, self.started), out);
        large(&(&self.tip.as_deref(), disk.state, disk.life, disk.promised, &disk.accepted), out);
        let before = Epoch(self.epoch().0.saturating_sub(1));
        small(&(disk.chain.oldest(), disk.chain.accepts(self.epoch()), disk.chain.accepts(before)), out);
        small(&(&self.writes, self.voters_since, &self.peers, &self.acks, &self.over), out);
        small(&(&self.proposer, self.forcing, &self.requests, &self.stages), out);
        small(&(self.waits, self.waits_for_all, &self.absent_voters, self.wants_in), out);
        small(&(self.heartbeat_at, self.beat_soon, self.early_beat_at, self.fetch_at), out);
        small(&(self.quorate, self.lease_until, &self.stopped), out);
        large(&self.early, out);
    }
}
