//! What members and a storage server say to each other inside NBD's private options: postcard, versioned, bounded.

use crate::proto::{PRIVATE_BYTES_MAX, STRING_BYTES_MAX, Verifier};
use quorate_membership::{ChainError, ClusterId, Decision, Epoch, Identity, Incarnation, NodeId, ServerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of these messages; a server refuses others.
pub const VERSION: u16 = 1;

/// A member's connection announces itself, once, before GO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u16,
    /// The member's cluster.
    pub cluster: ClusterId,
    /// The member's life; the node is that of its certificate.
    pub who: Identity,
    /// The epoch the member has installed.
    pub epoch: Epoch,
    /// The generation this connection belongs to (R11).
    pub generation: u64,
    /// The export it will use.
    pub export: String,
}

/// The answer to a hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloAnswer {
    /// Every older connection of this life to the export is closed and drained; GO may follow.
    Admitted {
        /// The server.
        server: ServerId,
        /// Its installed epoch.
        epoch: Epoch,
        /// The export's verifier (R12).
        verifier: Verifier,
    },
    /// It may not.
    Refused(HelloRefusal),
}

/// Why a hello was refused. The connection may try again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum HelloRefusal {
    /// Another version is spoken here.
    #[error("the server speaks version {0}")]
    Version(u16),
    /// The server has not installed any record: push one that enrols it.
    #[error("storage server {0} has installed no record yet")]
    NotEnrolled(ServerId),
    /// The server belongs to another cluster.
    #[error("the server belongs to cluster {0}")]
    OtherCluster(ClusterId),
    /// That life is not in the installed record: removed if the record is newer than the life, else push the newer one.
    #[error("that life is not admitted in epoch {epoch} of storage server {server}")]
    NotAdmitted {
        /// The server.
        server: ServerId,
        /// Its installed epoch.
        epoch: Epoch,
    },
    /// The certificate is another node's.
    #[error("the certificate is that of node {0}")]
    OtherNode(NodeId),
    /// A newer generation has begun.
    #[error("generation {0} has begun")]
    Stale(u64),
    /// No cluster export has that name.
    #[error("there is no cluster export of that name")]
    UnknownExport,
    /// Too many connections.
    #[error("the server has too many connections")]
    Busy,
}

/// A request to the fence service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Install the newest record of a chain that continues the server's own (R9). Long chains are sent in parts.
    Install {
        /// Oldest first.
        chain: Vec<Decision>,
    },
    /// Who is the server, what has it installed, what happened.
    Status,
}

/// The answer of the fence service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlAnswer {
    /// The record is durable, and no connection it does not admit is left.
    Installed {
        /// The server.
        server: ServerId,
        /// The installed epoch.
        epoch: Epoch,
    },
    /// It was not.
    InstallFailed(InstallError),
    /// The state of things.
    Status(FenceStatus),
    /// The request could not be read.
    Malformed,
}

/// Why an installation was not confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum InstallError {
    /// The chain proves nothing. Nothing changed.
    #[error("the chain proves nothing: {0}")]
    Chain(String),
    /// The chain does not begin where the server stands. Nothing changed; send from there.
    #[error("the chain must continue epoch {installed}")]
    Gap {
        /// What the server has installed.
        installed: Epoch,
    },
    /// The chain ends below the installed epoch. Nothing changed.
    #[error("epoch {asked} is older than the installed {installed}")]
    Older {
        /// The chain's end.
        asked: Epoch,
        /// What the server has installed.
        installed: Epoch,
    },
    /// The first record must enrol this very server (R9). Nothing changed.
    #[error("the record does not enrol storage server {server}")]
    DoesNotEnrol {
        /// The server.
        server: ServerId,
    },
    /// The record retires this server: it serves nobody until it is enrolled afresh, under its new id.
    #[error("the record retires this storage server; it is now {server}")]
    Retired {
        /// Its new id.
        server: ServerId,
    },
    /// The record could not be made durable. It may or may not be after a restart.
    #[error("the record could not be made durable: {0}")]
    NotDurable(String),
    /// The record is installed, but connections it does not admit still have I/O under way: not a fence yet.
    #[error("{connections} connections are not drained yet")]
    NotDrained {
        /// How many.
        connections: u32,
    },
    /// Too many installations wait.
    #[error("too many installations wait")]
    Busy,
}

impl From<ChainError> for InstallError {
    fn from(e: ChainError) -> Self {
        Self::Chain(e.to_string())
    }
}

/// What a storage server tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceStatus {
    /// Who it is: what `Request::Enrol` wants.
    pub server: ServerId,
    /// Its cluster, once enrolled.
    pub cluster: Option<ClusterId>,
    /// Its installed epoch, once enrolled.
    pub epoch: Option<Epoch>,
    /// The newest epoch that was confirmed to somebody in this run of the process.
    pub confirmed: Option<Epoch>,
    /// Whom it admits.
    pub admitted: BTreeMap<NodeId, Incarnation>,
    /// What it counted for each life since the process started; at most [`LIVES_MAX`] lives.
    pub lives: BTreeMap<Identity, LifeCounts>,
    /// Its exports.
    pub exports: Vec<ExportStatus>,
}

/// How many lives are counted.
pub const LIVES_MAX: usize = 1024;

