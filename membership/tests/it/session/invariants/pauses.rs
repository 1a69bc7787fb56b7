//! A paused service gets no message until it takes messages again.

use quorate_membership::{Identity, ServiceId};
use std::collections::BTreeSet;

#[derive(Default)]
pub(crate) struct Pauses(BTreeSet<(Identity, ServiceId)>);

impl Pauses {
    /// Pauses it, or lets it go on; whether it is paused now.
    pub(crate) fn turn(&mut self, who: Identity, service: ServiceId) -> bool {
        let known = self.0.remove(&(who, service));
        if !known {
            self.0.insert((who, service));
        }
        !known
    }

    pub(crate) fn all(&self) -> Vec<(Identity, ServiceId)> {
        self.0.iter().copied().collect()
    }

    pub(crate) fn on_delivered(&self, who: Identity, service: ServiceId) {
        assert!(!self.0.contains(&(who, service)), "pauses: {who} gets a message for service {}", service.0);
    }
}
