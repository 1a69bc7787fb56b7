//! No message of a session is lost, doubled or reordered, across reconnects and views that contain both ends (R2).

use quorate_membership::Identity;
use std::collections::BTreeMap;

type Channel = (Identity, Identity, u8);

#[derive(Default)]
pub(crate) struct ExactlyOnce {
    sent: BTreeMap<Channel, u64>,
    delivered: BTreeMap<Channel, u64>,
}

impl ExactlyOnce {
    /// The number that the next message of this channel carries.
    pub(crate) fn next(&self, channel: Channel) -> u64 {
        self.sent.get(&channel).copied().unwrap_or(0)
    }

    pub(crate) fn on_sent(&mut self, channel: Channel) {
        *self.sent.entry(channel).or_default() += 1;
    }

    pub(crate) fn on_delivered(&mut self, channel: Channel, number: u64) {
        let expected = self.delivered.entry(channel).or_default();
        assert!(*expected <= number, "exactly once: {channel:?} delivers message {number} again");
        assert_eq!(*expected, number, "exactly once: {channel:?} skips a message");
        *expected += 1;
        assert!(number < self.sent.get(&channel).copied().unwrap_or(0), "never sent: {channel:?} {number}");
    }

    /// After everything healed: all that was sent between two lives that are still members has arrived.
    pub(crate) fn at_end(&self, is_member: impl Fn(Identity) -> bool) {
        for (channel, sent) in self.sent.iter().filter(|((a, b, _), _)| is_member(*a) && is_member(*b)) {
            let got = self.delivered.get(channel).copied().unwrap_or(0);
            assert_eq!(got, *sent, "lost: {channel:?} delivered {got} of {sent}");
        }
    }

    pub(crate) fn deliveries(&self) -> u64 {
        self.delivered.values().sum()
    }
}