/// What was counted for one life of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeCounts {
    /// Connections that were admitted.
    pub connections: u64,
    /// Writes, discards and writes of zeros that were carried out.
    pub writes_applied: u64,
    /// Those that ended after a fence of this life was confirmed: must stay 0.
    pub writes_after_fence: u64,
    /// Hellos refused because the life is not admitted.
    pub hellos_refused: u64,
    /// Requests that arrived on a closed connection and were not carried out.
    pub requests_refused: u64,
}

/// One export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether only admitted members may use it.
    pub cluster: bool,
    /// Its verifier.
    pub verifier: Verifier,
}

/// Bytes that are not such a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a message of this version")]
pub struct Malformed;

/// The bytes of a message.
///
/// # Panics
/// If it is longer than an option may be; senders split what can grow.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let bytes = postcard::to_allocvec(message).expect("plain data is encodable");
    assert!(bytes.len() <= PRIVATE_BYTES_MAX, "messages are split before they are that long");
    bytes
}

/// Reads a message that fills the bytes exactly.
///
/// # Errors
/// If they are none. Collections never take more memory than the bytes justify.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(Malformed),
    }
}

impl Hello {
    /// Whether its parts are within their limits.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.export.len() <= STRING_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn hostile_bytes_are_malformed_and_never_panic(bytes in proptest::collection::vec(0_u8.., 0..200)) {
            let _ = decode::<Hello>(&bytes);
            let _ = decode::<ControlRequest>(&bytes);
            let _ = decode::<ControlAnswer>(&bytes);
            let _ = decode::<HelloAnswer>(&bytes);
        }
    }

    #[cfg(feature = "sim")]
    #[test]
    fn hostile_messages_of_every_kind_are_malformed_or_read() {
        use quorate_membership::View;
        use quorate_membership::sim::{hostile, samples};
        fn read<T: for<'a> Deserialize<'a> + Serialize + PartialEq + core::fmt::Debug>(bytes: &[u8]) -> bool {
            match decode::<T>(bytes) {
                Ok(message) => {
                    assert_eq!(decode::<T>(&encode(&message)), Ok(message));
                    true
                }
                Err(Malformed) => false,
            }
        }
        let hello = Hello {
            version: VERSION,
            cluster: ClusterId::from_bytes([1; 16]),
            who: Identity::new(NodeId(2), Incarnation(300)),
            epoch: Epoch(4),
            generation: 5,
            export: "disk".into(),
        };
        let verdicts = hostile(&[encode(&hello)], 2_000, |bytes| {
            decode::<Hello>(bytes).is_ok_and(|hello| {
                assert!(hello.is_sound() || STRING_BYTES_MAX < hello.export.len());
                read::<Hello>(bytes)
            })
        });
        assert!(100 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
        let view = View { epoch: Epoch(1), ..View::empty(ClusterId::from_bytes([1; 16])) };
        let decision = Decision { view, accepts: BTreeMap::new() };
        let mut requests = samples(&[], 0..2, read::<ControlRequest>);
        requests.push(encode(&ControlRequest::Install { chain: vec![decision; 3] }));
        let status = FenceStatus {
            server: ServerId::from_bytes([3; 16]),
            cluster: Some(ClusterId::from_bytes([1; 16])),
            epoch: Some(Epoch(300)),
            confirmed: None,
            admitted: (1..5).map(|n| (NodeId(n), Incarnation(2))).collect(),
            lives: (1..5)
                .map(|n| (Identity::new(NodeId(n), Incarnation(2)), LifeCounts::default()))
                .collect(),
            exports: vec![ExportStatus {
                name: "disk".into(),
                size_bytes: 1 << 40,
                cluster: true,
                verifier: Verifier([9; 16]),
            }],
        };
        let mut answers = samples(&[], 0..4, read::<ControlAnswer>);
        answers.extend(samples(&[1], 0..8, read::<ControlAnswer>));
        answers.push(encode(&ControlAnswer::Status(status)));
        let mut hellos = samples(&[], 0..2, read::<HelloAnswer>);
        hellos.extend(samples(&[1], 0..8, read::<HelloAnswer>));
        hostile(&requests, 500, read::<ControlRequest>);
        hostile(&answers, 200, read::<ControlAnswer>);
        hostile(&hellos, 200, read::<HelloAnswer>);
    }

    #[test]
    fn the_first_bytes_of_each_message_stay_what_they_are() {
        // Golden bytes of version 1: enums are append-only.
        assert_eq!(encode(&ControlRequest::Status), [1]);
        assert_eq!(encode(&ControlAnswer::Malformed), [3]);
        assert_eq!(encode(&HelloAnswer::Refused(HelloRefusal::Stale(5))), [1, 5, 5]);
        let hello = Hello {
            version: VERSION,
            cluster: ClusterId::from_bytes([1; 16]),
            who: Identity::new(NodeId(2), Incarnation(3)),
            epoch: Epoch(4),
            generation: 5,
            export: "d".into(),
        };
        let bytes = encode(&hello);
        assert_eq!(bytes[0], 1);
        assert_eq!(bytes[bytes.len() - 6..], [2, 3, 4, 5, 1, b'd']);
        assert_eq!(decode(&bytes), Ok(hello));
        assert_eq!(decode::<Hello>(&[&bytes[..], &[0]].concat()), Err(Malformed));
    }
}
