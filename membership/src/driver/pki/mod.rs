//! The cluster's own certificate authority, what its certificates say, and TLS made of them.
//!
//! | file | whose | content |
//! |---|---|---|
//! | `ca-cert.pem` | everybody | the cluster's CA |
//! | `ca-key.pem` | the administrator | its key: keep it off the nodes |
//! | `server-cert.pem`, `server-key.pem` | nodes, storage servers | for the listening side |
//! | `client-cert.pem`, `client-key.pem` | nodes, clients | for the connecting side; a node uses one key for both |
//!
//! The names are those of libnbd, nbdkit and qemu, so that their tools take these directories as they are. Who a peer
//! is stands in its certificate as a URI, `quorate:CLUSTER/node/ID` (or `server/NAME`, `client/NAME`, `admin/NAME`),
//! and is read from there and nowhere else (R1).

mod authority;
mod certificate;
mod credentials;
mod live;
mod verify;

pub use authority::{Ca, IssueError, Issued};
pub use certificate::{CertificateError, PeerCertificate, Subject};
pub use credentials::{Credentials, EXPIRY_WARNING, PkiError, TlsError};
pub use verify::{RefusedCertificate, RevokedKeys, Watcher};

use crate::{ClusterId, NodeId};

/// The TLS name under which a node is dialled: it stands in the node's certificate beside its own name, so that a
/// node's certificate is good for that node's id alone.
#[must_use]
pub fn node_tls_name(cluster: ClusterId, node: NodeId) -> String {
    let plain: String = cluster.to_string().chars().filter(|c| *c != '-').collect();
    format!("node-{node}.{plain}.quorate")
}

/// Wall-clock seconds since 1970, for certificates only.
fn unix_now() -> i64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "certificates are valid by the wall clock; nothing else uses it"
    )]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// SHA-256, by the TLS provider's own implementation.
fn sha256(bytes: &[u8]) -> [u8; 32] {
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let tls13 = suite.tls13().expect("the suite is one of TLS 1.3");
    let output = tls13.common.hash_provider.hash(bytes);
    output.as_ref().try_into().expect("SHA-256 has 32 bytes")
}
