//! The hello: each end says who it is, each end says whether it accepts the other, and only then does either count the
//! other as connected. In TLS 1.3 a client's handshake ends before the server has looked at its certificate, so without
//! this a refused node believes itself connected.

use super::frames::{FrameReader, frame};
use super::mesh::PATHS_MAX;
use crate::driver::AgreedTimes;
use crate::driver::pki::{PeerCertificate, Subject};
use crate::driver::transport::{Channel, Datagrams, Lane};
use crate::machine::{Peer, Versions};
use crate::session::SESSION_VERSION;
use crate::{ClusterId, Identity, Incarnation, NodeId, StateId};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{collections::BTreeMap, io};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// How long both hellos and both answers may take.
const HELLO_DEADLINE: Duration = Duration::from_secs(3);
/// The longest hello or answer, in bytes.
const HELLO_BYTES_MAX: usize = 1_024;
const MAGIC: [u8; 8] = *b"quorate\x02";

/// Layout (postcard, in a frame): version of each protocol, lane, cluster, then the claimed identity.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hello {
    magic: [u8; 8],
    speaks: Versions,
    sessions: u16,
    lane: u8,
    /// Which of the accepting node's addresses was dialled; what the accepting end says here means nothing.
    path: u8,
    cluster: ClusterId,
    node: NodeId,
    incarnation: Incarnation,
    nonce: u64,
    state: StateId,
    times: AgreedTimes,
}

/// Why an end does not accept the other. Told to it, so both logs have the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum HelloRefusal {
    /// The programs are of different versions.
    #[error("protocol versions differ: control {control} and sessions {sessions} are spoken here")]
    Version {
        /// What the refusing end speaks.
        control: Versions,
        /// What the refusing end speaks.
        sessions: u16,
    },
    /// Another cluster.
    #[error("this is cluster {here}")]
    OtherCluster {
        /// The refusing end's.
        here: ClusterId,
    },
    /// The hello claims another node than the certificate (R1).
    #[error("the hello claims node {claimed}, the certificate is of {certificate}")]
    OtherNode {
        /// In the hello.
        claimed: NodeId,
        /// In the certificate.
        certificate: String,
    },
    /// Somebody else answers where a certain node was dialled.
    #[error("node {dialled} was dialled, node {found} answered")]
    WrongPeer {
        /// Who was wanted.
        dialled: NodeId,
        /// Who is there.
        found: NodeId,
    },
    /// The nodes have different times, so the one would not wait long enough for the end of the other's lease (R8).
    #[error(
        "the times differ: {here} here, {there} there; `[timing]` holds from the next start of all nodes on"
    )]
    Times {
        /// The refusing end's.
        here: AgreedTimes,
        /// The refused end's.
        there: AgreedTimes,
    },
    /// The node is not in the roster.
    #[error("node {0} is not in the cluster's roster")]
    NotInRoster(NodeId),
    /// The certificate's key is not the roster's.
    #[error("the key of node {0} is not the one in the cluster's roster")]
    OtherKey(NodeId),
    /// The other end is the same process, or the same life.
    #[error("node {0} talks to itself")]
    Myself(NodeId),
    /// It has too many connections already.
    #[error("node {0} has too many connections")]
    TooMany(NodeId),
}

/// Who we are, in every hello.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Me {
    pub(crate) cluster: ClusterId,
    pub(crate) identity: Identity,
    pub(crate) nonce: u64,
    pub(crate) state: StateId,
    pub(crate) speaks: Versions,
    pub(crate) times: AgreedTimes,
    /// The path that is dialled.
    pub(crate) path: u8,
}

/// The keys of the newest roster, and second keys of nodes that are being renewed; without a roster yet, the cluster's CA
/// alone decides.
#[derive(Clone, Debug, Default)]
pub(crate) struct RosterCheck(Arc<Mutex<(Option<Keys>, Keys)>>);

type Keys = BTreeMap<NodeId, [u8; 32]>;

impl RosterCheck {
    pub(crate) fn set(&self, keys: Keys, renewals: Keys) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Some(keys), renewals);
    }

    pub(crate) fn check(&self, node: NodeId, key: &[u8; 32]) -> Result<(), HelloRefusal> {
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match keys.0.as_ref().map(|r| r.get(&node)) {
            None => Ok(()),
            Some(None) => Err(HelloRefusal::NotInRoster(node)),
            Some(Some(expected)) if expected == key || keys.1.get(&node) == Some(key) => Ok(()),
            Some(Some(_)) => Err(HelloRefusal::OtherKey(node)),
        }
    }
}

/// A connection that both ends have accepted.
pub(crate) struct Established {
    pub(crate) peer: Peer,
    pub(crate) certificate: PeerCertificate,
    pub(crate) dialled: bool,
    /// Which of the addresses of the end that was dialled.
    pub(crate) path: u8,
    pub(crate) write: Box<dyn AsyncWrite + Send + Unpin>,
    pub(crate) read: Box<dyn AsyncRead + Send + Unpin>,
    /// Holds what came behind the hello.
    pub(crate) frames: FrameReader,
    pub(crate) datagrams: Option<Datagrams>,
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("the hello failed: {0}")]
    Broken(#[from] io::Error),
    #[error("we refuse it: {0}")]
    Here(HelloRefusal),
    #[error("it refuses us: {0}")]
    There(HelloRefusal),
}

