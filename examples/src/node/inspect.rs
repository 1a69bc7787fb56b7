//! What every node shows of its locks, gathered from all members over the sessions.
//!
//! | message | fields |
//! |---|---|
//! | `Ask` | the asker's number for it, a lockspace, a resource (or all) |
//! | `Piece` | that number, whether it is the last, up to [`PIECE_BYTES`] bytes of a postcard-encoded `NodeReport` |

use quorate_dlm::Dlm;
use quorate_dlm::explain::{ClusterReport, NodeReport};
use quorate_dlm::service::LockServer;
use quorate_membership::{Epoch, Identity, Membership, SendError, ServiceId, SessionHandler, Sessions};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// The version of these messages, their first byte.
const VERSION: u8 = 1;
/// How many bytes of a report go into one message.
const PIECE_BYTES: usize = 48 * 1024;
/// The longest report that is listened to, in bytes.
const REPORT_BYTES_MAX: usize = 16 << 20;
/// How long the others may take, and how long one of them waits for the asker to take more. A node that is stuck is named,
/// not waited for.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Message {
    Ask { number: u64, lockspace: Option<String>, resource: Option<String> },
    Piece { number: u64, last: bool, bytes: Vec<u8> },
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        // Serialising plain data into memory cannot fail.
        postcard::to_extend(self, vec![VERSION]).unwrap_or_default()
    }

    /// `None` for what the program of this version does not say.
    fn decode(payload: &[u8]) -> Option<Self> {
        match payload.split_first() {
            Some((&VERSION, message)) => match postcard::take_from_bytes(message) {
                Ok((message, [])) => Some(message),
                _ => None,
            },
            _ => None,
        }
    }
}

/// The report that a node has sent, whole; `None` for one that is none, or another node's.
fn report_of(from: Identity, bytes: &[u8]) -> Option<NodeReport> {
    match postcard::take_from_bytes::<NodeReport>(bytes) {
        Ok((report, [])) if report.node == from => Some(report),
        _ => None,
    }
}

/// An answer that is under way.
#[derive(Default)]
struct Gathering {
    wanted: BTreeSet<Identity>,
    bytes: BTreeMap<Identity, Vec<u8>>,
    done: BTreeMap<Identity, NodeReport>,
}

/// Answers for this node, and asks the others.
pub(crate) struct Inspector {
    this: Weak<Self>,
    membership: Arc<dyn Membership>,
    sessions: Arc<dyn Sessions>,
    dlm: Arc<Dlm>,
    pub(crate) server: OnceLock<LockServer>,
    tokio: tokio::runtime::Handle,
    state: Mutex<(u64, BTreeMap<u64, Gathering>)>,
    /// A report is whole, or a peer takes more.
    changed: Notify,
}

impl Inspector {
    /// Registers with the sessions; before the node joins.
    pub(crate) fn start(
        membership: Arc<dyn Membership>,
        sessions: Arc<dyn Sessions>,
        dlm: Arc<Dlm>,
    ) -> Arc<Self> {
        let inspector = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            membership,
            sessions: Arc::clone(&sessions),
            dlm,
            server: OnceLock::new(),
            tokio: tokio::runtime::Handle::current(),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        sessions.register(ServiceId::NODE, Arc::clone(&inspector) as _);
        inspector
    }

    /// What this node shows.
    pub(crate) fn report(&self, lockspace: Option<&str>, resource: Option<&str>) -> NodeReport {
        let mut report = NodeReport {
            node: self.membership.me(),
            lockspaces: self.dlm.dump(),
            stats: self.dlm.stats(),
            processes: self.server.get().map(LockServer::processes).unwrap_or_default(),
            left_out: 0,
        };
        report.narrow(lockspace, resource);
        report
    }

    /// Asks all members of the view.
    pub(crate) async fn gather(&self, lockspace: Option<&str>, resource: Option<&str>) -> ClusterReport {
        let me = self.membership.me();
        let others: Vec<Identity> = self.membership.view().identities().filter(|who| *who != me).collect();
        let number = {
            let mut state = self.state();
            state.0 += 1;
            let number = state.0;
            let wanted = others.iter().copied().collect();
            state.1.insert(number, Gathering { wanted, ..Gathering::default() });
            number
        };
        for who in &others {
            let ask = Message::Ask {
                number,
                lockspace: lockspace.map(str::to_owned),
                resource: resource.map(str::to_owned),
            };
            if self.send(*who, &ask).is_err() {
                // It stays among the silent ones.
                tracing::debug!(target: "quorate", node = %who, "cannot be asked");
            }
        }
        let mine = self.report(lockspace, resource);
        let all = async {
            loop {
                let changed = self.changed.notified();
                if self.state().1.get(&number).is_none_or(|g| g.wanted.is_empty()) {
                    return;
                }
                changed.await;
            }
        };
        // What has come when the time is over is what there is.
        let _ = tokio::time::timeout(PATIENCE, all).await;
        let gathering = self.state().1.remove(&number).unwrap_or_default();
        let mut nodes = vec![mine];
        nodes.extend(gathering.done.into_values());
        nodes.sort_by_key(|n| n.node);
        ClusterReport { nodes, silent: gathering.wanted.into_iter().collect() }
    }

