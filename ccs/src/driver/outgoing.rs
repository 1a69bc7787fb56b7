//! Messages on their way out: in order per peer, kept while a peer takes none.

use quorate_membership::{Identity, SendError, ServiceId, Sessions, View};
use std::collections::{BTreeMap, VecDeque};

/// Messages kept for one peer. Updates are few and each is waited for, so that more are a fault; the next term sends
/// the whole state again.
const KEPT_MAX: usize = 1_024;

/// What the sessions did not take yet.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    kept: BTreeMap<Identity, VecDeque<Vec<u8>>>,
}

impl Outgoing {
    /// Sends, or keeps for later behind what is kept already.
    pub(super) fn send(&mut self, sessions: &dyn Sessions, to: Identity, bytes: Vec<u8>) {
        let kept = self.kept.entry(to).or_default();
        if KEPT_MAX <= kept.len() {
            tracing::error!(target: "quorate_ccs", %to, "too many messages wait; one is dropped until the next term");
            return;
        }
        kept.push_back(bytes);
        self.on_ready(sessions, to);
    }

    /// The peer takes messages again.
    pub(super) fn on_ready(&mut self, sessions: &dyn Sessions, to: Identity) {
        let Some(kept) = self.kept.get_mut(&to) else { return };
        while let Some(first) = kept.front() {
            match sessions.send(to, ServiceId::CCS, first.clone()) {
                Err(SendError::Full(_)) => return,
                // A peer that is gone learns nothing more; the next view says what follows from that.
                Ok(()) | Err(SendError::NotMember(_) | SendError::Stopped) => {}
                Err(error) => {
                    tracing::error!(target: "quorate_ccs", %to, %error, "a message was not sent");
                }
            }
            kept.pop_front();
        }
        self.kept.remove(&to);
    }

    /// Nothing is kept for lives that are over.
    pub(super) fn on_view(&mut self, view: &View) {
        self.kept.retain(|to, _| view.contains(*to));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::{ClusterId, Incarnation, NodeId, SessionHandler};
    use std::sync::{Arc, Mutex};

    /// Takes as many messages as it has room for.
    #[derive(Default)]
    struct Narrow {
        room: Mutex<usize>,
        sent: Mutex<Vec<Vec<u8>>>,
    }

    impl Sessions for Narrow {
        fn send(&self, to: Identity, _: ServiceId, payload: Vec<u8>) -> Result<(), SendError> {
            let mut room = self.room.lock().unwrap();
            if *room == 0 {
                return Err(SendError::Full(to.node));
            }
            *room -= 1;
            self.sent.lock().unwrap().push(payload);
            Ok(())
        }

        fn register(&self, _: ServiceId, _: Arc<dyn SessionHandler>) {}
    }

    fn peer() -> Identity {
        Identity::new(NodeId(2), Incarnation(1))
    }

    #[test]
    fn what_a_full_peer_did_not_take_is_sent_in_order_once_it_is_ready() {
        let (sessions, mut outgoing) = (Narrow::default(), Outgoing::default());
        *sessions.room.lock().unwrap() = 1;
        for n in 1..=4 {
            outgoing.send(&sessions, peer(), vec![n]);
        }
        assert_eq!(*sessions.sent.lock().unwrap(), [vec![1]]);
        *sessions.room.lock().unwrap() = 2;
        outgoing.on_ready(&sessions, peer());
        assert_eq!(*sessions.sent.lock().unwrap(), [vec![1], vec![2], vec![3]]);
        *sessions.room.lock().unwrap() = 2;
        outgoing.send(&sessions, peer(), vec![5]);
        assert_eq!(sessions.sent.lock().unwrap().last(), Some(&vec![5]));
        assert_eq!(sessions.sent.lock().unwrap().len(), 5);
    }

    #[test]
    fn nothing_is_kept_for_a_removed_life_nor_without_bound() {
        let (sessions, mut outgoing) = (Narrow::default(), Outgoing::default());
        for _ in 0..KEPT_MAX + 5 {
            outgoing.send(&sessions, peer(), vec![0]);
        }
        assert_eq!(outgoing.kept.get(&peer()).map(VecDeque::len), Some(KEPT_MAX));
        outgoing.on_view(&View::empty(ClusterId::from_bytes([1; 16])));
        assert!(outgoing.kept.is_empty());
    }
}
