//! One suite over all transports, and who is refused with which words.

use super::frames::frame;
use super::hello::{Established, HelloError, HelloRefusal, Me, RosterCheck, exchange};
use crate::driver::AgreedTimes;
use crate::driver::pki::{Ca, Credentials, PeerCertificate};
use crate::driver::transport::{
    Channel, DATAGRAM_BYTES_MAX, Lane, MemoryNetwork, QuicTransport, TcpTransport, Transport, TransportError,
};
use crate::machine::{Config, Versions};
use crate::{ClusterId, Identity, Incarnation, NodeId, StateId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const CEILING: Duration = Duration::from_secs(20);
const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quorate-link-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn credentials(&self, ca: &Ca, node: u32) -> Credentials {
        let dir = self.0.join(format!("{}-{node}", ca.cluster()));
        if !dir.exists() {
            ca.issue_node(&format!("node{node}"), NodeId(node), &[]).unwrap().save(&dir).unwrap();
        }
        Credentials::load(&dir).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(CEILING, future).await.expect("in time") })
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn tcp(credentials: Credentials) -> Arc<dyn Transport> {
    let socket = std::net::TcpListener::bind(loopback()).unwrap();
    Arc::new(TcpTransport::new(socket, credentials, &[Lane::Control, Lane::Sessions]).unwrap())
}

fn quic(credentials: Credentials) -> Arc<dyn Transport> {
    let socket = std::net::UdpSocket::bind(loopback()).unwrap();
    Arc::new(QuicTransport::new(socket, credentials, &[Lane::Control, Lane::Sessions]).unwrap())
}

fn me(node: u32) -> Me {
    Me {
        speaks: Versions::CURRENT,
        cluster: CLUSTER,
        identity: Identity::new(NodeId(node), Incarnation(u64::from(node))),
        nonce: u64::from(node),
        state: StateId::from_bytes([node as u8; 16]),
        times: AgreedTimes::of(&Config::lan(), Duration::from_millis(500)),
        path: 0,
    }
}

type Accepts = fn(NodeId, &[u8; 32]) -> Result<(), HelloRefusal>;

/// Both ends' results of a hello between node 1, which listens, and node 2, which dials.
async fn greet(
    one: &Arc<dyn Transport>,
    two: &Arc<dyn Transport>,
    claims: Me,
    accepts: Accepts,
) -> (Result<Established, HelloError>, Result<Established, HelloError>) {
    let channel = two.dial(NodeId(1), one.local_address(), Lane::Control).await.unwrap();
    let here = async {
        let channel: Channel = one.accept().await.unwrap();
        exchange(channel, &me(1), Lane::Control, None, accepts).await
    };
    let there = exchange(channel, &claims, Lane::Control, Some(NodeId(1)), |_, _| Ok(()));
    tokio::join!(here, there)
}

async fn conformance(one: Arc<dyn Transport>, two: Arc<dyn Transport>) {
    let (a, b) = greet(&one, &two, me(2), |_, _| Ok(())).await;
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.peer.node, a.peer.incarnation, a.peer.nonce), (NodeId(2), Incarnation(2), 2));
    assert_eq!((b.peer.node, a.dialled, b.dialled), (NodeId(1), false, true));
    assert_ne!(a.certificate.key, b.certificate.key);

    // A megabyte each way at once, far more than any buffer between.
    let long = vec![42; 1 << 20];
    for end in [&mut a, &mut b] {
        end.frames.set_limit(long.len());
    }
    let sent = frame(&long);
    let Established { write: a_write, read: a_read, frames: a_frames, datagrams: a_datagrams, .. } = &mut a;
    let Established { write: b_write, read: b_read, frames: b_frames, datagrams: b_datagrams, .. } = &mut b;
    let (w1, w2, r1, r2) = tokio::join!(
        async { a_write.write_all(&sent).await.and(a_write.flush().await) },
        async { b_write.write_all(&sent).await.and(b_write.flush().await) },
        a_frames.one(&mut **a_read),
        b_frames.one(&mut **b_read),
    );
    assert!(w1.is_ok() && w2.is_ok() && r1.unwrap() == long && r2.unwrap() == long);

    if let (Some(from), Some(to)) = (a_datagrams, b_datagrams) {
        from.send(vec![9; DATAGRAM_BYTES_MAX]);
        assert_eq!(to.receive().await, Some(vec![9; DATAGRAM_BYTES_MAX]));
    }

    // When one end is gone, the other one's read ends.
    drop(a);
    assert!(b.frames.one(&mut *b.read).await.is_err());
}

fn memory(dir: &Dir, ca: &Ca) -> [Arc<dyn Transport>; 2] {
    let network = MemoryNetwork::new();
    [1, 2].map(|n| {
        let certificate: PeerCertificate = dir.credentials(ca, n).me().clone();
        let address = SocketAddr::from(([127, 0, 0, 1], n as u16));
        Arc::new(network.listen(address, certificate)) as Arc<dyn Transport>
    })
}

#[test]
fn every_transport_passes_the_same_suite() {
    let dir = Dir::new("suite");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let (one, two) = (dir.credentials(&ca, 1), dir.credentials(&ca, 2));
        conformance(tcp(one.clone()), tcp(two.clone())).await;
        conformance(quic(one), quic(two)).await;
        let [one, two] = memory(&dir, &ca);
        conformance(one, two).await;
    });
}

#[test]
fn a_hello_that_claims_another_node_than_the_certificate_is_refused_and_both_ends_know_why() {
    let dir = Dir::new("claim");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        for make in [tcp, quic] {
            let (one, two) = (make(dir.credentials(&ca, 1)), make(dir.credentials(&ca, 2)));
            let (here, there) = greet(&one, &two, me(3), |_, _| Ok(())).await;
            let words = "the hello claims node 3, the certificate is of node 2";
            assert_eq!(here.err().unwrap().to_string(), format!("we refuse it: {words}"));
            assert_eq!(there.err().unwrap().to_string(), format!("it refuses us: {words}"));
        }
    });
}

