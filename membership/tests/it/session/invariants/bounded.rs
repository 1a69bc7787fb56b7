//! What is kept for a peer never exceeds its credit, whatever it does (R2).

use quorate_membership::Identity;
use quorate_membership::session::{Limits, SessionMachine};

pub(crate) fn after_step(machine: &SessionMachine, peers: impl Iterator<Item = Identity>, limits: Limits) {
    for peer in peers {
        let (sent, held) = machine.kept_bytes(peer);
        assert!(sent <= limits.credit_bytes, "bounded: {sent} bytes are kept for {peer}");
        assert!(held <= limits.credit_bytes, "bounded: {held} bytes of {peer} are held");
    }
}