/// Exchanges hellos and answers. `dialled` is the node that was dialled, if we did.
pub(crate) async fn exchange(
    channel: Channel,
    me: &Me,
    lane: Lane,
    dialled: Option<NodeId>,
    accepts: impl FnOnce(NodeId, &[u8; 32]) -> Result<(), HelloRefusal>,
) -> Result<Established, HelloError> {
    let talk = talk(channel, me, lane, dialled, accepts);
    tokio::time::timeout(HELLO_DEADLINE, talk).await.unwrap_or_else(|_| {
        let text = format!("no answer within {HELLO_DEADLINE:?}");
        Err(HelloError::Broken(io::Error::new(io::ErrorKind::TimedOut, text)))
    })
}

async fn talk(
    channel: Channel,
    me: &Me,
    lane: Lane,
    dialled: Option<NodeId>,
    accepts: impl FnOnce(NodeId, &[u8; 32]) -> Result<(), HelloRefusal>,
) -> Result<Established, HelloError> {
    let Channel { peer: certificate, dialled: by_us, mut write, mut read, datagrams, .. } = channel;
    let mut frames = FrameReader::new(HELLO_BYTES_MAX);
    let ours = Hello {
        magic: MAGIC,
        speaks: me.speaks,
        sessions: SESSION_VERSION,
        lane: lane as u8,
        path: if dialled.is_some() { me.path } else { 0 },
        cluster: me.cluster,
        node: me.identity.node,
        incarnation: me.identity.incarnation,
        nonce: me.nonce,
        state: me.state,
        times: me.times,
    };
    send(&mut write, &ours).await?;
    let theirs: Hello = receive(&mut frames, &mut read).await?;
    let verdict =
        judge(&ours, &theirs, &certificate, dialled).and_then(|()| accepts(theirs.node, &certificate.key));
    send(&mut write, &verdict).await?;
    // Theirs is awaited even after our own refusal: closing earlier could destroy ours on its way.
    let answer: Result<Result<(), HelloRefusal>, _> = receive(&mut frames, &mut read).await;
    verdict.map_err(HelloError::Here)?;
    answer?.map_err(HelloError::There)?;
    let peer = Peer { node: theirs.node, incarnation: theirs.incarnation, nonce: theirs.nonce };
    let path = if dialled.is_some() { ours.path } else { theirs.path.min(PATHS_MAX as u8 - 1) };
    Ok(Established { peer, certificate, dialled: by_us, path, write, read, frames, datagrams })
}

fn judge(
    ours: &Hello,
    theirs: &Hello,
    certificate: &PeerCertificate,
    dialled: Option<NodeId>,
) -> Result<(), HelloRefusal> {
    if (ours.magic, ours.sessions, ours.lane) != (theirs.magic, theirs.sessions, theirs.lane)
        || ours.speaks.common(theirs.speaks).is_none()
    {
        return Err(HelloRefusal::Version { control: ours.speaks, sessions: SESSION_VERSION });
    }
    if ours.cluster != theirs.cluster || certificate.cluster != ours.cluster {
        return Err(HelloRefusal::OtherCluster { here: ours.cluster });
    }
    if certificate.subject != Subject::Node(theirs.node) {
        let certificate = certificate.subject.to_string();
        return Err(HelloRefusal::OtherNode { claimed: theirs.node, certificate });
    }
    if let Some(wanted) = dialled.filter(|d| *d != theirs.node) {
        return Err(HelloRefusal::WrongPeer { dialled: wanted, found: theirs.node });
    }
    if theirs.node == ours.node && theirs.nonce == ours.nonce {
        return Err(HelloRefusal::Myself(ours.node));
    }
    if ours.times != theirs.times {
        return Err(HelloRefusal::Times { here: ours.times, there: theirs.times });
    }
    Ok(())
}

async fn send<T: Serialize>(to: &mut (dyn AsyncWrite + Send + Unpin), value: &T) -> io::Result<()> {
    let bytes = postcard::to_stdvec(value).expect("plain data into memory always encodes");
    to.write_all(&frame(&bytes)).await?;
    to.flush().await
}