#[test]
fn a_hello_of_another_cluster_or_version_is_refused() {
    let dir = Dir::new("cluster");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let (one, two) = (tcp(dir.credentials(&ca, 1)), tcp(dir.credentials(&ca, 2)));
        let claims = Me { cluster: ClusterId::from_bytes([8; 16]), ..me(2) };
        let (here, _) = greet(&one, &two, claims, |_, _| Ok(())).await;
        let words = format!("we refuse it: this is cluster {CLUSTER}");
        assert_eq!(here.err().unwrap().to_string(), words);
    });
}

/// A longer lease than the others wait for would go on after they have given its locks away (R8).
#[test]
fn nodes_with_different_times_do_not_connect_and_both_know_why() {
    let dir = Dir::new("times");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let (one, two) = (tcp(dir.credentials(&ca, 1)), tcp(dir.credentials(&ca, 2)));
        let claims = Me { times: AgreedTimes { detection_ms: 5_000, ..me(2).times }, ..me(2) };
        let (here, there) = greet(&one, &two, claims, |_, _| Ok(())).await;
        let times = |detection| {
            format!("heartbeat_ms = 100, detection_ms = {detection}, drift_margin_ms = 100, kill_ms = 500")
        };
        // Each refuses the other, and says so first.
        for (error, ours, others) in [(here.err(), 800, 5000), (there.err(), 5000, 800)] {
            let words = format!("the times differ: {} here, {} there", times(ours), times(others));
            let text = error.unwrap().to_string();
            assert!(text.starts_with(&format!("we refuse it: {words}")), "{text}");
        }
    });
}

#[test]
fn a_node_outside_the_roster_or_with_another_key_is_refused() {
    let roster = RosterCheck::default();
    assert_eq!(roster.check(NodeId(2), &[0; 32]), Ok(()), "without a roster the CA decides");
    roster.set(BTreeMap::from([(NodeId(2), [2; 32])]), BTreeMap::new());
    assert_eq!(roster.check(NodeId(2), &[2; 32]), Ok(()));
    let error = roster.check(NodeId(2), &[3; 32]).unwrap_err();
    assert_eq!(error.to_string(), "the key of node 2 is not the one in the cluster's roster");
    let error = roster.check(NodeId(3), &[3; 32]).unwrap_err();
    assert_eq!(error.to_string(), "node 3 is not in the cluster's roster");
    let dir = Dir::new("roster");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let (one, two) = (tcp(dir.credentials(&ca, 1)), tcp(dir.credentials(&ca, 2)));
        let refuse: Accepts = |node, _| Err(HelloRefusal::NotInRoster(node));
        let (_, there) = greet(&one, &two, me(2), refuse).await;
        let words = "it refuses us: node 2 is not in the cluster's roster";
        assert_eq!(there.err().unwrap().to_string(), words);
    });
}

#[test]
fn another_cluster_and_another_nodes_name_are_refused_in_the_handshake() {
    let dir = Dir::new("handshake");
    let ca = Ca::create("test", CLUSTER).unwrap();
    let other = Ca::create("other", ClusterId::from_bytes([8; 16])).unwrap();
    run(async {
        for make in [tcp, quic] {
            let one = make(dir.credentials(&ca, 1));
            let foreign = make(dir.credentials(&other, 2));
            let error = foreign.dial(NodeId(1), one.local_address(), Lane::Control).await.unwrap_err();
            // The dialler presents the name of its own cluster and trusts its own CA alone.
            assert!(error.to_string().contains("UnknownIssuer"), "{error}");
            let two = make(dir.credentials(&ca, 2));
            let error = two.dial(NodeId(3), one.local_address(), Lane::Control).await.unwrap_err();
            assert!(error.to_string().contains("certificate not valid for name \"node-3."), "{error}");
        }
    });
}

/// A TLS client that trusts our CA and presents this chain, or nothing.
async fn raw(address: SocketAddr, ca: &Ca, own: Option<&Credentials>) -> std::io::Error {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = match own {
        Some(own) => own.client_config().unwrap(),
        None => rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"quorate-control/1".to_vec()];
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(crate::driver::pki::node_tls_name(CLUSTER, NodeId(1))).unwrap();
    match tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        Err(error) => error,
        // In TLS 1.3 the client learns of it when it reads.
        Ok(mut stream) => stream.read_u8().await.unwrap_err(),
    }
}

#[test]
fn nobody_without_a_certificate_or_with_a_revoked_key_gets_in() {
    let dir = Dir::new("none");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let credentials = dir.credentials(&ca, 1);
        let one = tcp(credentials.clone());
        let error = raw(one.local_address(), &ca, None).await;
        assert!(error.to_string().contains("CertificateRequired"), "{error}");
        let two = dir.credentials(&ca, 2);
        credentials.revoked().revoke(two.me().key);
        let error = raw(one.local_address(), &ca, Some(&two)).await;
        assert!(error.to_string().contains("fatal alert"), "{error}");
    });
}

#[test]
fn nobody_listening_is_told_apart() {
    let dir = Dir::new("nobody");
    let ca = Ca::create("test", CLUSTER).unwrap();
    run(async {
        let two = tcp(dir.credentials(&ca, 2));
        let gone = std::net::TcpListener::bind(loopback()).unwrap().local_addr().unwrap();
        let error = two.dial(NodeId(1), gone, Lane::Control).await.unwrap_err();
        assert!(matches!(error, TransportError::Refused { .. }), "{error}");
    });
}