    fn state(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Gathering>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, to: Identity, message: &Message) -> Result<(), SendError> {
        self.sessions.send(to, ServiceId::NODE, message.encode())
    }

    async fn answer(
        self: Arc<Self>,
        to: Identity,
        number: u64,
        lockspace: Option<String>,
        resource: Option<String>,
    ) {
        let inspector = Arc::clone(&self);
        let report = tokio::task::spawn_blocking(move || {
            let report = inspector.report(lockspace.as_deref(), resource.as_deref());
            postcard::to_allocvec(&report).unwrap_or_default()
        });
        let Ok(report) = report.await else { return };
        let count = report.len().div_ceil(PIECE_BYTES).max(1);
        for (i, piece) in report.chunks(PIECE_BYTES).enumerate() {
            let message = Message::Piece { number, last: i + 1 == count, bytes: piece.to_vec() };
            loop {
                let changed = self.changed.notified();
                match self.send(to, &message) {
                    Ok(()) => break,
                    Err(SendError::Full(_)) if tokio::time::timeout(PATIENCE, changed).await.is_ok() => {}
                    // Gone, or it takes nothing any more: it counts this node among the silent ones.
                    Err(_) => return,
                }
            }
        }
    }

    fn take_piece(&self, from: Identity, number: u64, last: bool, piece: &[u8]) {
        let mut state = self.state();
        let Some(gathering) = state.1.get_mut(&number).filter(|g| g.wanted.contains(&from)) else { return };
        let bytes = gathering.bytes.entry(from).or_default();
        bytes.extend_from_slice(piece);
        if REPORT_BYTES_MAX < bytes.len() {
            // It stays among the silent ones; what it says further is not kept.
            bytes.clear();
            return;
        }
        if !last {
            return;
        }
        match report_of(from, bytes) {
            Some(report) => {
                gathering.wanted.remove(&from);
                gathering.done.insert(from, report);
                drop(state);
                self.changed.notify_waiters();
            }
            None => tracing::warn!(target: "quorate", node = %from, "its report of locks does not decode"),
        }
    }
}

impl SessionHandler for Inspector {
    fn on_ready(&self, _to: Identity) {
        self.changed.notify_waiters();
    }

    fn deliver(&self, from: Identity, _epoch: Epoch, payload: &[u8]) {
        match (Message::decode(payload), self.this.upgrade()) {
            (Some(Message::Ask { number, lockspace, resource }), Some(this)) => {
                drop(self.tokio.spawn(this.answer(from, number, lockspace, resource)));
            }
            (Some(Message::Piece { number, last, bytes }), _) => self.take_piece(from, number, last, &bytes),
            _ => tracing::warn!(target: "quorate", node = %from, "a message of the node program was dropped"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_dlm::{LockspaceDump, LockspaceStats, ProcessInfo};
    use quorate_membership::sim::{hostile, samples};
    use quorate_membership::{Incarnation, NodeId};

    #[test]
    fn hostile_messages_of_the_node_programs_are_none_or_read() {
        let read = |bytes: &[u8]| match Message::decode(bytes) {
            Some(message) => {
                assert_eq!(Message::decode(&message.encode()), Some(message));
                true
            }
            None => false,
        };
        let mut samples = samples(&[VERSION], 0..2, read);
        let (lockspace, resource) = (Some("gfs:data".to_owned()), Some("a name".to_owned()));
        samples.push(Message::Ask { number: 300, lockspace, resource }.encode());
        samples.push(Message::Piece { number: 300, last: true, bytes: vec![7; 500] }.encode());
        let verdicts = hostile(&samples, 500, read);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn a_hostile_report_is_none_or_that_of_its_sender() {
        let from = Identity::new(NodeId(2), Incarnation(300));
        let dump = LockspaceDump {
            name: "gfs:data".into(),
            resources: Vec::new(),
            elsewhere: Vec::new(),
            recovery: vec!["a line".into()],
            members: vec![from],
        };
        let report = NodeReport {
            node: from,
            lockspaces: vec![dump.clone(), dump],
            stats: [("gfs:data".to_owned(), LockspaceStats::default())].into(),
            processes: Vec::<ProcessInfo>::new(),
            left_out: 3,
        };
        let bytes = postcard::to_allocvec(&report).unwrap();
        let verdicts = hostile(&[bytes], 2_000, |bytes| {
            report_of(from, bytes).is_some_and(|report| {
                assert_eq!(report.node, from);
                assert_eq!(report_of(from, &postcard::to_allocvec(&report).unwrap()), Some(report.clone()));
                // As it is shown.
                let mut report = report;
                report.narrow(None, None);
                true
            })
        });
        assert!(50 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }
}