async fn receive<T: serde::de::DeserializeOwned>(
    frames: &mut FrameReader,
    from: &mut (dyn AsyncRead + Send + Unpin),
) -> io::Result<T> {
    let bytes = frames.one(from).await?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it does not decode");
    match postcard::take_from_bytes(&bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(damaged()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::hostile;

    const TIMES: AgreedTimes =
        AgreedTimes { heartbeat_ms: 100, detection_ms: 800, drift_margin_ms: 20, kill_ms: 300 };

    fn hello(node: u32) -> Hello {
        Hello {
            magic: MAGIC,
            speaks: Versions::CURRENT,
            sessions: SESSION_VERSION,
            lane: Lane::Control as u8,
            path: 0,
            cluster: ClusterId::from_bytes([1; 16]),
            node: NodeId(node),
            incarnation: Incarnation(300),
            nonce: u64::MAX,
            state: StateId::from_bytes([9; 16]),
            times: TIMES,
        }
    }

    fn certificate() -> PeerCertificate {
        PeerCertificate {
            cluster: ClusterId::from_bytes([1; 16]),
            subject: Subject::Node(NodeId(2)),
            name: "node2".into(),
            key: [3; 32],
            not_before: 0,
            not_after: i64::MAX,
            der: Vec::new(),
        }
    }

    fn refusals() -> Vec<HelloRefusal> {
        let here = ClusterId::from_bytes([2; 16]);
        vec![
            HelloRefusal::Version { control: Versions::CURRENT, sessions: 2 },
            HelloRefusal::OtherCluster { here },
            HelloRefusal::OtherNode { claimed: NodeId(1), certificate: "node 2".into() },
            HelloRefusal::WrongPeer { dialled: NodeId(1), found: NodeId(2) },
            HelloRefusal::Times { here: TIMES, there: AgreedTimes { kill_ms: 1, ..TIMES } },
            HelloRefusal::NotInRoster(NodeId(1)),
            HelloRefusal::OtherKey(NodeId(1)),
            HelloRefusal::Myself(NodeId(1)),
            HelloRefusal::TooMany(NodeId(1)),
        ]
    }

    /// What comes in a stream that then ends, read as one message.
    fn received<T: serde::de::DeserializeOwned>(mut bytes: &[u8]) -> io::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(receive(&mut FrameReader::new(HELLO_BYTES_MAX), &mut bytes))
    }

    #[test]
    fn a_hostile_hello_is_refused_unless_it_is_the_certificates_nodes() {
        let sample = frame(&postcard::to_stdvec(&hello(2)).unwrap());
        let ours = hello(1);
        let verdicts = hostile(&[sample], 3_000, |bytes| match received::<Hello>(bytes) {
            Ok(theirs) => {
                let same =
                    (theirs.magic, theirs.sessions, theirs.lane, theirs.cluster, theirs.node, theirs.times)
                        == (MAGIC, SESSION_VERSION, ours.lane, ours.cluster, NodeId(2), TIMES)
                        && ours.speaks.common(theirs.speaks).is_some();
                assert_eq!(
                    judge(&ours, &theirs, &certificate(), Some(NodeId(2))).is_ok(),
                    same,
                    "{theirs:?}"
                );
                true
            }
            Err(_) => false,
        });
        assert!(100 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn a_hostile_answer_is_an_error_or_an_answer() {
        let answers = refusals().into_iter().map(Err).chain([Ok(())]);
        let samples: Vec<Vec<u8>> = answers
            .map(|answer: Result<(), HelloRefusal>| frame(&postcard::to_stdvec(&answer).unwrap()))
            .collect();
        let verdicts = hostile(&samples, 500, |bytes| match received::<Result<(), HelloRefusal>>(bytes) {
            // It is logged.
            Ok(answer) => {
                answer.map_or_else(|refusal| refusal.to_string().len() < 4 * HELLO_BYTES_MAX, |()| true)
            }
            Err(_) => false,
        });
        assert!(100 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
    }

    /// The whole exchange over a stream that gives hostile bytes and then ends: it ends too, and says what was wrong.
    #[test]
    fn an_exchange_with_hostile_bytes_ends() {
        let answer: Result<(), HelloRefusal> = Ok(());
        let good =
            [frame(&postcard::to_stdvec(&hello(2)).unwrap()), frame(&postcard::to_stdvec(&answer).unwrap())]
                .concat();
        let me = Me {
            cluster: ClusterId::from_bytes([1; 16]),
            identity: Identity::new(NodeId(1), Incarnation(1)),
            nonce: 1,
            state: StateId::from_bytes([8; 16]),
            speaks: Versions::CURRENT,
            times: TIMES,
            path: 0,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let verdicts = hostile(&[good], 2_000, |bytes| {
            let channel = Channel {
                peer: certificate(),
                lane: Lane::Control,
                dialled: false,
                write: Box::new(tokio::io::sink()),
                read: Box::new(io::Cursor::new(bytes.to_vec())),
                datagrams: None,
            };
            match runtime.block_on(exchange(channel, &me, Lane::Control, None, |_, _| Ok(()))) {
                Ok(established) => {
                    assert_eq!((established.peer.node, established.dialled), (NodeId(2), false));
                    true
                }
                Err(error) => {
                    assert!(!matches!(&error, HelloError::Broken(e) if e.kind() == io::ErrorKind::TimedOut));
                    false
                }
            }
        });
        assert!(50 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
    }
}
